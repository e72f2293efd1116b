"""QA-LoRA: adapters on pooled inputs, as PEFT runs them and as two repositories do; merged into offsets, codes unchanged."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_gptq_input import Kind, made

from qconvert import convert
from qconvert.adapter_pooling import ELASTIC
from qconvert.adapters import read_adapter
from qconvert.build import build
from qconvert.errors import AdapterError, QConvertError, UnsupportedError, UsageError
from qconvert.graph import Graph, Type
from qconvert.ops import OPS, infer
from qconvert.passes.attach_adapter import AttachAdapter
from qconvert.passes.merge_adapters import MergeAdapters
from qconvert.pipeline import Pipeline
from qconvert.scheme import QTensor
from qconvert.sources import Store, read_checkpoint
from qconvert.weights import Weights

G, R, ALPHA = 32, 4, 8
TARGETS = {"model.layers.0.self_attn.q_proj": (64, 64), "model.layers.1.mlp.down_proj": (64, 96)}
TINY = Path(__file__).parents[1] / "golden" / "tiny"
CONFIG: dict[str, Any] = {"peft_type": "LORA", "r": R, "lora_alpha": ALPHA, "target_modules": ["q_proj", "down_proj"],
                          "layers_to_transform": [0, 1], "init_lora_weights": True}  # fmt: skip
X = torch.randn(5, 96, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def adapter(folder: Path, group: int = G, more: dict[str, torch.Tensor] | None = None, **config: Any) -> Path:
    """A folder as PEFT writes it; factors f32."""
    torch.manual_seed(1)
    tensors = {}
    for module, (n, k) in TARGETS.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = torch.randn(R, k // group) / 10
        tensors[f"base_model.model.{module}.lora_B.weight"] = torch.randn(n, R) / 10
        for name, value in (more or {}).items():
            tensors[f"base_model.model.{module}.{name}"] = value.clone()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG | config))
    return folder


def base(folder: Path, kind: Kind) -> Path:
    """A GPTQ checkpoint with a tokenizer."""
    gptq = made(folder, kind, 1024).folder
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY / name, gptq)
    return gptq


class Model(NamedTuple):
    """A GPTQ checkpoint with an adapter beside it, and merged."""

    store: Store
    attached: Graph
    merged: Graph

    def delta(self, module: str, x: torch.Tensor) -> torch.Tensor:
        """What the adapter adds, f64, on x."""
        from qconvert import run

        path = next(n for n, v in self.attached.nodes.items() if v.op == "lora" and module in v.inputs[1])
        sums, *_ = self.attached.nodes[path].inputs
        values = run.Values(self.attached, Weights(self.attached, self.store, np.float64), torch.zeros(1), torch.float64)
        values.live[self.attached.nodes[sums].inputs[0]] = x[None]
        values.live[sums] = run.evaluate(values, sums, self.attached.nodes[sums])
        return run.evaluate(values, path, self.attached.nodes[path])[0]

    def weights(self, module: str) -> tuple[QTensor, QTensor]:
        """Before and after the merge."""
        name, (n, _) = f"{module}.weight", TARGETS[module]
        w = Weights(self.merged, self.store)
        before, after = w.rows(f"{name}~base", 0, n), w.rows(name, 0, n)
        assert isinstance(before, QTensor) and isinstance(after, QTensor)
        return before, after


def model(tmp_path: Path, folder: Path, kind: Kind | None = None, pooling: str | None = None) -> Model:
    gptq = made(tmp_path, kind or Kind(sym=False)).folder
    store = Store()
    plain = build(read_checkpoint(gptq, store))
    attached = Pipeline((AttachAdapter(read_adapter(folder, store, "adapter0", 1.0, pooling)),)).run(plain)
    return Model(store, attached, Pipeline((MergeAdapters(),)).run(attached))


def peft_delta(folder: Path, module: str, x: torch.Tensor) -> torch.Tensor:
    """What PEFT's own layer for GPTQ adds, f64; its base is a linear of zeros, which its forward only calls."""
    from peft import LoraConfig
    from peft.tuners.lora.gptq import GPTQLoraLinear

    config = LoraConfig(r=R, lora_alpha=ALPHA, use_qalora=True, qalora_group_size=G)
    n, k = TARGETS[module]
    linear = torch.nn.Linear(k, n, bias=False)
    torch.nn.init.zeros_(linear.weight)
    layer = GPTQLoraLinear(linear, "default", config, r=R, lora_alpha=ALPHA)
    tensors = load_file(folder / "adapter_model.safetensors")
    with torch.no_grad():
        layer.lora_A["default"].weight.copy_(tensors[f"base_model.model.{module}.lora_A.weight"])
        layer.lora_B["default"].weight.copy_(tensors[f"base_model.model.{module}.lora_B.weight"])
        out: torch.Tensor = layer.double()(x)
    return out


