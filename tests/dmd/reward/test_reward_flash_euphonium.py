"""What Flash-DMD and Euphonium alone have in the loop: discriminator, latent judges, distillation."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fewstep.core.paths import x0_from_velocity
from fewstep.dmd.gan_loss import generator_gan_loss
from fewstep.dmd.reward.config import RewardRunConfig
from fewstep.dmd.reward.latent.network import LatentReward, load_latent_reward
from fewstep.dmd.reward.methods.flash import Flash, best_and_worst, pixel_gan_loss
from fewstep.dmd.reward.pixel_discriminator import discriminator_step
from fewstep.dmd.reward.rollout import draw_rollout
from fewstep.dmd.reward.train import train_step
from fewstep.evaluation.scorers.failure import RewardError
from tests.dmd.reward.reward_run import (
    reward_config,
    started,
    wake_heads,
    with_pixel_gan,
    write_latent_reward,
    write_pixel_backbone,
    write_student,
)
from tests.dmd.tiny_run import TinyInputs

SAMPLES = list(range(8, 16))


@pytest.fixture(scope="module")
def student(inputs: TinyInputs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        return write_student(inputs, tmp_path_factory.mktemp("student") / "run")


def run_steps(config: RewardRunConfig, count: int) -> tuple[list[dict[str, float]], dict[str, Tensor]]:
    """Metrics of some steps and the student's weights after them; a discriminator that is there is not at chance."""
    with started(config) as (method, trainer):
        wake_heads(method.setup)
        found = []
        for _ in range(count):
            found.append({name: float(value) for name, value in train_step(method, trainer).items()})
            trainer.advance()
        return found, {name: weight.detach().clone() for name, weight in method.setup.student_role.parameters}


def test_the_discriminator_learns_in_every_step(inputs: TinyInputs, student: Path, tmp_path: Path) -> None:
    """Matching in the first step, pairs in the second; the student's GAN loss is that of the updated heads."""
    changes = with_pixel_gan(inputs, write_pixel_backbone(tmp_path / "backbone"))
    config = reward_config(inputs, student, tmp_path / "run", "flash", changes)
    with started(config) as (method, trainer):
        setup = method.setup
        assert setup.pixel_role is not None
        features = {name: weight.clone() for name, weight in setup.pixel_role.module.state_dict().items()}
        found = []
        for _ in range(3):
            found.append({name: float(value) for name, value in train_step(method, trainer).items()})
            trainer.advance()
        assert setup.pixel_role.updates == 3
        for name, weight in setup.pixel_role.module.state_dict().items():
            assert torch.equal(weight, features[name]) == name.startswith("features."), name
    assert [("policy_loss" in record, "matching_direction_rms" in record) for record in found] == [
        (False, True),
        (True, False),
        (False, True),
    ]
    # The heads start at chance.
    assert found[0]["discriminator_loss"] == pytest.approx(2 * math.log(2), rel=1e-6)
    assert found[2]["discriminator_loss"] < found[0]["discriminator_loss"]
    assert all(record["student_gan_loss"] > 0 for record in found)
    assert "student_gan_loss" not in run_steps(reward_config(inputs, student, tmp_path / "off", "flash"), 1)[0][0]


