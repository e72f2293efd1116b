"""Mixtures of experts: a tensor for each matrix of each expert, and which dialects' mixtures nothing loads rightly."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from qconvert.errors import UnsupportedError
from qconvert.formats.safetensors_dialects import Dialect, Wanted, Written
from qconvert.formats.safetensors_names import family_of
from qconvert.graph import STATISTICS, Graph, Node, Type
from qconvert.ops import infer
from qconvert.scheme import scheme_of
from qconvert.transcoded import stored_dtype

# quant_method -> why transformers does not run a mixture of it; None: it does, but for what `not_run` knows
METHODS: Mapping[str, str | None] = {
    "compressed-tensors": None,
    "fp8": None,
    "gptq": "transformers 5.23 leaves the experts of GPTQ mixtures random, in silence; vLLM reads them",
    "awq": "transformers 5.23 leaves the experts of AWQ mixtures random, in silence; vLLM reads them",
}


def expert_stacks(graph: Graph) -> set[str]:
    """Weights [E,N,K] of all experts."""
    return {i for node in graph.nodes.values() if node.op == "experts" for i in node.inputs[2:]}


def expert_matrices(graph: Graph) -> set[str]:
    """Their matrices, once SplitExperts ran."""
    return {i for name in expert_stacks(graph) if graph.nodes[name].attrs.get("apart") for i in graph.nodes[name].inputs}


@dataclass(frozen=True)
class SplitExperts:
    """Weights of all experts become stacks of matrices that are written apart, called as in checkpoints."""

    name: ClassVar[str] = "split-experts"

    def __call__(self, graph: Graph) -> Graph:
        family, weights = family_of(graph), expert_stacks(graph)

        def rule(name: str, node: Node) -> Mapping[str, Node] | None:
            if name not in weights:
                return None
            attrs, whole = graph.root(name).attrs, Type("f32", node.type.shape)
            module = family.module(str(attrs["role"]), int(str(attrs["layer"])))
            parts = tuple(f"{module.format(e=e)}.weight" for e in range(node.type.dims[0]))
            stack = {name: Node("stack", parts, whole, {"apart": True})}
            for kind in STATISTICS:
                if beside := graph.nodes.get(f"{name}{kind}"):
                    own = infer("expert", (beside.type,), e=0)
                    stack |= {f"{p}{kind}": Node("expert", (f"{name}{kind}",), own, {"e": e}) for e, p in enumerate(parts)}
            if node.op == "stack" and node.inputs == parts:
                return stack
            below = f"{name}~stacked"
            matrix = infer("expert", (node.type,), e=0)
            made = {part: Node("expert", (below,), matrix, {"e": e}) for e, part in enumerate(parts)}
            return {below: node, **made, **stack}

        return graph.rewrite(rule)


def refuse_mixture(graph: Graph, dialect: Dialect, wanted: Wanted) -> None:
    """UnsupportedError where no program is known to load a mixture in this dialect."""
    if not expert_stacks(graph) or not dialect.layouts or method_of(dialect.config(Written({}, (), wanted))) in METHODS:
        return
    raise UnsupportedError(f"--quant {dialect.name}: mixtures of experts are not written so", hint="--quant w4a16 or w8a16")


def method_of(config: Mapping[str, object]) -> str | None:
    found = config.get("quantization_config")
    return str(found["quant_method"]) if isinstance(found, dict) else None


def expert_scheme(graph: Graph, dialect: Dialect, wanted: Wanted) -> str | None:
    """One for all matrices, since loaders know one for all: codes that a source has, else of the largest group that divides
    all rows; None where they stay plain. UnsupportedError for zero points in compressed-tensors, which no loader of experts
    reads."""
    names = expert_matrices(graph)
    if not names or not dialect.layouts:
        return None
    facts = {(stored_dtype(graph, name), graph.nodes[name].type.dims) for name in names}
    if dialect.layouts == "ct":
        wanted = wanted._replace(any_kind=False)

    def carried(n: int, k: int, wanted: Wanted, stored: str) -> str | None:
        found = scheme_of(stored)
        return dialect.carrying(found, n, k, wanted) if found else None

    def alike(of: Callable[[int, int, Wanted, str], str | None]) -> str | None:
        found = [of(n, k, wanted, dtype) for dtype, (n, k) in facts]
        if None in found or len(set(found)) == 1:
            return found[0] if None not in found else None
        least = min(scheme.block for name in found if name and (scheme := scheme_of(name)))
        again = {of(n, k, wanted._replace(group=least), dtype) for dtype, (n, k) in facts}
        return again.pop() if len(again) == 1 else None

    chosen = alike(carried) or alike(lambda n, k, wanted, _: dialect.scheme(n, k, wanted))
    scheme = scheme_of(chosen or "")
    if dialect.layouts == "ct" and scheme is not None and scheme.zero_point != "none":
        raise UnsupportedError(
            f"--quant {dialect.name}: neither vLLM nor transformers runs experts with zero points in compressed-tensors",
            hint="--quant w4a16, or awq",
        )
    return chosen


def not_run(config: Mapping[str, Any], plain: bool) -> str | None:
    """Of a mixture's config.json: why transformers would not run it, or run it wrongly. plain: its experts are."""
    settings = config.get("quantization_config", {})
    if plain and settings.get("quant_method") == "compressed-tensors":
        return "transformers 5.23 loads no plain experts beside quantized weights; vLLM does, by the ignore list"
    if (reason := METHODS.get(settings.get("quant_method", ""))) is not None:
        return reason
    forms = {group.get("format") for group in settings.get("config_groups", {}).values()}
    if "nvfp4-pack-quantized" in forms:
        return "transformers 5.23 drops the global scales of NVFP4 experts, in silence; vLLM reads them"
    if "int-quantized" in forms:
        return "transformers 5.23 does not load experts of 8-bit integers; vLLM does"
    return None
