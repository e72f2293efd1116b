"""GPTQ's tensors as codes and metadata: bit streams along columns of int32 words.

qweight i32[K * bits / 32, N], qzeros i32[G, N * bits / 32], scales [G,N], g_idx i32[K]; W[n,k] = scale * (code - zero) of
group g_idx[k].  Source: AutoGPTQ's and GPTQModel's pack(); a stream is little endian, the first value in the low bits.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from qconvert.scheme import F32, Array, Bytes


class Words(NamedTuple):
    """Columns of the stored tensors: qweight's of some rows of the weight, qzeros' that hold their zero points."""

    qweight: Array
    qzeros: Array
    scales: Array
    first: int  # row of the weight that qzeros begins with


class Codes(NamedTuple):
    """codes u8[N,K] as stored, zeros u8[N,G], scales f32[N,G]."""

    codes: Bytes
    zeros: Bytes
    scales: F32


PER_RUN = 32  # values that fill whole words, whatever their bits


def unpacked(words: Words, bits: int, begin: int, end: int, minus_one: bool) -> Codes:
    """Rows begin..end. minus_one: zero points are stored less one, 0 as the largest code."""
    codes = stream(words.qweight, bits)
    zeros = stream(np.ascontiguousarray(words.qzeros.T), bits)[begin - words.first : end - words.first]
    if minus_one:
        zeros = (zeros + np.uint8(1)) & np.uint8((1 << bits) - 1)
    scales = np.ascontiguousarray(words.scales.T, np.float32)
    return Codes(np.ascontiguousarray(codes.T), zeros, scales)


def stream(words: Array, bits: int) -> Bytes:
    """Values of `bits` bits along the first axis: i32[m,n] -> u8[m * 32 / bits, n]."""
    m, n = words.shape
    unsigned = words.view(np.uint32)
    if 32 % bits == 0:
        shifts = np.arange(0, 32, bits, dtype=np.uint32)[:, None]
        return (unsigned[:, None] >> shifts & np.uint32((1 << bits) - 1)).astype(np.uint8).reshape(-1, n)
    raw = np.ascontiguousarray(unsigned.astype("<u4")).view(np.uint8).reshape(m, n, 4).transpose(0, 2, 1).reshape(-1, n)
    single = np.unpackbits(raw, axis=0, bitorder="little").reshape(-1, bits, n)
    value: Bytes = (single << np.arange(bits, dtype=np.uint8)[:, None]).sum(1, dtype=np.uint8)
    return value


def zero_words(bits: int, begin: int, end: int, n_words: int) -> tuple[int, int, int]:
    """(first word, last word, first row): words of qzeros that hold the zero points of rows begin..end."""
    first = begin // PER_RUN * PER_RUN
    return first * bits // 32, min(n_words, -(-end // PER_RUN) * bits), first
