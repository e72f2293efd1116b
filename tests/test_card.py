"""The model card: front matter that the Hub's own library reads, licences joined or refused, no path of this machine."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from qconvert import convert
from qconvert.beside import hub_id, is_id
from qconvert.errors import InputError, QConvertError, UnsupportedError, UsageError
from qconvert.formats import gguf_usage, onnx_usage, safetensors_usage
from qconvert.licenses import License, front_matter, joined, license_of, recognised, said
from qconvert.model_card import Facts, Origin, card, fenced, plain
from qconvert.report import Report, Row
from qconvert.usage import Made, Usage

hub = pytest.importorskip("huggingface_hub")
TINY, LORA = Path("golden/tiny"), Path("golden/tiny-lora")


def model(folder: Path, readme: str = "", source: Path = TINY) -> Path:
    shutil.copytree(source, folder)
    if readme:
        (folder / "README.md").write_text(readme, "utf-8")
    return folder


def cached(cache: Path, repo: str, source: Path, readme: str) -> str:
    """A repository in a Hugging Face cache."""
    root = cache / f"models--{repo.replace('/', '--')}"
    model(root / "snapshots" / ("ab" * 20), readme, source)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text("ab" * 20)
    return repo


def test_card_of_cached_models_has_their_ids_their_licence_and_what_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    base = cached(tmp_path / "hub", "some-org/tiny-1M", TINY, "---\nlicense: llama3.2\n---\n# x\n")
    lora = cached(tmp_path / "hub", "me/tiny-lora", LORA, "---\nlicense: mit\n---\n")
    made = convert(f"{base}+{lora}:0.5", bits=4, output=tmp_path / "out" / "t.gguf", card=True, eval_tokens=256)
    text = (tmp_path / "out" / "README.md").read_text("utf-8")
    read = hub.ModelCard(text)
    assert read.data.base_model == ["some-org/tiny-1M", "me/tiny-lora"]
    assert read.data.to_dict()["base_model_relation"] == "quantized"
    assert (read.data.license, read.data.library_name, read.data.pipeline_tag) == ("llama3.2", "gguf", "text-generation")
    assert {"gguf", "Q4_K_M", "qconvert"} <= set(read.data.tags)
    assert "[me/tiny-lora](https://huggingface.co/me/tiny-lora) (weight 0.5) at `abababababab`" in read.text
    assert f"{made.report.quality['mean_kl']:.4g}" in read.text and "256 tokens of the evaluation text" in read.text
    assert f"{made.report.outputs[0]['bpw']['file']:.3f}" in read.text
    assert "Verified in llama.cpp" in read.text or "Not verified" in read.text
    assert str(tmp_path) not in text and "t.gguf" in text


def test_recipe_in_the_card_makes_the_same_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    base = cached(tmp_path / "hub", "some-org/tiny", TINY, "")
    convert(base, quant="Q8_0", output=tmp_path / "a" / "t.gguf", card=True, eval_tokens=0, check=False)
    recipe = re.search(r"```yaml\n(.*?)```", (tmp_path / "a" / "README.md").read_text("utf-8"), re.DOTALL)
    assert recipe
    said = yaml.safe_load(recipe[1])
    assert said.pop("output") == "t.gguf" and said.pop("card") and said["model"] == f"some-org/tiny@{'ab' * 20}"
    again = {k.replace("-", "_"): v for k, v in said.items()}
    convert(again.pop("model"), output=tmp_path / "b" / "t.gguf", **again)
    assert (tmp_path / "a" / "t.gguf").read_bytes() == (tmp_path / "b" / "t.gguf").read_bytes()


def test_local_folders_are_never_published_as_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    convert(f"{TINY}+{LORA}", quant="Q8_0", output=tmp_path / "t.gguf", card=True, eval_tokens=0, check=False)
    text = (tmp_path / "README.md").read_text("utf-8")
    assert "golden/tiny" not in text and "base_model:" not in text.replace("# base_model:", "")
    assert "Not verified: \\-\\-no\\-check" not in text and "Not verified: --no-check." in text
    here = (tmp_path / "here").resolve()
    here.mkdir()
    monkeypatch.chdir(here)  # from here golden/tiny is not to be seen: the folders above the model are looked at too
    assert hub_id(str(here), Path(__file__).parents[1] / "golden" / "tiny", ["golden/tiny"]) is None


def test_recorded_ids_are_taken_where_they_lead_to_no_folder(tmp_path: Path) -> None:
    assert hub_id(str(tmp_path), tmp_path, [None, "/abs/path", "org/name"]) == "org/name"
    assert hub_id("org/name@main", tmp_path, []) == "org/name"
    assert hub_id(str(tmp_path), tmp_path, ["../x/y", "a/b/c", "-x/y", "org/na..me", "org/x.git", "x"]) is None


@pytest.mark.parametrize("text", ["org/name", "meta-llama/Llama-3.2-1B", "a/b", "x_y/z.1-w", "a--b/c", "a/b.", "a/.b", "a b/c"])
def test_ids_are_those_that_the_hub_takes(text: str) -> None:
    try:
        hub.utils.validate_repo_id(text)
        taken = True
    except hub.errors.HFValidationError:
        taken = False
    assert is_id(text) == taken


# licences ------------------------------------------------------------------------------------------

A, B = ("the model a", "the adapter b")


@pytest.mark.parametrize(
    ("x", "y", "together"),
    [
        ("mit", "mit", "mit"),
        ("mit", "apache-2.0", "apache-2.0"),
        ("apache-2.0", "bsd-3-clause", "apache-2.0"),
        ("llama3.1", "apache-2.0", "llama3.1"),
        ("mit", "gemma", "gemma"),
        ("cc-by-nc-4.0", "cc0-1.0", "cc-by-nc-4.0"),
        ("llama3.1", "gemma", None),
        ("gpl-3.0", "cc-by-nc-4.0", None),
        ("apache-2.0", "gpl-2.0", None),
        ("apache-2.0", "gpl-3.0", "gpl-3.0"),
        ("other", "other", None),
        ("mit", "cc-by-nd-4.0", None),
    ],
)
def test_licences_join_or_are_refused_by_name(x: str, y: str, together: str | None) -> None:
    for first, second in ((x, y), (y, x)):
        found = [(A, License(first, where="a/README.md")), (B, License(second, where="b/LICENSE"))]
        if together:
            assert (joined(found, changed=True) or License("")).id == together
        else:
            with pytest.raises(UnsupportedError, match=r"README\.md|LICENSE") as e:
                joined(found, changed=True)
            assert "--license" in str(e.value) and e.value.exit_code == 5


def test_an_unknown_licence_leaves_all_unknown_but_a_conflict_is_found() -> None:
    mit, gemma, llama = (License(i, where=f"{i}/README.md") for i in ("mit", "gemma", "llama3"))
    assert joined([(A, mit), (B, None)], True) is None
    assert joined([(A, License("cc-by-nd-4.0"))], False) == License("cc-by-nd-4.0")
    with pytest.raises(UnsupportedError, match=r"gemma.*llama3"):
        joined([(A, gemma), (B, None), ("the adapter c", llama)], True)


def test_other_licences_are_one_where_name_or_link_are() -> None:
    nemotron = License("other", "nvidia-open-model", "LICENSE", "a/README.md")
    assert joined([(A, nemotron), (B, nemotron._replace(link=None, where="b"))], True) == nemotron


def test_front_matter_is_read_as_the_hub_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    for text in (
        "---\nlicense: mit\n---\nx",
        "\ufeff---\r\nlicense: mit\r\n---\r\n",
        "---  \nlicense: [mit]\n---\n---\na: b\n---\n",
    ):
        path.write_text(text, "utf-8", newline="")
        assert (license_of(tmp_path) or License("")).id == "mit"
    path.write_text("# license: mit\n---\nlicense: gpl\n---\n", "utf-8")
    assert front_matter(path) == {} and license_of(tmp_path) is None
    for text in ("---\nlicense: unknown\n---\n", "---\ntags: []\n---\n"):
        path.write_text(text, "utf-8")
        assert license_of(tmp_path) is None
    for text in (
        "---\nlicense: MIT License\n---\n",
        "---\nlicense: [mit, gpl]\n---\n",
        "---\na: [\n---\n",
        "---\na: !!x\n---\n",
    ):
        path.write_text(text, "utf-8")
        with pytest.raises(InputError, match=r"README\.md"):
            license_of(tmp_path)


def test_licence_texts_are_known_whole(tmp_path: Path) -> None:
    mit = Path("LICENSE").read_text("utf-8")
    assert recognised(mit) == "mit"
    assert recognised(f"{mit}\nThe Software may not be used on Sundays.") is None
    assert recognised(mit.replace("free of charge", "for a fee")) is None
    assert recognised("SPDX-License-Identifier: Apache-2.0\n") == "apache-2.0"
    assert recognised("LLAMA 3.2 COMMUNITY LICENSE AGREEMENT\nLlama 3.2 Version Release Date: ...") == "llama3.2"
    assert recognised("") is None
    (tmp_path / "LICENSE.txt").write_text(mit)
    assert license_of(tmp_path) == License("mit", where=str(tmp_path / "LICENSE.txt"))


def test_licence_texts_of_others_are_known(shared_data: Path) -> None:
    found = {p.stem: recognised(p.read_text("utf-8")) for p in (shared_data / "licenses").glob("*.txt")}
    assert found and all(name.lower().endswith(str(id)) for name, id in found.items()), found


def test_conflict_stops_before_a_byte_and_license_says_which(tmp_path: Path) -> None:
    base = model(tmp_path / "base", "---\nlicense: gemma\n---\n")
    lora = model(tmp_path / "lora", "---\nlicense: cc-by-nc-4.0\n---\n", LORA)
    out = tmp_path / "out"
    with pytest.raises(UnsupportedError, match=r"base/README\.md.*lora/README\.md"):
        convert(f"{base}+{lora}", quant="Q8_0", output=out / "t.gguf", card=True, check=False)
    assert not out.exists()
    convert(f"{base}+{lora}", quant="Q8_0", output=out / "t.gguf", card=True, license="cc-by-nc-4.0", check=False)
    assert hub.ModelCard((out / "README.md").read_text("utf-8")).data.license == "cc-by-nc-4.0"
    for wrong in ({"license": "mit"}, {"card": True, "license": "MIT"}):
        with pytest.raises(UsageError, match="--license"):
            convert(str(base), quant="Q8_0", output=out / "u.gguf", **wrong)  # type: ignore[arg-type]
    assert said("openrail++").id == "openrail++"


def test_license_of_a_gguf_comes_from_its_metadata(tmp_path: Path) -> None:
    from qconvert.licenses import of_gguf

    kv = {"general.license": "apache-2.0", "general.license.link": "https://x"}
    assert of_gguf(kv, tmp_path) == License("apache-2.0", None, "https://x", str(tmp_path))
    assert of_gguf({"general.license": "my own"}, tmp_path) is None


# where it is written ---------------------------------------------------------------------------------


def test_a_readme_of_somebody_else_stays(tmp_path: Path) -> None:
    mine = tmp_path / "README.md"
    mine.write_text("mine")
    options = {"quant": "Q8_0", "card": True, "check": False}
    convert(str(TINY), output=tmp_path / "a.gguf", force=True, **options)
    assert mine.read_text() == "mine" and "Q8_0" in (tmp_path / "a.md").read_text("utf-8")
    with pytest.raises(UsageError, match=r"a\.md exists"):
        (tmp_path / "a.gguf").unlink()
        convert(str(TINY), output=tmp_path / "a.gguf", **options)
    folder = tmp_path / "st"
    folder.mkdir()
    (folder / "README.md").write_text("mine")
    with pytest.raises(UsageError, match=r"README\.md exists"):
        convert(str(TINY), to="safetensors", quant="bf16", output=folder, card=True, check=False)
    assert [p.name for p in folder.iterdir()] == ["README.md"]


def test_a_second_file_in_a_folder_has_a_card_of_its_own(tmp_path: Path) -> None:
    for quant in ("Q8_0", "F16", "Q8_0"):
        convert(str(TINY), quant=quant, output=tmp_path / f"{quant}.gguf", card=True, check=False, force=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["F16.gguf", "F16.md", "Q8_0.gguf", "README.md"]
    assert "Q8_0" in (tmp_path / "README.md").read_text("utf-8")


# the text --------------------------------------------------------------------------------------------

HOSTILE = "x'\"]: {a}\n---\n# <script>|`*_ [a](b) \x1b[31m \u202e"
BPW = {"codes": 4.0, "linear": 4.5, "file": 5.0}
REPORT = Report(
    [{"path": "/home/me/secret/a.gguf", "format": "gguf", "quant": "Q4_K_M", "nbytes": 10, "bpw": BPW}],
    [Row("runtime", "not verified", None, None, "skip", "no | xllamacpp")],
    accounting={"calibration": {"text": "/home/me/secret/text.txt", "tokens": 77}},
    quality={"skipped": "--eval-tokens 0"},
    quant="Q4_K_M",
    fallbacks=[{"tensor": HOSTILE, "wanted": "q4_k", "got": "q8_0", "reason": "rows | divide"}],
    pipeline="merge-adapters",
)
ORIGIN = Origin("model", "tiny", "org/tiny", None, 1.0, License("mit"))
FACTS = Facts("tiny", (ORIGIN,), License("mit"), True, False, "text-generation", Usage("gguf", ()), "model: x\n", "1.0")


def test_hostile_names_change_neither_front_matter_nor_markup() -> None:
    license = License("other", HOSTILE, "LICENSE")
    origin = Origin("adapter", HOSTILE, None, None, 1.0, license)
    recipe = f"model: |\n{HOSTILE}```"
    text = card(REPORT, FACTS._replace(title=HOSTILE, origins=(ORIGIN, origin), license=license, recipe=recipe))
    front, body = text.removeprefix("---\n").split("\n---\n", 1)
    found = yaml.safe_load(front)
    assert found["license_name"] == HOSTILE and found["base_model"] == ["org/tiny"]
    assert "license_link" not in found  # LICENSE of a folder that is nowhere
    outside = re.sub(r"(?ms)^(`{3,})\w*\n.*?^\1$", "", body)
    outside = re.sub(r"`[^`\n]*`", "", outside)  # a name in a span of code is no markup either
    assert "<script>" not in outside.replace("\\<script\\>", "") and "\x1b" not in text.split("```")[0]
    lines = [line for line in outside.splitlines() if line.startswith("|")]
    tables = {len(re.findall(r"(?<!\\)\|", line)) for line in lines}
    assert tables == {3, 4, 5}  # two, three and four columns; no more bars than there are cells
    assert hub.ModelCard(text).data.to_dict() == found


def test_card_says_names_and_no_paths_and_what_was_not_measured() -> None:
    text = card(REPORT, FACTS)
    assert "secret" not in text and "text.txt" in text and "77 tokens" in text
    assert "Not measured: \\-\\-eval" not in text and "Not measured: --eval-tokens 0" in text
    assert "Not verified: no \\| xllamacpp." in text
    assert "1 tensors did not get the type" in text


def test_relation_is_one_that_the_hub_knows() -> None:
    lora = ORIGIN._replace(kind="adapter", id="me/lora")
    assert FACTS.relation == FACTS._replace(quantized=False).relation == "quantized"
    assert FACTS._replace(origins=(ORIGIN, lora)).relation == "quantized"
    assert FACTS._replace(origins=(ORIGIN, lora), quantized=False).relation == "finetune"
    assert FACTS._replace(origins=(ORIGIN, lora, lora), quantized=False).relation == "merge"


def test_a_licence_in_a_repository_is_linked_to_there() -> None:
    given = License("other", "x", "LICENSE.md")
    text = card(REPORT, FACTS._replace(license=given, origins=(ORIGIN._replace(license=given),)))
    assert hub.ModelCard(text).data.license_link == "https://huggingface.co/org/tiny/blob/main/LICENSE.md"


def test_fences_are_longer_than_what_they_hold() -> None:
    assert fenced("sh", "a").startswith("```sh\n") and fenced("", "````").startswith("`````\n")
    assert plain("a\n# b | c") == "a \\# b \\| c"


# how it is run ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("quant", ["w4a16", "gptq", "nf4", "mlx-4bit", "bf16", "bitnet", "fp8-block", "finegrained-fp8"])
def test_every_dialect_that_a_library_loads_has_a_command(quant: str) -> None:
    found = safetensors_usage.usage(Made("x", quant, ("model.safetensors",), "it's", "text-generation"))
    assert found.commands and found.library == ("mlx" if quant.startswith("mlx") else "transformers")
    assert ("vLLM" in {c.runtime for c in found.commands}) == (quant in ("w4a16", "gptq", "bf16", "fp8-block"))
    for each in found.commands:
        assert "it's" in each.code if each.language == "python" else "'it'\"'\"'s'" in each.code


def test_dialects_that_no_library_loads_whole_have_none() -> None:
    for quant in ("hqq", "quip"):
        assert safetensors_usage.usage(Made("x", quant, (), "x", "text-generation")).commands == ()


def test_gguf_commands_quote_names(tmp_path: Path) -> None:
    found = gguf_usage.usage(Made("a b", "Q4_0", ("a b.gguf",), None, "text-generation")).commands
    assert "llama-cli -m 'a b.gguf'" in found[0].code and 'Llama("a b.gguf")' in found[1].code
    made = Made("X", "Q4_0", ("-x.gguf",), None, "feature-extraction")
    assert gguf_usage.usage(made).commands[0].code == 'llama-embedding -m ./-x.gguf -p "A sentence"'


def test_browser_layout_is_loaded_by_its_dtype() -> None:
    made = Made("x", "int4", ("onnx/model_q4.onnx", "onnx/model_q4.onnx_data", "config.json"), "x", "text-generation")
    found = onnx_usage.usage(made)
    assert found.library == "transformers.js" and '{ dtype: "q4" }' in found.commands[0].code


def run_python(code: str, folder: Path) -> str:
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


RUN = [("onnx", "int4", "onnxruntime_genai"), ("safetensors", "bf16", "transformers")]


@pytest.mark.peer
@pytest.mark.parametrize(("to", "quant", "module"), RUN)
def test_code_in_the_card_runs(to: str, quant: str, module: str, tmp_path: Path) -> None:
    pytest.importorskip(module)
    convert(str(TINY), to=to, quant=quant, output=tmp_path / "it's", card=True, check=False)
    text = (tmp_path / "it's" / "README.md").read_text("utf-8")
    codes = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(codes) == (2 if to == "onnx" else 1)
    assert all(run_python(code, tmp_path) for code in codes)


def test_command_line_writes_a_card_and_json_says_nothing_else(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "qconvert", str(TINY), "--quant", "Q8_0", "--card", "--no-check", "--json", "-"]
    done = subprocess.run([*command, "-o", tmp_path / "t.gguf"], capture_output=True, text=True)
    assert done.returncode == 0 and json.loads(done.stdout)["outputs"] and (tmp_path / "README.md").exists(), done.stderr


def test_an_onnx_model_as_input_has_no_card(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(b"")
    with pytest.raises(QConvertError, match="--card"):
        convert(str(tmp_path / "m.onnx"), to="onnx", card=True)
