"""QuIP#'s folders: what is written, decoded as quip-sharp's kernel does it, read back and executed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import quip_oracle
import torch
from safetensors.torch import load_file, save_file
from tiny_models import CASES, logits, one_thread, save_random, some_tokens

from qconvert import convert
from qconvert.build import build
from qconvert.errors import UnsupportedError, UsageError
from qconvert.formats.safetensors_quip_check import decompressed
from qconvert.formats.safetensors_verify import contents
from qconvert.graph import Graph, Node, Type
from qconvert.kernels.lattice import POINTS
from qconvert.passes.incoherence import Incoherence
from qconvert.quip_words import codes_of, words_of
from qconvert.sources import Store, read_checkpoint
from qconvert.verification import verify_file
from qconvert.weights import Weights

assert one_thread  # an autouse fixture
TINY = Path(__file__).parents[1] / "golden" / "tiny"
DOWN = "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("quip") / "out"
    convert(TINY, to="safetensors", quant="quip", output=out, check=False)
    return out


def weight(folder: Path, name: str) -> Any:
    store = Store()
    graph = build(read_checkpoint(folder, store))
    return Weights(graph, store).real(name)


def every_code() -> Any:
    return np.random.default_rng(0).permutation(1 << 16).astype(np.uint16).reshape(512, 128)


def test_a_word_by_hand() -> None:
    """Rows 0 and 1, groups 0 and 1: magnitudes lie in its bytes, sign j of code i is bit 32 + 4 * j + i."""
    codes = np.zeros((16, 8), np.uint16)
    codes[0, 0], codes[1, 0], codes[0, 1], codes[1, 1] = 0x1101, 0x2202, 0x3304, 0x8880
    words = words_of(codes)
    assert int(words.view(np.uint64)[0, 0]) == 0x8000_0421_8833_2211 and not words[0, 1:].any()


def test_codes_come_back_from_words() -> None:
    assert np.array_equal(codes_of(words_of(every_code())), every_code())


def test_words_are_quip_sharps() -> None:
    want = quip_oracle.packed(torch.from_numpy(every_code().astype(np.int64)))
    assert np.array_equal(words_of(every_code()), want.numpy())


def test_halves_of_words_decode_to_the_points() -> None:
    """As the CUDA kernel decodes them; nothing of it is the writer's."""
    assert np.array_equal(decompressed(words_of(every_code())) * 4, POINTS[every_code()].reshape(512, -1))


def test_a_conversion_passes_and_counts_two_bits(tmp_path: Path) -> None:
    result = convert(TINY, to="safetensors", quant="quip", output=tmp_path / "out")
    rows = {row.what.partition(":")[0]: row.verdict for row in result.report.checks}
    assert rows["bytes by safetensors"] == rows["quip-sharp's linear, decoded anew"] == "pass"
    (why,) = (row.reason for row in result.report.checks if row.what == "runtime transformers")
    assert "random weights" in why and not result.verified and "fail" not in rows.values()
    bpw = result.report.data()["outputs"][0]["bpw"]
    assert bpw["codes"] == 2 and 2.1 < bpw["linear"] < 2.12


def test_tensors_are_named_and_shaped_as_quip_sharps(folder: Path) -> None:
    found = load_file(folder / "model.safetensors")
    own = {key.rpartition(".")[2]: t for key, t in found.items() if key.startswith(DOWN)}
    assert {key: (t.dtype, tuple(t.shape)) for key, t in own.items()} == {
        "Qidxs": (torch.int64, (256, 16)), "SU": (torch.float16, (512,)), "SV": (torch.float16, (256,)),
        "Wscale": (torch.float16, ()), "codebook_id": (torch.int64, ()),
    }  # fmt: skip
    assert int(own["codebook_id"]) == 7 and set(own["SU"].tolist()) == {-1, 1}


