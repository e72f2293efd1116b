"""Reading checkpoints. Oracles: the safetensors library, torch."""

from __future__ import annotations

import importlib
import json
import pkgutil
import random
import subprocess
import sys
import threading
import time
from pathlib import Path

import attacks
import numpy as np
import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from safetensors_writer import WEIGHTS, entries, write, write_model, write_raw, write_shards

from qconvert.errors import InputError, UnsupportedError
from qconvert.model_cache import find_model
from qconvert.sources import Store, read_checkpoint
from qconvert.tensor_files import TensorFile, TorchFile

ATTACKS = sorted(m.name for m in pkgutil.iter_modules(attacks.__path__))


def bits(t: torch.Tensor) -> np.ndarray:
    return t.view(torch.int16).numpy().view(np.uint16) if t.dtype == torch.bfloat16 else t.numpy()


def stored(path: Path, alias: str = "base") -> Store:
    store = Store()
    store.add(alias, path)
    return store


@pytest.mark.parametrize("name", ATTACKS)
def test_hostile_input_ends_in_its_named_error(name: str, tmp_path: Path) -> None:
    attack = importlib.import_module(f"attacks.{name}")
    attack.make(tmp_path / "model")
    with pytest.raises(attack.ERROR) as caught:
        read_checkpoint(tmp_path / "model", Store())
    assert attack.SAYS in caught.value.message
    assert type(caught.value) is attack.ERROR
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16", "int64", "bool"])
def test_rows_and_columns_are_those_the_safetensors_library_wrote(dtype: str, tmp_path: Path) -> None:
    a = (torch.randn(37, 53) * 9).to(getattr(torch, dtype))
    save_file({"x": torch.ones(3), "a": a}, tmp_path / "model.safetensors")
    store = stored(tmp_path)
    info = store.tensors("base")["a"]
    assert info.shape == (37, 53)
    np.testing.assert_array_equal(store.read(info.ref, 5, 30), bits(a)[5:30])
    np.testing.assert_array_equal(store.read_columns(info.ref, 11, 13), bits(a)[:, 11:13])


def test_scalars_vectors_cubes_and_empty_tensors_are_read(tmp_path: Path) -> None:
    t = {"s": torch.tensor(3.5), "v": torch.arange(7.0), "c": torch.randn(4, 3, 2), "e": torch.ones(0, 5)}
    save_file(t, tmp_path / "model.safetensors")
    store = stored(tmp_path)
    for name, value in t.items():
        info = store.tensors("base")[name]
        got = store.read(info.ref, 0, value.shape[0] if value.ndim else 1)
        assert got.shape == info.shape == tuple(value.shape)
        np.testing.assert_array_equal(got, value.numpy())


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_rows_of_stacked_matrices_are_counted_through(name: str, tmp_path: Path) -> None:
    stack = torch.randn(4, 3, 5)
    if name.endswith(".bin"):
        torch.save({"w": stack}, tmp_path / name)
    else:
        save_file({"w": stack}, tmp_path / name)
    store = stored(tmp_path)
    ref = store.tensors("base")["w"].ref
    for begin, end in ((0, 12), (2, 7), (3, 6), (11, 12), (4, 4)):
        np.testing.assert_array_equal(store.read_stacked(ref, begin, end), stack.reshape(12, 5).numpy()[begin:end])
    with pytest.raises(InputError, match="rows"):
        store.read_stacked(ref, 3, 13)


def test_columns_of_a_wide_matrix_are_read_without_reading_the_rest(tmp_path: Path) -> None:
    wide = np.random.default_rng(0).normal(size=(20, 50_000)).astype(np.float32)
    write(tmp_path / "model.safetensors", {"w": wide})
    np.testing.assert_array_equal(
        stored(tmp_path).read_columns("base/model.safetensors#w", 40_000, 40_010), wide[:, 40_000:40_010]
    )


