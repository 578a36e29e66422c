"""The latent reward model: what it sees, what it refuses, its training and its files."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.core.condition import Condition
from fewstep.core.config import OptimizerConfig, RunConfig, load_config
from fewstep.core.data import LatentDataset
from fewstep.core.randomness import sample_noise
from fewstep.core.settings import TeacherConfig
from fewstep.core.training.checkpoint import load_checkpoint
from fewstep.core.training.run_directory import read_metrics
from fewstep.dmd.reward.config import ScorerConfig, ScorersConfig
from fewstep.dmd.reward.latent.config import LatentNetworkConfig, LatentRewardConfig, LatentSamplesConfig
from fewstep.dmd.reward.latent.network import (
    LatentReward,
    LatentRewardShape,
    latent_scores,
    load_latent_reward,
    prompt_vector,
    with_scale,
)
from fewstep.dmd.reward.latent.train import scored_samples, train_latent_reward, whole_groups
from fewstep.evaluation.scorers.scorer import ScorerCard
from tests.dmd.reward.reward_run import write_latent_reward, write_student
from tests.dmd.tiny_run import TinyInputs, assert_same_checkpoint, measured

CPU = torch.device("cpu")


def condition(count: int, *, pooled: bool = True) -> Condition:
    tokens = sample_noise(0, range(count), (3, 4), stream="tokens")
    return Condition(tokens, sample_noise(0, range(count), (2,), stream="pooled") if pooled else None)


def random_model() -> LatentReward:
    model = LatentReward(LatentRewardShape(4, 6, width=8, blocks=2, mean=3.0, std=2.0), seed=1)
    with torch.no_grad():
        model.score.weight.normal_(generator=torch.Generator().manual_seed(0))
    return model.requires_grad_(False)


def test_prompt_vector() -> None:
    tokens = torch.tensor([[[1.0, 0.0], [3.0, 2.0], [9.0, 9.0]]])
    assert prompt_vector(Condition(tokens)).tolist() == [[pytest.approx(13 / 3), pytest.approx(11 / 3)]]
    masked = Condition(tokens, torch.tensor([[5.0]]), token_mask=torch.tensor([[1, 1, 0]]))
    assert prompt_vector(masked).tolist() == [[2.0, 1.0, 5.0]]
    counted = Condition(tokens, token_counts=torch.tensor([1.0, 1.0, 2.0]))
    assert prompt_vector(counted).tolist() == [[5.5, 5.0]]


def test_scores_depend_on_the_sample_alone() -> None:
    model, x = random_model(), sample_noise(1, range(5), (4, 8, 8), stream="x")
    t, prompts = torch.linspace(0.1, 0.9, 5), condition(5)
    scores = latent_scores(model, x, t, prompts)
    alone = [latent_scores(model, x[k : k + 1], t[k : k + 1], prompts.index(slice(k, k + 1))) for k in range(5)]
    torch.testing.assert_close(torch.cat(alone), scores, rtol=1e-5, atol=1e-5)
    assert not scores.requires_grad
    others = (
        latent_scores(model, x, t.flip(0), prompts),
        latent_scores(model, x, t, prompts.index(torch.arange(4, -1, -1))),
    )
    assert all(float((other - scores).abs()[0]) > 1e-4 for other in others)
    assert model.card == ScorerCard("latent_reward", differentiable=True)


def test_gradient_is_that_of_finite_differences() -> None:
    model = random_model().double()
    x, t = sample_noise(1, range(2), (4, 8, 8), stream="x").double(), torch.tensor([0.3, 0.6]).double()
    leaf = x.clone().requires_grad_()
    latent_scores(model, leaf, t, condition(2), gradient=True).sum().backward()
    assert leaf.grad is not None
    direction = sample_noise(2, range(2), (4, 8, 8), stream="direction").double()
    plus, minus = (latent_scores(model, x + sign * 1e-5 * direction, t, condition(2)) for sign in (1, -1))
    slope = (leaf.grad * direction).flatten(1).sum(dim=1)
    torch.testing.assert_close((plus - minus) / 2e-5, slope, rtol=1e-6, atol=1e-8)


class Fixed:
    """Answers what it was given."""

    def __init__(self, card: ScorerCard, answer: Tensor) -> None:
        self.card, self.answer = card, answer

    def __call__(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return self.answer


def test_answers_are_checked() -> None:
    x, t, card = torch.zeros(2, 4, 8, 8), torch.zeros(2), ScorerCard("fixed", 0.0, 1.0, higher_is_better=False)
    assert latent_scores(Fixed(card, torch.tensor([0.2, 1.0])), x, t, condition(2)).tolist() == pytest.approx(
        [-0.2, -1]
    )
    for answer, told in (
        ([0.2, 1.5], "number from 0.0 to 1.0"),
        ([0.2, float("nan")], "number from"),
        ([0.1], r"\(1,\)"),
    ):
        with pytest.raises(ValueError, match=told):
            latent_scores(Fixed(card, torch.tensor(answer)), x, t, condition(2))
    with pytest.raises(ValueError, match="is not differentiable; it can judge, but not steer"):
        latent_scores(Fixed(card, torch.zeros(2)), x, t, condition(2), gradient=True)
    with pytest.raises(ValueError, match=r"2 latents, times .*, 3 prompts"):
        latent_scores(Fixed(card, torch.zeros(2)), x, t, condition(3))


def test_sizes_are_checked() -> None:
    with pytest.raises(ValueError, match="width a multiple of 8"):
        LatentRewardShape(4, 6, width=12)
    with pytest.raises(ValueError, match="std of a latent reward is 0"):
        LatentRewardShape(4, 6, std=0.0)
    shape = with_scale(LatentRewardShape(4, 6), torch.tensor([1.0, 3.0]))
    assert (shape.mean, shape.std) == (2.0, pytest.approx(2**0.5))
    with pytest.raises(ValueError, match="all rewards are equal"):
        with_scale(shape, torch.ones(3))
    with pytest.raises(ValueError, match="4 latent channels and prompts of width 6, given 4 and 4"):
        random_model().require_fit(4, condition(1, pooled=False))


def test_files_read_back_equal(inputs: TinyInputs, tmp_path: Path) -> None:
    model = load_latent_reward(write_latent_reward(inputs, tmp_path))
    assert model.card.weights == str(tmp_path)
    assert not any(weight.requires_grad for weight in model.parameters())
    again = load_latent_reward(tmp_path)
    assert all(torch.equal(weight, again.state_dict()[name]) for name, weight in model.state_dict().items())
    (tmp_path / "latent_reward.json").unlink()
    with pytest.raises(ValueError, match=r"lacks latent_reward.json"):
        load_latent_reward(tmp_path)
    with pytest.raises(ValueError, match="no weights of the latent reward model at"):
        load_latent_reward(tmp_path / "none")


def test_whole_groups_of_one_prompt() -> None:
    prompts = ("a", "b", "a", "a", "c", "b", "a", "a")
    dataset = LatentDataset(torch.arange(8.0).view(8, 1, 1, 1), prompts)
    found = whole_groups(dataset, 2, limit=100)
    assert found.prompts == ("a", "a", "b", "b", "a", "a")
    assert found.latents.flatten().tolist() == [0, 2, 1, 5, 3, 6]
    assert whole_groups(dataset, 2, limit=5).prompts == ("a", "a", "b", "b")
    with pytest.raises(ValueError, match="no prompt has 6 latents"):
        whole_groups(dataset, 6, limit=100)


def latent_config(inputs: TinyInputs, source: Path, directory: Path, **changes: Any) -> LatentRewardConfig:
    config = LatentRewardConfig(
        teacher=TeacherConfig(path=str(inputs.teacher)),
        samples=LatentSamplesConfig(source=str(source), prompts=str(inputs.prompts), count=80, held_out=0.2),
        reward=ScorersConfig(scorers=(ScorerConfig(name="stroke_weight", weight=2.0),), group_size=4),
        run=RunConfig(
            directory=str(directory),
            seed=3,
            steps=40,
            batch_size=32,
            checkpoint_every=20,
            keep_checkpoints=5,
            sample_every=1000,
            log_every=10,
        ),
        optimizer=OptimizerConfig(learning_rate=3e-3, weight_decay=0.0),
        network=LatentNetworkConfig(width=16, blocks=2),
        report_times=(0.05, 0.95),
    )
    return dataclasses.replace(config, **changes)


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["regression", "bradley_terry"])
def test_a_run_learns_its_scorer_and_resumes(inputs: TinyInputs, tmp_path: Path, objective: str) -> None:
    """Samples of a student, and the ink of their pictures; held-out samples agree near t = 0 and less near 1."""
    student = write_student(inputs, tmp_path / "student")
    config = latent_config(inputs, student, tmp_path / "run", objective=objective)
    samples = scored_samples(config, device=CPU)
    assert (samples.groups, samples.trained, len(samples.rewards)) == (20, 16, 80)
    assert len({samples.conditions.prompts[row] for row in samples.rows([3])}) == 1
    assert train_latent_reward(config) == 0
    record = json.loads((tmp_path / "run" / "latent_reward" / "latent_reward.json").read_text(encoding="utf-8"))
    early, late = record["record"]["agreement"]
    assert early["correlation"] > 0.5
    assert early["pair_accuracy"] > 0.65
    assert early["correlation"] > late["correlation"]
    losses = [row["loss"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in row]
    assert losses[-1] < 0.9 * losses[0]
    if objective == "regression":
        trained = samples.rewards[:64].double()
        assert record["shape"]["mean"] == pytest.approx(trained.mean().item())
        assert record["shape"]["std"] == pytest.approx(trained.std().item())
    resumed = dataclasses.replace(config.run, directory=str(tmp_path / "other"))
    resumed = dataclasses.replace(resumed, resume=str(tmp_path / "run" / "checkpoint-20"))
    assert train_latent_reward(dataclasses.replace(config, run=resumed)) == 0
    left, right = (load_checkpoint(tmp_path / name / "checkpoint-40") for name in ("other", "run"))
    assert_same_checkpoint(left, right)
    assert measured(tmp_path / "other")[-1] == measured(tmp_path / "run")[-1]


def test_latents_of_a_folder_and_mistakes(
    inputs: TinyInputs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    latents = sample_noise(4, range(16), (4, 8, 8), stream="data")
    LatentDataset(latents, ("one", "two") * 8).save(tmp_path / "latents")
    config = latent_config(inputs, tmp_path / "latents", tmp_path / "run")
    with pytest.raises(ValueError, match="latents have prompts, leave prompts out"):
        scored_samples(config, device=CPU)
    config = dataclasses.replace(config, samples=dataclasses.replace(config.samples, prompts=None))
    dry = dataclasses.replace(config, run=dataclasses.replace(config.run, dry_run=True))
    assert train_latent_reward(dry) == 0
    assert "bradley_terry: 4 groups of 4, 3 of them to learn from" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()
    few = dataclasses.replace(config, samples=dataclasses.replace(config.samples, count=4))
    with pytest.raises(ValueError, match="1 groups of 4; give samples for at least two"):
        scored_samples(few, device=CPU)
    student = write_student(inputs, tmp_path / "student")
    samples = dataclasses.replace(config.samples, source=str(student), prompts=None)
    with pytest.raises(ValueError, match=r"is a student; set samples.prompts"):
        scored_samples(dataclasses.replace(config, samples=samples), device=CPU)
    half = dataclasses.replace(config.teacher, dtype="bfloat16")
    samples = dataclasses.replace(samples, prompts=str(inputs.prompts))
    with pytest.raises(ValueError, match="a student draws its samples in float32"):
        scored_samples(dataclasses.replace(config, samples=samples, teacher=half), device=CPU)


def test_settings_are_checked_and_the_configuration_reads() -> None:
    path = Path(__file__).resolve().parents[4] / "configs" / "digits" / "latent_reward.yaml"
    config, _ = load_config(LatentRewardConfig, ["--config", str(path)], prog="train_latent_reward.py", description="")
    assert (config.objective, config.samples.count, config.reward.group_size) == ("bradley_terry", 4096, 8)
    for changes, told in (
        ({"temperature": 0.0}, "temperature > 0"),
        ({"temperature": 0.2, "objective": "regression"}, "'regression' has no pairs to read it"),
        ({"teacher": TeacherConfig(path="x", guidance=2.0)}, "and does not sample; leave it out"),
        ({"t_min": 0.99}, "0 <= t_min < t_max <= 1"),
        ({"report_times": (1.5,)}, r"give at least one time in \[0, 1\]"),
        ({"reward": dataclasses.replace(config.reward, group_size=7)}, "group_size 7 does not divide"),
    ):
        with pytest.raises(ValueError, match=told):
            dataclasses.replace(config, **changes)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="held_out above 0 and below 1"):
        dataclasses.replace(config.samples, held_out=1.0)