def test_a_weight_multiplies_as_in_quip_sharps_linear(folder: Path) -> None:
    found = load_file(folder / "model.safetensors")
    words, su, sv, unit = (found[f"{DOWN}.{part}"] for part in ("Qidxs", "SU", "SV", "Wscale"))

    def decompress(words: Any, *_: object) -> Any:
        return torch.from_numpy(decompressed(words.reshape(256, -1).numpy()).astype(np.float32))

    x = torch.from_numpy(np.random.default_rng(0).standard_normal((3, 512), np.float32))
    got = quip_oracle.linear(x, words, su.float(), sv.float() * unit.float(), decompress)
    want = x @ torch.from_numpy(weight(folder, f"{DOWN}.weight")).T
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5 * float(want.abs().max()))


def test_errors_are_those_of_two_bits(folder: Path) -> None:
    want = weight(TINY, f"{DOWN}.weight")
    assert np.square(weight(folder, f"{DOWN}.weight") - want).sum() / np.square(want).sum() == pytest.approx(0.0917, rel=0.03)


def test_a_folder_read_and_written_again_keeps_its_codes(folder: Path, tmp_path: Path) -> None:
    result = convert(folder, to="safetensors", quant="quip", output=tmp_path / "out")
    first, second = (load_file(f / "model.safetensors") for f in (folder, tmp_path / "out"))
    assert first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)
    assert any("weights keep their codes, e8p -> e8p" in note for note in result.report.notes)
    assert "pass" in [row.verdict for row in result.report.checks if row.what.startswith("codes moved: 21")]


def test_it_is_listed_and_verified(folder: Path) -> None:
    items = {item.name: item for item in contents(folder).items}
    assert items[f"{DOWN}.weight"].dtype == "e8p" and items[f"{DOWN}.weight"].shape == (256, 512)
    (row,) = (row for row in verify_file(folder, str(TINY)).checks if row.what == "weights")
    assert row.verdict == "pass"


WIDE = {"hidden_size": 64, "intermediate_size": 704, "num_attention_heads": 4, "num_key_value_heads": 4}


def test_widths_that_quip_sharp_has_not_are_ours_and_said_so(tmp_path: Path) -> None:
    source = save_random(tmp_path / "model", CASES["llama tied"][0], CASES["llama tied"][1] | WIDE)
    result = convert(source, to="safetensors", quant="quip", output=tmp_path / "out")
    assert "fail" not in [row.verdict for row in result.report.checks]
    path = tmp_path / "out" / "config.json"
    config = json.loads(path.read_text())
    del config["quantization_config"]["odd_orders"]
    path.write_text(json.dumps(config))
    with pytest.raises(UnsupportedError, match=r"\[704, 64\]: quip-sharp has no such weights"):
        weight(tmp_path / "out", f"{DOWN}.weight")


def fused(folder: Path, out: Path) -> Any:
    """A folder as quip-sharp's: q, k and v in one module, config.json with quip_params. Gives the fused weight."""
    tensors, out = load_file(folder / "model.safetensors"), out
    out.mkdir()
    config = json.loads((folder / "config.json").read_text())
    settings = config.pop("quantization_config")
    (out / "config.json").write_text(json.dumps(config | {"quip_params": settings}))
    rng = torch.Generator().manual_seed(0)
    for i in range(config["num_hidden_layers"]):
        stem = f"model.layers.{i}.self_attn"
        keys = ("Qidxs", "SU", "SV", "Wscale", "codebook_id")
        parts = [{key: tensors.pop(f"{stem}.{m}_proj.{key}") for key in keys} for m in "qkv"]
        tensors |= {
            f"{stem}.qkv_proj.Qidxs": torch.cat([p["Qidxs"] for p in parts]), f"{stem}.qkv_proj.SU": parts[0]["SU"],
            f"{stem}.qkv_proj.SV": torch.rand(512, generator=rng).half(), f"{stem}.qkv_proj.Wscale": parts[0]["Wscale"] * 0 + 1,
            f"{stem}.qkv_proj.codebook_id": parts[0]["codebook_id"],
            f"{stem}.qkv_proj.fuse_scales": torch.tensor([0.5, 2.0, 4.0]),
        }  # fmt: skip
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    return tensors


