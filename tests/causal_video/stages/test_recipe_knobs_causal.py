"""What published recipes of causal students set: a time for each chunk, the average as target, exits at the end."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fewstep.causal_video.model.calls import per_frame
from fewstep.causal_video.stages.batch import PackedNetwork, chunk_uniform, over_frames
from fewstep.causal_video.stages.consistency import tf_dcm_step
from fewstep.causal_video.stages.forcing import forcing_loss, teacher_forcing_step
from fewstep.causal_video.stages.self_forcing import on_noised_data, plan_rollout
from fewstep.causal_video.stages.train import train_causal_video, train_step, video_batch
from fewstep.core.grids import shift_time
from fewstep.core.paths import add_noise
from fewstep.core.randomness import Draw
from fewstep.core.training.checkpoint import list_checkpoints, load_checkpoint
from tests.causal_video.tiny_causal_run import FAKE_SCORE, VideoInputs, start_causal, tiny_causal
from tests.dmd.tiny_run import assert_same_checkpoint

NOISED: dict[str, object] = {"self_forcing.input": "noised_data"}


def test_chunks_have_times_of_their_own(inputs: VideoInputs, tmp_path: Path) -> None:
    """The loss is flow matching at a time per frame; with equal times it is that of one time per sample."""
    changes = {"teacher_forcing.times": "chunk", "teacher_forcing.weight": "none"}
    config = tiny_causal(inputs, tmp_path, "teacher_forcing", changes)
    setup, trainer = start_causal(config)
    stage = config.teacher_forcing
    assert stage is not None
    assert setup.networks is not None
    draw = Draw(5, [0, 1], trainer.device)
    batch = video_batch(config, stage, setup, draw=draw, step=0)
    found = teacher_forcing_step(batch, setup.networks, draw=draw, stage=stage)
    uniform = chunk_uniform(draw, setup.networks.layout, "forcing_chunk_time")
    t = over_frames(shift_time(uniform, stage.shift), setup.networks.layout)
    assert t.shape == (2, 3)
    assert torch.equal(t[:, 1], t[:, 2])
    assert not torch.equal(t[:, 0], t[:, 1])
    velocity = setup.networks.on_context(batch)(add_noise(batch.x0, batch.eps, t), t, batch.condition)
    expected = forcing_loss(velocity, batch.x0, batch.eps, torch.ones_like(t))
    torch.testing.assert_close(found.loss, expected.loss)
    one = torch.tensor([0.3, 0.6])
    x_t = add_noise(batch.x0, batch.eps, one)
    torch.testing.assert_close(
        setup.networks.on_context(batch)(x_t, per_frame(one, 3), batch.condition),
        setup.networks.on_context(batch)(x_t, one, batch.condition),
        rtol=1e-5,
        atol=1e-5,
    )
    trainer.close()


def test_the_average_is_the_target_and_follows_the_student(inputs: VideoInputs, tmp_path: Path) -> None:
    changes = {"tf_dcm.target": "ema", "student.ema_decay": 0.5}
    config = tiny_causal(inputs, tmp_path, "tf_dcm", changes)
    setup, trainer = start_causal(config)
    networks, stage, role = setup.networks, config.tf_dcm, setup.student_role
    assert networks is not None
    assert stage is not None
    assert role.ema is not None
    assert networks.average is not None
    average = dict(networks.average.named_parameters())
    shadows = role.ema.state_dict()
    # No memory of its own, and no gradient.
    assert all(average[name].data_ptr() == shadow.data_ptr() for name, shadow in shadows.items() if name in average)
    assert not any(parameter.requires_grad for parameter in average.values())
    for _ in range(2):
        train_step(config, setup, trainer)
        trainer.advance()
    live = dict(role.parameters)
    assert any(not torch.equal(average[name], live[name]) for name in live)
    draw = Draw(5, [0, 1], trainer.device)
    batch = video_batch(config, stage, setup, draw=draw, step=2)
    with role.ema.applied(role.module):
        # With the averaged weights in place of the live ones both networks are the same.
        x_t, t = add_noise(batch.x0, batch.eps, torch.tensor([0.4, 0.7])), torch.tensor([0.4, 0.7])
        own = networks.on_context(batch, bare=True)(x_t, t, batch.condition)
        theirs = PackedNetwork(networks.average, batch, networks.packed)(x_t, t, batch.condition)
    torch.testing.assert_close(theirs, own)
    drawn_to_average = tf_dcm_step(batch, networks, draw=draw, stage=stage)
    networks = type(networks)(**{**vars(networks), "average": None})
    drawn_to_itself = tf_dcm_step(batch, networks, draw=draw, stage=stage)
    assert float(drawn_to_average.loss) != float(drawn_to_itself.loss)
    trainer.close()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "changes"),
    [
        ("tf_dcm", {"tf_dcm.target": "ema"}),
        ("teacher_forcing", {"teacher_forcing.times": "chunk"}),
        ("self_forcing", {"self_forcing.exit": "last"}),
        ("self_forcing", NOISED),
    ],
)
def test_they_resume_exactly(inputs: VideoInputs, tmp_path: Path, stage: str, changes: dict[str, object]) -> None:
    assert train_causal_video(tiny_causal(inputs, tmp_path / "straight", stage, changes)) == 0
    assert train_causal_video(tiny_causal(inputs, tmp_path / "resumed", stage, {**changes, "run.steps": 2})) == 0
    assert (
        train_causal_video(tiny_causal(inputs, tmp_path / "resumed", stage, {**changes, "run.resume": "latest"})) == 0
    )
    left, right = (load_checkpoint(list_checkpoints(tmp_path / name)[-1]) for name in ("straight", "resumed"))
    assert_same_checkpoint(left, right)


def test_rollouts_may_always_go_to_the_end(inputs: VideoInputs, tmp_path: Path) -> None:
    config = tiny_causal(inputs, tmp_path, "self_forcing", {"self_forcing.exit": "last"})
    setup, trainer = start_causal(config)
    trainer.close()
    assert {plan_rollout(config, setup.settings, step).exit_step for step in range(9)} == {2}


def test_the_fake_score_starts_from_that_of_a_run_and_both_rates_fall_to_their_ends(
    inputs: VideoInputs, tmp_path: Path
) -> None:
    assert train_causal_video(tiny_causal(inputs, tmp_path / "first", "self_forcing", {"run.steps": 2})) == 0
    changes = {"fake_score": dataclasses.replace(FAKE_SCORE, init=str(tmp_path / "first"), ratio=2), "run.steps": 7}
    setup, trainer = start_causal(tiny_causal(inputs, tmp_path / "second", "self_forcing", changes))
    assert setup.scores is not None
    stored = load_checkpoint(list_checkpoints(tmp_path / "first")[-1]).tensors["fake_score"]
    assert all(torch.equal(p.detach(), stored[name]) for name, p in setup.scores.fake_role.parameters)
    # Steps 0, 3 and 6 are the student's.
    assert (setup.student_role.total_updates, setup.scores.fake_role.total_updates) == (3, 4)
    trainer.close()


def test_the_student_may_be_asked_on_noised_videos(inputs: VideoInputs, tmp_path: Path) -> None:
    """CausVid's input: every chunk at a time of its schedule, one causal call, and the captions of the videos."""
    config = tiny_causal(inputs, tmp_path, "self_forcing", NOISED)
    setup, trainer = start_causal(config)
    draw = Draw(5, [0, 1, 2, 3], trainer.device)
    done, condition = on_noised_data(config, setup, draw=draw, network=setup.student)
    x0, expected = setup.videos(draw.indices, trainer.device)
    assert done.new.shape == x0.shape
    assert torch.equal(condition.text, expected.text)
    calls: list[Tensor] = []
    handle = setup.student.register_forward_pre_hook(lambda _, given: calls.append(given[0].t))
    on_noised_data(config, setup, draw=draw, network=setup.student)
    handle.remove()
    (t,) = calls
    for chunk, frames in ((0, (0,)), (1, (1, 2))):
        allowed = torch.tensor(setup.settings.schedule.of(chunk))
        for frame in frames:
            assert bool((t[:, frame, None] == allowed).any(dim=1).all())
    assert torch.equal(t[:, 1], t[:, 2])
    before = torch.cat([p.detach().flatten() for _, p in setup.student_role.parameters])
    for _ in range(4):
        metrics = train_step(config, setup, trainer)
        trainer.advance()
        assert all(bool(torch.isfinite(torch.as_tensor(value))) for value in metrics.values())
    assert not torch.equal(torch.cat([p.detach().flatten() for _, p in setup.student_role.parameters]), before)
    trainer.close()
    with pytest.raises(ValueError, match=r"replay.*input is 'noised_data', where nothing is rolled out"):
        tiny_causal(inputs, tmp_path, "self_forcing", {**NOISED, "self_forcing.replay": True})
    with pytest.raises(ValueError, match=r"data\.latents is empty"):
        tiny_causal(inputs, tmp_path, "self_forcing", {**NOISED, "data.latents": None})
