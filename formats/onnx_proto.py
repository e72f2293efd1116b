"""An ONNX model as it is put together: nodes with names, constants inline, weights by their place in the data file.

Opset and IR are the form's: the onnx package's own defaults are newer than any runtime.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from onnx import FunctionProto, GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

from qconvert import __version__
from qconvert.formats.onnx_arch import Form
from qconvert.scheme import Array

CONTRIB = "com.microsoft"
DATA_FILE = "model.onnx.data"
DTYPES = {"f32": TensorProto.FLOAT, "f16": TensorProto.FLOAT16, "u8": TensorProto.UINT8, "i64": TensorProto.INT64,
          "i32": TensorProto.INT32, "bool": TensorProto.BOOL, "i8": TensorProto.INT8, "u4": TensorProto.UINT4,
          "i4": TensorProto.INT4, "u2": 25, "i2": 26}  # fmt: skip
Shape = Sequence[int | str]


@dataclass
class Model:
    nodes: list[NodeProto] = field(default_factory=list)
    initializers: dict[str, TensorProto] = field(default_factory=dict)
    inputs: list[ValueInfoProto] = field(default_factory=list)
    outputs: list[ValueInfoProto] = field(default_factory=list)
    values: list[ValueInfoProto] = field(default_factory=list)
    _paths: set[str] = field(default_factory=set)

    def node(self, op: str, path: str, inputs: Sequence[str], outputs: Sequence[str], domain: str = "", **attrs: Any) -> None:
        """path: the module it belongs to, by which viewers group; no two nodes get one name."""
        name, n = f"/{path.replace('.', '/')}/{op}", 1
        while name in self._paths:
            n += 1
            name = f"{name.rpartition('_')[0] if n > 2 else name}_{n}"
        self._paths.add(name)
        self.nodes.append(helper.make_node(op, list(inputs), list(outputs), name=name, domain=domain, **attrs))

    def constant(self, values: Array) -> str:
        """A small array inside the model file, once however often it is used."""
        listed = values.reshape(-1).tolist()
        spelled = "_".join(map(str, listed)) if len(listed) < 5 else hashlib.sha256(values.tobytes()).hexdigest()[:12]
        name = f"const.{values.dtype}.{values.ndim}d.{spelled}"
        self.initializers[name] = numpy_helper.from_array(values, name)
        return name

    def external(self, name: str, dtype: str, dims: Sequence[int], offset: int, nbytes: int) -> None:
        """A tensor whose bytes lie in the data file; several may share a place."""
        tensor = TensorProto(name=name, data_type=DTYPES[dtype], dims=dims, data_location=TensorProto.EXTERNAL)
        for key, value in (("location", DATA_FILE), ("offset", offset), ("length", nbytes)):
            tensor.external_data.add(key=key, value=str(value))
        self.initializers[name] = tensor

    def empty(self, name: str, dtype: str, dims: Sequence[int]) -> None:
        """A tensor without elements."""
        self.initializers[name] = TensorProto(name=name, data_type=DTYPES[dtype], dims=dims)

    def value(self, name: str, dtype: str, shape: Shape) -> str:
        """Declare what an edge is; returns its name."""
        self.values.append(info(name, dtype, shape))
        return name

    def serialized(self, name: str, metadata: Mapping[str, str], form: Form, functions: Sequence[FunctionProto] = ()) -> bytes:
        graph = helper.make_graph(self.nodes, name, self.inputs, self.outputs, list(self.initializers.values()))
        graph.value_info.extend(self.values)
        domains = sorted({node.domain for node in self.nodes} - {""})
        opsets = [helper.make_opsetid("", form.opset), *(helper.make_opsetid(domain, 1) for domain in domains)]
        model: ModelProto = helper.make_model(
            graph, opset_imports=opsets, ir_version=form.ir_version, functions=list(functions)
        )
        model.producer_name, model.producer_version = "qconvert", __version__
        helper.set_model_props(model, dict(metadata))
        data: bytes = model.SerializeToString(deterministic=True)
        return data


def info(name: str, dtype: str, shape: Shape) -> ValueInfoProto:
    return helper.make_tensor_value_info(name, DTYPES[dtype], list(shape))


def i64(*values: int) -> Array:
    return np.array(values, np.int64)


def types_of(model: Model) -> dict[str, str]:
    """The type of each value as schemas spell it: tensor(float)."""
    numbers = {name: tensor.data_type for name, tensor in model.initializers.items()}
    numbers |= {v.name: v.type.tensor_type.elem_type for v in (*model.inputs, *model.values, *model.outputs)}
    return {name: f"tensor({TensorProto.DataType.Name(number).lower()})" for name, number in numbers.items()}


def bits_of(data_type: int) -> int:
    """Of one value of a type of TensorProto."""
    name = TensorProto.DataType.Name(data_type)
    if name in ("FLOAT", "DOUBLE"):
        return 32 if name == "FLOAT" else 64
    return int(re.sub(r"E.*|\D", "", name) or 8)


def subgraphs(node: NodeProto) -> Iterator[GraphProto]:
    for a in node.attribute:
        if a.HasField("g"):
            yield a.g
        yield from a.graphs


def graphs_of(graph: GraphProto) -> Iterator[GraphProto]:
    """The graph and all within it."""
    yield graph
    for node in graph.node:
        for inner in subgraphs(node):
            yield from graphs_of(inner)
