"""The gradient of a reward beside distribution matching (ReFL in DMDR's second stage)."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.core.randomness import Draw
from fewstep.core.training.checkpoint import list_checkpoints, load_checkpoint
from fewstep.core.training.run_directory import RunDirectory, read_metrics
from fewstep.core.training.trainer import Trainer
from fewstep.dmd.config import DmdConfig, NoisedDataConfig, ReflConfig
from fewstep.dmd.refl import refl_loss
from fewstep.dmd.reward.scorers import load_scorers
from fewstep.dmd.setup import DmdData, DmdSetup, build_setup
from fewstep.dmd.train import student_samples, takes_noised_data, train_dmd, train_step
from fewstep.embedded.digits.scorers import StrokeWeight
from fewstep.evaluation.scorers.failure import RewardError
from fewstep.evaluation.scorers.prefix import PrefixedScorer
from fewstep.evaluation.scorers.scorer import Scorer, ScorerCard, require_prompts
from fewstep.evaluation.scorers.settings import ScorerConfig
from tests.dmd.tiny_run import PROMPTS, TinyInputs, assert_same_checkpoint, tiny_config
from tests.tiny_pipelines import save_pipeline
from tests.tiny_videos import build_video_pipeline

ENTRY = ScorerConfig(name="stroke_weight", weight=0.5, mean=0.1, std=0.2)


def refl(**values: Any) -> dict[str, Any]:
    return {"refl": ReflConfig(scorers=(ENTRY,), **values)}


class Watched:
    """Stroke weight that keeps its prompts, and breaks from a call on."""

    def __init__(self, *, broken_from: int | None = None) -> None:
        self.scorer, self.calls, self.prompts, self.broken_from = StrokeWeight(), 0, list[str](), broken_from
        self.card = self.scorer.card

    def __call__(self, pixels: Tensor, prompts: list[str]) -> Tensor:
        self.calls += 1
        self.prompts += prompts
        if self.broken_from is not None and self.calls > self.broken_from:
            raise RuntimeError("out of memory")
        return self.scorer(pixels, prompts)


def started(config: DmdConfig, scorers: list[Scorer] | None = None) -> tuple[DmdSetup, Trainer]:
    data = DmdData.read(config)
    trainer = Trainer(config.run, RunDirectory(config.run.directory), cpu=True)
    return build_setup(config, data, trainer, scorers=scorers), trainer


def test_the_loss_is_a_weighted_hinge() -> None:
    rewards = torch.tensor([[0.1, 0.9], [0.4, 0.2]], dtype=torch.float64, requires_grad=True)
    loss = refl_loss(rewards, weights=[0.1, 2.0], margin=0.7)
    assert float(loss) == pytest.approx(0.1 * (0.6 + 0.0) / 2 + 2.0 * (0.3 + 0.5) / 2, rel=1e-15)
    (gradient,) = torch.autograd.grad(loss, rewards)
    assert gradient.tolist() == [[-0.05, 0.0], [-1.0, -1.0]]
    plain = refl_loss(rewards, weights=[0.1, 2.0])
    assert float(plain) == pytest.approx(-0.1 * 0.5 - 2.0 * 0.3, rel=1e-15)
    with pytest.raises(ValueError, match="carry no gradient"):
        refl_loss(rewards.detach(), weights=[0.1, 2.0])
    with pytest.raises(ValueError, match="1 weights for 2 rewards"):
        refl_loss(rewards, weights=[0.1])


@pytest.mark.parametrize("lora", [0, 2])
def test_the_students_gradient_is_that_of_matching_and_that_of_the_reward(
    inputs: TinyInputs, tmp_path: Path, lora: int
) -> None:
    """The sum of both, the second through scorer and decoder by autograd on the same sample."""
    base = {"student.lora_rank": lora}
    grads: dict[str, Tensor] = {}
    for name, changes in (("both", {**base, **refl(margin=5.0)}), ("matching", base)):
        config = tiny_config(inputs, tmp_path / name, changes)
        setup, trainer = started(config)
        kept: list[Tensor] = []

        def update(role: Any, kept: list[Tensor] = kept, setup: DmdSetup = setup) -> Tensor:
            if role is setup.student_role:
                kept.append(torch.cat([p.grad.flatten() for _, p in role.parameters if p.grad is not None]))
            return torch.zeros(())

        trainer.update = update  # pyright: ignore[reportAttributeAccessIssue]
        metrics = train_step(config, setup, trainer)
        grads[name] = kept[0]
        if name == "matching":
            draw = Draw(config.run.seed, trainer.local_indices(0, config.run.batch_size), trainer.device)
            condition = setup.prompts.of_samples(draw.indices, config.run.seed)
            for _, parameter in setup.student_role.parameters:
                parameter.grad = None
            x0 = student_samples(config, setup, trainer, condition=condition, draw=draw).x0
            scores = StrokeWeight()(setup.teacher.decode(x0), [""] * len(x0))
            (0.5 * (5.0 - (scores - 0.1) / 0.2)).mean().backward()
            grads["reward"] = torch.cat(
                [p.grad.flatten() for _, p in setup.student_role.parameters if p.grad is not None]
            )
        else:
            assert float(metrics["reward_stroke_weight"]) == pytest.approx(
                5 - 2 * float(metrics["refl_loss"]), rel=1e-5
            )
        trainer.close()
    assert float(grads["reward"].norm()) > 1e-3
    torch.testing.assert_close(grads["both"], grads["matching"] + grads["reward"], rtol=1e-3, atol=1e-6)


def test_a_reward_above_the_margin_pulls_no_more(inputs: TinyInputs, tmp_path: Path) -> None:
    config = tiny_config(inputs, tmp_path, refl(margin=-100.0))
    setup, trainer = started(config)
    assert setup.reward is not None
    x0 = torch.randn((2, *setup.latent_shape), requires_grad=True)
    loss, record = setup.reward.loss(setup.teacher, x0, ["a", "b"])
    trainer.close()
    (gradient,) = torch.autograd.grad(loss, x0)
    assert float(loss.detach()) == float(gradient.abs().max()) == 0.0
    assert math.isfinite(float(record["reward_stroke_weight"]))


def test_prompts_are_those_that_the_samples_were_asked_for(inputs: TinyInputs, tmp_path: Path) -> None:
    """Captions where the input is noised data, prompts elsewhere."""
    seen: dict[bool, list[str]] = {}
    mixed = NoisedDataConfig(latents=str(inputs.latents), share=0.5)
    changes = {**refl(), "noised_data": mixed, "fake_score.ratio": 1}
    config, scorer = tiny_config(inputs, tmp_path, changes), Watched()
    setup, trainer = started(config, [scorer])
    for _ in range(6):
        scorer.prompts.clear()
        train_step(config, setup, trainer)
        seen[takes_noised_data(config, trainer.step)] = list(scorer.prompts)
        trainer.advance()
    trainer.close()
    assert set(seen) == {False, True}
    assert all(prompt.startswith("picture ") for prompt in seen[True])
    assert set(seen[False]) <= set(PROMPTS)
    assert all(len(prompts) == 4 for prompts in seen.values())


def test_a_prefix_stands_before_each_prompt() -> None:
    scorer = Watched()
    prefixed = PrefixedScorer(scorer, "Realistic photo")
    pixels = torch.rand(2, 3, 8, 8)
    assert torch.equal(prefixed(pixels, ["a cat", "two dogs"]), StrokeWeight()(pixels, ["", ""]))
    assert scorer.prompts == ["Realistic photo a cat", "Realistic photo two dogs"]
    assert prefixed.card is scorer.card
    entry = ScorerConfig(name="stroke_weight", prompt_prefix="Realistic photo")
    (loaded,) = load_scorers([entry], device=torch.device("cpu"))
    assert isinstance(loaded, PrefixedScorer)
    with pytest.raises(ValueError, match="prompt_prefix is ' '"):
        PrefixedScorer(scorer, " ")


@pytest.mark.slow
def test_a_run_raises_its_reward_and_resumes_exactly(inputs: TinyInputs, tmp_path: Path) -> None:
    strong = {"refl": ReflConfig(scorers=(ScorerConfig(name="stroke_weight", weight=200.0),))}
    for name, changes in (("straight", {}), ("resumed", {"run.steps": 3}), ("resumed", {"run.resume": "latest"})):
        every = {**strong, "run.steps": 6, "fake_score.ratio": 1, "run.checkpoint_every": 3}
        assert train_dmd(tiny_config(inputs, tmp_path / name, {**every, **changes})) == 0
    left, right = (load_checkpoint(list_checkpoints(tmp_path / name)[-1]) for name in ("straight", "resumed"))
    assert_same_checkpoint(left, right)
    metrics = [each for each in read_metrics(tmp_path / "straight" / "metrics.jsonl") if "note" not in each]
    rewards = [each["reward_stroke_weight"] for each in metrics]
    assert len(rewards) == 6
    # Each step alone is noisy by its prompts.
    assert sum(rewards[3:]) > sum(rewards[:3])


@pytest.mark.slow
def test_a_scorer_that_fails_loses_no_step(inputs: TinyInputs, tmp_path: Path) -> None:
    """The student's update comes first in a step: nothing has changed yet, and its start is saved."""
    every = {**refl(), "run.checkpoint_every": 100}
    assert train_dmd(tiny_config(inputs, tmp_path / "straight", every), scorers=[Watched()]) == 0
    with pytest.raises(RewardError, match=r"out of memory.*--resume .*checkpoint-2"):
        train_dmd(tiny_config(inputs, tmp_path / "broken", every), scorers=[Watched(broken_from=1)])
    again = tiny_config(inputs, tmp_path / "broken", {**every, "run.resume": "latest"})
    assert train_dmd(again, scorers=[Watched()]) == 0
    left, right = (load_checkpoint(list_checkpoints(tmp_path / name)[-1]) for name in ("straight", "broken"))
    assert_same_checkpoint(left, right)


