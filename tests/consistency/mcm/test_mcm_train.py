"""MCM's loop: who moves, what each loss is made of, where trajectories start, pictures, and slices of a batch."""

import dataclasses
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.consistency.batch import Networks
from fewstep.consistency.mcm.motion import motion_loss
from fewstep.consistency.mcm.step import (
    Judged,
    fake_frames,
    frame_features,
    mcm_discriminator_step,
    mcm_noised,
    mcm_student_step,
    starts_from_student,
    student_videos,
)
from fewstep.consistency.methods.dcm import distilled_pair
from fewstep.consistency.setup import ConsistencySetup
from fewstep.consistency.times import TimePair
from fewstep.consistency.train import train_consistency, train_step
from fewstep.core.config import save_resolved
from fewstep.core.data import LatentDataset
from fewstep.core.randomness import Draw, sample_noise
from fewstep.core.training.checkpoint import list_checkpoints, load_checkpoint
from fewstep.core.training.roles import Role
from fewstep.core.training.trainer import Trainer
from fewstep.dmd.gan_loss import hinge_generator_loss
from tests.consistency.tiny_consistency_run import start_consistency
from tests.consistency.tiny_video_run import HEADS, MCM, VideoInputs, tiny_video, write_inputs
from tests.tiny_videos import VIDEO_LATENTS
from tests.two_processes import assert_same_run, launch_two

SCRIPT = Path(__file__).parents[3] / "scripts" / "train_consistency.py"
DRAW = Draw(3, [0, 1, 2], torch.device("cpu"))
TIMES = TimePair(torch.tensor([1.0, 0.75, 0.3]), torch.tensor([0.9, 0.6, 0.0]))


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> VideoInputs:
    return write_inputs(tmp_path_factory.mktemp("videos"))


@pytest.fixture(scope="module")
def parts(videos: VideoInputs, tmp_path_factory: pytest.TempPathFactory) -> tuple[ConsistencySetup, Networks, Any]:
    """A set-up whose heads and student say something, its networks, and data (x0, condition)."""
    config = tiny_video(videos, tmp_path_factory.mktemp("run"), "mcm")
    setup, trainer = start_consistency(config)
    trainer.close()
    assert setup.mcm is not None
    generator = torch.Generator().manual_seed(1)
    for role in (setup.student_role, setup.mcm.motion_role, setup.mcm.heads_role):
        assert role is not None
        for _, value in role.parameters:
            value.data.add_(0.1 * torch.randn(value.shape, generator=generator))
    role = setup.student_role
    networks = Networks(role.module, role.wrapped, setup.teacher, 2.0)
    _, x0, condition = setup.real.rows(DRAW.indices, DRAW.device)
    return setup, networks, (x0, condition)


def copies(*roles: Role | None) -> list[list[Tensor]]:
    return [[value.detach().clone() for _, value in role.parameters] for role in roles if role is not None]


def test_student_motion_head_and_discriminator_move_in_every_step(videos: VideoInputs, tmp_path: Path) -> None:
    config = tiny_video(videos, tmp_path, "mcm")
    setup, trainer = start_consistency(config)
    assert setup.mcm is not None
    roles = (setup.student_role, setup.mcm.motion_role, setup.mcm.heads_role)
    frozen = [value.clone() for value in setup.teacher.denoiser.parameters()]
    start = copies(*roles)
    metrics: dict[str, Any] = {}
    for _ in range(3):
        before = copies(*roles)
        metrics = train_step(config, setup, trainer)
        trainer.advance()
        moved = [
            any(not torch.equal(a, b) for a, b in zip(*pair, strict=True))
            for pair in zip(before, copies(*roles), strict=True)
        ]
        assert moved == [True, True, True]
    names = {"consistency_loss", "motion_loss", "adversarial_loss", "discriminator_loss", "fake_logit", "real_logit"}
    assert names | {"student_grad_norm", "motion_grad_norm", "heads_grad_norm"} == set(metrics)
    trainer.close()
    # Every parameter but the heads' last bias, of which the hinge on as many fakes as reals has no gradient.
    names = [name for role in roles if role is not None for name, _ in role.parameters]
    pairs = zip(chain.from_iterable(start), chain.from_iterable(copies(*roles)), strict=True)
    still = {name for name, (a, b) in zip(names, pairs, strict=True) if torch.equal(a, b)}
    assert still == {"heads.0.logit.bias"}
    assert all(torch.equal(a, b) for a, b in zip(frozen, setup.teacher.denoiser.parameters(), strict=True))


