"""tools/make_synthetic: its checkpoints and adapters are what transformers, safetensors and PEFT take them for."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from types import ModuleType

import pytest

TOOL = Path(__file__).parents[1] / "tools" / "make_synthetic.py"


@pytest.fixture(scope="module")
def make_synthetic() -> ModuleType:
    from importlib.util import module_from_spec, spec_from_file_location

    spec = spec_from_file_location("make_synthetic", TOOL)
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_checkpoint_and_adapter_load_in_peft(make_synthetic: ModuleType, tmp_path: Path) -> None:
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    shapes = make_synthetic.Shapes(width=256, ffn=512, layers=2, heads=4, kv_heads=2, vocab=32_000)
    make_synthetic.make_checkpoint(tmp_path / "model", shapes)
    make_synthetic.make_adapter(tmp_path / "adapter", shapes)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="auto")
    assert base.dtype == torch.bfloat16
    up = base.model.layers[0].mlp.up_proj.weight.float()
    down = base.model.layers[1].mlp.down_proj.weight.float()
    assert up.std().item() == pytest.approx(0.02, rel=0.02)
    assert not torch.equal(up.flatten(), down.flatten())
    tokens = torch.arange(8)[None]
    with torch.no_grad():
        before = base(tokens).logits
        after = peft.PeftModel.from_pretrained(base, str(tmp_path / "adapter"))(tokens).logits
    assert not torch.equal(before, after)


def test_70b_checkpoint_is_headers_and_holes(make_synthetic: ModuleType, tmp_path: Path) -> None:
    make_synthetic.make_index_70b(tmp_path)
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert sum(path.stat().st_size for path in shards) > 141e9
    if hasattr(shards[0].stat(), "st_blocks"):
        assert sum(path.stat().st_blocks * 512 for path in shards) < 5e6
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text("utf-8"))
    headers = {path.name: _header(path) for path in shards}
    assert index["weight_map"] == {name: file for file, names in headers.items() for name in names}
    assert headers[shards[-1].name]["lm_head.weight"]["shape"] == [128_256, 8192]


def _header(path: Path) -> dict[str, dict[str, list[int]]]:
    with path.open("rb") as file:
        header: dict[str, dict[str, list[int]]] = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    del header["__metadata__"]
    return header
