"""Builders against their rules, what is refused, and what happens to copies."""

import copy
import gc
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewstep.kernels import mask as masks
from fewstep.kernels.mask import AttentionMask, from_predicate, intersect, mask_of, unite
from fewstep.kernels.mask_conversion import dense
from fewstep.kernels.mask_intervals import canonical_intervals
from tests.kernels.strategies import MaskCase, block_causal_rule, builder_cases, mask_cases, range_cases


def ranges_of(mask: AttentionMask, query: int, sample: int = 0) -> list[list[int]]:
    return [pair for pair in mask.intervals[sample, query].tolist() if pair != [0, 0]]


def int32(*rows: list[list[int]]) -> torch.Tensor:
    return torch.tensor([rows], dtype=torch.int32)


@settings(max_examples=150, deadline=None)
@given(builder_cases())
def test_builders_equal_their_rules(case: MaskCase) -> None:
    assert case.mask.intervals.dtype == torch.int32
    assert case.mask.intervals.shape[2] <= 3
    assert torch.equal(dense(case.mask), case.seen)


@settings(max_examples=150, deadline=None)
@given(range_cases(least=0))
def test_any_ranges_become_canonical_and_stay_the_same_set(case: MaskCase) -> None:
    mask = case.mask
    assert torch.equal(dense(mask), case.seen)
    steps = torch.nn.functional.pad(case.seen, (1, 1)).to(torch.int8).diff(dim=-1)
    needed = int((steps == 1).sum(-1).max()) if mask.queries and mask.keys else 0
    assert mask.intervals.shape == (len(case.seen), mask.queries, max(1, needed), 2)


