"""Passes, found by entry-point name; see qconvert.registry."""

if __name__ != "qconvert.passes":
    raise ImportError("import qconvert.passes, not passes")
