"""Models in the local Hugging Face cache; never the network."""

from __future__ import annotations

import os
from pathlib import Path

from qconvert.errors import InputError


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
