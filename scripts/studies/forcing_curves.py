"""Curves over training: discrete (tf_dcm) against continuous-time (tf_scm) consistency on clean context.

    python scripts/studies/forcing_curves.py --output assets/benchmarks/digits_forcing_curves

Each student starts from the same causal teacher (the teacher_forcing run of its seed), trains at a constant rate, and
is measured at every checkpoint by how far its one call from each time is from the end of the causal teacher's ODE: mean
square distance over the variance of these ends, on clips that no student is trained on. One update of tf_dcm counts six
calls (two of the guided teacher, one of the target, forward and backward as three), one of tf_scm eight (two, forward
mode as three, and three), with the discrete tangent six. Runs that are there are not trained again.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import matplotlib.pyplot as plt
import torch
from scipy import stats
from studies.causal import latest_step, load_student, run_directory, train_chain
from studies.dmd import LAUNCH, show_and_run
from torch import Tensor

from fewstep.causal_video.model import masks
from fewstep.causal_video.model.network import CausalWan
from fewstep.causal_video.settings import CausalSettings
from fewstep.causal_video.stages.batch import CausalTeacher, PackedNetwork, VideoBatch
from fewstep.core.paths import add_noise, x0_from_velocity
from fewstep.core.randomness import sample_noise
from fewstep.core.teacher import Teacher
from fewstep.embedded.moving_digits.clips import moving_digits
from fewstep.evaluation.measures.resampling import Difference
from fewstep.evaluation.provenance import collect_provenance

RAW, SMOOTH = ("--tf_scm.time_smoothing", "0", "--tf_scm.check_tangent", "false"), ("--tf_scm.time_smoothing", "0.01")
# The causal teacher was hardly trained at t = 1, where its loss has no weight: the control trains there all the same.
BELOW, AT_NOISE = ("--tf_scm.max_time_share", "0"), ("--tf_scm.max_time_share", "0.1")
WHOLE = ("--tf_scm.tangent_warmup", "0")
DISCRETE = (*AT_NOISE, "--tf_scm.tangent", "discrete", "--tf_scm.central_step", "0.05")
# Name of a variant: its stage, the network calls of an update, and its settings beside those of the configuration.
VARIANTS: dict[str, tuple[Literal["tf_dcm", "tf_scm"], int, tuple[str, ...]]] = {
    "tf_dcm": ("tf_dcm", 6, ()),
    "tf_scm_raw": ("tf_scm", 8, (*RAW, *BELOW, *WHOLE)),
    "tf_scm_smooth": ("tf_scm", 8, (*SMOOTH, *BELOW, *WHOLE)),
    "tf_scm_smooth_noise": ("tf_scm", 8, (*SMOOTH, *AT_NOISE, *WHOLE)),
    "tf_scm_discrete": ("tf_scm", 6, (*DISCRETE, *WHOLE, "--tf_scm.time_smoothing", "0")),
}
CONSTANT = ("--student.optimizer.decay", "none")
TIMES = (1.0, 0.95, 0.8, 0.5)
# Steps of the teacher's ODE from t = 1; from a smaller time its share of them.
ODE_STEPS, GUIDANCE = 48, 2.0


@dataclass(frozen=True, eq=False)
class Ends:
    """Clips noised to each time, and where the causal teacher's ODE takes them: both [B, C, F, h, w], a pair a time."""

    batch: VideoBatch
    pairs: dict[float, tuple[Tensor, Tensor]]


def clips_of(teacher: Teacher, split: Literal["train", "test"], count: int) -> tuple[Tensor, list[str]]:
    """Latents [B, C, F, h, w] of real clips, and their captions."""
    clips = moving_digits(split, seed=7, indices=range(count))
    return teacher.encode_pixels(clips.pixels), list(clips.captions)


