"""Batching of conditions, and the errors that keep a batch consistent."""

import pytest
import torch

from fewstep.core.condition import Condition


def make(batch: int, *, offset: float = 0.0) -> Condition:
    tokens = torch.arange(batch * 6, dtype=torch.float32).view(batch, 3, 2) + offset
    return Condition(
        tokens=tokens,
        pooled=tokens[:, 0] * 10,
        token_counts=torch.tensor([1.0, 1.0, 256.0]),
        time_ids=torch.full((batch, 6), offset),
    )


def test_repeat_goes_round_the_batch() -> None:
    out = make(2).repeat(3)
    assert out.batch_size == 6
    assert out.text[:, 0, 0].tolist() == [0, 6, 0, 6, 0, 6]
    assert out.pooled is not None
    assert out.pooled.shape == (6, 2)
    assert out.token_counts is not None
    assert out.token_counts.tolist() == [1, 1, 256]
    with pytest.raises(ValueError, match="n must be at least 1"):
        make(2).repeat(0)


def test_index_by_tensor_and_slice() -> None:
    condition = make(4)
    assert condition.index(torch.tensor([3, 0, 3])).text[:, 0, 0].tolist() == [18, 0, 18]
    part = condition.index(slice(1, 3))
    assert part.text[:, 0, 0].tolist() == [6, 12]
    assert part.time_ids is not None
    assert part.time_ids.shape == (2, 6)
    with pytest.raises(ValueError, match="int64"):
        condition.index(torch.tensor([True, False, True, False]))
    with pytest.raises(ValueError, match="int64"):
        condition.index(torch.tensor(1))


def test_expand_shares_memory_and_refuses_other_sizes() -> None:
    one = make(1)
    out = one.expand(5)
    assert out.batch_size == 5
    assert out.text.data_ptr() == one.text.data_ptr()
    assert torch.equal(out.text[4], one.text[0])
    same = make(3)
    assert same.expand(3) is same
    with pytest.raises(ValueError, match="batch of 1"):
        same.expand(6)


def test_where_keeps_true_and_takes_false() -> None:
    condition, null = make(3), make(1, offset=-100)
    out = condition.where(torch.tensor([True, False, True]), null)
    assert out.text[:, 0, 0].tolist() == [0, -100, 12]
    assert out.pooled is not None
    assert out.pooled[:, 0].tolist() == [0, -1000, 120]
    assert out.time_ids is not None
    # Sizes are of the sample and not of its prompt.
    assert condition.time_ids is not None
    assert torch.equal(out.time_ids, condition.time_ids)
    with pytest.raises(ValueError, match="mask must be bool"):
        condition.where(torch.tensor([1, 0, 1]), null)
    with pytest.raises(ValueError, match="mask must be bool"):
        condition.where(torch.tensor([True, False]), null)
    with pytest.raises(ValueError, match="batch of 1"):
        condition.where(torch.tensor([True, False, True]), make(2))


def test_cat_joins_and_index_takes_apart() -> None:
    a, b = make(2), make(3, offset=50)
    joined = Condition.cat([a, b])
    assert joined.batch_size == 5
    assert torch.equal(joined.index(slice(2, 5)).text, b.text)
    assert torch.equal(Condition.cat([make(2), make(2)]).text, make(2).repeat(2).text)
    bare = Condition.cat([Condition(torch.zeros(1, 3, 2)), Condition(torch.ones(1, 3, 2))])
    assert bare.pooled is None
    assert bare.text.sum().item() == 6


def test_cat_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="empty list"):
        Condition.cat([])
    with pytest.raises(ValueError, match="differ in tokens"):
        Condition.cat([Condition(torch.zeros(1, 3, 2)), Condition(torch.zeros(1, 4, 2))])
    with pytest.raises(ValueError, match="differ in pooled"):
        Condition.cat([Condition(torch.zeros(1, 3, 2)), Condition(torch.zeros(1, 3, 2), torch.zeros(1, 2))])
    counts = [torch.tensor([1.0, 1.0, 256.0]), torch.ones(3), None]
    for other in counts[1:]:
        with pytest.raises(ValueError, match="token_counts"):
            Condition.cat(
                [
                    Condition(torch.zeros(1, 3, 2), token_counts=counts[0]),
                    Condition(torch.zeros(1, 3, 2), token_counts=other),
                ]
            )


def test_to_casts_embeddings_and_not_counts() -> None:
    out = make(2).to("cpu", torch.bfloat16)
    assert out.text.dtype == torch.bfloat16
    assert out.pooled is not None
    assert out.pooled.dtype == torch.bfloat16
    assert out.token_counts is not None
    assert out.token_counts.dtype == torch.float32
    assert out.time_ids is not None
    assert out.time_ids.dtype == torch.float32
    assert out.to(dtype=torch.float64).text.dtype == torch.float64


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tokens": torch.zeros(3, 2)}, "tokens must be"),
        ({"tokens": torch.zeros(2, 3, 2), "pooled": torch.zeros(1, 2)}, "pooled must be"),
        ({"tokens": torch.zeros(2, 3, 2), "pooled": torch.zeros(2)}, "pooled must be"),
        ({"tokens": torch.zeros(2, 3, 2), "time_ids": torch.zeros(3, 6)}, "time_ids must be"),
        ({"tokens": torch.zeros(2, 3, 2), "token_counts": torch.zeros(2)}, r"token_counts must be \[3\]"),
        ({"tokens": torch.zeros(2, 3, 2), "token_counts": torch.zeros(2, 3)}, r"token_counts must be \[3\]"),
    ],
)
def test_wrong_shapes(fields: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Condition(**fields)
