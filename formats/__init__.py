"""Formats, found by entry-point name; see qconvert.registry."""

if __name__ != "qconvert.formats":
    raise ImportError("import qconvert.formats, not formats")
