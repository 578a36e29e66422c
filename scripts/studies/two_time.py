"""Judges students that have no export on the embedded digits, from the samples that this package draws itself.

Prompts, initial latents, judge and figures are those of `scripts/evaluate_image.py`; speed is not measured.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from fewstep.core.export.run import load_run_student
from fewstep.core.grids import step_grid
from fewstep.core.randomness import sample_noise
from fewstep.core.run_settings import read_settings
from fewstep.core.student import Student
from fewstep.embedded.digits.reference import digits_judge, evaluation_prompts
from fewstep.evaluation.evaluate import judge_pixels
from fewstep.evaluation.judge import Judge
from fewstep.evaluation.results import EvaluationResult
from fewstep.evaluation.systems import System

RECORD_FILE = "sampled_here.json"
BATCH = 125
CLASSIFIER = Path("assets/digits_image/classifier")


@torch.no_grad()
def sample_run(run: Path, prompts: Sequence[str], *, steps: int, seed: int) -> Tensor:
    """Pixels [N, 3, H, W] in [0, 1] of a run's averaged student, one for each prompt.

    Raises:
        ValueError: the student re-noises between its steps, so its samples are not those of its noise alone.
    """
    settings = read_settings(run)
    if settings.sampler == "sde":
        raise ValueError(f"{run} has a student that re-noises ('sde'); export it and use scripts/evaluate_image.py")
    loaded = load_run_student(run, settings)
    student = Student(loaded.student.denoiser, step_grid(steps, shift=settings.shift), settings.sampler)
    unique = list(dict.fromkeys(prompts))
    condition = loaded.teacher.encode(unique)
    place = {prompt: row for row, prompt in enumerate(unique)}
    shape, pixels = loaded.teacher.latent_shape(settings.height, settings.width), []
    for start in range(0, len(prompts), BATCH):
        numbers = range(start, min(start + BATCH, len(prompts)))
        rows = torch.tensor([place[prompts[number]] for number in numbers])
        noise = sample_noise(seed, numbers, shape, stream="latents")
        pixels.append(loaded.teacher.decode(student.sample(noise, condition.index(rows))))
    return torch.cat(pixels)


def judge_run(
    run: Path, steps: Sequence[int], *, name: str, samples: int, seed: int, judge: Judge
) -> list[EvaluationResult]:
    """The figures of a run at each number of steps."""
    prompts = evaluation_prompts(samples)
    results = []
    for count in steps:
        pixels = sample_run(run, prompts, steps=count, seed=seed)
        system = System(name, str(run), count, 1.0)
        results.append(judge_pixels(judge, pixels, prompts=prompts, system=system, seed=seed))
    return results


def _figures(result: EvaluationResult) -> dict[str, object]:
    return {key: asdict(figure) for key, figure in result.figures.items()}


def write_results(
    runs: Sequence[Path], steps: Sequence[int], *, name: str, samples: int, output: Path, reference: str = "test"
) -> Path:
    """Judge runs of one recipe and write `sampled_here.json` into the report's folder; returns its path."""
    judge = digits_judge(reference, classifier=CLASSIFIER)
    found = {}
    for run in runs:
        results = judge_run(run, steps, name=name, samples=samples, seed=0, judge=judge)
        found[run.name] = [
            {"steps": one.steps, "seed": one.seed, "samples": one.samples, "figures": _figures(one)} for one in results
        ]
    output.mkdir(parents=True, exist_ok=True)
    file = output / RECORD_FILE
    file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return file