@pytest.mark.slow
def test_videos_count_by_their_frames(inputs: TinyInputs, tmp_path: Path) -> None:
    teacher = save_pipeline(build_video_pipeline(text_tokens=8), tmp_path / "teacher")
    size = {"data.height": 32, "data.width": 32, "data.frames": 9, "run.steps": 2}
    changes = {**refl(), **size, "teacher.path": str(teacher)}
    assert train_dmd(tiny_config(inputs, tmp_path / "run", changes)) == 0
    metrics = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert sum("reward_stroke_weight_frames" in each for each in metrics) == 1


def test_scorers_that_do_not_fit_are_refused(inputs: TinyInputs, tmp_path: Path) -> None:
    class Judge:
        def __init__(self, card: ScorerCard) -> None:
            self.card = card

        def __call__(self, pixels: Tensor, prompts: list[str]) -> Tensor:
            return pixels.flatten(1).mean(dim=1)

    for number, (card, told) in enumerate(
        (
            (ScorerCard("judge"), "follows the reward's own gradient, and judge has none"),
            (
                ScorerCard("film", differentiable=True, needs_video=True),
                "film judges videos, and the samples are pictures",
            ),
        )
    ):
        config = tiny_config(inputs, tmp_path / str(number), refl())
        with pytest.raises(ValueError, match=told):
            train_dmd(config, scorers=[Judge(card)])
    with pytest.raises(ValueError, match="name at least one scorer"):
        ReflConfig(scorers=())


