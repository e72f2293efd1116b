"""Inputs that went wrong at random, and what became of them: bytes flipped, cut, spliced; JSON values replaced.

mutated(target, folder, seed)  one input, from a seed alone
outcome(target, folder)        what a run of qconvert on it ended in, in a process of its own with bounds on time and memory
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import struct
import traceback
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import gguf
import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from qconvert import convert
from qconvert.errors import QConvertError
from qconvert.inspection import inspect_file

ROOT = Path(__file__).parents[1]
SECONDS, NBYTES = 5, 500 << 20
WIDTH, HIDDEN = 64, 96
HUGE = 1 << 31, 1 << 32, (1 << 63) - 1, 1 << 63, (1 << 64) - 1
# what a JSON value is replaced by
VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 3, 1 << 31, 1 << 64, 10**400, 0.5, -0.0, 1e308, math.inf, -math.inf, math.nan, "", "x",
    "(a+)+$", "../..", "/etc/passwd", "\x00", "\ud800", "<unk>", [], [[]], [0], ["x"], {}, {"a": 1}, {"type": "x"}, {"": None},
)  # fmt: skip


class Outcome(NamedTuple):
    """kind: right, wrong, error (named), bug, slow, large, killed."""

    kind: str
    what: str


# the inputs ---------------------------------------------------------------------------------------


@cache
def narrow(name: str) -> TemporaryDirectory[str]:
    """golden/tiny, or its adapter, with one narrow layer: its own configuration and tokenizer, a twentieth of its weights."""
    made = TemporaryDirectory(prefix="qconvert-")
    (narrow_model if name == "tiny" else narrow_adapter)(Path(made.name) / name)
    return made


def make_model(folder: Path) -> None:
    shutil.copytree(Path(narrow("tiny").name) / "tiny", folder)


def make_adapter(folder: Path) -> None:
    shutil.copytree(Path(narrow("tiny-lora").name) / "tiny-lora", folder)


def narrow_model(folder: Path) -> None:
    shutil.copytree(ROOT / "golden" / "tiny", folder)
    config = json.loads((folder / "config.json").read_text("utf-8"))
    config |= {"hidden_size": WIDTH, "intermediate_size": HIDDEN, "num_attention_heads": 1, "num_key_value_heads": 1}
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}), "utf-8")
    whole = load_file(folder / "model.safetensors")
    kept = {n: cut(n, t) for n, t in whole.items() if ".layers." not in n or ".layers.0." in n}
    save_file(kept, folder / "model.safetensors")


def narrow_adapter(folder: Path) -> None:
    shutil.copytree(ROOT / "golden" / "tiny-lora", folder)
    whole = load_file(folder / "adapter_model.safetensors")
    save_file({n: cut(n, t) for n, t in whole.items() if ".layers.0." in n}, folder / "adapter_model.safetensors")


def cut(name: str, t: torch.Tensor) -> torch.Tensor:
    wide = HIDDEN, WIDTH
    sides = {"embed_tokens": (t.shape[0], WIDTH), "down_proj": wide[::-1], "gate_proj": wide, "up_proj": wide}
    n, k = next((s for part, s in sides.items() if part in name), (WIDTH, WIDTH))
    return t[: min(n, t.shape[0])].clone() if t.ndim == 1 else t[:n, :k].contiguous()


def make_onnx(folder: Path, external: bool = True) -> None:
    """x[batch,64] -> MatMul -> Relu -> If -> Gemm -> y, its weights in a file beside it."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    weights = {"w.weight": (64, 96), "v.weight": (32, 96), "c": (32,)}
    nodes = [
        helper.make_node("MatMul", ["x", "w.weight"], ["a"], name="first"),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Gemm", ["b", "v.weight", "c"], ["y"], name="second", transB=1),
    ]
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes, "g", [info("x", TensorProto.FLOAT, ["batch", 64])], [info("y", TensorProto.FLOAT, ["batch", 32])],
        [numpy_helper.from_array(rng.standard_normal(s).astype(np.float32), n) for n, s in weights.items()],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    more = {"save_as_external_data": True, "location": "model.onnx.data", "size_threshold": 0} if external else {}
    onnx.save(model, folder / "model.onnx", **more)


