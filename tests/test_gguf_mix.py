"""formats/gguf_mix: the type of each tensor equals what llama-quantize itself writes, by cyllama's model_quantize.

cyllama 0.2.18 carries an older llama.cpp than the source that gguf_mix follows. Two differences show: where a row
does not divide into the 32 weights of a Q8_0 or Q4_0 block, the older one stops and the newer one writes F16; and the
older one ignores --tensor-type under --pure.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from qconvert.errors import UnsupportedError, UsageError
from qconvert.formats.gguf_mix import (
    BITS,
    Choice,
    Hyper,
    Options,
    TensorShape,
    choose,
    file_type,
    parse_tensor_type,
    tensor_type,
)
from qconvert.formats.gguf_mix_rules import FILE_TYPES
from qconvert.scheme import SCHEMES

gguf = pytest.importorskip("gguf")


class Shape(NamedTuple):
    """A model as the mixes see it. Two rows a weight are enough: only the row length and the name are looked at."""

    arch: str = "llama"
    layers: int = 2
    heads: int = 8
    kv_heads: int = 8
    experts: int = 0
    width: int = 256
    ffn: int = 512
    tied: bool = False

    @property
    def hyper(self) -> Hyper:
        return Hyper(self.arch, self.layers, self.heads, self.kv_heads, self.experts)

    @property
    def tensors(self) -> list[TensorShape]:
        globals_ = {"token_embd.weight": (2, self.width), "output_norm.weight": (self.width,)}
        if not self.tied:
            globals_["output.weight"] = (2, self.width)
        if self.arch == "gpt2":
            globals_ |= {"position_embd.weight": (2, self.width), "output_norm.bias": (self.width,)}
        shapes: dict[str, tuple[int, ...]] = dict(globals_)
        for i in range(self.layers):
            shapes |= {f"blk.{i}.{name}": shape for name, shape in self._layer()}
        return [TensorShape(name, shape) for name, shape in shapes.items()]

    def _layer(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        qkv = ("qkv",) if self.arch == "gpt2" else ("q", "k", "v")
        for part in (*qkv, "output"):
            yield f"attn_{part}.weight", (2, self.width)
        if self.arch in ("qwen2", "gpt2"):
            yield f"attn_{qkv[0]}.bias", (2,)
        if self.arch == "qwen3":
            yield "attn_q_norm.weight", (self.width,)
        yield from (("attn_norm.weight", (self.width,)), ("ffn_norm.weight", (self.width,)))
        up = ("up",) if self.arch == "gpt2" else ("gate", "up")
        rows = (self.experts, 2) if self.experts else (2,)
        for part, k in (*((p, self.width) for p in up), ("down", self.ffn)):
            yield f"ffn_{part}{'_exps' if self.experts else ''}.weight", (*rows, k)
        if self.experts:
            yield "ffn_gate_inp.weight", (self.experts, self.width)


def write_gguf(path: Path, shape: Shape, dtype: type[np.floating] = np.float16) -> None:
    writer = gguf.GGUFWriter(str(path), shape.arch)
    writer.add_block_count(shape.layers)
    writer.add_context_length(64)
    writer.add_embedding_length(shape.width)
    writer.add_feed_forward_length(shape.ffn)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_vocab_size(2)
    if shape.arch == "gpt2":
        writer.add_layer_norm_eps(1e-5)
    else:
        writer.add_layer_norm_rms_eps(1e-5)
    if shape.experts:
        writer.add_expert_count(shape.experts)
        writer.add_expert_used_count(2)
    for tensor in shape.tensors:
        # what convert_hf_to_gguf keeps in float32, and llama-quantize then leaves alone
        plain = len(tensor.shape) == 1 or any(part in tensor.name for part in ("norm", "gate_inp", "position"))
        writer.add_tensor(tensor.name, np.full(tensor.shape, 0.5, np.float32 if plain else dtype))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class Override(ctypes.Structure):
    """llama.h, struct llama_model_tensor_override."""

    _fields_ = (("pattern", ctypes.c_char_p), ("type", ctypes.c_int))


class Params(ctypes.Structure):
    """llama.h, struct llama_model_quantize_params; it ends cyllama's object, which shows its overrides read-only."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in ("nthread", "ftype", "output_tensor_type", "token_embedding_type")),
        ("flags", ctypes.c_bool * 6),
        *((name, ctypes.c_void_p) for name in ("imatrix", "kv_overrides", "tt_overrides", "prune_layers")),
    )


