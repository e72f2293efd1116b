"""Plain (unquantized) dtypes: their names, sizes and spellings elsewhere."""

from __future__ import annotations

from typing import NamedTuple


class DType(NamedTuple):
    nbytes: int
    safetensors: str
    numpy: str  # bf16 has no numpy dtype: it travels as the bits, uint16
    torch: str


DTYPES: dict[str, DType] = {
    "f64": DType(8, "F64", "float64", "float64"),
    "f32": DType(4, "F32", "float32", "float32"),
    "f16": DType(2, "F16", "float16", "float16"),
    "bf16": DType(2, "BF16", "uint16", "bfloat16"),
    "i64": DType(8, "I64", "int64", "int64"),
    "i32": DType(4, "I32", "int32", "int32"),
    "i8": DType(1, "I8", "int8", "int8"),
    "u32": DType(4, "U32", "uint32", "uint32"),
    "f8_e4m3": DType(1, "F8_E4M3", "uint8", "float8_e4m3fn"),  # as its bits
    "u8": DType(1, "U8", "uint8", "uint8"),
    "bool": DType(1, "BOOL", "bool", "bool"),
}
FLOATS = ("f64", "f32", "f16", "bf16")
FROM_SAFETENSORS = {d.safetensors: name for name, d in DTYPES.items()}
FROM_TORCH = {d.torch: name for name, d in DTYPES.items()}
