"""From checkpoint and adapter to a proven file, by the API, on the model that the project ships."""

from __future__ import annotations

import importlib
import json
import math
import os
import pkgutil
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import attacks
import gguf
import numpy as np
import pytest

import qconvert
from qconvert import Graph, Node, Type, convert
from qconvert.errors import InputError, NotVerifiedError, QConvertError, UnsupportedError, UsageError, VerificationError
from qconvert.formats import gguf_check
from qconvert.formats.llama_cpp import LlamaCpp
from qconvert.weights import Weights

GOLDEN = Path(__file__).parents[1] / "golden"
TINY, LORA = GOLDEN / "tiny", GOLDEN / "tiny-lora"
needs_llama = pytest.mark.skipif(LlamaCpp().missing() is not None, reason=f"{LlamaCpp().missing()}")


@needs_llama
def test_model_and_adapter_become_a_proven_q4_k_m(tmp_path: Path) -> None:
    result = convert(f"{TINY}+{LORA}", bits=4, output=tmp_path / "a.gguf")
    report = result.report.data()
    assert result.verified and report["exit"] == 0
    assert report["quant"] == "Q4_K_M"
    assert [r["what"] for r in report["checks"] if r["verdict"] == "fail"] == []
    assert report["accounting"]["size"]["total"] == (tmp_path / "a.gguf").stat().st_size == report["outputs"][0]["nbytes"]
    assert os.listdir(tmp_path) == ["a.gguf"]


def test_sizes_add_up_and_every_tensor_has_one_fate(tmp_path: Path) -> None:
    result = convert(TINY, adapters=[str(LORA)], quant="q8_0", output=tmp_path / "a.gguf", check=False)
    data = result.report.data()
    size = data["accounting"]["size"]
    assert sum(v for k, v in size.items() if k != "total") == size["total"]
    fate = data["accounting"]["tensors"]
    n = sum(len(qconvert_tensors(folder)) for folder in (TINY, LORA))
    assert fate["used"] + fate["folded"] + len(fate["dropped"]) == n
    bpw = data["outputs"][0]["bpw"]
    assert bpw["codes"] == 8 and bpw["linear"] == 8.5 and bpw["file"] > 8.5


def qconvert_tensors(folder: Path) -> list[str]:
    from qconvert.sources import Store

    store = Store()
    store.add("x", folder)
    return list(store.tensors("x"))


def test_the_same_bytes_whatever_the_number_of_threads(tmp_path: Path) -> None:
    for threads in (1, 3):
        convert(f"{TINY}+{LORA}", bits=4, output=tmp_path / f"{threads}.gguf", check=False, threads=threads)
    assert (tmp_path / "1.gguf").read_bytes() == (tmp_path / "3.gguf").read_bytes()


def test_a_dry_run_knows_the_exact_bytes_and_writes_nothing(tmp_path: Path) -> None:
    dry = convert(TINY, bits=4, output=tmp_path / "a.gguf", dry_run=True)
    assert os.listdir(tmp_path) == []
    convert(TINY, bits=4, output=tmp_path / "a.gguf", check=False)
    assert dry.plan.nbytes == (tmp_path / "a.gguf").stat().st_size


@needs_llama
def test_split_files_hold_the_same_tensors_and_run(tmp_path: Path) -> None:
    convert(TINY, bits=4, output=tmp_path / "whole.gguf", check=False)
    result = convert(TINY, bits=4, output=tmp_path / "s.gguf", split_max_size="500K")
    names = [p.name for p in result.outputs]
    assert len(names) > 1 and names[0] == f"s-00001-of-{len(names):05d}.gguf"
    assert result.verified
    whole, parts = (gguf_check.read_tensors(p) for p in ([tmp_path / "whole.gguf"], result.outputs))
    assert whole.keys() == parts.keys()
    assert all(np.array_equal(whole[n].data, parts[n].data) for n in whole)


def test_provenance_names_base_and_adapter(tmp_path: Path) -> None:
    convert(f"{TINY}+{LORA}:0.5", bits=8, output=tmp_path / "a.gguf", check=False)
    fields = gguf.GGUFReader(tmp_path / "a.gguf").fields
    said = {k: f.contents() for k, f in fields.items() if k.startswith(("general.", "qconvert."))}
    assert said["general.base_model.0.name"] == "tiny" and said["general.base_model.1.name"] == "tiny-lora"
    assert said["qconvert.adapter.0.weight"] == 0.5
    assert not any(str(GOLDEN) in str(v) for v in said.values())