@pytest.mark.parametrize("chunk", [1, 3])
def test_a_chunk_at_a_time_gives_the_same_gradient_in_less_memory(
    inputs: TinyInputs, tmp_path: Path, chunk: int
) -> None:
    """Value and gradient are those of the whole; what decoder and scorer keep for backward is that of one chunk."""
    found = {}
    for name, size in (("whole", None), ("parts", chunk)):
        setup, trainer = started(tiny_config(inputs, tmp_path / name, refl(margin=5.0, chunk=size)))
        trainer.close()
        assert setup.reward is not None
        generator = torch.Generator().manual_seed(2)
        x0 = torch.randn((4, *setup.latent_shape), generator=generator, requires_grad=True)
        held, most = 0, 0

        def keep(tensor: Tensor) -> int:
            nonlocal held, most
            held += tensor.numel()
            most = max(most, held)
            return tensor.numel()

        class Kept:
            """What one saved tensor weighs, for as long as a graph holds it."""

            def __init__(self, tensor: Tensor) -> None:
                self.tensor, self.size = tensor, keep(tensor)

            def __del__(self) -> None:
                nonlocal held
                held -= self.size

        with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
            loss, record = setup.reward.loss(setup.teacher, x0, ["a"] * 4)
            (gradient,) = torch.autograd.grad(loss, x0)
        found[name] = float(loss.detach()), gradient, float(record["reward_stroke_weight"]), most
    whole, parts = found["whole"], found["parts"]
    assert parts[0] == pytest.approx(whole[0], rel=1e-6)
    assert parts[2] == pytest.approx(whole[2], rel=1e-6)
    torch.testing.assert_close(parts[1], whole[1], rtol=1e-5, atol=1e-8)
    assert float(whole[1].abs().max()) > 1e-6
    assert parts[3] < (0.35 if chunk == 1 else 0.8) * whole[3]


def test_prompts_that_a_scorer_does_not_know_are_named_at_the_start(inputs: TinyInputs, tmp_path: Path) -> None:
    """Of the whole file, with the prefix that the scorer is shown, before anything is scored."""

    class Picky(Watched):
        def require_prompts(self, prompts: Any) -> None:
            unknown = [prompt for prompt in prompts if prompt != "Realistic photo a red cat"]
            if unknown:
                raise ValueError(f"no task for {unknown[0]}")

    scorer = Picky()
    require_prompts([PrefixedScorer(scorer, "Realistic photo"), StrokeWeight()], ["a red cat"])
    with pytest.raises(ValueError, match="no task for Realistic photo two dogs"):
        train_dmd(tiny_config(inputs, tmp_path, refl()), scorers=[PrefixedScorer(scorer, "Realistic photo")])
    assert scorer.calls == 0


def test_settings_of_scorers_that_cannot_be_are_refused() -> None:
    twice = (ScorerConfig(name="clip_score", weights="A"), ScorerConfig(name="clip_score", weights="B"))
    with pytest.raises(ValueError, match="scorers names clip_score twice"):
        ReflConfig(scorers=twice)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"weight": 0.0}, "weight is 0.0"),
        ({"weight": math.nan}, "weight is nan"),
        ({"mean": math.inf}, "mean inf"),
        ({"prompt_prefix": " "}, "prompt_prefix is blank"),
    ]
    for wrong, told in cases:
        with pytest.raises(ValueError, match=told):
            ScorerConfig(name="slant", **wrong)
    with pytest.raises(ValueError, match="margin is inf"):
        ReflConfig(scorers=(ENTRY,), margin=math.inf)
