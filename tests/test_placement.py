"""Where bytes lie, and what it costs to copy them: against published sizes of Llama-2-7B, and by counting."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest

from qconvert.errors import ResourceError
from qconvert.offloading import notes
from qconvert.placement import ALIGNMENT, Buffer, Class, Placement, offloaded, resident_bits, rounded_up
from qconvert.traffic import Bandwidths, traffic

# Llama-2-7B: [N,K] of the linears of a layer
LINEARS = [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]
N_LINEAR = 32 * sum(n * k for n, k in LINEARS)


def llama2_7b(bits: int, group: int, meta1: float, meta2: float, adapter: int = 0) -> Placement:
    """meta1, meta2: bytes for each group of weights."""

    def buffers() -> Iterator[Buffer]:
        yield Buffer("embedding", 0, "dense", None, 32000 * 4096 * 2, 4096 * 2)
        for layer in range(32):
            for i, (n, k) in enumerate(LINEARS):
                parts: list[tuple[Class, float]] = [
                    ("codes", n * k * bits / 8), ("meta1", meta1 * n * k / group), ("meta2", meta2 * n * k / group)
                ]  # fmt: skip
                yield from (Buffer(f"{layer}.{i}", j, kind, f"layer {layer}", int(x), 0) for j, (kind, x) in enumerate(parts))
            yield Buffer(f"{layer}.norms", 0, "dense", f"layer {layer}", 2 * 4096 * 2, 0)
        yield Buffer("norm", 0, "dense", "head", 4096 * 2, 0)
        yield Buffer("head", 0, "dense", "head", 32000 * 4096 * 2, 0)
        if adapter:
            yield Buffer("lora", 0, "adapter", "layer 0", adapter, 0)

    assert N_LINEAR == 6_476_005_376
    return Placement(tuple(b for b in buffers() if b.nbytes), 1, N_LINEAR)


HQQ = llama2_7b(1, 8, 2, 2 * 2 * 2 / 128)  # 1 bit in groups of 8: u8 scale and zero, an f16 pair for 128 of each


# total, GPU where level 1 is on the host, host: in GB, as the files that were released and the sums in print say
@pytest.mark.parametrize(
    ("placement", "total", "gpu", "host"),
    [
        (HQQ, 3.004, 1.385, 1.619),
        (llama2_7b(1, 8, 4, 0), 4.572, 1.334, 3.238),
        (llama2_7b(1, 8, 3, 0), 3.763, 1.334, 2.429),
        (llama2_7b(1, 8, 2, 2 * 2 * 2 / 128, 93_030_000), 3.097, 1.478, 1.619),
        (llama2_7b(2, 8, 2, 2 * 2 * 2 / 128), 3.813, 2.194, 1.619),
        (llama2_7b(2, 8, 2, 2 * 2 * 2 / 128, 93_030_000), 3.907, 2.288, 1.619),
    ],
    ids=["HQQ 1 bit", "f16 scale and zero", "f16 scale, u8 zero", "HQQ+ 1 bit", "HQQ 2 bits", "HQQ+ 2 bits"],
)
def test_bytes_of_llama_2_7b_are_those_in_print(placement: Placement, total: float, gpu: float, host: float) -> None:
    away = offloaded(placement, ["meta1"], "cpu-pinned", None)
    devices = away.by_device()
    assert sum(b.nbytes for b in placement.buffers) / 1e9 == pytest.approx(total, abs=6e-4)
    assert sum(devices["gpu"].values()) / 1e9 == pytest.approx(gpu, abs=6e-4)
    assert devices["cpu-pinned"].keys() == {"meta1"}
    assert devices["cpu-pinned"]["meta1"] / 1e9 == pytest.approx(host, abs=6e-4)


def test_level_one_crosses_once_for_each_token_and_bounds_decoding() -> None:
    away = offloaded(HQQ, ["meta1"], "cpu-pinned", None)
    assert away.h2d_nbytes == sum(b.nbytes for b in HQQ.buffers if b.kind == "meta1") == 1_619_001_344
    # methods: 135 ms at 12 GB/s, 65 ms at 25 GB/s, 7.4 and 15.4 tokens a second
    for link, seconds, tokens in ((12e9, 0.135, 7.4), (25e9, 0.065, 15.4)):
        found = traffic(away, Bandwidths(link))
        assert found.link_seconds == pytest.approx(seconds, rel=5e-3)
        assert 1 / found.seconds == pytest.approx(tokens, rel=5e-3)
    # all of it in the GPU's own memory: the head is read, the embedding is not
    resident = traffic(HQQ, Bandwidths(25e9))
    for seconds in (resident.seconds, resident.memory_seconds, resident.resident_seconds):
        assert seconds == pytest.approx(0.00248 + 0.000262, rel=5e-3)


def test_fewer_bits_in_the_same_memory_are_named_where_they_are_faster() -> None:
    away = offloaded(HQQ, ["meta1"], "cpu-pinned", None)
    found, speeds = traffic(away, Bandwidths(25e9), 1_850_000_000), Bandwidths(25e9)
    assert found.resident_bits == pytest.approx(8 * (1.85e9 - 2 * 262_144_000 - 266_240 * 2) / N_LINEAR, rel=1e-3)
    bound, dear = notes(away, found, speeds)
    assert "1.62 GB" in bound and "15.4 tokens a second" in bound and "25 GB/s" in bound
    assert "40.8 times" in dear and "1.64 bits per weight" in dear
    fast = Bandwidths(2e12)
    assert len(notes(away, traffic(away, fast, 1_850_000_000), fast)) == 1  # a link as fast as that: nothing to warn of


def test_staging_is_one_slot_more_than_blocks_of_look_ahead() -> None:
    away = offloaded(HQQ, ["meta1"], "cpu-pinned", None)
    (block,) = {sum(a.nbytes for a in arenas) for arenas in away.staged().values()}
    assert len(away.staged()) == 32 and block == 50_593_792  # of all seven linears: 32 copies, not 224
    for ahead in (0, 1, 4):
        assert away._replace(ahead=ahead).staging_nbytes == (ahead + 1) * block


def test_codes_move_as_well_as_metadata_and_cost_the_same() -> None:
    codes = offloaded(llama2_7b(3, 128, 0, 0), ["codes"], "cpu-pinned", None)
    n = codes.by_device()["cpu-pinned"]["codes"]
    assert n == codes.h2d_nbytes == N_LINEAR * 3 // 8


def test_a_lookup_costs_a_row() -> None:
    away = offloaded(HQQ, ["dense"], "cpu-pinned", None)
    streamed = sum(b.nbytes for b in HQQ.buffers if b.kind == "dense" and b.block is not None)
    assert away.h2d_nbytes == streamed + 4096 * 2


@pytest.mark.parametrize("vram", [2.9e9, 2.5e9, 2e9, 1.5e9])
def test_no_more_is_moved_than_must_be(vram: float) -> None:
    away = offloaded(HQQ, ["meta1"], "cpu-pinned", int(vram))
    assert away.gpu_nbytes <= vram
    blocks = [int(block.split()[1]) for block in away.staged()]
    moved = len(blocks) * 50_593_792
    assert away.gpu_nbytes + 50_593_792 > vram and away.h2d_nbytes == moved
    gaps = {b - a for a, b in zip(blocks, blocks[1:], strict=False)}
    assert max(gaps) - min(gaps) <= 1  # evenly spaced


def test_all_stays_where_all_fits() -> None:
    assert offloaded(HQQ, ["meta1"], "cpu-pinned", 3_100_000_000) == HQQ


def test_too_little_memory_is_refused_with_numbers_and_the_least_that_works() -> None:
    with pytest.raises(ResourceError) as e:
        offloaded(HQQ, ["meta1"], "cpu-pinned", 1_450_000_000)
    assert str(e.value) == (
        "--vram 1.45 GB: the least that is possible takes 1.49 GB = 809.50 MB codes + 50.59 MB meta2 + 524.82 MB dense + "
        "101.19 MB staging\nhint: --vram 1.49g, or --prefetch 0, or fewer bits: 1.14 per weight fit without offloading"
    )
    assert offloaded(HQQ, ["meta1"], "cpu-pinned", 1_490_000_000).away
    assert offloaded(HQQ._replace(ahead=0), ["meta1"], "cpu-pinned", 1_450_000_000).away


@pytest.mark.parametrize("nbytes", [1, 999, 1001, 123_456, 1_486_097_920, 70_000_000_001])
def test_what_is_named_as_enough_is_enough(nbytes: int) -> None:
    from qconvert.request import parse_nbytes

    assert nbytes <= parse_nbytes(rounded_up(nbytes)) <= nbytes * 1.01 + 1


def test_arenas_are_aligned_contiguous_and_in_the_order_of_execution() -> None:
    away = offloaded(HQQ, ["meta1"], "cpu-pinned", None)
    arenas = [a for a in away.arenas if a.kind == "meta1"]
    assert [a.block for a in arenas] == [f"layer {i}" for i in range(32)]
    for arena in arenas:
        assert [b.weight for b in arena.buffers] == [f"{arena.block.split()[1]}.{i}" for i in range(7)]
        assert arena.offsets == tuple(sum(b.nbytes for b in arena.buffers[:i]) for i in range(8))
        assert arena.room % ALIGNMENT == 0 and 0 <= arena.room - arena.nbytes < ALIGNMENT


def test_buffers_of_odd_sizes_begin_where_a_kernel_can_load_them() -> None:
    odd = Placement((Buffer("a", 1, "meta1", "x", 33, 0, "disk"), Buffer("b", 1, "meta1", "x", 7, 0, "disk")))
    (arena,) = odd.arenas
    assert (arena.offsets, arena.nbytes, arena.room) == ((0, 48, 55), 55, 256)


def test_bits_that_fit_are_those_of_a_model_that_fits() -> None:
    bits = resident_bits(HQQ, sum(b.nbytes for b in HQQ.buffers))
    assert bits == pytest.approx(3.0625, rel=1e-6) and math.isfinite(bits)
