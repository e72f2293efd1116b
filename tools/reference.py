"""Write docs/reference/*.md from the code: python tools/reference.py [FOLDER]. A test holds that they are up to date.

Each page is a function that gives its text. Packages beside qconvert do not show: QCONVERT_PLUGINS is off.
"""

from __future__ import annotations

import inspect
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from typing import Any, ForwardRef, cast

os.environ["QCONVERT_PLUGINS"] = "off"

import click

import qconvert
from qconvert import conversion, errors, graph, pipeline, registry, report, request, scheme, solving, target
from qconvert.cli import cli
from qconvert.formats.gguf_mix import BITS, FILE_TYPES
from qconvert.formats.onnx import QUANTS
from qconvert.formats.safetensors_dialects import Wanted
from qconvert.options import REPORT, SECTIONS
from qconvert.recipe import HINTS
from qconvert.solver_spec import FOLDS, chosen
from qconvert.targets import LEGEND, facts, matrix, rule_lines

ROOT = Path(__file__).parents[1]
MADE = "<!-- Made by tools/reference.py from the code; edit the code. -->\n\n"


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in pages().items():
        (folder / f"{name}.md").write_text(text, encoding="utf-8")


def pages() -> dict[str, str]:
    made: tuple[Callable[[], str], ...] = (flags, exits, recipe, passes, solvers, types, targets, report_json, python)
    return {page.__name__.replace("_", "-"): MADE + page().rstrip() + "\n" for page in made}


# pages --------------------------------------------------------------------------------------------


def flags() -> str:
    command, context = cli.commands["convert"], click.Context(cli.commands["convert"])
    shown = [p for p in command.get_params(context) if isinstance(p, click.Option) and p.name != "help"]
    parts, at = ["# Flags", "`qconvert convert` is the command that is meant where none is said."], 0
    for title, section in {**SECTIONS, "Report": REPORT}.items():
        parts += [f"## {title}", flag_table(shown[at : at + len(section)], context)]
        at += len(section)
    for name in sorted(cli.commands.keys() - {"convert"}):
        command = cli.commands[name]
        arguments = " ".join(p.make_metavar(context) for p in command.params if isinstance(p, click.Argument))
        own = [p for p in command.params if isinstance(p, click.Option)]
        parts += [f"## qconvert {name} {arguments}", inspect.cleandoc(command.help or ""), flag_table(own, context)]
    variables = sorted({v for p in sources() for v in re.findall(r'"(QCONVERT_[A-Z_]+)"', p.read_text(encoding="utf-8"))})
    about = {
        "QCONVERT_PLUGINS": "`off`: packages beside qconvert are not asked for passes, formats and the like.",
        "QCONVERT_THREADS": "What `--threads` is where it is not said.",
        "QCONVERT_EVAL_TOKENS": "What `--eval-tokens` is where it is not said.",
        "QCONVERT_LLAMA_CPP": "`any`: a llama.cpp of another version than was tested is used all the same.",
    }
    hub = ("HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE")
    rows = [(f"`{v}`", about.get(v, "")) for v in variables] + [(f"`{v}`", "As Hugging Face's libraries read it.") for v in hub]
    return "\n\n".join([*parts, "## Environment", table(("variable", "what it does"), rows)])


def exits() -> str:
    about: dict[int, list[str]] = {}
    for name, code, what in re.findall(r"(\w+) +(\d+)  (.+)", errors.__doc__ or ""):
        assert getattr(errors, name).exit_code == int(code), name
        about.setdefault(int(code), []).append(f"`{name}`: {what}")
    rows = [(str(code), "<br>".join(what)) for code, what in sorted(about.items())]
    rows = [("0", "converted, and verified or said plainly not to be"), *rows]
    said = "A failure prints `error:` and, where there is a way out, `hint:` on standard error; `--json` has both."
    return f"# Exit codes\n\n{said}\n\n{table(('exit', 'kind of error in Python, and what it means'), rows)}"


