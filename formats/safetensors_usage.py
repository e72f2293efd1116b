"""How a folder of safetensors is run, for its model card: by the library whose dialect it is in."""

from __future__ import annotations

import json
import shlex

from qconvert.usage import Command, Made, Usage

# beginnings of dialects' names -> what transformers wants beside itself to run them
TRANSFORMERS = {
    "w4a16": "compressed-tensors", "w8a": "compressed-tensors", "fp8": "compressed-tensors", "nvfp4": "compressed-tensors",
    "mxfp": "compressed-tensors", "gptq": "gptqmodel", "awq": "gptqmodel", "nf4": "bitsandbytes", "fp4": "bitsandbytes",
    "int8-bnb": "bitsandbytes", "torchao": "torchao", "finegrained": "accelerate", "bitnet": "", "fp16": "", "bf16": "",
    "fp32": "",
}  # fmt: skip
VLLM = ("w4a16", "w8a", "fp8", "nvfp4", "mxfp", "gptq", "awq", "fp16", "bf16", "fp32")
GENERATE = """from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained({folder}, dtype="auto")
tokenizer = AutoTokenizer.from_pretrained({folder})
tokens = tokenizer("Once upon a time", return_tensors="pt").to(model.device)
print(tokenizer.decode(model.generate(**tokens, max_new_tokens=64)[0]))"""
EMBED = """from transformers import AutoModel, AutoTokenizer

model, tokenizer = AutoModel.from_pretrained({folder}), AutoTokenizer.from_pretrained({folder})
print(model(**tokenizer("A sentence", return_tensors="pt")).last_hidden_state.shape)"""


def usage(made: Made) -> Usage:
    """No command where no library loads the folder whole: hqq's and QuIP#'s."""
    folder, chats = made.folder or ".", made.task == "text-generation"
    quoted = shlex.quote(folder)
    if made.quant.startswith("mlx"):
        return Usage("mlx", (Command("mlx-lm", "sh", f'mlx_lm.generate --model {quoted} --prompt "Once upon a time"'),))
    found = []
    extra = next((package for start, package in TRANSFORMERS.items() if made.quant.startswith(start)), None)
    if extra is not None:
        code = (GENERATE if chats else EMBED).format(folder=json.dumps(folder))
        found.append(Command(f"transformers{f' with {extra}' if extra else ''}", "python", code))
    if chats and made.quant.startswith(VLLM):
        found.append(Command("vLLM", "sh", f"vllm serve {quoted}"))
    return Usage("transformers", tuple(found))
