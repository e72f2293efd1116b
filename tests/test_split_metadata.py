"""Conversions with --offload-meta: files by class, bytes that add up, the runtime's answers unchanged."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import pytest
from click.testing import CliRunner

from qconvert import convert, offloading, registry
from qconvert.cli import cli
from qconvert.conversion import Result
from qconvert.emit import Plan
from qconvert.errors import ResourceError, UnsupportedError, UsageError
from qconvert.graph import Graph, n_rows
from qconvert.layouts import layout_of
from qconvert.lowering import lower, read_source
from qconvert.offloading import apart, places, together
from qconvert.passes.split_metadata import SplitMetadata
from qconvert.placement import ALIGNMENT, Buffer, Placement, placement_of
from qconvert.planes import Plane, pieces_of, stored_range
from qconvert.prefetch import Step, execute, schedule
from qconvert.request import AdapterSpec, Request
from qconvert.scheme import Bytes, QTensor
from qconvert.sources import Store
from qconvert.target import Format
from qconvert.text import format, parse
from qconvert.together import written
from qconvert.weights import Weights

ort = pytest.importorskip("onnxruntime")
ROOT = Path(__file__).parents[1]
TINY, LORA = ROOT / "golden" / "tiny", ROOT / "golden" / "tiny-lora"


class Written(NamedTuple):
    """What lies in the files, and the graph and weights that it came from."""

    placed: Placement
    plan: Plan
    weights: Weights
    files: dict[str, Path]

    def stored(self, b: Buffer) -> Bytes:
        name, plane = places(self.plan)[b.weight][b.piece]
        nbytes = plane.file_nbytes(self.weights.graph.nodes[b.weight].type.rows)
        return np.fromfile(self.files[name], np.uint8, nbytes, offset=plane.offset)


@contextmanager
def written_files(out: Path, **options: Any) -> Iterator[Written]:
    options = {"to": "onnx", "quant": "uint4", "offload_meta": "cpu", **options}
    request, store = Request(str(TINY), (AdapterSpec(str(LORA)),), output=out, **options), Store()
    source = read_source(request, store)
    lowered = lower(request, source, cast(type[Format], registry.find("formats", request.to))())
    weights = Weights(lowered.graph, store)
    with written(lowered.plan, weights, 1) as parts:
        files = {f.path.name: part for f, part in zip(lowered.plan.files, parts, strict=True)}
        yield Written(placement_of(lowered.graph), lowered.plan, weights, files)
    store.close()


def made(out: Path, **options: Any) -> Result:
    options = {"to": "onnx", "quant": "uint4" if "to" not in options else None, "offload_meta": "cpu", "threads": 1, **options}
    result = convert(f"{TINY}+{LORA}", output=out, **options)
    files = sum(p.stat().st_size for p in out.rglob("*") if p.is_file())
    if not options.get("dry_run"):
        assert result.plan.nbytes == files
        adds_up(result, files)
    return result


def adds_up(result: Result, files_nbytes: int) -> None:
    """AC-SM2: classes by device and the overhead are the files' bytes."""
    placement, size = result.report.accounting["placement"], result.report.accounting["size"]
    classes = list(placement["devices"].values())
    assert sum(sum(of.values()) for of in classes) + placement["file_overhead"] == files_nbytes
    assert placement["file_overhead"] == size["header"] + size["padding"] >= 0
    assert sum(of.get("codes", 0) for of in classes) == size["codes"]
    assert sum(of.get("meta1", 0) + of.get("meta2", 0) for of in classes) == size["metadata"]
    assert sum(of.get("dense", 0) + of.get("adapter", 0) for of in classes) == size["dense"]


def logits(folder: Path) -> Any:
    session = ort.InferenceSession(str(folder / "model.onnx"))
    past = {i.name: np.zeros((1, i.shape[1], 0, i.shape[3]), np.float32) for i in session.get_inputs()[2:]}
    ids = np.arange(4, 20)[None]
    return session.run(["logits"], {"input_ids": ids, "attention_mask": np.ones_like(ids), **past})[0]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "out"
    made(out, offload_meta=None, check=False)
    return out


