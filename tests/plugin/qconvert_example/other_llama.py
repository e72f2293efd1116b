"""A family: a llama by another name, whose config.json calls the feed-forward width ffn_dim."""

from dataclasses import replace

from qconvert.families import LLAMA, key, keys_of

OTHER_LLAMA = replace(
    LLAMA,
    name="otherllama",
    model_type="otherllama",
    hf=("OtherLlamaForCausalLM",),
    config=keys_of(LLAMA, ffn=key("ffn_dim")),
)
