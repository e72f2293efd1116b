"""What onnxruntime's own nodes compute, in standard ones: bodies of functions that lie in the file itself.

onnxruntime takes its kernel of the name and never reads the body; any other runtime of opset 23, and the reference of
the onnx package, executes the body. A body depends on which inputs a node has: variants of one op differ by `overload`.
Texts are in the syntax of onnx.parser. Contracts: the schemas of com.microsoft in onnxruntime 1.31.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from onnx import FunctionProto, NodeProto, TensorProto, parser

from qconvert.formats.onnx_proto import CONTRIB, Model
from qconvert.scheme import FP4_TABLE, NF4_TABLE


class Body(NamedTuple):
    """variant: what tells it from others of its op; text: `Op <attributes> (inputs) => (outputs) { nodes }`."""

    variant: str
    text: str


def with_bodies(model: Model) -> list[FunctionProto]:
    """A function for each op and variant that the model uses. Nodes of an op's second variant and on get its overload."""
    made: dict[tuple[str, str], FunctionProto] = {}
    for node in model.nodes:
        if node.domain != CONTRIB:
            continue
        body = BODIES[node.op_type](model, node)
        key = node.op_type, body.variant
        if key not in made:
            made[key] = function = parser.parse_function(f'<domain: "{CONTRIB}", opset_import: ["" : 23]>\n{body.text}')
            function.overload = (body.variant or "plain") if any(op == node.op_type for op, _ in made.keys() - {key}) else ""
        node.overload = made[key].overload
    return list(made.values())


# codes --------------------------------------------------------------------------------------------

# how codes of `bits` bits lie in bytes: the first in the low bits
SHIFTS = """
  bits = Constant <value_int: int = @bits> ()
  in_byte = Constant <value_int = 8> ()
  none = Constant <value_int = 0> ()
  starts = Range (none, in_byte, bits)
  shifts = Cast <to = 2> (starts)
  rest = Sub (in_byte, bits)
  rest_u8 = Cast <to = 2> (rest)
  all = Constant <value = uint8 {255}> ()
  low = BitShift <direction = "RIGHT"> (all, rest_u8)
  last = Constant <value_ints = [-1]> ()
"""


def unpacked(codes: str, out: str) -> str:
    """u8[..., m] -> f32[..., m, 8 / bits]"""
    return f"""
  {out}_bytes = Unsqueeze ({codes}, last)
  {out}_shifted = BitShift <direction = "RIGHT"> ({out}_bytes, shifts)
  {out}_codes = BitwiseAnd ({out}_shifted, low)
  {out} = Cast <to = 1> ({out}_codes)
"""


CENTRE = """
  one = Constant <value_int = 1> ()
  below = Sub (bits, one)
  power = Cast <to = 1> (below)
  two = Constant <value_float = 2.0> ()
  zeros = Pow (two, power)
"""


def _matmul_nbits(model: Model, node: NodeProto) -> Body:
    """A f32[..., K], B u8[N, groups, block * bits / 8], scales f32[N, groups]: A @ (scales * (B - zeros)).T + bias"""
    given = node.input[3] if len(node.input) > 3 else ""
    kind = model.initializers[given].data_type if given else None
    if kind is None:
        variant, zeros = "", CENTRE
    elif kind == TensorProto.UINT8:
        variant = "zero_points"
        zeros = unpacked("zero_points", "zeros_spread") + """
  zeros_shape = Concat <axis = 0> (n, last)
  zeros_row = Reshape (zeros_spread, zeros_shape)
  scales_shape = Shape (scales_rows)
  groups = Slice (scales_shape, first, second)
  zeros_cut = Slice (zeros_row, begin, groups, first)
  zeros = Unsqueeze (zeros_cut, last)
"""
    else:
        variant = "float_zero_points"
        zeros = """
  zeros_rows = Reshape (zero_points, scales_rows_shape)
  zeros = Unsqueeze (zeros_rows, last)
"""
    return Body(variant, f"""MatMulNBits <K, N, bits, block_size, accuracy_level>
  (A, B, scales, zero_points, g_idx, bias) => (Y)
{{{SHIFTS}
  k = Constant <value_int: int = @K> ()
  n_scalar = Constant <value_int: int = @N> ()
  block_scalar = Constant <value_int: int = @block_size> ()
  begin = Constant <value_ints = [0]> ()
  first = Constant <value_ints = [1]> ()
  second = Constant <value_ints = [2]> ()
  n = Reshape (n_scalar, last)
  k_row = Reshape (k, last)
  block = Reshape (block_scalar, last)
{unpacked("B", "spread")}
  grouped_shape = Concat <axis = 0> (n, last, block)
  grouped = Reshape (spread, grouped_shape)
  scales_rows_shape = Concat <axis = 0> (n, last)
  scales_rows = Reshape (scales, scales_rows_shape)
{zeros}
  centred = Sub (grouped, zeros)
  factors = Unsqueeze (scales_rows, last)
  values = Mul (centred, factors)
  flat = Reshape (values, scales_rows_shape)
  weight = Slice (flat, begin, k_row, first)
  rows_shape = Concat <axis = 0> (last, k_row)
  rows = Reshape (A, rows_shape)
  product = Gemm <transB = 1> (rows, weight, bias)
  outer = Shape <end = -1> (A)
  shape = Concat <axis = 0> (outer, n)
  Y = Reshape (product, shape)
}}""")


