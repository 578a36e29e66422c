"""Self-forcing on streams, three ways: plain, with adversarial self-distillation (ASD), and of a flow map (AnyFlow).

    python scripts/studies/self_forced.py --output assets/benchmarks/digits_self_forced

Each starts from a student of `flow_maps.py` of the same seed, plain and ASD from tf_dcm, the flow map from tf_anyflow,
with rollouts of 1, 2 and 4 steps in turn (AnyFlow's second stage), and makes as many steps with the settings of
configs/digits_video/self_forcing.yaml. Streams of 1, 2 and 4 steps a chunk are judged: digits that are right, and
Frechet distances to real frames and clips. Runs that are there are not trained again.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from studies.causal import JUDGES, latest_step, load_student, real_reference, sample_student, study_prompts
from studies.dmd import LAUNCH, show_and_run
from studies.flow_maps import MEASURES, SHIFT
from studies.forcing_curves import paired

from fewstep.causal_video.schedule import StepSchedule
from fewstep.embedded.moving_digits.judges import load_judges
from fewstep.embedded.moving_digits.measures import measure_clips
from fewstep.evaluation.provenance import collect_provenance

# Name of a variant: what it starts from, and its settings beside those of the configuration.
VARIANTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "plain": ("tf_dcm", ()),
    "asd": ("tf_dcm", ("--asd.weight", "0.1")),
    "flow map": (
        "tf_anyflow",
        ("--student.second_time", "gate", "--self_forcing.rollout_schedules", "[[1], [2], [4]]"),
    ),
}
STEPS = (1, 2, 4)


def train(folder: Path, starts: Path, variant: str, seed: int, *, steps: int) -> Path:
    """Train one student; a finished one is kept."""
    before, settings = VARIANTS[variant]
    run = folder / f"{variant.replace(' ', '_')}_seed{seed}"
    if latest_step(run) < steps:
        where = ("--run.directory", str(run), "--run.seed", str(seed), "--run.steps", str(steps))
        start = ("--student.init", str(starts / f"{before}_seed{seed}"), "--student.steps", "[4]")
        resume = ("--resume", "latest") if latest_step(run) > 0 else ()
        config = ("--config", "configs/digits_video/self_forcing.yaml", *where, *start)
        show_and_run(*LAUNCH, "scripts/train_causal_video.py", *config, *settings, *resume)
    return run


def summary_of(rows: list[dict[str, Any]], samples: int) -> list[dict[str, Any]]:
    """Medians over seeds for each variant and number of steps, before and after, and differences to plain by seed."""
    of = {(row["system"], row["seed"], row["steps"]): row for row in rows}
    seeds, found = sorted({row["seed"] for row in rows}), []
    for system in dict.fromkeys(row["system"] for row in rows):
        for steps in STEPS:
            line: dict[str, Any] = {"system": system, "steps": steps}
            for name in MEASURES:
                values = [of[system, seed, steps][name] for seed in seeds]
                least = 1 / samples if name.endswith("accuracy") else 0.0
                line[name] = {"median": median(values), "least": min(values), "most": max(values)}
                theirs = [of["plain", seed, steps][name] for seed in seeds]
                if system != "plain":
                    difference = paired([a - b for a, b in zip(values, theirs, strict=True)], resolution=least)
                    line[name]["minus_plain"] = {**asdict(difference), "decided": difference.decided}
            found.append(line)
    return found


def main() -> None:
    """Train what is missing, judge all, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--starts", default="runs/flow_maps", help="folder of the runs of flow_maps.py")
    parser.add_argument("--runs", default="runs/self_forced", help="folder of the training runs")
    parser.add_argument("--steps", type=int, default=300, help="of each run, one in five the student's")
    parser.add_argument("--samples", type=int, default=80, help="streams of each row")
    parser.add_argument("--output", help="folder of the record; without it nothing is judged")
    options = parser.parse_args()
    torch.set_num_threads(1)
    starts, folder = Path(options.starts), Path(options.runs)
    runs = {
        (variant, seed): train(folder, starts, variant, seed, steps=options.steps)
        for seed in options.seeds
        for variant in VARIANTS
    }
    if options.output is None:
        return
    judges, prompts, rows = load_judges(JUDGES), study_prompts(options.samples), []
    reference = real_reference(judges, "test", 1000)
    for (variant, seed), run in runs.items():
        student = load_student(run)
        for count in STEPS:
            schedule = StepSchedule.steps((count,), shift=SHIFT)
            chunks, sink = student.settings.layout.chunks, student.settings.policy.sink
            pixels = sample_student(student, prompts, schedule=schedule, sink=sink, chunks=chunks)
            result = measure_clips(judges, pixels, prompts=prompts, reference=reference)
            measures = {name: getattr(result, name) for name in MEASURES}
            rows.append({"system": variant, "seed": seed, "steps": count, **measures})
            print(rows[-1], flush=True)
    output = Path(options.output)
    output.mkdir(parents=True, exist_ok=True)
    record = {
        "provenance": asdict(collect_provenance(sys.argv[0], arguments=sys.argv[1:])),
        "settings": {"steps": options.steps, "samples": options.samples},
        "summary": summary_of(rows, options.samples),
        "rows": rows,
    }
    (output / "self_forced.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