def recipe() -> str:
    helps = {p.name: one_line(p.help) for p in cli.commands["convert"].params if isinstance(p, click.Option)}
    defaults = {f.name: f for f in fields(request.Request)}
    helps |= {"model": "What MODEL is on the command line.", "check": f"`false`: {helps['no_check']}"}
    rows = []
    for name, hint in HINTS.items():
        key = name.replace("_", "-")
        rows.append((f"`{key}`", f"`{typed(hint)}`", default_of(defaults[name]), helps.get(name, f"`--{key}`")))
    return (
        "# Recipe keys\n\nA recipe is a YAML file for `--recipe`. Its keys are these, with `-` or `_`. `to` may be a list of "
        "outputs: `gguf:Q4_K_M`, or a mapping of `format` and the keys that this output has for itself.\n\n"
        + table(("key", "value", "default", "what it is"), rows)
    )


def passes() -> str:
    parts = [
        "# Passes",
        'For `--passes "...,name{option=value}"` and `convert(passes=[...])`; `...` stands for what qconvert does by itself. '
        "Options whose value is a table or a graph's own are set from Python.",
    ]
    for name in sorted(registry.entries("passes")):
        cls = cast(type, registry.find("passes", name))
        parts += [f"## {name}", paragraphs(cls.__doc__), options_of(cls)]
    return "\n\n".join(filter(None, parts))


SAMPLES = {
    "GGUF's K-quants and legacy types": ("q4_k", "q4_0"), "GGUF's tables": ("iq4_nl", "tq2_0"),
    "integers": ("int4_g32", "int8_row"),
    "integer zero points": ("uint4_g32",), "float zero points": ("uint4f_g32",), "offsets": ("uint4o_g64_bf16",),
    "NF4, FP4": ("nf4_g64", "fp4_g64"), "FP8": ("e4m3_row", "e4m3_b128"), "NVFP4": ("nvfp4",), "MXFP4": ("mxfp4",),
    "bitsandbytes' int8": ("int8_scb",), "BitNet's ternary": ("ternary_bf16",), "QuIP#'s lattice": ("e8p",),
}  # fmt: skip


def solvers() -> str:
    parts = [
        "# Solvers",
        "A solver chooses codes and metadata of a scheme: `--solver name{option=value}`. A fold comes first: `awq+gptq`. "
        "Without the flag each format takes its own: GGUF `search`, the others mostly `mse`.",
    ]
    kinds = {"": "", "moments": "second moments of inputs", "hessian": "the Hessian of inputs"}
    rows = []
    for name in sorted(registry.entries("solvers")):
        found = chosen(name)
        legal = [kind for kind, names in SAMPLES.items() if all(found.refuses(scheme_of(n)) is None for n in names)]
        needs = kinds[found.needs.rstrip("?")] + (", where there are any" if found.needs.endswith("?") else "")
        left = [kind for kind in SAMPLES if kind not in legal]
        rows.append((f"`{name}`", ", ".join(legal) if len(legal) < len(left) else f"all but {', '.join(left)}", needs))
    rows += [(f"`{name}`", "an exact fold, before a solver", "peaks or moments of inputs") for name in FOLDS]
    parts.append(table(("solver", "makes", "reads"), [*rows, ("`auto`", "the nearest of several on text held out", "text")]))
    for name in sorted(registry.entries("solvers")):
        cls = registry.find("solvers", name)
        if isinstance(cls, type) and fields(cast(Any, cls)):
            parts += [f"## {name}", paragraphs(own_doc(cls)), options_of(cls)]
    own = member(solving.Solver, "solve", "refuses"), record(solving.Given)
    parts += ["## One of your own", "See [Extending qconvert](../extending.md).", *own]
    return "\n\n".join(filter(None, parts))


def types() -> str:
    by_bits = {name: f"`--bits {bits}`" for bits, name in BITS.items()}
    mixes = [(f"`{name}`", f"`{t.default}`", by_bits.get(name, "")) for name, t in FILE_TYPES.items()]
    tensors = [(f"`{s.name}`", str(s.bits), f"{s.bits_per_weight:g}", str(s.block)) for s in scheme.SCHEMES.values()]
    dialects = []
    for name in registry.entries("dialects"):
        found = cast(Any, registry.find("dialects", name))
        kind = found.scheme(256, 256, Wanted(None, "bf16"))
        made = scheme.scheme_of(kind) if kind else None
        of = f"{made.bits_per_weight:g}" if made else "plain"
        solver = f"`{found.solver}`" if kind and hasattr(found, "solver") else ""
        dialects.append((f"`{name}`", f"`{kind}`" if kind else "", of, solver))
    return "\n\n".join([
        "# Formats and types", "`--to FORMAT --quant TYPE`, or `--to FORMAT:TYPE`. `qconvert --list types` prints the same.",
        "## gguf", "A mix gives each tensor a type by its role, as llama-quantize does.", table(("mix", "mostly", ""), mixes),
        "`--tensor-type REGEX=TYPE` takes tensor types:", table(("type", "bits of a code", "with metadata", "block"), tensors),
        "## onnx", ", ".join(f"`{q}`" for q in QUANTS),
        "`--bits 8`, `4` and `2` are `int8`, `int4` and `int2`; `--zero-point int` makes `uint8`, `uint4`, `uint2` of them.",
        "## safetensors", "The scheme is that of a weight of 256 x 256 in a bf16 model.",
        table(("type", "scheme", "bits per weight", "solver"), dialects),
    ])  # fmt: skip