def make_gguf(folder: Path) -> None:
    make_model(folder / "source")
    convert(folder / "source", to="gguf", quant="F32", check=False, threads=1, output=folder / "model.gguf")
    shutil.rmtree(folder / "source")


class Target(NamedTuple):
    """files: which are mutated, and the bytes from their beginning that are headers (None: all of it)."""

    make: Callable[[Path], None]
    files: tuple[str, ...]
    run: Callable[[Path, Path], None]
    right: Callable[[Path, Path], str]  # "" or what is wrong with the output


# what is run, and what is right ---------------------------------------------------------------------


def to_gguf(model: Path | str, output: Path) -> None:
    convert(str(model), to="gguf", quant="F32", check=False, threads=1, output=output)


def run_model(folder: Path, output: Path) -> None:
    inspect_file(str(folder))
    to_gguf(folder, output)


def digests(tensors: dict[str, np.ndarray[Any, Any]]) -> Counter[str]:
    """Of each tensor's numbers, whatever their order: rows of queries and keys are permuted on the way."""
    ordered = (np.sort(np.asarray(t, np.float32).reshape(-1)) for t in tensors.values())
    return Counter(hashlib.sha256(t.tobytes()).hexdigest() for t in ordered)


def written(output: Path) -> dict[str, np.ndarray[Any, Any]]:
    return {t.name: np.array(t.data) for t in gguf.GGUFReader(output).tensors}


def read_by_safetensors(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name).float().numpy() for name in file.keys()}  # noqa: SIM118


def right_model(folder: Path, output: Path) -> str:
    """Every tensor that the safetensors library reads is in the output, its numbers unchanged, as gguf-py reads it."""
    missing = digests(read_by_safetensors(folder / "model.safetensors")) - digests(written(output))
    return f"{missing.total()} tensors of the input are not in the output" if missing else ""


def run_adapter(folder: Path, output: Path) -> None:
    to_gguf(f"{folder / 'base'}+{folder / 'adapter'}", output)


def right_adapter(folder: Path, output: Path) -> str:
    """W + scale * B @ A by PEFT's rules, in numpy, from what the safetensors library reads."""
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text("utf-8"))
    base = read_by_safetensors(folder / "base" / "model.safetensors")
    parts = read_by_safetensors(folder / "adapter" / "adapter_model.safetensors")
    for key in [k for k in parts if ".lora_A." in k]:
        module = key.partition("base_model.model.")[2].partition(".lora_A")[0]
        rank = pattern(config, "rank_pattern", module, config.get("r", 8))
        alpha = pattern(config, "alpha_pattern", module, config.get("lora_alpha", 8))
        scale = np.float32(alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))
        base[f"{module}.weight"] = base[f"{module}.weight"] + scale * (parts[key.replace("lora_A", "lora_B")] @ parts[key])
    got = sorted((np.sort(t.reshape(-1)) for t in written(output).values()), key=lambda t: (t.size, float(t.sum())))
    want = sorted((np.sort(t.reshape(-1)) for t in base.values()), key=lambda t: (t.size, float(t.sum())))
    if [t.size for t in got] != [t.size for t in want]:
        return "the output has other tensors"
    # f32 sums, whose terms may be larger than what they come to
    n_far = sum(float(np.abs(a - b).max()) > 1e-5 * float(np.abs(b).max()) for a, b in zip(got, want, strict=True))
    return f"{n_far} tensors are not the base plus what the adapter adds" if n_far else ""


def pattern(config: dict[str, Any], key: str, module: str, default: float) -> float:
    found = (v for k, v in (config.get(key) or {}).items() if re.match(rf"(.*\.)?({k})$", module))
    return next(found, default)


