"""A .bin whose pickle runs a command when it is loaded."""

import pickle
from pathlib import Path

from safetensors_writer import write_model

from qconvert.errors import InputError

ERROR, SAYS = InputError, "system; it was not executed"


def make(folder: Path) -> None:
    write_model(folder).unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(folder.parent / "executed"), protocol=2))


class Bomb:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, ...]:
        import os

        return os.system, (f"touch {self.marker}",)