@needs_llama
def test_without_the_runtime_the_result_says_not_verified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LlamaCpp, "missing", lambda _: "llama.cpp is not installed")
    result = convert(TINY, bits=4, output=tmp_path / "a.gguf", pre_tokenizer="gpt-2")
    assert not result.verified and result.report.exit == 0
    assert (tmp_path / "a.gguf").exists()
    with pytest.raises(NotVerifiedError) as e:
        convert(TINY, bits=4, output=tmp_path / "b.gguf", pre_tokenizer="gpt-2", require_verified=True)
    assert e.value.exit_code == 8 and not (tmp_path / "b.gguf").exists()


def test_a_tensor_that_is_not_what_the_graph_says_fails_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    true, calls = Weights.encoded, []

    def wrong_once(self: Weights, name: str, begin: int, end: int) -> object:
        data = true(self, name, begin, end)
        if name.endswith("layers.1.mlp.up_proj.weight") and not calls:
            calls.append(name)
            data = data ^ 1
        return data

    monkeypatch.setattr(Weights, "encoded", wrong_once)
    with pytest.raises(VerificationError, match=r"file bytes.*blk\.1\.ffn_up\.weight") as e:
        convert(TINY, bits=4, output=tmp_path / "a.gguf")
    assert e.value.exit_code == 6 and os.listdir(tmp_path) == []


