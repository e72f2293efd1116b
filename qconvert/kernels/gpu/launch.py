"""Run the kernels: on a GPU where there is one, else by Triton's interpreter on the CPU.

unpack(w) -> i32[N,K]                       codes as they were stored
dequantize(w) -> f32[N,K]                   without the low-rank part
product(x f32[M,K], w) -> f32[M,N]          dequantized on the fly, summed in f32
integer_product(x f32[M,K], w) -> f32[M,N]  x rounded to i8 first, products summed in i32
float8_product(x f32[M,K], w) -> f32[M,N]   x rounded to e4m3 first
integer_sums(q i8[M,K], w) -> i32[M,N]      of codes that share one scale a row

Each takes a `part` of w, and does no more. Metadata that is not finite is an InputError.
"""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch

from qconvert.errors import UnsupportedError, require
from qconvert.kernels.gpu.loading import TRITON, loaded
from qconvert.kernels.gpu.operand import Operand, Part
from qconvert.kernels.gpu.records import LowRankRecord, NumberRecord, Placed, constant, numbers_at, place, tensor
from qconvert.scheme import F32, Array


def kernels(interpreted: bool) -> ModuleType:
    """triton_kernels.py for Triton's interpreter, or for its compiler."""
    return loaded(interpreted, "triton_kernels")[0]


class Tiles(NamedTuple):
    """How a launch is cut up, and for how many warps."""

    n: int
    k: int
    m: int = 1
    warps: int = 4
    stages: int = 3
    run: int | None = None  # codes that one thread of a GEMV adds up: those of a word, where it is None


COMPILED = (Tiles(8, 512), Tiles(64, 64, 128, warps=8))  # of a GEMV, of a GEMM
INTERPRETED = 1 << 17  # weights of a tile: the interpreter pays by the numpy call


class Scales(NamedTuple):
    """Of x i8[M,K]: f32[M, K / group], or f32[M,1] and group 0; an axis of length 1 is shared by all."""

    values: torch.Tensor
    group: int = 0


class Launch(NamedTuple):
    kernel: Any
    grid: tuple[int, ...]
    args: tuple[object, ...]
    switches: dict[str, object]

    def run(self) -> None:
        with TRITON, np.errstate(all="ignore"):  # the interpreter computes what is masked or not selected, too
            self.kernel[self.grid](*self.args, **self.switches)

    def compile(self) -> Any:
        """Triton's CompiledKernel for the active driver's target."""
        return self.kernel.warmup(*self.args, grid=self.grid, **self.switches)


def interprets(device: str) -> bool:
    """Without a GPU, or where TRITON_INTERPRET=1 asks for it."""
    return device == "cpu" or bool(require("triton", "multiplying by packed weights").knobs.runtime.interpret)


def up(n: int) -> int:
    """The power of 2 that is no less."""
    return 1 << max(n - 1, 0).bit_length()


