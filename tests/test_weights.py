"""Each op on weights, evaluated by rows, against plain numpy in float64."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from qconvert.errors import GraphError, InputError, UnsupportedError
from qconvert.ops import verify
from qconvert.scheme import QTensor
from qconvert.sources import Store
from qconvert.text import parse
from qconvert.weights import Weights, rows_per_block

N, K, R = 24, 64, 4
TENSORS = {
    "w": torch.randn(N, K, generator=torch.Generator().manual_seed(0)),
    "w2": torch.randn(N, K, generator=torch.Generator().manual_seed(1)),
    "d": torch.randn(N, K, generator=torch.Generator().manual_seed(2)),
    "A": torch.randn(R, K, generator=torch.Generator().manual_seed(3)),
    "B": torch.randn(N, R, generator=torch.Generator().manual_seed(4)),
    "m": torch.rand(N, generator=torch.Generator().manual_seed(5)) + 0.5,
    "mk": torch.rand(K, generator=torch.Generator().manual_seed(6)) + 0.5,
    "new": torch.randn(3, K, generator=torch.Generator().manual_seed(7)),
    "bias": torch.randn(N, generator=torch.Generator().manual_seed(8)),
    "wt": torch.randn(K, N, generator=torch.Generator().manual_seed(9)),
    "experts": torch.randn(3, N, K, generator=torch.Generator().manual_seed(10)),
    "experts2": torch.randn(3, N, K, generator=torch.Generator().manual_seed(11)),
}
V = {n: t.double().numpy() for n, t in TENSORS.items()}  # the same as float64: the oracle's numbers
Make = Callable[..., Weights]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Weights of a graph: the loads of TENSORS, then the given lines; the last one is called out."""

    def made(*lines: str, dtype: type[np.floating] = np.float32, tensors: dict[str, torch.Tensor] = TENSORS) -> Weights:
        save_file(tensors, tmp_path / "model.safetensors")
        store = Store()
        store.add("base", tmp_path)
        loads = []
        for name, info in store.tensors("base").items():
            shape = ",".join(map(str, info.shape))
            loads.append(f'%{name} : {info.dtype}[{shape}] = load() {{"tensor": "{info.ref}"}}')
        graph = parse("\n".join([*loads, *lines, "return %out" if lines else f"return %{name}"]))
        verify(graph)
        return Weights(graph, store, dtype)

    return made


def delta(scale: float) -> np.ndarray:
    return scale * V["B"] @ V["A"]


def dora(base: np.ndarray, scale: float) -> np.ndarray:
    v = base + delta(scale)
    return V["m"][:, None] * v / np.linalg.norm(v, axis=1, keepdims=True)


def dora_by_column(base: np.ndarray, scale: float) -> np.ndarray:
    v = base + delta(scale)
    return V["mk"] * v / np.linalg.norm(v, axis=0)


def rows_set(base: np.ndarray, weight: float) -> np.ndarray:
    out = base.copy()
    for j, i in enumerate((1, 17, 5)):
        out[i] += weight * (V["new"][j] - V["w"][i])
    return out


