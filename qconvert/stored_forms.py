"""How checkpoints and files store a parameter otherwise than it is used, as nodes: GGUF's blocks, GPTQ's words.

    NAME~packed : gguf.q4_0[N,K] = load()              NAME~qweight, ~qzeros, ~scales, ~g_idx = load()
    NAME~pairs  : q4_0[N,K] = unpack(NAME~packed)      NAME~sorted : uint4_g128[N,K] = gptq(...)
    NAME        : q4_0[N,K] = unpermute_rope(...)      NAME        : f32[N,K] = unsort(NAME~sorted, NAME~order)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol, cast

from qconvert import registry
from qconvert.errors import InputError, UnsupportedError
from qconvert.families import Family
from qconvert.graph import Attr, Node, Type
from qconvert.ops import infer
from qconvert.scheme import GROUPS, Array, affine_name, scheme_of
from qconvert.sources import TensorInfo

Nodes = dict[str, Node]
BITS = (2, 3, 4, 8)
SAID_IN = ("quantization_config", "quantization", "quip_params")


class Tensors(NamedTuple):
    """A checkpoint's tensors as a form reads them. find: notes that it was read, InputError where there is none.

    read: the values of a small one, a scalar's as [1].
    """

    has: Callable[[str], bool]
    find: Callable[[str], TensorInfo]
    read: Callable[[TensorInfo], Array]

    def is_zero(self, info: TensorInfo) -> bool:
        return not self.read(info).any()


class StoredForm(Protocol):
    """How a quantized checkpoint stores its weights; an entry of the registry's table `stored`, by quant_method."""

    def parameter(self, name: str, shape: tuple[int, int], attrs: Mapping[str, Attr], tensors: Tensors) -> Nodes | None:
        """The nodes that make the weight `name` [N,K]; None where it is stored plain."""
        ...

    def unread(self, info: TensorInfo, tensors: Tensors) -> str | None:
        """Why a tensor that nothing reads holds nothing learned; None where it does."""
        ...


def method_of(config: Mapping[str, object]) -> tuple[str, dict[str, object]] | None:
    """quant_method and settings, where config.json says that the weights are quantized: under SAID_IN.

    MLX and quip-sharp name no method: "mlx", "quip".
    """
    found = next((config[key] for key in SAID_IN if config.get(key)), None)
    if not isinstance(found, dict):
        return None
    unnamed = "mlx" if "quantization" in config else "quip" if found is config.get("quip_params") else "?"
    return str(found.get("quant_method", unnamed)), found


def stored_form(config: Mapping[str, object], where: str) -> StoredForm | None:
    """None where the checkpoint is not quantized. UnsupportedError for what would be read wrongly."""
    if (method := method_of(config)) is None:
        return None
    read = cast(Callable[[Mapping[str, object], str], StoredForm], registry.find("stored", method[0]))
    return read(method[1], where)


def node(nodes: Mapping[str, Node], op: str, *inputs: str, **attrs: Attr) -> Node:
    return Node(op, inputs, infer(op, tuple(nodes[i].type for i in inputs), **attrs), attrs)


# GGUF ---------------------------------------------------------------------------------------------


def gguf_parameter(name: str, load: Node, heads: int | None) -> Nodes:
    """heads: of a weight or bias whose rows lie as they rotate in pairs; the graph rotates halves."""
    packed = "." in load.type.dtype
    below = f"{name}~packed" if packed else name if heads is None else f"{name}~pairs"
    nodes = {below: load}
    if packed:
        above = name if heads is None else f"{name}~pairs"
        nodes[above] = node(nodes, "unpack", below)
        below = above
    if heads is not None:
        nodes[name] = node(nodes, "unpermute_rope", below, heads=heads)
    return nodes


def trained_as(family: Family, role: str, part: str) -> dict[str, Attr]:
    """What makes a GGUF's parameter of a checkpoint's tensor, which an adapter may bring, where that is another."""
    if part == "weight" and role in family.stored_transposed:
        return {"trained_as": {"op": "transpose"}}
    if part == "weight" and family.norm_offset and role.endswith("_norm"):
        return {"trained_as": {"op": "shifted", "by": family.norm_offset}}
    return {}


# GPTQ ---------------------------------------------------------------------------------------------


class GPTQ(NamedTuple):
    """quantization_config. group None: one for each output; minus_one: checkpoint_format gptq, not gptq_v2."""

    bits: int
    group: int | None
    symmetric: bool
    ordered: bool  # desc_act: columns are in groups by their importance
    minus_one: bool

    def parameter(self, name: str, shape: tuple[int, int], attrs: Mapping[str, Attr], tensors: Tensors) -> Nodes | None:
        stem = name.removesuffix(".weight")
        return gptq_parameter(name, stem, tensors.find, shape, attrs, self) if tensors.has(f"{stem}.qweight") else None

    def unread(self, info: TensorInfo, tensors: Tensors) -> str | None:
        return "all zeros, which GPTQ's tools add" if info.ref.endswith(".bias") and tensors.is_zero(info) else None