def large_tiles(n: int, m: int = 1) -> Tiles:
    bn = min(128, max(16, up(n)))
    return Tiles(bn, INTERPRETED // bn, min(128, up(m)), run=INTERPRETED)


def run_length(w: Operand, t_group: int) -> int:
    """So many neighbours share metadata and the scale of x: 0 all, else the power of 2 in it."""
    groups = [g for g in (w.group, t_group or None) if g is not None]
    run = math.gcd(*groups)
    return run & -run


def multiplication(
    x: torch.Tensor,
    w: Placed,
    t: Scales | None = None,
    real: torch.Tensor | None = None,
    part: Part | None = None,
    raw: bool = False,
    tiles: Tiles | None = None,
    interpreted: bool | None = None,
) -> tuple[torch.Tensor, list[Launch]]:
    """x [M,K] f32, f16, bf16 or i8 by a part of w: where f32[M,n] will be, or i32 with raw, and the launches.

    real: x before it was rounded, for the low-rank part. interpreted: what interprets() says.
    """
    o, (m, k), integers = w.operand, x.shape, x.dtype == torch.int8
    n_first, n_last, n_columns = part or o.whole
    n, t_group = n_last - n_first, t.group if t else 0
    interpreted = interprets(w.device) if interpreted is None else interpreted
    if k != n_columns:
        raise UnsupportedError(f"{o.name}: x has {k} columns, the weight has {n_columns}")
    run = run_length(o, t_group)
    if integers and (o.grid in ("table", "float") or run == 1):
        raise UnsupportedError(f"{o.name}: no integer products of {o.grid} codes in groups of {o.group}")
    if interpreted and x.dtype == torch.bfloat16:
        raise UnsupportedError("Triton's interpreter multiplies bf16 wrongly", hint="x in f32 or f16")
    use_gemm = m > 1 and not (integers and 0 < run < 32)
    cut = tiles or (large_tiles(n, m) if interpreted else COMPILED[use_gemm])
    if not interpreted and use_gemm and x.dtype == torch.float32:
        cut = cut._replace(n=32, k=32, m=32)  # without matrix units
    bk, bn = min(cut.k, max(32, up(k))), min(cut.n, max(16, up(n)))
    whole = run == 0
    if use_gemm and (whole or run >= (32 if integers else 64)):  # of shorter sums the matrix units would idle
        bk = run = min(run or bk, bk)
    elif not use_gemm and (whole or integers or run >= 8):
        run = min(run or bk, bk, cut.run or w.per or 8)
    else:
        run = 1
    if t_group and run == 1:
        raise UnsupportedError(f"{o.name}: scales of x in groups of {t_group} beside groups of {o.group}")
    before, low = list[Launch](), None
    if w.a is not None and o.low_rank is not None and not raw:
        r = w.a.operand.shape[0]
        h, before = multiplication(x if real is None else real, w.a, part=Part(0, r, k), interpreted=interpreted)
        low = LowRankRecord(h, w.b, float(o.low_rank.scale), r, constant(max(16, up(r))))
    scales = None if t is None else NumberRecord(numbers_at(t.values), constant("f32"))
    out = torch.empty((m, n), dtype=torch.int32 if raw else torch.float32, device=x.device)
    args: tuple[object, ...] = (x, x.stride(0), scales, w.record, low, out, out.stride(0), n_first, n_last, k)
    switches: dict[str, object] = {"RUN": run, "WHOLE": whole, "T_GROUP": t_group, "INTEGERS": integers, "EVEN": k % bk == 0}
    switches |= {"BN": bn, "BK": bk, "num_warps": cut.warps, "num_stages": cut.stages, "enable_fp_fusion": True}
    module = kernels(interpreted)
    if not use_gemm:
        return out, [*before, Launch(module.gemv, (-(-n // bn), m), args, switches)]
    bm = min(cut.m, max(16, up(m)))
    return out, [*before, Launch(module.gemm, (-(-n // bn), -(-m // bm)), (*args, m), switches | {"BM": bm})]


def expansion(
    w: Placed, dtype: torch.dtype, part: Part | None = None, interpreted: bool | None = None
) -> tuple[torch.Tensor, Launch]:
    """A part of w as weights in f32 [n,k], or as codes in i32."""
    n_first, n_last, k = part or w.operand.whole
    interpreted = interprets(w.device) if interpreted is None else interpreted
    out = torch.empty((n_last - n_first, k), dtype=dtype, device=w.device)
    cut = large_tiles(n_last - n_first) if interpreted else Tiles(16, 128)
    bn, bk = cut.n, min(cut.k, max(32, up(k)))
    grid = (-(-(n_last - n_first) // bn), -(-k // bk))
    # no fused multiply-adds: the very bits of the formula in f32
    switches: dict[str, object] = {"BN": bn, "BK": bk, "enable_fp_fusion": False}
    return out, Launch(kernels(interpreted).dequantize, grid, (out, k, w.record, n_first, n_last, k), switches)


def rounding(
    x: torch.Tensor, group: int, static: float | None, steps: float, float8: bool, interpreted: bool | None = None
) -> tuple[torch.Tensor, Scales, Launch]:
    """As rounded(), and the launch that makes it."""
    m, k = x.shape
    n_groups = -(-k // group) if group else 1
    interpreted = interprets(x.device.type) if interpreted is None else interpreted
    t = torch.empty((m, n_groups), device=x.device) if static is None else torch.full((1, 1), static, device=x.device)
    q = torch.empty((m, k), dtype=torch.float32 if float8 else torch.int8, device=x.device)
    switches: dict[str, object] = {"STEPS": 448.0 if float8 else steps, "STATIC": static is not None}
    switches |= {"BK": min(4096, up(group or k)), "enable_fp_fusion": False}
    args = (x, x.stride(0), q, t, k, group or k)
    return q, Scales(t, group), Launch(kernels(interpreted).quantize_rows, (m, n_groups), args, switches)


def rounded(
    x: torch.Tensor, group: int = 0, static: float | None = None, steps: float = 127.5, float8: bool = False
) -> tuple[torch.Tensor, Scales]:
    """x f32[M,K] as i8 and the scales of its rows or groups: max |x| / steps, or the static one of all.

    steps: 127.5 as compressed-tensors has it, 127 as bitsandbytes. float8: as f32 that are values of e4m3; steps are 448.
    """
    q, t, launch = rounding(x, group, static, steps, float8)
    launch.run()
    return q, t


def multiply(
    x: torch.Tensor,
    w: Placed,
    t: Scales | None = None,
    real: torch.Tensor | None = None,
    part: Part | None = None,
    raw: bool = False,
    tiles: Tiles | None = None,
) -> torch.Tensor:
    out, launches = multiplication(x, w, t, real, part, raw, tiles)
    for launch in launches:
        launch.run()
    return out


def expanded(w: Placed, dtype: torch.dtype, part: Part | None) -> Array:
    out, launch = expansion(w, dtype, part)
    launch.run()
    values: Array = out.cpu().numpy()
    return values


def unpack(w: Operand, part: Part | None = None) -> Array:
    return expanded(place(w), torch.int32, part)


def dequantize(w: Operand, part: Part | None = None) -> F32:
    return expanded(place(w), torch.float32, part)


def product(x: Array, w: Operand, part: Part | None = None, tiles: Tiles | None = None) -> F32:
    placed = place(w)
    y: F32 = multiply(tensor(x, placed.device), placed, part=part, tiles=tiles).cpu().numpy()
    return y


def integer_product(
    x: F32, w: Operand, group: int = 0, static: float | None = None, steps: float = 127.5, part: Part | None = None
) -> F32:
    placed = place(w)
    real = tensor(x, placed.device)
    q, t = rounded(real, group, static, steps)
    y: F32 = multiply(q, placed, t, real, part).cpu().numpy()
    return y


def float8_product(x: F32, w: Operand, group: int = 0, static: float | None = None, part: Part | None = None) -> F32:
    placed = place(w)
    real = tensor(x, placed.device)
    q, t = rounded(real, group, static, float8=True)
    y: F32 = multiply(q, placed, t, real, part).cpu().numpy()
    return y


def integer_sums(q: Array, w: Operand, part: Part | None = None) -> Array:
    if w.group is not None:
        raise UnsupportedError(f"{w.name}: sums of groups of {w.group} have no integer of a row")
    placed = place(w)
    sums: Array = multiply(tensor(q, placed.device), placed, part=part, raw=True).cpu().numpy()
    return sums
