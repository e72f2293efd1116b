"""Error feedback: codes of the textbook's algorithm in f64, less output error on every grid, the same bytes for any rows."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import numpy as np
import numpy.typing as npt
import pytest

from qconvert.errors import InputError
from qconvert.formats.gguf_layouts import LAYOUTS
from qconvert.grids import steps_of
from qconvert.hessians import Factor, Factors, factored
from qconvert.kernels.cholesky import feedback_factors
from qconvert.scheme import F32, QTensor, Scheme, scheme_of
from qconvert.solving import Given, Gptq, Lsq, Rtn

F64 = npt.NDArray[np.float64]
TINY = Path(__file__).parents[1] / "golden" / "tiny"
N, K = 70, 512
GGUF = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_nl", "iq4_xs")
GRIDS = (
    *GGUF, "uint1f_g8", "uint2f_g64", "int3_g64", "uint3o_g64_bf16", "uint4_g32", "int4_row", "uint8_g64", "nf4_g64", "fp4_g64",
    "ternary_g128", "binary_g128", "nvfp4", "mxfp4", "mxfp8", "e4m3_row", "e4m3_b128",
)  # fmt: skip


def of(name: str) -> Scheme:
    return cast(Scheme, scheme_of(name))


def problem() -> tuple[F32, F64]:
    """Weights, and the Hessian of inputs that hang together, some much stronger than others."""
    rng = np.random.default_rng(0)
    strong, common = np.diag(rng.uniform(0.2, 2, K)), rng.normal(size=(K, K // 4))
    own = rng.normal(size=(K, K)) @ strong
    h = (0.2 * own @ own.T + common @ common.T) / K
    return (rng.normal(size=(N, K)) * 0.02).astype(np.float32), h


def given(x: F32, h: F64) -> Given:
    factors = Factors()

    def factor(damp: float, ordered: bool) -> Factor:
        return factors.of((damp, ordered), lambda: factored(h, damp, ordered, "w"))

    return Given(float(np.abs(x).max()), h.diagonal().astype(np.float32), factor)


def output_error(q: QTensor, x: F32, h: F64) -> float:
    e = q.dequantize().astype(np.float64) - x
    return float(np.einsum("nk,kl,nl->", e, h, e, optimize=True) / np.einsum("nk,kl,nl->", x, h, x, optimize=True))


def textbook(x: F32, h: F64, damp: float, scales: F32, offsets: F32, group: int, low: int, high: int) -> npt.NDArray[np.int64]:
    """Frantar et al., algorithm 1, a column at a time in f64 on grids that are given."""
    k = len(h)
    u = np.linalg.cholesky(np.linalg.inv(h + damp * np.trace(h) / k * np.eye(k))).T
    w, codes = x.astype(np.float64), np.zeros(x.shape, np.int64)
    for j in range(k):
        s, o = scales[:, j // group].astype(np.float64), offsets[:, j // group]
        codes[:, j] = np.clip(np.rint((w[:, j] - o) / s), low, high)
        w[:, j + 1 :] -= np.outer((w[:, j] - s * codes[:, j] - o) / u[j, j], u[j, j + 1 :])
    return codes


@pytest.mark.parametrize(("name", "low", "high"), [("int4_g32", -8, 7), ("uint4_g64", 0, 15), ("uint2f_g16", 0, 3)])
def test_codes_are_those_of_the_textbook(name: str, low: int, high: int) -> None:
    x, h = problem()
    q = Gptq(static=True).solve(of(name), x, given(x, h))
    steps = steps_of(q.scheme, q.levels, K)
    want = textbook(x, h, 0.01, steps.scales, steps.offsets, steps.group, low, high)
    assert (q.codes == want).mean() > 0.998  # in f32 a tie may fall otherwise, and what follows it in the row; measured 1.0


def test_factors_are_those_of_lapack() -> None:
    for k in (8, 40, 64, 200):
        a = np.random.default_rng(k).normal(size=(2 * k, k))
        h = a.T @ a / k
        u = np.linalg.cholesky(np.linalg.inv(h)).T
        found = feedback_factors(h, 0.0)
        assert found is not None
        rows, at = np.zeros((k, k)), 0
        for first in range(0, k, 8):
            rows[: first + 8, first : first + 8] = found[0][at : at + 8 * (first + 8)].reshape(-1, 8)
            at += 8 * (first + 8)
        np.testing.assert_allclose(rows, np.triu(u / u.diagonal()[:, None], 1), atol=1e-6)
        np.testing.assert_allclose(found[1], u.diagonal() ** -2.0, rtol=1e-9)


@pytest.mark.parametrize("name", GRIDS)
def test_output_error_is_far_below_that_of_rounding(name: str) -> None:
    x, h = problem()
    some = given(x, h)
    rtn, lsq, gptq = (output_error(s.solve(of(name), x, some), x, h) for s in (Rtn(), Lsq(), Gptq()))
    assert gptq < 0.75 * lsq and gptq < 0.75 * rtn  # measured 0.4 to 0.67 of lsq


@pytest.mark.parametrize("name", GGUF)
def test_ggml_blocks_hold_what_was_chosen(name: str) -> None:
    """f16 and 6-bit scales are chosen as such: packing loses nothing."""
    x, h = problem()
    q = Gptq().solve(of(name), x, given(x, h))
    layout = LAYOUTS[f"gguf.{name}"]
    back = layout.unpack(layout.pack(q))
    np.testing.assert_array_equal(back.codes, q.codes)
    for got, want in zip(back.levels, q.levels, strict=True):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("options", [{}, {"ordered": True}, {"static": True}])
@pytest.mark.parametrize("name", ["uint4f_g32", "q4_k", "nf4_g64", "int4_row"])
def test_bytes_do_not_depend_on_how_rows_are_parted(name: str, options: dict[str, bool]) -> None:
    x, h = problem()
    some, solver = given(x, h), Gptq(**options)  # type: ignore[arg-type]
    whole = solver.solve(of(name), x, some)
    parts = [solver.solve(of(name), x[i:j], some) for i, j in ((0, 5), (5, 64), (64, N))]
    np.testing.assert_array_equal(whole.codes, np.concatenate([p.codes for p in parts]))
    for i, v in enumerate(whole.levels):
        np.testing.assert_array_equal(v, np.concatenate([p.levels[i] for p in parts]))


def test_channels_without_input_are_rounded_as_they_are() -> None:
    x, h = problem()
    h[100:120] = h[:, 100:120] = 0
    q = Gptq(static=True).solve(of("int4_g32"), x, given(x, h))
    steps = steps_of(q.scheme, q.levels, K)
    plain = np.clip(np.rint(x[:, 100:120] / steps.scales.repeat(32, 1)[:, 100:120]), -8, 7)
    assert (q.codes[:, 100:120] == plain).mean() > 0.999
    assert output_error(q, x, h) < output_error(Rtn().solve(of("int4_g32"), x, given(x, h)), x, h)


def test_a_hessian_that_is_none_is_refused_and_a_singular_one_is_damped() -> None:
    x, h = problem()
    low = np.outer(h[0], h[0])  # rank 1
    assert np.isfinite(Gptq(damp=1e-9).solve(of("int4_g32"), x, given(x, low)).dequantize()).all()
    with pytest.raises(InputError, match="NaN or infinity"):
        factored(np.full((8, 8), np.nan), 0.01, False, "w")
    with pytest.raises(InputError, match="not a positive Hessian"):
        factored(np.array([[1.0, 1e9], [1e9, 1.0]]), 0.01, False, "w")


def hessians(model: object, tokens: object) -> dict[str, F64]:
    """By plain hooks of torch: the mean of x x^T of every linear."""
    import torch

    found: dict[str, F64] = {}

    def hook(name: str, args: tuple[torch.Tensor, ...]) -> None:
        flat = args[0].reshape(-1, args[0].shape[-1]).double()
        found[name] = (flat.T @ flat / len(flat)).numpy()

    linears = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "layers" in n}  # type: ignore[attr-defined]
    hooks = [m.register_forward_pre_hook(lambda _, args, n=n: hook(n, args)) for n, m in linears.items()]
    with torch.no_grad():
        model(tokens)  # type: ignore[operator]
    for each in hooks:
        each.remove()
    return found


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_kl_of_a_trained_model_orders_the_solvers(bits: int) -> None:
    """INT-b in groups of 64: gptq well below least squares, which are below rounding between extremes."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(TINY)
    ids = tokenizer(Path(__file__).with_name("test_run.py").read_text())["input_ids"][: 24 * 256]
    tokens = torch.tensor(ids[: len(ids) // 256 * 256]).reshape(-1, 256)
    seen, held_out = tokens[:-4], tokens[-4:]
    found = hessians(model, seen)
    with torch.no_grad():
        want = model(held_out).logits.log_softmax(-1)
    linears = {name: model.get_submodule(name) for name in found}
    real = {name: m.weight.detach().clone() for name, m in linears.items()}

    def kl(solver: Rtn | Lsq | Gptq, informed: bool) -> float:
        for name, module in linears.items():
            x = real[name].numpy()
            some = given(x, found[name]) if informed else Given()
            module.weight.data = torch.from_numpy(solver.solve(of(f"uint{bits}f_g64"), x, some).dequantize())
        with torch.no_grad():
            got = model(held_out).logits.log_softmax(-1)
        return float((want.exp() * (want - got)).sum(-1).mean())

    rtn, lsq, gptq = kl(Rtn(), False), kl(Lsq(), False), kl(Gptq(), True)
    assert gptq < 0.8 * lsq < 0.8 * 1.05 * rtn
