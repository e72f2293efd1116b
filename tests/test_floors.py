"""Who may import whom: downwards only, as design.md section 4 says."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[1]
FLOORS: dict[float, str] = {
    0: "errors dtypes",
    1: "graph text scheme reals second_level bits planes moves gptq_words registry layouts rope parallel adapter_ops "
    "quip_words model_cache byte_files url_files",
    2: "ops solvers float_weights tensor_layouts safetensors_header gguf_reader tensor_files sources stored_weights "
    "peer_weights fold_weights weights run layerwise observers statistics histograms kernels kernels.* adapter_weights grids "
    "hessians own_solvers solving solved_weights recover lattice_weights patterns shared_rows lockstep codebooks",
    3: "families families_gemma families_moe families_encoder config_reader settings pooling shapes stored_forms build "
    "adapters adapter_config adapter_delta tokenizer chat sentencepiece_model tokenizer_json pipeline journal emit "
    "check report encoder_check request target targets companions provenance calibration transcoded recipe placement "
    "prefetch traffic offloading accountant shape_checkpoint evaluation quality adapter_pooling pooled_merges "
    "solver_spec qat_grids on_device sensitivity budget plots findings baseline gates facts changes licenses usage "
    "certificate probes preflight together tasks ray_executor plans rehearsal swapped swap_check",
    3.5: "passes passes.* formats formats.*",
    4: "conversion lowering calibrated verification inspection listing printing html_report doctor merge_base "
    "adapter_refit markdown_report junit_report sarif_report beside manifest certifying measuring elsewhere "
    "model_card",
    5: "cli options __main__ reports",
}
# a runtime belongs to its format; else a format is its file's name up to the first _
FORMATS = {"llama_cpp": "gguf", "llama_cpp_abi": "gguf"}


def modules() -> dict[str, Path]:
    """Every module below the package, by its name without "qconvert."."""
    files = [*ROOT.glob("qconvert/*.py"), *ROOT.glob("qconvert/kernels/**/*.py")]
    files += [*ROOT.glob("passes/**/*.py"), *ROOT.glob("formats/**/*.py")]
    names = {p: ".".join(p.relative_to(ROOT).with_suffix("").parts).removeprefix("qconvert.") for p in files}
    return {n.removesuffix(".__init__"): p for p, n in names.items() if n != "__init__"}


MODULES = modules()


def floor(module: str) -> float | None:
    for number, names in FLOORS.items():
        for name in names.split():
            if name == module or (name.endswith(".*") and module.startswith(name[:-1])):
                return number
    return None


def imports(module: str) -> Iterator[str]:
    """Modules of ours that `module` imports anywhere, inside functions too."""
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            parts = [f"{node.module}.{a.name}" for a in node.names]
            names = [p if p.removeprefix("qconvert.") in MODULES else node.module for p in parts]
        yield from (n.removeprefix("qconvert.") for n in names if n.startswith("qconvert."))


EDGES = {(m, i) for m in MODULES for i in imports(m) if i != m}


def format_of(module: str) -> str:
    stem = module.split(".")[1]
    return FORMATS.get(stem, stem.partition("_")[0])


def test_every_module_has_a_floor() -> None:
    assert [m for m in MODULES if floor(m) is None] == []


def test_modules_import_downwards_only() -> None:
    assert [f"{a} -> {b}" for a, b in sorted(EDGES) if (floor(a) or 0) < (floor(b) or 0)] == []


def test_imports_have_no_cycle() -> None:
    graph: dict[str, set[str]] = {}
    for a, b in EDGES:
        graph.setdefault(a, set()).add(b)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as e:
        raise AssertionError(" -> ".join(e.args[1])) from e


def test_passes_import_no_format() -> None:
    assert [f"{a} -> {b}" for a, b in sorted(EDGES) if a.startswith("passes.") and b.startswith("formats")] == []


def test_a_format_imports_no_other_format() -> None:
    among = [(a, b) for a, b in sorted(EDGES) if a.startswith("formats.") and b.startswith("formats.")]
    assert [f"{a} -> {b}" for a, b in among if format_of(a) != format_of(b)] == []


def test_files_stay_within_400_lines() -> None:
    n_lines = {m: len(p.read_text(encoding="utf-8").splitlines()) for m, p in MODULES.items()}
    assert {m: n for m, n in n_lines.items() if n > 400} == {}


def loaded_by(statement: str) -> set[str]:
    """Top-level packages that are loaded after `statement` ran in a fresh interpreter."""
    code = f"{statement}; import sys; print(*{{m.partition('.')[0] for m in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


HEAVY = {"numpy", "torch", "transformers", "tokenizers", "gguf", "numba", "safetensors"}


def test_importing_the_package_loads_nothing_heavy() -> None:
    assert loaded_by("import qconvert") & HEAVY == set()


def test_modules_of_a_dry_run_load_no_torch() -> None:
    wanted = ("sources", "build", "adapters", "weights", "pipeline", "emit", "report", "conversion", "formats.gguf")
    passes = [m for m in MODULES if m.startswith("passes.")]
    statement = "import " + ", ".join(f"qconvert.{m}" for m in (*wanted, *passes) if m in MODULES)
    assert loaded_by(statement) & {"torch", "transformers", "tokenizers"} == set()
