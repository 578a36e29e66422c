"""The study of causal students on the embedded video teacher: train chains of stages, sample, judge, write a table.

Legend: N videos, F latent frames, T pixel frames; latents [N, C, F, h, w], pixels [N, 3, T, H, W] in [0, 1].
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Literal

import torch
from studies.dmd import LAUNCH, show_and_run
from torch import Tensor

from fewstep.causal_video.denoise import ChunkNoise, VideoCondition
from fewstep.causal_video.export.run import RunOfStudent, is_flow, read_causal_run
from fewstep.causal_video.model.network import CausalWan
from fewstep.causal_video.policy import CachePolicy
from fewstep.causal_video.reward.config import CausalRewardConfig
from fewstep.causal_video.rollout import rollout
from fewstep.causal_video.schedule import StepSchedule
from fewstep.causal_video.settings import CausalSettings, load_defaults
from fewstep.causal_video.stages.batch import causal_settings
from fewstep.causal_video.stages.sampling import euler_rollout
from fewstep.causal_video.stages.student import build_student
from fewstep.core.randomness import sample_noise
from fewstep.core.teacher import Teacher
from fewstep.core.training.checkpoint import latest_checkpoint, load_checkpoint
from fewstep.core.training.run_directory import CONFIG_FILE
from fewstep.core.weights import find_weights
from fewstep.embedded.moving_digits.clips import balanced_clip_prompt, moving_digits
from fewstep.embedded.moving_digits.judges import VideoJudges, load_judges
from fewstep.embedded.moving_digits.measures import VideoReference, VideoResult, measure_clips, video_reference
from fewstep.evaluation.provenance import collect_provenance

TEACHER = "assets/digits_video"
JUDGES = "assets/digits_video/judges"
# The stages of each chain, in order; self-forcing has a run for each stage it can start from. Astrolabe goes on from
# the end of the dcm chain.
CHAINS = {
    "ode": ("ode", "self_forcing"),
    "dcm": ("teacher_forcing", "tf_dcm", "self_forcing"),
    "scm": ("teacher_forcing", "tf_scm", "self_forcing"),
    "astrolabe": ("teacher_forcing", "tf_dcm", "self_forcing", "astrolabe"),
    "steered": ("steered", "steered_dcm"),
}
# Stages that have a run for each chain, and those that are judged over long videos, too.
PER_CHAIN, JUDGED_LONG = ("self_forcing",), ("self_forcing", "astrolabe")
SCHEDULES = ((4,), (2,), (1,), (4, 2), (4, 1))
# Long videos have each sink for one student, and for the others the one that it was trained with.
SINKS, SINKS_OF = ("none", "static", "ema"), "self_forcing (dcm)"
# Chunks of a short video are those of the layout; long ones have this many times as many, for one prompt in three. That
# has no factor in common with the counts of digits, directions and speeds, so that all of them stay.
LONG, LONG_SHARE = 10, 3
FLOW_STEPS, TEACHER_STEPS = 20, 50
BATCH = 50
SEED = 0
SHOWN = ("digit_accuracy", "direction_accuracy", "speed_accuracy", "black_frames", "motion", "frame_distance")


@dataclass(frozen=True, eq=False)
class StudyStudent:
    """The averaged student of a run beside its teacher; `weights` is the file it was read from."""

    teacher: Teacher
    weights: Path
    network: CausalWan
    settings: CausalSettings
    config: RunOfStudent

    @property
    def is_flow(self) -> bool:
        """Whether it takes many Euler steps with guidance."""
        return is_flow(self.config)


@dataclass(frozen=True)
class StudyRow:
    """Measures of one system at one seed. `schedule` is in calls per chunk, and empty where it says nothing."""

    system: str
    seed: int | None
    schedule: str
    sink: str
    latent_frames: int
    result: VideoResult


def run_directory(folder: Path, chain: str, stage: str, seed: int) -> Path:
    """Where a stage of a chain is trained; chains share their first stage."""
    name = f"{stage}_{start_of(chain)}" if stage in PER_CHAIN else stage
    return folder / f"{name}_seed{seed}"


def start_of(chain: str) -> str:
    """What self-forcing starts from in a chain: the name of the chain that ends there."""
    return "dcm" if chain == "astrolabe" else chain


def train_chain(folder: Path, chain: str, *, seed: int, changes: Sequence[str] = (), until: str | None = None) -> None:
    """Train the stages of a chain that are not finished; an interrupted one goes on.

    `changes` are settings for the command line of every stage, such as ("--run.steps", "20"); `until` is the last
    stage, the chain's own where it is None.
    """
    before: Path | None = None
    stages = CHAINS[chain] if until is None else CHAINS[chain][: CHAINS[chain].index(until) + 1]
    for stage in stages:
        run = run_directory(folder, chain, stage, seed)
        done = run / CONFIG_FILE
        if done.is_file() and latest_step(run) >= read_causal_run(run).run.steps:
            print(f"{run} is trained already")
        else:
            resume = ("--resume", "latest") if latest_checkpoint(run) is not None else ()
            start = () if before is None else ("--student.init", str(before))
            where = ("--run.directory", str(run), "--run.seed", str(seed))
            config = ("--config", f"configs/digits_video/{stage}.yaml")
            script = f"scripts/train_causal_{'reward' if stage in CausalRewardConfig.METHODS else 'video'}.py"
            show_and_run(*LAUNCH, script, *config, *where, *start, *changes, *resume)
        before = run


def latest_step(run: Path) -> int:
    """Steps of the latest checkpoint; -1 without one."""
    found = latest_checkpoint(run)
    return -1 if found is None else load_checkpoint(found).step


def fingerprint(weights: Path) -> str:
    """The first 12 digits of the hash of a file: a run that is trained again is judged again."""
    return hashlib.sha256(weights.read_bytes()).hexdigest()[:12]


def load_student(run: Path, checkpoint: Path | None = None) -> StudyStudent:
    """The averaged weights of a checkpoint of a run, the latest by default, without gradients.

    Raises ValueError as `find_weights`.
    """
    config = read_causal_run(run)
    teacher = Teacher.load(config.teacher.path)
    names = load_defaults(run).actions
    weights = find_weights(str(checkpoint or run))
    network = build_student(config.student, teacher, weights, seed=0, controls=len(names))
    return StudyStudent(
        teacher, weights.files[0], network.requires_grad_(False), causal_settings(config.student), config
    )


def with_sink(policy: CachePolicy, sink: str) -> CachePolicy:
    """A policy of as many visible frames with another kind of sink; without one the window takes its place."""
    if policy.window_frames is None:
        raise ValueError("sinks are compared under a window: set student.policy.window_frames")
    if sink == "none":
        return replace(policy, sink="none", sink_frames=0, window_frames=policy.window_frames + policy.sink_frames)
    return replace(policy, sink=sink)  # pyright: ignore[reportArgumentType]


@torch.no_grad()
def sample_student(
    student: StudyStudent,
    prompts: Sequence[str],
    *,
    schedule: StepSchedule,
    sink: str,
    chunks: int,
    controls: Tensor | None = None,
) -> Tensor:
    """Pixels [N, 3, T, H, W] of streamed videos. Students of a flow take Euler steps with the guidance of their run.

    `controls` are channels [N, K, F, h, w] of steered students.
    """
    policy = with_sink(student.settings.policy, sink)
    layout = student.settings.layout.extended(chunks)
    settings = CausalSettings(layout, policy, schedule)
    channels, _, height, width = teacher_shape(student.teacher)
    pixels = []
    for start in range(0, len(prompts), BATCH):
        numbers = range(start, min(start + BATCH, len(prompts)))
        text = student.teacher.encode([prompts[number] for number in numbers]).text
        extra = None if controls is None else controls[start : numbers.stop]
        condition = VideoCondition(text, extra=extra)
        noise = ChunkNoise(SEED, tuple(numbers), (channels, height, width), stream="study")
        if student.is_flow:
            latents = euler_rollout(
                student.network,
                condition,
                noise,
                settings,
                times=student.teacher.family.teacher_grid(student.teacher.pipeline, FLOW_STEPS),
                guidance=student.config.teacher.guidance,
                null_text=student.teacher.null_condition.tokens,
            )
        else:
            exits = schedule.exits(schedule.longest - 1, chunks)
            latents = rollout(student.network, condition, noise, settings, exits=exits).video
        pixels.append(student.teacher.decode(latents))
    return torch.cat(pixels)


@torch.no_grad()
def sample_teacher(teacher: Teacher, prompts: Sequence[str], *, steps: int, guidance: float) -> Tensor:
    """Pixels [N, 3, T, H, W] of the bidirectional teacher."""
    pixels = []
    for start in range(0, len(prompts), BATCH):
        numbers = range(start, min(start + BATCH, len(prompts)))
        noise = sample_noise(SEED, numbers, teacher_shape(teacher), stream="study")
        condition = teacher.encode([prompts[number] for number in numbers])
        pixels.append(teacher.decode(teacher.sample(noise, condition, steps=steps, guidance=guidance)))
    return torch.cat(pixels)


def teacher_shape(teacher: Teacher) -> tuple[int, int, int, int]:
    """(C, F, h, w) of the embedded teacher's clips."""
    channels, frames, height, width = teacher.latent_shape(32, 32, frames=25)
    return channels, frames, height, width


