"""Measures of a student while it trains, and its best weights by the first of them.

Every process draws its share of the samples, from the same prompts and noise each time, so that two times differ by the
weights alone. Shapes: N samples, latents [B, C, h, w], pixels [B, 3, H, W] in [0, 1], features [N, D].
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fewstep.core.data import PromptConditions
from fewstep.core.randomness import sample_noise
from fewstep.core.settings import DataConfig
from fewstep.core.training.best import best_step, has_left_better, save_best, set_aside_best
from fewstep.core.training.processes import Processes
from fewstep.core.training.run import RunWatch
from fewstep.core.training.trainer import NonFiniteError, Trainer
from fewstep.core.training.watch import Watched
from fewstep.dmd.reward.scorers import SCORERS, ScorerChoice, load_judge
from fewstep.evaluation.choice import WEIGHTS, WEIGHTS_OF, Choice
from fewstep.evaluation.judge import FEATURES, Material, judge_material, score_batches
from fewstep.evaluation.measures.features import extract_features
from fewstep.evaluation.scorers.failure import RewardError
from fewstep.evaluation.systems import System, parse_split, require_samples
from fewstep.evaluation.validation import ValidationConfig

PREFIX = "validation_"


def check_validation(config: ValidationConfig | None) -> None:
    """Find what is wrong with the section before a model is read. Raises ValueError."""
    if config is None:
        return
    try:
        _check(config)
    except ValueError as error:
        raise ValueError(f"validation: {error}") from error


def _check(config: ValidationConfig) -> None:
    require_samples(config.samples)
    choice = Choice(config.measures, config.weights, config.protocol, repetitions=0)
    for entry in config.scorers:
        ScorerChoice(entry.name, entry.weights, entry.clip, entry.model, entry.frames)
        if SCORERS[entry.name].judges_clips or entry.frames is not None:
            raise ValueError(f"scorer {entry.name} judges clips, and samples here are pictures")
    if parse_split(config.reference) is not None:
        if config.classifier is None or config.prompts is not None:
            raise ValueError("reference digits needs classifier, and brings its own prompts")
        return
    if "classes" in config.measures:
        raise ValueError("measures has classes, which only the digits have: give reference digits:train")
    keys = choice.feature_keys()
    if bool(keys) != (config.reference is not None):
        raise ValueError(
            f"measures is {list(config.measures)} and reference {config.reference}: distances "
            "need real pictures, and nothing else does"
        )
    for name in (WEIGHTS_OF[key] for key in keys):
        if name not in config.weights:
            raise ValueError(f"measures {list(config.measures)} need {name}: {WEIGHTS[name]}")


class Validation:
    """What a run is validated by: prompts with their conditions, and a judge. Built before text encoders are freed.

    Raises:
        ValueError: a file is missing or does not fit, or the teacher makes videos.
    """

    def __init__(self, config: ValidationConfig, data: DataConfig, setup: Watched, trainer: Trainer) -> None:
        if len(setup.latent_shape) != 3:
            raise ValueError("validation measures pictures, and this teacher makes videos: leave the section out")
        if setup.teacher.family.takes_picture:
            raise ValueError(
                "validation tells its prompts alone, and this teacher is told a picture with each: leave the section "
                "out"
            )
        self.config, self.setup, self.trainer = config, setup, trainer
        self.processes = Processes(trainer.rank, trainer.world_size)
        # The first process reads the real pictures, the others find their features in the cache.
        with trainer.accelerator.main_process_first():
            self.judge = load_judge(config, data.prompts, device=trainer.device)
        self.texts = self.judge.reference.sample_prompts(config.samples)
        self.conditions = PromptConditions(
            setup.teacher, self.texts, cache=data.cache_prompts, height=data.height, width=data.width
        )
        self.judge.require_samples(config.samples)

    def figures(self) -> dict[str, float]:
        """All figures of the student's averaged weights as they are now, the deciding one first; on every process."""
        material = self._material()
        system = System("student", "", len(self.setup.student.times), 1.0)
        found = judge_material(self.judge, material, system=system, seed=self.config.seed)
        return {kind.key: found.figures[kind.key].value for kind in self.judge.kinds()}

    @torch.no_grad()
    def _material(self) -> Material:
        """Features and scores of all samples, of which each process draws every so many-th."""
        count, last = self.trainer.world_size, self.config.samples - 1
        # All processes draw equally many: the last sample is drawn again where they do not come out even.
        mine = [min(row, last) for row in range(self.trainer.rank, -(-self.config.samples // count) * count, count)]
        failure: Exception | None = None
        features, parts = {}, []
        try:
            features, parts = self._measured(mine)
        except (ValueError, NonFiniteError, RewardError) as error:
            failure = error
        # The others would wait for the samples of a process that has left.
        if self.processes.maximum([int(failure is not None)])[0]:
            raise failure or ValueError(
                f"step {self.trainer.step}: validation failed in another process; see its message"
            )
        material = Material(list(self.texts))
        material.features = {key: self._of_all(torch.cat(found)) for key, found in features.items()}
        names = [scorer.card.name for scorer in self.judge.scorers]
        material.scores = {name: self._of_all(torch.cat([scores[name] for scores, _ in parts])) for name in names}
        right = [one for _, one in parts if one is not None]
        material.right = self._of_all(torch.cat(right)) if right else None
        return material

    @torch.no_grad()
    def try_out(self) -> str:
        """Draw and measure one batch, without figures, and say so: for dry runs."""
        rows = list(range(min(self.config.batch_size, self.config.samples)))
        self._measured(rows)
        return f"validation: {len(rows)} samples were drawn and measured; a run does so with {self.config.samples}"

    def _measured(
        self, rows: list[int]
    ) -> tuple[dict[str, list[Tensor]], list[tuple[dict[str, Tensor], Tensor | None]]]:
        """Features by extractor, and scores with right and wrong, of rows of the samples, a batch at a time."""
        role, size = self.setup.student_role, self.config.batch_size
        keys = dict.fromkeys(FEATURES.get(metric, "image") for metric in self.judge.metrics)
        features: dict[str, list[Tensor]] = {key: [] for key in keys}
        parts: list[tuple[dict[str, Tensor], Tensor | None]] = []
        assert role.ema is not None
        with role.ema.applied(role.module):
            for start in range(0, len(rows), size):
                batch = rows[start : start + size]
                # As evaluations find them in files.
                pixels = (self._pixels(batch) * 255).round() / 255
                for key, found in features.items():
                    found.append(extract_features(self.judge.reference.extractors[key], pixels))
                texts = [self.texts[row] for row in batch]
                parts.append(score_batches(self.judge, texts, [list(pixels.cpu())], device=str(self.trainer.device)))
        return features, parts

    def _pixels(self, rows: list[int]) -> Tensor:
        shape, student = self.setup.latent_shape, self.setup.student

        def noise(stream: str) -> Tensor:
            return sample_noise(self.config.seed, rows, shape, stream=stream, device=self.trainer.device)

        renoise = [noise(f"{PREFIX}renoise_{step}") for step in range(len(student.times) - 1)]
        latents = student.sample(noise(f"{PREFIX}noise"), self.conditions.rows(rows), renoise)
        self.trainer.check_finite("validation samples", latents)
        return self.setup.teacher.decode(latents).float().clamp(0, 1)

    def _of_all(self, own: Tensor) -> Tensor:
        """Rows of all processes in their order, from those of this one [n, ...]."""
        rows = self.processes.rows(own.cpu().contiguous())
        return rows.transpose(0, 1).flatten(0, 1)[: self.config.samples]


class ValidatedWatch:
    """A watch that also takes the measures of a validation when they are due, and keeps the best weights."""

    def __init__(self, watch: RunWatch, validation: Validation) -> None:
        self.watch, self.validation, self.trainer = watch, validation, validation.trainer
        self.best: tuple[int, float] | None = None

    def state(self) -> dict[str, Any]:
        """That of the watch, and the step and figure of the best weights, and of what they are the best."""
        return {**self.watch.state(), "best": self.best, "best_of": self.validation.config.identity()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint, which may be older than the best weights that were found after it."""
        self.watch.load_state(state)
        best, trainer = state.get("best"), self.trainer
        if best is None:
            return
        run = trainer.directory.path
        same, kept, replaced = state.get("best_of") == self.validation.config.identity(), False, False
        if trainer.is_main:
            kept, replaced = best_step(run) == best[0], has_left_better(run)
        if same and trainer.broadcast_int(int(kept or replaced)):
            # Every process must go on alike, so the figure stays what has to be beaten.
            self.best = (int(best[0]), float(best[1]))
            if not kept:
                trainer.note(
                    f"the best weights, of step {best[0]}, were replaced by later ones that this run has left: a "
                    f"figure better than their {best[1]:.6g} is kept next"
                )
            return
        why = "are not in this run's folder" if same else "were chosen by other settings of the validation"
        trainer.note(f"the best weights, of step {best[0]}, {why}: the next figure is the first to beat")
        if trainer.is_main:
            set_aside_best(run, -1)

    def begin(self) -> None:
        """The samples of a run's start, and their figures."""
        self.watch.begin()
        self.validate()

    def measure(self) -> Mapping[str, float]:
        """The metrics of the watch; where a validation is due, its figures become a record of their own."""
        found = self.watch.measure()
        if self.trainer.step % self.validation.config.every == 0 or self.trainer.step == self.trainer.run.steps:
            self.validate()
        return found

    def look_at(self, means: Mapping[str, float] | None) -> None:
        """What the watch says of a record."""
        self.watch.look_at(means)

    def save_samples(self) -> None:
        """The grid of the watch."""
        self.watch.save_samples()

    def validate(self) -> None:
        """Measure the averaged weights, and keep them where the first figure is better than any before."""
        figures, trainer = self.validation.figures(), self.trainer
        named = {f"{PREFIX}{key}": value for key, value in figures.items()}
        kind = self.validation.judge.kinds()[0]
        value = figures[kind.key]
        # A figure that is not finite would be the best for ever.
        if not math.isfinite(value):
            raise ValueError(f"step {trainer.step}: validation figure {kind.key} is {value}; see its pictures")
        sign = 1.0 if kind.lower_is_better else -1.0
        is_best = self.best is None or sign * value < sign * self.best[1]
        if is_best:
            self.best = (trainer.step, value)
            self._keep(kind.key, value)
        if not trainer.is_main:
            return
        trainer.directory.append({"step": trainer.step, **named})
        trainer.directory.scalars(trainer.step, named)
        assert self.best is not None
        shown = ", ".join(f"{name} {number:.5g}" for name, number in named.items())
        trainer.note(f"{shown}; best {kind.key} {self.best[1]:.5g} at step {self.best[0]}")

    def _keep(self, figure: str, value: float) -> None:
        """Write the averaged weights as the best; all processes call it, and all raise OSError for a full disk."""
        trainer, average = self.trainer, self.validation.setup.student_role.ema
        assert average is not None
        failure: OSError | None = None
        if trainer.is_main:
            try:
                save_best(trainer.directory.path, trainer.step, average.state_dict(), figure=figure, value=value)
            except OSError as error:
                failure = error
        if trainer.broadcast_int(int(failure is not None)):
            raise failure or OSError(f"process 0 could not write the best weights of step {trainer.step}")


def build_validation(
    config: ValidationConfig | None, data: DataConfig, setup: Watched, trainer: Trainer
) -> Validation | None:
    """The validation of a run, None without its section. Raises ValueError as `Validation`."""
    return None if config is None else Validation(config, data, setup, trainer)


def rehearsal(validation: Validation | None, *, dry: bool) -> str | None:
    """What a dry run says of the validation once a batch of it was made; None in a run, which begins with all of it."""
    return validation.try_out() if dry and validation is not None else None


def watched(watch: RunWatch, validation: Validation | None) -> RunWatch:
    """The watch itself, or one that validates too."""
    return watch if validation is None else ValidatedWatch(watch, validation)