def _matmul_bnb4(model: Model, node: NodeProto) -> Body:
    """A f32[..., K], B u8[N * K / 2], absmax f32[N * K / block]: A @ (absmax * table[B]).T, the first code in the high bits"""
    (kind,) = (a.i for a in node.attribute if a.name == "quant_type")
    levels = ", ".join(str(float(np.float32(v))) for v in (NF4_TABLE if kind else FP4_TABLE))
    return Body("nf4" if kind else "fp4", f"""MatMulBnb4 <K, N, block_size, quant_type> (A, B, absmax) => (Y)
{{
  k = Constant <value_int: int = @K> ()
  n_scalar = Constant <value_int: int = @N> ()
  block_scalar = Constant <value_int: int = @block_size> ()
  table = Constant <value_floats = [{levels}]> ()
  shifts = Constant <value = uint8[2] {{4, 0}}> ()
  low = Constant <value = uint8 {{15}}> ()
  last = Constant <value_ints = [-1]> ()
  n = Reshape (n_scalar, last)
  k_row = Reshape (k, last)
  block = Reshape (block_scalar, last)
  bytes = Unsqueeze (B, last)
  shifted = BitShift <direction = "RIGHT"> (bytes, shifts)
  halves = BitwiseAnd (shifted, low)
  codes = Cast <to = 7> (halves)
  levels = Gather (table, codes)
  grouped_shape = Concat <axis = 0> (last, block)
  grouped = Reshape (levels, grouped_shape)
  factors = Unsqueeze (absmax, last)
  values = Mul (grouped, factors)
  weight_shape = Concat <axis = 0> (n, k_row)
  weight = Reshape (values, weight_shape)
  rows_shape = Concat <axis = 0> (last, k_row)
  rows = Reshape (A, rows_shape)
  product = Gemm <transB = 1> (rows, weight)
  outer = Shape <end = -1> (A)
  shape = Concat <axis = 0> (outer, n)
  Y = Reshape (product, shape)
}}""")


def _gather_block_quantized(model: Model, node: NodeProto) -> Body:
    """data u8[N, K * bits / 8], indices i64[...], scales f32[N, groups]: rows [..., K] of scales * (data - zeros)"""
    zeros = CENTRE
    if len(node.input) > 3:
        zeros = f"""
  zeros_packed = Gather (zero_points, indices)
{unpacked("zeros_packed", "zeros_spread")}
  zeros_shape = Concat <axis = 0> (outer, last)
  zeros_row = Reshape (zeros_spread, zeros_shape)
  scales_shape = Shape <start = 1> (scales)
  none_1d = Reshape (none, last)
  zeros_cut = Slice (zeros_row, none_1d, scales_shape, last)
  zeros = Unsqueeze (zeros_cut, last)
"""
    return Body("zero_points" if len(node.input) > 3 else "", f"""GatherBlockQuantized
  <bits, block_size, gather_axis, quantize_axis> (data, indices, scales, zero_points) => (output)
{{{SHIFTS}
  block_scalar = Constant <value_int: int = @block_size> ()
  block = Reshape (block_scalar, last)
  outer = Shape (indices)
  rows = Gather (data, indices)
{unpacked("rows", "spread")}
  grouped_shape = Concat <axis = 0> (outer, last, block)
  grouped = Reshape (spread, grouped_shape)
{zeros}
  centred = Sub (grouped, zeros)
  row_scales = Gather (scales, indices)
  factors = Unsqueeze (row_scales, last)
  values = Mul (centred, factors)
  flat_shape = Concat <axis = 0> (outer, last)
  output = Reshape (values, flat_shape)
}}""")


# experts ------------------------------------------------------------------------------------------