def real_reference(judges: VideoJudges, split: Literal["train", "test"], clips: int) -> VideoReference:
    """Features of real clips; tuning looks at the training split alone."""
    parts = [
        moving_digits(split, seed=SEED, indices=range(start, min(start + 100, clips))).pixels
        for start in range(0, clips, 100)
    ]
    return video_reference(judges, torch.cat(parts))


def study_prompts(count: int) -> list[str]:
    """Captions with digits, directions and speeds in equal shares."""
    return [balanced_clip_prompt(number) for number in range(count)]


@dataclass(frozen=True, eq=False)
class StudyJudge:
    """What videos are judged by and compared with.

    Attributes:
        judges: trained networks.
        reference: features of real clips.
        split: of these clips.
        samples: N of short videos; long ones are made of every `LONG_SHARE`-th prompt.
        kept: folder of rows that are judged already.
    """

    judges: VideoJudges
    reference: VideoReference
    split: str
    samples: int
    kept: Path

    @classmethod
    def load(cls, split: Literal["train", "test"], *, samples: int, kept: Path) -> StudyJudge:
        """With 1,000 real clips of a split."""
        judges = load_judges(JUDGES)
        return cls(judges, real_reference(judges, split, 1000), split, samples, kept)

    def result(self, prompts: Sequence[str], pixels: Callable[[], Tensor], *, made_of: Sequence[str]) -> VideoResult:
        """Measures of videos, read from `kept` where the same ones have been judged before.

        Args:
            prompts: of the videos.
            pixels: makes them.
            made_of: all that they depend on.
        """
        parts = (*made_of, self.split, f"{len(prompts)} videos")
        name = "-".join(re.sub(r"[^a-z0-9]+", "_", part.lower()).strip("_") for part in parts)
        path = self.kept / f"{name}.json"
        if path.is_file():
            found = VideoResult(**json.loads(path.read_text(encoding="utf-8")))
            accuracy, distance = tuple(found.segment_accuracy), tuple(found.segment_distance)
            return replace(found, segment_accuracy=accuracy, segment_distance=distance)
        result = measure_clips(self.judges, pixels(), prompts=prompts, reference=self.reference)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(result)) + "\n", encoding="utf-8")
        return result