def run_gguf(folder: Path, output: Path) -> None:
    inspect_file(str(folder / "model.gguf"))
    to_gguf(folder / "model.gguf", output)


def right_gguf(folder: Path, output: Path) -> str:
    missing = digests(written(folder / "model.gguf")) - digests(written(output))
    return f"{missing.total()} tensors of the input are not in the output" if missing else ""


def run_onnx(folder: Path, output: Path) -> None:
    inspect_file(str(folder / "model.onnx"))
    convert(str(folder / "model.onnx"), to="onnx", quant="int8", threads=1, output=output)  # with its proof


def right_onnx(folder: Path, output: Path) -> str:
    """onnxruntime has compared the two files; and what onnx's checker takes becomes what it takes."""
    import onnx

    try:
        onnx.checker.check_model(folder / "model.onnx")
    except onnx.checker.ValidationError:
        return ""
    onnx.checker.check_model(output / "model.onnx")
    return ""


TARGETS: dict[str, Target] = {
    "model": Target(make_model, ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
                                 "chat_template.jinja", "model.safetensors"), run_model, right_model),
    "adapter": Target(lambda f: (make_model(f / "base"), make_adapter(f / "adapter"))[0],
                      ("adapter/adapter_config.json", "adapter/adapter_model.safetensors"), run_adapter, right_adapter),
    "gguf": Target(make_gguf, ("model.gguf",), run_gguf, right_gguf),
    "onnx": Target(make_onnx, ("model.onnx", "model.onnx", "model.onnx.data"), run_onnx, right_onnx),
}  # fmt: skip


# mutations ----------------------------------------------------------------------------------------


def mutated(target: str, original: Path, folder: Path, seed: int) -> str:
    """`folder` becomes `original` with one of its files mutated; says which and how."""
    rng = random.Random(f"{target} {seed}")
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(original, folder)
    path = folder / rng.choice(TARGETS[target].files)
    data = path.read_bytes()
    if path.suffix == ".json" and rng.random() < 0.75:
        how, new = json_mutated(data, rng)
    else:
        how, new = bytes_mutated(data, header_nbytes(path, data), rng)
    path.write_bytes(new)
    return f"{target} {seed}: {path.relative_to(folder)}: {how}"


def header_nbytes(path: Path, data: bytes) -> int:
    if path.suffix == ".safetensors":
        return 8 + int.from_bytes(data[:8], "little")
    if path.suffix == ".gguf":
        return data.rindex(b"output_norm.weight") + 64
    return len(data)


def bytes_mutated(data: bytes, n_header: int, rng: random.Random) -> tuple[str, bytes]:
    """Values of weights are left alone: another number there is another model, which nothing can notice."""
    at, n = rng.randrange(n_header), rng.choice((1, 2, 4, 8, 64))
    other = rng.randrange(n_header)
    match rng.randrange(6):
        case 0:
            out = bytearray(data)
            for _ in range(n if n < 64 else 1):
                out[rng.randrange(n_header)] ^= 1 << rng.randrange(8)
            return f"{n} bits flipped", bytes(out)
        case 1:
            end = rng.randrange(len(data)) if rng.random() < 0.5 else at
            return f"cut at {end}", data[:end]
        case 2:
            return f"{n} bytes at {at} from {other}", data[:at] + data[other : other + n] + data[at + n :]
        case 3:
            return f"{n} bytes left out at {at}", data[:at] + data[at + n :]
        case 4:
            return f"{n} bytes of {other} put in at {at}", data[:at] + data[other : other + n] + data[at:]
    value = rng.choice((*HUGE, 0, 1, 7, 255))
    word = struct.pack("<Q", value)[: rng.choice((1, 4, 8))]
    return f"{value} at {at}", data[:at] + word + data[at + len(word) :]


