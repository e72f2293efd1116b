"""W8A8 and small floats in folders: bytes by hand and by compressed-tensors, whole folders in transformers, read back."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from qconvert import convert
from qconvert.errors import InputError, UnsupportedError, UsageError
from qconvert.float_weights import Peak
from qconvert.graph import Graph, Node, Type
from qconvert.layouts import layout_of
from qconvert.registry import CT_FLOATS
from qconvert.scheme import E2M1_TABLE, E4M3_TABLE, F32, MINIFLOATS, QTensor, scheme_of
from qconvert.sources import Store
from qconvert.tensor_layouts import Tensors
from qconvert.weights import Weights

ROOT = Path(__file__).parents[1]
TINY, LORA = ROOT / "golden" / "tiny", ROOT / "golden" / "tiny-lora"
RANGES = ("input_scale", "input_global_scale")
FINE = ("finegrained-fp8", "finegrained-mxfp8")
LAYOUTS = (
    "ct_naive.int8_row_bf16", "ct_naive.e4m3_row_bf16", "ct_naive.e4m3_tensor", "ct_naive.e4m3_b128_f16", "ct_naive.mxfp8",
    "ct_fp4.nvfp4", "ct_fp4.mxfp4", "fp8.e4m3_b128", "fp8.mxfp8",
)  # fmt: skip
FORMS = {"int8_row_bf16": "int-quantized", "nvfp4": "nvfp4-pack-quantized", "mxfp4": "mxfp4-pack-quantized",
         "mxfp8": "mxfp8-quantized"}  # fmt: skip


def layout(name: str) -> Tensors:
    found = layout_of(name)
    assert isinstance(found, Tensors)
    return found


def random_q(name: str, n: int, k: int) -> QTensor:
    """Any codes that are numbers, and scales that their dtypes have."""
    scheme, rng = scheme_of(name), np.random.default_rng(0)
    assert scheme is not None
    codes = rng.integers(0, 1 << scheme.bits, (n, k)).astype(np.uint8)
    if scheme.name.startswith(("e4m3", "mxfp8")):
        codes[(codes & 127) == 127] = 0
    levels: list[F32] = []
    for level in scheme.levels:
        shape = (-(-n // level.rows) if level.rows else 1, level.entries(k))
        v = np.exp2(rng.integers(-5, 2, shape)).astype(np.float32) * (1 if level.dtype == "e8m0" else np.float32(1.25))
        levels.append(np.repeat(v, level.rows or n, axis=0)[:n])
    return QTensor(scheme, codes if scheme.table else (codes ^ 128).view(np.int8), tuple(levels))


def stored(found: Tensors, q: QTensor) -> dict[str, torch.Tensor]:
    """The tensors of a file."""
    (n, k), packed, at, out = q.codes.shape, found.pack(q), 0, {}
    dtypes = {"F8_E4M3": torch.float8_e4m3fn, "I8": torch.int8, "BF16": torch.bfloat16, "F16": torch.float16,
              "F32": torch.float32, "U8": torch.uint8}  # fmt: skip
    for part, plane in zip(found.parts, found.planes(k), strict=True):
        laid = torch.from_numpy(plane.laid_out(packed[:, at : at + plane.nbytes].copy()).copy())
        out[part.name] = laid.view(dtypes[part.dtype]).reshape(part.shape(found.scheme, n, k))
        at += plane.nbytes
    return out


# layouts ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAYOUTS)
def test_unpacked_is_what_was_packed(name: str) -> None:
    found, q = layout(name), random_q(name.partition(".")[2], 200, 256)
    packed = found.pack(q)
    assert packed.shape == (200, found.row_nbytes(256))
    back = found.unpack(packed)
    np.testing.assert_array_equal(back.codes, q.codes)
    for a, b in zip(back.levels, q.levels, strict=True):
        np.testing.assert_array_equal(a, b)


def test_nvfp4_by_hand() -> None:
    """Codes of 0.5, -6, 1 … with the first in the low half; a scale of 1.5 as e4m3; the divisor 3 in f32."""
    codes = np.array([[1, 15, 2, 10, *[0] * 10, 7, 8]], np.uint8)
    q = QTensor(MINIFLOATS["nvfp4"], codes, (np.array([[3]], np.float32), np.array([[1.5]], np.float32)))
    assert layout("ct_fp4.nvfp4").pack(q).tobytes().hex(" ") == "f1 a2 00 00 00 00 00 87 00 00 40 40 3c"
    np.testing.assert_array_equal(q.dequantize()[0, [0, 1, 2, 3, 14]], np.float32([0.25, -3, 0.5, -0.5, 3]))


def test_mxfp4_by_hand() -> None:
    codes = np.array([[1, 15, *[0] * 29, 9]], np.uint8)
    q = QTensor(MINIFLOATS["mxfp4"], codes, (np.array([[0.25]], np.float32),))
    assert layout("ct_fp4.mxfp4").pack(q).tobytes().hex() == "f1" + "00" * 14 + "90" + "7d"  # 0.25 is 2 ** (125 - 127)


def test_numbers_of_eight_bits_by_hand() -> None:
    q = QTensor(scheme_of("int8_row_bf16") or MINIFLOATS["mxfp8"], np.array([[-128, -1, 0, 127]], np.int8),
                (np.array([[0.5]], np.float32),))  # fmt: skip
    assert layout("ct_naive.int8_row_bf16").pack(q).tobytes().hex(" ") == "80 ff 00 7f 00 3f"
    q = QTensor(MINIFLOATS["e4m3_row_bf16"], np.array([[0x38, 0xB8, 0x7E, 0x01]], np.uint8), (np.array([[0.5]], np.float32),))
    assert layout("ct_naive.e4m3_row_bf16").pack(q).tobytes().hex(" ") == "38 b8 7e 01 00 3f"
    np.testing.assert_array_equal(q.dequantize(), np.float32([[0.5, -0.5, 224, 2.0**-10]]))


@pytest.mark.parametrize("name", [n for n in LAYOUTS if n.startswith("ct")])
def test_compressed_tensors_decompresses_to_the_same_values(name: str) -> None:
    compressors = pytest.importorskip("compressed_tensors.compressors")
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    from qconvert.formats.safetensors_ct_floats import weights

    kind = name.partition(".")[2]
    found, q = layout(name), random_q(kind, 256, 256)
    args = QuantizationArgs.model_validate(weights(found.scheme))
    compressor = compressors.BaseCompressor.get_value_from_registry(FORMS.get(kind, "float-quantized"))
    got = compressor.decompress(stored(found, q), QuantizationScheme(targets=["Linear"], weights=args))["weight"]
    assert torch.equal(got, torch.from_numpy(q.dequantize()).to(got.dtype))


# folders ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quant", [*CT_FLOATS, *FINE])
def test_folder_gives_in_transformers_the_logits_of_the_graph(quant: str, tmp_path: Path) -> None:
    pytest.importorskip("accelerate" if quant in FINE else "compressed_tensors")
    result = convert(f"{TINY}+{LORA}", to="safetensors", quant=quant, output=tmp_path / "out", require_verified=True, threads=1)
    rows = {row.what.partition(":")[0]: row for row in result.report.checks}
    oracle = "transformers' dequantization" if quant in FINE else "compressed-tensors' decompressor"
    for what in ("runtime transformers", "bytes by safetensors", oracle):
        assert rows[what].verdict == "pass"
    if not quant.endswith("a16") and quant not in FINE:
        rounded, price = rows["runtime transformers, rounded activations"].value, rows["price of rounded activations"].value
        assert rounded is not None and price is not None and price > 1e-3
        assert rounded < price / 20  # measured 0; 1.2 % where a BLAS adds in another order
    size = result.report.accounting["size"]
    assert size["total"] == sum(p.stat().st_size for p in (tmp_path / "out").iterdir())


def written(quant: str, folder: Path, **options: Any) -> dict[str, torch.Tensor]:
    convert(TINY, to="safetensors", quant=quant, output=folder, check=False, **options)
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("quant", ["nvfp4a16", "fp8-tensor"])
def test_what_runtimes_multiply_as_one_matrix_shares_its_scale(quant: str, tmp_path: Path) -> None:
    found, weights = written(quant, tmp_path / "out", threads=4), load_file(TINY / "model.safetensors")
    for layer in range(3):
        for block, names in (("self_attn", ("q_proj", "k_proj", "v_proj")), ("mlp", ("gate_proj", "up_proj"))):
            modules = [f"model.layers.{layer}.{block}.{name}" for name in names]
            peak = max(weights[f"{m}.weight"].float().abs().max() for m in modules)
            shared = {float(found[f"{m}.weight_{'global_' if quant == 'nvfp4a16' else ''}scale"]) for m in modules}
            want = 2688 / peak if quant == "nvfp4a16" else (peak / 448).bfloat16()
            assert shared == {float(want)}


def test_bytes_do_not_depend_on_threads(tmp_path: Path) -> None:
    one, four = (written("nvfp4a16", tmp_path / str(n), threads=n) for n in (1, 4))
    assert one.keys() == four.keys()
    assert all(torch.equal(one[name].view(torch.uint8), four[name].view(torch.uint8)) for name in one)


def test_w8a8_and_fp8_are_what_compressed_tensors_makes_of_the_weights(tmp_path: Path) -> None:
    quantization = pytest.importorskip("compressed_tensors.quantization")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization.utils import calculate_qparams

    weights = load_file(TINY / "model.safetensors")
    for quant, kind, form in (("w8a8", "int", "int-quantized"), ("fp8", "float", "float-quantized")):
        args = quantization.QuantizationArgs(num_bits=8, type=kind, strategy="channel")
        scheme = quantization.QuantizationScheme(targets=["Linear"], weights=args)
        found = written(quant, tmp_path / quant)
        for name in [n for n in weights if n.endswith("_proj.weight")]:
            w = weights[name].float()
            scale = calculate_qparams(w.amin(1, keepdim=True), w.amax(1, keepdim=True), args)[0].bfloat16()
            want = BaseCompressor.get_value_from_registry(form).compress({"weight": w, "weight_scale": scale}, scheme)
            assert torch.equal(found[f"{name}_scale"], scale)
            assert torch.equal(found[name].view(torch.uint8), want["weight"].view(torch.uint8))


def test_fixed_ranges_are_those_of_the_text(tmp_path: Path) -> None:
    """The largest activation of the first layer is one of the normed embeddings of the text's tokens."""
    (tmp_path / "text").write_text("A class is a class is a class. " * 20)
    found = written("w8a8-static", tmp_path / "out", calibrate=tmp_path / "text", activation_range="minmax")
    tokenizer = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(TINY)
    weights = load_file(TINY / "model.safetensors")
    x = weights["model.embed_tokens.weight"].float()[tokenizer((tmp_path / "text").read_text()).input_ids]
    norm = weights["model.layers.0.input_layernorm.weight"].float()
    normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * norm
    want = (normed.abs().max() / 127.5).bfloat16()
    for name in ("q_proj", "k_proj", "v_proj"):
        assert found[f"model.layers.0.self_attn.{name}.input_scale"].tolist() == [want]
    other = written("w8a8-static", tmp_path / "other")
    assert not torch.equal(other["model.layers.0.self_attn.q_proj.input_scale"], want[None])


