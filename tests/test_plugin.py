"""The foreign package in tests/plugin: what it defines is found by name, used, and listed with its origin."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from plugin_installed import install, refreshed
from safetensors.torch import load_file

from qconvert import convert, registry
from qconvert.errors import QConvertError, UsageError
from qconvert.formats.gguf_check import read_tensors
from qconvert.listing import lines
from qconvert.options import LISTS
from qconvert.scheme import scheme_of
from qconvert.solver_spec import Solving

TINY = Path(__file__).parents[1] / "golden" / "tiny"


@pytest.fixture(scope="module", autouse=True)
def installed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with refreshed(install(tmp_path_factory.mktemp("site"))):
        yield


def test_its_pass_runs_by_name_with_options(tmp_path: Path) -> None:
    half = "scale-weights{match=output_norm|^model.norm factor=0.5}"
    a = convert(TINY, quant="F32", output=tmp_path / "a.gguf", check=False, passes=[..., half])
    b = convert(TINY, quant="F32", output=tmp_path / "b.gguf", check=False)
    x, y = (read_tensors(r.outputs)["output_norm.weight"].data for r in (a, b))
    assert np.array_equal(x, y / 2) and "scale-weights" in a.report.pipeline


def test_its_solver_chooses_codes_with_its_options(tmp_path: Path) -> None:
    specs = ("rtn", "clipped{share=0.0}", "clipped{share=0.01}")
    made = [convert(TINY, quant="Q4_0", solver=s, output=tmp_path / f"{i}.gguf", check=False) for i, s in enumerate(specs)]
    rtn, none, clipped = ((tmp_path / f"{i}.gguf").read_bytes() for i in range(3))
    assert rtn == none != clipped and "solver=clipped{share=0.01}" in made[2].report.pipeline
    with pytest.raises(UsageError, match="clipped: no option 'part=1'; it has share"):
        convert(TINY, quant="Q4_0", solver="clipped{part=1}", dry_run=True)


def test_its_scheme_in_its_layout_is_written_checked_and_lies_as_it_says(tmp_path: Path) -> None:
    from qconvert_example.cubic import VALUES  # type: ignore[import-not-found]

    result = convert(TINY, to="safetensors", quant="cubic", output=tmp_path / "out", eval_tokens=0)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj"
    codes, scales = (tensors[f"{name}.cubic_{part}"].numpy() for part in ("codes", "scales"))
    by_hand = np.array(VALUES, np.float32)[np.stack([codes & 15, codes >> 4], -1).reshape(256, 256)]
    by_hand *= np.repeat(scales.astype(np.float32), 32, axis=1)
    plain = load_file(TINY / "model.safetensors")[f"{name}.weight"].float().numpy()
    assert np.square(by_hand - plain).sum() / np.square(plain).sum() < 0.02
    said = {row.what.partition(":")[0]: row.verdict for row in result.report.checks}
    assert said["bytes by safetensors"] == "pass" and said["runtime transformers"] == "skip"
    assert result.report.data()["outputs"][0]["bpw"]["linear"] == pytest.approx(4.5, abs=0.01)


def test_its_family_is_built(tmp_path: Path) -> None:
    shutil.copytree(TINY, tmp_path / "model")
    config = json.loads((TINY / "config.json").read_text())
    config |= {"architectures": ["OtherLlamaForCausalLM"], "model_type": "otherllama"}
    config["ffn_dim"] = config.pop("intermediate_size")
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    result = convert(tmp_path / "model", to="names", output=tmp_path / "names.txt")
    assert "model.layers.0.self_attn.q_proj.weight" in (tmp_path / "names.txt").read_text()
    assert not result.verified


@pytest.mark.parametrize("group", [g for g in LISTS if g != "targets"])
def test_lists_show_it_with_its_origin(group: str) -> None:
    shown = lines(group)
    assert any("qconvert-example 1.0" in line for line in shown)
    assert any(registry.OWN in line for line in shown)


def test_every_solver_that_is_listed_can_be_asked_for() -> None:
    for line in lines("solvers"):
        Solving.of(line.split()[0])


@pytest.mark.parametrize("group", ["passes", "solvers", "layouts", "dialects", "families", "formats", "runtimes"])
def test_a_name_that_two_define_is_an_error_naming_both(group: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name = next(n for n, entry in registry.entries(group).items() if entry.origin != registry.OWN)
    monkeypatch.setitem(registry.BUILTIN[group], name, "elsewhere:Thing")  # type: ignore[arg-type]
    registry.entries.cache_clear()
    with pytest.raises(QConvertError, match=rf"'{name}' is defined by qconvert 0\.1\.0 and by qconvert-example 1\.0"):
        registry.entries(group)
    monkeypatch.setenv("QCONVERT_PLUGINS", "off")
    assert registry.entries(group)[name].target == "elsewhere:Thing"
    registry.entries.cache_clear()


def test_a_scheme_that_two_define_is_an_error_naming_both(monkeypatch: pytest.MonkeyPatch) -> None:
    entries = dict(registry.entries("schemes"))
    monkeypatch.setattr(registry, "entries", lambda group: {"q4_k": entries["cubic4_g32"]})
    scheme_of.cache_clear()
    with pytest.raises(QConvertError, match=r"'q4_k' is defined by qconvert 0\.1\.0 and by qconvert-example 1\.0"):
        scheme_of("q4_k")


def test_a_package_that_cannot_be_loaded_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = registry.Entry("qconvert_example.gone:Thing", "qconvert-example 1.0")
    monkeypatch.setattr(registry, "entries", lambda group: {"gone": broken})
    with pytest.raises(QConvertError, match=r"'gone' of qconvert-example 1\.0 cannot be loaded: No module named"):
        registry.find("passes", "gone")