@settings(max_examples=80, deadline=None)
@given(range_cases(max_tokens=60, batch=1), st.integers(1, 500))
def test_from_predicate_finds_the_ranges_of_any_rule(case: MaskCase, block: int) -> None:
    seen = case.seen[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(masks, "PREDICATE_BLOCK", block)
        mask = from_predicate(lambda q, k: seen[q, k], case.mask.queries, case.mask.keys)
    assert torch.equal(mask.intervals, case.mask.intervals)


def test_from_predicate_broadcasts_and_works_without_tokens() -> None:
    assert dense(from_predicate(lambda q, k: k < 3, 4, 5)).sum() == 12
    assert dense(from_predicate(lambda q, k: q > 2, 4, 5)).sum() == 5
    assert from_predicate(lambda q, k: k <= q, 0, 5).intervals.shape == (1, 0, 1, 2)
    assert from_predicate(lambda q, k: k <= q, 5, 0).intervals.tolist() == [[[[0, 0]]] * 5]


def test_from_predicate_names_the_query_that_needs_too_many_ranges() -> None:
    with pytest.raises(ValueError, match=r"Query 7 needs 5 ranges of keys and max_intervals is 4"):
        from_predicate(lambda q, k: (k % 2 == 0) & (q == 7), 20, 10)
    assert from_predicate(lambda q, k: (k % 2 == 0) & (q == 7), 20, 10, max_intervals=5).intervals.shape[2] == 5


@pytest.mark.parametrize("rule", [lambda q, k: (k - q).float(), lambda q, k: (k <= q)[:, :-1], lambda q, k: k[0] < 2])
def test_from_predicate_refuses_what_is_no_matrix_of_truth_values(rule: object) -> None:
    with pytest.raises(ValueError, match=r"must give bool \[6, 6\]"):
        from_predicate(rule, 6, 6)  # pyright: ignore[reportArgumentType]


@settings(max_examples=80, deadline=None)
@given(st.data(), st.integers(1, 60), st.integers(1, 60))
def test_intersect_and_unite_are_and_and_or(data: st.DataObject, queries: int, keys: int) -> None:
    first = data.draw(range_cases(tokens=(queries, keys), batch=2))
    second = data.draw(range_cases(tokens=(queries, keys), batch=2))
    assert torch.equal(dense(intersect(first.mask, second.mask)), first.seen & second.seen)
    assert torch.equal(dense(unite(first.mask, second.mask)), first.seen | second.seen)


def test_combined_promises() -> None:
    odd, low = torch.arange(6) % 2 == 1, torch.arange(6) < 3
    a = masks.causal(6).with_activity(queries=odd, keys=None, verify=True)
    b = masks.full(6).with_activity(queries=low, keys=low)
    both, either = intersect(a, b), unite(a, b)
    assert both.query_active is not None
    assert both.query_active.tolist() == [False, True, False, False, False, False]
    assert both.key_active is low
    assert either.query_active is not None
    assert either.query_active.tolist() == [True, True, True, True, False, True]
    assert either.key_active is None
    assert both.verify
    assert either.verify


def test_combined_masks_must_fit() -> None:
    with pytest.raises(ValueError, match=r"4 queries, 4 keys.*do not fit together"):
        intersect(masks.full(4), masks.full(4, 5))
    two, three = (masks.lengths(torch.ones(n, dtype=torch.long), queries=4, keys=4) for n in (2, 3))
    with pytest.raises(ValueError, match=r"batch 2.*batch 3"):
        unite(two, three)


def test_window_counts_the_own_chunk_and_sinks_come_beside_it() -> None:
    mask = masks.block_causal([2, 3, 1, 2], window=2, sink=1)
    assert [ranges_of(mask, q) for q in (0, 2, 5, 6)] == [[[0, 2]], [[0, 5]], [[0, 6]], [[0, 2], [5, 8]]]
    packed = masks.teacher_forcing([2, 3, 1, 2], window=2, sink=1)
    assert [ranges_of(packed, 8 + q) for q in (0, 2, 5, 6)] == [
        [[8, 10]],
        [[0, 2], [10, 13]],
        [[0, 5], [13, 14]],
        [[0, 2], [5, 6], [14, 16]],
    ]
    assert ranges_of(masks.teacher_forcing([2, 3], window=1), 7) == [[7, 10]]


def test_constant_clean_half_is_promised() -> None:
    mask = masks.teacher_forcing([2, 1], clean_is_constant=True)
    assert mask.query_active is not None
    assert mask.query_active.tolist() == [False] * 3 + [True] * 3
    assert mask.key_active is mask.query_active
    assert masks.teacher_forcing([2, 1]).key_active is None


def test_documents_may_be_empty() -> None:
    mask = masks.documents([0, 2, 0, 1, 0])
    assert mask.intervals.tolist() == [[[[0, 2]], [[0, 2]], [[2, 3]]]]
    assert masks.documents([]).intervals.shape == (1, 0, 1, 2)
    assert masks.documents([0, 0]).keys == 0


def test_lengths_have_a_mask_per_sample() -> None:
    mask = masks.lengths(torch.tensor([3, 0], dtype=torch.int16), queries=2, keys=4)
    assert mask.batch == 2
    assert mask.intervals.tolist() == [[[[0, 3]], [[0, 3]]], [[[0, 0]], [[0, 0]]]]


def test_long_masks_stay_small() -> None:
    mask = masks.teacher_forcing([1560] * 21)
    assert mask.queries == mask.keys == 65520
    assert mask.intervals.numel() * 4 == 65520 * 2 * 2 * 4


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: masks.full(-1), "at least 0"),
        (lambda: masks.full(3, -2), "at least 0"),
        (lambda: masks.causal(-1), "at least 0"),
        (lambda: masks.block_causal([]), "chunks is empty"),
        (lambda: masks.block_causal([3, 0, 2]), r"\[3, 0, 2\], but each must be at least 1"),
        (lambda: masks.teacher_forcing([3, -1]), r"\[3, -1\], but each must be at least 1"),
        (lambda: masks.block_causal([3], window=0), "window"),
        (lambda: masks.teacher_forcing([3], window=2, sink=-1), "sink"),
        (lambda: masks.documents([2, -1]), "documents"),
        (lambda: masks.lengths(torch.tensor([5]), queries=2, keys=4), r"\[5\], but each must be from 0 to keys=4"),
        (lambda: masks.lengths(torch.tensor([-1]), queries=2, keys=4), "from 0 to keys=4"),
        (lambda: masks.lengths(torch.tensor([1.0]), queries=2, keys=4), "integers"),
        (lambda: masks.lengths(torch.tensor([True]), queries=2, keys=4), "integers"),
        (lambda: masks.lengths(torch.tensor(1), queries=2, keys=4), "integers"),
        (lambda: masks.lengths(torch.tensor([1]), queries=-1, keys=4), "at least 0"),
        (lambda: from_predicate(lambda q, k: k <= q, 3, -1), "at least 0"),
        (lambda: from_predicate(lambda q, k: k <= q, 3, 3, max_intervals=0), "at least 1"),
        (lambda: AttentionMask(torch.zeros(1, 2, 1, 2), 3), "int32"),
        (lambda: AttentionMask(torch.zeros(1, 2, 2, dtype=torch.int32), 3), r"\[1, 2, 2\]"),
        (lambda: AttentionMask(torch.zeros(1, 2, 0, 2, dtype=torch.int32), 3), "at least one range"),
        (lambda: AttentionMask(torch.zeros(0, 2, 1, 2, dtype=torch.int32), 3), r"\[0, 2, 1, 2\]"),
        (lambda: AttentionMask(int32([[0, 3]]), -1), "keys=-1"),
        (lambda: AttentionMask(int32([[0, 4]]), 3), "reach from 0 to 4, but there are 3 keys"),
        (lambda: AttentionMask(int32([[-1, 3]]), 3), "reach from -1 to 3"),
        (lambda: AttentionMask(int32([[2, 3], [0, 1]]), 3), "not canonical"),
        (lambda: AttentionMask(int32([[0, 2], [1, 3]]), 3), "not canonical"),
        (lambda: AttentionMask(int32([[0, 1], [1, 3]]), 3), "not canonical"),
        (lambda: AttentionMask(int32([[0, 0], [1, 3]]), 3), "not canonical"),
        (lambda: AttentionMask(int32([[2, 2]]), 3), "not canonical"),
        (lambda: AttentionMask(int32([[3, 1]]), 3), "not canonical"),
        (lambda: masks.full(3).with_activity(queries=torch.ones(4, dtype=torch.bool), keys=None), r"bool \[3\]"),
        (lambda: masks.full(3, 5).with_activity(queries=None, keys=torch.ones(3, dtype=torch.bool)), r"bool \[5\]"),
        (lambda: masks.full(3).with_activity(queries=torch.ones(3), keys=None), "float32"),
        (lambda: mask_of(0), "No mask has the handle 0"),
    ],
)
def test_mistakes_are_told(build: object, message: str) -> None:
    assert callable(build)
    with pytest.raises(ValueError, match=message):
        build()


