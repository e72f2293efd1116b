"""Types by size or by KL in folders: exact bytes, what loaders demand, answers in transformers and onnxruntime."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import pytest
import torch
from tiny_models import CASES, one_thread, save_random

from qconvert import convert
from qconvert.budget import Files, Types, fitting, frontier
from qconvert.build import build
from qconvert.conversion import Result
from qconvert.errors import GateError, UnsupportedError
from qconvert.evaluation import evaluation_text
from qconvert.facts import Facts
from qconvert.formats.onnx_runtime import OnnxRuntime
from qconvert.html_report import html_page
from qconvert.scheme import scheme_of
from qconvert.sources import Store, read_checkpoint
from qconvert.target import Menu
from qconvert.tokenizer import read_tokenizer
from qconvert.weights import Weights

assert one_thread  # an autouse fixture
ROOT = Path(__file__).parents[1]
TINY, LORA = ROOT / "golden" / "tiny", ROOT / "golden" / "tiny-lora"
FUSED = re.compile(r"(.*)\.(?:(?:q|k|v)_proj|(?:gate|up)_proj)\.weight")
SIZES = {"safetensors": 1_700_000, "onnx": 1_200_000}
N_TOKENS = 256


# bytes that do not add up -------------------------------------------------------------------------


def menu_of(n: int, together: tuple[tuple[str, ...], ...] = ()) -> Menu:
    sizes = {f"w{i}": {"small": 100 + i, "middle": 190 + i, "large": 310 + 7 * i} for i in range(n)}
    return Menu(sizes, {}, together, exact=False)


def headers(menu: Menu, types: Types) -> int:
    """What a format's header may take: more for each kind of type, and for large ones."""
    return 40 + 23 * len(set(types.values())) + 3 * sum(t == "large" for t in types.values())


def files_of(menu: Menu) -> Files:
    def lowered(types: Types) -> tuple[Weights, int]:
        return cast(Weights, None), sum(menu.sizes[w][t] for w, t in types.items()) + headers(menu, types)

    return Files(menu, lowered)


def test_files_whose_headers_differ_never_exceed_the_target_and_use_it() -> None:
    files = files_of(menu_of(9))
    each = {"small": 1.0, "middle": 0.3, "large": 0.01}
    cost = {w: {t: (9 - i) * c for t, c in each.items()} for i, w in enumerate(files.sizes)}
    front = frontier(files.sizes, cost, files.fixed)
    least = files.nbytes(files.smallest)
    for nbytes in range(least, front.most + 100, 37):
        types = fitting(front, files, nbytes)
        assert files.nbytes(types) <= nbytes
        exact = sum(files.sizes[u][t] for u, t in types.items()) + headers(files.menu, types)
        assert files.nbytes(types) == exact
        assert nbytes - exact < 250 or set(types.values()) == {"large"}  # no room is left for another middle or large one


def test_weights_of_a_unit_have_one_type_and_its_bytes_are_theirs_together() -> None:
    files = files_of(menu_of(4, (("w1", "w3"),)))
    assert list(files.units) == ["w0", "w1", "w2"]
    assert files.sizes["w1"] == {"small": 204, "middle": 384, "large": 648}
    assert files.types({"w0": "small", "w1": "large", "w2": "middle"}) == {
        "w0": "small", "w1": "large", "w3": "large", "w2": "middle",
    }  # fmt: skip
    assert files.mixture({"w0": "small", "w1": "large", "w2": "small", "w3": "small"}) is None


# folders ------------------------------------------------------------------------------------------


class Made(NamedTuple):
    to: str
    result: Result
    folder: Path

    @property
    def budget(self) -> Mapping[str, Any]:
        return self.result.report.budget

    @property
    def types(self) -> dict[str, str]:
        return dict(self.budget["types"])


@pytest.fixture(scope="module", params=SIZES)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp(request.param) / "out"
    size = str(SIZES[request.param])
    options: dict[str, Any] = {"to": request.param, "target_size": size, "eval_tokens": N_TOKENS}
    return Made(request.param, convert(TINY, adapters=[str(LORA)], output=folder, **options), folder)


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.peer
def test_the_folder_has_the_predicted_bytes_and_no_more_than_the_target(made: Made) -> None:
    on_disk = sum(map(len, files_in(made.folder).values()))
    assert on_disk == made.budget["nbytes"] == sum(made.result.report.accounting["parts"].values())
    assert 0.99 * SIZES[made.to] < on_disk <= SIZES[made.to]
    assert len(set(made.types.values())) > 2
    assert made.result.verified and made.result.report.quality["mean_kl"] > 0


