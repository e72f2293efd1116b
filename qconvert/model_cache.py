"""A model by its path, or by its name in the local Hugging Face cache; never the network."""

from __future__ import annotations

import os
import re
from pathlib import Path

from qconvert.errors import InputError


def find_model(text: str) -> Path:
    """A folder or a .gguf as it is, else org/name[@revision] in the local Hugging Face cache; never the network."""
    try:
        path = Path(text).expanduser()
        if path.is_dir() or (path.suffix == ".gguf" and path.is_file()):
            return path
        exists = path.exists()
    except (OSError, RuntimeError) as e:  # a name too long, the home of an unknown user
        raise InputError(f"{text[:200]}: {e.strerror if isinstance(e, OSError) else e}") from e
    if exists:
        raise InputError(f"{text}: is a file; a model folder was wanted", hint=f"give the folder: {path.parent}")
    repo, _, revision = text.partition("@")
    if ".." in text or len(text) > 200 or not re.fullmatch(r"(?:\w[\w.-]*/)?\w[\w.-]*(?:@\w[\w./-]*)?", text):
        raise InputError(f"{text}: no such folder", hint="a folder, or org/name[@revision] in the Hugging Face cache")
    return cached_snapshot(repo, revision or "main")


def cache_folder() -> Path:
    """Where Hugging Face keeps models: HF_HUB_CACHE, else HF_HOME/hub, else ~/.cache/huggingface/hub."""
    env = os.environ
    if cache := env.get("HF_HUB_CACHE") or env.get("HUGGINGFACE_HUB_CACHE"):
        return Path(cache).expanduser()
    home = env.get("HF_HOME") or str(Path(env.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface")
    return Path(home).expanduser() / "hub"


def cached_snapshot(repo: str, revision: str) -> Path:
    """The folder of org/name at a revision. InputError where it is not there."""
    cached = cache_folder() / f"models--{repo.replace('/', '--')}"
    ref = cached / "refs" / revision
    commit = ref.read_text(encoding="utf-8").strip() if ref.is_file() else revision
    have = sorted(p.name for p in (cached / "snapshots").glob("*"))
    matches = [c for c in have if c == commit or (len(commit) >= 7 and c.startswith(commit))]
    if len(matches) == 1:
        return cached / "snapshots" / matches[0]
    message = f"{repo}: no such folder, and not in the Hugging Face cache: looked for {cached}"
    if have:
        message = f"{repo}: revision {revision} is not in the cache {cached}; there are {', '.join(have[:5])}"
    download = f"hf download {repo}" + ("" if revision == "main" else f" --revision {revision}")
    offline = os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "ON", "YES", "TRUE")
    raise InputError(message, hint=download + (" (HF_HUB_OFFLINE is set: unset it first)" if offline else ""))