def test_metadata_has_a_file_of_its_own_and_the_runtime_answers_the_same(tmp_path: Path, whole: Path) -> None:
    result = made(tmp_path / "out")
    rows = {r.what: r for r in result.report.checks}
    assert result.verified and all(rows[w].verdict == "pass" for w in ("prefetch schedule", "prefetch of the file", "traffic"))
    second = {r.metric: r for r in result.report.checks if r.what == "second level, u8"}
    assert all(r.verdict == "info" and 0 < (r.value or 0) < 5e-3 for r in second.values())
    assert "of metadata would be" in second["relative error, weights"].reason
    devices = result.report.accounting["placement"]["devices"]
    meta, codes = ((tmp_path / "out" / f"model.onnx{x}.data").stat().st_size for x in (".meta", ""))
    assert devices["cpu-pinned"] == {"meta1": meta} and sum(devices["gpu"].values()) == codes
    assert meta + codes == (whole / "model.onnx.data").stat().st_size
    assert np.array_equal(logits(tmp_path / "out"), logits(whole))


def test_each_piece_lies_in_the_file_of_its_class(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    made(tmp_path / "out", check=False)
    where: dict[str, set[str]] = {}
    for t in onnx.load(tmp_path / "out" / "model.onnx", load_external_data=False).graph.initializer:
        for e in t.external_data:
            if e.key == "location":
                where.setdefault(e.value, set()).add(t.name.rpartition(".")[2])
    assert where == {
        "model.onnx.meta.data": {"scales", "zero_points"},
        "model.onnx.data": {"qweight", "rows", "weight"},
    }


def test_a_blocks_metadata_lies_together_at_aligned_places_in_the_order_of_execution(tmp_path: Path) -> None:
    with written_files(tmp_path / "out") as w:
        arenas, ends = [a for a in w.placed.arenas if a.device == "cpu-pinned"], 0
        for arena in arenas:
            planes = [places(w.plan)[b.weight][b.piece] for b in arena.buffers]
            assert {name for name, _ in planes} == {"model.onnx.meta.data"}
            begins = [plane.offset for _, plane in planes]
            assert begins == sorted(begins) and begins[0] % ALIGNMENT == 0 and ends <= begins[0] < ends + ALIGNMENT
            ends = begins[-1] + arena.buffers[-1].nbytes
            assert ends - begins[0] == arena.nbytes
            assert {b.kind for b in arena.buffers} == {"meta1"}
        assert [a.block for a in arenas] == ["layer 0", "layer 1", "layer 2", "head"]
        assert [b.weight.rpartition("layers.0.")[2] for b in arenas[0].buffers[::2]] == [
            *(f"self_attn.{x}_proj.weight" for x in "qkvo"), *(f"mlp.{x}_proj.weight" for x in ("gate", "up", "down"))
        ]  # fmt: skip


def rows_of(plane: Plane, stored: Bytes, n: int) -> Bytes:
    """u8[n, nbytes] of all that a plane has in its file."""
    first, last = stored_range(plane, n, 0, n)
    return pieces_of(plane, stored.reshape(plane.depth if plane.columns else last - first, -1), 0, n)


@pytest.mark.parametrize(
    ("quant", "more"),
    [
        ("uint4", {}), ("uint4", {"prefetch": 0}), ("uint4", {"prefetch": 3}), ("int8", {"weights_in": "safetensors"}),
        ("w4a16", {"to": "safetensors", "group": 32}), ("w8a16", {"to": "safetensors", "prefetch": 2}),
        ("w4a16-asym", {"to": "safetensors", "split_max_size": "90k", "group": 64}), ("gptq-asym", {"to": "safetensors"}),
        ("awq", {"to": "safetensors", "group": 32}), ("fp8-block", {"to": "safetensors"}), ("nvfp4a16", {"to": "safetensors"}),
        ("uint2", {"zero_point": "float"}), ("nf4", {"vram": "1.32m", "prefetch": 0}), ("int4", {"split_max_size": "90k"}),
    ],
    ids=str,
)  # fmt: skip
def test_what_the_schedule_brings_together_is_the_quantized_weight_bit_for_bit(
    tmp_path: Path, quant: str, more: dict[str, Any]
) -> None:
    """AC-SM1: resident codes and staged metadata, unpacked, are the graph's own QTensor. AC-SM4: copies are as predicted."""
    with written_files(tmp_path / "out", quant=quant, **more) as w:
        placed, staged, done = w.placed, w.placed.staged(), set[str]()
        entries = {e.value: e for e in w.plan.entries}

        def compute(step: Step, slot: Bytes) -> None:
            block = placed.blocks[step.block]
            found = {(b.weight, b.piece): x for b, x in apart(staged.get(block, ()), slot)}
            for name in {b.weight for b in placed.buffers if b.block == block and b.kind == "codes"}:
                n, layout = n_rows(entries[name].shape), layout_of(entries[name].dtype)
                mine = [b for b in placed.buffers if b.weight == name]
                pieces = [found[name, b.piece] if b.device != "gpu" else w.stored(b) for b in mine]
                both = zip(entries[name].planes, pieces, strict=True)
                got = layout.unpack(np.concatenate([rows_of(plane, piece, n) for plane, piece in both], axis=1))
                want = w.weights.rows(f"{name}~code", 0, n)
                assert isinstance(want, QTensor) and np.array_equal(got.codes, want.codes)
                assert all(np.array_equal(a, b) for a, b in zip(got.levels, want.levels, strict=True))
                done.add(name)

        steps = schedule([b in staged for b in placed.blocks], placed.ahead, forwards=2)
        copied = execute(steps, lambda i: together(staged[placed.blocks[i]], w.stored), placed.slot_nbytes, compute)
        lookups = sum(b.nbytes // n_rows(entries[b.weight].shape) for b in placed.buffers if b.row_nbytes and b.device != "gpu")
        assert len(done) == (21 if more.get("to") else 22) and staged
        assert copied.of_last_forward + lookups == placed.h2d_nbytes


def test_a_schedule_with_a_slot_too_few_fails_the_check_of_a_conversion(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def one_slot(*given: Any) -> list[Step]:
        return [s._replace(slot=s.slot and 0) for s in schedule(*given)]

    monkeypatch.setattr(offloading, "schedule", one_slot)
    with written_files(tmp_path / "out") as w:
        rows = {r.what: r for r in offloading.rows(w.weights, w.plan, list(w.files.values()))}
    assert rows["prefetch schedule"].verdict == rows["prefetch of the file"].verdict == "fail"
    assert "overwritten before its use is done" in rows["prefetch schedule"].reason


def test_vram_decides_how_much_is_moved(tmp_path: Path) -> None:
    given = {"prefetch": 0, "dry_run": True}
    all_, some, none = (
        made(tmp_path / "out", **given, vram=vram).report.accounting["placement"] for vram in (None, "1.25m", "6g")
    )
    assert none["devices"].keys() == {"any"} and none["h2d_bytes_per_forward"] == none["staging"] == 0
    assert 0 < some["devices"]["cpu-pinned"]["meta1"] < all_["devices"]["cpu-pinned"]["meta1"]
    assert sum(some["devices"]["gpu"].values()) + some["staging"] <= 1_250_000
    (note,) = [n for n in made(tmp_path / "out", **given, vram="6g").report.notes if "vram" in n]
    assert note == "--vram 6g: all 1.31 MB fit, so nothing is offloaded"


def test_too_little_vram_is_refused_and_what_is_named_instead_works(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match=r"--vram 1\.00 MB: the least that is possible takes 1\.19 MB") as e:
        made(tmp_path / "out", vram="1m")
    assert not (tmp_path / "out").exists() and e.value.hint is not None
    assert e.value.hint.startswith("--vram 1.19m")
    assert made(tmp_path / "out", vram="1.19m", dry_run=True).report.accounting["placement"]["h2d_bytes_per_forward"]


def test_a_gguf_refuses_as_its_scales_lie_inside_its_blocks(tmp_path: Path) -> None:
    """AC-SM5, by the flag and by the pass."""
    with pytest.raises(UnsupportedError, match="scales inside the blocks of codes.*\n.*whole tensors"):
        convert(TINY, to="gguf", bits=4, offload_meta="cpu", output=tmp_path / "a.gguf")
    for quant in ("Q4_K_M", "Q8_0"):
        with pytest.raises(UnsupportedError, match=r"gguf\.q\w+, which has no scales that lie apart from its codes"):
            SplitMetadata()(packed(to="gguf", quant=quant))
    assert list(tmp_path.iterdir()) == []


def packed(**options: Any) -> Graph:
    request, store = Request(str(TINY), **options), Store()
    source = read_source(request, store)
    return lower(request, source, cast(type[Format], registry.find("formats", request.to))()).graph


def test_what_a_graph_says_is_what_the_files_have() -> None:
    """AC-SM2, before a byte is written: buffers by weight against the plan's entries."""
    for options in ({"to": "onnx", "quant": "uint4"}, {"to": "onnx", "quant": "int4", "form": "portable"}, {"to": "gguf"},
                    {"to": "safetensors"}, {"to": "safetensors", "quant": "w4a16-asym"}):  # fmt: skip
        request, store = Request(str(TINY), **options), Store()
        lowered = lower(request, read_source(request, store), cast(type[Format], registry.find("formats", request.to))())
        sizes: dict[str, int] = {}
        for b in placement_of(lowered.graph).buffers:
            sizes[b.weight] = sizes.get(b.weight, 0) + b.nbytes
        assert sizes == {e.value: e.nbytes for e in lowered.plan.entries}


def test_the_pass_says_in_the_graph_where_things_lie_and_any_class_may_move() -> None:
    graph = packed(to="onnx", quant="uint4")
    moved = SplitMetadata("disk", "codes+dense", prefetch=2)(graph)
    assert moved.meta["prefetch"] == 2
    assert moved.nodes["model.embed_tokens.weight"].attrs["placement"] == {"codes": "disk"}
    assert moved.nodes["model.norm.weight"].attrs["placement"] == {"dense": "disk"}
    by_device = placement_of(moved).by_device()
    assert by_device["disk"].keys() == {"codes", "dense"} and by_device["gpu"].keys() == {"meta1"}
    assert parse(format(moved)) == moved


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"device": "moon"}, "device=moon: there are cpu-pinned, cpu-mmap, disk"),
        ({"classes": "meta1+meta2"}, "meta2 cannot be moved"),
        ({"classes": "scales"}, "scales cannot be moved"),
        ({"prefetch": -1}, "prefetch=-1"),
        ({"vram": "much"}, "cannot read 'much'"),
    ],
)  # fmt: skip
def test_options_that_do_not_exist_are_refused(given: dict[str, Any], why: str) -> None:
    with pytest.raises(UsageError, match=why.replace("+", r"\+")):
        SplitMetadata(**given)(packed(to="onnx", quant="uint4"))


