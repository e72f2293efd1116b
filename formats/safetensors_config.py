"""config.json of what is written: the model's own, with what adapters and the output change."""

from __future__ import annotations

from collections.abc import Mapping

from qconvert.companions import n_vocab
from qconvert.errors import UnsupportedError
from qconvert.graph import Graph
from qconvert.passes.untie_head import is_tied
from qconvert.stored_forms import SAID_IN
from qconvert.target import Source

TORCH: Mapping[str, str] = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}
TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def config_of(source: Source, graph: Graph, dtype: str) -> dict[str, object]:
    """dtype: of the weights that are not quantized. UnsupportedError where the model has what config.json cannot say."""
    config = {k: v for k, v in source.checkpoint.config.items() if k not in SAID_IN}
    if source.checkpoint.gguf is not None:  # its special tokens stand apart
        config |= {k: source.checkpoint.generation_config.get(k) for k in TOKENS}
    if new := new_biases(source, graph):
        raise UnsupportedError(
            f"{new[0]}: the adapter trained a bias where the model has none, which config.json cannot say",
            hint="--to gguf, or --to onnx",
        )
    spelled = "torch_dtype" if "torch_dtype" in config and "dtype" not in config else "dtype"
    config[spelled] = TORCH[dtype]
    if "vocab_size" in config:
        config["vocab_size"] = n_vocab(graph)
    if not is_tied(graph):
        config["tie_word_embeddings"] = False
    return config


def new_biases(source: Source, graph: Graph) -> list[str]:
    """Biases of the graph that its base has not."""
    had = set(source.base.parameters())
    return [name for name in graph.parameters() if name.endswith(".bias") and name not in had]
