"""How a GGUF is run, for its model card."""

from __future__ import annotations

import json
import shlex

from qconvert.usage import Command, Made, Usage


def usage(made: Made) -> Usage:
    file = made.files[0]
    path = shlex.quote(file if not file.startswith("-") else f"./{file}")
    if made.task != "text-generation":
        return Usage("gguf", (Command("llama.cpp", "sh", f'llama-embedding -m {path} -p "A sentence"'),))
    python = f'from llama_cpp import Llama\n\nprint(Llama({json.dumps(file)})("Once upon a time", max_tokens=64))'
    name = shlex.quote(made.name.lower())
    ollama = f"ollama create {name} -f {shlex.quote(made.modelfile)}\nollama run {name}" if made.modelfile else ""
    found = (
        Command("llama.cpp", "sh", f'llama-cli -m {path} -p "Once upon a time"\nllama-server -m {path}'),
        Command("llama-cpp-python", "python", python),
        Command("Ollama", "sh", ollama or f"echo {shlex.quote(f'FROM ./{file}')} > Modelfile\nollama create {name}\n"
                f"ollama run {name}"),
    )  # fmt: skip
    return Usage("gguf", found)
