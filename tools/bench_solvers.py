"""Cases of bench.py for solvers: hqq beside the package, gptq beside llm-compressor on one core, the same levels and Hessian.

llm-compressor has requirements of its own: LLMCOMPRESSOR_PYTHON names the Python of an environment that has it.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

Result = dict[str, str | float | None]
THEIRS = """
import json, sys, time
import numpy as np, torch
from compressed_tensors.quantization import QuantizationArgs
from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight
torch.set_num_threads(1)
f = np.load(sys.argv[1])
args = QuantizationArgs(num_bits=4, symmetric=True, strategy="group", group_size=128)
x, h, s = (torch.from_numpy(f[name])[None] for name in ("x", "h", "scales"))
start = time.process_time()
q = quantize_weight(x.clone(), h.clone(), s, torch.zeros_like(s), None, args)[0]
seconds = time.process_time() - start
np.save(sys.argv[2], q[0].numpy())
print(json.dumps(seconds))
"""


def layer(n: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Weights, and a Hessian of inputs that hang together."""
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(n, k)) * 0.02).astype(np.float32)
    inputs = (rng.normal(size=(k + 512, k // 4)) @ rng.normal(size=(k // 4, k)) / (k // 4) ** 0.5).astype(np.float32)
    inputs += rng.normal(size=inputs.shape).astype(np.float32) * 0.3
    return x, (inputs.T @ inputs / len(inputs)).astype(np.float32)


def gptq(n: int = 4096, k: int = 4096) -> Iterator[Result]:
    """Seconds of one core from weights and Hessian to codes, at int4_g128 with the scales that ours takes."""
    from bench import cpu_seconds

    from qconvert.hessians import factored
    from qconvert.scheme import scheme_of
    from qconvert.solving import Given, Gptq

    (x, h), scheme = layer(n, k), scheme_of("int4_g128")
    assert scheme is not None
    found = []

    def ours() -> None:
        factor = factored(h, 0.01, False, "w")
        given = Given(factor=lambda damp, ordered: factor)
        found[:] = [Gptq(static=True).solve(scheme, x[i : i + 128], given) for i in range(0, n, 128)]

    Gptq().solve(scheme, x[:32], Given(factor=lambda damp, ordered: factored(np.eye(k), 0.01, False, "w")))  # compiles
    seconds = cpu_seconds(ours)
    error = output_error(x, h, np.concatenate([q.dequantize() for q in found]))
    peer, theirs = None, None
    if python := os.environ.get("LLMCOMPRESSOR_PYTHON"):
        peer, q = by_llmcompressor(python, x, h, np.concatenate([q.levels[0] for q in found]))
        theirs = output_error(x, h, q)
    yield {
        "case": f"gptq int4_g128 {n}x{k}", "cpu_s": round(seconds, 2), "peer_cpu_s": peer,
        "ratio": None if peer is None else round(peer / seconds, 1), "output_error": error, "peer_output_error": theirs,
    }  # fmt: skip


def by_llmcompressor(python: str, x: np.ndarray, h: np.ndarray, scales: np.ndarray) -> tuple[float, np.ndarray]:
    with tempfile.TemporaryDirectory() as folder:
        np.savez(Path(folder) / "in.npz", x=x, h=h, scales=scales)
        command = [python, "-c", THEIRS, f"{folder}/in.npz", f"{folder}/out.npy"]
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ""}
        said = subprocess.run(command, check=True, capture_output=True, text=True, env=env).stdout
        return float(json.loads(said.splitlines()[-1])), np.load(f"{folder}/out.npy")


def output_error(x: np.ndarray, h: np.ndarray, q: np.ndarray) -> float:
    e = q - x
    return float(((e @ h) * e).sum(dtype=np.float64) / ((x @ h) * x).sum(dtype=np.float64))


def hqq() -> Iterator[Result]:
    import torch
    from bench import weights
    from bench_safetensors import compared
    from hqq.core.quantize import Quantizer

    from qconvert.scheme import scheme_of
    from qconvert.solving import Given, Hqq

    torch.set_num_threads(1)
    x, scheme = weights(), scheme_of("uint4f_g64")
    assert scheme is not None
    yield from compared(
        f"hqq uint4f_g64 {x.shape[0]}x{x.shape[1]}", x.size,
        lambda: Hqq().solve(scheme, x, Given(over_all=lambda f: f([x]))),
        lambda: Quantizer.quantize(torch.from_numpy(x), nbits=4, group_size=64, axis=1, bitpack=False, device="cpu"),
    )  # fmt: skip


CASES: dict[str, Callable[[], Iterator[Result]]] = {"gptq": gptq, "hqq solver": hqq}
