"""fold: input channels that matter are made larger before their weights are quantized; what makes the channels divides them.

site:   a norm, a v or an up projection, and every linear that reads what it makes
scales: f32[K] for each site, of the statistic and the weights (awq, smooth), fitted to what the norm can hold
graph:  weights read scaled columns, norms and rows are divided, statistics are of the divided activations
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar, NamedTuple, cast

from qconvert.errors import UsageError
from qconvert.graph import Attr, Graph, Node, Type
from qconvert.scheme import scheme_of

STATISTICS = {"awq": "moments", "smooth": "peaks"}
STATISTICS_OF_X = ("moments", "hessian", "peaks")
SPREAD_OF_X = ("histogram", "extremes")  # of all channels as one: that of x / s cannot be told from that of x


class Site(NamedTuple):
    """Linears that read activation x, and the parameters that its features can be divided in: a norm's, or rows of a linear.

    times: so many heads of x in a row are one of the maker's, of head_dim features.
    """

    x: str
    weights: tuple[str, ...]
    divided: tuple[str, ...]
    norm: bool
    times: int = 1
    head_dim: int = 1


@dataclass(frozen=True)
class Fold:
    """method: awq (a power of the activations' size, searched for least error) or smooth (by greatest magnitudes).

    types: weight -> what it will be quantized to, as Quantize has them; solver: that the search for scales tries them with.
    """

    name: ClassVar[str] = "fold"
    method: str = "awq"
    alpha: float = 0.5
    solver: str = "mse"
    types: Mapping[str, str] = field(default_factory=dict, repr=False)

    def __call__(self, graph: Graph) -> Graph:
        if self.method not in STATISTICS:
            raise UsageError(f"fold: no method {self.method!r}", hint=f"methods: {', '.join(STATISTICS)}")
        nodes = dict(graph.nodes)
        for site in sites(graph, self.types):
            self.folded(nodes, site)
        return replace(graph, nodes=nodes).sorted()

    def folded(self, nodes: dict[str, Node], site: Site) -> None:
        """Rewrite the weights of one site. One whose activations were not seen stays as it is."""
        kind = STATISTICS[self.method]
        seen = f"{site.weights[0]}~{kind}"
        if seen not in nodes:
            return
        k = nodes[site.weights[0]].type.dims[-1]
        scales, one = f"{site.x}~fold", Type("f32", (k // site.times,))
        heads: dict[str, Attr] = {"times": site.times, "head_dim": site.head_dim} if site.times > 1 else {}
        how: dict[str, Attr] = {"alpha": self.alpha}
        if self.method == "awq":
            how = {"dtypes": [self.types[w] for w in site.weights], "solver": self.solver}
        found = scales
        if site.norm and self.types.get(site.divided[0], "f32") != "f32":
            found = f"{scales}~found"
            held: dict[str, Attr] = {"dtype": self.types[site.divided[0]]}
            nodes[scales] = Node("held_scales", (found, f"{site.divided[0]}~unfolded"), one, held)
        before = tuple(f"{w}~unfolded" for w in site.weights)
        nodes[found] = Node(f"{self.method}_scales", (f"{seen}~unfolded", *before), one, {**how, **heads})
        for weight in site.weights:
            for statistic in STATISTICS_OF_X:
                if (old := nodes.get(name := f"{weight}~{statistic}")) is not None:
                    nodes[f"{name}~unfolded"] = old
                    nodes[name] = Node("folded_statistic", (f"{name}~unfolded", scales), old.type, {"of": statistic, **heads})
            for spread in SPREAD_OF_X:
                nodes.pop(f"{weight}~{spread}", None)
            _replace(nodes, weight, "scale_columns", scales, heads)
        for parameter in site.divided:
            _replace(nodes, parameter, "divide_rows", scales, {})


def _replace(nodes: dict[str, Node], name: str, op: str, scales: str, heads: Mapping[str, Attr]) -> None:
    old, unfolded = nodes[name], f"{name}~unfolded"
    kind = Type("f32", old.type.shape)
    if unfolded in nodes:  # folded at its other side already
        nodes[f"{name}~folded"], source = old, f"{name}~folded"
    else:
        nodes[unfolded], source = old, unfolded
    nodes[name] = Node(op, (source, scales), kind, heads)


def sites(graph: Graph, types: Mapping[str, str]) -> Iterator[Site]:
    """Where features can be scaled without a change to what the model computes, and all that read them are quantized."""
    users = graph.users()

    def n_readers(name: str) -> int:
        return sum(not u.startswith(f"{name}~") for u in users[name])

    def is_real(name: str) -> bool:
        """Not the codes of a source, which are carried over as they are."""
        return scheme_of(graph.nodes[name].type.dtype) is None

    for x, node in graph.nodes.items():
        readers = [graph.nodes[u] for u in users[x]]
        if x in graph.outputs or not readers or any(r.op != "linear" or r.inputs[0] != x for r in readers):
            continue
        weights = tuple(r.inputs[1] for r in readers)
        if any(scheme_of(types.get(w, "f32")) is None for w in weights):
            continue
        made = _maker(graph, users, node, int(graph.nodes[weights[0]].type.dims[-1]))
        if made is not None and all(n_readers(p) == 1 and is_real(p) for p in (*weights, *made.divided)):
            yield made._replace(x=x, weights=weights)


def _maker(graph: Graph, users: Mapping[str, list[str]], node: Node, k: int) -> Site | None:
    """What can be divided of the node that makes the features; None where nothing can."""
    if node.op in ("rms_norm", "layer_norm"):
        divided = node.inputs[1:]
        return Site("", (), divided, True) if graph.nodes[divided[0]].type.dims == (k,) else None
    times = head_dim = 1
    if node.op == "mul":
        linear = next((i for i in node.inputs[::-1] if graph.nodes[i].op == "linear"), None)
    elif node.op == "attention":
        linear = node.inputs[2]
        heads, kv_heads = (cast(int, node.attrs[a]) for a in ("heads", "kv_heads"))
        times, head_dim = heads // kv_heads, k // heads
    else:
        return None
    if linear is None or graph.nodes[linear].op != "linear" or len(users[linear]) > 1:
        return None
    return Site("", (), graph.nodes[linear].inputs[1:], False, times, head_dim)
