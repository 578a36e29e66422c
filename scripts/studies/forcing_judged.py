"""Streams of one call per chunk of the students of `forcing_curves.py`, judged.

python scripts/studies/forcing_judged.py --output assets/benchmarks/digits_forcing_curves/one_call.json
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from studies.causal import JUDGES, load_student, real_reference, sample_student, study_prompts
from studies.forcing_curves import VARIANTS

from fewstep.causal_video.schedule import StepSchedule
from fewstep.embedded.moving_digits.judges import load_judges
from fewstep.embedded.moving_digits.measures import measure_clips
from fewstep.evaluation.provenance import collect_provenance


def main() -> None:
    """Judge all, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", default="runs/forcing_curves", help="folder of the training runs")
    parser.add_argument("--samples", type=int, default=80, help="videos of each student")
    parser.add_argument("--output", required=True, help="file to write, .json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    judges, prompts = load_judges(JUDGES), study_prompts(options.samples)
    reference, rows = real_reference(judges, "test", 1000), []
    for variant in VARIANTS:
        found = []
        for seed in options.seeds:
            student = load_student(Path(options.runs) / f"{variant}_seed{seed}")
            schedule = StepSchedule.steps((1,), shift=student.config.student.shift)
            chunks, sink = student.settings.layout.chunks, student.settings.policy.sink
            pixels = sample_student(student, prompts, schedule=schedule, sink=sink, chunks=chunks)
            found.append(measure_clips(judges, pixels, prompts=prompts, reference=reference))
        names = ("digit_accuracy", "direction_accuracy", "frame_distance", "clip_distance")
        medians = {name: median(getattr(one, name) for one in found) for name in names}
        rows.append({"variant": variant, "median": medians, "seeds": [asdict(one) for one in found]})
        print(variant, medians, flush=True)
    record = {"provenance": asdict(collect_provenance(sys.argv[0], arguments=sys.argv[1:])), "rows": rows}
    Path(options.output).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
