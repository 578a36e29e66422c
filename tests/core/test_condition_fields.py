"""Every field of a condition is treated by its rule, whichever fields there are."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewstep.core.condition import FIELDS, Condition

SIZES = {"N": 3, "D": 2, "P": 4, "6": 6, "C": 2, "h": 2, "w": 3, "F": 2, "R": 5, "E": 2, "N2": 4, "D2": 3, "N3": 6}
# Counts of tokens stand without a mask of them.
APART = {"token_counts", "token_mask"}


def field_of(name: str, batch: int, seed: int) -> torch.Tensor:
    shape = [batch if axis == "B" else SIZES[axis] for axis in FIELDS[name].axes]
    generator = torch.Generator().manual_seed(seed)
    if name == "labels":
        return torch.randint(1000, shape, generator=generator)
    if "token_mask" in name:
        return torch.ones(shape, dtype=torch.long)
    return torch.randn(shape, generator=generator)


@st.composite
def conditions(draw: st.DrawFn, *, own_null: bool = True) -> Condition:
    """Any fields that may stand together; `own_null` with those that take the place of others on the null side."""
    names = draw(st.sets(st.sampled_from(sorted(FIELDS))))
    names -= set() if own_null else {"null_tokens", "null_token_mask"}
    names |= {"null_tokens", "tokens", "token_mask"} if "null_token_mask" in names else set()
    names |= {"null_token_mask", "tokens", "token_mask"} if "null_tokens" in names else set()
    names |= {draw(st.sampled_from(["tokens", "labels"]))}
    names -= set() if not names >= APART else {"token_counts"}
    # A mask or a count belongs to its tokens.
    names |= {"tokens"} if names & {"token_mask", "token_counts"} else set()
    names |= {"tokens_2"} if "token_mask_2" in names else set()
    batch = draw(st.integers(1, 4))
    return Condition(**{name: field_of(name, batch, place) for place, name in enumerate(sorted(names))})


def assert_same(found: Condition, expected: Condition) -> None:
    assert found.present().keys() == expected.present().keys()
    for name, tensor in expected.present().items():
        assert torch.equal(found.present()[name], tensor), name


@settings(max_examples=60, deadline=None)
@given(conditions(), st.integers(1, 3))
def test_joining_and_taking_apart_are_inverse(condition: Condition, times: int) -> None:
    parts = [condition.index(slice(row, row + 1)) for row in range(condition.batch_size)]
    assert [part.batch_size for part in parts] == [1] * condition.batch_size
    assert_same(Condition.cat(parts), condition)
    assert_same(condition.repeat(times), Condition.cat([condition] * times))
    everything = torch.arange(condition.batch_size)
    assert_same(condition.index(everything), condition)
    assert_same(parts[0].expand(times), Condition.cat([parts[0]] * times))


@settings(max_examples=60, deadline=None)
@given(conditions())
def test_a_cast_moves_what_may_be_rounded_alone(condition: Condition) -> None:
    half = condition.to(dtype=torch.bfloat16)
    for name, tensor in condition.present().items():
        expected = torch.bfloat16 if FIELDS[name].cast else tensor.dtype
        assert half.present()[name].dtype == expected, name


@settings(max_examples=60, deadline=None)
@given(conditions(own_null=False), st.data())
def test_what_is_dropped_is_of_the_prompt(condition: Condition, data: st.DataObject) -> None:
    null = Condition(
        **{
            name: torch.zeros_like(tensor[:1])
            for name, tensor in condition.present().items()
            if FIELDS[name].axes[0] == "B"
        }
    )
    if condition.token_counts is not None:
        null = dataclasses.replace(null, token_counts=condition.token_counts)
    keep = torch.tensor(
        data.draw(st.lists(st.booleans(), min_size=condition.batch_size, max_size=condition.batch_size))
    )
    found = condition.where(keep, null)
    for name, tensor in condition.present().items():
        if FIELDS[name].of_sample or FIELDS[name].axes[0] != "B":
            assert torch.equal(found.present()[name], tensor), name
        else:
            assert torch.equal(found.present()[name][keep], tensor[keep]), name
            assert float(found.present()[name][~keep].double().abs().sum()) == 0, name
    assert_same(null.expand(condition.batch_size).of_same_samples(condition).where(~keep, condition), found)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=4), st.integers(1, 5), st.integers(1, 5))
def test_a_null_of_the_sample_takes_the_place_of_its_text(keep: list[bool], length: int, null_length: int) -> None:
    count = len(keep)
    generator = torch.Generator().manual_seed(length)
    tokens, null = (torch.randn(count, size, 2, generator=generator) for size in (length, null_length))
    masks = {"token_mask": torch.ones(count, length), "null_token_mask": torch.ones(count, null_length)}
    condition = Condition(tokens, null_tokens=null, **masks)
    shared = Condition(torch.zeros(1, 3, 2), token_mask=torch.ones(1, 3))
    unconditional = shared.expand(count).of_same_samples(condition)
    assert torch.equal(unconditional.text, null)
    found = condition.where(torch.tensor(keep), shared)
    longest = max(length, null_length)
    assert found.text.shape == (count, longest, 2)
    assert found.token_mask is not None
    for row, kept in enumerate(keep):
        expected = tokens[row] if kept else null[row]
        assert torch.equal(found.text[row, : len(expected)], expected)
        assert int(found.token_mask[row].sum()) == len(expected)
    # What is called beside each other has one length.
    assert Condition.cat([unconditional, condition]).text.shape == (2 * count, longest, 2)


@pytest.mark.parametrize("name", sorted(FIELDS))
def test_each_field_is_documented_and_checked(name: str) -> None:
    assert Condition.__doc__ is not None
    assert Condition.__doc__.count(name) >= 1
    wrong = torch.zeros([5] * (len(FIELDS[name].axes) + 1))
    with pytest.raises(ValueError, match=f"{name} must be"):
        Condition(**{"tokens": torch.zeros(2, 3, 2), name: wrong})


def test_a_condition_needs_text_or_a_class() -> None:
    with pytest.raises(ValueError, match=r"needs tokens .* or labels"):
        Condition(pooled=torch.zeros(2, 3))
    assert Condition(labels=torch.tensor([1, 2])).batch_size == 2