def ggml_type(name: str) -> int:
    return int(gguf.GGMLQuantizationType[name.upper()])


def llama_quantize(source: Path, target: Path, name: str, options: Options) -> dict[str, str]:
    """The types that llama.cpp's own quantizer writes, read back by gguf-py."""
    llama = pytest.importorskip("cyllama.llama.llama_cpp")
    llama.disable_logging()
    params = llama.LlamaModelQuantizeParams()
    params.ftype, params.nthread = FILE_TYPES[name].id, 1
    params.pure, params.quantize_output_tensor = options.pure, not options.leave_output_tensor
    if options.output_tensor_type:
        params.output_tensor_type = ggml_type(options.output_tensor_type)
    if options.token_embedding_type:
        params.token_embedding_type = ggml_type(options.token_embedding_type)
    if options.tensor_types:
        struct = Params.from_address(id(params) + type(params).__basicsize__ - ctypes.sizeof(Params))
        if (struct.nthread, struct.ftype, struct.tt_overrides) != (1, params.ftype, None):
            pytest.skip("this cyllama lays its parameters out differently")
        overrides = [Override(pattern.encode(), ggml_type(t)) for pattern, t in options.tensor_types]
        table = (Override * (len(overrides) + 1))(*overrides)
        struct.tt_overrides = ctypes.addressof(table)
    llama.model_quantize(str(source), str(target), params)
    return {t.name: t.tensor_type.name.lower() for t in gguf.GGUFReader(target).tensors}


def got(choices: list[Choice]) -> dict[str, str]:
    return {choice.name: choice.got for choice in choices}


def check(folder: Path, shape: Shape, names: list[str], options: Options | None = None) -> None:
    """Our choice equals llama-quantize's for the mixes called `names`."""
    options = options or Options()
    source = folder / "source.gguf"
    write_gguf(source, shape)
    for name in names:
        theirs = llama_quantize(source, folder / f"{name}.gguf", name, options)
        assert got(choose(shape.tensors, FILE_TYPES[name], shape.hyper, options)) == theirs, (name, shape)