def test_a_merge_that_is_wrong_fails_at_that_stage_and_names_the_weight(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qconvert import weights

    def scaled_wrongly(w: Weights, name: str, node: Node, begin: int, end: int) -> object:
        return true(w, name, Node(node.op, node.inputs, node.type, {**node.attrs, "scale": 4.0}), begin, end)

    true = weights.OPS["merge"]
    monkeypatch.setitem(weights.OPS, "merge", scaled_wrongly)
    with pytest.raises(VerificationError, match=r"merge: mean KL .*first difference at %l0\.q \(model\.layers\.0"):
        convert(f"{TINY}+{LORA}", bits=8, output=tmp_path / "a.gguf")


@dataclass(frozen=True)
class Negate:
    """A user's own pass."""

    name: ClassVar[str] = "negate"

    def __call__(self, graph: Graph) -> Graph:
        def rule(name: str, node: Node) -> dict[str, Node] | None:
            if name != "model.norm.weight":
                return None
            return {f"{name}~positive": node, name: Node("scaled", (f"{name}~positive",), node.type, {"scale": -1.0})}

        return graph.rewrite(rule)


def test_passes_of_ones_own_run_and_functions_are_passes(tmp_path: Path) -> None:
    seen: list[str] = []

    def look(graph: Graph) -> Graph:
        seen.append(graph.nodes["model.norm.weight"].op)
        return graph

    def as_f32(graph: Graph) -> Graph:
        nodes = dict(graph.nodes)
        norm = nodes["model.norm.weight"]
        nodes = {}
        for name, node in graph.nodes.items():
            if name == "model.norm.weight":
                nodes["model.norm.weight~stored"] = norm
                nodes[name] = Node("cast", ("model.norm.weight~stored",), Type("f32", norm.type.shape))
            else:
                nodes[name] = node
        return Graph(nodes, graph.outputs, graph.meta)

    result = convert(TINY, bits=8, output=tmp_path / "a.gguf", check=False, passes=[..., as_f32, Negate(), look])
    assert seen == ["scaled"] and "negate" in result.report.pipeline
    plain = convert(TINY, bits=8, output=tmp_path / "b.gguf", check=False)
    a, b = (gguf_check.read_tensors(r.outputs)["output_norm.weight"].data for r in (result, plain))
    assert np.array_equal(a, -b)


@needs_llama
def test_a_pass_that_changes_the_function_is_priced_and_the_rest_is_still_proven(tmp_path: Path) -> None:
    result = convert(
        f"{TINY}+{LORA}", bits=8, output=tmp_path / "a.gguf", dump_ir=tmp_path / "ir",
        passes=[..., scaled_norm],
    )  # fmt: skip
    rows = {r.what: r for r in result.report.checks}
    assert rows["merge"].verdict == "pass" and rows["passes"].verdict == "info" and (rows["passes"].value or 0) > 1e-3
    assert result.verified
    names = sorted(p.name for p in (tmp_path / "ir").iterdir())
    assert names[:3] == ["00-input.ir", "01-attach-adapter.ir", "02-merge-adapters.ir"] and names[-1] == "06-pack.ir"


def scaled_norm(graph: Graph) -> Graph:
    """The last norm at half its size: another function, on purpose."""

    def rule(name: str, node: Node) -> dict[str, Node] | None:
        if name != "model.norm.weight":
            return None
        plain = f"{name}~plain"
        return {plain: node, name: Node("scaled", (plain,), Type("f32", node.type.shape), {"scale": 0.5})}

    return graph.rewrite(rule)


def test_options_that_do_not_exist_are_usage_errors(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no option 'bit'"):
        convert(TINY, bit=4)
    with pytest.raises(UsageError, match="bits 7"):
        convert(TINY, bits=7)
    with pytest.raises(UsageError, match="did you mean Q4_K"):
        convert(TINY, quant="Q4_K_N")
    with pytest.raises(UnsupportedError, match="no format is called 'gguff'"):
        convert(TINY, to="gguff")


def test_a_checkpoint_with_nan_is_refused_by_tensor_and_leaves_nothing(tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    folder = tmp_path / "model"
    shutil.copytree(TINY, folder)
    import torch
    from safetensors.torch import load_file as load_torch
    from safetensors.torch import save_file as save_torch

    tensors = load_torch(folder / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][3, 5] = float("nan")
    save_torch(tensors, folder / "model.safetensors")
    assert torch and load_file and save_file
    with pytest.raises(InputError, match=r"down_proj\.weight: nan at \[3, 5\]"):
        convert(folder, bits=4, output=tmp_path / "out" / "a.gguf")
    assert os.listdir(tmp_path / "out") == []


def test_values_that_do_not_fit_f16_are_refused(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "model"
    shutil.copytree(TINY, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = torch.tensor(1e5)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(
        InputError, match=r"up_proj\.weight: 99\d+ does not fit f16|100\d+ does not fit f16|1e\+05 does not fit"
    ):
        convert(folder, quant="F16", output=tmp_path / "a.gguf")


def test_every_error_of_a_user_has_its_exit_code() -> None:
    def kinds(cls: type[QConvertError]) -> set[type[QConvertError]]:
        return {cls}.union(*(kinds(c) for c in cls.__subclasses__()))

    codes = {c.__name__: c.exit_code for c in kinds(QConvertError)}
    assert codes["UsageError"] == 2 and codes["AdapterError"] == 3 and codes["GateError"] == 7
    assert set(codes.values()) == {1, 2, 3, 4, 5, 6, 7, 8, 130}


def test_json_has_the_promised_fields(tmp_path: Path) -> None:
    result = convert(TINY, bits=4, output=tmp_path / "a.gguf", check=False)
    data = json.loads(json.dumps(result.report.data()))
    assert {"outputs", "verified", "runtime", "checks", "accounting", "exit"} <= data.keys()
    assert {"path", "format", "quant", "nbytes", "bpw"} == data["outputs"][0].keys()
    assert {"codes", "linear", "file"} == data["outputs"][0]["bpw"].keys()
    assert {"what", "metric", "value", "limit", "verdict", "reason"} == data["checks"][0].keys()
    assert all(math.isfinite(v) for v in data["outputs"][0]["bpw"].values())
    assert qconvert.__version__


@pytest.mark.parametrize("name", sorted(m.name for m in pkgutil.iter_modules(attacks.__path__)))
def test_hostile_checkpoints_end_in_a_users_error_and_leave_no_file(tmp_path: Path, name: str) -> None:
    importlib.import_module(f"attacks.{name}").make(tmp_path / "model")
    with pytest.raises(QConvertError) as caught:
        convert(tmp_path / "model", bits=4, output=tmp_path / "out" / "a.gguf")
    assert caught.value.exit_code in (3, 5)
    assert not (tmp_path / "out").exists() and not (tmp_path / "executed").exists()
