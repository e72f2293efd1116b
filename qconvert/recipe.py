"""Recipes: all that flags can say, and several outputs of one model, in a YAML file that can be kept beside it.

text -> nodes with their lines -> checked against the options of a conversion -> one set of options for each output

    model: ./model
    adapters: [./adapter, {path: ./other, weight: 0.5}]
    to: [gguf:Q4_K_M, {format: onnx, quant: int4, output: onnx-folder}]
    tensor-types: {ffn_down: q6_k}
    gates: {max-kl: 0.05, max-size: 800M}       # or: gates: default

Outputs share one reading, merge and calibration. All are planned before the first is written; each is then judged by
itself: those that are what was asked for get their files, the exit code is that of the first which is not.
"""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml  # type: ignore[import-untyped]

from qconvert.errors import Place, UsageError
from qconvert.request import GATES, AdapterSpec, Request, parse_adapter

Options = dict[str, Any]
Places = dict[str, str]
Said = dict[str, "tuple[Any, Place]"]
SHARED = ("model", "adapters", "tokenizer")  # what all outputs of a recipe have in common
HINTS = {name: hint for name, hint in get_type_hints(Request).items() if name != "places"}


@dataclass(frozen=True)
class Recipe:
    """outputs: the options of each, by the names of Request's fields; what the recipe does not say is not there. common: those
    that are said for all. places: where each was said."""

    outputs: tuple[Options, ...] = ({},)
    common: Options = field(default_factory=dict)
    places: tuple[Places, ...] = ({},)
    common_places: Places = field(default_factory=dict)

    def with_flags(self, flags: Mapping[str, Any]) -> tuple[Options, ...]:
        """What the command line says wins; outputs that it names, as a tuple, take the place of all others.

        UsageError where it names one output file for several.
        """
        named, outputs, places = flags.get("to"), self.outputs, self.places
        if isinstance(named, tuple):
            outputs, places = tuple({**self.common, "to": to} for to in named), (self.common_places,) * len(named)
            flags = {k: v for k, v in flags.items() if k != "to"}
        if len(outputs) > 1 and "output" in flags:
            raise UsageError(f"--output: there are {len(outputs)} outputs", hint="say `output` beside each, in a recipe")
        said = ({key: place for key, place in of.items() if key not in flags} for of in places)
        return tuple({**options, **flags, "places": of} for options, of in zip(outputs, said, strict=True))


def read_recipe(path: Path) -> Recipe:
    """UsageError that names file, line and the nearest key for what is not understood."""
    try:
        root = yaml.compose(path.read_text("utf-8"), Loader=yaml.SafeLoader)
    except OSError as e:
        raise UsageError(f"--recipe {path}: {e.strerror}") from e
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as e:
        line = e.problem_mark.line + 1 if isinstance(e, yaml.MarkedYAMLError) and e.problem_mark else 1
        raise mistake(Place(str(path), line), f"not YAML: {getattr(e, 'problem', e)}") from e
    if not isinstance(root, yaml.MappingNode):
        raise mistake(Place(str(path)), "a recipe is a mapping: model, to, …", hint="model: FOLDER")
    common: Said = {}
    outputs: list[Said] = [{}]
    for key, node, place in _items(root, path, set(), (*HINTS, "format", "gates")):
        if key == "to" and isinstance(node, yaml.SequenceNode):
            outputs = [_output(each, path) for each in node.value]
            if not outputs:
                raise mistake(place, "to: no output is named", hint="to: [gguf:Q4_K_M]")
        else:
            _say(common, key, node, place)
    merged = [{**common, **said} for said in outputs]
    places = tuple({key: str(place) for key, (_, place) in said.items()} for said in (common, *merged))
    values = tuple({key: value for key, (value, _) in said.items()} for said in (common, *merged))
    return Recipe(values[1:], values[0], places[1:], places[0])


def mistake(place: Place, what: str, hint: str | None = None) -> UsageError:
    return UsageError(f"{place}: {what}", hint=hint, place=place)


def _output(node: yaml.Node, path: Path) -> Said:
    """`gguf:Q4_K_M`, or a mapping with `format` and other options of this output alone."""
    place = Place(str(path), node.start_mark.line + 1)
    if isinstance(node, yaml.ScalarNode):
        return {"to": (str(node.value), place)}
    if not isinstance(node, yaml.MappingNode):
        raise mistake(place, "an output is gguf:TYPE, or a mapping with format, quant …")
    known = ("format", "gates", *(name for name in HINTS if name not in (*SHARED, "to")))
    found: Said = {}
    for key, value, where in _items(node, path, set(), known):
        _say(found, key, value, where)
    if "to" not in found:
        raise mistake(place, "the output says no format", hint="format: gguf")
    return found


def _say(said: Said, key: str, node: yaml.Node, place: Place) -> None:
    """Add what a key says; `gates` says what is in it, or `default`."""
    if key == "gates" and isinstance(node, yaml.MappingNode):
        for name, value, where in _items(node, Path(place.file), set(), ("default", *GATES)):
            _say(said, "gate" if name == "default" else name, value, where)
        return
    if key == "gates":
        if node.value != "default":
            raise mistake(place, "gates: a mapping was wanted, or default", hint="gates: {max-kl: 0.05}")
        key, value = "gate", True
    else:
        key, value = "to" if key == "format" else key, _value(key, node, place)
    if key in said:
        raise mistake(place, f"{key.replace('_', '-')} is said twice, at {said[key][1]} too")
    said[key] = (value, place)