def test_steps_of_the_pixel_gan(inputs: TinyInputs, student: Path, tmp_path: Path) -> None:
    """The student's gradient goes through decoder and discriminator, the discriminator's stops at the pixels."""
    changes = with_pixel_gan(inputs, write_pixel_backbone(tmp_path / "backbone"))
    config = reward_config(inputs, student, tmp_path / "run", "flash", changes)
    with started(config) as (method, _):
        setup, plan = method.setup, method.plan(1)
        assert setup.pixel_role is not None
        assert setup.pixel_real is not None
        wake_heads(setup)
        assert (plan.gan_step, plan.fake_step, plan.policy_steps) == (1, 0, (0,))
        rollout = draw_rollout(method, SAMPLES, plan)
        t = torch.full((8,), setup.student.times[1])
        velocity = ((rollout.states[1] - rollout.predictions[1]) / t[0]).requires_grad_()
        loss, record = pixel_gan_loss(setup, rollout, 1, velocity=velocity)
        loss.backward()
        heads = [weight for _, weight in setup.pixel_role.parameters]
        assert velocity.grad is not None
        assert float(velocity.grad.abs().max()) > 0
        assert all(weight.grad is None and weight.requires_grad for weight in heads)
        with torch.no_grad():
            x0 = x0_from_velocity(rollout.states[1], velocity, t)
            expected = generator_gan_loss(setup.pixel_role.module(setup.teacher.decode(x0)))
        assert record["student_gan_loss"].item() == pytest.approx(expected.item(), rel=1e-5)
        fake = setup.teacher.decode(rollout.predictions[1])
        real = setup.pixel_real.pixels(rollout.draw.indices, setup.teacher, device=setup.device)
        loss, record = discriminator_step(setup.pixel_role.wrapped, fake, real)
        loss.backward()
        assert any(weight.grad is not None and float(weight.grad.abs().max()) > 0 for weight in heads)
        assert record["discriminator_loss"].item() == pytest.approx(loss.item())


def test_slices_of_a_step_share_the_discriminator(inputs: TinyInputs, student: Path, tmp_path: Path) -> None:
    changes = with_pixel_gan(inputs, write_pixel_backbone(tmp_path / "backbone"))
    whole, expected = run_steps(reward_config(inputs, student, tmp_path / "whole", "flash", changes), 2)
    changes |= {"run.gradient_accumulation": 2}
    parts, found = run_steps(reward_config(inputs, student, tmp_path / "parts", "flash", changes), 2)
    for left, right in zip(parts, whole, strict=True):
        assert left["discriminator_loss"] == pytest.approx(right["discriminator_loss"], rel=1e-3)
        assert left["student_gan_loss"] == pytest.approx(right["student_gan_loss"], rel=1e-3)
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-4, atol=5e-5, msg=name)


def test_sizes_and_boundaries_are_checked(inputs: TinyInputs, student: Path, tmp_path: Path) -> None:
    low = with_pixel_gan(inputs, write_pixel_backbone(tmp_path / "backbone"), boundary=0.3)
    with (
        pytest.raises(ValueError, match=r"boundary 0.3 leaves one side"),
        started(reward_config(inputs, student, tmp_path / "low", "flash", low)),
    ):
        pass


def latent_judge(inputs: TinyInputs, folder: Path, section: str) -> dict[str, object]:
    return {f"{section}.latent_reward": str(write_latent_reward(inputs, folder))}


def test_pairs_are_judged_at_the_noisy_candidates(inputs: TinyInputs, student: Path, tmp_path: Path) -> None:
    """Scores are those of the model at (x_{t'}, t'); nothing is decoded, so there is no reward in the metrics."""
    changes = latent_judge(inputs, tmp_path / "model", "flash")
    config = reward_config(inputs, student, tmp_path / "run", "flash", changes)
    with started(config) as (method, trainer):
        assert isinstance(method, Flash)
        setup, plan = method.setup, method.plan(1)
        assert not plan.judged
        rollout = draw_rollout(method, SAMPLES, plan)
        model = load_latent_reward(tmp_path / "model")
        expected = model(rollout.next_states[0], torch.full((8,), setup.student.times[1]), rollout.condition)
        (scores,) = rollout.judgements
        torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-6)
        assert float(scores.std()) > 1e-3
        wins, loses = best_and_worst(scores.view(2, 4))
        check_pair(method, scores, wins, loses)
        metrics = [train_step(method, trainer) for _ in range(2) if trainer.advance() is None]
    assert "latent_reward" in metrics[0]
    assert "reward" not in metrics[0]
    assert float(metrics[0]["margin"]) == pytest.approx(0.0, abs=1e-6)
    assert "latent_reward" not in metrics[1]


def test_a_broken_latent_judge_stops_the_step(inputs: TinyInputs, student: Path, tmp_path: Path) -> None:
    changes = latent_judge(inputs, tmp_path / "model", "flash")
    config = reward_config(inputs, student, tmp_path / "run", "flash", changes)
    with started(config) as (method, trainer):
        assert isinstance(method.setup.latent_reward, LatentReward)
        method.setup.latent_reward.score.bias.fill_(math.nan)
        train_step(method, trainer)
        trainer.advance()
        with pytest.raises(RewardError, match=r"step 1: the reward failed .*the latent reward failed") as raised:
            train_step(method, trainer)
    assert raised.value.clean


