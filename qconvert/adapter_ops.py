"""Ops of adapters: what they mean and the types they give. As weights in adapter_weights.py, on activations in run.py."""

from __future__ import annotations

from collections.abc import Callable

from qconvert.errors import GraphError
from qconvert.graph import Attr, Type
from qconvert.moves import centred, shifted
from qconvert.scheme import scheme_of

Infer = Callable[[tuple[Type, ...], dict[str, Attr]], Type | None]


def _merge(i: tuple[Type, ...], _: dict[str, Attr]) -> Type:
    w, (a, b) = i[0], i[-2:] if len(i) == 3 else i[2:4]
    (n, k), (ra, ka), (nb, rb) = w.dims, a.dims, b.dims
    if (n, k) != (nb, ka) or ra != rb:
        raise GraphError(f"A {a} and B {b} do not fit a weight {w}")
    return Type("f32", w.shape)


def _merge_pooled(i: tuple[Type, ...], attrs: dict[str, Attr]) -> Type:
    (n, k), (ra, columns), (nb, rb), group = i[0].dims, i[1].dims, i[2].dims, attrs["group"]
    assert isinstance(group, int)
    if (n, k) != (nb, columns * group) or ra != rb:
        raise GraphError(f"A {i[1]} and B {i[2]} do not fit a weight {i[0]} in groups of {group}")
    scheme = scheme_of(i[0].dtype)
    above = shifted(scheme) if scheme is not None and "why" not in attrs else None
    return Type("f32" if above is None else above.name, (n, k))


def _group_sums(i: tuple[Type, ...], attrs: dict[str, Attr]) -> Type:
    width, group = i[0].shape[-1], attrs["group"]
    assert isinstance(width, int) and isinstance(group, int)
    if width % group:
        raise GraphError(f"{width} features do not divide into groups of {group}")
    return Type("f32", (*i[0].shape[:-1], width // group))


def _spread_columns(i: tuple[Type, ...], attrs: dict[str, Attr]) -> Type:
    (n, k), times = i[0].dims, attrs["times"]
    assert isinstance(times, int)
    return Type("f32", (n, k * times))


def _unshifted(i: tuple[Type, ...], _: dict[str, Attr]) -> Type:
    scheme = scheme_of(i[0].dtype)
    plain = centred(scheme) if scheme is not None and shifted(scheme) is not None else None
    if plain is None:
        raise GraphError(f"{i[0].dtype} has no scheme without a shift")
    return Type(plain.name, i[0].shape)


def _lora(i: tuple[Type, ...], _: dict[str, Attr]) -> Type:
    return Type("f32", (*i[0].shape[:-1], i[2].shape[0]))


def _shift_path(i: tuple[Type, ...], _: dict[str, Attr]) -> Type:
    if i[0].shape[-1] != i[1].shape[1]:
        raise GraphError(f"sums {i[0]} and shifts {i[1]} do not fit together")
    return Type("f32", (*i[0].shape[:-1], i[1].shape[0]))


def _lora_embed(i: tuple[Type, ...], _: dict[str, Attr]) -> Type:
    return Type("f32", (*i[0].shape, i[2].shape[0]))


def _dora_path(i: tuple[Type, ...], _: dict[str, Attr]) -> Type:
    return Type("f32", (*i[0].shape[:-1], i[1].shape[0]))


def _dora_embed(i: tuple[Type, ...], _: dict[str, Attr]) -> Type:
    return Type("f32", (*i[0].shape, i[1].shape[1]))


# op -> its type, what it does, whether on weights
OPS: dict[str, tuple[Infer, str, bool]] = {
    "merge": (_merge, "(w, A[r,K], B[N,r]) {scale}: w + scale * B @ A", True),
    "merge_pooled": (
        _merge_pooled,
        "(w[N,K], A[r,K/group], B[N,r]) {scale, group, why?}: w + scale * B @ A, each column for `group` inputs; of codes the "
        "offsets move, unless `why` says what forbids it",
        True,
    ),
    "add_blocks": (
        lambda i, _: Type("f32", i[0].shape),
        "(w[p,q], s[1]) {value}: s * value more on the blocks of its diagonal, min(p, q) of them",
        True,
    ),
    "refit": (
        lambda i, attrs: Type("f32", i["ab".index(str(attrs["part"]))].shape),
        "(A, B, w, q[, h[K,K] or h[K]]) {part}: A or B whose product, of their rank, is nearest to w + B @ A - q; h: a mean of "
        "x x^T or its diagonal, that errors are weighted by",
        True,
    ),
    "unshifted": (_unshifted, "(q): its codes about zero with its scales alone", True),
    "shift": (lambda i, _: None, "(q[N,K]): f32[N,G], what q has more than unshifted(q), the same for all of a group", True),
    "shift_factor": (
        lambda i, _: None,
        "(t[N,G]) {part, rank, group}: A[rank,K] or B[N,rank], B @ A is t with each column `group` times",
        True,
    ),
    "shift_path": (_shift_path, "(sums[...,G], t[N,G]): sums @ t.T", False),
    "spread_columns": (_spread_columns, "(w) {times}: each column that many times in a row", True),
    "dora": (
        _merge,
        "(w, w0, A, B, m[, norm[K]]) {scale, weight}: w + weight * (m * V / |V| - w0), V = w0 + scale * B @ A; "
        "|V| by row, m[N]; with norm by column, m[K]",
        True,
    ),
    "column_norm": (
        lambda i, _: Type("f32", i[0].shape[1:]), "(w0, A, B) {scale}: norms of the columns of w0 + scale * B @ A", True
    ),
    "group_sums": (_group_sums, "(x) {group}: sums of so many features in a row", False),
    "lora": (_lora, "(x, A, B[, bias]) {scale}: scale * ((x @ A.T) @ B.T + bias)", False),
    "lora_embed": (_lora_embed, "(ids, A[r,V], B[D,r]) {scale}: scale * A.T[ids] @ B.T", False),
    "dora_path": (
        _dora_path,
        "(x, w, A, B, m) {scale, weight}: weight * ((g-1) * x@w.T + g * scale * x@A.T@B.T), g = m / |w + scale * B@A| by row",
        False,
    ),
    "dora_embed": (
        _dora_embed,
        "(ids, w[V,D], A[r,V], B[D,r], m[D]) {scale, weight}: the same for embeddings, |·| by column",
        False,
    ),
}