def targets() -> str:
    (head, *rows), (names, *cells) = facts(), matrix()
    return "\n\n".join([
        "# Targets", "`--target NAME` refuses what does not run there. `qconvert --list targets` prints the same.",
        table(head, rows),
        f"What runs there: {LEGEND}.", table(("format", "type", *names[2:]), cells),
        "## Where that is known from", "```text\n" + "\n".join(rule_lines()) + "\n```",
    ])  # fmt: skip


def report_json() -> str:
    schema = json.loads((ROOT / "qconvert" / "report.schema.json").read_text(encoding="utf-8"))
    rows: dict[tuple[str, str], list[str]] = {}
    for path, kind, about in described(schema["$defs"]["report"], schema["$defs"], ""):
        if kind not in (known := rows.setdefault((path, about), [])):
            known.append(kind)
    shown = [(f"`{path}`", " or ".join(kinds), about) for (path, about), kinds in rows.items()]
    return (
        "# report.json\n\nWhat `--json FILE` writes, and `Result.report.data()` gives. `[]` is each entry of a list, `*` each "
        "key of a table by name. Of several outputs it is a list. `qconvert/report.schema.json` is the JSON Schema.\n\n"
        + table(("key", "value", "what it is"), shown)
    )


def python() -> str:
    defaults = [(f"`{f.name}`", f"`{f.type}`", default_of(f)) for f in fields(request.Request) if f.name not in ("model",)]
    signature = re.sub(r"<function .*? at \w+>", "...", str(inspect.signature(conversion.convert)).replace("'", ""))
    return "\n\n".join([
        "# Python API", "`import qconvert` loads nothing heavy; names below are imported when they are used.",
        "## qconvert.convert", f"```python\nconvert{signature}\n```", paragraphs(conversion.convert.__doc__),
        "Options, named like the flags:", table(("option", "type", "default"), defaults),
        "## qconvert.Result", record(conversion.Result),
        "## Report", "`qconvert.report`", record(report.Report), record(report.Row),
        "## Graphs", "`qconvert.Graph`, `qconvert.Node`, `qconvert.Type`", *map(record, (graph.Type, graph.Node, graph.Graph)),
        "## Passes", "`qconvert.pipeline`", member(pipeline.Pass, "__call__"),
        "## Formats", "`qconvert.target`", record(target.Format), record(target.Legal),
        "## Schemes and layouts", "`qconvert.scheme`", record(scheme.Scheme), record(scheme.Level), record(scheme.Layout),
        "## Errors",
        "`qconvert.errors`. All are a `QConvertError`: `message`, `hint`, `exit_code`, `report`.",
        "See [exit codes](exits.md).",
    ])  # fmt: skip


# pieces -------------------------------------------------------------------------------------------


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(escaped(str(c)) for c in line) + " |" for line in lines)


def escaped(cell: str) -> str:
    """A cell of a table; text in angle brackets and stars would be markup outside of code."""
    parts = re.split(r"(`[^`]*`)", cell.replace("\n", " "))
    plain = [p if p.startswith("`") else p.replace("<", "&lt;").replace("&lt;br>", "<br>").replace("*", "\\*") for p in parts]
    return "".join(plain).replace("|", "\\|")


def flag_table(options: Sequence[click.Option], context: click.Context) -> str:
    rows = []
    for option in options:
        record = option.get_help_record(context)
        assert record is not None
        rows.append((f"`{record[0]}`", record[1]))
    return table(("flag", "what it does"), rows)


def sources() -> list[Path]:
    return [p for folder in ("qconvert", "passes", "formats") for p in sorted((ROOT / folder).glob("*.py"))]


