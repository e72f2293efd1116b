"""GPTQ and AWQ folders against the libraries that own the layouts: they give our values, and pack them to our bytes.

GPTQMODEL_PYTHON and AUTOAWQ_PYTHON name Pythons that have gptqmodel and autoawq, which want versions of their own
of what we use (see tools/bench_export.py).
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qconvert import convert

pytestmark = pytest.mark.peer
TINY = Path(__file__).parents[1] / "golden" / "tiny"
# of each module its weight as it is dequantized there, and all tensors as they are packed there from that weight
EACH = """
import sys
import torch
from safetensors.torch import load_file, save_file
tensors, values, packed = load_file(sys.argv[1] + "/model.safetensors"), {}, {}
for module in [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]:
    t = {name.removeprefix(module + "."): v for name, v in tensors.items() if name.startswith(module + ".")}
    linear = torch.nn.Linear(len(t["g_idx"]) if "g_idx" in t else len(t["qweight"]), t["scales"].shape[1], bias=False)
    group = linear.in_features // len(t["scales"])
    value, made = through(linear, group, t)
    values[module + ".weight"] = value.T.contiguous()
    packed |= {module + "." + name: getattr(made, name).contiguous() for name in t}
save_file(values, sys.argv[2])
save_file(packed, sys.argv[3])
"""
GPTQMODEL = """
from gptqmodel.nn_modules.qlinear.torch import TorchLinear
from gptqmodel.quantization import QuantizeConfig
from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module, convert_gptq_v2_to_v1_format_module
def empty(linear, group):
    return TorchLinear(bits=4, group_size=group, sym=True, desc_act=False, in_features=linear.in_features,
                       out_features=linear.out_features, bias=False, pack_dtype=torch.int32, register_buffers=True)
def through(linear, group, t):
    read, made = empty(linear, group), empty(linear, group)
    for name, value in t.items():
        getattr(read, name).copy_(value)
    if V1:
        convert_gptq_v1_to_v2_format_module(read, bits=4, pack_dtype=torch.int32)
    read.qzero_format(2)
    read.post_init()
    value = read.dequantize_weight()
    linear.weight.data = value.T.float()
    zeros = (read.qzeros[:, :, None] >> torch.arange(0, 32, 4) & 15).reshape(read.scales.shape)
    made.pack(linear, t["scales"].T.float(), zeros.T.float(), t["g_idx"])
    if V1:
        convert_gptq_v2_to_v1_format_module(made, QuantizeConfig(bits=4, group_size=group))
    return value, made
"""
AUTOAWQ = """
from awq.modules.linear.gemm import WQLinear_GEMM
from awq.utils.packing_utils import dequantize_gemm, reverse_awq_order, unpack_awq
def through(linear, group, t):
    value = dequantize_gemm(t["qweight"], t["qzeros"], t["scales"], 4, group)
    linear.weight.data = value.T.float()
    zeros = reverse_awq_order(*unpack_awq(t["qweight"], t["qzeros"], 4), 4)[1] & 15
    return value, WQLinear_GEMM.from_linear(linear, 4, group, scales=t["scales"].float(), zeros=zeros.float())
"""


@pytest.mark.parametrize(
    ("quant", "variable", "code"),
    [
        ("gptq", "GPTQMODEL_PYTHON", f"V1 = True\n{GPTQMODEL}"), ("gptq-asym", "GPTQMODEL_PYTHON", f"V1 = True\n{GPTQMODEL}"),
        ("gptq-v2-asym", "GPTQMODEL_PYTHON", f"V1 = False\n{GPTQMODEL}"), ("awq", "AUTOAWQ_PYTHON", AUTOAWQ),
    ],
)  # fmt: skip
def test_the_library_that_owns_the_layout_packs_the_same_bytes(quant: str, variable: str, code: str, tmp_path: Path) -> None:
    if (python := os.environ.get(variable)) is None:
        pytest.skip(f"{variable} names no Python that has the library")
    ours, values, packed = tmp_path / "ours", tmp_path / "values.safetensors", tmp_path / "packed.safetensors"
    convert(TINY, to="safetensors", quant=quant, output=ours, check=False)
    convert(ours, to="safetensors", quant="fp32", output=tmp_path / "plain", check=False)
    run = [python, "-c", f"import torch\n{code}\n{EACH}", str(ours), str(values), str(packed)]
    done = subprocess.run(run, capture_output=True, text=True, cwd=tmp_path, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    theirs, mine = load_file(values), load_file(tmp_path / "plain" / "model.safetensors")
    assert len(theirs) == 21 and all(torch.equal(v, mine[name].half()) for name, v in theirs.items())
    written = load_file(ours / "model.safetensors")
    again = load_file(packed)
    assert len(again) >= 3 * 21
    for name, tensor in again.items():
        assert torch.equal(tensor, written[name]), name
