"""Rollouts that weigh by a reward in self-forcing (Re-DMD of Reward Forcing)."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from fewstep.causal_video.stages.config import CausalConfig
from fewstep.causal_video.stages.redmd import RolloutReward, reward_weight, window_saliency_weight
from fewstep.causal_video.stages.sections import RedmdConfig
from fewstep.causal_video.stages.setup import CausalData, CausalSetup, build_setup
from fewstep.causal_video.stages.train import train_causal_video, train_step
from fewstep.core.config import load_config, plain_values
from fewstep.core.randomness import Draw
from fewstep.core.training.checkpoint import list_checkpoints, load_checkpoint
from fewstep.core.training.run_directory import RunDirectory, read_metrics
from fewstep.core.training.trainer import Trainer
from fewstep.dmd.config import MatchingConfig, SidObjective
from fewstep.dmd.matching import SampleWeights, Scores, student_step
from fewstep.dmd.reward.config import ScorerConfig
from fewstep.evaluation.scorers.failure import RewardError
from fewstep.evaluation.scorers.scorer import Scorer, ScorerCard
from tests.causal_video.tiny_causal_run import PROMPTS, VideoInputs, tiny_causal
from tests.dmd.tiny_run import assert_same_checkpoint
from tests.test_settings import ROOT

FIRST = torch.device("cpu")


class Brightness:
    """Mean of the pixels of a clip; keeps what it was shown."""

    card = ScorerCard("brightness", 0.0, 1.0, needs_video=True)

    def __init__(self, *, broken_from: int | None = None) -> None:
        self.shapes: list[tuple[int, ...]] = []
        self.prompts: list[str] = []
        self.broken_from = broken_from

    def __call__(self, pixels: Tensor, prompts: list[str]) -> Tensor:
        self.shapes.append(tuple(pixels.shape))
        self.prompts += prompts
        if self.broken_from is not None and len(self.shapes) > self.broken_from:
            raise RuntimeError("out of memory")
        return pixels.flatten(1).mean(dim=1)


def redmd(**values: Any) -> dict[str, Any]:
    return {"redmd": RedmdConfig(scorers=(ScorerConfig(name="clip_light"),), **values)}


def started(
    inputs: VideoInputs, directory: Path, changes: dict[str, Any], scorer: Scorer
) -> tuple[Any, CausalSetup, Trainer]:
    config = tiny_causal(inputs, directory, "self_forcing", changes)
    data = CausalData.read(config)
    trainer = Trainer(config.run, RunDirectory(config.run.directory), cpu=True)
    weigh = None if config.redmd is None else RolloutReward(config.redmd, trainer, data.prompts, [scorer]).weigh
    return config, build_setup(config, data, trainer, weigh=weigh), trainer


def student_gradient(setup: CausalSetup) -> Tensor:
    grads = [parameter.grad for _, parameter in setup.student_role.parameters if parameter.grad is not None]
    return torch.cat([grad.flatten() for grad in grads])


def test_weights_are_the_exponential_and_its_limit() -> None:
    rewards = torch.tensor([-1.0, 0.0, 0.25, 2.0], dtype=torch.float64)
    weight = reward_weight(rewards, tilt_scale=2.0)
    assert weight.dtype == torch.float64
    assert weight.tolist() == pytest.approx([math.exp(2 * reward) for reward in rewards.tolist()], rel=1e-15)
    # Two rollouts differ by exp(2 (r1 - r2)), whatever is added to both.
    shifted = reward_weight(rewards + 0.7, tilt_scale=2.0)
    torch.testing.assert_close(shifted / weight, torch.full_like(weight, math.exp(1.4)), rtol=1e-14, atol=0)
    limited = reward_weight(rewards, tilt_scale=2.0, max_weight=5.0)
    assert limited.tolist() == pytest.approx([math.exp(-2), 1.0, math.exp(0.5), 5.0], rel=1e-15)
    with pytest.raises(ValueError, match="rewards"):
        reward_weight(torch.tensor([math.nan]), tilt_scale=2.0)


def test_each_samples_gradient_is_multiplied_and_rests_at_the_teacher(inputs: VideoInputs, tmp_path: Path) -> None:
    """d loss / d x0 = w g / numel for each sample; zero where the fake score is the teacher, whatever the weight."""
    _, setup, trainer = started(inputs, tmp_path, redmd(), Brightness())
    trainer.close()
    assert setup.scores is not None
    draw, times = Draw(5, [0, 1], FIRST), MatchingConfig()
    condition = setup.prompts.rows([0, 1])
    x0 = Draw(6, [0, 1], FIRST).noise(setup.latent_shape, "x0").requires_grad_()

    def gradient(guidance: float, weight: Tensor | None, chunks: tuple[int, ...] | None = None) -> Tensor:
        assert setup.scores is not None
        scores = Scores(setup.teacher, setup.scores.fake, guidance)
        step = student_step(
            x0, condition, scores=scores, draw=draw, times=times, samples=SampleWeights(weight, chunks=chunks)
        )
        return torch.autograd.grad(step.loss, x0)[0]

    weight = torch.tensor([3.0, 0.25])
    for chunks in (None, (1, 2)):
        plain, weighed = gradient(2.0, None, chunks), gradient(2.0, weight, chunks)
        assert float(plain.abs().max()) > 1e-6
        torch.testing.assert_close(weighed, plain * weight[:, None, None, None, None], rtol=1e-5, atol=0)
    # The untrained fake score is the unguided teacher.
    assert float(gradient(1.0, weight).abs().max()) == 0.0


@pytest.mark.parametrize("case", ["plain", "replay", "lora"])
def test_a_step_is_that_of_self_forcing_times_the_weight(inputs: VideoInputs, tmp_path: Path, case: str) -> None:
    """One rollout in a step: its gradient is exp(tilt r) times that of plain self-forcing, r of its own pixels."""
    extra = {"plain": {}, "replay": {"self_forcing.replay": True}, "lora": {"student.lora_rank": 2}}[case]
    one = {**extra, "run.batch_size": 1}
    scorer, found = Brightness(), {}
    for name, changes in (("weighed", {**one, **redmd(tilt_scale=3.0)}), ("plain", one)):
        config, setup, trainer = started(inputs, tmp_path / name, changes, scorer)
        grads: list[Tensor] = []

        def update(role: Any, keep: list[Tensor] = grads, setup: CausalSetup = setup) -> Tensor:
            keep.append(student_gradient(setup))
            return torch.zeros(())

        trainer.update = update  # pyright: ignore[reportAttributeAccessIssue]
        found[name] = train_step(config, setup, trainer), grads[0]
        trainer.close()
    metrics, weighed = found["weighed"]
    assert scorer.shapes == [(1, 3, 9, 32, 32)]
    assert scorer.prompts[0] in PROMPTS
    reward, weight = float(metrics["reward"]), float(metrics["reward_weight"])
    assert 0.05 < reward < 0.95
    assert weight == pytest.approx(math.exp(3.0 * reward), rel=1e-5)
    torch.testing.assert_close(weighed, found["plain"][1] * weight, rtol=2e-4, atol=1e-7)
    assert "reward" not in found["plain"][0]


class EndAbove:
    """Mean of the upper half of the last four pixel frames of nine."""

    card = ScorerCard("end_above", 0.0, 1.0, differentiable=True, needs_video=True)

    def __call__(self, pixels: Tensor, prompts: list[str]) -> Tensor:
        return pixels[:, :, 5:, :16].flatten(1).mean(dim=1)


def test_places_that_learn_weigh_one_in_the_mean_and_a_weak_reward_counts_more() -> None:
    maps = torch.zeros(2, 1, 9, 4, 4, dtype=torch.float64)
    maps[0, 0, 1:5, :2], maps[1, 0, 5:, :2] = 1.0, 1.0
    rewards, learns = torch.tensor([[-3.0], [3.0]]), torch.tensor([False, True, True])
    weight = window_saliency_weight(maps, rewards, learns, (2, 2))
    assert weight.shape == (1, 1, 3, 2, 2)
    assert weight[0, 0, 0].tolist() == [[1.0, 1.0], [1.0, 1.0]]
    assert float(weight[:, :, learns].mean()) == pytest.approx(1.0)
    # Frame profile (1, 0.2) / 0.6; inside of a frame (1, 0.15) / 0.575.
    expected = torch.tensor([[1.0, 0.15], [0.2, 0.03]], dtype=torch.float64) / 0.6 / 0.575
    torch.testing.assert_close(weight[0, 0, 1:, :, 0], expected)
    swapped = window_saliency_weight(maps, -rewards, learns, (2, 2))
    torch.testing.assert_close(swapped[0, 0, 1:, :, 0], expected.flip(0))


def test_a_step_weighs_the_places_that_move_the_reward(inputs: VideoInputs, tmp_path: Path) -> None:
    """With a graph and with a replay; a scorer without a gradient is refused before anything is loaded."""
    for name, replay in (("plain", False), ("replay", True)):
        changes = {**redmd(saliency=True), "self_forcing.replay": replay}
        config, setup, trainer = started(inputs, tmp_path / name, changes, EndAbove())
        metrics = train_step(config, setup, trainer)
        trainer.close()
        # The profile of frames is (0.2, 0.2, 1) over its mean.
        assert float(metrics["reward_frame_weight_largest"]) == pytest.approx(3 / 1.4, rel=1e-5)
        assert float(metrics["reward_weight"]) > 1.0
    with pytest.raises(ValueError, match=r"brightness has none: choose another scorer"):
        started(inputs, tmp_path / "refused", redmd(saliency=True), Brightness())


@pytest.mark.slow
def test_a_run_resumes_exactly_and_the_fake_score_is_not_weighed(inputs: VideoInputs, tmp_path: Path) -> None:
    weighed = redmd(max_weight=4.0, saliency=True)
    for name, changes in (
        ("straight", {}),
        ("resumed", {"run.steps": 2}),
        ("resumed", {"run.resume": "latest"}),
    ):
        config = tiny_causal(inputs, tmp_path / name, "self_forcing", {**weighed, **changes})
        assert train_causal_video(config, scorers=[EndAbove()]) == 0
    left, right = (load_checkpoint(list_checkpoints(tmp_path / name)[-1]) for name in ("straight", "resumed"))
    assert_same_checkpoint(left, right)
    metrics = [record for record in read_metrics(tmp_path / "straight" / "metrics.jsonl") if "note" not in record]
    assert [record["step"] for record in metrics if "reward_weight" in record] == [1, 4]
    assert [record["step"] for record in metrics if "fake_score_loss" in record] == [2, 3]


def test_captions_are_judged_where_rollouts_begin_with_a_video(inputs: VideoInputs, tmp_path: Path) -> None:
    scorer = Brightness()
    changes = {**redmd(), "self_forcing.input": "noised_data"}
    config, setup, trainer = started(inputs, tmp_path, changes, scorer)
    train_step(config, setup, trainer)
    trainer.close()
    assert len(scorer.prompts) == 4
    assert all(prompt.startswith("video ") for prompt in scorer.prompts)


@pytest.mark.slow
def test_a_scorer_that_fails_loses_no_step(inputs: VideoInputs, tmp_path: Path) -> None:
    """The state at the step's start is saved, and with the scorer mended the run goes on as if nothing had been."""
    every = {**redmd(), "run.checkpoint_every": 100}
    straight = tiny_causal(inputs, tmp_path / "straight", "self_forcing", every)
    assert train_causal_video(straight, scorers=[Brightness()]) == 0
    broken = tiny_causal(inputs, tmp_path / "broken", "self_forcing", every)
    with pytest.raises(RewardError, match=r"step 3: the reward failed.*out of memory.*--resume .*checkpoint-3"):
        train_causal_video(broken, scorers=[Brightness(broken_from=1)])
    again = tiny_causal(inputs, tmp_path / "broken", "self_forcing", {**every, "run.resume": "latest"})
    assert train_causal_video(again, scorers=[Brightness()]) == 0
    left, right = (load_checkpoint(list_checkpoints(tmp_path / name)[-1]) for name in ("straight", "broken"))
    assert_same_checkpoint(left, right)