@torch.no_grad()
def ends_of(run: Path, split: Literal["train", "test"], count: int) -> Ends:
    """The ends of the causal teacher that a run trained."""
    found = load_student(run)
    x0, captions = clips_of(found.teacher, split, count)
    eps = sample_noise(0, range(count), tuple(x0.shape[1:]), stream=f"curves_{split}")
    condition = found.teacher.encode(captions)
    batch = VideoBatch(x0, eps, condition, x0, None, None, 0)
    mask = mask_of(found.network, found.settings, x0)
    causal = CausalTeacher(found.network, found.teacher.null_condition, GUIDANCE)
    pairs = {}
    for time in TIMES:
        start = x = add_noise(x0, eps, torch.full((count,), time))
        grid = torch.linspace(time, 0.0, max(8, round(ODE_STEPS * time)) + 1).tolist()
        for t, t_next in pairwise(grid):
            x = x + (t_next - t) * causal.velocity(x, torch.full((count,), t), batch, mask)
        pairs[time] = start, x
    return Ends(batch, pairs)


def mask_of(network: CausalWan, settings: CausalSettings, x0: Tensor) -> Any:
    """The packed mask of teacher forcing."""
    return masks.teacher_forcing(settings.layout, network.tokens_per_frame(x0), settings.policy, device=x0.device)


@torch.no_grad()
def distances(checkpoint: Path, run: Path, ends: Ends) -> dict[str, float]:
    """Relative distance of one call from each time, of the averaged weights of a checkpoint."""
    found = load_student(run, checkpoint)
    batch = ends.batch
    packed = PackedNetwork(found.network, batch, mask_of(found.network, found.settings, batch.x0))
    row = {}
    for time, (start, end) in ends.pairs.items():
        t = torch.full((len(start),), time)
        x0 = x0_from_velocity(start, packed(start, t, batch.condition), t)
        row[f"{time:g}"] = ((x0 - end).square().mean() / end.var()).item()
    return row