def test_canonical_ranges_pass_the_check_after_one_call() -> None:
    ranges = torch.tensor([[[[4, 6], [0, 2], [2, 3], [5, 5], [9, 7]], [[0, 0], [3, 3], [1, 2], [1, 2], [0, 9]]]])
    canonical = canonical_intervals(ranges)
    assert canonical.tolist() == [[[[0, 3], [4, 6]], [[0, 9], [0, 0]]]]
    assert AttentionMask(canonical, 9).intervals.shape == (1, 2, 2, 2)


def test_a_mask_cannot_be_changed() -> None:
    with pytest.raises(AttributeError, match="keys"):
        masks.full(3).keys = 4  # pyright: ignore[reportAttributeAccessIssue]


def test_handles_find_live_masks_alone() -> None:
    mask, other = masks.full(3), masks.full(3)
    assert 0 < mask.handle < other.handle
    assert mask_of(mask.handle) is mask
    gone = other.handle
    del other
    gc.collect()
    with pytest.raises(ValueError, match=f"handle {gone}"):
        mask_of(gone)


@settings(max_examples=20, deadline=None)
@given(mask_cases(max_tokens=40))
def test_copies_are_equal_masks_of_their_own(case: MaskCase) -> None:
    mask = case.mask.with_activity(queries=case.mask.query_active, keys=case.mask.key_active, verify=True)
    mask.schedule(16, 16)
    for other in (copy.copy(mask), copy.deepcopy(mask), pickle.loads(pickle.dumps(mask))):
        assert other.handle > mask.handle
        assert mask_of(other.handle) is other
        assert torch.equal(other.intervals, mask.intervals)
        assert (other.keys, other.verify) == (mask.keys, True)
        for mine, its in ((mask.query_active, other.query_active), (mask.key_active, other.key_active)):
            assert (mine is None and its is None) or (mine is not None and its is not None and torch.equal(mine, its))
        assert torch.equal(other.schedule(16, 16).row_tiles, mask.schedule(16, 16).row_tiles)


