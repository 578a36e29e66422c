"""The study of the reward methods on the embedded digits: what each pays in quality for its reward.

All methods start from the same distilled student and are judged along the run: the trained reward, a held-out judge,
FID and diversity of the averaged student. FID's features are those of the classifier that is also the reward, so the
held-out judge is the one to read first. Shapes: pixels [N, 3, 32, 32] in [0, 1].
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median

import torch
from studies.dmd import LAUNCH, run_directory, show_and_run
from torch import Tensor

from fewstep.core.config import load_config, save_resolved
from fewstep.core.export.run import load_run_student
from fewstep.core.randomness import sample_noise
from fewstep.core.run_settings import read_settings
from fewstep.core.training.checkpoint import list_checkpoints
from fewstep.dmd.reward.config import RewardRunConfig, ScorerConfig
from fewstep.dmd.reward.scorers import ScorerChoice, make_scorer
from fewstep.dmd.reward.sections import DirectConfig
from fewstep.embedded.digits.reference import digits_judge, evaluation_prompts
from fewstep.evaluation.curves import Curve
from fewstep.evaluation.evaluate import judge_pixels
from fewstep.evaluation.figures import curves_figure, trade_off_figure
from fewstep.evaluation.judge import Judge
from fewstep.evaluation.scorers.scorer import Scorer
from fewstep.evaluation.scorers.total import score_all
from fewstep.evaluation.systems import System

METHODS = ("redmd", "gndm", "nft", "crd", "flow_grpo", "euphonium", "flash", "rtdmd")
# A reward that a student can please without drawing the digit: ink, with next to nothing that holds it.
HACKING = "hacking"
BASE_STEPS, BATCH = 2, 100
ASSETS = Path("assets/digits_image")
SCORERS = (
    ScorerChoice("digit_log_probability", str(ASSETS / "classifier")),
    ScorerChoice("held_out_log_probability", str(ASSETS / "held_out_classifier")),
    ScorerChoice("stroke_weight"),
)
MEASURES = ("digit_log_probability", "held_out_log_probability", "stroke_weight", "fid", "accuracy", "diversity")


@dataclass(frozen=True)
class StudyPoint:
    """One checkpoint of one run; `scores` are those of `MEASURES`, in that order. Step 0 is the distilled student."""

    method: str
    seed: int
    step: int
    scores: tuple[float, ...]


def reward_run(folder: Path, method: str, seed: int) -> Path:
    """Where a run of the study is."""
    return folder / f"digits_{method}_seed{seed}"


def study_config(method: str, *, base: Path, run: Path, seed: int) -> RewardRunConfig:
    """The configuration in configs/digits with its start, folder and seed; the hacking run is rtdmd for ink."""
    name = "rtdmd" if method == HACKING else method
    path = f"configs/digits/{name}.yaml"
    config, _ = load_config(RewardRunConfig, ["--config", path], prog="benchmark_reward.py", description="")
    config = replace(
        config,
        run=replace(config.run, directory=str(run), seed=seed),
        student=replace(config.student, init=str(base)),
    )
    if method != HACKING:
        return config
    judge = ScorerConfig(name="held_out_log_probability", weights=str(ASSETS / "held_out_classifier"))
    assert config.rtdmd is not None
    assert config.matching is not None
    return replace(
        config,
        reward=replace(config.reward, scorers=(ScorerConfig(name="stroke_weight", std=0.05),), held_out=(judge,)),
        matching=replace(config.matching, weight=0.01, cold_start_steps=0),
        rtdmd=replace(config.rtdmd, direct=DirectConfig(weight=1.0, margin=100.0)),
    )


def train(folder: Path, base_folder: Path, method: str, *, seed: int) -> None:
    """Train one run; one that is complete is kept, one that was interrupted goes on.

    Raises ValueError when the distilled student of that seed is missing.
    """
    base, run = run_directory(base_folder, BASE_STEPS, seed), reward_run(folder, method, seed)
    if not (base / "config.yaml").is_file():
        raise ValueError(
            f"{base} is no run of a distilled student; train it with scripts/train_dmd.py --config "
            f"configs/digits/dmd_{BASE_STEPS}step.yaml --run.seed {seed} --run.directory {base}"
        )
    config = study_config(method, base=base, run=run, seed=seed)
    if (run / f"checkpoint-{config.run.steps}").is_dir():
        print(f"{run} is complete", flush=True)
        return
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"digits_{method}_seed{seed}.yaml"
    save_resolved(file, config)
    resume = ("--resume", "latest") if list_checkpoints(run) else ()
    show_and_run(*LAUNCH, "scripts/train_reward.py", "--config", str(file), *resume)


@torch.no_grad()
def draw(run: Path, checkpoint: str, prompts: Sequence[str]) -> Tensor:
    """Pixels of the averaged student of a checkpoint, from noise that is the same for every run."""
    settings = read_settings(run)
    loaded = load_run_student(run, settings, checkpoint=checkpoint)
    unique = list(dict.fromkeys(prompts))
    place = {prompt: row for row, prompt in enumerate(unique)}
    condition = loaded.teacher.encode(unique)
    shape, pixels = loaded.teacher.latent_shape(settings.height, settings.width), []
    for start in range(0, len(prompts), BATCH):
        numbers = range(start, min(start + BATCH, len(prompts)))
        rows = torch.tensor([place[prompts[number]] for number in numbers])
        streams = ["latents", *(f"renoise_{step}" for step in range(len(loaded.student.times) - 1))]
        noise, *renoise = (sample_noise(0, numbers, shape, stream=stream) for stream in streams)
        pixels.append(loaded.teacher.decode(loaded.student.sample(noise, condition.index(rows), renoise)))
    return torch.cat(pixels)


def judged(run: Path, checkpoint: str, *, judge: Judge, scorers: Sequence[Scorer], samples: int) -> tuple[float, ...]:
    """The measures of one checkpoint, in the order of `MEASURES`."""
    prompts = evaluation_prompts(samples)
    pixels = draw(run, checkpoint, prompts)
    means = score_all(scorers, pixels, prompts, chunk=BATCH).means()
    system = System(run.name, str(run), BASE_STEPS, 1.0)
    result = judge_pixels(judge, pixels, prompts=prompts, system=system, seed=0)
    return (*means.values(), *(result.value(key) for key in ("fid", "accuracy", "diversity")))


def evaluate(
    folder: Path,
    base_folder: Path,
    methods: Sequence[str],
    seeds: Sequence[int],
    *,
    samples: int,
    reference: str = "test",
) -> list[StudyPoint]:
    """Judge every checkpoint of every run; points that are in `points.json` of the folder are not judged again.

    Raises ValueError for points that were judged with other samples or another reference.
    """
    file, header = folder / f"points_{reference}_{samples}.json", ("method", "seed", "step")
    known = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []
    points = [StudyPoint(**{**point, "scores": tuple(point["scores"])}) for point in known]
    done = {tuple(getattr(point, name) for name in header) for point in points}
    judge = digits_judge(reference, classifier=ASSETS / "classifier")
    scorers = [make_scorer(choice) for choice in SCORERS]
    places = [("start", seed, run_directory(base_folder, BASE_STEPS, seed), "latest", 0) for seed in seeds]
    for method in methods:
        for seed in seeds:
            run = reward_run(folder, method, seed)
            found = [(int(path.name.rpartition("-")[2]), path.name) for path in list_checkpoints(run)]
            places += [(method, seed, run, name, step) for step, name in found]
    for method, seed, run, name, step in places:
        if (method, seed, step) in done:
            continue
        scores = judged(run, name, judge=judge, scorers=scorers, samples=samples)
        points.append(StudyPoint(method, seed, step, scores))
        print(method, seed, step, *(f"{value:.4g}" for value in scores), flush=True)
        file.write_text(json.dumps([asdict(point) for point in points], indent=1) + "\n", encoding="utf-8")
    return points


def write_report(points: Sequence[StudyPoint], output: Path, *, provenance: dict[str, object]) -> None:
    """`points.json`, `table.md` (the last checkpoint of each method beside the start) and three figures.

    `frontier.png` has the reward and the held-out judge over FID for the methods, `curves.png` all measures over steps,
    `hacking.png` those of the run that is made to be hacked, if there is one.
    """
    output.mkdir(parents=True, exist_ok=True)
    record = {"measures": MEASURES, "points": [asdict(point) for point in points], "provenance": provenance}
    (output / "points.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    (output / "table.md").write_text(table(points), encoding="utf-8")
    curves = study_curves(points)
    methods = [curve for curve in curves if curve.run != HACKING]
    hacked = [curve for curve in curves if curve.run == HACKING]
    if methods:
        (output / "frontier.png").write_bytes(trade_off_figure(methods, x="fid", panels=MEASURES[:2]))
        (output / "curves.png").write_bytes(curves_figure(methods, metrics=MEASURES))
    if hacked:
        (output / "hacking.png").write_bytes(curves_figure(hacked, metrics=MEASURES))


def table(points: Sequence[StudyPoint]) -> str:
    """Median [smallest, largest] over seeds of the last checkpoint of each method, as a Markdown table."""
    names = ("log p", "held-out log p", "ink", "FID", "accuracy %", "diversity")
    lines = ["| method | step | " + " | ".join(names) + " |", "|" + "---|" * (len(names) + 2)]
    for method in dict.fromkeys(point.method for point in points):
        own = [point for point in points if point.method == method]
        last = max(point.step for point in own)
        cells = []
        for place, name in enumerate(names):
            factor = 100.0 if name == "accuracy %" else 1.0
            values = sorted(factor * point.scores[place] for point in own if point.step == last)
            cells.append(f"{median(values):.3g} [{values[0]:.3g}, {values[-1]:.3g}]")
        lines.append(f"| {method} | {last} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def study_curves(points: Sequence[StudyPoint]) -> list[Curve]:
    """The median over seeds of each measure along each method, from the start on."""
    start = [point for point in points if point.step == 0]
    curves = []
    for method in dict.fromkeys(point.method for point in points if point.step > 0):
        own = [*start, *(point for point in points if point.method == method)]
        steps = tuple(sorted({point.step for point in own}))
        for place, measure in enumerate(MEASURES):
            values = tuple(median(point.scores[place] for point in own if point.step == step) for step in steps)
            curves.append(Curve(method, measure, steps, values))
    return curves
