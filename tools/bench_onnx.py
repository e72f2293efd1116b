"""ONNX cases of bench.py: our int4 files beside those of onnxruntime-genai's model builder.

The builder and onnxruntime's quantizers need onnx-ir; GENAI_PYTHON names a Python that has builder and onnx-ir, if this one
has not. Without them only ours is measured.
BENCH_WORK keeps the synthetic models between calls; see bench_pipeline.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from bench_pipeline import ROOT, Cost, Result, measured, synthetic, work_folder

sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
DATA = ROOT.parent / "shared" / "data"
F32 = npt.NDArray[np.float32]
ROUNDS, DECODE_ROUNDS = 3, 5


def ours(source: str, out: Path) -> Cost:
    command = [sys.executable, "-m", "qconvert", source, "--to", "onnx", "--bits", "4", "--no-check", "--threads", "2"]
    return measured([*command, "--force", "-o", str(out)])


def builders(model: Path, out: Path) -> Cost | None:
    import builder_oracle

    return None if builder_oracle.missing() else measured(builder_oracle.command(model, out, "int4"))


def folder_nbytes(folder: Path) -> int:
    """Of the model and its weights."""
    return sum(p.stat().st_size for p in folder.glob("model.onnx*"))


# cost of an export --------------------------------------------------------------------------------


def export(billions: float) -> Iterator[Result]:
    """A bf16 Llama to int4 in blocks of 32: CPU seconds, memory and bytes of the whole process."""
    with work_folder() as folder:
        model, _ = synthetic(folder, billions)
        out, theirs = folder / "ours", folder / "theirs"
        ours(str(model), out)  # compiles
        pairs = [(ours(str(model), out), builders(model, theirs)) for _ in range(ROUNDS)]
        mine = [m for m, _ in pairs]
        peers = [p for _, p in pairs if p is not None]
        result: Result = {"case": f"onnx int4 export {billions:g}B, whole process", **summary(mine, out)}
        if peers:
            result |= {f"peer_{key}": value for key, value in summary(peers, theirs).items()}
            result["ratio"] = round(statistics.median(p.cpu_seconds / m.cpu_seconds for m, p in pairs if p), 1)
            result["rss_ratio"] = round(min(p.peak_rss_mb for p in peers) / max(m.peak_rss_mb for m in mine), 1)
        yield result


def summary(costs: list[Cost], out: Path) -> Result:
    return {
        "cpu_seconds": round(statistics.median(c.cpu_seconds for c in costs), 2),
        "wall_seconds": round(statistics.median(c.wall_seconds for c in costs), 2),
        "peak_rss_mb": round(max(c.peak_rss_mb for c in costs)),
        "written_mb": round(folder_nbytes(out) / 1e6),
    }


def memory() -> Iterator[Result]:
    """Peak RSS of our export of checkpoints of 0.5, 1.4 and 4 GB."""
    with work_folder() as folder:
        sizes = (0.25, 0.7, 2.0)
        peaks = []
        for billions in sizes:
            source = str(synthetic(folder, billions)[0])
            peaks.append([ours(source, folder / "ours").peak_rss_mb for _ in range(3)][1:])  # the first may compile
        yield {
            "case": "peak RSS of onnx int4 export, 0.25B, 0.7B and 2B",
            **{f"peak_rss_{b:g}b_mb": round(max(p)) for b, p in zip(sizes, peaks, strict=True)},
            "ratio": round(max(peaks[-1]) / max(peaks[0]), 2),
        }


# decoding -----------------------------------------------------------------------------------------


def decode(genai: bool = False) -> Iterator[Result]:
    """Tokens a second by cached steps of both int4 files, in turn and each in a fresh process; memory loaded and used."""
    with work_folder() as folder:
        model, _ = synthetic(folder, 0.25)
        files = {"": folder / "ours", "peer_": folder / "theirs"}
        ours(str(model), files[""])
        if builders(model, files["peer_"]) is None:
            del files["peer_"]
        runs: dict[str, list[Any]] = {who: [] for who in files}
        for i in range(DECODE_ROUNDS):
            for who in sorted(files, reverse=bool(i % 2)):
                runs[who].append(decoded(files[who], genai))
        result: Result = {"case": f"onnx int4 decode 0.25B, {'genai' if genai else 'onnxruntime, 2 threads'}"}
        for who, each in runs.items():
            result[f"{who}tokens_per_s"] = round(1e3 / statistics.median(r["step_ms"] for r in each), 1)
            result[f"{who}prefill_ms"] = round(statistics.median(r["prefill_ms"] for r in each), 1)
            for when in ("loaded", "used"):
                result[f"{who}{when}_rss_mb"] = round(statistics.median(sum(r[when].values()) for r in each))
        if "peer_" in runs:
            pairs = zip(runs[""], runs["peer_"], strict=True)
            result["ratio"] = round(statistics.median(p["step_ms"] / m["step_ms"] for m, p in pairs), 3)
        yield result


def decoded(folder: Path, genai: bool) -> Any:
    command = [sys.executable, str(ROOT / "tools" / "decode_onnx.py"), str(folder), *(["--genai"] if genai else [])]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])


# error of the weights -----------------------------------------------------------------------------


def weight_error(group: int) -> Iterator[Result]:
    """Relative RMSE of 4-bit weights: ours with and without zero points, the builder's default, the best of ORT's."""
    rng = np.random.default_rng(0)
    shape = (512, 4096)
    sets: dict[str, list[F32]] = {
        "gaussian": [rng.standard_normal(shape, np.float32)],
        "t(4)": [rng.standard_t(4, shape).astype(np.float32)],
    }
    if DATA.is_dir():
        sets["novels-13m"] = linears(DATA / "models" / "novels-13m")
    for name, matrices in sets.items():
        found = {s: error(matrices, partial(our_weights, scheme=s, group=group)) for s in ("int4", "uint4")}
        result: Result = {
            "case": f"onnx weight error, 4 bits in blocks of {group}, {name}",
            "relative_rmse": round(found["int4"], 4),
            "relative_rmse_zero_points": round(found["uint4"], 4),
        }
        if find_spec("onnx_ir"):
            result |= beside_ort(matrices, found, group)
        yield result


def beside_ort(matrices: list[F32], found: Mapping[str, float], group: int) -> Result:
    """The builder's default is ORT's `default sym`; hqq is not among them, its zero points are floats."""
    hows = ("default sym", "default asym", "rtn", "k_quant")
    theirs = {how: error(matrices, partial(ort_weights, how=how, group=group)) for how in hows}
    builder, best = theirs["default sym"], min(theirs, key=theirs.__getitem__)
    return {
        "builder_relative_rmse": round(builder, 4),
        "ort_best_relative_rmse": round(theirs[best], 4),
        "ort_best": best,
        "percent_below_builder": round(100 * (1 - found["int4"] / builder), 1),
        "percent_below_builder_zero_points": round(100 * (1 - found["uint4"] / builder), 1),
        "percent_below_ort_best": round(100 * (1 - min(found.values()) / theirs[best]), 1),
    }


def linears(folder: Path) -> list[F32]:
    """The matrices of a checkpoint."""
    from qconvert.build import build
    from qconvert.sources import Store, read_checkpoint
    from qconvert.weights import Weights

    store = Store()
    graph = build(read_checkpoint(folder, store))
    weights = Weights(graph, store)
    return [weights.real(name) for name in graph.parameters() if len(graph.nodes[name].type.dims) == 2]


def error(matrices: list[F32], quantized: Callable[[F32], F32]) -> float:
    """Relative RMSE over all of them."""
    lost = sum(float(np.square(quantized(w) - w, dtype=np.float64).sum()) for w in matrices)
    return float(np.sqrt(lost / sum(float(np.square(w, dtype=np.float64).sum()) for w in matrices)))


def our_weights(w: F32, scheme: str, group: int) -> F32:
    """What --to onnx makes of a matrix."""
    from safetensors.numpy import save_file

    from qconvert.graph import Graph, Node, Type
    from qconvert.passes.quantize import Quantize
    from qconvert.sources import Store
    from qconvert.weights import Weights

    with tempfile.TemporaryDirectory() as folder:
        save_file({"w": w}, Path(folder) / "model.safetensors")
        store = Store()
        store.add("base", Path(folder))
        graph = Graph({"w": Node("load", (), Type("f32", w.shape), {"tensor": "base/model.safetensors#w"})}, ("w",))
        graph = Quantize(scheme, "mse", {"w": f"{scheme}_g{group}"})(graph)
        out: F32 = Weights(graph, store).real("w")
        store.close()
    return out


def ort_weights(w: F32, how: str, group: int) -> F32:
    """What MatMulNBitsQuantizer, which the builder calls with `default sym`, makes of a matrix [N,K]."""
    from onnx import TensorProto, helper, numpy_helper
    from onnxruntime.quantization import matmul_nbits_quantizer as q

    io = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, size]) for name, size in zip("xy", w.T.shape, strict=True)]
    weight = numpy_helper.from_array(np.ascontiguousarray(w.T), "w")
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"], "product")], "g", io[:1], io[1:], [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    algorithm = {"rtn": q.RTNWeightOnlyQuantConfig, "k_quant": q.KQuantWeightOnlyQuantConfig}.get(how)
    quantizer = q.MatMulNBitsQuantizer(
        model, block_size=group, is_symmetric=how == "default sym", accuracy_level=4, algo_config=algorithm and algorithm()
    )
    quantizer.process()
    graph = quantizer.model.model.graph
    tensors = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    (node,) = (n for n in graph.node if n.op_type == "MatMulNBits")
    codes, scales, *zeros = (tensors[name] for name in node.input[1:4] if name)
    n, groups = len(w), w.shape[1] // group
    offset = nibbles(zeros[0].reshape(n, -1))[:, :groups, None] if zeros else np.float32(8)
    out: F32 = (nibbles(codes.reshape(n, -1)).reshape(n, groups, group) - offset) * scales.reshape(n, groups, 1)
    return out.reshape(w.shape)


def nibbles(packed: npt.NDArray[np.uint8]) -> F32:
    """u8[N,m] -> f32[N,2m], the low half of each byte first."""
    return np.stack([packed & 15, packed >> 4], -1).reshape(len(packed), -1).astype(np.float32)


# KL -----------------------------------------------------------------------------------------------

# adapter -> text it never saw, from this part of the text on, and before the text's end
TEXTS: Mapping[str | None, tuple[str, float]] = {
    None: ("en-fauntleroy-1886.txt", 0.0),
    "shakespeare-lora-r8-qv": ("tinyshakespeare.txt", 0.9),
    "python-rslora-r16-all": ("code-python-eval.txt", 0.0),
    "stories-dora-r8": ("tinystories-sample.txt", 0.85),
}
N_CHUNKS, N_TOKENS = 30, 256


def kl() -> Iterator[Result]:
    """Both int4 files of novels-13m and each adapter, both at accuracy level 4: mean KL to transformers and PEFT in f32."""
    if not DATA.is_dir():
        raise RuntimeError(f"real inputs are not at {DATA}")
    for adapter in TEXTS:
        yield kl_of(adapter)


def kl_of(adapter: str | None) -> Result:
    import builder_oracle
    from transformers import AutoModelForCausalLM

    with work_folder() as folder:
        base = DATA / "models" / "novels-13m"
        model = AutoModelForCausalLM.from_pretrained(base, dtype="float32").eval()
        source, merged = str(base), base
        if adapter:
            import peft

            source += f"+{DATA / 'adapters' / adapter}"
            model = peft.PeftModel.from_pretrained(model, str(DATA / "adapters" / adapter)).eval()
        chunks = held_out(base, *TEXTS[adapter])
        want = [reference(model, chunk) for chunk in chunks]
        files = {"": folder / "ours"}
        ours(source, files[""])
        if adapter:
            merged = folder / "merged"
            model.merge_and_unload().save_pretrained(merged)
            for file in ("tokenizer.json", "tokenizer_config.json"):
                (merged / file).write_bytes((base / file).read_bytes())
        if builders(merged, folder / "theirs") is not None:
            files["peer_"] = folder / "theirs"
        result: Result = {"case": f"onnx KL int4 novels-13m{f' + {adapter}' if adapter else ''}"}
        each = {who: kls(builder_oracle.Decoder(file, 2), chunks, want) for who, file in files.items()}
        for who, file in files.items():
            result[f"{who}kl"] = float(f"{np.mean(each[who]):.4g}")
            result[f"{who}nbytes"] = folder_nbytes(file)
        if "peer_" in each:
            result["percent_less"] = round(100 * float(1 - np.mean(each[""]) / np.mean(each["peer_"])), 1)
        return result


def held_out(base: Path, text: str, begin: float) -> list[list[int]]:
    """Chunks of ids, as shared/data's README cuts them."""
    from tokenizers import Tokenizer

    words = (DATA / "text" / text).read_text("utf-8-sig")
    tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
    ids = tokenizer.encode(words[int(begin * len(words)) :], add_special_tokens=False).ids
    return [ids[i : i + N_TOKENS] for i in range(0, len(ids) - N_TOKENS, N_TOKENS)][:N_CHUNKS]


def reference(model: Any, chunk: list[int]) -> F32:
    """Log-probabilities f32[T,V] of transformers and PEFT."""
    import torch

    with torch.no_grad():
        out: F32 = torch.log_softmax(model(torch.tensor([chunk])).logits[0], -1).numpy()
    return out


def kls(model: Any, chunks: list[list[int]], want: list[F32]) -> list[float]:
    """Mean KL of each chunk, nats a token."""
    out = []
    for chunk, true in zip(chunks, want, strict=True):
        logits = model.logits(chunk).astype(np.float64)
        top = logits.max(-1, keepdims=True)
        got = logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))
        out.append(float((np.exp(true.astype(np.float64)) * (true - got)).sum(-1).mean()))
    return out


CASES: dict[str, Callable[[], Iterator[Result]]] = {
    "onnx int4 export 0.25B": partial(export, 0.25),
    "onnx int4 export 0.7B": partial(export, 0.7),
    "onnx memory": memory,
    "onnx int4 decode 0.25B": decode,
    "onnx int4 decode 0.25B genai": partial(decode, genai=True),
    "onnx weight error 32": partial(weight_error, 32),
    "onnx weight error 128": partial(weight_error, 128),
    "onnx KL novels-13m": kl,
}