def test_moving_a_mask_is_done_once() -> None:
    mask = masks.teacher_forcing([2, 3], clean_is_constant=True)
    assert mask.to("cpu") is mask
    assert mask.to(torch.device("cpu")) is mask
    assert mask.schedule(2, 2) is mask.schedule(2, 2)
    assert mask.schedule(2, 4) is not mask.schedule(2, 2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_masks_move_to_the_gpu_and_are_built_there() -> None:
    mask = masks.teacher_forcing([20, 30], clean_is_constant=True).with_activity(queries=None, keys=None, verify=True)
    moved = mask.to("cuda")
    assert moved is mask.to("cuda")
    assert moved is mask.to(moved.intervals.device)
    assert moved.verify
    assert moved.schedule(16, 16).row_tiles.tolist() == mask.schedule(16, 16).row_tiles.tolist()
    direct = masks.teacher_forcing([20, 30], clean_is_constant=True, device="cuda")
    assert direct.intervals.tolist() == mask.intervals.tolist()
    seen = from_predicate(lambda q, k: k <= q, 50, 50, device="cuda")
    assert seen.intervals.tolist() == masks.causal(50).intervals.tolist()


def test_short_forms_name_the_size() -> None:
    assert repr(masks.causal(7)) == "AttentionMask(7 queries, 7 keys, batch 1, 1 ranges, cpu)"


def test_diffusion_forcing_is_block_causal() -> None:
    assert torch.equal(dense(masks.block_causal([1, 4, 4])), block_causal_rule([1, 4, 4], None, 0))
    assert int(dense(masks.block_causal([1, 4, 4])).sum()) == 1 + 4 * 5 + 4 * 9


def test_a_key_bias_shares_what_the_ranges_need_and_is_a_constant() -> None:
    ranges = masks.block_causal([3, 4, 2])
    bias = torch.linspace(-2.0, 2.0, 9, dtype=torch.bfloat16)[None].expand(2, -1)
    mask = ranges.with_key_bias(bias)
    assert mask.ranges is ranges
    assert ranges.ranges is ranges
    assert mask.handle != ranges.handle
    assert mask_of(mask.handle) is mask
    assert mask.schedule(4, 4) is ranges.schedule(4, 4)
    assert mask.key_bias is not None
    assert mask.key_bias.dtype == torch.float32
    assert torch.equal(mask.key_bias, bias.float())
    assert mask.with_key_bias(-bias).ranges is ranges
    again = pickle.loads(pickle.dumps(mask)).key_bias
    assert torch.equal(again, mask.key_bias)
    hidden = ranges.with_key_bias(torch.full((1, 9), -torch.inf)).key_bias
    assert hidden is not None
    assert bool(hidden.isfinite().all())
    with pytest.raises(ValueError, match=r"key_bias is torch\.float32 \[1, 8\], but must be floating \[1 or B, 9\]"):
        ranges.with_key_bias(torch.zeros(1, 8))
    with pytest.raises(ValueError, match=r"it is a constant on the mask's device"):
        ranges.with_key_bias(torch.zeros(1, 9, requires_grad=True))
    with pytest.raises(ValueError, match="masks with a key bias are not combined"):
        masks.unite(mask, ranges)