# shares [tokens, E] of the k largest, then all experts at once: those that were not chosen count 0
MIXTURE = """
  column = Constant <value_ints = [-1]> ()
  used_scalar = Constant <value_int: int = @k> ()
  used = Reshape (used_scalar, column)
  top, at = TopK <axis = -1> (router_probs, used)
  top_shares = Softmax <axis = -1> (top)
  route_shape = Shape (router_probs)
  no_shares = ConstantOfShape (route_shape)
  shares = ScatterElements <axis = -1> (no_shares, at, top_shares)
  width = Shape <start = -1> (input)
  rows_shape = Concat <axis = 0> (column, width)
  rows = Reshape (input, rows_shape)
  first = Reshape (fc1, rows_shape)
  first_turned = Transpose <perm = [1, 0]> (first)
  both_flat = MatMul (rows, first_turned)
  n_experts = Shape <start = 0, end = 1> (fc2)
  n_inner = Shape <start = 2> (fc2)
  pair = Constant <value_ints = [2]> ()
  both_shape = Concat <axis = 0> (column, n_experts, n_inner, pair)
  both = Reshape (both_flat, both_shape)
  gate_index = Constant <value_int = 0> ()
  up_index = Constant <value_int = 1> ()
  gate = Gather <axis = -1> (both, gate_index)
  up = Gather <axis = -1> (both, up_index)
  alpha = Constant <value_float: float = @activation_alpha> ()
  beta = Constant <value_float: float = @activation_beta> ()
  steep = Mul (gate, alpha)
  sigmoid = Sigmoid (steep)
  acted = Mul (gate, sigmoid)
  raised = Add (up, beta)
  gated = Mul (acted, raised)
  share = Unsqueeze (shares, column)
  shared = Mul (gated, share)
  second = Transpose <perm = [0, 2, 1]> (fc2)
  second_flat = Reshape (second, rows_shape)
  shared_flat = Flatten <axis = 1> (shared)
  product = MatMul (shared_flat, second_flat)
  whole = Shape (input)
  output = Reshape (product, whole)
"""


def _moe(model: Model, node: NodeProto) -> Body:
    """input f32[..., D], router's logits f32[tokens, E], fc1 f32[E, 2F, D] (gate and up in turn), fc2 f32[E, D, F]"""
    return Body("", f"""MoE
  <k, normalize_routing_weights, activation_type, swiglu_fusion, activation_alpha, activation_beta>
  (input, router_probs, fc1, fc1_bias, fc2) => (output)
{{{MIXTURE}}}""")


def _qmoe(model: Model, node: NodeProto) -> Body:
    """The same with codes u8[E, N, K * bits / 8], scales f32[E, N, groups] and zero points u8[E, N, packed groups]"""
    given = len(node.input) > 11
    return Body("zero_points" if given else "", f"""QMoE
  <k, normalize_routing_weights, activation_type, swiglu_fusion, activation_alpha, activation_beta, expert_weight_bits,
   block_size, accuracy_level>
  (input, router_probs, fc1_codes, fc1_scales, fc1_bias, fc2_codes, fc2_scales, fc2_bias, fc3, fc3_scales, fc3_bias,
   fc1_zeros, fc2_zeros) => (output)
{{{SHIFTS.replace("@bits", "@expert_weight_bits")}
  block_scalar = Constant <value_int: int = @block_size> ()
  block = Reshape (block_scalar, last)
{CENTRE}
{real_experts("fc1", given)}
{real_experts("fc2", given)}
{MIXTURE}}}""")


def real_experts(weight: str, zeros_given: bool) -> str:
    """Codes, scales and zero points of a weight -> f32[E, N, K]"""
    zeros = f"""
{unpacked(f"{weight}_zeros", f"{weight}_zeros_spread")}
  {weight}_zeros_shape = Shape <end = 2> ({weight}_scales)
  {weight}_zeros_rows_shape = Concat <axis = 0> ({weight}_zeros_shape, last)
  {weight}_zeros_rows = Reshape ({weight}_zeros_spread, {weight}_zeros_rows_shape)
  {weight}_n_groups = Shape <start = 2> ({weight}_scales)
  {weight}_begin = Reshape (none, last)
  {weight}_zeros_cut = Slice ({weight}_zeros_rows, {weight}_begin, {weight}_n_groups, last)
  {weight}_centre = Unsqueeze ({weight}_zeros_cut, last)
""" if zeros_given else f"  {weight}_centre = Identity (zeros)"
    return f"""
{unpacked(f"{weight}_codes", f"{weight}_spread")}
  {weight}_outer = Shape ({weight}_scales)
  {weight}_grouped_shape = Concat <axis = 0> ({weight}_outer, block)
  {weight}_grouped = Reshape ({weight}_spread, {weight}_grouped_shape)
{zeros}
  {weight}_centred = Sub ({weight}_grouped, {weight}_centre)
  {weight}_factors = Unsqueeze ({weight}_scales, last)
  {weight}_values = Mul ({weight}_centred, {weight}_factors)
  {weight}_rows_shape = Shape <end = 2> ({weight}_scales)
  {weight}_shape = Concat <axis = 0> ({weight}_rows_shape, last)
  {weight} = Reshape ({weight}_values, {weight}_shape)
"""


