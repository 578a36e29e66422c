"""Text masks and embedded guidance of a condition: they follow the batch, and masked conditions are padded to join."""

from dataclasses import replace

import pytest
import torch

from fewstep.core.condition import Condition
from fewstep.core.denoiser import guided_velocity


def masked(rows: int, tokens: int, *, used: int) -> Condition:
    """A condition whose first `used` tokens are text."""
    mask = (torch.arange(tokens) < used).long().expand(rows, tokens)
    return Condition(torch.ones(rows, tokens, 2), token_mask=mask)


def test_shorter_conditions_are_padded_with_masked_zeros() -> None:
    joined = Condition.cat([masked(1, 2, used=1), masked(2, 4, used=3)])
    assert joined.text.shape == (3, 4, 2)
    assert joined.token_mask is not None
    assert joined.token_mask.tolist() == [[1, 0, 0, 0], [1, 1, 1, 0], [1, 1, 1, 0]]
    assert joined.text[0, 2:].abs().max() == 0
    with pytest.raises(ValueError, match="differ in tokens"):
        Condition.cat([Condition(torch.ones(1, 2, 2)), Condition(torch.ones(1, 4, 2))])
    with pytest.raises(ValueError, match="differ in token_mask"):
        Condition.cat([Condition(torch.ones(1, 2, 2)), masked(1, 2, used=1)])


def test_where_takes_masks_along() -> None:
    picked = masked(2, 2, used=2).where(torch.tensor([True, False]), masked(1, 3, used=1))
    assert picked.token_mask is not None
    assert picked.token_mask.tolist() == [[1, 1, 0], [1, 0, 0]]


def test_guidance_follows_the_batch() -> None:
    told = replace(masked(2, 2, used=2), guidance=torch.tensor([4.0, 5.0]))
    for changed, expected in (
        (told.repeat(2), [4.0, 5.0, 4.0, 5.0]),
        (told.index(torch.tensor([1])), [5.0]),
        (told.index(slice(0, 1)).expand(3), [4.0, 4.0, 4.0]),
        (Condition.cat([told, told.index(slice(0, 1))]), [4.0, 5.0, 4.0]),
        (told.where(torch.tensor([False, True]), told.index(slice(0, 1))), [4.0, 5.0]),
    ):
        assert changed.guidance is not None
        assert changed.guidance.tolist() == expected
        assert changed.token_mask is not None
        assert changed.token_mask.shape == (len(expected), 2)
    half = told.to(dtype=torch.bfloat16)
    assert half.text.dtype == torch.bfloat16
    assert half.guidance is not None
    assert half.guidance.dtype == torch.float32
    assert half.token_mask is not None
    assert half.token_mask.dtype == torch.int64


def test_wrong_shapes_are_named() -> None:
    tokens = torch.ones(2, 3, 4)
    with pytest.raises(ValueError, match=r"token_mask must be \[2, 3\]"):
        Condition(tokens, token_mask=torch.ones(2, 4))
    with pytest.raises(ValueError, match="without token_counts"):
        Condition(tokens, token_mask=torch.ones(2, 3), token_counts=torch.ones(3))
    with pytest.raises(ValueError, match=r"guidance must be \[2\]"):
        Condition(tokens, guidance=torch.ones(3))


class Means(torch.nn.Module):
    """A velocity that is the mean of a sample's text, and that remembers which guidance it was told."""

    def forward(self, x_t: torch.Tensor, t: torch.Tensor, condition: Condition) -> torch.Tensor:
        self.told = condition.guidance
        return condition.text.mean(dim=(1, 2)).view(-1, 1, 1, 1).expand_as(x_t)


def test_each_sample_has_its_own_guidance() -> None:
    condition = Condition(torch.tensor([1.0, 2.0]).view(2, 1, 1))
    null = Condition(torch.zeros(1, 1, 1))
    x_t, t, scales = torch.zeros(2, 1, 2, 2), torch.ones(2), torch.tensor([1.0, 3.0])
    network = Means()
    velocity = guided_velocity(network, x_t, t, condition, null, scales)
    assert velocity[:, 0, 0, 0].tolist() == [1.0, 6.0]
    assert network.told is None
    guided_velocity(network, x_t, t, replace(condition, guidance=scales), null, 2.0)
    assert network.told is not None
    assert network.told.tolist() == [1.0, 3.0, 1.0, 3.0]