def test_the_first_discriminator_is_at_chance(videos: VideoInputs, tmp_path: Path) -> None:
    config = tiny_video(videos, tmp_path, "mcm")
    setup, trainer = start_consistency(config)
    metrics = train_step(config, setup, trainer)
    trainer.close()
    assert float(metrics["discriminator_loss"]) == 1.0
    assert float(metrics["adversarial_loss"]) == 0.0
    assert float(metrics["consistency_loss"]) == float(metrics["motion_loss"])


@pytest.mark.parametrize("motion", ["raw", "difference", "learned"])
def test_the_students_loss_is_motion_plus_judged_frames(parts: Any, motion: Any) -> None:
    setup, networks, data = parts
    mcm = dataclasses.replace(MCM, motion=motion, discriminator=dataclasses.replace(HEADS, weight=0.7))
    noised = mcm_noised(data, networks.student, TIMES, draw=DRAW, mcm=dataclasses.replace(mcm, mixed_share=0.0), step=0)
    roles = (setup.mcm.motion_role, setup.mcm.heads_role)
    step = mcm_student_step(noised, TIMES, networks, roles, draw=DRAW, mcm=mcm)
    step.loss.backward()
    with torch.no_grad():
        prediction, target = distilled_pair(noised, TIMES, networks)
    assert torch.equal(step.samples, prediction.detach())
    if motion == "learned":
        head = roles[0].module
        with torch.no_grad(), roles[0].ema.applied(head):
            mapped = head(target)
        with torch.no_grad():
            expected = motion_loss(head(prediction), mapped, "raw", constant=1e-3)
            assert (mapped - head(target)).abs().max() > 1e-2
    else:
        expected = motion_loss(prediction, target, motion, constant=1e-3)
    assert float(step.record["motion_loss"]) == pytest.approx(float(expected), rel=1e-6)
    judged = fake_frames(prediction, noised.condition, draw=DRAW, settings=HEADS, stream="mcm_student")
    assert judged.frames.shape == (6, 4, 1, 8, 8)
    with torch.no_grad():
        logits = roles[1].module(frame_features(judged, setup.teacher, draw=DRAW, settings=HEADS, stream="mcm_student"))
    assert logits.shape == (6,)
    assert float(step.loss.detach()) == pytest.approx(
        float(expected) + 0.7 * float(hinge_generator_loss(logits)), rel=1e-5
    )
    assert all(parameter.grad is None for parameter in roles[1].module.parameters())
    assert any(float(parameter.grad.abs().max()) > 0 for parameter in networks.student.parameters())
    has_gradient = [parameter.grad is not None for parameter in roles[0].module.parameters()]
    assert has_gradient == [motion == "learned"] * len(has_gradient)
    for role in (*roles, setup.student_role):
        role.module.zero_grad(set_to_none=True)


def test_the_discriminator_learns_from_frames_alone(parts: Any) -> None:
    setup, networks, (x0, condition) = parts
    samples = x0.clone().requires_grad_(True)
    heads = setup.mcm.heads_role.module
    real = Judged(x0[:, :, :1], condition)
    one = dataclasses.replace(HEADS, frames=1)
    step = mcm_discriminator_step(samples, condition, real, heads, teacher=setup.teacher, draw=DRAW, settings=one)
    step.loss.backward()
    assert samples.grad is None
    moved = {name for name, parameter in heads.named_parameters() if float(parameter.grad.abs().max()) > 0}
    assert {name for name, _ in heads.named_parameters()} - moved == {"heads.0.logit.bias"}
    assert all(parameter.grad is None for parameter in networks.student.parameters())
    # No logit is beyond its margin here, so the hinge is linear.
    expected = 1 + 0.5 * (float(step.record["fake_logit"]) - float(step.record["real_logit"]))
    assert float(step.loss.detach()) == pytest.approx(expected, rel=1e-5)
    heads.zero_grad(set_to_none=True)


def test_at_the_first_time_of_the_grid_the_data_have_no_part(parts: Any) -> None:
    _, networks, (x0, condition) = parts
    mcm = dataclasses.replace(MCM, mixed_share=0.0)
    one, other = (
        mcm_noised((data, condition), networks.student, TIMES, draw=DRAW, mcm=mcm, step=0) for data in (x0, x0 + 1.0)
    )
    same = (one.x_t - other.x_t).abs().amax(dim=(1, 2, 3, 4))
    assert same[0].item() == 0.0
    assert same[1:].tolist() == pytest.approx([0.25, 0.7], rel=1e-5)
    with torch.no_grad():
        left, right = (distilled_pair(noised, TIMES, networks) for noised in (one, other))
    assert torch.equal(left[0][0], right[0][0])
    assert torch.equal(left[1][0], right[1][0])