def check_pair(method: Flash, scores: Tensor, wins: Tensor, loses: Tensor) -> None:
    """The pair's loss falls when the student moves from the loser to the winner."""
    setup, plan = method.setup, method.plan(1)
    rollout = draw_rollout(method, SAMPLES, plan)
    t = torch.full((8,), setup.student.times[0])
    with torch.no_grad():
        velocity = setup.behaviour(rollout.states[0], t, rollout.condition)
    nexts, first = rollout.next_states[0], torch.tensor([0, 4])
    toward = torch.zeros_like(velocity)
    toward[first] = nexts[first + wins] - nexts[first + loses]
    # x0 = x_t - t velocity: a smaller velocity moves the mean up.
    losses = [
        method.pair_loss(rollout, 0, velocity=velocity - step * toward, scores=scores)[0].item() for step in (0.0, 0.1)
    ]
    assert losses[0] == pytest.approx(math.log(2), rel=1e-5)
    assert losses[1] < losses[0] - 1e-3


def test_euphonium_is_steered_by_a_latent_reward(inputs: TinyInputs, tmp_path: Path) -> None:
    """At (x_t, t) itself, below t = 1; a scorer without gradient will do then."""
    student = write_student(inputs, tmp_path / "student", steps=3)
    changes = {
        **latent_judge(inputs, tmp_path / "model", "euphonium"),
        "student.steps": 3,
        "euphonium.highest_time": 0.9,
    }
    config = reward_config(inputs, student, tmp_path / "run", "euphonium", changes)
    with started(config) as (method, trainer):
        setup, plan = method.setup, method.plan(0)
        assert plan.policy_steps == (0, 1)
        rollout = draw_rollout(method, SAMPLES, plan)
        model, t = load_latent_reward(tmp_path / "model"), torch.full((8,), setup.student.times[1])
        expected = model(rollout.states[1], t, rollout.condition)
        torch.testing.assert_close(rollout.process_rewards[1], expected, rtol=1e-5, atol=1e-6)
        assert float(rollout.process_rewards[0].abs().max()) == 0.0
        metrics = train_step(method, trainer)
    assert 0 < float(metrics["student_grad_norm"]) < 100
    two = {**changes, "student.steps": 2, "euphonium.highest_time": 0.4}
    weights = student / "checkpoint-2" / "student_ema.safetensors"
    with (
        pytest.raises(ValueError, match=r"highest_time 0.4 leaves none of the random steps at 1 to the latent judge"),
        started(reward_config(inputs, weights, tmp_path / "two", "euphonium", two)),
    ):
        pass


def test_distillation_starts_at_the_length_of_the_guidance(inputs: TinyInputs, student: Path, tmp_path: Path) -> None:
    """On the policy's own samples |mean - guided|^2 / (2 std^2) is (guidance step)^2 / (2 std^2 d), unit gradients."""
    plain = reward_config(inputs, student, tmp_path / "plain", "euphonium")
    same = reward_config(inputs, student, tmp_path / "same", "euphonium", {"euphonium.distill_weight": 0.0})
    on = reward_config(inputs, student, tmp_path / "on", "euphonium", {"euphonium.distill_weight": 2.0})
    (first,), expected = run_steps(plain, 1)
    _, unchanged = run_steps(same, 1)
    (distilled,), moved = run_steps(on, 1)
    assert all(torch.equal(weight, unchanged[name]) for name, weight in expected.items())
    # One random step from t = 1 to 0.5, std 0.5, latents of 4 x 8 x 8.
    assert plain.euphonium is not None
    length = (plain.euphonium.guidance * 0.5) ** 2 / (2 * 0.5**2 * 256)
    assert distilled["distill_loss"] == pytest.approx(length, rel=1e-4)
    assert distilled["student_loss"] == pytest.approx(first["student_loss"] + 2 * length, abs=1e-5)
    assert any(not torch.equal(weight, moved[name]) for name, weight in expected.items())