def test_fused_modules_of_quip_sharp_are_read(folder: Path, tmp_path: Path) -> None:
    tensors, stem = fused(folder, tmp_path / "fused"), "model.layers.0.self_attn"
    points = decompressed(tensors[f"{stem}.qkv_proj.Qidxs"].numpy()).astype(np.float64)

    def sylvester(n: int) -> Any:
        return np.ones((1, 1)) if n == 1 else np.kron([[1, 1], [1, -1]], sylvester(n // 2))

    su, sv = (tensors[f"{stem}.qkv_proj.{part}"].double().numpy() for part in ("SU", "SV"))
    whole = sv[:, None] * (sylvester(512) @ points @ sylvester(256)) * su / np.sqrt(512 * 256)
    for part, rows, times in (("q", slice(0, 256), 0.5), ("k", slice(256, 384), 2.0), ("v", slice(384, 512), 4.0)):
        got = weight(tmp_path / "fused", f"{stem}.{part}_proj.weight")
        np.testing.assert_allclose(got, whole[rows] * times, atol=1e-5)


def test_ldlq_takes_a_hessian_from_the_graph(tmp_path: Path) -> None:
    """Wanted by name; of a text with few directions it makes outputs better."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((512, 16)) @ rng.standard_normal((16, 512)) + 0.1 * rng.standard_normal((512, 512))
    hessian = torch.from_numpy(x.T @ x / len(x)).float()
    (tmp_path / "statistics").mkdir()
    save_file({"h": hessian}, tmp_path / "statistics" / "statistics.safetensors")
    store = Store()
    graph = build(read_checkpoint(TINY, store))
    store.add("statistics", tmp_path / "statistics")
    name = f"{DOWN}.weight"
    load = Node("load", (), Type("f32", (512, 512)), {"tensor": "statistics/statistics.safetensors#h"})
    with_it = Graph({f"{name}~hessian": load, **graph.nodes}, graph.outputs, graph.meta)
    want, errors = Weights(graph, store).real(name), {}
    for solver in ("nearest", "ldlq"):
        error = Weights(Incoherence(solver, types={name: "e8p"})(with_it), store).real(name) - want
        errors[solver] = float(np.sum(error @ hessian.numpy() * error))
    assert errors["ldlq"] < 0.2 * errors["nearest"]


def test_a_solver_of_other_grids_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="solver gptq makes no e8p: points of a lattice have nearest and ldlq"):
        convert(TINY, to="safetensors", quant="quip", solver="gptq", dry_run=True)


def test_a_group_is_refused() -> None:
    with pytest.raises(UsageError, match="one scale for each weight"):
        convert(TINY, to="safetensors", quant="quip", group=64)


def test_another_codebook_is_refused(folder: Path, tmp_path: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors[f"{DOWN}.codebook_id"] = torch.tensor(17)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    with pytest.raises(UnsupportedError, match="codebook 17 is not read"):
        weight(tmp_path, f"{DOWN}.weight")


def test_narrow_weights_stay_plain(tmp_path: Path) -> None:
    """Rows of 96 are no whole tiles."""
    more = {"hidden_size": 64, "intermediate_size": 96}
    source = save_random(tmp_path / "model", CASES["llama tied"][0], CASES["llama tied"][1] | more)
    result = convert(source, to="safetensors", quant="quip", output=tmp_path / "out", check=False)
    left = result.report.data()["fallbacks"]
    assert [f["tensor"] for f in left] == [f"model.layers.{i}.mlp.down_proj.weight" for i in (0, 1)]
    assert logits(tmp_path / "out", some_tokens()).shape[-1] == 61
