"""golden/tiny and golden/tiny-lora: what tools/make_tiny.py trained loads in transformers and PEFT, and has learned."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ROOT = Path(__file__).parents[1]
TINY, LORA = ROOT / "golden" / "tiny", ROOT / "golden" / "tiny-lora"
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def make_tiny() -> ModuleType:
    from importlib.util import module_from_spec, spec_from_file_location

    spec = spec_from_file_location("make_tiny", ROOT / "tools" / "make_tiny.py")
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load() -> PreTrainedModel:
    model: PreTrainedModel = transformers.AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    return model


def nll_of_held_out_code(model: PreTrainedModel, make_tiny: ModuleType) -> float:
    from tokenizers import Tokenizer

    tokens = make_tiny.encode(Tokenizer.from_file(str(TINY / "tokenizer.json")), make_tiny.code_text(held_out=True))
    return float(make_tiny.mean_nll(model, tokens, windows=4))


def test_model_with_its_tokenizer_is_at_most_5_mb() -> None:
    assert sum(path.stat().st_size for path in TINY.iterdir()) <= 5_000_000


def test_every_row_is_a_multiple_of_256() -> None:
    matrices = [p for p in load().parameters() if p.ndim == 2]
    assert {p.shape[1] % 256 for p in matrices} == {0}


def test_readme_gives_the_hash_of_every_file() -> None:
    told = dict(re.findall(r"`(tiny[\w./-]*)` \| `([0-9a-f]{64})`", (ROOT / "golden" / "README.md").read_text("utf-8")))
    files = [path for folder in (TINY, LORA) for path in folder.iterdir()]
    assert told == {p.relative_to(ROOT / "golden").as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def test_model_knows_pythons_prose(make_tiny: ModuleType) -> None:
    from tokenizers import Tokenizer

    tokens = make_tiny.encode(Tokenizer.from_file(str(TINY / "tokenizer.json")), make_tiny.model_text())
    assert make_tiny.mean_nll(load(), tokens, windows=4) < 2.4  # measured 1.85; another Python's text: a little more


def test_greedy_words_are_english(make_tiny: ModuleType) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(TINY)
    ids = tokenizer("A class is", return_tensors="pt").input_ids
    out = load().generate(ids, max_new_tokens=40, do_sample=False)
    words = re.findall(r"[a-z]{2,}", tokenizer.decode(out[0, ids.shape[1] :]).lower())
    known = set(re.findall(r"[a-z]{2,}", " ".join(make_tiny.model_text()).lower()))
    assert len(set(words)) >= 8
    assert sum(word in known for word in words) >= 0.8 * len(words), words


def test_adapter_lowers_the_loss_on_definitions_it_never_saw(make_tiny: ModuleType) -> None:
    peft = pytest.importorskip("peft")
    before = nll_of_held_out_code(load(), make_tiny)
    after = nll_of_held_out_code(peft.PeftModel.from_pretrained(load(), str(LORA)), make_tiny)
    assert after < before - 1  # measured 4.51 -> 2.94


def test_begin_token_and_chat_template_are_there() -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(TINY)
    assert tokenizer("x").input_ids[0] == tokenizer.bos_token_id == 0
    assert tokenizer.eos_token == "<|im_end|>"
    rendered = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert rendered == "<|begin_of_text|><|im_start|>user\nhi<|im_end|>\n"
    assert json.loads((TINY / "generation_config.json").read_text("utf-8"))["eos_token_id"] == tokenizer.eos_token_id