def json_mutated(data: bytes, rng: random.Random) -> tuple[str, bytes]:
    document = json.loads(data)
    places = [*containers(document)]
    where = rng.choice(places[: rng.choice((1, 4, 40, len(places)))])
    key = rng.choice(list(where) if isinstance(where, dict) else range(len(where)))
    shown = str(key)[:40]
    match rng.randrange(5):
        case 0:
            del where[key]
            how = f"{shown} left out"
        case 1 if isinstance(where, dict):
            new = rng.choice(("x", key + "_", key.upper(), ""))
            where[new] = where.pop(key)
            how = f"{shown} is called {new}"
        case 2:
            value = where[key]
            where[key] = nearby(value, rng)
            how = f"{shown}: {str(value)[:40]} -> {str(where[key])[:40]}"
        case _:
            where[key] = value = rng.choice(VALUES)
            how = f"{shown} = {str(value)[:40]!a}"
    return how, json.dumps(document).encode("utf-8", "surrogatepass")


def nearby(value: Any, rng: random.Random) -> Any:
    match value:
        case bool():
            return not value
        case int() | float():
            return rng.choice((value + 1, value - 1, -value, value * 1000, float(value), str(value)))
        case str():
            return rng.choice((value * 2, value[1:], value + "\n", value.upper(), [value]))
        case list():
            return rng.choice((value[:-1], value + value[:1], value * 2, [value], value[::-1]))
        case dict():
            return rng.choice(([*value.items()], [*value], {**value, "x": value}, dict([*value.items()][1:])))
    return 0


def containers(value: Any) -> list[Any]:
    """Every object and list that is not empty, the outer before the inner."""
    out: list[Any] = []
    queue = [value]
    for each in queue:
        if isinstance(each, dict | list) and each:
            out.append(each)
            queue += each.values() if isinstance(each, dict) else each
    return out


# what becomes of them -----------------------------------------------------------------------------


def outcome(target: str, folder: Path) -> Outcome:
    output = folder.with_name(folder.name + "-out" + ("" if target == "onnx" else ".gguf"))
    shutil.rmtree(output, ignore_errors=True)
    output.unlink(missing_ok=True)
    found = bounded(lambda: TARGETS[target].run(folder, output))
    if found.kind != "right":
        return found._replace(kind="left") if found.kind == "error" and output.exists() else found
    try:
        wrong = TARGETS[target].right(folder, output)
    except Exception as e:  # another library refuses what was taken here, or made here
        wrong = f"{type(e).__name__}: {e}"
    return Outcome("wrong", wrong) if wrong else found


def bounded(run: Callable[[], object]) -> Outcome:
    """Run it in a copy of this process: at most SECONDS, and NBYTES more than the copy begins with."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        found, began = Outcome("bug", ""), resident_nbytes()  # fewer than its parent has: pages of files are not copied
        try:
            os.close(reading)
            signal.setitimer(signal.ITIMER_PROF, SECONDS)  # of this process's own work; others may be at work beside it
            signal.alarm(20 * SECONDS)
            resource.setrlimit(resource.RLIMIT_AS, (virtual_nbytes() + 4 * NBYTES,) * 2)
            run()
            found = Outcome("right", "")
        except QConvertError as e:
            named = e.exit_code in (2, 3, 4, 5, 6) and e.message
            found = Outcome("error" if named else "bug", f"{type(e).__name__}: {e.message}")
        except BaseException:
            found = Outcome("bug", traceback.format_exc(limit=-6))
        finally:
            os.write(writing, json.dumps([began, found.kind, found.what[:50_000]]).encode())
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as file:
        said = file.read()
    _, status, usage = os.wait4(pid, 0)
    if os.WIFSIGNALED(status):
        by = signal.Signals(os.WTERMSIG(status))
        return Outcome("slow" if by in (signal.SIGALRM, signal.SIGPROF) else "killed", by.name)
    began, *found = json.loads(said)
    grown = usage.ru_maxrss * 1024 - began
    return Outcome("large", f"{grown} bytes") if grown > NBYTES else Outcome(*found)


def virtual_nbytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def resident_nbytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
