"""rCM's rollouts at drawn times: how many calls, at which times, and where the gradient goes."""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.consistency.methods.rcm import is_students_step, student_samples
from fewstep.consistency.train import train_consistency
from fewstep.core.paths import add_noise, x0_from_velocity
from fewstep.core.randomness import Draw
from fewstep.core.settings import TimeLawConfig
from fewstep.core.time_law import draw_times
from fewstep.core.training.checkpoint import list_checkpoints, load_checkpoint
from tests.consistency.tiny_consistency_run import start_consistency, tiny_consistency
from tests.dmd.tiny_run import TinyInputs, assert_same_checkpoint


def drawn(inputs: TinyInputs, directory: Path, **run: Any) -> Any:
    """rCM with rollouts of up to three calls that begin at t = 80 / 81, two fake-score steps for one of the student."""
    config = tiny_consistency(inputs, directory, "rcm")
    assert config.matching is not None
    assert config.fake_score is not None
    return dataclasses.replace(
        config,
        matching=dataclasses.replace(config.matching, rollout="drawn", fake_times=TimeLawConfig(shift=5.0, max=0.95)),
        fake_score=dataclasses.replace(config.fake_score, ratio=2),
        student=dataclasses.replace(config.student, steps=1, shift=1.0, times=(80 / 81, 0.8, 0.5)),
        run=dataclasses.replace(config.run, **run),
    )


def test_calls_count_up_for_student_and_fake_score_apart(inputs: TinyInputs, tmp_path: Path) -> None:
    config = drawn(inputs, tmp_path)
    setup, trainer = start_consistency(config)
    times: list[Tensor] = []
    module = setup.student_role.module
    module.register_forward_pre_hook(lambda _, inputs: times.append(inputs[1]))
    counts: dict[str, list[int]] = {"student": [], "fake": []}
    for step in range(18):
        trainer.step = config.matching.start + step
        times.clear()
        draw = Draw(5, [2 * step, 2 * step + 1], trainer.device)
        with torch.set_grad_enabled(step % 3 == 0):
            x0 = student_samples(config, setup, trainer, draw=draw)
        assert x0.requires_grad == (step % 3 == 0)
        counts["student" if step % 3 == 0 else "fake"].append(len(times))
        assert torch.equal(times[0], torch.full((2,), 80 / 81))
        assert all(bool((after <= before).all()) for before, after in pairwise(times))
        condition = setup.prompts.of_samples(draw.indices, config.run.seed)
        x_t = draw.noise(setup.latent_shape, "noise")
        t = times[0]
        again = x_t
        with torch.no_grad():
            for call in range(len(times)):
                again = x0_from_velocity(x_t, module(x_t, t, condition), t)
                law = draw_times(draw, f"rollout_time_{call}", config.matching.fake_times, setup.teacher.family)
                t = torch.minimum(t, law)
                x_t = add_noise(again, draw.noise(setup.latent_shape, f"renoise_{call}"), t)
        torch.testing.assert_close(x0.detach(), again)
    trainer.close()
    assert counts["student"] == [1, 2, 3, 1, 2, 3]
    assert counts["fake"] == [1, 2, 3] * 4


@pytest.mark.slow
def test_it_trains_and_resumes_exactly(inputs: TinyInputs, tmp_path: Path) -> None:
    assert train_consistency(drawn(inputs, tmp_path / "straight", steps=6)) == 0
    assert train_consistency(drawn(inputs, tmp_path / "resumed", steps=3)) == 0
    assert train_consistency(drawn(inputs, tmp_path / "resumed", steps=6, resume="latest")) == 0
    left, right = (load_checkpoint(list_checkpoints(tmp_path / name)[-1]) for name in ("straight", "resumed"))
    assert_same_checkpoint(left, right)


def test_it_is_no_setting_of_anyflow(inputs: TinyInputs, tmp_path: Path) -> None:
    config = tiny_consistency(inputs, tmp_path, "anyflow_dmd")
    assert config.matching is not None
    with pytest.raises(ValueError, match=r"matching\.rollout 'drawn' is rCM's"):
        dataclasses.replace(config, matching=dataclasses.replace(config.matching, rollout="drawn"))


def test_rates_fall_over_the_updates_that_a_network_makes(inputs: TinyInputs, tmp_path: Path) -> None:
    """Student and fake score take turns from matching.start on: 2 steps of the student alone, then 1 of 3."""
    config = drawn(inputs, tmp_path, steps=14)
    config = dataclasses.replace(config, matching=dataclasses.replace(config.matching, start=2))
    setup, trainer = start_consistency(config)
    due = [is_students_step(config.matching, 3, step) for step in range(14)]
    assert setup.student_role.total_updates == sum(due) == 6
    assert setup.fake_role is not None
    assert setup.fake_role.total_updates == 14 - sum(due)
    trainer.close()


def test_its_fake_score_starts_from_that_of_a_run(inputs: TinyInputs, tmp_path: Path) -> None:
    assert train_consistency(drawn(inputs, tmp_path / "first", steps=4)) == 0
    config = drawn(inputs, tmp_path / "second")
    assert config.fake_score is not None
    fake_score = dataclasses.replace(config.fake_score, init=str(tmp_path / "first"))
    setup, trainer = start_consistency(dataclasses.replace(config, fake_score=fake_score))
    stored = load_checkpoint(list_checkpoints(tmp_path / "first")[-1]).tensors["fake_score"]
    assert setup.fake_role is not None
    assert all(torch.equal(p.detach(), stored[name]) for name, p in setup.fake_role.parameters)
    trainer.close()
    nothing = dataclasses.replace(config.fake_score, init=str(tmp_path / "none"))
    with pytest.raises(ValueError, match=r"fake_score\.init"):
        start_consistency(dataclasses.replace(config, fake_score=nothing))