@pytest.mark.peer
def test_the_same_wish_gives_the_same_folder(made: Made, tmp_path: Path) -> None:
    options: dict[str, Any] = {"to": made.to, "target_size": str(SIZES[made.to]), "eval_tokens": N_TOKENS}
    convert(TINY, adapters=[str(LORA)], output=tmp_path / "again", check=False, **options)
    assert files_in(tmp_path / "again") == files_in(made.folder)


@pytest.mark.peer
def test_the_curve_has_usual_types_beside_it(made: Made) -> None:
    curve = made.budget["curve"]
    sizes = [p["nbytes"] for p in curve]
    assert sizes == sorted(sizes) and len(sizes) > 8
    measured = [p["measured"] for p in curve if p["measured"] is not None]
    assert measured[0] > 10 * measured[-1]
    stock = {p["name"]: p for p in made.budget["stock"]}
    assert ("w4a16" if made.to == "safetensors" else "int4_g32") in stock
    near = [p for p in stock.values() if p["nbytes"] <= made.budget["nbytes"]]
    assert near and all(made.budget["measured"] < p["measured"] for p in near)
    page = html_page([Facts(made.result.report.data())])
    assert "KL by bytes" in page and all(name in page for name in stock)


@pytest.mark.peer
def test_bits_and_groups_in_the_files_are_those_of_the_report(made: Made) -> None:
    types = {w: scheme_of(t) for w, t in made.types.items()}
    want = {w: (s.bits, s.block) for w, s in types.items() if s is not None}
    assert (written_by_compressed_tensors if made.to == "safetensors" else written_in_nodes)(made.folder) == want


def written_by_compressed_tensors(folder: Path) -> dict[str, tuple[int, int]]:
    """Weight -> bits and group, as compressed-tensors reads config.json."""
    from compressed_tensors.quantization import QuantizationConfig

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    groups = QuantizationConfig.model_validate(config).config_groups.values()
    return {f"{m}.weight": (g.weights.num_bits, g.weights.group_size) for g in groups for m in g.targets}


def written_in_nodes(folder: Path) -> dict[str, tuple[int, int]]:
    import onnx

    found, model = {}, onnx.load(folder / "model.onnx", load_external_data=False)
    for node in model.graph.node:
        if node.op_type in ("MatMulNBits", "GatherBlockQuantized"):
            said = {a.name: a.i for a in node.attribute}
            weight = re.sub(r"\.qweight(\.rows)?$", ".weight", node.input[0 if node.op_type[0] == "G" else 1])
            assert found.setdefault(weight, (said["bits"], said["block_size"])) == (said["bits"], said["block_size"])
    return found


@pytest.mark.peer
def test_matrices_that_vllm_multiplies_as_one_have_one_type(made: Made) -> None:
    if made.to == "onnx":
        pytest.skip("onnxruntime multiplies each by itself")
    fused: dict[str, set[str]] = {}
    for weight, kind in made.types.items():
        if m := FUSED.fullmatch(weight):
            fused.setdefault(m[1], set()).add(kind)
    assert len(fused) == 6 and all(len(kinds) == 1 for kinds in fused.values())


