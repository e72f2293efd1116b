"""tests/plugin as pip would install it: its package and the entry points of its pyproject.toml, in a folder for sys.path."""

from __future__ import annotations

import importlib
import sys
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qconvert import registry
from qconvert.layouts import layout_of
from qconvert.scheme import scheme_of

KNOWN = (registry.entries, scheme_of, layout_of)  # what is kept of names
PLUGIN = Path(__file__).parent / "plugin"


def install(folder: Path, files: dict[str, str] | None = None) -> Path:
    """`files` by their paths in the plugin's folder; None: those that lie there."""
    if files is None:
        files = {str(p.relative_to(PLUGIN)): p.read_text("utf-8") for p in PLUGIN.rglob("*") if p.suffix in (".py", ".toml")}
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    project = tomllib.loads(files["pyproject.toml"])["project"]
    name, version = project["name"], project["version"]
    about = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    groups = project["entry-points"].items()
    lines = (line for group, points in groups for line in (f"[{group}]", *(f"{k} = {v}" for k, v in points.items())))
    (about / "entry_points.txt").write_text("\n".join(lines) + "\n")
    return folder


@contextmanager
def refreshed(site: Path) -> Iterator[None]:
    """Packages in `site` are found, and come before others, for a while."""
    sys.path.insert(0, str(site))
    forget()
    yield
    sys.path.remove(str(site))
    forget()


def forget() -> None:
    for known in KNOWN:
        known.cache_clear()
    for name in [m for m in sys.modules if m.startswith("qconvert_example")]:
        del sys.modules[name]
    importlib.invalidate_caches()