def test_what_does_not_go_together_is_named(inputs: VideoInputs, tmp_path: Path) -> None:
    scorers = (ScorerConfig(name="clip_light"),)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"scorers": ()}, "name at least one scorer"),
        ({"scorers": scorers, "tilt_scale": 0.0}, "tilt_scale is 0.0; it must be above 0"),
        ({"scorers": scorers, "max_weight": 0.0}, "max_weight is 0.0"),
        ({"scorers": scorers, "chunk": 0}, "chunk is 0; it must be at least 1"),
    ]
    for values, told in wrong:
        with pytest.raises(ValueError, match=told):
            RedmdConfig(**values)
    with pytest.raises(ValueError, match="redmd weighs the reverse KL, and sid takes its place"):
        tiny_causal(inputs, tmp_path, "self_forcing", {**redmd(), "sid": SidObjective()})
    with pytest.raises(ValueError, match="the section redmd belongs to self_forcing"):
        tiny_causal(inputs, tmp_path, "teacher_forcing", redmd())
    unknown = {"redmd": RedmdConfig(scorers=(ScorerConfig(name="beauty"),))}
    config = tiny_causal(inputs, tmp_path, "self_forcing", {**unknown, "teacher.path": str(inputs.teacher)})
    with pytest.raises(ValueError, match="scorer is 'beauty'; use one of"):
        train_causal_video(config)


