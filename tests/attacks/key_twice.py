"""One name twice: two readers would disagree on its values."""

import json
from pathlib import Path

from safetensors_writer import WEIGHTS, entries, write_model, write_raw

from qconvert.errors import InputError

ERROR, SAYS = InputError, "'a.weight' occurs twice"


def make(folder: Path) -> None:
    table = json.dumps(entries(WEIGHTS))
    write_raw(write_model(folder), f"{table[:-1]}, {table[1:]}".encode(), bytes(64))
