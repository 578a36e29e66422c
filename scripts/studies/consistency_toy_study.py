"""The toy over teachers and seeds: a record, a table, and a picture of what the students learnt.

The recipes of `consistency_toy.py` were chosen on other teachers (those of its tests) than the ones that are reported
here.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from studies.consistency_toy import (
    CONSISTENCY,
    OBJECTIVES,
    ToyErrors,
    ToyNetwork,
    ToyObjective,
    ToySettings,
    toy_errors,
    train_toy,
)
from studies.toy_mixture import Mixture
from torch import Tensor

from fewstep.evaluation.figures import INK, PALETTE, png_bytes, style_axes
from fewstep.evaluation.provenance import Provenance

TEACHERS = {
    "gaussian": Mixture((1.0,), (-0.4,), (0.9,)),
    "mixture": Mixture((0.35, 0.65), (-1.4, 0.7), (0.45, 0.3)),
}
# In the picture: where trajectories start at t = 1, and the times at which they are drawn.
STARTS, TIMES = torch.linspace(-2, 2, 11, dtype=torch.float64), torch.linspace(0, 1, 41, dtype=torch.float64)


@dataclass(frozen=True)
class ToyRow:
    """One training; errors are those of `toy_errors`."""

    teacher: str
    objective: ToyObjective
    seed: int
    errors: ToyErrors
    seconds: float


@dataclass(frozen=True)
class Trajectories:
    """Over `TIMES` (rows) and `STARTS` (columns): the teacher's paths, and what the student makes of them.

    A consistency student is asked at each point of a path for its end, which should be the same all along. A flow map
    is asked from the start at t = 1 for each point, which should be the path.
    """

    path: Tensor
    learnt: Tensor


@torch.no_grad()
def trajectories(network: ToyNetwork, teacher: Mixture, *, consistency: bool) -> Trajectories:
    """The teacher's paths and the student's answers, both [times, starts] in fp64."""
    t, start = torch.meshgrid(TIMES, STARTS, indexing="ij")
    one, zero = torch.ones_like(t), torch.zeros_like(t)
    path = teacher.flow_map(start.flatten(), one.flatten(), t.flatten()).view_as(t)
    state, now, end = (path, t, zero) if consistency else (start, one, t)
    velocity = network(*(part.flatten().float() for part in (state, now, end))).double().view_as(t)
    return Trajectories(path, state - (now - end) * velocity)


def run_study(
    seeds: Sequence[int], settings: ToySettings, objectives: Sequence[ToyObjective] = OBJECTIVES
) -> tuple[list[ToyRow], dict[ToyObjective, Trajectories]]:
    """Train every objective on every teacher with every seed; trajectories are of the mixture and the first seed."""
    rows, drawn = [], {}
    for name, teacher in TEACHERS.items():
        for objective in objectives:
            for seed in seeds:
                started = time.perf_counter()
                own = ToySettings(**{**asdict(settings), "objective": objective, "seed": seed})
                network = train_toy(teacher, own)
                consistency = objective in CONSISTENCY
                errors = toy_errors(network, teacher, consistency=consistency)
                rows.append(ToyRow(name, objective, seed, errors, time.perf_counter() - started))
                print(
                    f"{name} {objective} seed {seed}: mean {errors.mean:.4f}, largest {errors.largest:.4f}", flush=True
                )
                if name == "mixture" and seed == seeds[0]:
                    drawn[objective] = trajectories(network, teacher, consistency=consistency)
    return rows, drawn


def table(rows: Sequence[ToyRow]) -> str:
    """Markdown: median [smallest, largest] over seeds, one line per teacher and objective."""
    lines = ["| teacher | objective | mean error | largest error | seconds |", "|---|---|---|---|---:|"]
    for teacher, objective in dict.fromkeys((row.teacher, row.objective) for row in rows):
        own = [row for row in rows if (row.teacher, row.objective) == (teacher, objective)]
        means, largest = ([getattr(row.errors, part) for row in own] for part in ("mean", "largest"))
        seconds = statistics.median(row.seconds for row in own)
        lines.append(f"| {teacher} | `{objective}` | {_spread(means)} | {_spread(largest)} | {seconds:.0f} |")
    return "\n".join(lines) + "\n"


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.4f} [{min(values):.4f}, {max(values):.4f}]"


def trajectories_figure(drawn: dict[ToyObjective, Trajectories]) -> bytes:
    """A panel per objective: the teacher's paths in grey, what the student says of them in colour."""
    columns = min(3, len(drawn))
    lines = -(-len(drawn) // columns)
    figure = Figure(figsize=(3.2 * columns, 2.4 * lines), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True).flatten()
    for axes, (objective, found) in zip(panels, drawn.items(), strict=False):
        _panel(axes, found)
        what = "end of the path, asked along it" if objective in CONSISTENCY else "jump from noise to t"
        style_axes(axes, title=f"{objective}: {what}", x="t (noise at 1)", y="x")
    for axes in panels[len(drawn) :]:
        axes.set_visible(False)
    return png_bytes(figure)


def _panel(axes: Axes, found: Trajectories) -> None:
    axes.plot(TIMES.numpy(), found.path.numpy(), color=INK, linewidth=0.8, alpha=0.5)
    for column in range(len(STARTS)):
        axes.plot(TIMES.numpy(), found.learnt[:, column].numpy(), color=PALETTE[column % len(PALETTE)], linewidth=1.1)
    axes.set_xlim(1.02, -0.02)


def write_study(
    rows: Sequence[ToyRow],
    drawn: dict[ToyObjective, Trajectories],
    *,
    settings: ToySettings,
    made: Provenance,
    output: Path,
) -> None:
    """`record.json`, `report.md` and `trajectories.png` in the folder `output`."""
    output.mkdir(parents=True, exist_ok=True)
    record = {
        "settings": {name: value for name, value in asdict(settings).items() if name not in ("objective", "seed")},
        "teachers": {name: asdict(teacher) for name, teacher in TEACHERS.items()},
        "rows": [asdict(row) for row in rows],
        "provenance": asdict(made),
    }
    (output / "record.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    (output / "trajectories.png").write_bytes(trajectories_figure(drawn))
    seeds = ", ".join(str(seed) for seed in dict.fromkeys(row.seed for row in rows))
    head = (
        f"# Toy truth\n\nMedian [smallest, largest] over seeds {seeds}. Command: `{made.command}`, {made.hardware}.\n\n"
    )
    picture = "\n![Trajectories](trajectories.png)\n"
    (output / "report.md").write_text(head + table(rows) + picture, encoding="utf-8")
