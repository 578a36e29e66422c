"""Flow maps of streams (tf_meanflow, tf_anyflow) beside discrete consistency and their causal teacher, by steps.

    python scripts/studies/flow_maps.py --output assets/benchmarks/digits_flow_maps

All students of a seed start from one causal teacher (its teacher_forcing run) and train for equal network calls at a
constant rate. Each is then asked for 1, 2, 4 and 8 steps a chunk, and the causal teacher for as many guided Euler steps
on the same grid, which cost two calls each:

    distance   of a chunk to the end of the causal teacher's ODE of 48 steps from the same noise, on real context of
               clips that nobody is trained on: mean square over the variance of these ends. A student that noises its
               prediction afresh ends elsewhere by design, and is measured with one step alone.
    streams    digits that are right, and Frechet distances of frames and of clips to real ones.

One update counts six calls in tf_dcm (two of the guided teacher, one of the target, forward and backward as three); in
the flow maps two, three for forward mode or two for a central difference on the half of the samples that have one, and
three. Runs that are there are not trained again.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import matplotlib.pyplot as plt
import torch
from studies.causal import (
    BATCH,
    JUDGES,
    SEED,
    StudyStudent,
    latest_step,
    load_student,
    real_reference,
    run_directory,
    sample_student,
    study_prompts,
    teacher_shape,
    train_chain,
)
from studies.dmd import LAUNCH, show_and_run
from studies.forcing_curves import GUIDANCE, Ends, ends_of, mask_of, paired
from torch import Tensor

from fewstep.causal_video.denoise import ChunkNoise, VideoCondition
from fewstep.causal_video.schedule import StepSchedule
from fewstep.causal_video.settings import CausalSettings
from fewstep.causal_video.stages.batch import CausalTeacher, PackedNetwork
from fewstep.causal_video.stages.sampling import euler_rollout
from fewstep.core.grids import step_grid
from fewstep.embedded.moving_digits.judges import VideoJudges, load_judges
from fewstep.embedded.moving_digits.measures import VideoReference, measure_clips
from fewstep.evaluation.provenance import collect_provenance

# Network calls of an update, see above.
COSTS = {"tf_dcm": 6.0, "tf_meanflow": 6.5, "tf_anyflow": 6.0}
TEACHER = "causal teacher, guided Euler"
STEPS = (1, 2, 4, 8)
SHIFT = 5.0
MEASURES = ("digit_accuracy", "direction_accuracy", "frame_distance", "clip_distance")
Step = Callable[[Tensor, Tensor, Tensor], Tensor]


def train(folder: Path, stage: str, seed: int, *, calls: int) -> Path:
    """Train one student for a number of calls; a finished one is kept."""
    run, steps = folder / f"{stage}_seed{seed}", int(calls / COSTS[stage])
    if latest_step(run) < steps:
        where = ("--run.directory", str(run), "--run.seed", str(seed), "--run.steps", str(steps))
        start = ("--student.init", str(run_directory(folder, "dcm", "teacher_forcing", seed)))
        resume = ("--resume", "latest") if latest_step(run) > 0 else ()
        config = ("--config", f"configs/digits_video/{stage}.yaml", *where, *start)
        show_and_run(*LAUNCH, "scripts/train_causal_video.py", *config, "--student.optimizer.decay", "none", *resume)
    return run


def distance_of(step: Step, ends: Ends, steps: int) -> float:
    """Mean square distance of `steps` steps (x, t, r) -> x_r from noise to the ODE's end, over the variance of ends."""
    x, end = ends.pairs[1.0]
    for t, r in pairwise((*step_grid(steps, shift=SHIFT), 0.0)):
        x = step(x, torch.full((len(x),), t), torch.full((len(x),), r))
    return float((x - end).square().mean() / end.var())


@torch.no_grad()
def distances(student: StudyStudent, ends: Ends, *, is_teacher: bool) -> dict[int, float]:
    """Distance by number of steps, on the context of the clips."""
    batch, mask = ends.batch, mask_of(student.network, student.settings, ends.batch.x0)
    packed = PackedNetwork(student.network, batch, mask)
    teacher = CausalTeacher(student.network, student.teacher.null_condition, GUIDANCE)

    def step(x: Tensor, t: Tensor, r: Tensor) -> Tensor:
        if is_teacher:
            velocity = teacher.velocity(x, t, batch, mask)
        else:
            end = r if student.network.has_two_times else None
            velocity = packed(x, t, batch.condition, end)
        return x - (t - r).view(-1, 1, 1, 1, 1) * velocity

    counts = STEPS if is_teacher or student.network.has_two_times else (1,)
    return {count: distance_of(step, ends, count) for count in counts}


@torch.no_grad()
def stream(student: StudyStudent, prompts: list[str], steps: int, *, is_teacher: bool) -> Tensor:
    """Pixels [N, 3, T, H, W] of streams with so many steps in each chunk."""
    chunks, policy = student.settings.layout.chunks, student.settings.policy
    if not is_teacher:
        schedule = StepSchedule.steps((steps,), shift=SHIFT)
        return sample_student(student, prompts, schedule=schedule, sink=policy.sink, chunks=chunks)
    channels, _, height, width = teacher_shape(student.teacher)
    pixels = []
    for start in range(0, len(prompts), BATCH):
        numbers = range(start, min(start + BATCH, len(prompts)))
        text = student.teacher.encode([prompts[number] for number in numbers]).text
        latents = euler_rollout(
            student.network,
            VideoCondition(text),
            ChunkNoise(SEED, tuple(numbers), (channels, height, width), stream="study"),
            CausalSettings(student.settings.layout, policy),
            times=step_grid(steps, shift=SHIFT),
            guidance=GUIDANCE,
            null_text=student.teacher.null_condition.tokens,
        )
        pixels.append(student.teacher.decode(latents))
    return torch.cat(pixels)