def test_where_trajectories_start(parts: Any) -> None:
    _, networks, data = parts
    coins = [starts_from_student(7, step, 0.5) for step in range(2000)]
    assert 900 < sum(coins) < 1100
    assert coins == [starts_from_student(7, step, 0.5) for step in range(2000)]
    assert [sum(starts_from_student(7, step, share) for step in range(200)) for share in (0.0, 1.0)] == [0, 200]
    mcm = dataclasses.replace(MCM, mixed_share=1.0)
    noised = mcm_noised(data, networks.student, TIMES, draw=DRAW, mcm=mcm, step=4)
    expected = student_videos(VIDEO_LATENTS, data[1], networks.student, draw=DRAW)
    assert torch.equal(noised.x0, expected)
    noise = DRAW.noise(VIDEO_LATENTS, "mcm_start")
    velocity = networks.student(noise, torch.ones(3), data[1])
    assert (expected - (noise - velocity)).abs().max() == 0.0
    assert not expected.requires_grad


def test_pictures_show_how_the_first_frame_is_to_look(videos: VideoInputs, tmp_path: Path) -> None:
    pictures = sample_noise(4, range(3), (4, 1, 8, 8), stream="pictures")
    LatentDataset(pictures, ("one", "two", "three")).save(tmp_path / "pictures")
    config = tiny_video(videos, tmp_path / "run", "mcm")
    settings = dataclasses.replace(HEADS, pictures=str(tmp_path / "pictures"))
    mcm = dataclasses.replace(MCM, discriminator=settings)
    assert train_consistency(dataclasses.replace(config, mcm=mcm)) == 0
    found = load_checkpoint(list_checkpoints(tmp_path / "run")[-1])
    assert found.step == 4
    assert {"student", "student_ema", "motion", "motion_ema", "heads"} <= set(found.tensors)
    video = sample_noise(5, range(3), VIDEO_LATENTS, stream="video")
    setup, trainer = start_consistency(dataclasses.replace(tiny_video(videos, tmp_path / "other", "mcm"), mcm=mcm))
    condition = setup.prompts.rows([0, 1, 2])
    judged = fake_frames(video, condition, draw=DRAW, settings=settings, stream="x")
    trainer.close()
    assert torch.equal(judged.frames, video[:, :, :1])
    assert judged.condition.batch_size == 3


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_processes_train_as_one_does(videos: VideoInputs, tmp_path: Path) -> None:
    changes = {"gradient_accumulation": 2}
    save_resolved(tmp_path / "two.yaml", tiny_video(videos, tmp_path / "two", "mcm", changes))
    assert "2 process(es) on cpu" in launch_two(str(SCRIPT), "--config", str(tmp_path / "two.yaml"))
    assert train_consistency(tiny_video(videos, tmp_path / "one", "mcm", changes)) == 0
    roles = ("student", "student_ema", "motion", "motion_ema", "heads")
    assert_same_run(tmp_path / "two", tmp_path / "one", roles=roles, tolerance=1e-4, unmoved="logit.bias")


def metrics_of(videos: VideoInputs, folder: Path, accumulation: int) -> tuple[dict[str, float], list[list[Tensor]]]:
    config = tiny_video(videos, folder, "mcm", {"gradient_accumulation": accumulation})
    setup, trainer = start_consistency(config)
    assert isinstance(trainer, Trainer)
    assert setup.mcm is not None
    metrics = {key: float(value) for key, value in train_step(config, setup, trainer).items()}
    trainer.close()
    return metrics, copies(setup.student_role, setup.mcm.motion_role, setup.mcm.heads_role)


def test_slices_of_a_batch_give_the_same_step(videos: VideoInputs, tmp_path: Path) -> None:
    whole, left = metrics_of(videos, tmp_path / "whole", 1)
    sliced, right = metrics_of(videos, tmp_path / "sliced", 2)
    assert sliced == pytest.approx(whole, rel=1e-3, abs=1e-6)
    # The size of Adam's first step says little: gradients near zero turn its sign.
    apart = [(a - b).abs().max().item() for pair in zip(left, right, strict=True) for a, b in zip(*pair, strict=True)]
    assert sum(value < 1e-5 for value in apart) > 0.7 * len(apart)
