"""A scheme, its layout, and the way to ask for both: 4-bit codes whose values lie on a cubic, dense around zero."""

from qconvert.formats.safetensors_dialects import Loading
from qconvert.scheme import Level, Scheme
from qconvert.tensor_layouts import Part, tensors

VALUES = tuple((code / 7.5 - 1) ** 3 for code in range(16))
CUBIC = Scheme("cubic4_g32", 4, (Level("scale", "f16", 32),), VALUES)  # a weight is scale * VALUES[code]
PARTS = (Part("cubic_codes", "U8", "low"), Part("cubic_scales", "F16", "f16", level=0))
LAYOUTS = {"cubic.cubic4_g32": tensors("cubic.cubic4_g32", CUBIC, PARTS)}


class Dialect:
    name, layouts, solver = "cubic", "cubic", "lsq"

    def scheme(self, n, k, wanted):  # of a weight [n, k]; None: it stays plain
        return CUBIC.name if k % 32 == 0 else None

    def carrying(self, stored, n, k, wanted):  # the scheme in which codes of a quantized source keep their values
        return CUBIC.name if stored == CUBIC else None

    def config(self, written):  # for config.json
        return {"quantization_config": {"quant_method": "cubic", "modules_to_not_convert": list(written.left)}}

    def byte_rows(self, folder, reals, written):  # checks by a library that reads such folders
        return []

    def loading(self, written):
        return Loading({}, missing="no runtime knows cubic")


DIALECT = Dialect()
