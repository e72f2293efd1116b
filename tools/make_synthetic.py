"""Make large random checkpoints for benchmarks: sharded bf16 Llamas with a tokenizer, and LoRAs on all their linears.

    python tools/make_synthetic.py FOLDER --billions 0.5      # FOLDER/model, FOLDER/adapter: 1 GB; also 0.25, 0.7, 2
    python tools/make_synthetic.py FOLDER --billions 70       # headers only, sparse files: for --dry-run

Written a few MB at a time. Weights are windows of one pool of normal numbers, so that making them costs little.
"""

from __future__ import annotations

import argparse
import json
import math
import sysconfig
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt

SEED = 20260
POOL = 1 << 22  # normal numbers
SHARD_NBYTES = 500_000_000


class Shapes(NamedTuple):
    """A Llama's dimensions; rows are multiples of 256, and the head is its own tensor."""

    width: int
    ffn: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int = 32_000

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """[N, K] of a layer's seven linears, by their names in the checkpoint."""
        kv = self.width // self.heads * self.kv_heads
        return {
            "self_attn.q_proj": (self.width, self.width),
            "self_attn.k_proj": (kv, self.width),
            "self_attn.v_proj": (kv, self.width),
            "self_attn.o_proj": (self.width, self.width),
            "mlp.gate_proj": (self.ffn, self.width),
            "mlp.up_proj": (self.ffn, self.width),
            "mlp.down_proj": (self.width, self.ffn),
        }

    @property
    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Every tensor of the checkpoint in its usual order."""
        out: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab, self.width)}
        for i in range(self.layers):
            layer = f"model.layers.{i}."
            out |= {f"{layer}{name}.weight": shape for name, shape in self.linears.items()}
            out |= {f"{layer}{name}.weight": (self.width,) for name in ("input_layernorm", "post_attention_layernorm")}
        return out | {"model.norm.weight": (self.width,), "lm_head.weight": (self.vocab, self.width)}


SHAPES = {
    0.25: Shapes(width=1024, ffn=2816, layers=16, heads=16, kv_heads=4),
    0.7: Shapes(width=1536, ffn=4096, layers=24, heads=24, kv_heads=6),
    0.5: Shapes(width=1024, ffn=4096, layers=28, heads=16, kv_heads=4),
    2.0: Shapes(width=2048, ffn=8192, layers=30, heads=32, kv_heads=8),
    70.0: Shapes(width=8192, ffn=28672, layers=80, heads=64, kv_heads=8, vocab=128_256),
}


def make_checkpoint(folder: Path, shapes: Shapes = SHAPES[0.5]) -> None:
    """A random checkpoint in `folder`: config, tokenizer, index and bf16 shards of about 500 MB."""
    _write_checkpoint(folder, shapes, sparse=False)


def make_index_70b(folder: Path) -> None:
    """The headers of a 70B Llama's shards. Their data are holes: 141 GB by `ls`, almost nothing on disk."""
    _write_checkpoint(folder, SHAPES[70.0], sparse=True)


