"""Schedules against a walk over the whole matrix, and counts of tiles for video layouts."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fewstep.kernels import mask as masks
from fewstep.kernels.mask import AttentionMask
from fewstep.kernels.mask_schedule import TileSchedule, build_schedule
from tests.kernels.strategies import MaskCase, mask_cases

FRAME = 1560
FIRST_ALONE = [FRAME] + [4 * FRAME] * 5


def walk(seen: Tensor, active: Tensor, query_tile: int, key_tile: int) -> tuple[list[list[int]], list[int]]:
    """(tiles of each class of each query tile, tiles per query tile) out of the matrix [Nq, Nk]."""
    segments: list[list[int]] = []
    counts: list[int] = []
    for rows in seen.split(query_tile):
        found: list[list[int]] = [[], [], [], []]
        for tile, (block, flags) in enumerate(zip(rows.split(key_tile, 1), active.split(key_tile), strict=True)):
            if block.any():
                found[2 * (not bool(block.all())) + (not bool(flags.any()))].append(tile)
        segments += found
        counts.append(sum(map(len, found)))
    return segments, counts


def segments_of(ptr: Tensor, tiles: Tensor) -> list[list[int]]:
    bounds = ptr.tolist()
    return [tiles[start:stop].tolist() for start, stop in pairwise(bounds)]


def check_order(order: Tensor, counts: list[int]) -> None:
    assert sorted(order.tolist()) == list(range(len(counts)))
    assert [counts[tile] for tile in order.tolist()] == sorted(counts, reverse=True)


def activity(mask: AttentionMask) -> tuple[Tensor, Tensor]:
    queries = torch.ones(mask.queries, dtype=torch.bool) if mask.query_active is None else mask.query_active
    keys = torch.ones(mask.keys, dtype=torch.bool) if mask.key_active is None else mask.key_active
    return queries, keys


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(mask_cases(), st.integers(1, 48), st.sampled_from([1, 7, 16, 32, 64]))
def test_classes_equal_those_of_the_whole_matrix(case: MaskCase, query_tile: int, key_tile: int) -> None:
    mask, (query_active, key_active) = case.mask, activity(case.mask)
    schedule = mask.schedule(query_tile, key_tile)
    rows, columns, row_counts, column_counts = [], [], [], []
    for seen in case.seen:
        segments, counts = walk(seen, key_active, query_tile, key_tile)
        rows, row_counts = rows + segments, [*row_counts, counts]
        segments, counts = walk(seen.mT, query_active, key_tile, query_tile)
        columns, column_counts = columns + segments, [*column_counts, counts]
    assert segments_of(schedule.row_ptr, schedule.row_tiles) == rows
    assert segments_of(schedule.column_ptr, schedule.column_tiles) == columns
    for sample in range(mask.batch):
        check_order(schedule.row_order[sample], row_counts[sample])
        check_order(schedule.column_order[sample], column_counts[sample])
    assert schedule.query_active.tolist() == [bool(part.any()) for part in query_active.split(query_tile)]
    assert schedule.key_active.tolist() == [bool(part.any()) for part in key_active.split(key_tile)]
    reaches = [bool(rows[4 * a] or rows[4 * a + 2]) for a in range(len(rows) // 4)]
    own = schedule.query_active.repeat(mask.batch).tolist()
    assert schedule.row_active.flatten().tolist() == [a or b for a, b in zip(reaches, own, strict=True)]
    tiles = mask.batch * len(schedule.query_active) * len(schedule.key_active)
    assert schedule.full + schedule.partial == schedule.row_tiles.numel() == schedule.column_tiles.numel()
    assert schedule.empty == tiles - sum(map(sum, row_counts))


def test_types_are_those_kernels_read() -> None:
    mask = masks.lengths(torch.tensor([70, 3]), queries=130, keys=90)
    schedule = mask.schedule(64, 32)
    lists = (schedule.row_ptr, schedule.row_tiles, schedule.column_ptr, schedule.column_tiles)
    assert {x.dtype for x in (*lists, schedule.row_order, schedule.column_order)} == {torch.int32}
    assert (schedule.query_tile, schedule.key_tile, schedule.queries, schedule.keys) == (64, 32, 130, 90)
    assert schedule.row_ptr.shape == (2 * 3 * 4 + 1,)
    assert schedule.column_ptr.shape == (2 * 3 * 4 + 1,)
    assert schedule.row_order.shape == schedule.column_order.shape == schedule.row_active.shape == (2, 3)
    assert all(x.is_contiguous() for x in (*lists, schedule.row_order, schedule.column_order, schedule.row_active))


def test_narrow_last_tiles_can_be_full() -> None:
    schedule = masks.full(130, 70).schedule(128, 64)
    assert (schedule.full, schedule.partial, schedule.empty) == (4, 0, 0)
    ragged = masks.lengths(torch.tensor([69]), queries=130, keys=70).schedule(128, 64)
    assert (ragged.full, ragged.partial, ragged.empty) == (2, 2, 0)


def test_two_ranges_that_fill_a_tile_only_together_leave_it_partial() -> None:
    intervals = torch.tensor([[[[0, 7], [8, 16]]] * 16], dtype=torch.int32)
    schedule = AttentionMask(intervals, 16).schedule(16, 16)
    assert (schedule.full, schedule.partial) == (0, 1)


@pytest.mark.parametrize(("queries", "keys"), [(0, 0), (0, 5), (5, 0)])
def test_no_tokens_make_no_tiles(queries: int, keys: int) -> None:
    schedule = masks.full(queries, keys).schedule(2, 2)
    assert schedule.row_tiles.numel() == schedule.column_tiles.numel() == 0
    assert schedule.row_ptr.tolist() == [0] * (-(-queries // 2) * 4 + 1)
    assert schedule.column_ptr.tolist() == [0] * (-(-keys // 2) * 4 + 1)
    assert (schedule.full, schedule.partial, schedule.empty) == (0, 0, 0)


@pytest.mark.parametrize("size", [(0, 64), (64, -1)])
def test_tiles_without_tokens_are_refused(size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        masks.full(4).schedule(*size)
    with pytest.raises(ValueError, match=f"{size[0]} x {size[1]}"):
        build_schedule(masks.full(4).intervals, 4, *size, None, None)


# Counts of 128 x 128 tiles; the layouts are those of Wan 2.1 at 480 x 832 with 21 latent frames, and longer ones.
LAYOUTS = [
    (lambda: masks.block_causal([3 * FRAME] * 7), 37230, 439, 27867),
    (lambda: masks.block_causal([FRAME] * 21), 34098, 462, 30976),
    (lambda: masks.block_causal(FIRST_ALONE), 38550, 451, 26535),
    (lambda: masks.block_causal([3 * FRAME] * 7, window=3, sink=1), 29017, 768, 35751),
    (lambda: masks.block_causal([3 * FRAME] * 7, window=3), 23688, 732, 41116),
    (lambda: masks.teacher_forcing([3 * FRAME] * 7), 73736, 2115, 186293),
    (lambda: masks.teacher_forcing([FRAME] * 21), 67499, 2121, 192524),
    (lambda: masks.teacher_forcing(FIRST_ALONE), 76351, 2128, 183665),
    (lambda: masks.teacher_forcing([3 * FRAME] * 7, window=3, sink=1), 57421, 2662, 202061),
    (lambda: masks.teacher_forcing([8 * 880] * 12), 471900, 0, 1270500),
    (lambda: masks.block_causal([3 * FRAME] * 80, window=3, sink=1), 412813, 13533, 8129279),
]


@pytest.mark.parametrize(("build", "full", "partial", "empty"), LAYOUTS)
def test_tile_counts_of_video_layouts(build: object, full: int, partial: int, empty: int) -> None:
    assert callable(build)
    mask = build()
    assert isinstance(mask, AttentionMask)
    schedule = mask.schedule(128, 128)
    assert (schedule.full, schedule.partial, schedule.empty) == (full, partial, empty)


def matrix_products(schedule: TileSchedule) -> int:
    """Products per tile of forward and tangent: 6 where all move, 4 and 5 where one side rests, 2 where both do."""
    per_class = schedule.row_ptr.diff().view(-1, 4)
    active, inactive = (per_class[:, 0] + per_class[:, 2]).long(), (per_class[:, 1] + per_class[:, 3]).long()
    products = torch.where(schedule.query_active, 6 * active + 4 * inactive, 5 * active + 2 * inactive)
    return int(products.sum())


@pytest.mark.parametrize(
    ("chunks", "tile", "density", "waste", "partial", "gain", "noisy_gain"),
    [
        ([1560] * 21, (128, 64), 0.262, 1.011, 0.023, 1.94, 2.87),
        ([1560] * 21, (64, 64), 0.262, 1.007, 0.014, 1.94, 2.87),
        ([4680] * 7, (128, 64), 0.286, 1.010, 0.021, 1.85, 2.67),
        ([300] * 8, (128, 64), 0.281, 1.163, 0.26, 1.86, 2.70),
        ([256] * 8, (64, 64), 0.281, 1.000, 0.0, 1.86, 2.70),
    ],
)
def test_what_activity_saves_in_teacher_forcing(
    chunks: list[int],
    tile: tuple[int, int],
    density: float,
    waste: float,
    partial: float,
    gain: float,
    noisy_gain: float,
) -> None:
    mask = masks.teacher_forcing(chunks, clean_is_constant=True)
    schedule = mask.schedule(*tile)
    pairs = int((mask.intervals[..., 1] - mask.intervals[..., 0]).sum(dtype=torch.long))
    tiles = schedule.full + schedule.partial
    assert pairs / mask.queries**2 == pytest.approx(density, abs=5e-4)
    assert tiles * tile[0] * tile[1] / pairs == pytest.approx(waste, abs=6e-4)
    assert schedule.partial / tiles == pytest.approx(partial, abs=6e-3)
    # Exact pairs: 6 n (n + 1) products against 3 n^2 + 5 n, and 2 n (n - 1) + 6 n for the noisy half alone.
    n = len(chunks)
    assert 6 * n * (n + 1) / (3 * n * n + 5 * n) == pytest.approx(gain, abs=6e-3)
    assert 6 * n * (n + 1) / (2 * n * (n - 1) + 6 * n) == pytest.approx(noisy_gain, abs=6e-3)
    # Tiles across the edge between the halves count as active, which costs little where chunks are long.
    slack = 0.02 if chunks[0] > 1000 or chunks[0] % 128 == 0 else 0.12
    assert 6 * tiles / matrix_products(schedule) == pytest.approx(gain, rel=slack)
    noisy = AttentionMask(mask.intervals[:, sum(chunks) :], mask.keys, None, mask.key_active).schedule(*tile)
    assert 6 * tiles / matrix_products(noisy) == pytest.approx(noisy_gain, rel=slack)