def test_threads_read_the_same_file_at_once(tmp_path: Path) -> None:
    w = np.arange(1000 * 64, dtype=np.float32).reshape(1000, 64)
    write(tmp_path / "model.safetensors", {"w": w})
    store, wrong = stored(tmp_path), []

    def work(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(200):
            i = rng.randrange(990)
            if not np.array_equal(store.read("base/model.safetensors#w", i, i + 10), w[i : i + 10]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(s,)) for s in range(4)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert wrong == []


def test_dtype_without_rows_is_listed_and_refused_when_read(tmp_path: Path) -> None:
    tensors = {"q": torch.ones(4, 4).to(torch.float8_e5m2), "i": torch.ones(2, dtype=torch.int8)}
    save_file(tensors, tmp_path / "m.safetensors")
    store = stored(tmp_path / "m.safetensors")
    assert {n: i.dtype for n, i in store.tensors("base").items()} == {"q": "f8_e5m2", "i": "i8"}
    with pytest.raises(UnsupportedError, match="q is f8_e5m2"):
        store.read("base/m.safetensors#q", 0, 1)


def test_file_cut_after_its_header_was_read_is_an_error_not_garbage(tmp_path: Path) -> None:
    path = write_model(tmp_path)
    store = stored(tmp_path)
    ref = store.tensors("base")["b.weight"].ref
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(InputError, match=r"b\.weight: the file ended"):
        store.read(ref, 0, 2)


def test_closed_store_opens_its_files_again(tmp_path: Path) -> None:
    write_model(tmp_path)
    store = stored(tmp_path)
    ref = store.tensors("base")["a.weight"].ref
    store.close()
    np.testing.assert_array_equal(store.read(ref, 1, 3), WEIGHTS["a.weight"][1:3])


@pytest.mark.parametrize(
    ("ref", "says"),
    [
        ("other/model.safetensors#a.weight", "no source is called 'other'"),
        ("base/model.safetensors#c", "no such tensor"),
        ("base/absent.safetensors#c", "No such file"),
        ("base/../x.safetensors#c", "leads out"),
    ],
)
def test_ref_to_nothing_is_an_input_error(ref: str, says: str, tmp_path: Path) -> None:
    write_model(tmp_path)
    with pytest.raises(InputError, match=says):
        stored(tmp_path).info(ref)


def test_rows_beyond_the_last_are_refused(tmp_path: Path) -> None:
    write_model(tmp_path)
    with pytest.raises(InputError, match=r"rows 2\.\.4 of 3"):
        stored(tmp_path).read("base/model.safetensors#a.weight", 2, 4)


def test_header_with_any_bit_flipped_is_refused_where_the_safetensors_library_refuses(tmp_path: Path) -> None:
    good, bad = write_model(tmp_path).read_bytes(), tmp_path / "bad.safetensors"
    n = 8 + int.from_bytes(good[:8], "little")
    accepted = 0
    for bit in range(8 * n):
        flipped = bytearray(good)
        flipped[bit // 8] ^= 1 << bit % 8
        bad.write_bytes(flipped)
        try:
            stored(bad).tensors("base")
        except InputError:
            continue
        accepted += 1
        with safe_open(bad, "numpy"):  # raises where we took a header that the library refuses
            pass
    assert accepted < 150  # flips within a tensor's name, which nothing can notice


def test_random_headers_are_taken_only_where_the_safetensors_library_takes_them(tmp_path: Path) -> None:
    rng, path = random.Random(0), tmp_path / "m.safetensors"
    values = [0, 1, 3, 4, -1, 12, 48, 64, 1 << 62, 1.0, True, None, "4", "F32", [0, 48], [3, 4], [], {}, "\ud800"]
    for _ in range(400):
        table: dict[str, object] = entries(WEIGHTS)
        entry = rng.choice(list(table.values()))
        assert isinstance(entry, dict)
        key = rng.choice([*entry, "__metadata__"])
        if key == "__metadata__":
            table[key] = rng.choice(values)
        elif isinstance(entry[key], list) and rng.random() < 0.7:
            entry[key][rng.randrange(2)] = rng.choice(values)
        else:
            entry[key] = rng.choice(values)
        write_raw(path, table, bytes(64))
        try:
            stored(path).tensors("base")
        except InputError:
            continue
        try:
            with safe_open(path, "numpy"):
                pass
        except SafetensorError as e:
            raise AssertionError(f"taken here, refused by safetensors: {table}") from e


def test_shards_are_found_through_the_index(tmp_path: Path) -> None:
    write_shards(tmp_path)
    store = stored(tmp_path)
    refs = {n: i.ref for n, i in store.tensors("base").items()}
    assert refs["b.weight"] == "base/model-00002-of-00002.safetensors#b.weight"
    for name, t in WEIGHTS.items():
        np.testing.assert_array_equal(store.read(refs[name], 0, len(t)), t)


def test_tensor_that_the_index_forgot_is_not_lost(tmp_path: Path) -> None:
    write_shards(tmp_path)
    extra = {"a.weight": WEIGHTS["a.weight"], "extra": np.ones(3, np.float32)}
    write(tmp_path / "model-00001-of-00002.safetensors", extra)
    assert set(stored(tmp_path).tensors("base")) == {"a.weight", "b.weight", "extra"}


def test_index_of_70b_shapes_is_read_within_a_second(tmp_path: Path) -> None:
    weight_map, n_layers, n_shards = {}, 80, 30
    for s in range(n_shards):
        shard = f"model-{s:05d}-of-{n_shards:05d}.safetensors"
        names = [f"model.layers.{i}.w{j}" for i in range(s, n_layers, n_shards) for j in range(9)]
        weight_map |= dict.fromkeys(names, shard)
        table, at = {}, 0
        for name in names:
            nbytes = 8192 * 1024 * 2
            table[name] = {"dtype": "BF16", "shape": [8192, 1024], "data_offsets": [at, at + nbytes]}
            at += nbytes
        write_raw(tmp_path / shard, table, b"")
        with (tmp_path / shard).open("r+b") as f:
            f.truncate(f.seek(0, 2) + at)  # sparse
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    start = time.perf_counter()
    assert len(stored(tmp_path).tensors("base")) == n_layers * 9
    assert time.perf_counter() - start < 1  # measured 0.014 s on 2 cores; the whole dry run has 2 s


@pytest.mark.parametrize("zipped", [True, False])
def test_bin_gives_what_safetensors_gives(zipped: bool, tmp_path: Path) -> None:
    t = {"a": torch.randn(9, 5).bfloat16(), "b": torch.randn(4, 6), "t": torch.randn(6, 4).T, "n": torch.arange(3)}
    torch.save(t, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    store = stored(tmp_path)
    infos = store.tensors("base")
    assert {n: i.dtype for n, i in infos.items()} == {"a": "bf16", "b": "f32", "t": "f32", "n": "i64"}
    for name in ("a", "b", "t"):
        np.testing.assert_array_equal(store.read(infos[name].ref, 1, 4), bits(t[name].contiguous())[1:4])
        np.testing.assert_array_equal(store.read_columns(infos[name].ref, 1, 3), bits(t[name][:, 1:3].contiguous()))


def test_bin_shards_are_found_through_their_index(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2, 2)}, tmp_path / "pytorch_model-00001-of-00001.bin")
    index = {"weight_map": {"a": "pytorch_model-00001-of-00001.bin"}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert stored(tmp_path).tensors("base")["a"].ref == "base/pytorch_model-00001-of-00001.bin#a"


def test_bin_of_int16_is_listed_and_refused_when_read(tmp_path: Path) -> None:
    torch.save({"q": torch.ones(2, 2, dtype=torch.int16)}, tmp_path / "x.bin")
    file: TensorFile = TorchFile(tmp_path / "x.bin")
    assert file.types["q"] == ("int16", (2, 2))
    with pytest.raises(UnsupportedError, match="q is int16"):
        file.read("q", 0, 1)


@pytest.mark.parametrize("ending", ["safetensors", "bin"])
def test_adapter_alias_reads_the_adapter_beside_a_model(ending: str, tmp_path: Path) -> None:
    write_model(tmp_path)
    t = {"base_model.model.q.lora_A.weight": torch.ones(2, 4)}
    path = tmp_path / f"adapter_model.{ending}"
    if ending == "bin":
        torch.save(t, path)
    else:
        save_file(t, path)
    assert set(stored(tmp_path, "adapter0").tensors("adapter0")) == set(t)
    assert set(stored(tmp_path).tensors("base")) == set(WEIGHTS)


def test_adapter_given_as_the_model_is_refused_with_the_way_to_write_it(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError) as caught:
        read_checkpoint(tmp_path, Store())
    assert caught.value.hint is not None and "MODEL+" in caught.value.hint


def test_folder_without_weights_says_what_was_looked_for(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "weights.gguf").write_bytes(b"")
    with pytest.raises(InputError, match=r"looked for model\.safetensors, .*found weights\.gguf"):
        read_checkpoint(tmp_path, Store())


def cache(home: Path, commit: str = "a" * 40, name: str = "org/tiny") -> Path:
    """A model as huggingface_hub stores it: snapshots of links to blobs."""
    repo = home / "hub" / f"models--{name.replace('/', '--')}"
    snapshot = repo / "snapshots" / commit
    write_model(snapshot)
    (repo / "blobs").mkdir(exist_ok=True)
    for i, path in enumerate(sorted(snapshot.iterdir())):
        path.rename(repo / "blobs" / f"{commit}{i}")
        path.symlink_to(Path("../../blobs") / f"{commit}{i}")
    (repo / "refs").mkdir(exist_ok=True)
    (repo / "refs" / "main").write_text(commit)
    return snapshot


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home"


def test_model_name_is_found_in_the_hugging_face_cache_and_its_links_are_followed(home: Path) -> None:
    cache(home)
    store = Store()
    checkpoint = read_checkpoint(find_model("org/tiny"), store)
    assert checkpoint.revision == "a" * 40
    np.testing.assert_array_equal(store.read(checkpoint.tensors["a.weight"].ref, 0, 3), WEIGHTS["a.weight"])


def test_revision_is_a_branch_a_commit_or_its_beginning(home: Path) -> None:
    cache(home)
    other = cache(home, "b" * 40)
    (other.parent.parent / "refs" / "refs" / "pr").mkdir(parents=True)
    (other.parent.parent / "refs" / "refs" / "pr" / "1").write_text("a" * 40)
    assert find_model("org/tiny").name == "b" * 40
    assert find_model("org/tiny@" + "a" * 40).name == "a" * 40
    assert find_model("org/tiny@aaaaaaa").name == "a" * 40
    assert find_model("org/tiny@refs/pr/1").name == "a" * 40


def test_cache_folder_is_that_of_hf_hub_cache(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache(home, name="tiny")
    monkeypatch.setenv("HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setenv("HF_HOME", "/nowhere")
    assert find_model("tiny").name == "a" * 40


def test_existing_folder_wins_over_the_cache(home: Path, tmp_path: Path) -> None:
    cache(home)
    (tmp_path / "org" / "tiny").mkdir(parents=True)
    assert find_model("org/tiny") == Path("org/tiny")


def test_model_that_is_nowhere_says_how_to_download_it(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError) as caught:
        find_model("org/absent@v2")
    assert str(home / "hub" / "models--org--absent") in caught.value.message
    assert caught.value.hint == "hf download org/absent --revision v2 (HF_HUB_OFFLINE is set: unset it first)"


def test_revision_that_is_not_cached_names_those_that_are(home: Path) -> None:
    cache(home)
    with pytest.raises(InputError, match=r"revision v9 is not in the cache .* there are aaaa"):
        find_model("org/tiny@v9")


@pytest.mark.parametrize("text", ["../x/y@z", "org/tiny@/etc/passwd", "org/tiny@../../x", "a/b/c", "/no/such/folder"])
def test_name_that_is_no_model_name_is_no_such_folder(text: str, home: Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        find_model(text)


@pytest.mark.parametrize("text", ["x" * 5000, "~no-such-user/model", "org/" + "y" * 245])
def test_text_that_no_disk_can_hold_is_an_input_error(text: str, home: Path) -> None:
    with pytest.raises(InputError):
        find_model(text)


def test_file_given_as_a_model_names_its_folder(home: Path, tmp_path: Path) -> None:
    path = write_model(tmp_path / "m")
    with pytest.raises(InputError) as caught:
        find_model(str(path))
    assert caught.value.hint == f"give the folder: {tmp_path / 'm'}"


def test_alias_that_is_taken_is_refused_for_another_folder_only(tmp_path: Path) -> None:
    store = stored(tmp_path)
    store.add("base", tmp_path)
    with pytest.raises(InputError, match="two sources are called 'base'"):
        store.add("base", tmp_path / "other")


def test_snapshot_link_out_of_its_repository_is_refused(home: Path, tmp_path: Path) -> None:
    snapshot = cache(home)
    secret = write_model(tmp_path / "secret")
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to(secret)
    with pytest.raises(InputError, match="leads out of the folder, to"):
        read_checkpoint(snapshot, Store())


def test_reading_safetensors_loads_no_torch(tmp_path: Path) -> None:
    write_model(tmp_path)
    code = (
        "import sys; from pathlib import Path; from qconvert.sources import *; s = Store();"
        f"c = read_checkpoint(Path({str(tmp_path)!r}), s); s.read(c.tensors['a.weight'].ref, 0, 1);"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1]).returncode == 0


def test_shipped_model_reads_as_the_safetensors_library_reads_it(shared_data: Path) -> None:
    store = Store()
    checkpoint = read_checkpoint(shared_data / "models" / "novels-13m", store)
    assert checkpoint.generation_config and checkpoint.revision is None
    with safe_open(shared_data / "models" / "novels-13m" / "model.safetensors", "pt") as f:
        assert set(f.keys()) == set(checkpoint.tensors)
        for name in ("model.embed_tokens.weight", "model.norm.weight", "model.layers.3.mlp.down_proj.weight"):
            want = bits(f.get_tensor(name))
            np.testing.assert_array_equal(store.read(checkpoint.tensors[name].ref, 0, len(want)), want)