def test_ranges_are_refused_where_nothing_is_fixed_and_not_taken_in_a_dry_run(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("words")
    with pytest.raises(UsageError, match="fp8 has no fixed ranges") as caught:
        convert(TINY, to="safetensors", quant="fp8", calibrate=tmp_path / "text", dry_run=True)
    assert caught.value.hint == "--quant w8a8-static"
    planned = convert(TINY, to="safetensors", quant="nvfp4", dry_run=True).report
    made = convert(TINY, to="safetensors", quant="nvfp4", output=tmp_path / "out", check=False).report
    assert planned.accounting["size"] == made.accounting["size"]
    assert any(note.startswith("ranges of activations are of") for note in made.notes) and not planned.notes


def test_a_tied_head_is_left_alone_where_nothing_is_dequantized(tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    transformers = pytest.importorskip("transformers")
    convert(TINY, to="safetensors", quant="mxfp4a16", output=tmp_path / "out", check=False)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"] and config["quantization_config"]["ignore"] == ["lm_head"]
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert torch.isfinite(model(torch.tensor([[1, 2, 3]])).logits).all()


def test_a_group_that_was_asked_for_is_refused() -> None:
    for quant in ("nvfp4a16", "finegrained-fp8"):
        with pytest.raises(UsageError, match="--group 64"):
            convert(TINY, to="safetensors", quant=quant, group=64, dry_run=True)


# as input -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("quant", [*CT_FLOATS, *FINE])
def test_codes_of_a_folder_are_carried_over(quant: str, tmp_path: Path) -> None:
    first = written(quant, tmp_path / "first")
    result = convert(tmp_path / "first", to="safetensors", quant=quant, output=tmp_path / "second", check=False)
    assert any("21 weights keep their codes" in note for note in result.report.notes)
    second = load_file(tmp_path / "second" / "model.safetensors")
    assert first.keys() == second.keys()
    weights = [name for name in first if not name.endswith(RANGES)]  # ranges are those of the dequantized model
    assert all(torch.equal(first[name].view(torch.uint8), second[name].view(torch.uint8)) for name in weights)


@pytest.mark.parametrize("quants", [("fp8-block", "finegrained-fp8"), ("mxfp8a16", "finegrained-mxfp8")])
def test_codes_move_between_compressed_tensors_and_transformers_own_fp8(quants: tuple[str, str], tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    pytest.importorskip("compressed_tensors")
    first = written(quants[0], tmp_path / "first")
    output = tmp_path / "second"
    convert(tmp_path / "first", to="safetensors", quant=quants[1], output=output, require_verified=True, threads=1)
    second = load_file(output / "model.safetensors")
    old, new = ("_scale" if quant in CT_FLOATS else "_scale_inv" for quant in quants)
    for name in [name for name in first if name.endswith("_proj.weight")]:
        assert torch.equal(first[name].view(torch.uint8), second[name].view(torch.uint8))
        assert torch.equal(first[name + old], second[name + new])


def test_scales_that_transformers_would_round_as_it_loads_them_are_not_carried_over(tmp_path: Path) -> None:
    """compressed-tensors keeps scales in the model's dtype, whatever the file has; those of transformers' own fp8 are f32."""
    pytest.importorskip("compressed_tensors")
    written("finegrained-fp8", tmp_path / "first")
    output = tmp_path / "second"
    result = convert(tmp_path / "first", to="safetensors", quant="fp8-block", output=output, require_verified=True, threads=1)
    assert any("21 weights are rounded a second time" in note for note in result.report.notes)


def test_a_folder_of_small_floats_becomes_gguf_and_what_rounding_again_costs_is_told(tmp_path: Path) -> None:
    written("nvfp4a16", tmp_path / "first")
    result = convert(tmp_path / "first", to="gguf", quant="q8_0", output=tmp_path / "out.gguf", threads=1)
    costs = [row for row in result.report.checks if row.what == "rounded again: nvfp4 -> q8_0"]
    assert len(costs) == 1 and costs[0].value is not None and 1e-3 < costs[0].value < 1e-2


def changed(folder: Path, change: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))


def test_what_would_be_read_wrongly_is_refused(tmp_path: Path) -> None:
    written("fp8-block", tmp_path / "ct")
    weights = ("config_groups", "group_0", "weights")

    def block(c: Any) -> None:
        c[weights[0]][weights[1]][weights[2]]["block_structure"] = [64, 64]

    changed(tmp_path / "ct", block)
    with pytest.raises(UnsupportedError, match="float8, strategy block, scales in bf16: not read"):
        convert(tmp_path / "ct", to="gguf", output=tmp_path / "out")
    written("w8a8", tmp_path / "w8a8")

    def asymmetric(c: Any) -> None:
        c[weights[0]][weights[1]][weights[2]]["symmetric"] = False

    changed(tmp_path / "w8a8", asymmetric)
    with pytest.raises(UnsupportedError, match="weights of type int, strategy channel"):
        convert(tmp_path / "w8a8", to="gguf", output=tmp_path / "out")
    written("finegrained-fp8", tmp_path / "fine")
    changed(tmp_path / "fine", lambda c: c.update(weight_block_size=[64, 64]))
    with pytest.raises(UnsupportedError, match=r"weight_block_size \[64, 64\]"):
        convert(tmp_path / "fine", to="gguf", output=tmp_path / "out")


def test_a_code_that_is_no_number_is_found(tmp_path: Path) -> None:
    tensors = written("fp8", tmp_path / "first")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name].view(torch.uint8)[3, 7] = 0x7F
    save_file(tensors, tmp_path / "first" / "model.safetensors")
    with pytest.raises(InputError, match=r"up_proj"):
        convert(tmp_path / "first", to="gguf", output=tmp_path / "out")


# evaluation ---------------------------------------------------------------------------------------


def graph_of(scheme: str) -> Graph:
    tensor = "base/model.safetensors#model.layers.0.mlp.down_proj.weight"
    nodes = {
        "w~real": Node("load", (), Type("bf16", (256, 512)), {"tensor": tensor}),
        "w": Node("quantize", ("w~real",), Type(scheme, (256, 512)), {"solver": "rtn"}),
    }
    return Graph(nodes, ("w",))


def test_rows_of_a_block_are_the_same_however_they_are_asked_for() -> None:
    store = Store()
    store.add("base", TINY)
    weights = Weights(graph_of("e4m3_b128_bf16"), store)
    whole = weights.rows("w", 0, 256)
    for begin, end in ((0, 7), (100, 140), (250, 256)):
        part = weights.rows("w", begin, end)
        assert isinstance(part, QTensor) and isinstance(whole, QTensor)
        assert np.array_equal(part.codes, whole.codes[begin:end])
        assert np.array_equal(part.levels[0], whole.levels[0][begin:end])
    store.close()


def test_threads_that_want_a_peak_share_its_work() -> None:
    peak, barrier, seen = Peak(iter([("w", i, i + 1) for i in range(64)])), threading.Barrier(4), list[int]()

    def peak_of(_: str, begin: int, end: int) -> float:
        seen.append(begin)
        return float(begin)

    found: list[float] = []

    def work() -> None:
        barrier.wait()
        found.append(peak.found(peak_of))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(10)
    assert found == [63.0] * 4 and sorted(seen) == list(range(64))


def test_an_error_of_one_thread_reaches_those_that_wait() -> None:
    peak = Peak(iter([("w", 0, 1)]))

    def fails(_: str, begin: int, end: int) -> float:
        raise InputError("damaged")

    for _ in range(2):
        with pytest.raises(InputError, match="damaged"):
            peak.found(fails)


def test_values_of_tables_are_symmetric() -> None:
    for table in (E2M1_TABLE, E4M3_TABLE):
        half = len(table) // 2
        assert np.array_equal(np.array(table[:half]), -np.array(table[half:]), equal_nan=True)


def test_sorted_puts_what_is_read_before_what_reads_it() -> None:
    kind = Type("f32", (2, 2))
    nodes = {"a": Node("cast", ("c",), kind), "b": Node("load", (), kind), "c": Node("cast", ("b",), kind)}
    assert list(Graph(nodes, ("a",)).sorted().nodes) == ["b", "c", "a"]