def test_the_section_is_read_from_a_file_and_from_what_a_run_keeps(tmp_path: Path) -> None:
    recipe = ROOT / "configs" / "wan21_1b" / "reward_forcing.yaml"
    config, _ = load_config(CausalConfig, ["--config", str(recipe)], prog="x", description="x")
    assert config.redmd is not None
    assert config.redmd.scorers == (ScorerConfig(name="videoalign_mq", weights="VIDEOALIGN"),)
    kept = tmp_path / "config.yaml"
    kept.write_text(yaml.safe_dump(plain_values(config)), encoding="utf-8")
    again, _ = load_config(CausalConfig, ["--config", str(kept)], prog="x", description="x")
    assert again == config


def test_a_reward_that_is_no_z_score_is_named(inputs: VideoInputs, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a reward of 31 weighs exp\(2\.0 x 31\): give the scorer mean and std"):
        reward_weight(torch.tensor([0.1, 31.0]), tilt_scale=2.0)
    assert reward_weight(torch.tensor([31.0]), tilt_scale=2.0, max_weight=5.0).tolist() == [5.0]
    large = RedmdConfig(scorers=(ScorerConfig(name="clip_light", std=0.001),))
    config, setup, trainer = started(inputs, tmp_path, {"redmd": large}, Brightness())
    with pytest.raises(RewardError, match="give the scorer mean and std"):
        train_step(config, setup, trainer)
    trainer.close()