NOT_THERE = ("Q2_K_S", "Q1_0", "Q2_0")  # without an imatrix; in that llama.cpp
MIXES = [name for name, file in FILE_TYPES.items() if file.default in SCHEMES and name not in NOT_THERE]  # others: *_imatrix.py
SHAPES = {
    "one-layer": Shape(layers=1),
    "two-layers-tied": Shape(tied=True),
    "nine-layers-gqa4": Shape(layers=9, kv_heads=2),
    "seventeen-layers-gqa8-tied": Shape(layers=17, kv_heads=1, tied=True),
    "mixtral": Shape(layers=9, experts=8, kv_heads=2),
    "four-experts": Shape(layers=9, experts=4),
    "qwen2-rows-of-896": Shape("qwen2", layers=3, heads=14, kv_heads=2, width=896, ffn=4864, tied=True),
    "ffn-rows-of-720": Shape(heads=9, kv_heads=3, ffn=720),
    "rows-of-64": Shape(layers=3, width=64, ffn=192),
    "qwen3": Shape("qwen3", layers=5, kv_heads=2, tied=True),
    "gpt2-fused-qkv": Shape("gpt2", layers=12, tied=True),
}
LARGE = {
    "33-layers": Shape(layers=33, kv_heads=2),
    "65-layers-8-experts": Shape(layers=65, experts=8),
    "70b": Shape(layers=80, kv_heads=1),
    "65b": Shape(layers=80),
    "qwen2-72b": Shape("qwen2", layers=80, kv_heads=1),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_every_mix_chooses_what_llama_quantize_chooses(shape: Shape, tmp_path: Path) -> None:
    of_k = [name for name in MIXES if FILE_TYPES[name].default.endswith("_k")]
    check(tmp_path, shape, of_k if shape.ffn % 32 else MIXES)


def test_mixes_that_the_older_one_lacks() -> None:
    """Source: llama-quant.cpp; embeddings of Q2_0 are Q4_K, and rows that its 64 do not divide Q4_0."""
    for name, embedding in (("Q1_0", "q1_0"), ("Q2_0", "q4_k")):
        types = got(choose(Shape().tensors, FILE_TYPES[name], Shape().hyper))
        assert (types["token_embd.weight"], types["output.weight"]) == (embedding, "q6_k")
        assert types["blk.0.ffn_down.weight"] == name.lower()
    narrow = Shape(width=96)
    assert got(choose(narrow.tensors, FILE_TYPES["Q2_0"], narrow.hyper))["blk.0.attn_q.weight"] == "q4_0"


def test_tensor_types_are_obeyed_under_pure() -> None:
    options = Options(pure=True, tensor_types=(("attn_v", "f16"),))
    types = got(choose(Shape().tensors, FILE_TYPES["Q4_K_M"], Shape().hyper, options))
    assert (types["blk.0.attn_v.weight"], types["output.weight"]) == ("f16", "q4_k")


def test_rows_that_no_block_divides_become_f16() -> None:
    shape = Shape(layers=1, width=720)
    for name in ("Q8_0", "Q4_0", "IQ4_NL"):
        types = got(choose(shape.tensors, FILE_TYPES[name], shape.hyper))
        assert (types["output.weight"], types["blk.0.attn_q.weight"]) == ("f16", "f16")


@pytest.mark.parametrize("shape", LARGE.values(), ids=LARGE)
def test_layer_counts_of_large_models_choose_what_llama_quantize_chooses(shape: Shape, tmp_path: Path) -> None:
    check(tmp_path, shape, ["Q2_K", "Q3_K_S", "Q3_K_M", "Q4_K_S", "Q4_K_M", "Q5_K_M", "IQ4_XS", "TQ1_0", "TQ2_0", "MXFP4_MOE"])


OPTIONS = {
    "pure": Options(pure=True),
    "leave-output-tensor": Options(leave_output_tensor=True),
    "output-tensor-type": Options(output_tensor_type="q5_0"),
    "token-embedding-type": Options(token_embedding_type="q8_0"),
    "tensor-type-first-match-wins": Options(tensor_types=(("blk.0.ffn", "q8_0"), ("ffn_(down|up)", "q5_k"))),
    "typed-tensors-are-not-counted": Options(tensor_types=((r"blk\.[0-3]\.(attn_v|ffn_down)", "q8_0"),)),
    "tensor-type-on-the-embedding": Options(tensor_types=(("token_embd", "q4_0"),), output_tensor_type="q5_1"),
}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options_mean_what_they_mean_to_llama_quantize(options: Options, tied: bool, tmp_path: Path) -> None:
    check(tmp_path, Shape(layers=17, tied=tied), ["Q4_K_M", "Q3_K_M", "Q8_0"], options)


def test_q2_k_s_agrees_where_no_tensor_needs_an_imatrix(tmp_path: Path) -> None:
    check(tmp_path, Shape(layers=17, width=96, ffn=96), ["Q2_K_S"])


@pytest.mark.parametrize("name", ["F32", "F16", "BF16"])
def test_plain_files_keep_vectors_norms_and_positions_in_float32(name: str) -> None:
    types = got(choose(Shape("gpt2", tied=True).tensors, FILE_TYPES[name], Shape("gpt2").hyper))
    assert {types[n] for n in ("output_norm.weight", "blk.0.attn_qkv.bias", "position_embd.weight")} == {"f32"}
    assert {types[n] for n in ("token_embd.weight", "blk.1.ffn_down.weight")} == {name.lower()}


def test_f16_file_is_left_as_it_is_by_llama_quantize(tmp_path: Path) -> None:
    check(tmp_path, Shape(experts=4), ["F16"])


def test_ids_and_default_types_are_ggufs_own() -> None:
    for name, file in FILE_TYPES.items():
        spelled = {"F32": "ALL_F32"}.get(name, f"MOSTLY_{name}")
        if name == "Q2_0":  # 41, of tensors of type 42: this gguf-py knows neither
            continue
        assert gguf.LlamaFileType[spelled] == file.id
        assert file.default.upper() in gguf.GGMLQuantizationType.__members__
    assert set(BITS.values()) <= set(FILE_TYPES)


def test_names_are_found_in_any_case_and_by_their_short_forms() -> None:
    assert file_type("q4_k_m").name == file_type("Q4_K").name == "Q4_K_M"
    assert (file_type("q3_K").name, file_type("bf16").id, tensor_type("Q6_K")) == ("Q3_K_M", 32, "q6_k")


def test_unknown_names_are_answered_with_the_nearest() -> None:
    with pytest.raises(UsageError, match="Q4_K_N") as mix:
        file_type("Q4_K_N")
    assert mix.value.hint is not None and "Q4_K" in mix.value.hint
    with pytest.raises(UsageError) as one:
        tensor_type("q4_k_m")
    assert one.value.hint == "did you mean q4_k?"


def test_fallback_is_shown_as_wanted_and_got() -> None:
    shape = Shape("qwen2", layers=1, width=896, ffn=4864)
    first = choose(shape.tensors, FILE_TYPES["Q4_K_M"], shape.hyper)[0]
    assert first == Choice("output.weight", "q6_k", "q8_0", "row of 896 is no multiple of 256")


def test_fallback_error_names_the_tensor() -> None:
    shape = Shape(width=720, ffn=256)
    with pytest.raises(UnsupportedError, match=r"output.weight: row of 720 .* wanted q6_k, got f16") as e:
        choose(shape.tensors, FILE_TYPES["Q4_K_M"], shape.hyper, Options(fallback="error"))
    assert e.value.exit_code == 5


def test_q2_k_s_without_an_imatrix_is_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"blk.0.attn_k.weight: q2_k in a Q2_K_S file needs an imatrix"):
        choose(Shape().tensors, FILE_TYPES["Q2_K_S"], Shape().hyper)