def one_line(text: str | None) -> str:
    return " ".join((text or "").split())


def paragraphs(doc: str | None) -> str:
    """A docstring as markdown: lines of a paragraph are joined, stars and brackets are text."""
    text = inspect.cleandoc(doc or "")
    joined = (one_line(part) for part in text.split("\n\n"))
    return "\n\n".join(re.sub(r"([*<>_|\[\]])", r"\\\1", part) for part in joined)


def own_doc(cls: type) -> str | None:
    """Not the signature that dataclass puts there."""
    return None if (cls.__doc__ or "").startswith(f"{cls.__name__}(") else cls.__doc__


def typed(hint: object) -> str:
    text = hint.__forward_arg__ if isinstance(hint, ForwardRef) else hint.__name__ if isinstance(hint, type) else str(hint)
    return re.sub(r"(pathlib|typing|qconvert\.\w+|types|collections\.abc)\.(_local\.)?", "", text)


def default_of(field: Field[Any]) -> str:
    if field.default is MISSING:
        return "" if field.default_factory is MISSING else "empty"
    return "" if field.default is None or field.default == () else "`...`" if field.default == (...,) else f"`{field.default}`"


def options_of(cls: type) -> str:
    if not is_dataclass(cls):
        return ""
    plain = [f for f in fields(cls) if f.init and str(f.type) in ("str", "int", "float", "bool")]
    return table(("option", "type", "default"), [(f"`{f.name}`", str(f.type), default_of(f)) for f in plain]) if plain else ""


def record(cls: type) -> str:
    """A class: its docstring, its fields, and its public methods and properties with theirs."""
    parts = [f"### {cls.__name__}", paragraphs(own_doc(cls))]
    hints: Mapping[str, object] = inspect.get_annotations(cls)
    rows = [(f"`{name}`", f"`{typed(kind)}`") for name, kind in hints.items() if not name.startswith("_")]
    parts.append(table(("field", "type"), rows) if rows else "")
    public = [name for name in vars(cls) if not name.startswith("_") and name not in hints]
    return "\n\n".join(filter(None, [*parts, members(cls, public)]))


def member(cls: type, *names: str) -> str:
    return "\n\n".join(filter(None, [f"### {cls.__name__}", paragraphs(own_doc(cls)), members(cls, names)]))


def members(cls: type, names: Sequence[str]) -> str:
    lines = []
    for name in names:
        found = inspect.getattr_static(cls, name)
        call = found.fget if isinstance(found, property) else found.__func__ if isinstance(found, classmethod) else found
        if callable(call):
            signature = "" if isinstance(found, property) else str(inspect.signature(call)).partition(" -> ")[0]
            signature = re.sub(r"\((self|cls)(, )?", "(", signature.replace("'", ""))
            doc = paragraphs(call.__doc__).replace("\n\n", " ")
            lines.append(f"- `{name}{signature}`" + (f": {doc}" if doc else ""))
    return "\n".join(lines)


def described(node: Mapping[str, Any], defs: Mapping[str, Any], path: str) -> Iterator[tuple[str, str, str]]:
    """(path, kind, description) of all that a JSON Schema has."""
    if "$ref" in node:
        node = {**defs[node["$ref"].rpartition("/")[2]], **{k: v for k, v in node.items() if k != "$ref"}}
    if node.get("maxProperties") == 0:
        return
    for choice in node.get("anyOf", ()):
        yield from described({**choice, **{k: v for k, v in node.items() if k == "description"}}, defs, path)
    kinds = node.get("type", [])
    said = f"`{node['const']}`" if "const" in node else ", ".join(f"`{v}`" for v in node.get("enum", ()))
    kind = said or " or ".join([kinds] if isinstance(kinds, str) else kinds)
    if path and kind and not (kind == "object" and path.endswith("[]")):
        yield path, kind, node.get("description", "")
    for key, each in node.get("properties", {}).items():
        yield from described(each, defs, f"{path}.{key}" if path else key)
    for key, step in (("items", "[]"), ("additionalProperties", ".*")):
        if isinstance(node.get(key), Mapping):
            yield from described(node[key], defs, path + step)


def scheme_of(name: str) -> scheme.Scheme:
    return cast(scheme.Scheme, scheme.scheme_of(name))


if __name__ == "__main__":
    assert qconvert.__file__
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "docs" / "reference")
