"""What a third party writes for qconvert; docs/extending.md is about it, file by file."""