def test_a_model_without_metadata_has_nothing_to_offload() -> None:
    with pytest.raises(UnsupportedError, match="no weight has meta1"):
        SplitMetadata()(packed(to="onnx", quant="fp16"))


@pytest.mark.parametrize("flag", ["--vram=6g", "--prefetch=2", "--link-bandwidth=12", "--memory-bandwidth=900"])
def test_flags_that_mean_nothing_alone_are_refused(flag: str) -> None:
    result = CliRunner().invoke(cli, ["convert", str(TINY), "--to", "onnx", flag])
    assert isinstance(result.exception, UsageError) and "goes with --offload-meta" in str(result.exception)


@pytest.mark.parametrize("speed", [0.0, -1.0, float("nan")])
def test_bandwidths_that_are_none_are_refused(tmp_path: Path, speed: float) -> None:
    with pytest.raises(UsageError, match="--link-bandwidth .*: GB/s, more than 0"):
        made(tmp_path / "out", link_bandwidth=speed, dry_run=True)


def test_an_onnx_model_as_input_keeps_its_layout(tmp_path: Path, whole: Path) -> None:
    with pytest.raises(UnsupportedError, match="--offload-meta cpu: a model that is ONNX already"):
        convert(whole / "model.onnx", to="onnx", bits=8, offload_meta="cpu", output=tmp_path / "out")


