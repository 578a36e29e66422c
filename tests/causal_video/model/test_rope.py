"""Computed rotary angles against diffusers' table, beyond its end, and under a common offset."""

import pytest
import torch
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed

from fewstep.causal_video.model.rope import FrameGrid, rotary_angles

CPU = torch.device("cpu")


@pytest.mark.parametrize("width", [12, 64, 128])
def test_angles_equal_the_table(width: int) -> None:
    rope = WanRotaryPosEmbed(width, (1, 2, 2), 1024)
    cosines, sines = rope(torch.zeros(1, 1, 5, 6, 8))
    computed = rotary_angles(
        range(5), FrameGrid(3, 4), (rope.t_dim, rope.h_dim, rope.w_dim), device=CPU, dtype=torch.float64
    )
    for mine, theirs in zip(computed, (cosines, sines), strict=True):
        assert mine.shape == (1, 1, 60, width)
        assert float((mine[0, 0] - theirs[0, :, 0]).abs().max()) < 1e-7


def test_a_common_offset_changes_no_bit_and_no_table_ends() -> None:
    near = rotary_angles([0, 1, 5], FrameGrid(2, 2), (4, 4, 4), device=CPU, dtype=torch.float32)
    far = rotary_angles([10**9, 10**9 + 1, 10**9 + 5], FrameGrid(2, 2), (4, 4, 4), device=CPU, dtype=torch.float32)
    assert torch.equal(near[0], far[0])
    assert torch.equal(near[1], far[1])
    long, _ = rotary_angles([0, 5000], FrameGrid(1, 1), (4, 4, 4), device=CPU, dtype=torch.float64)
    assert float(long[0, 0, 1, 0]) == pytest.approx(float(torch.tensor(5000.0, dtype=torch.float64).cos()), abs=1e-12)
    assert float(long[0, 0, 1, 2]) == pytest.approx(float(torch.tensor(50.0, dtype=torch.float64).cos()), abs=1e-12)


def test_no_frames_have_no_angles() -> None:
    with pytest.raises(ValueError, match="at least one frame"):
        rotary_angles([], FrameGrid(1, 1), (4, 4, 4), device=CPU, dtype=torch.float64)
