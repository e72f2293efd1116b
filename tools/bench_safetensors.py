"""Cases of bench.py for quantized safetensors: our quantizers beside those of the libraries whose bytes they write."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np

Result = dict[str, str | float | None]
ROUNDS = 15


def compared(case: str, n_weights: int, ours: Callable[[], object], peer: Callable[[], object]) -> Iterator[Result]:
    """M weights/s of one thread, in turn; `ratio` is the median of the ratios of neighbouring runs."""
    from bench import cpu_seconds

    ours()  # compiles
    seconds = [(cpu_seconds(ours), cpu_seconds(peer)) for _ in range(ROUNDS)]
    mine, theirs = (n_weights / 1e6 / statistics.median(column) for column in zip(*seconds, strict=True))
    yield {
        "case": case,
        "m_weights_per_s": round(mine, 1),
        "peer_m_weights_per_s": round(theirs, 1),
        "ratio": round(statistics.median(b / a for a, b in seconds), 1),
    }


def four_bits(name: str, double: bool = False) -> Iterator[Result]:
    """bitsandbytes.functional.quantize_4bit from f32; with `double` the scales once more, by their mean."""
    import bitsandbytes.functional as bnb
    import torch
    from bench import weights

    from qconvert import kernels
    from qconvert.scheme import FP4_TABLE, NF4_TABLE

    torch.set_num_threads(1)
    x, table, levels = weights(), NF4_TABLE if name == "nf4" else FP4_TABLE, kernels.dynamic_map()

    def ours() -> None:
        found = kernels.block_codes(x, 64, table)
        if double:
            kernels.nested_codes(found.scales.reshape(-1) - found.scales.mean(dtype=np.float64).astype(np.float32), levels)

    peer = partial(bnb.quantize_4bit, torch.from_numpy(x), blocksize=64, quant_type=name, compress_statistics=double)
    yield from compared(f"{name} quantize{' twice' * double} {x.shape[0]}x{x.shape[1]}", x.size, ours, peer)


def int8() -> Iterator[Result]:
    import bitsandbytes.functional as bnb
    import torch
    from bench import weights

    from qconvert import kernels

    torch.set_num_threads(1)
    x = weights()
    peer = partial(bnb.int8_vectorwise_quant, torch.from_numpy(x))
    yield from compared(f"int8 rows quantize {x.shape[0]}x{x.shape[1]}", x.size, partial(kernels.int8_rows, x), peer)


def mlx(bits: int) -> Iterator[Result]:
    """mx.quantize on its CPU stream, evaluated."""
    import mlx.core as mx
    from bench import weights

    from qconvert import kernels

    x = weights()
    a = mx.array(x)
    ours, peer = partial(kernels.mlx_affine, x, 64, bits), lambda: mx.eval(mx.quantize(a, 64, bits))
    yield from compared(f"mlx {bits} bits quantize {x.shape[0]}x{x.shape[1]}", x.size, ours, peer)


CASES: dict[str, Callable[[], Iterator[Result]]] = {
    "nf4 quantize": partial(four_bits, "nf4"),
    "nf4 quantize twice": partial(four_bits, "nf4", True),
    "fp4 quantize": partial(four_bits, "fp4"),
    "int8 rows quantize": int8,
    **{f"mlx {bits} bits quantize": partial(mlx, bits) for bits in (4, 6)},
}