def test_swapped_adapters_are_a_class_of_their_own(tmp_path: Path) -> None:
    result = made(tmp_path / "out", adapters_as="swap", check=False)
    gpu = result.report.accounting["placement"]["devices"]["gpu"]
    assert gpu["adapter"] == sum(e.nbytes for f in result.plan.files if f.path.suffix == ".onnx_adapter" for e in f.entries) > 0


def test_safetensors_beside_onnx_say_class_placement_and_prefetch(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors")
    made(tmp_path / "out", weights_in="safetensors", split_max_size="100k", prefetch=2, check=False)
    shards = sorted((tmp_path / "out").glob("model-meta-*.safetensors"))
    assert len(shards) > 2
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"]
    for path in shards:
        with safetensors.safe_open(path, framework="np") as opened:
            said = opened.metadata()
            assert (said["qconvert.class"], said["placement"], said["prefetch"]) == ("meta1", "cpu-pinned", "2")
            assert {name.rpartition(".")[2] for name in opened.keys()} <= {"scales", "zero_points"}  # noqa: SIM118
            assert all(index[name] == path.name for name in opened.keys())  # noqa: SIM118


@pytest.mark.parametrize(("quant", "more"), [("w4a16", {}), ("w4a16-asym", {"split_max_size": "100k", "prefetch": 3})])
def test_transformers_loads_a_folder_whose_metadata_has_shards_of_its_own(
    tmp_path: Path, quant: str, more: dict[str, Any]
) -> None:
    safetensors = pytest.importorskip("safetensors")
    pytest.importorskip("transformers"), pytest.importorskip("compressed_tensors")
    result = made(tmp_path / "out", to="safetensors", quant=quant, **more)
    rows = {r.what: r.verdict for r in result.report.checks}
    assert result.verified and rows["runtime transformers"] == rows["prefetch of the file"] == rows["traffic"] == "pass"
    assert not (tmp_path / "out" / "model.safetensors").exists()  # it would be taken for the whole
    index, seen = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"], set()
    for path in (tmp_path / "out").glob("*.safetensors"):
        with safetensors.safe_open(path, framework="pt") as opened:
            said, names = opened.metadata(), set(opened.keys())
            seen |= names
            assert {index[name] for name in names} == {path.name}
            meta = {name for name in names if name.endswith(("_scale", "_zero_point"))}
            if path.name.startswith("model-meta-"):
                told = {"qconvert.class": "meta1", "placement": "cpu-pinned", "prefetch": str(more.get("prefetch", 1))}
                assert said.items() >= told.items() and said["format"] == "pt" and meta == names
            else:
                assert "placement" not in said and not meta
    assert seen == index.keys()


def test_a_folder_with_split_metadata_is_an_input_like_any_other(tmp_path: Path) -> None:
    made(tmp_path / "split", to="safetensors", check=False)
    made(tmp_path / "whole", to="safetensors", check=False, offload_meta=None)
    for name in ("split", "whole"):
        convert(tmp_path / name, to="onnx", bits=8, output=tmp_path / f"{name}-onnx", check=False)
    files = [(tmp_path / f"{name}-onnx" / "model.onnx.data").read_bytes() for name in ("split", "whole")]
    assert files[0] == files[1]


ONE_SCALE = ("bitnet", "quip")
DIALECTS = [d for d in registry.entries("dialects") if d not in ("fp32", "fp16", "bf16", *ONE_SCALE)]


@pytest.mark.parametrize("dialect", DIALECTS)
def test_bytes_add_up_in_every_dialect(tmp_path: Path, dialect: str) -> None:
    given = {"to": "safetensors", "quant": dialect, "check": False}
    there, away = made(tmp_path / "there", **given, offload_meta=None), made(tmp_path / "away", **given)
    (whole,) = there.report.accounting["placement"]["devices"].values()
    devices = away.report.accounting["placement"]["devices"]
    assert devices["cpu-pinned"] == {"meta1": whole["meta1"]}
    assert devices["gpu"] == {kind: n for kind, n in whole.items() if kind != "meta1"}


def test_scales_that_are_quantized_themselves_go_and_their_own_level_stays(tmp_path: Path) -> None:
    """bitsandbytes' double quantization, loaded by transformers."""
    safetensors = pytest.importorskip("safetensors")
    pytest.importorskip("transformers"), pytest.importorskip("bitsandbytes")
    result = made(tmp_path / "out", to="safetensors", quant="nf4")
    assert result.verified and {r.verdict for r in result.report.checks if r.what.startswith("prefetch")} == {"pass"}
    n = 1_769_472  # weights of linears: 4 bits, u8 a block of 64, f32 a block of blocks of 256 and a note for each
    devices = result.report.accounting["placement"]["devices"]
    assert devices["gpu"]["codes"] == n / 2 and devices["cpu-pinned"] == {"meta1": n / 64}
    assert devices["gpu"]["meta2"] == 4 * n / 64 / 256 + 21 * 256
    for path in (tmp_path / "out").glob("*.safetensors"):
        with safetensors.safe_open(path, framework="pt") as opened:
            kinds = {name.rpartition(".weight.")[2] for name in opened.keys()}  # noqa: SIM118
            assert (kinds == {"absmax"}) == path.name.startswith("model-meta-")
            assert ("nested_absmax" in kinds) != path.name.startswith("model-meta-")


def test_arenas_of_safetensors_lie_together_too(tmp_path: Path) -> None:
    with written_files(tmp_path / "out", to="safetensors", quant="w4a16-asym") as w:
        for arena in (a for a in w.placed.arenas if a.device == "cpu-pinned"):
            found = [places(w.plan)[b.weight][b.piece] for b in arena.buffers]
            begins = sorted((plane.offset, b.nbytes) for (_, plane), b in zip(found, arena.buffers, strict=True))
            assert len({name for name, _ in found}) == 1
            assert begins[-1][0] + begins[-1][1] - begins[0][0] == sum(b.nbytes for b in arena.buffers)


@pytest.mark.parametrize(
    ("case", "options"),
    [
        ("mixtral tied, window, one expert a token", {"to": "onnx", "quant": "int4"}),
        ("gpt2", {"to": "onnx", "quant": "uint8", "form": "portable"}), ("phi3", {"to": "onnx", "quant": "uint4"}),
        ("gemma3 tied, biases", {"to": "safetensors"}), ("qwen2", {"to": "safetensors", "zero_point": "int"}),
    ],
    ids=str,
)  # fmt: skip
def test_bytes_add_up_in_every_shape_of_model(tmp_path: Path, case: str, options: dict[str, Any]) -> None:
    from tiny_models import CASES, save_random

    folder = save_random(tmp_path / "model", *CASES[case])
    result = convert(folder, group=16, offload_meta="cpu", check=False, output=tmp_path / "out", **options)
    adds_up(result, sum(p.stat().st_size for p in (tmp_path / "out").rglob("*") if p.is_file()))
    devices = result.report.accounting["placement"]["devices"]
    assert devices["cpu-pinned"].keys() == {"meta1"} and devices["gpu"].keys() == {"codes", "dense"}


def test_a_bound_on_decoding_is_told_and_follows_the_bandwidths(tmp_path: Path) -> None:
    slow, fast = (
        made(tmp_path / "out", dry_run=True, link_bandwidth=link, memory_bandwidth=1000.0).report for link in (1.0, 2000.0)
    )
    h2d = slow.accounting["placement"]["h2d_bytes_per_forward"]
    assert slow.accounting["placement"]["decode"]["link_seconds"] == pytest.approx(h2d / 1e9)
    assert any("bits per weight would fit there without it" in n for n in slow.notes)
    assert not any("without it" in n for n in fast.notes) and any("at 2000 GB/s" in n for n in fast.notes)