@pytest.mark.peer
def test_the_loss_in_the_runtime_is_the_loss_in_the_report(made: Made) -> None:
    """KL of the folder in its runtime to transformers' own merge of the adapter, on the report's text."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    graph = build(read_checkpoint(TINY, Store()))
    text = torch.tensor(evaluation_text(None, read_tokenizer(TINY, 1024), graph, N_TOKENS).sequences)
    base = transformers.AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    trained = peft.PeftModel.from_pretrained(base, str(LORA)).eval()
    if made.to == "onnx":
        model = OnnxRuntime().open(made.folder / "model.onnx", text.shape[1], 1, exact=True)
        answers = torch.stack([torch.from_numpy(model.logits(ids)) for ids in text.tolist()])
    with torch.no_grad():
        if made.to == "safetensors":
            answers = transformers.AutoModelForCausalLM.from_pretrained(made.folder, dtype=torch.float32).eval()(text).logits
        p, q = (torch.log_softmax(x.double(), -1) for x in (trained(text).logits, answers))
    kl = float((p.exp() * (p - q)).sum(-1).mean())
    # transformers rounds what it dequantizes to bf16: measured 0.4 %
    assert kl == pytest.approx(made.result.report.quality["mean_kl"], rel=0.02)
    assert kl == pytest.approx(made.budget["measured"], rel=0.02)


@pytest.mark.peer
@pytest.mark.parametrize("to", SIZES)
def test_the_smallest_folder_below_a_kl(to: str, tmp_path: Path) -> None:
    result = convert(TINY, to=to, output=tmp_path / "out", max_kl=0.02, eval_tokens=N_TOKENS)
    report = result.report
    assert result.verified and 0.01 < report.quality["mean_kl"] <= 0.02  # no bits are wasted
    smaller = [p for p in report.budget["curve"] if p["nbytes"] < 0.95 * report.budget["nbytes"] and p["measured"]]
    assert smaller and all(p["measured"] > 0.02 for p in smaller)


@pytest.mark.peer
@pytest.mark.parametrize(
    ("options", "hint"),
    [
        ({"to": "safetensors"}, "4 bits are the least here.*--to onnx has 2 bits"),
        ({"to": "onnx"}, "--to gguf has smaller types"),
        ({"to": "onnx", "form": "portable", "group": 64}, "without --group, or --form ort has 2 bits, or --to gguf"),
    ],
)
def test_a_size_below_the_smallest_folder_names_that_and_what_is_smaller(
    options: dict[str, Any], hint: str, tmp_path: Path
) -> None:
    with pytest.raises(GateError, match="--target-size 200k: the smallest file is") as caught:
        convert(TINY, output=tmp_path / "out", target_size="200k", check=False, **options)
    told = re.fullmatch(rf"--target-size (\d+); {hint}.*", str(caught.value.hint))
    assert told and int(told[1]) > 200_000, caught.value.hint
    if options == {"to": "safetensors"}:
        result = convert(TINY, output=tmp_path / "out", target_size=told[1], check=False, eval_tokens=64, **options)
        assert result.report.budget["nbytes"] == int(told[1])


def test_a_model_that_is_onnx_already_has_no_budget(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"")
    with pytest.raises(UnsupportedError, match="one type for all weights"):
        convert(tmp_path / "model.onnx", to="onnx", output=tmp_path / "out", target_size="1m")


def small_model(folder: Path, case: str) -> Path:
    """A random model with the tokenizer of golden/tiny."""
    kind, options = CASES[case]
    sizes = {"hidden_size": 64, "intermediate_size": 64, "vocab_size": 1024, "max_position_embeddings": 256}
    save_random(folder, kind, options | sizes)
    for path in TINY.glob("*token*"):
        shutil.copy(path, folder)
    return folder


@pytest.mark.peer
@pytest.mark.parametrize("to", SIZES)
def test_experts_get_one_type_and_run(to: str, tmp_path: Path) -> None:
    bits = 24.0 if to == "safetensors" else 12.0
    model = small_model(tmp_path / "model", "mixtral")
    result = convert(model, to=to, output=tmp_path / "out", target_bpw=bits, eval_tokens=N_TOKENS)
    types = result.report.budget["types"]
    experts = {t for w, t in types.items() if ".experts." in w}
    assert len(experts) == 1 and scheme_of(experts.pop()) is not None
    assert len(set(types.values())) > 1
    assert result.verified and not [row for row in result.report.checks if row.verdict in ("fail", "skip")]


def test_loss_is_measured_against_norms_as_the_model_has_them(tmp_path: Path) -> None:
    """Gemma's checkpoints store them less one."""
    model = small_model(tmp_path / "model", "gemma3")
    result = convert(model, to="onnx", output=tmp_path / "out", target_bpw=16.0, eval_tokens=N_TOKENS, check=False)
    curve = result.report.budget["curve"]
    assert curve[-1]["measured"] < 1e-9 < 0.01 < curve[0]["measured"]  # the last is f32, all of it
