"""Let llama.cpp continue a text with a GGUF file: python tools/say.py FILE "some words"."""

from __future__ import annotations

import sys
from pathlib import Path

from qconvert.formats.llama_cpp import LlamaCpp


def say(path: Path, text: str, n: int = 40) -> str:
    """At most n tokens, greedily."""
    model = LlamaCpp().open(path, 256, 2)
    try:
        tokens = model.generate(model.tokenize(text, True, False), n)
        return text + b"".join(model.piece(t) for t in tokens if not model.is_eog(t)).decode("utf-8", "replace")
    finally:
        model.close()


if __name__ == "__main__":
    print(say(Path(sys.argv[1]), sys.argv[2]))
