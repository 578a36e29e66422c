"""Rollouts of reward runs: the student's own samples, with noise that depends on sample and group alone."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fewstep.core.paths import x0_from_velocity
from fewstep.dmd.reward.chain import Plan, log_prob, transition
from fewstep.dmd.reward.methods.euphonium import Euphonium
from fewstep.dmd.reward.methods.table import build_method
from fewstep.dmd.reward.rollout import draw_rollout
from fewstep.dmd.reward.sections import FlowGrpoConfig
from fewstep.dmd.reward.student_step import RewardMethod
from tests.dmd.reward.reward_run import (
    METHODS,
    reward_config,
    started,
    with_pixel_gan,
    write_pixel_backbone,
    write_student,
)
from tests.dmd.tiny_run import TinyInputs, changed

EVERYTHING = Plan(last=3, matching_step=None, policy_steps=(), judged=True, shared_start=False, step=2)
SAMPLES = list(range(16, 24))


@pytest.fixture(scope="module")
def student(inputs: TinyInputs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of a four-step student."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        return write_student(inputs, tmp_path_factory.mktemp("rollouts") / "student", steps=4)


@pytest.fixture(scope="module")
def euphonium(inputs: TinyInputs, student: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Euphonium]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        folder = tmp_path_factory.mktemp("euphonium") / "run"
        with started(reward_config(inputs, student, folder, "euphonium", {"student.steps": 4})) as (method, _):
            assert isinstance(method, Euphonium)
            yield method


@pytest.fixture
def flow_grpo(euphonium: Euphonium) -> RewardMethod:
    """The same parts without steering."""
    config = changed(euphonium.config, {"euphonium": None, "flow_grpo": FlowGrpoConfig()})
    return build_method(config, euphonium.setup)


def with_settings(method: Euphonium, **values: float) -> Euphonium:
    """The same parts with other settings of the method."""
    changes = {f"euphonium.{name}": value for name, value in values.items()}
    return Euphonium(changed(method.config, changes), method.setup)


def test_rollout_is_what_the_student_samples(flow_grpo: RewardMethod) -> None:
    setup, rollout = flow_grpo.setup, draw_rollout(flow_grpo, SAMPLES, EVERYTHING)
    noise = rollout.draw.noise(setup.latent_shape, "noise")
    expected = setup.student.sample(noise, rollout.condition, rollout.noises)
    torch.testing.assert_close(rollout.x0, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(rollout.states[0], noise)
    assert (len(rollout.states), len(rollout.predictions), len(rollout.next_states)) == (4, 4, 3)
    assert len(set(rollout.prompts[:4])) == len(set(rollout.prompts[4:])) == 1
    assert rollout.prompts[0] != rollout.prompts[4]


def test_parts_of_a_step_draw_what_the_whole_draws(euphonium: Euphonium) -> None:
    plan = Plan(last=3, matching_step=None, policy_steps=(1,), judged=True, shared_start=True, step=2)
    whole = draw_rollout(euphonium, SAMPLES, plan)
    halves = [draw_rollout(euphonium, part, plan) for part in (SAMPLES[:4], SAMPLES[4:])]
    torch.testing.assert_close(torch.cat([half.x0 for half in halves]), whole.x0, rtol=1e-4, atol=1e-5)
    ours = whole.shared(whole.draw).indices
    assert ours == [16] * 4 + [20] * 4
    assert [index for half in halves for index in half.shared(half.draw).indices] == ours


def test_steps_without_a_loss_share_their_noise_in_a_group(euphonium: Euphonium) -> None:
    """SubGRPO: independent starts, one noise per group where nothing is trained, one per sample where it is."""
    plan = Plan(last=3, matching_step=None, policy_steps=(1,), judged=True, shared_start=False, step=2)
    rollout = draw_rollout(euphonium, SAMPLES, plan)
    for j, noise in enumerate(rollout.noises):
        first, second = noise[:4], noise[4:]
        same = torch.equal(first, first[:1].expand_as(first)) and torch.equal(second, second[:1].expand_as(second))
        assert same == (j != 1)
        assert not torch.equal(first[0], second[0])
    assert not torch.equal(rollout.states[0][0], rollout.states[0][1])
    assert len(rollout.log_probs) == len(rollout.process_rewards) == 1


def test_candidates_of_a_preference_leave_one_state(flow_grpo: RewardMethod) -> None:
    plan = Plan(last=3, matching_step=None, policy_steps=(1,), judged=True, shared_start=True, step=2)
    rollout = draw_rollout(flow_grpo, SAMPLES, plan)
    for j in (0, 1):
        state = rollout.states[j][:4]
        torch.testing.assert_close(state, state[:1].expand_as(state), rtol=1e-5, atol=1e-5)
    for j in (2, 3):
        assert (rollout.states[j][0] - rollout.states[j][1]).abs().mean() > 0.05


def test_steered_steps_are_scored_under_the_unguided_transition(euphonium: Euphonium) -> None:
    """Euphonium: the state is shifted by guidance * step * unit gradient, and the reward rises along it."""
    setup, times = euphonium.setup, euphonium.setup.student.times
    plan = Plan(last=3, matching_step=None, policy_steps=(0,), judged=True, shared_start=False, step=2)
    steered = draw_rollout(euphonium, SAMPLES, plan)
    plain = draw_rollout(with_settings(euphonium, guidance=0.0), SAMPLES, plan)
    shift = (steered.next_states[0] - plain.next_states[0]).flatten(1).norm(dim=1)
    torch.testing.assert_close(shift, torch.full_like(shift, euphonium.settings.guidance * (times[0] - times[1])))
    torch.testing.assert_close(steered.process_rewards[0], plain.process_rewards[0])
    t = torch.full((8,), times[0])
    with torch.no_grad():
        velocity = setup.behaviour(steered.states[0], t, steered.condition)
        unguided = transition(euphonium.config, steered.states[0], velocity, times, 0)
        moved = steered.states[0] + (steered.next_states[0] - plain.next_states[0])
        pixels = setup.teacher.decode(x0_from_velocity(moved, velocity, t))
        risen = setup.reward.total(setup.reward.with_gradient(pixels, steered.prompts))
    assert bool((risen > steered.process_rewards[0]).all())
    expected = log_prob(euphonium.settings, steered.next_states[0], unguided)
    torch.testing.assert_close(steered.log_probs[0], expected)
    assert bool((steered.log_probs[0] != plain.log_probs[0]).all())


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_plans_depend_on_seed_and_step_alone(inputs: TinyInputs, student: Path, tmp_path: Path, name: str) -> None:
    with started(reward_config(inputs, student, tmp_path, name, {"student.steps": 4})) as (method, _):
        assert method.setup.student.times == (1.0, 0.75, 0.5, 0.25)
        plans = [method.plan(step) for step in range(40)]
        assert plans == [method.plan(step) for step in range(40)]
    matched = {plan.matching_step for plan in plans}
    late = plans[1:]
    if name == "rtdmd":
        assert not plans[0].judged
        assert {plan.matching_step for plan in late} == {3}
        assert {plan.policy_steps for plan in late} == {(0,), (1,), (2,)}
    elif name == "redmd":
        assert matched == {0, 1, 2, 3}
        assert all(plan.last == plan.matching_step == plan.fake_step for plan in plans)
    elif name == "gndm":
        assert matched == {0, 1, 2, 3}
        assert {(plan.last, plan.policy_steps) for plan in plans} == {(3, (0, 1, 2))}
    elif name == "flash":
        assert [plan.judged for plan in plans[:4]] == [False, True, False, True]
        assert {plan.policy_steps for plan in plans if plan.judged} == {(0,), (1,), (2,)}
    else:
        steps = () if name in ("nft", "crd") else (0, 1, 2)
        assert {(plan.last, plan.matching_step, plan.policy_steps) for plan in plans} == {(3, None, steps)}


def test_flash_routes_steps_by_time(inputs: TinyInputs, student: Path, tmp_path: Path) -> None:
    """Early calls are matched and late ones see the discriminator, in the steps of pairs, too; stage 1 has no pairs."""
    gan = with_pixel_gan(inputs, write_pixel_backbone(tmp_path / "backbone"))
    changes = {"student.steps": 4, "matching.cold_start_steps": 3, **gan}
    config = reward_config(inputs, student, tmp_path / "run", "flash", changes)
    with started(config) as (method, _):
        plans = [method.plan(step) for step in range(60)]
        plain = build_method(changed(config, {"matching.steps": "any"}), method.setup)
        assert {plain.plan(step).matching_step for step in range(60)} == {0, 1, 2, 3, None}
    assert {plan.keep_fake for plan in plans if plan.judged} == {1.0}
    assert {plan.keep_fake for plan in plans if not plan.judged} == {0.9}
    assert [plan.judged for plan in plans[:7]] == [False, False, False, True, False, True, False]
    assert {plan.gan_step for plan in plans} == {2, 3}
    assert {plan.fake_step for plan in plans} == {0, 1}
    assert {plan.matching_step for plan in plans if not plan.judged} == {0, 1}
    assert {plan.matching_step for plan in plans if plan.judged} == {None}
    assert all(plan.last == (3 if plan.judged else plan.gan_step) for plan in plans)


@pytest.mark.parametrize("highest_time", [1.0, 0.8])
def test_steps_above_the_highest_time_are_not_steered(euphonium: Euphonium, highest_time: float) -> None:
    setup = euphonium.setup
    plan = Plan(last=3, matching_step=None, policy_steps=(0, 1), judged=True, shared_start=False, step=2)
    rollout = draw_rollout(with_settings(euphonium, highest_time=highest_time), SAMPLES, plan)
    plain = draw_rollout(with_settings(euphonium, guidance=0.0), SAMPLES, plan)
    moved = (rollout.next_states[0] - plain.next_states[0]).flatten(1).norm(dim=1)
    step = 0.25 if highest_time == 1.0 else 0.0
    torch.testing.assert_close(moved, torch.full_like(moved, step), rtol=1e-3, atol=1e-6)
    assert (rollout.process_rewards[0].abs() > 0).all() == (highest_time == 1.0)
    assert bool((rollout.process_rewards[1].abs() > 0).all())
    t = torch.full((8,), setup.student.times[1])
    with torch.no_grad():
        velocity = setup.behaviour(rollout.states[1], t, rollout.condition)
    unguided = transition(euphonium.config, rollout.states[1], velocity, setup.student.times, 1).mean
    shift = (rollout.guided_means[1] - unguided).flatten(1).norm(dim=1)
    torch.testing.assert_close(shift, torch.full_like(shift, 0.25), rtol=1e-3, atol=1e-6)