def read_gptq(found: Mapping[str, object], where: str) -> GPTQ:
    """UnsupportedError for what would be read wrongly."""
    bits, group = found.get("bits"), found.get("group_size")
    form = found.get("checkpoint_format") or found.get("format") or "gptq"
    if bits not in BITS:
        raise UnsupportedError(f"{where}: GPTQ of {bits} bits", hint=f"read are {', '.join(map(str, BITS))}")
    if form not in ("gptq", "gptq_v2"):
        raise UnsupportedError(f"{where}: checkpoint_format {form!r}", hint="gptq and gptq_v2 are read")
    dynamic = found.get("dynamic") or {}
    if not isinstance(dynamic, dict) or not all(str(rule).startswith("-:") for rule in dynamic):  # those leave modules plain
        raise UnsupportedError(f"{where}: quantization_config.dynamic = {str(dynamic)[:80]} is not read")
    if not isinstance(group, int) or group < -1 or group == 0:
        raise InputError(f"{where}: quantization_config.group_size = {group!r}; a whole number was wanted")
    flags = {key: found.get(key, default) for key, default in (("sym", True), ("desc_act", False))}
    for key, value in flags.items():
        if not isinstance(value, bool):
            raise InputError(f"{where}: quantization_config.{key} = {value!r}; true or false was wanted")
    return GPTQ(bits, None if group == -1 else group, bool(flags["sym"]), bool(flags["desc_act"]), form == "gptq")


def gptq_parameter(
    name: str, stem: str, find: Callable[[str], TensorInfo], shape: tuple[int, int], attrs: Mapping[str, Attr], q: GPTQ
) -> Nodes:
    """The weight `name`[N,K], whose tensors are stem.qweight … InputError for shapes that are not those of `shape`."""
    n, k = shape
    group = q.group or k
    if k % group:
        raise UnsupportedError(f"{name}: rows of {k} do not divide into groups of {group}")
    groups, words = k // group, n * q.bits // 32
    wanted: dict[str, tuple[int, ...]] = {"qweight": (k * q.bits // 32, n), "qzeros": (groups, words), "scales": (groups, n)}
    wanted |= {"g_idx": (k,)} if q.ordered or find_or_none(find, f"{stem}.g_idx") else {}
    nodes: Nodes = {}
    for part, dims in wanted.items():
        info = find(f"{stem}.{part}")
        floats = part == "scales" and info.dtype in ("f16", "bf16", "f32")
        if info.shape != dims or not (floats or info.dtype == "i32"):
            raise InputError(
                f"{info.ref}: {info.dtype}{list(info.shape)}, but config.json says {'f16' if floats else 'i32'}{list(dims)}",
                hint="do config.json and the weights belong together?",
            )
        nodes[f"{name}~{part}"] = Node("load", (), Type(info.dtype, info.shape), {"tensor": info.ref, **attrs})
    options: dict[str, Attr] = {"bits": q.bits, "group": group, "minus_one": q.minus_one, "sorted": q.ordered}
    codes = Node("gptq", tuple(nodes), Type(scheme_for(q, group, name, nodes[f"{name}~scales"].type.dtype), shape), options)
    if not q.ordered:
        return {**nodes, name: codes}
    nodes[f"{name}~sorted"] = codes
    nodes[f"{name}~order"] = node(nodes, "order", f"{name}~g_idx")
    nodes[name] = node(nodes, "unsort", f"{name}~sorted", f"{name}~order")
    return nodes


def find_or_none(find: Callable[[str], TensorInfo], name: str) -> TensorInfo | None:
    try:
        return find(name)
    except InputError:
        return None


def scheme_for(q: GPTQ, group: int, name: str, scales: str) -> str:
    """Of the fewest bits that hold the codes, and the largest group that divides theirs: metadata may be said several times."""
    kind, groups = "int" if q.symmetric else "uint", sorted(GROUPS, reverse=True)
    for bits in range(q.bits, 9):
        for g in groups:
            if group % g == 0 and scheme_of(found := affine_name(f"{kind}{bits}", g, scales)) is not None:
                return found
    told = "symmetric" if q.symmetric else "with zero points"
    raise UnsupportedError(f"{name}: GPTQ of {q.bits} bits, {told}, in groups of {group}", hint=f"groups: {GROUPS}")
