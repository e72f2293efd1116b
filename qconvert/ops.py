"""Every op: what it means and the type it gives. Weight ops run in weights.py, row by row; the others in run.py (torch).

Weights are [out, in] = [N, K]; activations f32[B,T,·]; token ids i64[B,T].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple, cast

from qconvert import adapter_ops
from qconvert.dtypes import DTYPES, FLOATS
from qconvert.errors import GraphError
from qconvert.graph import Attr, Graph, Node, Type
from qconvert.scheme import AFFINE, GGML_SCHEMES, TABLES, scheme_of
from qconvert.second_level import ENTRIES, Kind, second_level_name
from qconvert.text import format_node

Infer = Callable[[tuple[Type, ...], dict[str, Attr]], Type | None]


class Op(NamedTuple):
    infer: Infer  # input types, attrs -> type; None: whatever the node declares
    doc: str
    constant: bool = False  # a weight op


def _declared(_: tuple[Type, ...], __: dict[str, Attr]) -> None:
    return None


def _same(i: tuple[Type, ...], _: dict[str, Attr]) -> Type:
    return i[0]


def _elementwise(i: tuple[Type, ...], _: dict[str, Attr]) -> Type:
    if i[0] != i[1]:
        raise GraphError(f"{i[0]} and {i[1]} differ")
    return i[0]


def _real(i: tuple[Type, ...], _: dict[str, Attr]) -> Type:
    return Type("f32", i[0].shape)


def _input(i: tuple[Type, ...], attrs: dict[str, Attr]) -> Type | None:
    """A slot has the shape of what adapters put there, but for the rank, which is theirs."""
    if not i:
        return None
    axis = attrs["slot"]
    kinds = {Type(kind.dtype, tuple("R" if at == axis else d for at, d in enumerate(kind.shape))) for kind in i}
    if len(kinds) > 1:
        raise GraphError(f"{', '.join(map(str, i))} differ in more than their rank")
    return kinds.pop()


def _transpose(i: tuple[Type, ...], _: dict[str, Attr]) -> Type:
    return Type(i[0].dtype, i[0].shape[::-1])


def _embed(i: tuple[Type, ...], _: dict[str, Attr]) -> Type:
    return Type("f32", (*i[0].shape, i[1].shape[1]))


def _linear(i: tuple[Type, ...], _: dict[str, Attr]) -> Type:
    x, w = i[0], i[1]
    if x.shape[-1] != w.shape[1]:
        raise GraphError(f"x has {x.shape[-1]} features, the weight {w} wants {w.shape[1]}")
    if len(i) > 2 and i[2].shape != w.shape[:1]:
        raise GraphError(f"the bias {i[2]} does not fit the weight {w}")
    return Type("f32", (*x.shape[:-1], w.shape[0]))


def _stack(i: tuple[Type, ...], attrs: dict[str, Attr]) -> Type:
    if attrs.get("apart") and {t.shape for t in i} == {i[0].shape}:
        return Type("f32", (len(i), *i[0].shape))
    for other in i[1:]:
        if other != i[0]:
            raise GraphError(f"{i[0]} and {other} differ")
    return Type(i[0].dtype, (len(i), *i[0].shape))


def _expert(i: tuple[Type, ...], attrs: dict[str, Attr]) -> Type:
    (n, *matrix), e = i[0].dims, attrs["e"]
    assert isinstance(e, int)
    if not 0 <= e < n:
        raise GraphError(f"{i[0]} has no matrix {e}")
    return Type(i[0].dtype if i[0].dtype in FLOATS else "f32", tuple(matrix))


def _part(i: tuple[Type, ...], attrs: dict[str, Attr]) -> Type:
    (e, n, k), begin, end = i[0].dims, attrs["begin"], attrs["end"]
    assert isinstance(begin, int) and isinstance(end, int)
    if not 0 <= begin < end <= n:
        raise GraphError(f"{i[0]} has no rows {begin}..{end}")
    return Type(i[0].dtype, (e, end - begin, k))


def _interleave(i: tuple[Type, ...], _: dict[str, Attr]) -> Type:
    (e, n, k), other = i[0].dims, i[1].dims
    if other != i[0].dims:
        raise GraphError(f"{i[0]} and {i[1]} differ")
    return Type(i[0].dtype if scheme_of(i[0].dtype) and i[0] == i[1] else "f32", (e, 2 * n, k))


def _beside(i: tuple[Type, ...], _: dict[str, Attr]) -> Type:
    e, n, k = i[0].dims
    return Type("f32", (n, e * k))


def _spread(i: tuple[Type, ...], attrs: dict[str, Attr]) -> Type:
    width, times = i[0].shape[-1], attrs["times"]
    assert isinstance(width, int) and isinstance(times, int)
    return Type("f32", (*i[0].shape[:-1], width * times))


def _second_level(i: tuple[Type, ...], attrs: dict[str, Attr]) -> Type:
    scheme = scheme_of(i[0].dtype)
    assert scheme is not None and attrs["kind"] in ENTRIES
    return Type(second_level_name(scheme, i[0].dims[-1], cast(Kind, attrs["kind"])), i[0].shape)


def _permuted(i: tuple[Type, ...], _: dict[str, Attr]) -> Type:
    return i[0] if scheme_of(i[0].dtype) else Type("f32", i[0].shape)


def _unpack(i: tuple[Type, ...], _: dict[str, Attr]) -> Type:
    return Type(i[0].dtype.rpartition(".")[2], i[0].shape)


def _order(i: tuple[Type, ...], _: dict[str, Attr]) -> Type:
    return Type("i64", i[0].shape)


def _gptq(i: tuple[Type, ...], attrs: dict[str, Attr]) -> None:
    (words, n), (groups, zero_words), scales, bits = i[0].dims, i[1].dims, i[2].dims, attrs["bits"]
    assert isinstance(bits, int) and isinstance(attrs["group"], int)
    if scales != (groups, n) or zero_words * 32 != n * bits or groups * attrs["group"] * bits != words * 32:
        raise GraphError(f"qweight {i[0]}, qzeros {i[1]} and scales {i[2]} do not fit together")


def _turned(i: tuple[Type, ...], _: dict[str, Attr]) -> Type:
    w, su, sv = i
    if (*sv.shape, *su.shape) != w.shape:
        raise GraphError(f"signs {su} and {sv} do not fit a weight {w}")
    return Type("f32", w.shape)


def _take(i: tuple[Type, ...], _: dict[str, Attr]) -> Type:
    return Type(i[0].dtype, (*i[0].shape[:-1], *i[1].shape))


def _experts(i: tuple[Type, ...], _: dict[str, Attr]) -> Type:
    x, route, *first, down = i
    e, k, n = down.dims
    inner = [(e, n, k)] * 2 if len(first) == 2 else [(e, 2 * n, k)]
    if x.shape[-1] != k or route.shape[-1] != e or [w.dims for w in first] != inner:
        raise GraphError(f"x {x}, the route {route} and the weights {', '.join(map(str, i[2:]))} do not fit together")
    return Type("f32", x.shape)


def _pool(i: tuple[Type, ...], attrs: dict[str, Attr]) -> Type:
    if attrs["mode"] not in ("mean", "cls"):
        raise GraphError(f"unknown mode {attrs['mode']!r}", hint="mean, cls")
    if i[0].shape[:2] != i[1].shape:
        raise GraphError(f"{i[0]} and {i[1]} differ")
    return Type("f32", (i[0].shape[0], i[0].shape[2]))


def _slice(i: tuple[Type, ...], attrs: dict[str, Attr]) -> Type:
    begin, end = attrs["begin"], attrs["end"]
    assert isinstance(begin, int) and isinstance(end, int)
    return Type(i[0].dtype, (*i[0].shape[:-1], end - begin))


OPS: dict[str, Op] = {
    **{name: Op(*each) for name, each in adapter_ops.OPS.items()},
    # weights -------------------------------------------------------------------------------------
    "load": Op(
        _declared,
        'a tensor of the sources: {"tensor": "base/model.safetensors#name"}; parameters add role, layer',
        True,
    ),
    "constant": Op(_declared, 'numbers small enough to print: {"values": [...]}', True),
    "transpose": Op(_transpose, "w.T", True),
    "stack": Op(
        _stack,
        "(w, w, ...) {apart?}: matrices [N,K] of E experts as one weight [E,N,K]; it has E*N rows; apart: files hold the "
        "matrices, each with a type of its own, and the whole is f32",
        True,
    ),
    "expert": Op(_expert, "(w[E,N,K] or [E,K]) {e}: matrix e, [N,K], or row e, [K]", True),
    "part": Op(_part, "(w[E,N,K]) {begin, end}: rows begin..end of every expert", True),
    "interleave": Op(_interleave, "(w[E,N,K], u[E,N,K]): their rows in turn, [E,2N,K]", True),
    "flat": Op(lambda i, _: Type("f32", (i[0].rows, i[0].dims[-1])), "(w[E,N,K]): one below the other, [E*N,K]", True),
    "beside": Op(_beside, "(w[E,N,K]): one beside the other, [N,E*K]", True),
    "cast": Op(_declared, "w rounded to the node's dtype", True),
    "blend": Op(_real, "(w, w0, new) {weight}: w + weight * (new - w0)", True),
    "set_rows": Op(
        _real, "(w, w0, new[n,K]) {indices, weight}: w with row indices[j] += weight * (new[j] - w0[indices[j]])", True
    ),
    "add_scaled": Op(_real, "(w, d) {scale}: w + scale * d", True),
    "scaled": Op(_real, "(w) {scale}: scale * w", True),
    "shifted": Op(_real, "(w) {by}: w + by", True),
    "permute_rope": Op(_permuted, "(w) {heads}: rows of each head from halves (HF) to pairs (GGUF llama)", True),
    "unpermute_rope": Op(_same, "(w or q) {heads}: rows of each head from pairs (GGUF llama) to halves (HF)", True),
    "unpack": Op(_unpack, "(bytes): the codes and metadata that a source stores in a layout such as gguf.q4_0", True),
    "assemble": Op(
        _declared, "(tensors) {layout}: codes and metadata that a source stores in the tensors of a layout, in its order", True
    ),
    "gptq": Op(
        _gptq,
        "(qweight[K*bits/32,N], qzeros[G,N*bits/32], scales[G,N][, g_idx[K]]) {bits, group, minus_one, sorted}: GPTQ's words "
        "as codes; minus_one: zero points are stored less one; sorted: columns in the order of their groups",
        True,
    ),
    "order": Op(_order, "(g_idx[K]): i64[K], the columns in the order of their groups", True),
    "unsort": Op(_real, "(w[N,K], order[K]): w's column j as column order[j]", True),
    "transcode": Op(_declared, "(q): the same values in the scheme that is the node's dtype", True),
    "amax": Op(lambda _, __: Type("f32", (1,)), "(w, ...): the greatest magnitude in all of them, f32[1]", True),
    "quantize": Op(_declared, "(w[, amax, scales or mean]) {solver}: to the scheme that is the node's dtype", True),
    "block_peaks": Op(_declared, "(w[N,K]) {group}: f32[N,K/group], the greatest magnitude of each group", True),
    "mean_magnitude": Op(lambda i, _: Type("f32", (1,)), "(w[N,K]) {least?}: the mean of |w|, or least, f32[1]", True),
    "nest": Op(
        _declared,
        "(s[N,G], mean[1]): s less mean by bitsandbytes' 8-bit map, in blocks of 256 across rows: codes u8[N,G] or the blocks' "
        "scales f32[ceil(N*G/256)]",
        True,
    ),
    "nested": Op(_declared, "(codes[N,G], scales[blocks], mean[1][, map[256]]): f32[N,G], what nest was given", True),
    "halves": Op(_declared, "(codes u8[N*K/2,1], scales[N,G]): codes of 4 bits, the first in the high half", True),
    "fold": Op(
        _declared,
        "(q[N,K]) {parts, high_first}: u8[N/parts,K], a byte has a code of each part of the rows, the first's in its low or "
        "its high bits",
        True,
    ),
    "unfold": Op(_declared, "(codes, level, ...) {parts, high_first, inverse?}: what fold was given; inverse: 1 / level", True),
    "across": Op(
        _declared,
        "(codes, scale[1,M], zero[1,M]) {scheme, parts}: f32[N,K], of which values M = N K / group apart share a scale and a "
        "zero point; a byte has a code of each part of the group, the first's in its high bits",
        True,
    ),
    "signs": Op(_declared, "() {seed}: f32[n], 1 and -1 at random", True),
    "incoherent": Op(
        _turned, "(w[N,K], su[K], sv[N]): H.T diag(sv) w diag(su) H, Hadamard matrices over their orders' roots", True
    ),
    "coherent": Op(_turned, "(w[N,K], su[K], sv[N]): diag(sv) H w H.T diag(su), the inverse for signs su and sv", True),
    "rows": Op(_declared, "(w[N,K]) {begin, times}: as many rows from `begin` on as the node has, times a number", True),
    "lattice_unit": Op(lambda _, __: Type("f16", (1,)), "(q): what points of a lattice are multiplied by", True),
    "tile": Op(
        lambda i, _: Type("i64", (i[0].rows, i[0].dims[-1] // 32)), "(q[N,K]): e8p's codes in tiles of 16 by 64", True
    ),
    "untile": Op(_declared, "(words i64[N,K/32], unit[1]): what tile was given", True),
    "note": Op(_declared, "(v[1]) {json, key}: the object `json` with v under `key`, as text filled up with spaces, u8", True),
    "awq_scales": Op(
        _declared, "(moments, w, ...) {dtypes, solver, times?, head_dim?}: for least error of the quantized w", True
    ),
    "smooth_scales": Op(_declared, "(peaks, w, ...) {alpha, times?, head_dim?}: peaks**alpha / max|w|**(1-alpha)", True),
    "held_scales": Op(_same, "(s, w[K]) {dtype}: near s, such that w / s is a number of dtype", True),
    "scale_columns": Op(_real, "(w[N,K], s) {times?, head_dim?}: w * s, each head's s for that many heads of w", True),
    "divide_rows": Op(_real, "(w[N,K] or [N], s[N]): w / s", True),
    "folded_statistic": Op(_same, "(v, s) {of, times?, head_dim?}: moments, a hessian or peaks of x / s from that of x", True),
    "second_level": Op(_second_level, "(q) {kind}: its real scales and zero points as integers with a level above", True),
    "pack": Op(_declared, "(q): to the bytes of the layout that is the node's dtype; the shape stays that of the weight", True),
    # activations ---------------------------------------------------------------------------------
    "input": Op(
        _input,
        "() {default?}: i64[B,T], token ids and what goes with them, with a default it may be left out; "
        "(p, ...) {slot}: a factor of one of the adapters that have it, slot 0 f32[R,K], slot 1 f32[N,R]; left out R is 0",
    ),
    "positions": Op(lambda i, _: Type("i64", i[0].shape), "(tokens): 0, 1, 2 … along T"),
    "embed": Op(_embed, "(ids, w): rows of w"),
    "linear": Op(
        _linear, "(x, w[, bias]) {round_input?, round_output?}: x @ w.T + bias; the attributes say how a runtime rounds"
    ),
    "add": Op(_elementwise, "x + y"),
    "mul": Op(_elementwise, "x * y"),
    "times": Op(_same, "(x) {by}: x * by"),
    "softcap": Op(_same, "(x) {cap}: cap * tanh(x / cap)"),
    "silu": Op(_same, "x * sigmoid(x)"),
    "gelu": Op(_same, "exact (erf) GELU"),
    "gelu_tanh": Op(_same, "GELU, tanh approximation"),
    "relu": Op(_same, "max(x, 0)"),
    "route": Op(
        _same,
        "(logits[..., E]) {used, normalize}: the `used` largest of softmax(logits), divided by their sum where `normalize`; "
        "0 for the other experts",
    ),
    "experts": Op(
        _experts,
        "(x, route, gate[E,F,K], up[E,F,K], down[E,K,F]) {act}: sum over e of route[..., e] * "
        "(act(x @ gate[e].T) * (x @ up[e].T)) @ down[e].T; gate and up may be one weight, interleaved",
    ),
    "spread": Op(_spread, "(x) {times}: each feature that many times in a row"),
    "take": Op(_take, "(x, indices[n]): features in that order"),
    "slice": Op(_slice, "(x) {begin, end}: features begin..end"),
    "rms_norm": Op(_same, "(x, w) {eps}: over the last axis, or over each chunk of len(w) features (qk-norm)"),
    "layer_norm": Op(_same, "(x, w, b) {eps}"),
    "pool": Op(
        _pool,
        "(x[B,T,D], seen[B,T]) {mode}: one vector of each text: mean over the tokens where `seen` is not 0, or cls: the first",
    ),
    "unit": Op(_same, "x / |x| over the last axis"),
    "rope": Op(
        _same,
        "(x[, factors[head_dim/2]]) {head_dim, theta, dims?, scaling?, interleaved?}: rotate halves (or neighbours) "
        "of each head, or of its first dims values, by position; factors divide the frequencies",
    ),
    "attention": Op(
        _same,
        "(q, k, v[, seen[B,T]]) {heads, kv_heads, scale, causal?, window?, softcap?}: position i sees j <= i, or every j "
        "where causal is false; with a window i-window < j; with `seen`, only tokens where it is not 0; softcap is of the "
        "scores, before that",
    ),
}


# what gives codes and metadata
KEEPING = ("unpermute_rope", "permute_rope", "stack", "interleave", "merge_pooled")  # codes as codes, reals as reals
QUANTIZED = (
    "quantize", "unshifted", "second_level", "transcode", "unpack", "assemble", "halves", "unfold", "untile", "gptq",
)  # fmt: skip


def infer(op: str, inputs: tuple[Type, ...], **attrs: Attr) -> Type:
    """The type that `op` gives. GraphError for an unknown op or inputs that do not fit."""
    if op not in OPS:
        raise GraphError(f"unknown op {op!r}", hint=f"ops are {', '.join(sorted(OPS))}")
    got = OPS[op].infer(inputs, dict(attrs))
    if got is None:
        raise GraphError(f"{op} has no type rule; its node must declare its type")
    return got


def verify(graph: Graph) -> None:
    """Raise GraphError unless every name is defined before use, every type is what its op gives, every dtype exists."""
    seen: dict[str, Type] = {}
    for name, node in graph.nodes.items():
        try:
            seen[name] = _verified(name, node, seen)
        except GraphError as e:
            raise GraphError(f"{e.message}: {format_node(name, node)}", hint=e.hint) from e
    for o in graph.outputs:
        if o not in seen:
            raise GraphError(f"output %{o} is not defined")


def _verified(name: str, node: Node, seen: Mapping[str, Type]) -> Type:
    for i in node.inputs:
        if i not in seen:
            raise GraphError(f"%{name} uses %{i}, which is not defined before it")
    if node.op not in OPS:
        raise GraphError(f"%{name}: unknown op {node.op!r}", hint=f"ops are {', '.join(sorted(OPS))}")
    _check_dtype(node)
    try:
        want = OPS[node.op].infer(tuple([seen[i] for i in node.inputs]), dict(node.attrs))
    except GraphError as e:
        raise GraphError(f"%{name}: {e.message}", hint=e.hint) from e
    except (KeyError, IndexError, ValueError, AssertionError) as e:
        raise GraphError(f"%{name}: wrong inputs or attributes for {node.op} ({OPS[node.op].doc})") from e
    if want is not None and want != node.type:
        raise GraphError(f"%{name}: {node.op} gives {want}, but the graph says {node.type}")
    return node.type


def _check_dtype(node: Node) -> None:
    dtype = node.type.dtype
    if node.op == "pack":
        if "." not in dtype:
            raise GraphError(f"pack gives a layout such as gguf.q4_k, not {dtype}")
    elif node.op == "load" and "." in dtype:
        return  # as the source stores it
    elif node.op in QUANTIZED or (node.op in KEEPING and dtype not in DTYPES):
        if scheme_of(dtype) is None:
            known = ", ".join([*GGML_SCHEMES, *AFFINE, *TABLES])
            raise GraphError(f"{dtype} is no scheme", hint=f"schemes are {known}")
    elif dtype not in DTYPES:
        raise GraphError(f"{dtype} is no dtype", hint=f"dtypes are {', '.join(DTYPES)}")