def _items(
    node: yaml.MappingNode, path: Path, seen: set[str], known: tuple[str, ...]
) -> Iterator[tuple[str, yaml.Node, Place]]:
    """(field, value, place) of each key; keys may be spelt with - or _."""
    for key, value in node.value:
        place = Place(str(path), key.start_mark.line + 1)
        name = str(key.value).replace("-", "_")
        if name not in known:
            near = get_close_matches(name, known, n=1)
            spelt = ", ".join(sorted(k.replace("_", "-") for k in known))
            hint = f"did you mean {near[0].replace('_', '-')}?" if near else f"there are {spelt}"
            raise mistake(place, f"no option is called {key.value!r}", hint=hint)
        if name in seen:
            raise mistake(place, f"{key.value} is said twice")
        seen.add(name)
        yield name, value, place


def _value(name: str, node: yaml.Node, place: Place) -> Any:
    try:
        value = yaml.SafeLoader("").construct_document(node)
    except (yaml.YAMLError, ValueError, RecursionError) as e:  # tags that are not safe, dates that are none
        raise UsageError(f"{place}: {name.replace('_', '-')}: {getattr(e, 'problem', None) or e}") from e
    if name == "format":
        return str(value)
    if name == "adapters":
        return _adapters(value, place)
    if name == "tensor_types" and isinstance(value, Mapping):
        return tuple(f"{pattern}={kind}" for pattern, kind in value.items())
    if name == "passes":
        from qconvert.pipeline import split_passes

        return tuple(... if p == "..." else p for p in split_passes(str(value)))
    return _fitting(HINTS[name], value, place, name.replace("_", "-"))


def _adapters(value: object, place: Place) -> tuple[AdapterSpec, ...]:
    out = []
    for each in value if isinstance(value, list) else [value]:
        if isinstance(each, Mapping) and each.keys() <= {"path", "weight"} and "path" in each:
            try:
                out.append(AdapterSpec(str(each["path"]), float(each.get("weight", 1.0))))
            except (TypeError, ValueError):
                raise mistake(place, f"adapters: the weight {each['weight']!r} is no number") from None
        elif isinstance(each, str):
            out.append(parse_adapter(each))
        else:
            raise mistake(place, f"adapters: {each!r}", hint="PATH, PATH:WEIGHT or {path: PATH, weight: 0.5}")
    return tuple(out)


def _fitting(hint: Any, value: object, place: Place, what: str) -> Any:
    """The value as the option's type has it."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        hint = next(a for a in arguments if a is not type(None))
        return _fitting(hint, value, place, what)
    if origin is Literal:
        if value not in arguments:
            raise mistake(place, f"{what}: {value!r}", hint=f"one of {', '.join(map(str, arguments))}")
        return value
    if origin is tuple:
        return tuple(_fitting(arguments[0], each, place, what) for each in (value if isinstance(value, list) else [value]))
    made: Any = hint
    if hint is Path:
        hint = str
    right = isinstance(value, (int, float) if hint is float else hint) and not (isinstance(value, bool) and hint is not bool)
    if not right and not (hint is str and isinstance(value, int | float) and not isinstance(value, bool)):
        named = {"str": "text", "int": "a whole number", "float": "a number", "bool": "true or false"}
        raise mistake(place, f"{what}: {named.get(hint.__name__, hint.__name__)} was wanted, not {value!r}")
    return made(str(value) if hint is str else value)


def asked(path: Path | None, usual: Mapping[str, Any], said: Mapping[str, Any]) -> list[Options]:
    """The options of each conversion: what the command line said, else the recipe, else what is usual."""
    outputs = (Recipe() if path is None else read_recipe(path)).with_flags(_fields(said))
    return [{**_fields(usual), "to": Request.to, **options} for options in outputs]


def _fields(flags: Mapping[str, Any]) -> Options:
    """Flags by the names that Request has."""
    from qconvert.pipeline import split_passes

    out = dict(flags)
    if "no_check" in out:
        out["check"] = not out.pop("no_check")
    if "to" in out:
        out["to"] = tuple(name for each in out["to"] for name in each.split(","))
    if "passes" in out:
        out["passes"] = tuple(... if p == "..." else p for p in split_passes(out["passes"]))
    return out


# and back -----------------------------------------------------------------------------------------


def recipe_text(requests: tuple[Request, ...]) -> str:
    """The recipe that says these requests, which are of one model; defaults are left out."""
    told = [_told(request) for request in requests]
    common = {k: v for k, v in told[0].items() if all(t.get(k, MISSING) == v for t in told[1:])}
    apart = [{k: v for k, v in t.items() if k not in common} for t in told]
    if len(told) > 1:
        common.pop("to", None)
        outputs = [{"format": r.to, **{k: v for k, v in t.items() if k != "to"}} for r, t in zip(requests, apart, strict=True)]
        common["to"] = outputs
    return str(yaml.safe_dump(common, sort_keys=False, allow_unicode=True, width=120))


def _told(request: Request) -> Options:
    out: Options = {}
    for each in fields(Request):
        value = getattr(request, each.name)
        if (value == each.default and each.name != "to") or each.name == "places":
            continue
        key = each.name.replace("_", "-")
        match each.name, value:
            case "adapters", _:
                out[key] = [a.path if a.weight == 1 else {"path": a.path, "weight": a.weight} for a in value]
            case "passes", _:
                out[key] = ", ".join("..." if p is ... else str(p) for p in value)
            case _, Path():
                out[key] = str(value)
            case _, tuple():
                out[key] = list(value)
            case _:
                out[key] = value
    gates = {"default" if name == "gate" else key: out.pop(key) for name in GATES if (key := name.replace("_", "-")) in out}
    if gates:
        out["gates"] = "default" if gates == {"default": True} else gates
    return out
