"""What a GGUF may mix: the types that each tensor can have, their bytes, and llama-quantize's mixes beside them."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

from qconvert.errors import QConvertError
from qconvert.formats import gguf_mix
from qconvert.formats.gguf_mix import PLAIN, Hyper, TensorShape
from qconvert.formats.gguf_mix_rules import FILE_TYPES, FileType
from qconvert.gguf_reader import ALIGNMENT, row_nbytes
from qconvert.scheme import GGML_SCHEMES, SCHEMES
from qconvert.target import Menu

MIXED = "mixed"


def menu(tensors: Mapping[str, TensorShape], file: FileType, hyper: Hyper, options: gguf_mix.Options) -> Menu:
    """tensors: by parameter. What the user typed by name has that type alone; types of codebooks are for tensors of which
    options.imatrix says something."""
    mix = gguf_mix.Mix(file, hyper, options, list(tensors.values()))
    sizes: dict[str, dict[str, int]] = {}
    for parameter, tensor in tensors.items():
        if gguf_mix.quantizable(tensor):
            pinned = options.leave_output_tensor and tensor.name == "output.weight" and options.unquantized
            said = pinned or mix.explicit(tensor.name)
            types = [gguf_mix.fitting(tensor, said).got] if said else types_of(tensor, tensor.name in (options.imatrix or ()))
            sizes[parameter] = dict(sorted(((t, padded(t, tensor.shape)) for t in types), key=lambda each: each[1]))
    return Menu(sizes, stock(tensors, sizes, hyper, options))


def types_of(tensor: TensorShape, weighted: bool) -> list[str]:
    schemes = GGML_SCHEMES if weighted else SCHEMES
    return [*(name for name, scheme in schemes.items() if tensor.shape[-1] % scheme.block == 0), "f16"]


def padded(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes up to the next tensor."""
    nbytes = math.prod(shape[:-1]) * row_nbytes(dtype, shape[-1])
    return nbytes + -nbytes % ALIGNMENT


def stock(
    tensors: Mapping[str, TensorShape], sizes: Mapping[str, Mapping[str, int]], hyper: Hyper, options: gguf_mix.Options
) -> dict[str, dict[str, str]]:
    """Mixes that give every tensor a type of the menu; q4_0 in place of q2_k, where rows are short, is on it too."""
    parameters, found = {t.name: p for p, t in tensors.items()}, dict[str, dict[str, str]]()
    for name, file in FILE_TYPES.items():
        if file.default in PLAIN:
            continue
        try:
            choices = gguf_mix.choose(list(tensors.values()), file, hyper, replace(options, fallback="allow"))
        except QConvertError:
            continue  # it needs an imatrix
        types = {p: c.got for c in choices if (p := parameters[c.name]) in sizes}
        if all(t in sizes[p] for p, t in types.items()):
            found[name] = types
    return found


def with_types(
    names: Mapping[str, str], file: FileType, options: gguf_mix.Options, types: Mapping[str, str]
) -> tuple[FileType, gguf_mix.Options]:
    """names: parameter -> tensor. general.file_type is that of the first mix with the commonest type, as readers know none for
    a mix of one's own."""
    most = Counter(types.values()).most_common(1)[0][0]
    near = next((f for f in FILE_TYPES.values() if f.default == most), file)
    patterns = tuple((f"^{re.escape(names[p])}$", t) for p, t in types.items())
    return FileType(MIXED, near.id, near.default), replace(options, tensor_types=(*options.tensor_types, *patterns))
