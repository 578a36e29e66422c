"""What a reward costs in FID by where its gradient is read: on the sample, with matching at all or at small times, or
at the teacher's prediction (a teacher that the reward tilts).

    python scripts/studies/reward_anchor.py --output assets/benchmarks/reward_anchor

RTDMD from the distilled students of --base (as in benchmark_reward.py), its policy gradient next to nothing, so that
one gradient of the reward is compared with another. Runs that are complete are kept, and checkpoints that are judged.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from statistics import mean

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from studies.dmd import LAUNCH, run_directory, show_and_run
from studies.reward import BASE_STEPS, MEASURES, StudyPoint, evaluate, reward_run, study_curves, table

from fewstep.core.training.run_directory import METRICS_FILE, read_metrics
from fewstep.evaluation.figures import trade_off_figure
from fewstep.evaluation.provenance import collect_provenance

ALONE = ("--rtdmd.policy_weight", "1e-6", "--matching.ambient", "null", "--run.checkpoint_every", "10")
SMALL_LAW = "{min: 0.02, max: 0.2, shift: 1.0}"
SMALL = ("--matching.score_times", SMALL_LAW, "--matching.fake_times", SMALL_LAW)
# Two strengths of each, so that their costs are compared at a reward that both reach.
VARIANTS: dict[str, tuple[str, ...]] = {
    "no_reward": ("--rtdmd.direct", "null"),
    "sample_0.05": ("--rtdmd.direct.weight", "0.05"),
    "sample_0.2": ("--rtdmd.direct.weight", "0.2"),
    "small_times_no_reward": ("--rtdmd.direct", "null", *SMALL),
    "small_times_0.05": ("--rtdmd.direct.weight", "0.05", *SMALL),
    "small_times_0.2": ("--rtdmd.direct.weight", "0.2", *SMALL),
    "tilted_teacher_4": ("--rtdmd.direct", "null", "--rtdmd.tilted_teacher.tilt_scale", "4"),
    "tilted_teacher_16": ("--rtdmd.direct", "null", "--rtdmd.tilted_teacher.tilt_scale", "16"),
}
# Held-out scores at which the costs are compared; the students start below -0.1.
LEVELS = (-0.09, -0.08, -0.07, -0.06, -0.05)


def train(folder: Path, base_folder: Path, variant: str, seed: int) -> None:
    """Train one run; one that is complete is kept, one that was interrupted goes on."""
    base, run = run_directory(base_folder, BASE_STEPS, seed), reward_run(folder, variant, seed)
    if (run / "checkpoint-80").is_dir():
        print(f"{run} is complete", flush=True)
        return
    resume = ("--resume", "latest") if any(run.glob("checkpoint-*")) else ()
    where = ("--student.init", str(base), "--run.directory", str(run), "--run.seed", str(seed))
    kept = ("--run.keep_checkpoints", "20")
    changes = (*ALONE, *kept, *VARIANTS[variant])
    show_and_run(*LAUNCH, "scripts/train_reward.py", "--config", "configs/digits/rtdmd.yaml", *where, *changes, *resume)


def cost_at(points: Sequence[StudyPoint], level: float) -> float | None:
    """FID where the held-out score first reaches a level along a run, by a straight line between checkpoints; None
    where it never does."""
    held, fid = MEASURES.index("held_out_log_probability"), MEASURES.index("fid")
    ordered = sorted(points, key=lambda point: point.step)
    for before, after in pairwise(ordered):
        low, high = before.scores[held], after.scores[held]
        if low < level <= high:
            share = (level - low) / (high - low)
            return before.scores[fid] + share * (after.scores[fid] - before.scores[fid])
    return None


def costs(points: Sequence[StudyPoint], seeds: Sequence[int]) -> dict[str, dict[str, dict[str, object]]]:
    """For each level and variant the FID of every seed, and its difference from that of the reward on the sample."""
    found: dict[str, dict[str, dict[str, object]]] = {}
    start = {point.seed: point for point in points if point.step == 0}
    for level in LEVELS:
        rows = {
            variant: [
                cost_at([start[seed], *(p for p in points if (p.method, p.seed) == (variant, seed))], level)
                for seed in seeds
            ]
            for variant in VARIANTS
        }
        # The weaker of the two strengths that reaches the level with every seed.
        base = next((row for name, row in rows.items() if name.startswith("sample_") and None not in row), None)
        found[str(level)] = {}
        for variant, row in rows.items():
            pairs = [(a, b) for a, b in zip(row, base or [], strict=False) if a is not None and b is not None]
            paired = [a - b for a, b in pairs] if len(pairs) == len(seeds) else []
            found[str(level)][variant] = {"fid": row, "paired": paired, "mean": mean(paired) if paired else None}
    return found


def tilts(folder: Path, seeds: Sequence[int]) -> dict[str, dict[str, float]]:
    """The mean over steps and seeds of what the runs logged of their tilt."""
    found: dict[str, dict[str, float]] = {}
    for variant in VARIANTS:
        records = [r for seed in seeds for r in read_metrics(reward_run(folder, variant, seed) / METRICS_FILE)]
        names = sorted({name for record in records for name in record if name.startswith("effective_tilt")})
        found[variant] = {name: mean(record[name] for record in records if name in record) for name in names}
    return found


def main() -> None:
    """Train what is missing, judge all, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--base", default="runs/reward_base", help="folder of the distilled students")
    parser.add_argument("--runs", default="runs/reward_anchor", help="folder of the reward runs")
    parser.add_argument("--samples", type=int, default=1000, help="images per checkpoint")
    parser.add_argument("--output", required=True, help="folder of the record")
    options = parser.parse_args()
    folder, base, output = Path(options.runs), Path(options.base), Path(options.output)
    for seed in options.seeds:
        for variant in VARIANTS:
            train(folder, base, variant, seed)
    points = evaluate(folder, base, list(VARIANTS), options.seeds, samples=options.samples)
    output.mkdir(parents=True, exist_ok=True)
    record = {
        "measures": MEASURES,
        "points": [asdict(point) for point in points],
        "costs": costs(points, options.seeds),
        "tilts": tilts(folder, options.seeds),
        "provenance": asdict(collect_provenance("scripts/studies/reward_anchor.py", arguments=sys.argv[1:])),
    }
    (output / "points.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    (output / "table.md").write_text(table(points), encoding="utf-8")
    figure = trade_off_figure(study_curves(points), x="fid", panels=("held_out_log_probability", "diversity"))
    (output / "frontier.png").write_bytes(figure)


if __name__ == "__main__":
    main()