# the rest -----------------------------------------------------------------------------------------


def _group_query_attention(model: Model, node: NodeProto) -> Body:
    """query f32[B,T,H*d], key and value f32[B,T,h*d], past f32[B,h,P,d]: causal attention behind what the cache holds"""
    turns = len(node.input) > 7 and bool(node.input[7])
    rotation = """
  turned_query = RotaryEmbedding <num_heads: int = @num_heads, interleaved: int = @rotary_interleaved{dims}>
    (query, cos_cache, sin_cache, positions)
  turned_key = RotaryEmbedding <num_heads: int = @kv_num_heads, interleaved: int = @rotary_interleaved{dims}>
    (key, cos_cache, sin_cache, positions)
"""
    width = _rotated(model, node) if turns else None
    used = rotation.format(dims="" if width is None else f", rotary_embedding_dim = {width}") if turns else ""
    q, k = ("turned_query", "turned_key") if turns else ("query", "key")
    return Body(f"rotary_{width or 'all'}" if turns else "", f"""GroupQueryAttention
  <num_heads, kv_num_heads, scale, do_rotary, rotary_interleaved, local_window_size, softcap>
  (query, key, value, past_key, past_value, seqlens_k, total_sequence_length, cos_cache, sin_cache)
  => (output, present_key, present_value)
{{
  zero = Constant <value_int = 0> ()
  one = Constant <value_int = 1> ()
  column = Constant <value_ints = [1]> ()
  last = Constant <value_ints = [-1]> ()
  n_new = Shape <start = 1, end = 2> (query)
  new = Squeeze (n_new)
  steps = Range (zero, new, one)
  new_less_one = Sub (new, one)
  back = Sub (new_less_one, steps)
  ends = Cast <to = 7> (seqlens_k)
  ends_column = Unsqueeze (ends, column)
  raw_positions = Sub (ends_column, back)
  positions = Max (raw_positions, zero)
{used}
  total = Cast <to = 7> (total_sequence_length)
  keys = Range (zero, total, one)
  queries = Unsqueeze (positions, last)
  ages = Sub (queries, keys)
  causal = GreaterOrEqual (ages, zero)
  window = Constant <value_int: int = @local_window_size> ()
  unbounded = Less (window, zero)
  inside = Less (ages, window)
  near = Or (inside, unbounded)
  seen = And (causal, near)
  mask = Unsqueeze (seen, column)
  output, present_key, present_value = Attention <q_num_heads: int = @num_heads, kv_num_heads: int = @kv_num_heads,
    scale: float = @scale, softcap: float = @softcap> ({q}, {k}, value, mask, past_key, past_value)
}}""")


def _rotated(model: Model, node: NodeProto) -> int | None:
    """How many values of a head turn, where that is not all of them."""
    shapes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in (*model.values, *model.inputs)}
    turned, head_dim = 2 * shapes[node.input[7]][1], shapes[node.input[3]][3]
    return None if turned == head_dim else turned


def _skip_norm(model: Model, node: NodeProto) -> Body:
    return Body("", """SkipSimplifiedLayerNormalization <epsilon>
  (input, skip, gamma) => (output, mean, inv_std_var, input_skip_bias_sum)
{
  input_skip_bias_sum = Add (input, skip)
  output = RMSNormalization <axis = -1, epsilon: float = @epsilon> (input_skip_bias_sum, gamma)
  last = Constant <value_ints = [-1]> ()
  mean = ReduceMean (input_skip_bias_sum, last)
  squares = Mul (input_skip_bias_sum, input_skip_bias_sum)
  mean_square = ReduceMean (squares, last)
  eps = Constant <value_float: float = @epsilon> ()
  safe = Add (mean_square, eps)
  root = Sqrt (safe)
  inv_std_var = Reciprocal (root)
}""")


def _fused_matmul(model: Model, node: NodeProto) -> Body:
    return Body("", """FusedMatMul <transB> (A, B) => (Y)
{
  turned = Transpose <perm = [1, 0]> (B)
  Y = MatMul (A, turned)
}""")


BODIES: dict[str, Callable[[Model, NodeProto], Body]] = {
    "MatMulNBits": _matmul_nbits,
    "MatMulBnb4": _matmul_bnb4,
    "GatherBlockQuantized": _gather_block_quantized,
    "GroupQueryAttention": _group_query_attention,
    "SkipSimplifiedLayerNormalization": _skip_norm,
    "FusedMatMul": _fused_matmul,
    "MoE": _moe,
    "QMoE": _qmoe,
}
