"""Frames that are judged, and the learned motion map."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fewstep.consistency.mcm.config import McmConfig, McmDiscriminatorConfig
from fewstep.consistency.mcm.frames import frame_places, pick_frames
from fewstep.consistency.mcm.motion import motion_loss
from fewstep.consistency.mcm.motion_head import MotionHead
from fewstep.core.config import OptimizerConfig

OPTIMIZER = OptimizerConfig(learning_rate=1e-3)


@given(st.integers(1, 8), st.integers(0, 12), st.integers(1, 5), st.integers(0, 100))
def test_one_place_in_each_part(parts: int, more: int, batch: int, seed: int) -> None:
    frames = parts + more
    uniform = torch.rand(parts, batch, generator=torch.Generator().manual_seed(seed))
    places = frame_places(uniform, frames)
    assert places.shape == (parts, batch)
    assert bool((places.diff(dim=0) > 0).all())
    for part, row in enumerate(places.tolist()):
        assert all(part * frames // parts <= place < (part + 1) * frames // parts for place in row)


def test_all_frames_of_a_part_are_alike_probable() -> None:
    uniform = torch.linspace(0, 1, 7001)[:-1].expand(2, -1)
    counts = [row.bincount(minlength=7).tolist() for row in frame_places(uniform, 7)]
    assert counts[0] == pytest.approx([7000 / 3] * 3 + [0] * 4, abs=1)
    assert counts[1] == pytest.approx([0] * 3 + [7000 / 4] * 4, abs=1)
    assert frame_places(torch.ones(1, 1), 5).item() == 4


def test_picked_frames_are_in_the_order_of_repeated_prompts() -> None:
    video = torch.randn(3, 2, 5, 4, 4, dtype=torch.float64, requires_grad=True)
    places = torch.tensor([[0, 1, 0], [4, 2, 3]])
    picked = pick_frames(video, places)
    assert picked.shape == (6, 2, 1, 4, 4)
    for row in range(6):
        sample = row % 3
        assert torch.equal(picked[row, :, 0], video[sample, :, places[row // 3, sample]])
    gradient = torch.autograd.grad(picked.square().sum(), video)[0]
    seen = gradient.abs().sum(dim=(1, 3, 4)) > 0
    assert [row.nonzero().flatten().tolist() for row in seen] == [[0, 4], [1, 2], [0, 3]]


def test_the_motion_head_starts_as_the_identity_and_looks_at_single_frames() -> None:
    before = torch.get_rng_state()
    head = MotionHead(4, width=32, seed=1).double()
    assert torch.equal(torch.get_rng_state(), before)
    video = torch.randn(2, 4, 3, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(head(video), video)
    other = video + 0.3
    same = motion_loss(video, other, "raw").item()
    assert motion_loss(head(video), head(other), "raw").item() == pytest.approx(same)
    torch.nn.init.normal_(head.last.weight, generator=torch.Generator().manual_seed(2))
    changed = video.clone()
    changed[:, :, 1] += 1.0
    moved = (head(changed) - head(video)).abs().amax(dim=(0, 1, 3, 4)) > 0
    assert moved.tolist() == [False, True, False]
    assert (head(video) - video).abs().max() > 0.1
    twin = MotionHead(4, width=32, seed=1)
    assert torch.equal(twin.first.weight.double(), head.first.weight)
    assert not torch.equal(MotionHead(4, width=32, seed=2).first.weight.double(), head.first.weight)


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"4 judged frames of a video of 3; judge from 1 to 3"):
        frame_places(torch.rand(4, 2), 3)
    with pytest.raises(ValueError, match=r"places \[S, B\], got \(2, 3, 4, 5, 5\) and \(1, 3\)"):
        pick_frames(torch.zeros(2, 3, 4, 5, 5), torch.zeros(1, 3, dtype=torch.int64))


@pytest.mark.parametrize(
    ("section", "changes", "message"),
    [
        (McmConfig, {"motion_width": 48}, "use a multiple of 32"),
        (McmConfig, {"mixed_share": 1.5}, "a share from 0 to 1"),
        (McmConfig, {"constant": -1.0}, r"constant is -1\.0"),
        (McmConfig, {"cutoff": 0.5}, "cutoff: given 0.5, which only motion 'low' or 'high' reads"),
        (McmConfig, {"motion": "raw", "motion_width": 32}, "motion_width: given 32, which only motion 'learned' reads"),
        (McmConfig, {"grid_steps": 1}, "grid_steps is 1"),
        (McmDiscriminatorConfig, {"judged_times": (0.5, 0.2)}, "0 <= smallest <= largest <= 1"),
        (McmDiscriminatorConfig, {"pictures": "x", "frames": 3}, "frames: given 3, which only a discriminator without"),
        (McmDiscriminatorConfig, {"weight": 0.0}, "leave the section out for none"),
    ],
)
def test_settings_that_do_not_fit_are_named(section: Any, changes: dict[str, Any], message: str) -> None:
    optimizer = {"optimizer": OPTIMIZER} if section is McmDiscriminatorConfig else {}
    with pytest.raises(ValueError, match=message):
        section(**optimizer, **changes)