def permuted(w: np.ndarray, heads: int) -> np.ndarray:
    """As convert_hf_to_gguf does: knowledge/llama_cpp.md 4i."""
    return w.reshape(heads, 2, w.shape[0] // heads // 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


WNK = f"f32[{N},{K}]"
CASES: dict[str, tuple[tuple[str, ...], np.ndarray]] = {
    "load": ((f'%out : {WNK} = scaled(%w) {{"scale": 1}}',), V["w"]),
    "constant": (('%out : f32[3] = constant() {"values": [1.5, -2, 0.1]}',), np.array([1.5, -2, 0.1])),
    "scaled": ((f'%out : {WNK} = scaled(%w) {{"scale": -0.3}}',), -0.3 * V["w"]),
    "add_scaled": ((f'%out : {WNK} = add_scaled(%w, %d) {{"scale": 0.7}}',), V["w"] + 0.7 * V["d"]),
    "transpose of a load": ((f"%out : {WNK} = transpose(%wt)",), V["wt"].T),
    "transpose of a sum": (
        (f'%s : f32[{N},{K}] = scaled(%w) {{"scale": 2}}', f"%out : f32[{K},{N}] = transpose(%s)"),
        2 * V["w"].T,
    ),
    "merge": ((f'%out : {WNK} = merge(%w, %A, %B) {{"scale": 0.25}}',), V["w"] + delta(0.25)),
    "merge twice": (
        (f'%w1 : {WNK} = merge(%w, %A, %B) {{"scale": 0.25}}', f'%out : {WNK} = merge(%w1, %A, %B) {{"scale": -2}}'),
        V["w"] + delta(0.25) + delta(-2),
    ),
    "merge into a transposed weight": (
        (f"%t : {WNK} = transpose(%wt)", f'%out : {WNK} = merge(%t, %A, %B) {{"scale": 3}}'),
        V["wt"].T + delta(3),
    ),
    "dora": ((f'%out : {WNK} = dora(%w, %w, %A, %B, %m) {{"scale": 0.5, "weight": 1}}',), dora(V["w"], 0.5)),
    "dora at weight 0.3": (
        (f'%out : {WNK} = dora(%w, %w, %A, %B, %m) {{"scale": 0.5, "weight": 0.3}}',),
        V["w"] + 0.3 * (dora(V["w"], 0.5) - V["w"]),
    ),
    "dora after another adapter": (
        (
            f'%w1 : {WNK} = merge(%w, %A, %B) {{"scale": 0.25}}',
            f'%out : {WNK} = dora(%w1, %w, %A, %B, %m) {{"scale": 0.5, "weight": 1}}',
        ),
        V["w"] + delta(0.25) + dora(V["w"], 0.5) - V["w"],
    ),
    "dora by column": (
        (
            f'%norm : f32[{K}] = column_norm(%w, %A, %B) {{"scale": 0.5}}',
            f'%out : {WNK} = dora(%w, %w, %A, %B, %mk, %norm) {{"scale": 0.5, "weight": 1}}',
        ),
        dora_by_column(V["w"], 0.5),
    ),
    "column_norm": (
        (f'%out : f32[{K}] = column_norm(%w, %A, %B) {{"scale": 0.5}}',),
        np.linalg.norm(V["w"] + delta(0.5), axis=0),
    ),
    "blend at weight 1": ((f'%out : {WNK} = blend(%w, %w, %d) {{"weight": 1}}',), V["d"]),
    "blend at weight 0.3": ((f'%out : {WNK} = blend(%w, %w, %d) {{"weight": 0.3}}',), 0.7 * V["w"] + 0.3 * V["d"]),
    "blend after another adapter": (
        (f'%out : {WNK} = blend(%w2, %w, %d) {{"weight": 0.3}}',),
        V["w2"] + 0.3 * (V["d"] - V["w"]),
    ),
    "set_rows": (
        (f'%out : {WNK} = set_rows(%w, %w, %new) {{"indices": [1, 17, 5], "weight": 1}}',),
        rows_set(V["w"], 1),
    ),
    "set_rows at weight 0.3": (
        (f'%out : {WNK} = set_rows(%w, %w, %new) {{"indices": [1, 17, 5], "weight": 0.3}}',),
        rows_set(V["w"], 0.3),
    ),
    "set_rows after another adapter": (
        (f'%out : {WNK} = set_rows(%w2, %w, %new) {{"indices": [1, 17, 5], "weight": 1}}',),
        rows_set(V["w2"], 1),
    ),
    "permute_rope": ((f'%out : {WNK} = permute_rope(%w) {{"heads": 3}}',), permuted(V["w"], 3)),
    "shifted": ((f'%out : {WNK} = shifted(%w) {{"by": 1.5}}',), V["w"] + 1.5),
    "stack": ((f"%out : f32[3,{N},{K}] = stack(%w, %w2, %w)",), np.concatenate([V["w"], V["w2"], V["w"]])),
    "part of a load": (
        (f'%out : f32[3,9,{K}] = part(%experts) {{"begin": 5, "end": 14}}',),
        V["experts"][:, 5:14].reshape(27, K),
    ),
    "part of a stack": (
        (f"%s : f32[2,{N},{K}] = stack(%w, %w2)", f'%out : f32[2,8,{K}] = part(%s) {{"begin": 16, "end": 24}}'),
        np.concatenate([V["w"][16:], V["w2"][16:]]),
    ),
    "interleave": (
        (f"%out : f32[3,{2 * N},{K}] = interleave(%experts, %experts2)",),
        np.stack([V["experts"], V["experts2"]], 2).reshape(-1, K),
    ),
    "flat": ((f"%out : f32[{3 * N},{K}] = flat(%experts)",), V["experts"].reshape(-1, K)),
    "beside": ((f"%out : f32[{N},{3 * K}] = beside(%experts)",), np.concatenate([*V["experts"]], axis=1)),
    "experts in one tensor": (
        (f'%out : f32[3,{N},{K}] = scaled(%experts) {{"scale": 1}}',),
        V["experts"].reshape(3 * N, K),
    ),
    "permute_rope of a bias": ((f'%out : f32[{N}] = permute_rope(%bias) {{"heads": 2}}',), permuted(V["bias"], 2)),
}
each_case = pytest.mark.parametrize(("lines", "want"), CASES.values(), ids=CASES)
MOVES = (
    "load", "constant", "transpose of a load", "permute_rope", "permute_rope of a bias", "set_rows", "stack", "interleave",
    "flat", "beside",
)  # fmt: skip


@each_case
@pytest.mark.parametrize(
    ("dtype", "rtol"),
    [
        (np.float64, 1e-14),  # measured 2e-16 of the largest value
        (np.float32, 1e-6),  # measured 1.4e-7 of the largest value
    ],
)
def test_op_gives_what_its_formula_says(
    make: Make, lines: tuple[str, ...], want: np.ndarray, dtype: type[np.floating], rtol: float
) -> None:
    got = make(*lines, dtype=dtype).real("out")
    assert got.dtype == dtype
    np.testing.assert_allclose(got, want, rtol=rtol, atol=rtol * np.abs(want).max())


@each_case
def test_any_range_of_rows_is_that_range_of_the_whole(make: Make, lines: tuple[str, ...], want: np.ndarray) -> None:
    w = make(*lines)
    whole, n = w.real("out"), len(want)
    for begin, end in [(0, 1), (1, 2), (0, 0), (3, 11), (7, 8), (n - 5, n), (5, n - 1), (n, n)]:
        if 0 <= begin <= end <= n:
            got = w.real("out", begin, end)
            assert got.shape == whole[begin:end].shape
            np.testing.assert_allclose(got, whole[begin:end], rtol=1e-6)


@pytest.mark.parametrize("name", ["merge", "dora", "dora by column", "permute_rope", "set_rows", "blend at weight 0.3"])
def test_bytes_do_not_depend_on_how_rows_are_cut(make: Make, name: str) -> None:
    w = make(*CASES[name][0])
    whole = w.encoded("out", 0, N).tobytes()
    for step in (1, 5, 7):
        assert b"".join(w.encoded("out", i, min(N, i + step)).tobytes() for i in range(0, N, step)) == whole


@pytest.mark.parametrize("name", [*MOVES, "blend at weight 1"])
def test_op_that_moves_numbers_changes_none(make: Make, name: str) -> None:
    lines, want = CASES[name]
    np.testing.assert_array_equal(make(*lines, dtype=np.float32).real("out"), want.astype(np.float32))


@pytest.mark.parametrize("heads", [1, 2, 3, 6])
def test_rope_permutation_of_ranges_that_cut_through_heads(make: Make, heads: int) -> None:
    w = make(f'%out : {WNK} = permute_rope(%w) {{"heads": {heads}}}')
    want = permuted(TENSORS["w"].numpy(), heads)
    for begin in range(N):
        for end in range(begin + 1, N + 1):
            np.testing.assert_array_equal(w.real("out", begin, end), want[begin:end])


def test_threads_get_the_rows_that_one_gets(make: Make) -> None:
    w = make(*CASES["dora by column"][0])
    want, wrong = make(*CASES["dora by column"][0]).real("out"), []

    def work(begin: int) -> None:
        for _ in range(20):
            if not np.array_equal(w.real("out", begin, begin + 6), want[begin : begin + 6]):
                wrong.append(begin)

    threads = [threading.Thread(target=work, args=(b,)) for b in (0, 6, 12, 18)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert wrong == []


# rounding ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_source_dtype_is_widened_without_change(make: Make, dtype: str) -> None:
    t = (torch.randn(5, 7) * 1e-3).to(getattr(torch, dtype))
    for wanted in (np.float32, np.float64):
        got = make(tensors={"x": t}, dtype=wanted).real("x", 1, 4)
        assert got.dtype == wanted
        np.testing.assert_array_equal(got, t.double().numpy()[1:4].astype(wanted))


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
def test_cast_rounds_as_torch_does(make: Make, dtype: str) -> None:
    t = torch.randn(64, 64) * torch.logspace(-7, 3, 64)
    narrow = t.to(torch.bfloat16 if dtype == "bf16" else torch.float16)
    w = make(f"%out : {dtype}[64,64] = cast(%x)", tensors={"x": t})
    np.testing.assert_array_equal(w.real("out"), narrow.float().numpy())
    assert w.encoded("out", 3, 9).tobytes() == narrow[3:9].view(torch.int16).numpy().tobytes()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_weight_kept_in_its_dtype_is_written_bit_for_bit(make: Make, dtype: str) -> None:
    t = torch.randn(6, 8).to(getattr(torch, dtype))
    t[0, 0], t[1, 1] = -0.0, torch.finfo(t.dtype).smallest_normal / 2
    got = make(tensors={"x": t}).encoded("x", 0, 6).tobytes()
    assert got == t.view(torch.int32 if dtype == "float32" else torch.int16).numpy().tobytes()


def test_value_that_does_not_fit_f16_is_an_error_that_names_the_weight(make: Make) -> None:
    w = make("%out : f16[1,2] = cast(%x)", tensors={"x": torch.tensor([[1.0, 70000.0]])})
    with pytest.raises(InputError, match="out: 70000 does not fit f16"):
        w.encoded("out", 0, 1)


# quantized --------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["q8_0", "q4_0", "q4_k"])
def test_packed_weight_reads_back_as_ggufs_own_reader_reads_it(make: Make, scheme: str) -> None:
    kind = gguf.GGMLQuantizationType[scheme.upper()]
    block, nbytes = gguf.GGML_QUANT_SIZES[kind]
    width = 512 // block * nbytes
    w = make(
        f'%code : {scheme}[6,512] = quantize(%x) {{"solver": "search"}}',
        f"%out : gguf.{scheme}[6,512] = pack(%code)",
        tensors={"x": torch.randn(6, 512)},
    )
    packed = w.encoded("out", 0, 6)
    want = gguf.quants.dequantize(packed.reshape(6, width), kind)
    np.testing.assert_array_equal(w.real("out"), want)
    np.testing.assert_array_equal(w.real("code"), want)
    codes = w.rows("code", 2, 4)
    assert isinstance(codes, QTensor)
    np.testing.assert_array_equal(codes.dequantize(), want[2:4])
    assert w.encoded("out", 2, 5).tobytes() == packed.tobytes()[2 * width : 5 * width]


def test_quantized_weight_that_was_not_packed_is_not_written(make: Make) -> None:
    w = make(f'%out : q8_0[{N},{K}] = quantize(%w) {{"solver": "search"}}')
    with pytest.raises(GraphError, match="%out is quantized but not packed"):
        w.encoded("out", 0, 1)


def test_unknown_solver_is_named(make: Make) -> None:
    w = make(f'%out : q8_0[{N},{K}] = quantize(%w) {{"solver": "magic"}}')
    with pytest.raises(UnsupportedError, match="no solver is called 'magic'"):
        w.real("out")


def test_activation_is_no_weight(make: Make) -> None:
    w = make(f"%x : f32[{N},{K}] = silu(%w)", f'%out : {WNK} = scaled(%x) {{"scale": 1}}')
    with pytest.raises(GraphError, match="%x: silu is not an op on weights"):
        w.real("out")


# damage -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
@pytest.mark.parametrize("bad", ["nan", "inf", "-inf"])
def test_nan_and_infinity_are_errors_that_name_tensor_and_place(make: Make, dtype: str, bad: str) -> None:
    t = torch.ones(40, 16).to(getattr(torch, dtype))
    t[33, 5] = float(bad)
    w = make(tensors={"layers.3.w": t})
    assert w.real("layers.3.w", 0, 33).shape == (33, 16)
    with pytest.raises(InputError) as caught:
        w.real("layers.3.w", 30, 40)
    assert f"base/model.safetensors#layers.3.w: {bad} at [33, 5]" in caught.value.message


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("bad", ["nan", "-inf"])
@pytest.mark.parametrize("scheme", ["", "int4_g32_f16", "int8_g64_bf16"])
def test_what_is_read_as_it_lies_in_the_file_is_looked_through_too(make: Make, dtype: str, bad: str, scheme: str) -> None:
    t = torch.ones(40, 64).to(getattr(torch, dtype))
    t[33, 5] = float(bad)
    lines = [f'%q : {scheme}[40,64] = quantize(%w) {{"solver": "mse"}}', f"%out : ct.{scheme}[40,64] = pack(%q)"]
    w = make(*(lines if scheme else ()), tensors={"w": t})
    assert w.encoded("out" if scheme else "w", 0, 33).size
    with pytest.raises(InputError, match=rf"#w: {bad} at \[33, 5\]"):
        w.encoded("out" if scheme else "w", 30, 40)


def test_nan_in_a_vector_names_its_index(make: Make) -> None:
    t = torch.ones(9)
    t[7] = float("nan")
    with pytest.raises(InputError, match=r"#b: nan at \[7\]"):
        make(tensors={"b": t}).real("b", 4, 9)


def test_nan_in_a_weight_stored_transposed_names_its_place_in_the_file(make: Make) -> None:
    t = torch.ones(8, 20)
    t[2, 15] = float("nan")
    w = make("%out : f32[20,8] = transpose(%x)", tensors={"x": t})
    with pytest.raises(InputError, match=r"#x: nan at \[2, 15\]"):
        w.real("out", 12, 20)


def test_nan_in_an_adapter_is_found_through_the_merge(make: Make) -> None:
    bad = {**TENSORS, "B": TENSORS["B"].clone()}
    bad["B"][11, 2] = float("inf")
    w = make(f'%out : {WNK} = merge(%w, %A, %B) {{"scale": 1}}', tensors=bad)
    with pytest.raises(InputError, match=r"#B: inf at \[11, 2\]"):
        w.encoded("out", 0, N)


def test_merge_that_overflows_is_an_error_and_not_an_infinite_weight(make: Make) -> None:
    huge = {**TENSORS, "A": TENSORS["A"] * 1e30, "B": TENSORS["B"] * 1e30}
    w = make(f'%out : {WNK} = merge(%w, %A, %B) {{"scale": 1}}', tensors=huge)
    with pytest.raises(InputError, match="out"):
        w.encoded("out", 0, N)


@pytest.mark.parametrize(("k", "rows"), [(4096, 128), (11008, 32), (40000, 13), (1 << 21, 1), (1, 1 << 19)])
def test_row_blocks_hold_about_two_megabytes(k: int, rows: int) -> None:
    assert rows_per_block(k) == rows
