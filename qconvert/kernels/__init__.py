"""Compiled CPU kernels (numba): arrays in, arrays out; numba is imported on first use.

search(scheme, x f32[N,K], importance=f32[K] or None) -> u8[N, row nbytes]: ggml's reference quantizer, byte for byte
lsq(scheme, x f32[N,K], importance=f32[K] or None) -> codes i8 or u8[N,K], scales f32[N,K/group]: least squared error
widen_bf16(u16[...]) -> f32[...]                     exact
widen_and_check(u16[...]) -> f32[...], bool          the same, and whether all are finite
narrow_bf16(f32[...]) -> u16[...]                    round to nearest even
affine(x f32[N,K], group, bits, zero_point) -> packed u8[N,K*bits/8], scales f32[N,K/group], zeros: least squared error
affine_codes(x f32[N,K], group, bits, scales, zeros) -> packed u8[N,K*bits/8]: the nearest codes
table_codes(x f32[N,K], group, table) -> the same for 16 levels, zeros f32[N,0]
group_peaks(x f32[N,K], group) -> f32[N,K/group]     greatest magnitudes
scales_of(peaks, steps, dtype) -> f32[...]           peaks / steps as `dtype` holds them; mx_exponents: as powers of two
e4m3_codes, int8_codes(x f32[N,K], scales f32[N,K/group], group) -> u8, i8[N,K]
nvfp4(x f32[N,K], divisor), mxfp4(x) -> packed u8[N,K/2], codes of scales u8[N,K/group]
block_codes(x f32[N,K], group, table) -> packed u8[N,K/2], scales f32[N,K/group]: bitsandbytes' NF4 and FP4, byte for byte
block_peaks(x f32[N,K], group) -> f32[N,K/group]     greatest magnitudes
nested_codes(v f32[n], levels) -> codes u8[n], scales f32[n/256]: bitsandbytes' second level, byte for byte
int8_rows(x f32[N,K]) -> codes i8[N,K], peaks f32[N]: bitsandbytes' 8 bits, byte for byte
mlx_affine(x f32[N,K], group, bits) -> packed u8[N,K*bits/8], scales, biases f32[N,K/group]: mx.quantize, byte for byte
line_codes(x f32[N,K], group, bits, scales, biases) -> packed u8[N,K*bits/8]: the nearest codes
recover(x f32[N,K], group, low, high, dtype) -> codes, scales, found: the grid that weights lie on
ternary_codes(x f32[N,K], factor) -> i8[N,K]         -1, 0 and 1
magnitude_sums(f32[N,K]) -> f64[N]
e8p_nearest(x f32[N,K], scale) -> i8[N,K]            the nearest points of QuIP#'s lattice, in quarters
e8p_points(codes u16[N,K/8]) -> i8[N,K]; e8p_codes(points) -> codes
incoherent, coherent(x[N,K], su[K], sv[N]) -> x      turned by Hadamard matrices and back, in place
known_width(n) -> bool                               whether quip-sharp has the matrix of that order
add_low_rank(w f32[N,K], a f32[r,K], b f32[N,r], scale) -> w, changed in place: w += scale * b @ a
row_norms(f32[N,K]) -> f64[N]
all_finite(x) -> bool
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qconvert.kernels.affine_nearest import affine_codes as affine_codes
    from qconvert.kernels.affine_quants import affine as affine
    from qconvert.kernels.bnb_quants import block_codes as block_codes
    from qconvert.kernels.bnb_quants import block_peaks as block_peaks
    from qconvert.kernels.bnb_quants import dynamic_map as dynamic_map
    from qconvert.kernels.bnb_quants import int8_rows as int8_rows
    from qconvert.kernels.bnb_quants import nested_codes as nested_codes
    from qconvert.kernels.float_quants import e4m3_codes as e4m3_codes
    from qconvert.kernels.float_quants import group_peaks as group_peaks
    from qconvert.kernels.float_quants import int8_codes as int8_codes
    from qconvert.kernels.float_quants import mx_exponents as mx_exponents
    from qconvert.kernels.float_quants import mxfp4 as mxfp4
    from qconvert.kernels.float_quants import nvfp4 as nvfp4
    from qconvert.kernels.float_quants import scales_of as scales_of
    from qconvert.kernels.ggml_search import search as search
    from qconvert.kernels.grid_recovery import recover as recover
    from qconvert.kernels.hadamard import coherent as coherent
    from qconvert.kernels.hadamard import incoherent as incoherent
    from qconvert.kernels.hadamard import known_width as known_width
    from qconvert.kernels.lattice import e8p_codes as e8p_codes
    from qconvert.kernels.lattice import e8p_nearest as e8p_nearest
    from qconvert.kernels.lattice import e8p_points as e8p_points
    from qconvert.kernels.line_quants import line_codes as line_codes
    from qconvert.kernels.line_quants import mlx_affine as mlx_affine
    from qconvert.kernels.real import add_low_rank as add_low_rank
    from qconvert.kernels.real import all_finite as all_finite
    from qconvert.kernels.real import narrow_bf16 as narrow_bf16
    from qconvert.kernels.real import row_norms as row_norms
    from qconvert.kernels.real import widen_and_check as widen_and_check
    from qconvert.kernels.real import widen_bf16 as widen_bf16
    from qconvert.kernels.table_quants import table_codes as table_codes
    from qconvert.kernels.ternary_quants import magnitude_sums as magnitude_sums
    from qconvert.kernels.ternary_quants import ternary_codes as ternary_codes

_REAL = ("add_low_rank", "all_finite", "narrow_bf16", "row_norms", "widen_and_check", "widen_bf16")
_FLOATS = ("e4m3_codes", "group_peaks", "int8_codes", "mx_exponents", "mxfp4", "nvfp4", "scales_of")
_WHERE = dict.fromkeys(_REAL, "real") | dict.fromkeys(_FLOATS, "float_quants") | {
    "search": "ggml_search", "affine": "affine_quants", "affine_codes": "affine_nearest", "table_codes": "table_quants",
    "recover": "grid_recovery",
}  # fmt: skip
_BNB = ("block_codes", "block_peaks", "dynamic_map", "int8_rows", "nested_codes")
_WHERE |= dict.fromkeys(_BNB, "bnb_quants") | dict.fromkeys(("mlx_affine", "line_codes"), "line_quants")
_LATTICE = ("e8p_codes", "e8p_nearest", "e8p_points")
_WHERE |= dict.fromkeys(_LATTICE, "lattice") | dict.fromkeys(("coherent", "incoherent", "known_width"), "hadamard")
_WHERE |= dict.fromkeys(("ternary_codes", "magnitude_sums"), "ternary_quants")


def __getattr__(name: str) -> object:
    if name not in _WHERE:
        raise AttributeError(f"module 'qconvert.kernels' has no attribute {name!r}")
    value: object = getattr(import_module(f"qconvert.kernels.{_WHERE[name]}"), name)
    globals()[name] = value
    return value
