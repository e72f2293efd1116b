"""A graph as an ONNX file of one form: onnxruntime's nodes with their bodies, standard nodes alone, or the older opset."""

from __future__ import annotations

from collections.abc import Mapping

from qconvert.formats import onnx_contrib, onnx_encoder, onnx_standard
from qconvert.formats.onnx_arch import Form, is_encoder
from qconvert.formats.onnx_functions import with_bodies
from qconvert.formats.onnx_int8 import with_integers
from qconvert.formats.onnx_lowering import Lowering
from qconvert.formats.onnx_proto import Model
from qconvert.graph import Graph


def serialized(
    graph: Graph,
    model: Model,
    form: Form,
    context: int,
    accuracy_level: int,
    name: str,
    metadata: Mapping[str, str],
    in_browsers: bool = False,
) -> bytes:
    """`model` has the weights' places; what it computes is added here."""
    ops = onnx_contrib.OPS if form.contrib else onnx_standard.OPS
    if in_browsers:  # the onnxruntime-web in transformers.js has no GatherBlockQuantized but on WebGPU
        ops = {**ops, "embed": onnx_standard.embed}
    if is_encoder(graph):
        graph, ops = onnx_encoder.named(graph), {**ops, **onnx_encoder.OPS}
    Lowering(graph, model, form, context, accuracy_level).run(with_integers(ops))
    functions = with_bodies(model) if form.bodies else ()
    return model.serialized(name, {**metadata, "qconvert.form": form.name, "qconvert.runs_in": form.runs_in}, form, functions)
