"""What cannot work is refused before the first byte: outputs that exist, places without permission or room, little memory."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

from qconvert.emit import Plan
from qconvert.errors import ResourceError, UsageError

WORKING_NBYTES = 400 << 20  # interpreter, libraries and row blocks of two threads


def preflight(plan: Plan, force: bool) -> None:
    """Refuse what cannot work before the first byte: existing outputs, folders without write permission, full disks."""
    for file in plan.files:
        if file.path.is_dir():
            raise UsageError(f"{file.path} is a folder", hint="-o FILE")
        if file.path.exists() and not force:
            raise UsageError(f"{file.path} exists already", hint="--force overwrites it; -o FILE writes elsewhere")
    folder = plan.place
    for place in {file.path.parent for file in plan.files if plan.folder} | ({plan.folder} if plan.folder else set()):
        if place.exists() and not place.is_dir():
            raise UsageError(f"{place} is a file; the output is a folder", hint="-o FOLDER")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise ResourceError(f"cannot make the folder {folder}: {e.strerror}", hint="-o FILE writes elsewhere") from e
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ResourceError(f"cannot write into {folder}: permission denied", hint="-o FILE writes elsewhere")
    refuse_full_disks([plan])


def refuse_full_disks(plans: Sequence[Plan]) -> None:
    """ResourceError where the outputs that lie on one disk do not fit there together; their folders are there."""
    disks: dict[int, list[Plan]] = {}
    for plan in plans:
        disks.setdefault(plan.place.stat().st_dev, []).append(plan)
    for found in disks.values():
        place, nbytes, free = found[0].place, sum(plan.nbytes for plan in found), shutil.disk_usage(found[0].place).free
        if free < nbytes:
            need = "the output needs" if len(found) == 1 else f"the {len(found)} outputs need"
            raise ResourceError(
                f"{place} has {free / 1e9:.2f} GB free, {need} {nbytes / 1e9:.2f} GB",
                hint="fewer bits, or -o on another disk",
            )


def refuse_same_place(plans: Sequence[Plan]) -> None:
    """UsageError where two outputs would be one file, or one lies in the other's folder."""
    for a, b in combinations(plans, 2):
        for one, other in ((places(a), places(b)), (places(b), places(a))):
            if path := next((p for p in one if other & {p, *p.parents}), None):
                raise UsageError(f"two outputs are to be written to {path}", hint="say `output` beside each, in a recipe")


def places(plan: Plan) -> set[Path]:
    return {path.resolve() for path in plan.paths}


def check_memory() -> None:
    """ResourceError before the first byte where the machine has too little left to start."""
    try:
        meminfo = Path("/proc/meminfo").read_text()
    except OSError:
        return
    available = next((int(line.split()[1]) << 10 for line in meminfo.splitlines() if line.startswith("MemAvailable")), None)
    if available is not None and available < WORKING_NBYTES:
        raise ResourceError(
            f"{available >> 20} MB of memory are free, {WORKING_NBYTES >> 20} MB are needed",
            hint="close something; the model's size does not matter",
        )
