"""A web page saved as config.json."""

from pathlib import Path

from safetensors_writer import write_model

from qconvert.errors import InputError

ERROR, SAYS = InputError, "config.json: not valid JSON"


def make(folder: Path) -> None:
    write_model(folder)
    (folder / "config.json").write_text("<html>401 Unauthorized</html>")
