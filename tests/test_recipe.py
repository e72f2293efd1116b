"""Recipes: what a YAML file says is what flags would, and a mistake in it is shown where it is."""

from __future__ import annotations

from pathlib import Path

import pytest

from qconvert.errors import UsageError
from qconvert.recipe import read_recipe, recipe_text
from qconvert.request import AdapterSpec, Request


def written(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_one_output(tmp_path: Path) -> None:
    recipe = read_recipe(
        written(tmp_path, "model: m\nadapters: [a, 'b:0.5', {path: c, weight: 2}]\nto: gguf:Q4_K_M\nthreads: 2\nforce: true\n")
    )
    adapters = (AdapterSpec("a"), AdapterSpec("b", 0.5), AdapterSpec("c", 2.0))
    assert recipe.outputs == ({"model": "m", "adapters": adapters, "to": "gguf:Q4_K_M", "threads": 2, "force": True},)


def test_several_outputs_share_what_is_said_once(tmp_path: Path) -> None:
    text = "model: m\nto: [gguf:Q8_0, {format: onnx, quant: int4, group: 64, output: o}]\ngroup: 32\n"
    first, second = read_recipe(written(tmp_path, text)).outputs
    assert first == {"model": "m", "group": 32, "to": "gguf:Q8_0"}
    assert second == {"model": "m", "group": 64, "to": "onnx", "quant": "int4", "output": Path("o")}


def test_keys_are_spelt_as_flags_or_as_fields(tmp_path: Path) -> None:
    text = "model: m\ntensor-types: {ffn_down: q6_k, 'blk\\.0': q8_0}\nsplit_max_size: 2G\n"
    (options,) = read_recipe(written(tmp_path, text)).outputs
    assert options["tensor_types"] == ("ffn_down=q6_k", "blk\\.0=q8_0")
    assert options["split_max_size"] == "2G"


def test_flags_win(tmp_path: Path) -> None:
    recipe = read_recipe(written(tmp_path, "model: m\nbits: 4\n"))
    assert recipe.with_flags({"bits": 8}) == ({"model": "m", "bits": 8},)


def test_one_output_file_cannot_be_several(tmp_path: Path) -> None:
    recipe = read_recipe(written(tmp_path, "model: m\nto: [gguf, onnx]\n"))
    with pytest.raises(UsageError, match="2 outputs"):
        recipe.with_flags({"output": Path("x")})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("model: m\nbitz: 4\n", r":2: no option is called 'bitz'"),
        ("model: m\n\nbits: four\n", r":3: bits: a whole number was wanted, not 'four'"),
        ("model: m\nforce: 1\n", r":2: force: true or false was wanted, not 1"),
        ("model: m\nbits: true\n", r":2: bits: a whole number was wanted, not True"),
        ("model: m\nfallback: maybe\n", r":2: fallback: 'maybe'"),
        ("model: m\nbits: 4\nbits: 5\n", r":3: bits is said twice"),
        ("model: m\nto: []\n", r":2: to: no output is named"),
        ("model: m\nto:\n  - gguf\n  - {quant: int4}\n", r":4: the output says no format"),
        ("model: m\nto:\n  - {format: gguf, model: n}\n", r":3: no option is called 'model'"),
        ("model: m\nadapters: [3]\n", r":2: adapters: 3"),
        ("model: m\nadapters: [{path: a, weight: much}]\n", r":2: adapters: the weight 'much'"),
        ("- model\n", r"a recipe is a mapping"),
        ("model: [\n", r":2: not YAML"),
        ("", r"a recipe is a mapping"),
    ],
)
def test_a_mistake_is_shown_with_its_line(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        read_recipe(written(tmp_path, text))


def test_the_nearest_key_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        read_recipe(written(tmp_path, "model: m\ntensor-type: {a: q4_0}\n"))
    assert caught.value.hint == "did you mean tensor-types?"


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No such file"):
        read_recipe(tmp_path / "none.yaml")


def test_what_is_saved_reads_back(tmp_path: Path) -> None:
    adapters = (AdapterSpec("a"), AdapterSpec("b", 0.5))
    made = (
        Request("m", adapters, to="gguf", quant="Q4_K_M", output=Path("x"), tensor_types=("ffn=q6_k",), passes=("p{x=1}", ...)),
        Request("m", adapters, to="onnx", quant="int4", group=64, check=False, passes=("p{x=1}", ...)),
    )
    for requests in (made, made[:1]):
        recipe = read_recipe(written(tmp_path, recipe_text(requests)))
        assert tuple(Request(**options) for options in recipe.outputs) == requests
