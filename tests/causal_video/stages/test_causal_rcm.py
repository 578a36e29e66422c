"""What Causal-rCM's code has beside the stages of its paper: noisy context, laws of times, the discrete tangent."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewstep.causal_video.layout import ChunkLayout
from fewstep.causal_video.policy import CachePolicy
from fewstep.causal_video.schedule import StepSchedule
from fewstep.causal_video.settings import CausalSettings
from fewstep.causal_video.stages.batch import noisy_context
from fewstep.causal_video.stages.consistency import (
    one_step_before,
    path_derivative,
    teacher_velocity,
    tf_dcm_step,
    tf_scm_step,
)
from fewstep.causal_video.stages.forcing import diffusion_forcing_step, rising_times
from fewstep.causal_video.stages.sections import DiffusionForcingConfig, TfDcmConfig, TfScmConfig
from fewstep.consistency.methods.dcm import teacher_step
from fewstep.consistency.methods.scm import discrete_tangent, flow_tangent
from fewstep.consistency.times import skipped_times
from fewstep.core.grids import shift_time
from fewstep.core.paths import add_noise, x0_from_velocity
from tests.causal_video.stages.test_stages_steps import DRAW, LAYOUT, batch_of, frozen_teacher, networks_of
from tests.causal_video.tiny_causal import build_student, largest
from tests.causal_video.tiny_causal_run import VideoInputs, start_causal, tiny_causal


def note_call(seen: list[Any], module: Any, inputs: tuple[Any, ...]) -> None:
    seen.append(inputs[0])


NOISY = CausalSettings(ChunkLayout(LAYOUT.lengths), CachePolicy(noisy_from=1), StepSchedule.steps((4, 2), shift=5.0))


class TestTimes:
    @settings(max_examples=100, deadline=None)
    @given(st.data())
    def test_rising_times_rise_through_the_one_that_is_drawn(self, data: st.DataObject) -> None:
        chunks = data.draw(st.integers(1, 9))
        numbers = st.floats(0, 1, exclude_max=True, width=32)
        uniform = torch.tensor([data.draw(st.lists(numbers, min_size=chunks, max_size=chunks)) for _ in range(2)])
        pivot, time = (torch.tensor(data.draw(st.lists(numbers, min_size=2, max_size=2))) for _ in range(2))
        t = rising_times(uniform, pivot, time)
        assert t.shape == (2, chunks)
        assert bool((t.diff(dim=1) >= 0).all())
        assert bool(((t >= 0) & (t <= 1)).all())
        place = (pivot * chunks).long().clamp(max=chunks - 1)
        assert torch.equal(t.gather(1, place[:, None])[:, 0], time)

    def test_their_means_are_those_of_sorted_uniform_numbers(self) -> None:
        """Given that chunk 2 of 5 is at 0.4, chunk j < 2 is at 0.4 (j + 1) / 3, chunk 2 + j at 0.4 + 0.6 j / 3."""
        uniform = torch.rand(20000, 5, generator=torch.Generator().manual_seed(0))
        t = rising_times(uniform, torch.full((20000,), 0.5), torch.full((20000,), 0.4)).mean(dim=0)
        assert t.tolist() == pytest.approx([0.4 / 3, 0.8 / 3, 0.4, 0.6, 0.8], abs=0.005)

    @pytest.mark.parametrize("times", ["same", "fopp"])
    def test_diffusion_forcing_asks_the_network_at_them(self, times: Any) -> None:
        student, seen = build_student(), []
        student.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].t))
        diffusion_forcing_step(batch_of(), networks_of(student), draw=DRAW, stage=DiffusionForcingConfig(times=times))
        (t,) = seen
        steps = t.diff(dim=1)
        assert bool((steps == 0).all()) if times == "same" else bool((steps >= 0).all()) and bool((steps > 0).any())

    def test_continuous_times_keep_their_step(self) -> None:
        uniform = torch.tensor([0.0, 0.25, 0.5, 0.99], dtype=torch.float64)
        pair = skipped_times(uniform, skip=0.1, shift=3.0)
        u, before = torch.tensor([1.0, 0.75, 0.5, 0.01]).double(), torch.tensor([0.9, 0.65, 0.4, 0.0]).double()
        torch.testing.assert_close(pair.t, shift_time(u, 3.0))
        torch.testing.assert_close(pair.r, shift_time(before, 3.0))
        for skip in (0.0, 1.0):
            with pytest.raises(ValueError, match=r"skip must lie in \(0, 1\)"):
                skipped_times(uniform, skip=skip)
        found = tf_dcm_step(batch_of(), networks_of(build_student(), frozen_teacher()), draw=DRAW, stage=TfDcmConfig())
        other = TfDcmConfig(skip=0.05)
        skipped = tf_dcm_step(batch_of(), networks_of(build_student(), frozen_teacher()), draw=DRAW, stage=other)
        assert float(found.loss) != float(skipped.loss)


class TestDiscreteTangent:
    def test_is_the_difference_of_the_consistency_function(self) -> None:
        batch, networks = batch_of(), networks_of(build_student(), frozen_teacher(), 2.0)
        t, s = (torch.tensor(times, dtype=torch.float64) for times in ([0.7, 0.05], [0.6, 0.0]))
        x_t = add_noise(batch.x0, batch.eps, t)
        target = teacher_velocity(networks, x_t, t, batch)
        with torch.no_grad():
            v_t = networks.on_context(batch, bare=True)(x_t, t, batch.condition)
        v_s, at = one_step_before(batch, networks, x_t, t, target=target, step=0.1)
        torch.testing.assert_close(at, s)
        found = discrete_tangent(v_t, v_s, target, t, s).total
        jump = x0_from_velocity(x_t, v_t, t) - x0_from_velocity(teacher_step(x_t, target, t, s), v_s, s)
        assert largest(found, jump / (t - s).view(-1, 1, 1, 1, 1)) < 1e-12
        with pytest.raises(ValueError, match="must lie below t"):
            discrete_tangent(v_t, v_s, target, t, t)

    def test_is_that_of_forward_mode_for_short_steps(self) -> None:
        batch, networks = batch_of(), networks_of(build_student(), frozen_teacher(), 2.0)
        t = torch.tensor([0.7, 0.3], dtype=torch.float64)
        x_t = add_noise(batch.x0, batch.eps, t)
        target = teacher_velocity(networks, x_t, t, batch)
        with torch.no_grad():
            v_t = networks.on_context(batch, bare=True)(x_t, t, batch.condition)
        derivative = path_derivative(batch, networks, x_t, t, dx=target, stage=TfScmConfig())
        exact = flow_tangent(v_t, target, derivative, t, warmup=0.5).total
        errors = []
        for step in (1e-4, 5e-5):
            v_s, s = one_step_before(batch, networks, x_t, t, target=target, step=step)
            errors.append(largest(discrete_tangent(v_t, v_s, target, t, s, warmup=0.5).total, exact))
        # Of first order: half the step has half the error.
        assert errors[1] / errors[0] == pytest.approx(0.5, abs=0.02)

    def test_a_step_trains_with_it(self) -> None:
        student = build_student()
        stage = TfScmConfig(tangent="discrete", central_step=0.02, time_mean=0.0)
        found = tf_scm_step(batch_of(), networks_of(student, frozen_teacher()), draw=DRAW, stage=stage)
        found.loss.backward()
        assert 0.9 < float(found.loss) < 1.0
        assert all(p.grad is not None for p in student.parameters() if p.requires_grad)
        with pytest.raises(ValueError, match="central_step is 1; a step of the teacher is shorter"):
            TfScmConfig(tangent="discrete", central_step=1)
        with pytest.raises(ValueError, match="check_tangent"):
            TfScmConfig(tangent="discrete", check_tangent=False)


class TestNoisyContext:
    def test_chunks_are_noised_to_the_last_time_of_their_schedule_but_the_first(self) -> None:
        x0 = batch_of().x0
        context, t = noisy_context(x0, DRAW, NOISY)
        last = NOISY.schedule.of(1)[-1]
        assert t.tolist() == [[0.0] + [pytest.approx(last)] * 6] * 2
        eps = DRAW.noise(tuple(x0.shape[1:]), "context_noise")
        assert torch.equal(context[:, :, :1], x0[:, :, :1])
        torch.testing.assert_close(context[:, :, 1:], (1 - last) * x0[:, :, 1:] + last * eps[:, :, 1:].to(x0))

    @pytest.mark.parametrize("step", [tf_dcm_step, tf_scm_step])
    def test_the_teacher_sees_clean_chunks_and_the_student_noisy_ones(self, step: Any) -> None:
        seen: dict[str, list[Any]] = {"student": [], "teacher": []}
        student, teacher = build_student(), build_student(seed=5).requires_grad_(False)
        for name, network in (("student", student), ("teacher", teacher)):
            network.register_forward_pre_hook(functools.partial(note_call, seen[name]))
        clean = batch_of()
        context, t = noisy_context(clean.x0, DRAW, NOISY)
        batch = dataclasses.replace(clean, context=context, context_time=t, teacher_sees_clean=True)
        stage = TfDcmConfig() if step is tf_dcm_step else TfScmConfig(time_mean=0.0)
        step(batch, networks_of(student, teacher), draw=DRAW, stage=stage)
        for call in seen["teacher"]:
            assert torch.equal(call.x[:, :, :7], clean.x0)
            assert float(call.t[:, :7].abs().max()) == 0
        assert len(seen["student"]) >= 2
        for call in seen["student"]:
            assert torch.equal(torch.as_tensor(call.x[:, :, :7]).to(context), context)
            torch.testing.assert_close(call.t[:, :7].to(t), t)

    def test_in_a_run_it_follows_the_policy(self, inputs: VideoInputs, tmp_path: Path) -> None:
        changes = {"tf_dcm.noisy_context": True, "student.policy": CachePolicy(noisy_from=1)}
        config = tiny_causal(inputs, tmp_path, "tf_dcm", changes)
        setup, trainer = start_causal(config)
        assert setup.settings.policy.noisy_from == 1
        trainer.close()
        refused: tuple[dict[str, Any], ...] = ({"tf_dcm.noisy_context": True}, {**changes, "tf_dcm.context_noise": 0.1})
        for wrong in refused:
            with pytest.raises(ValueError, match=r"tf_dcm\.noisy_context with student\.policy\.noisy_from"):
                tiny_causal(inputs, tmp_path, "tf_dcm", wrong)
