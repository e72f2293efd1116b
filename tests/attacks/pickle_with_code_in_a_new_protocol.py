"""The same in a pickle protocol that torch.save does not use."""

import pickle
from pathlib import Path

from safetensors_writer import write_model

from attacks.pickle_with_code import Bomb
from qconvert.errors import InputError

ERROR, SAYS = InputError, "a pickle of tensors alone; it was not executed"


def make(folder: Path) -> None:
    write_model(folder).unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(folder.parent / "executed")))