def judged(
    student: StudyStudent, prompts: list[str], judges: VideoJudges, reference: VideoReference, *, is_teacher: bool
) -> dict[int, dict[str, float]]:
    """Measures of streams by number of steps."""
    found = {}
    for count in STEPS:
        pixels = stream(student, prompts, count, is_teacher=is_teacher)
        result = measure_clips(judges, pixels, prompts=prompts, reference=reference)
        found[count] = {name: getattr(result, name) for name in MEASURES}
    return found


def summary_of(rows: list[dict[str, Any]], samples: int) -> list[dict[str, Any]]:
    """Medians over seeds for each system and number of steps, and differences to tf_dcm by seed where both have one."""
    systems = list(dict.fromkeys(row["system"] for row in rows))
    of = {(row["system"], row["seed"], row["steps"]): row for row in rows}
    seeds, found = sorted({row["seed"] for row in rows}), []
    for system in systems:
        for steps in STEPS:
            mine = [of[system, seed, steps] for seed in seeds]
            line: dict[str, Any] = {"system": system, "steps": steps, "calls": mine[0]["calls"]}
            for name in ("distance", *MEASURES):
                values, least = [row[name] for row in mine], 1 / samples if name.endswith("accuracy") else 0.0
                if None in values:
                    continue
                line[name] = {"median": median(values), "least": min(values), "most": max(values)}
                theirs = [of["tf_dcm", seed, steps][name] for seed in seeds]
                if system != "tf_dcm" and None not in theirs:
                    difference = paired([a - b for a, b in zip(values, theirs, strict=True)], resolution=least)
                    line[name]["minus_tf_dcm"] = {**asdict(difference), "decided": difference.decided}
            found.append(line)
    return found


def rows_of_seed(folder: Path, seed: int, *, calls: int, clips: int, samples: int) -> list[dict[str, Any]]:
    """Train what is missing of a seed, and measure all of it."""
    train_chain(folder, "dcm", seed=seed, until="teacher_forcing")
    teacher = run_directory(folder, "dcm", "teacher_forcing", seed)
    runs = {TEACHER: teacher, **{stage: train(folder, stage, seed, calls=calls) for stage in COSTS}}
    judges, prompts, rows = load_judges(JUDGES), study_prompts(samples), []
    ends, reference = ends_of(teacher, "test", clips), real_reference(judges, "test", 1000)
    for name, run in runs.items():
        student, is_teacher = load_student(run), name == TEACHER
        near = distances(student, ends, is_teacher=is_teacher)
        measures = judged(student, prompts, judges, reference, is_teacher=is_teacher)
        for count in STEPS:
            made = {"system": name, "seed": seed, "steps": count, "calls": count * (2 if is_teacher else 1)}
            rows.append({**made, "distance": near.get(count), **measures[count]})
            print(rows[-1], flush=True)
    return rows


def main() -> None:
    """Train what is missing, measure all, and write the record and the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", default="runs/flow_maps", help="folder of the training runs")
    parser.add_argument("--calls", type=int, default=960, help="network calls of each student")
    parser.add_argument("--clips", type=int, default=32, help="on which distances are measured")
    parser.add_argument("--samples", type=int, default=80, help="streams of each row")
    parser.add_argument("--output", required=True, help="folder of the records")
    options = parser.parse_args()
    torch.set_num_threads(1)
    output, rows = Path(options.output), []
    output.mkdir(parents=True, exist_ok=True)
    for seed in options.seeds:
        how = {"calls": options.calls, "clips": options.clips, "samples": options.samples}
        rows += rows_of_seed(Path(options.runs), seed, **how)
    record = {
        "provenance": asdict(collect_provenance(sys.argv[0], arguments=sys.argv[1:])),
        "settings": {"calls": options.calls, "costs": COSTS, "clips": options.clips, "samples": options.samples},
        "summary": summary_of(rows, options.samples),
        "rows": rows,
    }
    (output / "flow_maps.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    draw(record["summary"], output / "flow_maps.png")


def draw(summary: list[dict[str, Any]], path: Path) -> None:
    """Distance to the ODE's end and two measures of streams over the steps of a chunk, a line a system."""
    figure, panels = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    for panel, name in zip(panels, ("distance", "digit_accuracy", "frame_distance"), strict=True):
        for number, system in enumerate(dict.fromkeys(line["system"] for line in summary)):
            mine = [line for line in summary if line["system"] == system and name in line]
            medians = [line[name]["median"] for line in mine]
            reach = [
                [line[name]["median"] - line[name]["least"] for line in mine],
                [line[name]["most"] - line[name]["median"] for line in mine],
            ]
            steps = [line["steps"] for line in mine]
            panel.errorbar(steps, medians, yerr=reach, marker="o", capsize=3, label=system, color=f"C{number}")
        panel.set(title=name.replace("_", " "), xlabel="steps of a chunk", xscale="log")
        panel.set_xticks(STEPS, [str(count) for count in STEPS])
        panel.grid(visible=True, alpha=0.3)
    panels[0].set_yscale("log")
    panels[2].set_yscale("log")
    panels[1].legend(fontsize=7)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