def judge_seed(folder: Path, chain: str, seed: int, judge: StudyJudge) -> list[StudyRow]:
    """All rows of the students of one chain and seed: short videos at each schedule, and long ones."""
    prompts, rows = study_prompts(judge.samples), []

    def add(name: str, student: StudyStudent, schedule: tuple[int, ...], sink: str, times: int) -> None:
        chunks = student.settings.layout.chunks * times
        grid = StepSchedule.steps(schedule, shift=student.config.student.shift)
        asked = prompts if times == 1 else prompts[::LONG_SHARE]
        said = f"{FLOW_STEPS} Euler" if student.is_flow else str(list(schedule))
        frames, weights = student.settings.layout.extended(chunks).frames, fingerprint(student.weights)

        def pixels() -> Tensor:
            return sample_student(student, asked, schedule=grid, sink=sink, chunks=chunks)

        made_of = (name, f"seed {seed}", weights, said, f"sink {sink}", f"{frames} frames")
        rows.append(StudyRow(name, seed, said, sink, frames, judge.result(asked, pixels, made_of=made_of)))

    for stage in CHAINS[chain]:
        student = load_student(run_directory(folder, chain, stage, seed))
        name = f"{stage} ({start_of(chain)})" if stage in PER_CHAIN else stage
        short = ((4, 2),) if student.is_flow else SCHEDULES
        for schedule in short:
            add(name, student, schedule, student.settings.policy.sink, 1)
        if stage in JUDGED_LONG:
            for sink in SINKS if name == SINKS_OF else (student.settings.policy.sink,):
                add(name, student, (4, 2), sink, LONG)
    return rows


def judge_teacher(judge: StudyJudge, *, guidance: float) -> StudyRow:
    """The bidirectional teacher on the same prompts."""
    teacher, prompts = Teacher.load(TEACHER), study_prompts(judge.samples)
    steps, frames = f"{TEACHER_STEPS} Euler", teacher_shape(teacher)[1]

    def pixels() -> Tensor:
        return sample_teacher(teacher, prompts, steps=TEACHER_STEPS, guidance=guidance)

    result = judge.result(prompts, pixels, made_of=("teacher", steps, f"guidance {guidance:g}"))
    return StudyRow("teacher", None, steps, "", frames, result)


def write_table(rows: Sequence[StudyRow], output: Path, *, command: Sequence[str]) -> None:
    """Write `results.json` with every row and `README.md` with medians over seeds into a folder."""
    output.mkdir(parents=True, exist_ok=True)
    provenance = collect_provenance(command[0], arguments=command[1:])
    content = {"provenance": asdict(provenance), "rows": [asdict(row) for row in rows]}
    (output / "results.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    groups: dict[tuple[str, str, str, int], list[StudyRow]] = {}
    for row in rows:
        groups.setdefault((row.system, row.schedule, row.sink, row.latent_frames), []).append(row)
    head = ("system", "calls per chunk", "sink", "latent frames", *SHOWN, "clip_distance", "drift", "seeds")
    lines = ["# Causal students on the embedded video teacher", "", f"`{provenance.command}`, {provenance.date}.", ""]
    lines += [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for key, members in groups.items():
        cells = [spread([getattr(row.result, name) for row in members]) for name in (*SHOWN, "clip_distance", "drift")]
        lines.append(f"| {' | '.join((*map(str, key), *cells, str(len(members))))} |")
    (output / "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def spread(values: Sequence[float]) -> str:
    """Median over seeds, and the smallest and the largest."""
    middle = f"{median(values):.3f}"
    return middle if len(values) < 2 else f"{middle} [{min(values):.3f}, {max(values):.3f}]"