def test_types_that_were_named_fall_back_too() -> None:
    shape = Shape(width=896)
    types = choose(shape.tensors, FILE_TYPES["Q8_0"], shape.hyper, Options(token_embedding_type="q4_k"))
    assert next(c for c in types if c.name == "token_embd.weight")[1:3] == ("q4_k", "q5_0")


def test_pattern_is_searched_as_written_and_obeyed_in_plain_files() -> None:
    options = Options(tensor_types=((r"attn_\D\.", "q8_0"),))  # llama-quantize would search for attn_\d
    types = got(choose(Shape().tensors, FILE_TYPES["F16"], Shape().hyper, options))
    assert (types["blk.0.attn_k.weight"], types["blk.0.attn_output.weight"]) == ("q8_0", "f16")


def test_pattern_that_matches_nothing_is_an_error() -> None:
    options = Options(tensor_types=(("fnn_down", "q8_0"),))
    with pytest.raises(UsageError, match="fnn_down=q8_0 matches no tensor"):
        choose(Shape(tied=True).tensors, FILE_TYPES["Q4_0"], Shape().hyper, options)


@pytest.mark.parametrize("text", ["ffn_down", "=q8_0", "ffn_(=q8_0", "ffn=q9"])
def test_malformed_tensor_type_is_a_usage_error(text: str) -> None:
    with pytest.raises(UsageError):
        parse_tensor_type(text)


def test_tensor_type_is_split_at_its_last_equals_sign() -> None:
    assert parse_tensor_type("a=b=Q6_K") == ("a=b", "q6_k")


def test_weight_of_one_row_is_a_vector() -> None:
    assert got(choose([TensorShape("blk.0.attn_q.weight", (1, 256))], FILE_TYPES["Q4_0"], Shape().hyper)) == {
        "blk.0.attn_q.weight": "f32"
    }
