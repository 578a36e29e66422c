"""Which network is updated when, where rollouts stop, longer ones, and the adversarial term."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.causal_video.stages.batch import causal_settings, earlier_rows
from fewstep.causal_video.stages.self_forcing import generate, plan_rollout, rollout_inputs
from fewstep.causal_video.stages.setup import CausalData
from fewstep.causal_video.stages.teacher_window import image_latent
from fewstep.causal_video.stages.train import train_step
from fewstep.core.data import rows_of_samples
from fewstep.core.randomness import Draw
from tests.causal_video.tiny_causal_run import FAKE_SCORE, VideoInputs, start_causal, tiny_causal

NOWHERE = Path("nowhere")


def plans(inputs: VideoInputs, name: str, count: int, changes: dict[str, Any] | None = None) -> list[Any]:
    config = tiny_causal(inputs, NOWHERE, name, changes)
    return [plan_rollout(config, causal_settings(config.student), step) for step in range(count)]


def test_student_and_fake_score_count_their_own_cycles(inputs: VideoInputs) -> None:
    found = plans(inputs, "self_forcing", 18)
    assert [plan.student_due for plan in found] == [True, False, False] * 6
    assert [plan.exit_step for plan in found if plan.student_due] == [0, 1, 2, 0, 1, 2]
    assert [plan.exit_step for plan in found if not plan.student_due] == [0, 1, 2] * 4
    assert {plan.extra_chunks for plan in found} == {0}
    assert [plan.has_more_steps for plan in found[:4:3]] == [True, True]


def test_random_exits_and_mixtures_take_each_choice(inputs: VideoInputs) -> None:
    found = plans(inputs, "self_forcing", 60, {"self_forcing.exit": "random"})
    assert {plan.exit_step for plan in found} == {0, 1, 2}
    mixed = plans(inputs, "self_forcing_mixture", 60)
    assert {tuple(map(len, plan.schedule.times)) for plan in mixed} == {(2, 1), (1, 1), (3, 2)}
    assert all(plan.exit_step < plan.schedule.longest for plan in mixed)
    assert {plan.exit_step for plan in mixed if plan.schedule.longest == 1} == {0}


def test_longer_rollouts_end_in_the_teachers_window(inputs: VideoInputs, tmp_path: Path) -> None:
    config = tiny_causal(inputs, tmp_path, "self_forcing_long")
    setup, trainer = start_causal(config)
    draw = Draw(5, [0, 1], trainer.device)
    found = plans(inputs, "self_forcing_long", 60)
    given = rollout_inputs(config, setup, found[0], draw, 0)
    assert (given.image, given.earlier) == (None, None)
    assert {plan.extra_chunks for plan in found} == {0, 1, 2}
    assert {plan.switch_chunk for plan in found} == {None}
    plan = dataclasses.replace(found[0], extra_chunks=2, exit_step=0)
    done = generate(setup, plan, draw=draw, inputs=given)
    assert done.before is not None
    assert (done.before.shape[2], done.new.shape[2], len(done.exits)) == (3, 2, 2)
    assert done.new.requires_grad
    assert not done.before.requires_grad
    window = done.window()
    assert window.latents.shape == (2, 4, 3, 8, 8)
    assert window.counts.tolist() == [False, True, True]
    assert torch.equal(window.latents[:, :, 1:], done.new)
    vae: Any = setup.teacher.pipeline.components["vae"]
    assert torch.equal(window.latents[:, :, :1], image_latent(vae, done.before))
    # What was before is the rollout of the same noise without a window.
    short = dataclasses.replace(plan, extra_chunks=0, exit_step=2)
    with torch.no_grad():
        whole = generate(setup, short, draw=draw, inputs=given)
    assert whole.before is None
    assert whole.window().counts.tolist() == [True] * 3
    assert torch.allclose(whole.new, done.before)
    trainer.close()


def test_a_given_image_comes_with_its_caption(inputs: VideoInputs, tmp_path: Path) -> None:
    config = tiny_causal(inputs, tmp_path, "self_forcing", {"data.image_share": 1.0})
    setup, trainer = start_causal(config)
    draw = Draw(5, [0, 1, 2], trainer.device)
    plan = plan_rollout(config, setup.settings, 1)
    given = rollout_inputs(config, setup, plan, draw, 0)
    condition, image = given.condition, given.image
    assert setup.real is not None
    rows, x0, captions = setup.real.rows(draw.indices, trainer.device)
    assert image is not None
    assert torch.equal(image, x0[:, :, :1])
    assert torch.equal(condition.text, captions.text)
    assert len(set(rows)) == 3
    with torch.no_grad():
        video = generate(setup, plan, draw=draw, inputs=given).window().latents
    assert torch.equal(video[:, :, :1], image)
    trainer.close()


@pytest.mark.parametrize("mode", ["recache", "cross_only"])
def test_a_longer_rollout_changes_its_prompt_before_what_learns(inputs: VideoInputs, tmp_path: Path, mode: str) -> None:
    """One change in each, at any chunk up to the first that learns; what is judged has the later prompt."""
    changes = {"self_forcing.prompt_switches": mode}
    # The layout has three chunks of one frame, and two learn.
    for plan in (found := plans(inputs, "self_forcing_long", 90, changes)):
        most = 1 + plan.extra_chunks
        assert (plan.switch_chunk is None) == (plan.extra_chunks == 0)
        assert plan.switch_chunk is None or 1 <= plan.switch_chunk <= most
    assert {(p.extra_chunks, p.switch_chunk) for p in found} == {(0, None), (1, 1), (1, 2), (2, 1), (2, 2), (2, 3)}
    config = tiny_causal(inputs, tmp_path, "self_forcing_long", changes)
    setup, trainer = start_causal(config)
    draw, longest = Draw(5, [0, 1], trainer.device), [plan for plan in found if plan.extra_chunks == 2]
    videos: dict[int | None, Tensor] = {}
    with torch.no_grad():
        for switch in (1, 3, None):
            plan = next(plan for plan in longest if switch in (None, plan.switch_chunk))
            plan = dataclasses.replace(plan, switch_chunk=switch, exit_step=2)
            given = rollout_inputs(config, setup, plan, draw, 0)
            assert torch.equal(given.condition.text, setup.prompts.of_samples([0, 1], config.run.seed).text)
            assert (given.earlier is None) == (switch is None)
            if given.earlier is not None:
                assert (given.earlier.text != given.condition.text).flatten(1).any(dim=1).all()
            done = generate(setup, plan, draw=draw, inputs=given)
            assert done.before is not None
            videos[switch] = torch.cat([done.before, done.new], dim=2)
    assert torch.equal(videos[1][:, :, :1], videos[3][:, :, :1])
    assert not torch.allclose(videos[1][:, :, 1:3], videos[3][:, :, 1:3], atol=1e-4)
    assert not torch.allclose(videos[1][:, :, :1], videos[None][:, :, :1], atol=1e-4)
    # The first step with a change is the fake score's or the student's.
    step = next(number for number, plan in enumerate(found) if plan.switch_chunk is not None)
    for _ in range(step):
        trainer.advance()
    record, name = train_step(config, setup, trainer), "student_loss" if found[step].student_due else "fake_score_loss"
    assert 0 < float(record[name]) < 100
    trainer.close()


def test_a_sample_never_goes_on_with_the_text_that_it_began_with() -> None:
    prompts = ("a", "b", "a", "c")
    first, later = earlier_rows(prompts, range(400), 7), rows_of_samples(range(400), 4, 7)
    assert all(prompts[one] != prompts[other] for one, other in zip(first, later, strict=True))
    assert {prompts[row] for row in first} == {"a", "b", "c"}


def test_a_change_of_the_prompt_needs_a_longer_rollout_and_another_prompt(inputs: VideoInputs, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="prompt_switches: given 'recache', and longest_frames is empty"):
        tiny_causal(inputs, tmp_path, "self_forcing", {"self_forcing.prompt_switches": "recache"})
    (tmp_path / "one.txt").write_text("a red cat\n", encoding="utf-8")
    changes = {"self_forcing.prompt_switches": "recache", "data.prompts": str(tmp_path / "one.txt")}
    config = tiny_causal(inputs, tmp_path, "self_forcing_long", {**changes, "data.sample_count": 1})
    with pytest.raises(ValueError, match=r"prompt_switches needs two prompts, and .*one\.txt has one"):
        CausalData.read(config)


TOLD = {"fake_score": dataclasses.replace(FAKE_SCORE, told_exit=True)}


def test_exits_of_all_schedules_have_numbers_of_their_own(inputs: VideoInputs) -> None:
    config = tiny_causal(inputs, NOWHERE, "self_forcing_mixture", TOLD)
    assert config.told_exits == 6
    firsts: dict[tuple[int, ...], int] = {(2, 1): 0, (1, 1): 2, (3, 2): 3}
    for plan in plans(inputs, "self_forcing_mixture", 60, TOLD):
        assert plan.told_exit == firsts[tuple(map(len, plan.schedule.times))] + plan.exit_step
    assert tiny_causal(inputs, NOWHERE, "self_forcing", TOLD).told_exits == 3
    assert {plan.told_exit for plan in plans(inputs, "self_forcing", 9)} == {None}
    for changes, match in (
        ({"self_forcing.exit": "last"}, "all rollouts stop at the last"),
        ({"self_forcing.input": "noised_data"}, "steps of their own"),
        ({"student.steps": (1, 1)}, "rollouts of one step"),
    ):
        with pytest.raises(ValueError, match=match):
            tiny_causal(inputs, NOWHERE, "self_forcing", {**TOLD, **changes})


@pytest.mark.parametrize("changes", [{}, {"self_forcing.scores": "causal"}, {"self_forcing.replay": True}])
def test_fake_score_learns_the_row_of_its_exit(inputs: VideoInputs, tmp_path: Path, changes: dict[str, Any]) -> None:
    config = tiny_causal(inputs, tmp_path, "self_forcing", {**TOLD, **changes})
    setup, trainer = start_causal(config)
    assert setup.scores is not None
    assert setup.scores.fake.exit_shift is not None
    (shift,) = setup.scores.fake.exit_shift.parameters()
    moved = []
    for _ in range(4):
        before = shift.detach().clone()
        setup.scores.fake_role.optimizer.state.clear()
        train_step(config, setup, trainer)
        moved.append((shift.detach() != before).any(dim=1).tolist())
        trainer.advance()
    trainer.close()
    # The student's steps are the first and the fourth; the fake score's own rollouts stop at exits 0 and 1.
    assert moved == [[False] * 3, [True, False, False], [False, True, False], [False] * 3]
