"""The study of consistency students of the embedded video teacher: train, export, sample, judge, write a table.

    python scripts/benchmark_consistency_video.py --seeds 0 --output assets/benchmarks/digits_video_consistency

Clips, judges and measures are those of `clip_evaluation.py`, with the same prompts and first noise for all
systems. Students are sampled here, from their run; their exports are compared with this sampler when they are written.

Legend: N clips, T pixel frames; pixels [N, 3, T, H, W] in [0, 1].
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import torch
from studies.clip_evaluation import REFERENCE_CLIPS, evaluation_prompts, generate_clips
from studies.consistency import run_directory
from studies.dmd import LAUNCH, show_and_run
from torch import Tensor

from fewstep.core.export.run import RunStudent, load_run_student
from fewstep.core.grids import step_grid
from fewstep.core.randomness import sample_noise
from fewstep.core.run_settings import read_settings
from fewstep.core.student import Student
from fewstep.core.teacher import Teacher
from fewstep.core.training.sample_grid import frame_row, save_grid
from fewstep.embedded.moving_digits.judges import VideoJudges, held_out_clips, load_judges
from fewstep.embedded.moving_digits.measures import VideoReference, VideoResult, measure_clips, video_reference
from fewstep.evaluation.provenance import collect_provenance

TEACHER = "assets/digits_video"
METHODS = ("anyflow", "mcm")
STUDENT_STEPS, TEACHER_STEPS = (1, 2, 4), (50, 4, 2, 1)
# Of the students' configurations: more would sharpen digits and is not what they were shown.
GUIDANCE = 2.0
# The stream of the teacher's first noise.
STREAM, BATCH, SHEET_CLIPS = "video_evaluation", 32, 8
RESULTS_FILE = "results.json"
SHOWN = ("digit_accuracy", "direction_accuracy", "speed_accuracy", "motion", "frame_distance", "clip_distance")


@dataclass(frozen=True)
class VideoRow:
    """Measures of one system at one number of steps; `seed` is that of its training, None where there is none."""

    system: str
    steps: int
    seed: int | None
    result: VideoResult


@dataclass(frozen=True)
class VideoJury:
    """Judges, the real clips' features, and how many clips are judged: what all rows share."""

    judges: VideoJudges
    reference: VideoReference
    samples: int

    @property
    def prompts(self) -> list[str]:
        return evaluation_prompts(self.samples, seed=0)

    def measure(self, pixels: Tensor) -> VideoResult:
        return measure_clips(self.judges, pixels, prompts=self.prompts, reference=self.reference)


def load_jury(samples: int) -> VideoJury:
    """Judges of the embedded teacher and features of held-out clips. Raises ValueError where the judges are missing."""
    judges = load_judges(Path(TEACHER) / "judges")
    return VideoJury(judges, video_reference(judges, held_out_clips(REFERENCE_CLIPS).pixels), samples)


def train_run(folder: Path, method: str, *, seed: int, changes: Sequence[str] = ()) -> Path:
    """Train one student of configs/digits_video/METHOD.yaml and export it; returns its run.

    One that has an export is kept, and an interrupted one goes on. `changes` are settings for the command line.
    """
    run = run_directory(folder, f"{method}_video", seed)
    if not (run / "export" / "model_index.json").is_file():
        resume = ("--resume", "latest") if any(run.glob("checkpoint-*")) else ()
        config = ("--config", f"configs/digits_video/{method}.yaml")
        where = ("--run.directory", str(run), "--run.seed", str(seed))
        show_and_run(*LAUNCH, "scripts/train_consistency.py", *config, *where, *changes, *resume)
        show_and_run("scripts/export_pipeline.py", "--run", str(run))
    return run