def pooled_delta(folder: Path, module: str, x: torch.Tensor, pool: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    tensors = {k: v.double() for k, v in load_file(folder / "adapter_model.safetensors").items()}
    a, b = (tensors[f"base_model.model.{module}.lora_{part}.weight"] for part in "AB")
    return ALPHA / R * pool(x) @ a.T @ b.T


mean = torch.nn.AvgPool1d(G)
CONVENTIONS: dict[str, Callable[[Path, str, torch.Tensor], torch.Tensor]] = {
    "peft": peft_delta,
    "repo": lambda folder, module, x: pooled_delta(folder, module, x, mean),
    "paper": lambda folder, module, x: pooled_delta(folder, module, x, lambda x: mean(x) * G),
    "sum": lambda folder, module, x: pooled_delta(folder, module, x, lambda x: x.unflatten(-1, (-1, G)).sum(-1)),
}


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_each_convention_is_the_forward_of_who_trained_by_it_attached_and_merged(convention: str, tmp_path: Path) -> None:
    config = {"use_qalora": True, "qalora_group_size": G} if convention == "peft" else {}
    folder = adapter(tmp_path / "adapter", **config)
    m = model(tmp_path, folder, pooling=None if convention == "peft" else convention)
    for module, (_, k) in TARGETS.items():
        x = X[:, :k]
        want = CONVENTIONS[convention](folder, module, x)
        assert want.norm() > 1e-3 * x.norm()
        assert (m.delta(module, x) - want).norm() <= 1e-12 * want.norm()  # f64
        before, after = m.weights(module)
        assert after.scheme.name == f"uint4o_g{G}_f16_f32"
        np.testing.assert_array_equal(after.codes, before.codes)
        np.testing.assert_array_equal(after.levels[0], before.levels[0])
        base = x @ torch.from_numpy(before.dequantize()).double().T
        got = x @ torch.from_numpy(after.dequantize()).double().T
        assert (got - base - want).norm() <= 1e-6 * (base + want).norm()  # offsets are f32


def test_pefts_rule_is_not_the_repositorys(tmp_path: Path) -> None:
    """A PEFT adapter merged as qa-lora's merge.py does: another model, 96/32 = 3 times less."""
    folder = adapter(tmp_path / "adapter", use_qalora=True, qalora_group_size=G)
    module, x = "model.layers.1.mlp.down_proj", X
    torch.testing.assert_close(CONVENTIONS["repo"](folder, module, x) * 3, peft_delta(folder, module, x), rtol=1e-9, atol=0)


def elastic(folder: Path, module: str, x: torch.Tensor, g: int) -> torch.Tensor:
    """IR-QLoRA's forward, connections included."""
    tensors = {k: v.double() for k, v in load_file(folder / "adapter_model.safetensors").items()}
    stem = f"base_model.model.{module}."
    a, b, sa, sb = (tensors[stem + n] for n in ("lora_A.weight", "lora_B.weight", *ELASTIC))
    h = torch.nn.AvgPool1d(g)(x) * g @ a.T + sa * x.reshape(len(x), R, -1).mean(-1)
    return ALPHA / R * ((h @ b.T).reshape(len(x), R, -1) + sb * h[..., None]).reshape(len(x), -1)


def test_ir_qloras_elastic_connections_are_one_pooled_adapter(tmp_path: Path) -> None:
    scales = {"lora_default_A_scale": torch.tensor([0.7]), "lora_default_B_scale": torch.tensor([-0.2])}
    m = model(tmp_path, adapter(tmp_path / "adapter", group=8, more=scales), Kind(sym=False, group=16))
    for module, (_, k) in TARGETS.items():
        want = elastic(tmp_path / "adapter", module, X[:, :k], 8)
        assert (m.delta(module, X[:, :k]) - want).norm() <= 1e-12 * want.norm()
    broken = adapter(tmp_path / "broken", group=8, more={"lora_default_A_scale": torch.tensor([0.7])})
    with pytest.raises(AdapterError, match="its partner of .* is missing"):
        model(tmp_path / "b", broken)


# where it may go -----------------------------------------------------------------------------------

BOUNDS = {"f16": 4e-3, "f32": 1e-6}  # of weights, relative: offsets rounded to f16 measured 6e-4


@pytest.mark.parametrize(
    ("to", "options", "row", "bound"),
    [
        ("gguf", {"quant": "Q4_1", "pure": True}, "uint4o_g32_f16_f32 -> q4_1", BOUNDS["f16"]),
        ("gguf", {"quant": "Q5_1", "pure": True}, "uint4o_g32_f16_f32 -> q5_1", BOUNDS["f16"]),
        ("onnx", {"bits": 4, "zero_point": "float"}, "uint4o_g32_f16_f32 -> uint4f_g32", BOUNDS["f32"]),
        ("onnx", {"bits": 4}, "uint4o_g32_f16_f32 -> uint4f_g32", BOUNDS["f32"]),
        ("safetensors", {"quant": "mlx-4bit"}, "uint4o_g32_f16_f32 -> uint4o_g32", 1e-6),
        ("safetensors", {"quant": "torchao-int4"}, "uint4o_g32_f16_f32 -> int4o_g32", 1e-6),
        ("safetensors", {"quant": "hqq"}, "uint4o_g32_f16_f32 -> uint4f_g32", 1e-6),
    ],
)
def test_targets_that_keep_offsets_get_the_adapter_and_the_codes(
    to: str, options: dict[str, Any], row: str, bound: float, tmp_path: Path
) -> None:
    pytest.importorskip("onnx")
    folder = adapter(tmp_path / "adapter", use_qalora=True, qalora_group_size=G)
    gptq = base(tmp_path, Kind(sym=False))
    result = convert(f"{gptq}+{folder}", to=to, output=tmp_path / "out.gguf", threads=1, **options)
    rows = [r for r in result.report.checks if row in r.what]
    assert rows, [r.what for r in result.report.checks]
    assert all(r.what.startswith("codes moved") and r.value is not None and r.value <= bound for r in rows), rows
    assert not [r for r in result.report.checks if r.verdict == "fail"]
    assert any("adapter in their offsets: uint4_g32_f16 of" in note for note in result.report.notes)


@pytest.mark.parametrize(
    ("to", "options"),
    [("gguf", {"quant": "Q4_K_M"}), ("gguf", {"quant": "Q4_0"}), ("onnx", {"bits": 4, "zero_point": "int"}),
     ("safetensors", {"quant": "gptq-asym"}), ("safetensors", {"quant": "awq"})],
)  # fmt: skip
def test_integer_zero_points_are_refused_and_rounded_where_the_user_insists(
    to: str, options: dict[str, Any], tmp_path: Path
) -> None:
    pytest.importorskip("onnx")
    folder = adapter(tmp_path / "adapter", use_qalora=True, qalora_group_size=G)
    model = f"{base(tmp_path, Kind(sym=False))}+{folder}"
    with pytest.raises(UnsupportedError, match=r"first model.layers.0.self_attn.q_proj.weight: \(ii\) .* keeps no offset") as e:
        convert(model, to=to, output=tmp_path / "out", dry_run=True, **options)
    assert e.value.hint is not None and "--quant Q4_1" in e.value.hint and "--allow-lossy" in e.value.hint
    result = convert(model, to=to, output=tmp_path / "out", threads=1, allow_lossy=True, **options)
    assert any("rounded a second time" in note for note in result.report.notes)
    again = [r.value for r in result.report.checks if r.what.startswith("rounded again") and "_f32 ->" in r.what]
    assert again and max(v for v in again if v is not None) > 1e-3  # what it costs, measured
    assert any(r.what == "price of the bits" and r.metric == "mean KL" for r in result.report.checks)


@pytest.mark.parametrize(
    ("kind", "group", "why"),
    [(Kind(sym=False, group=32), 16, r"\(i\) the adapter pools 16 inputs, the weight has groups of 32"),
     (Kind(sym=False, desc_act=True), 32, r"\(iii\) columns are in groups by their importance")],
)  # fmt: skip
def test_what_makes_a_merge_inexact_is_named(kind: Kind, group: int, why: str, tmp_path: Path) -> None:
    folder = adapter(tmp_path / "adapter", group, use_qalora=True, qalora_group_size=group)
    gptq = base(tmp_path, kind)
    with pytest.raises(UnsupportedError, match=why):
        convert(f"{gptq}+{folder}", to="gguf", quant="Q4_1", output=tmp_path / "out", dry_run=True)
    assert convert(f"{gptq}+{folder}", to="gguf", quant="F16", output=tmp_path / "f16", dry_run=True)  # real numbers hold it


@pytest.mark.parametrize(
    ("config", "kind", "message"),
    [({"use_dora": True}, UnsupportedError, r"\(iv\)"), ({"lora_bias": True}, UnsupportedError, r"\(iv\)"),
     ({"qalora_group_size": 16}, AdapterError, "does not fit"), ({"qalora_group_size": "x"}, AdapterError, "whole number")],
)  # fmt: skip
def test_configs_that_pooling_does_not_go_with(
    config: dict[str, Any], kind: type[QConvertError], message: str, tmp_path: Path
) -> None:
    folder = adapter(tmp_path / "adapter", **{"use_qalora": True, "qalora_group_size": G} | config)
    with pytest.raises(kind, match=message):
        model(tmp_path, folder)


def test_an_adapter_that_does_not_say_how_it_pools_asks(tmp_path: Path) -> None:
    folder = adapter(tmp_path / "adapter")
    with pytest.raises(AdapterError, match="2 columns for 64 inputs, 32 each: this is QA-LoRA") as e:
        model(tmp_path / "a", folder)
    assert e.value.hint is not None and "--pooling peft or repo or paper or sum" in e.value.hint
    own = adapter(tmp_path / "own", use_qalora=True, qalora_group_size=G)
    with pytest.raises(UsageError, match="use_qalora, which is PEFT's own"):
        model(tmp_path / "b", own, pooling="repo")


def test_ops_of_pooling_check_their_shapes() -> None:
    w, a, b = Type("q4_1", (8, 64)), Type("f32", (2, 2)), Type("f32", (8, 2))
    assert infer("merge_pooled", (w, a, b), scale=1.0, group=32) == Type("uint4o_g32_f16_f32", (8, 64))
    assert infer("merge_pooled", (w, a, b), scale=1.0, group=32, why="x") == Type("f32", (8, 64))
    for group in (16, 64):
        with pytest.raises(QConvertError, match="do not fit"):
            infer("merge_pooled", (w, a, b), scale=1.0, group=group)
    assert infer("group_sums", (Type("f32", ("B", "T", 64)),), group=32) == Type("f32", ("B", "T", 2))
    with pytest.raises(QConvertError, match="do not divide"):
        infer("group_sums", (Type("f32", ("B", "T", 60)),), group=32)
    assert OPS["merge_pooled"].constant and not OPS["group_sums"].constant
