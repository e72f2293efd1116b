"""How a folder of ONNX is run, for its model card."""

from __future__ import annotations

import json

from qconvert.usage import Command, Made, Usage

GENAI = """import onnxruntime_genai as og

model = og.Model({folder})
tokenizer = og.Tokenizer(model)
params = og.GeneratorParams(model)
params.set_search_options(max_length=64)
generator = og.Generator(model, params)
generator.append_tokens(tokenizer.encode("Once upon a time"))
while not generator.is_done():
    generator.generate_next_token()
print(tokenizer.decode(generator.get_sequence(0)))"""
SESSION = """import onnxruntime

session = onnxruntime.InferenceSession({file})
print([(i.name, i.type, i.shape) for i in session.get_inputs()])"""
BROWSER = """import {{ pipeline }} from "@huggingface/transformers";

const run = await pipeline({task}, {folder}, {{ dtype: {dtype} }});
console.log(await run("Once upon a time"));"""


def usage(made: Made) -> Usage:
    models = [f for f in made.files if f.endswith(".onnx")]
    model, task = models[0], made.task or "feature-extraction"
    folder = made.folder or "."
    if model.startswith("onnx/"):  # the layout of transformers.js: onnx/model_DTYPE.onnx
        dtype = model.removeprefix("onnx/model").removesuffix(".onnx").removeprefix("_") or "fp32"
        code = BROWSER.format(task=json.dumps(task), folder=json.dumps(folder), dtype=json.dumps(dtype))
        return Usage("transformers.js", (Command("transformers.js", "js", code),))
    session = Command("onnxruntime", "python", SESSION.format(file=json.dumps(f"{folder}/{model}")))
    genai = Command("onnxruntime-genai", "python", GENAI.format(folder=json.dumps(folder)))
    return Usage("onnx", (genai, session) if "genai_config.json" in made.files else (session,))