@torch.no_grad()
def sample_clips(loaded: RunStudent, prompts: Sequence[str], *, times: Sequence[float], seed: int) -> Tensor:
    """Clip i of prompt i in len(times) steps; each depends on (student, prompt, times, seed, i) alone."""
    teacher, student = loaded.teacher, Student(loaded.student.denoiser, times, loaded.student.sampler)
    shape, parts = teacher.latent_shape(32, 32, frames=25), []
    for start in range(0, len(prompts), BATCH):
        rows = range(start, min(start + BATCH, len(prompts)))
        fresh = [sample_noise(seed, rows, shape, stream=f"{STREAM}_renoise_{step}") for step in range(len(times) - 1)]
        noise, condition = sample_noise(seed, rows, shape, stream=STREAM), teacher.encode([prompts[i] for i in rows])
        parts.append(teacher.decode(student.sample(noise, condition, fresh)))
    return torch.cat(parts)


def judge_run(run: Path, *, name: str, seed: int, jury: VideoJury, sheets: Path | None = None) -> list[VideoRow]:
    """The rows of a run's averaged student at 1, 2 and 4 steps, all from one training; pictures go to `sheets`."""
    settings = read_settings(run)
    loaded, rows = load_run_student(run, settings), []
    for steps in STUDENT_STEPS:
        pixels = sample_clips(loaded, jury.prompts, times=step_grid(steps, shift=settings.shift), seed=0)
        rows.append(VideoRow(name, steps, seed, jury.measure(pixels)))
        if sheets is not None:
            write_sheet(pixels, jury.prompts, sheets / f"{name}_{steps}step_seed{seed}.png")
    return rows


def judge_teacher(jury: VideoJury, sheets: Path | None = None) -> list[VideoRow]:
    """The teacher's rows, at as few steps as the students' and at 50, with the guidance of their training."""
    teacher, rows = Teacher.load(TEACHER), []
    for steps in TEACHER_STEPS:
        pixels = generate_clips(teacher, jury.prompts, steps=steps, guidance=GUIDANCE, seed=0, batch_size=BATCH)
        rows.append(VideoRow("teacher", steps, None, jury.measure(pixels)))
        if sheets is not None:
            write_sheet(pixels, jury.prompts, sheets / f"teacher_{steps}step.png")
    return rows


def judge_real(jury: VideoJury) -> VideoRow:
    """As many other held-out clips: what the judges make of real ones, steps 0."""
    clips = held_out_clips(REFERENCE_CLIPS + jury.samples)
    rest = slice(REFERENCE_CLIPS, None)
    found = measure_clips(jury.judges, clips.pixels[rest], prompts=clips.captions[rest], reference=jury.reference)
    return VideoRow("real", 0, None, found)


def write_sheet(pixels: Tensor, prompts: Sequence[str], path: Path) -> None:
    """The first clips as rows of frames."""
    save_grid([frame_row(clip) for clip in pixels[:SHEET_CLIPS]], path, labels=list(prompts[:SHEET_CLIPS]))


def write_table(rows: Sequence[VideoRow], output: Path, *, command: Sequence[str]) -> None:
    """Write every row to `results.json` and medians over training seeds to `README.md`."""
    output.mkdir(parents=True, exist_ok=True)
    provenance = collect_provenance(command[0], arguments=command[1:])
    content = {"provenance": asdict(provenance), "rows": [asdict(row) for row in rows]}
    (output / RESULTS_FILE).write_text(json.dumps(content, indent=1) + "\n", encoding="ascii")
    groups: dict[tuple[str, int], list[VideoRow]] = {}
    for row in rows:
        groups.setdefault((row.system, row.steps), []).append(row)
    lines = ["# Consistency students of the embedded video teacher", "", f"`{provenance.command}`, {provenance.date}."]
    lines += [
        "Medians over training seeds. Distances of few clips are far from those of many: compare them with `real`."
    ]
    lines += ["", f"| {' | '.join(('system', 'steps', *SHOWN, 'seeds'))} |", f"|{'---|' * (len(SHOWN) + 3)}"]
    for (system, steps), members in groups.items():
        cells = [f"{median(getattr(row.result, name) for row in members):.3f}" for name in SHOWN]
        lines.append(f"| {' | '.join((system, str(steps), *cells, str(len(members))))} |")
    (output / "README.md").write_text("\n".join(lines) + "\n", encoding="ascii")
