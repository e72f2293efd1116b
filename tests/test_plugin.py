"""The foreign package in tests/plugin, as installed: its pass, family, format and runtime are found by name."""

from __future__ import annotations

import json
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import pytest

from qconvert import convert, registry
from qconvert.errors import QConvertError
from qconvert.formats.gguf_check import read_tensors
from qconvert.listing import lines

TINY = Path(__file__).parents[1] / "golden" / "tiny"

try:
    version("qconvert-example")
except PackageNotFoundError:
    pytest.skip("tests/plugin is not installed (pip install ./tests/plugin)", allow_module_level=True)


def test_its_pass_runs_by_name_with_options(tmp_path: Path) -> None:
    half = "scale-weights{match=output_norm|^model.norm factor=0.5}"
    a = convert(TINY, quant="F32", output=tmp_path / "a.gguf", check=False, passes=[..., half])
    b = convert(TINY, quant="F32", output=tmp_path / "b.gguf", check=False)
    x, y = (read_tensors(r.outputs)["output_norm.weight"].data for r in (a, b))
    assert np.array_equal(x, y / 2) and "scale-weights" in a.report.pipeline


def test_its_family_is_built(tmp_path: Path) -> None:
    shutil.copytree(TINY, tmp_path / "model")
    config = json.loads((TINY / "config.json").read_text())
    config |= {"architectures": ["OtherLlamaForCausalLM"], "model_type": "otherllama"}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    result = convert(tmp_path / "model", to="names", output=tmp_path / "names.txt")
    assert "model.layers.0.self_attn.q_proj.weight" in (tmp_path / "names.txt").read_text()
    assert not result.verified


@pytest.mark.parametrize("group", ["passes", "formats", "families", "runtimes"])
def test_lists_show_it_with_its_origin(group: str) -> None:
    assert any("qconvert-example" in line for line in lines(group))


def test_a_name_that_two_define_is_an_error_naming_both(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.BUILTIN["passes"], "scale-weights", "elsewhere:Thing")  # type: ignore[index]
    registry.entries.cache_clear()
    with pytest.raises(QConvertError, match=r"'scale-weights' is defined by qconvert and by qconvert-example"):
        registry.entries("passes")
    registry.entries.cache_clear()
