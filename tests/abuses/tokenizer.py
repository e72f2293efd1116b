"""tokenizer.json and its companions that lie."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mutations import make_model

from abuses import Maker, hostile

Change = Callable[[dict[str, Any]], object]


def made(folder: Path, change: Change, file: str = "tokenizer.json") -> Path:
    make_model(folder / "model")
    path = folder / "model" / file
    (folder / "model" / "chat_template.jinja").unlink()  # which would stand before another
    document = json.loads(path.read_text("utf-8"))
    change(document)
    path.write_text(json.dumps(document), "utf-8")
    return folder / "model"


def merges(document: dict[str, Any]) -> list[Any]:
    listed: list[Any] = document["model"]["merges"]
    return listed


CHANGES: dict[str, tuple[str, Change]] = {
    "id_beyond_the_vocabulary": ("no row in the embedding", lambda d: d["model"]["vocab"].update(zzz=10**9)),
    "id_that_is_negative": ("", lambda d: d["model"]["vocab"].update(zzz=-1)),
    "id_that_is_text": ("", lambda d: d["model"]["vocab"].update(zzz="1")),
    "id_that_is_a_fraction": ("", lambda d: d["model"]["vocab"].update(zzz=1.5)),
    "id_twice": ("as token 5", lambda d: d["model"]["vocab"].update(zzz=5)),
    "vocabulary_that_is_a_number": ("", lambda d: d["model"].update(vocab=3)),
    "vocabulary_that_is_empty": ("has no model with a vocabulary", lambda d: d["model"].update(vocab={}, merges=[])),
    "merge_of_one": ("", lambda d: merges(d).append(["a"])),
    "merge_of_three": ("", lambda d: merges(d).append(["a", "b", "c"])),
    "merge_of_numbers": ("", lambda d: merges(d).append([1, 2])),
    "merge_into_nothing_known": ("", lambda d: merges(d).insert(0, ["nothing", "known"])),
    "merges_that_are_text": ("", lambda d: d["model"].update(merges="a b")),
    "added_token_twice": ("<other>", lambda d: d["added_tokens"].append({**d["added_tokens"][0], "content": "<other>"})),
    "added_token_without_an_id": ("", lambda d: d["added_tokens"].append({"content": "<x>"})),
    "added_token_beyond_the_vocabulary": ("no row in", lambda d: d["added_tokens"].append({"id": 10**9, "content": "<x>"})),
    "added_token_without_text": ("", lambda d: d["added_tokens"].append({"id": 1023, "special": True})),
    "added_token_that_is_a_list": ("", lambda d: d["added_tokens"].append(["x"])),
    "added_tokens_that_are_a_number": ("", lambda d: d.update(added_tokens=3)),
    "model_of_unknown_type": ("", lambda d: d["model"].update(type="Magic")),
    "model_without_a_vocabulary": ("has no model with a vocabulary", lambda d: d["model"].pop("vocab")),
    "step_of_unknown_type": ("", lambda d: d.update(pre_tokenizer={"type": "Magic"})),
    "step_without_a_type": ("", lambda d: d.update(normalizer={})),
    "step_that_is_a_list": ("", lambda d: d.update(normalizer=[1])),
    "sequence_without_steps": ("", lambda d: d.update(pre_tokenizer={"type": "Sequence"})),
    "charsmap_that_is_no_base64": ("", lambda d: d.update(normalizer={"type": "Precompiled", "precompiled_charsmap": "@@@"})),
    "template_of_unknown_tokens": ("", lambda d: d.update(post_processor={
        "type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<no>", "type_id": 0}}],
        "pair": [], "special_tokens": {}})),
    "regex_that_is_none": ("", lambda d: d.update(pre_tokenizer={
        "type": "Split", "pattern": {"Regex": "(("}, "behavior": "Isolated", "invert": False})),
}  # fmt: skip


def named(name: str, change: Change, file: str = "tokenizer.json") -> Maker:
    def make(folder: Path) -> Path:
        return made(folder, change, file)

    make.__name__, make.__module__ = name, __name__
    return make


for name, (words, change) in CHANGES.items():
    hostile(words)(named(name, change))

CONFIGS: dict[str, tuple[str, Change]] = {
    "decoder_with_ids_that_are_none": ("", lambda c: c.update(added_tokens_decoder={"x": {"content": "<x>"}})),
    "decoder_that_is_a_list": ("", lambda c: c.update(added_tokens_decoder=[1])),
    "decoder_of_texts": ("", lambda c: c.update(added_tokens_decoder={"3": "<x>"})),
    "chat_template_that_is_a_number": ("", lambda c: c.update(chat_template=3)),
    "chat_templates_without_names": ("", lambda c: c.update(chat_template=[{"template": "x"}])),
}
for name, (words, change) in CONFIGS.items():
    hostile(words)(named(name, change, "tokenizer_config.json"))


def overwritten(folder: Path, text: str) -> Path:
    make_model(folder / "model")
    (folder / "model" / "tokenizer.json").write_text(text, "utf-8")
    return folder / "model"


@hostile("JSON")
def document_deeply_nested(folder: Path) -> Path:
    return overwritten(folder, '{"model":' * 200_000)


@hostile("JSON")
def document_cut_short(folder: Path) -> Path:
    return overwritten(folder, '{"model": {"vocab": {"a": 0, ')


@hostile("")
def steps_deeply_nested(folder: Path) -> Path:
    step = '{"type": "Sequence", "normalizers": ['
    text = (make_model(folder / "x"), (folder / "x" / "tokenizer.json").read_text("utf-8"))[1]
    document = json.loads(text)
    document["normalizer"] = "@"
    return overwritten(folder, json.dumps(document).replace('"@"', step * 200 + "]}" * 200))


@hostile("no row in the embedding")
def vocabulary_of_a_million(folder: Path) -> Path:
    return made(folder, lambda d: d["model"]["vocab"].update({f"t{i}": i for i in range(1024, 1_000_000)}))