def train(folder: Path, variant: str, seed: int, *, calls: int, every: int) -> Path:
    """Train one student for a number of calls, with a checkpoint each `every` calls; a finished one is kept."""
    stage, cost, settings = VARIANTS[variant]
    run, steps = folder / f"{variant}_seed{seed}", calls // cost
    if latest_step(run) < steps:
        where = ("--run.directory", str(run), "--run.seed", str(seed), "--run.steps", str(steps))
        kept = ("--run.checkpoint_every", str(every // cost), "--run.keep_checkpoints", str(calls // every))
        start = ("--student.init", str(run_directory(folder, "dcm", "teacher_forcing", seed)))
        resume = ("--resume", "latest") if latest_step(run) > 0 else ()
        config = ("--config", f"configs/digits_video/{stage}.yaml", *where, *kept, *start, *CONSTANT)
        show_and_run(*LAUNCH, "scripts/train_causal_video.py", *config, *settings, *resume)
    return run


def curve_of(run: Path, cost: int, ends: Ends) -> list[dict[str, Any]]:
    """Distances at every checkpoint of a run, the start of training (the causal teacher itself) first."""
    found = {int(path.name.rpartition("-")[2]): path for path in run.glob("checkpoint-*")}
    return [{"step": step, "calls": step * cost, **distances(found[step], run, ends)} for step in sorted(found)]


def calls_to_reach(curve: Sequence[dict[str, Any]], time: str, goal: float) -> float | None:
    """Calls after which a curve stays at or below a distance, between checkpoints on a line; None where it does not."""
    below = [point[time] <= goal for point in curve]
    if not below[-1]:
        return None
    first = len(below) - (below[::-1].index(False) if False in below else len(below))
    if first == 0:
        return float(curve[0]["calls"])
    before, after = curve[first - 1], curve[first]
    share = (before[time] - goal) / (before[time] - after[time])
    return before["calls"] + share * (after["calls"] - before["calls"])


def paired(values: Sequence[float], *, resolution: float = 0.0) -> Difference:
    """Mean of differences over seeds with the 95 % interval of Student's t: both students of a seed have one teacher.

    The clips are the same in all, and their choice is no part of the interval. The deviation is not taken below
    `resolution`, what one clip more or less makes of a share: equal differences of few seeds are no certainty.
    """
    mean, half = statistics.mean(values), math.inf
    if len(values) > 1:
        half = (
            float(stats.t.ppf(0.975, len(values) - 1))
            * max(statistics.stdev(values), resolution)
            / math.sqrt(len(values))
        )
    return Difference(mean, mean - half, mean + half)


def summary_of(curves: dict[str, dict[int, list[dict[str, Any]]]]) -> list[dict[str, Any]]:
    """For each variant and time: the last distance, the difference to tf_dcm by seed, and calls to reach its last."""
    rows = []
    for variant, of_seed in curves.items():
        for time in (f"{value:g}" for value in TIMES):
            last = {seed: curve[-1][time] for seed, curve in of_seed.items()}
            row: dict[str, Any] = {"variant": variant, "time": time, "last": statistics.median(last.values())}
            if variant != "tf_dcm" and "tf_dcm" in curves:
                goal = {seed: curves["tf_dcm"][seed][-1] for seed in of_seed}
                difference = paired([last[seed] - goal[seed][time] for seed in of_seed])
                row["minus_tf_dcm"] = {**asdict(difference), "decided": difference.decided}
                reach = [calls_to_reach(curve, time, goal[seed][time]) for seed, curve in of_seed.items()]
                row["calls_to_tf_dcm"], row["calls_of_tf_dcm"] = reach, next(iter(goal.values()))["calls"]
            rows.append(row)
    return rows


def main() -> None:
    """Train what is missing, measure all, and write curves and plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--runs", default="runs/forcing_curves", help="folder of the training runs")
    parser.add_argument("--calls", type=int, default=960, help="network calls of each student")
    parser.add_argument("--every", type=int, default=120, help="calls between checkpoints")
    parser.add_argument("--clips", type=int, default=32, help="on which distances are measured")
    parser.add_argument(
        "--split", default="test", choices=["train", "test"], help="of the clips; choices look at train"
    )
    parser.add_argument("--output", help="folder of the records; without it nothing is measured")
    options = parser.parse_args()
    folder = Path(options.runs)
    curves: dict[str, dict[int, list[dict[str, Any]]]] = {name: {} for name in options.variants}
    for seed in options.seeds:
        train_chain(folder, "dcm", seed=seed, until="teacher_forcing")
        runs = {name: train(folder, name, seed, calls=options.calls, every=options.every) for name in options.variants}
        if options.output is not None:
            teacher = run_directory(folder, "dcm", "teacher_forcing", seed)
            ends = ends_of(teacher, options.split, options.clips)
            begin = {"step": 0, "calls": 0, **distances(teacher, teacher, ends)}
            for name, run in runs.items():
                curves[name][seed] = [begin, *curve_of(run, VARIANTS[name][1], ends)]
    if options.output is None:
        return
    output = Path(options.output)
    output.mkdir(parents=True, exist_ok=True)
    record = {
        "provenance": asdict(collect_provenance(sys.argv[0], arguments=sys.argv[1:])),
        "settings": {"calls": options.calls, "clips": options.clips, "split": options.split, "guidance": GUIDANCE},
        "summary": summary_of(curves),
        "curves": curves,
    }
    (output / "curves.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    draw(curves, output / "curves.png")


def draw(curves: dict[str, dict[int, list[dict[str, Any]]]], path: Path) -> None:
    """One panel a time: distance over calls, a line a seed."""
    figure, panels = plt.subplots(1, len(TIMES), figsize=(4 * len(TIMES), 3.6), layout="constrained")
    for panel, time in zip(panels, (f"{value:g}" for value in TIMES), strict=True):
        for number, (variant, of_seed) in enumerate(curves.items()):
            for place, curve in enumerate(of_seed.values()):
                panel.plot(
                    [point["calls"] for point in curve],
                    [point[time] for point in curve],
                    color=f"C{number}",
                    label=variant if place == 0 else None,
                )
        panel.set(title=f"t = {time}", xlabel="network calls", yscale="log")
        panel.grid(visible=True, which="both", alpha=0.3)
    panels[0].set_ylabel("distance to the ODE's end")
    panels[0].legend()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
