"""A format that writes the names of the weights, a line each."""

from pathlib import Path
from typing import ClassVar

from qconvert.emit import FilePlan, Plan
from qconvert.report import Row
from qconvert.target import Legal


class Names:
    name: ClassVar[str] = "names"

    def options(self, request, source, graph):  # what the user's flags mean here, as a record of the format's own
        return None

    def legalize(self, graph, options):  # the passes that make a graph one that this format can say, and the type's name
        return Legal((), "none")

    def default_path(self, source, graph, options):
        return Path("names.txt")

    def plan(self, graph, options, legal, path):  # each file: a header, then entries that are streamed behind it
        header = "\n".join(graph.parameters()).encode()
        return Plan((FilePlan(path, header, (), len(header)),))

    def prove(self, source, lowered, weights, parts, threads):  # the rows of all checks, and what ran the file
        return [Row("runtime", "not verified", None, None, "skip", "a list of names runs nowhere")], None
