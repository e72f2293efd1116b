"""A safetensors folder's certificate: in the __metadata__ of its first file; its tensors by their headers; its runtime."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from qconvert.byte_files import LocalFile
from qconvert.certificate import KEY, Answers, Expected, Located
from qconvert.errors import InputError, VerificationError, uninterrupted
from qconvert.placement import ALIGNMENT as ARENA
from qconvert.plans import FilePlan
from qconvert.reals import Reals
from qconvert.report import Row
from qconvert.safetensors_header import read_metadata
from qconvert.scheme import Array
from qconvert.sources import Store, inside, read_checkpoint
from qconvert.target import Lowered
from qconvert.tensor_files import SafetensorsFile
from qconvert.weights import Weights

ALIGNMENT = 64


class Certifier:
    quoted = True

    def header(self, file: FilePlan, key: str, value: bytes) -> bytes:
        """With one more string in __metadata__; as aligned as it was."""
        table = json.loads(file.header[8:])
        table["__metadata__"] = {**table.get("__metadata__", {}), key: value.decode()}
        text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-(8 + len(text)) % (ALIGNMENT if len(file.header) % ARENA else ARENA))
        return len(text).to_bytes(8, "little") + text

    def certificate(self, found: Path) -> tuple[Path, str] | None:
        for path in sorted(found.glob("*.safetensors")):
            if (text := read_metadata(path).get(KEY)) is not None:
                return path, text
        return None

    def files(self, first: Path, names: Sequence[str]) -> list[Path]:
        return [first, *(inside(first.parent, name) for name in names[1:])]

    def located(self, files: Sequence[Path]) -> list[Located]:
        """Those of an adapter, by its folder: of two adapters they have the same names."""
        found = []
        for path in (p for p in files if p.suffix == ".safetensors"):
            at = "" if path.parent == files[0].parent else f"{path.parent.name}/"
            file = SafetensorsFile(LocalFile(path))
            file.close()
            found += [Located(at + n, path, e.begin, e.nbytes, f"{e.dtype}{list(e.shape)}") for n, e in file.entries.items()]
        return found

    def facts(self, file: Path) -> Mapping[str, object]:
        return read_metadata(file)

    def expected(self, lowered: Lowered, weights: Weights, files: Sequence[Path], prompts: list[list[int]]) -> Expected:
        """The graph with the weights that its runtime makes of the written ones as it loads them."""
        with uninterrupted():
            from qconvert.formats.safetensors_check import as_loaded
            from qconvert.formats.safetensors_written import written
            from qconvert.run import run
        graph, options = lowered.graph, lowered.options
        facts = written(graph, options.wanted)
        loading = options.dialect.loading(facts)
        reals = as_loaded(graph, loading, facts, weights)
        (logits,) = run(graph, reals, prompts, round_input=loading.round_input).values()
        return Expected(loading.kind, "relative", [x.numpy() for x in logits])

    def answers(self, found: Path, prompts: list[list[int]], threads: int) -> list[Answers]:
        """Of its runtime, and where that is not here of the reference evaluator. VerificationError where it does not load."""
        with uninterrupted():
            from qconvert import check
            from qconvert.build import build
            from qconvert.companions import n_vocab
            from qconvert.formats import safetensors_check as checks
            from qconvert.formats.safetensors_dialects import dialect_of
            from qconvert.formats.safetensors_verify import dense_dtype, name_of, written_in
            from qconvert.run import run
            from qconvert.stored_forms import method_of
        store, got = Store(), list[Array]()
        try:
            checkpoint = read_checkpoint(found, store)
            graph = build(checkpoint)
            weights, facts = Weights(graph, store), written_in(graph, dense_dtype(checkpoint.config))
            if (worst := max(map(max, prompts))) >= n_vocab(graph):
                raise InputError(f"{found}: its probes have the token {worst}, of {n_vocab(graph)}")
            named, method = self.certificate(found), method_of(checkpoint.config)
            quant = read_metadata(named[0]).get("qconvert.quant") if named else None
            loading = dialect_of(quant or name_of(method[0] if method else None, facts)).loading(facts)

            def answer(model: checks.Answering, _: Reals) -> list[Row]:
                got.extend(model.logits(p) for p in prompts)
                return [Row("", "", None, None, "info")]

            what = f"runtime {loading.runtime}"
            with check.torch_threads(threads):
                (row, *_), about = checks.answered(found, graph, loading, facts, weights, answer)
                if row.verdict == "fail":
                    raise VerificationError(f"{found}: {what} does not load it: {row.reason}")
                if got:
                    return [Answers(what, got, about=about)]
                reals = checks.as_loaded(graph, loading, facts, weights)
                (logits,) = run(graph, reals, prompts, round_input=loading.round_input).values()
            return [Answers(what, None, row.reason), Answers("interpreted", [x.numpy() for x in logits])]
        finally:
            store.close()
