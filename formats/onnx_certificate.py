"""An ONNX folder's certificate: one of the model's metadata_props; its tensors by its own protobuf; onnxruntime asked again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from qconvert.certificate import KEY, Answers, Expected, Located
from qconvert.emit import FilePlan
from qconvert.errors import InputError, uninterrupted
from qconvert.sources import inside
from qconvert.target import Lowered
from qconvert.weights import Weights

METADATA_PROPS = 14  # of ModelProto; a field that may be repeated, anywhere


class Certifier:
    quoted = False

    def header(self, file: FilePlan, key: str, value: bytes) -> bytes:
        """The protobuf with one more property behind all else."""
        from onnx import StringStringEntryProto

        from qconvert.formats.onnx_foreign_tensors import varint

        body: bytes = StringStringEntryProto(key=key, value=value.decode()).SerializeToString()
        return file.header + varint(METADATA_PROPS << 3 | 2) + varint(len(body)) + body

    def certificate(self, found: Path) -> tuple[Path, str] | None:
        from qconvert.formats.onnx_inspect import read_proto

        text = next((p.value for p in read_proto(found).metadata_props if p.key == KEY), None)
        return None if text is None else (found, text)

    def files(self, first: Path, names: Sequence[str]) -> list[Path]:
        """Beside the model, which may itself lie in a folder of the output."""
        depth = len(Path(names[0]).parts)
        if not 0 < depth <= len(first.parents):
            raise InputError(f"{first} does not lie in {names[0]!a}, as its certificate says")
        root = first.parents[depth - 1]
        return [first, *(inside(root, name) for name in names[1:])]

    def located(self, files: Sequence[Path]) -> list[Located]:
        """Initializers of a thousand bytes or more; of several that are one place, the first."""
        from qconvert.formats.onnx_foreign_tensors import dtype_of, place_of, read
        from qconvert.formats.onnx_proto import graphs_of

        model, found = files[0], dict[tuple[str, int], Located]()
        for tensor in (t for graph in graphs_of(read(model).graph) for t in graph.initializer):
            place = place_of(model, tensor)
            if place.file:
                kind = f"{dtype_of(tensor)}{list(tensor.dims)}"
                each = Located(tensor.name, model.parent / place.file, place.offset, place.nbytes, kind)
                found.setdefault((place.file, place.offset), each)
        return list(found.values())

    def facts(self, file: Path) -> Mapping[str, object]:
        from qconvert.formats.onnx_inspect import all_graphs, metadata_of, read_proto

        model = read_proto(file)
        return metadata_of(model, [node for graph in all_graphs(model.graph) for node in graph.node])

    def expected(self, lowered: Lowered, weights: Weights, files: Sequence[Path], prompts: list[list[int]]) -> Expected:
        """The graph over its quantized weights, activations left in f32."""
        with uninterrupted():
            from qconvert.run import run  # loads torch
        (logits,) = run(lowered.graph, weights, prompts).values()
        return Expected("runtime onnxruntime", "relative", [x.numpy() for x in logits])

    def answers(self, found: Path, prompts: list[list[int]], threads: int) -> list[Answers]:
        """With activations in f32, whatever level the file asks for: what rounds them falls the other way now and then."""
        from qconvert.formats.onnx_runtime import OnnxRuntime

        runtime, what = OnnxRuntime(), "runtime onnxruntime"
        if reason := runtime.missing():
            return [Answers(what, None, reason)]
        model = runtime.open(found, max(map(len, prompts)), threads, exact=True)
        try:
            logits = [model.logits(p) for p in prompts]
        finally:
            model.close()
        return [Answers(what, logits, about={"name": runtime.name, "version": runtime.version()})]
