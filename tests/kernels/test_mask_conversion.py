"""Dense and block masks against torch's own."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from fewstep.kernels import mask as masks
from fewstep.kernels.attention_reference import attention_reference
from fewstep.kernels.mask_conversion import dense, flex_block_mask
from tests.kernels.strategies import MaskCase, mask_cases


def listed(counts: Tensor | None, indices: Tensor | None) -> list[list[int]]:
    """The tiles that count in each row of a block mask."""
    assert counts is not None
    assert indices is not None
    rows = zip(counts.flatten().tolist(), indices.flatten(0, -2).tolist(), strict=True)
    return [tiles[:count] for count, tiles in rows]


def lists_of(mask: BlockMask) -> list[list[list[int]]]:
    return [
        listed(mask.kv_num_blocks, mask.kv_indices),
        listed(mask.full_kv_num_blocks, mask.full_kv_indices),
        listed(mask.q_num_blocks, mask.q_indices),
        listed(mask.full_q_num_blocks, mask.full_q_indices),
    ]


@settings(max_examples=40, deadline=None)
@given(mask_cases(max_tokens=100), st.sampled_from([8, 16, 64]))
def test_block_mask_equals_the_one_torch_builds(case: MaskCase, block: int) -> None:
    seen, shared = case.seen, len(case.seen) == 1

    def rule(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return seen[0 if shared else b, q, k]

    queries, keys = case.mask.queries, case.mask.keys
    ours = flex_block_mask(case.mask, block)
    theirs = create_block_mask(rule, len(seen), 1, queries, keys, device="cpu", BLOCK_SIZE=block)
    assert lists_of(ours) == lists_of(theirs)
    assert ours.seq_lengths == theirs.seq_lengths == (queries, keys)
    assert (block, block) == ours.BLOCK_SIZE
    assert torch.equal(ours.to_dense(), theirs.to_dense())


@settings(max_examples=20, deadline=None)
@given(mask_cases(max_tokens=60))
def test_rule_of_the_block_mask_is_the_mask(case: MaskCase) -> None:
    rule = flex_block_mask(case.mask).mask_mod
    b, q, k = (torch.arange(n) for n in case.seen.shape)
    values = [[[bool(rule(i, torch.tensor(0), x, y)) for y in k[:: max(1, len(k) // 7)]] for x in q[::9]] for i in b]
    assert values == case.seen[:, ::9, :: max(1, len(k) // 7)].tolist()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("batch", [1, 2])
def test_flex_attention_agrees_with_the_reference(batch: int) -> None:
    mask = masks.teacher_forcing([20, 30, 25], window=2, sink=1)
    if batch == 2:
        mask = masks.intersect(mask, masks.lengths(torch.tensor([150, 90]), queries=150, keys=150))
    q, k, v = (torch.randn(2, 2, 150, 16) for _ in range(3))
    ours = attention_reference(q, k, v, mask=mask).output
    theirs = flex_attention(q, k, v, block_mask=flex_block_mask(mask, 32))
    assert isinstance(theirs, Tensor)
    assert (theirs - ours).abs().max() < 2e-6


def test_dense_of_nothing() -> None:
    assert dense(masks.full(0, 3)).shape == (1, 0, 3)
    assert dense(masks.full(3, 0)).shape == (1, 3, 0)
    assert dense(masks.lengths(torch.tensor([0, 2]), queries=1, keys=2)).tolist() == [[[False, False]], [[True, True]]]


@pytest.mark.parametrize(("queries", "keys", "block"), [(0, 3, 128), (3, 0, 128), (3, 3, 0)])
def test_block_masks_need_tokens(queries: int, keys: int, block: int) -> None:
    with pytest.raises(ValueError, match=f"{queries} queries and {keys} keys and block={block}"):
        flex_block_mask(masks.full(queries, keys), block)
