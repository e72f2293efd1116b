"""A checkpoint of EETQ: its weights are no longer what was trained."""

from pathlib import Path

from safetensors_writer import write_model

from qconvert.errors import UnsupportedError

ERROR, SAYS = UnsupportedError, "already quantized (eetq)"


def make(folder: Path) -> None:
    write_model(folder)
    (folder / "config.json").write_text('{"quantization_config": {"quant_method": "eetq"}}')