def make_adapter(folder: Path, shapes: Shapes = SHAPES[0.5], rank: int = 16, sparse: bool = False) -> None:
    """A random LoRA on all seven linears, as PEFT saves it: float32, A and B both non-zero; or its header only."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, tuple[int, ...]] = {}
    for i in range(shapes.layers):
        for name, (n, k) in shapes.linears.items():
            prefix = f"base_model.model.model.layers.{i}.{name}"
            tensors |= {f"{prefix}.lora_A.weight": (rank, k), f"{prefix}.lora_B.weight": (n, rank)}
    write_safetensors(folder / "adapter_model.safetensors", tensors, "F32", sparse)
    config = {
        "base_model_name_or_path": "synthetic",
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "lora_alpha": 2 * rank,
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "r": rank,
        "target_modules": sorted(name.partition(".")[2] for name in shapes.linears),
        "task_type": "CAUSAL_LM",
    }
    _write_json(folder / "adapter_config.json", config)


def write_safetensors(path: Path, tensors: Mapping[str, tuple[int, ...]], dtype: str, sparse: bool = False) -> None:
    """Random tensors of those shapes, a few MB at a time; norms are ones. dtype: BF16 or F32. sparse: header only."""
    itemsize = {"BF16": 2, "F32": 4}[dtype]
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in tensors.items():
        begin, end = end, end + math.prod(shape) * itemsize
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        if sparse:
            file.truncate(8 + len(text) + end)
        else:
            _write_values(file, tensors, dtype)


def _write_values(file: BinaryIO, tensors: Mapping[str, tuple[int, ...]], dtype: str) -> None:
    pool = np.random.default_rng(SEED).standard_normal(POOL, np.float32) * np.float32(0.02)
    values = _as_bf16(pool) if dtype == "BF16" else pool
    start = 0
    for name, shape in tensors.items():
        if name.endswith("norm.weight"):
            ones = np.ones(shape, np.float32)
            file.write((_as_bf16(ones) if dtype == "BF16" else ones).tobytes())
            continue
        for part in _windows(math.prod(shape), start):
            file.write(values[part].tobytes())
        start = (start + 7919 * 8) % POOL  # another place for each tensor, so that no two are alike


def _windows(n: int, start: int) -> Iterator[slice]:
    """Slices of the pool that together hold n numbers, the first from `start` on."""
    while n:
        length = min(n, POOL - start)
        yield slice(start, start + length)
        n, start = n - length, 0


def _as_bf16(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """Rounded to nearest, ties to even."""
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def _write_checkpoint(folder: Path, shapes: Shapes, sparse: bool) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    shards = _shards(shapes.tensors, SHARD_NBYTES * (10 if sparse else 1))
    where: dict[str, str] = {}
    for i, tensors in enumerate(shards, 1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(folder / file, tensors, "BF16", sparse)
        where |= dict.fromkeys(tensors, file)
    total = sum(2 * math.prod(shape) for shape in shapes.tensors.values())
    _write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": where})
    _write_json(folder / "config.json", _config(shapes))
    _write_tokenizer(folder)


def _shards(tensors: Mapping[str, tuple[int, ...]], nbytes: int) -> list[dict[str, tuple[int, ...]]]:
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    filled = 0
    for name, shape in tensors.items():
        if shards[-1] and filled + 2 * math.prod(shape) > nbytes:
            shards.append({})
            filled = 0
        shards[-1][name] = shape
        filled += 2 * math.prod(shape)
    return shards


def _config(shapes: Shapes) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "bos_token_id": 0,
        "eos_token_id": 1,
        "hidden_act": "silu",
        "hidden_size": shapes.width,
        "intermediate_size": shapes.ffn,
        "max_position_embeddings": 4096,
        "model_type": "llama",
        "num_attention_heads": shapes.heads,
        "num_hidden_layers": shapes.layers,
        "num_key_value_heads": shapes.kv_heads,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vocab_size": shapes.vocab,
    }


def _write_tokenizer(folder: Path) -> None:
    """A byte-level BPE of 32,000 tokens, trained on the standard library's source: converters spend time on it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=32_000,
        special_tokens=["<|begin_of_text|>", "<|end_of_text|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    tokenizer.train([str(file) for file in files], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(
        folder / "tokenizer_config.json",
        {
            "bos_token": "<|begin_of_text|>",
            "eos_token": "<|end_of_text|>",
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": 4096,
        },
    )


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", "utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path, help="model/ and adapter/ are written into it")
    parser.add_argument("--billions", type=float, choices=sorted(SHAPES), default=0.5)
    options = parser.parse_args()
    shapes = SHAPES[options.billions]
    sparse = options.billions == 70
    if sparse:
        make_index_70b(options.folder / "model")
    else:
        make_checkpoint(options.folder / "model", shapes)
    make_adapter(options.folder / "adapter", shapes, sparse=sparse)


if __name__ == "__main__":
    main()
