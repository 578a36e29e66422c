"""How well clips of a teacher of moving digits show what their prompts say, as a JSON record and a sheet of frames.

Behind `scripts/evaluate_digits_video.py`.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from fewstep.core.randomness import sample_noise, shared_integer
from fewstep.core.teacher import Teacher
from fewstep.core.training.sample_grid import save_grid
from fewstep.embedded.moving_digits.clips import CANVAS, CLIP_FRAMES, all_clip_captions
from fewstep.embedded.moving_digits.judges import held_out_clips, load_judges
from fewstep.embedded.moving_digits.measures import VideoResult, measure_clips, video_reference

REFERENCE_CLIPS = 1000
SHEET_CLIPS, SHEET_EVERY = 16, 3


@dataclass(frozen=True)
class VideoEvaluation:
    """A result with what it takes to repeat it; `floor` are the measures of as many other real, held-out clips."""

    teacher: str
    steps: int
    guidance: float
    seed: int
    torch_version: str
    command: str
    result: VideoResult
    floor: VideoResult


def evaluation_prompts(count: int, *, seed: int) -> list[str]:
    """`count` captions: every one of the 320 once, in an order of the seed, before one comes again."""
    captions = all_clip_captions()
    key = shared_integer(seed, 0, "video_evaluation", 2**31)
    order = torch.randperm(len(captions), generator=torch.Generator().manual_seed(key)).tolist()
    return [captions[order[index % len(order)]] for index in range(count)]


@torch.no_grad()
def generate_clips(
    teacher: Teacher, prompts: list[str], *, steps: int, guidance: float, seed: int, batch_size: int = 32
) -> Tensor:
    """Clip i of prompt i, pixels [N, 3, 25, 32, 32]; each depends on (teacher, prompt, steps, guidance, seed, i)."""
    shape = teacher.latent_shape(CANVAS, CANVAS, frames=CLIP_FRAMES)
    device = teacher.null_condition.device
    parts = []
    for start in tqdm(range(0, len(prompts), batch_size), desc=f"{steps} steps", unit="batch"):
        rows = range(start, min(start + batch_size, len(prompts)))
        noise = sample_noise(seed, rows, shape, stream="video_evaluation", device=device)
        latents = teacher.sample(noise, teacher.encode([prompts[i] for i in rows]), steps=steps, guidance=guidance)
        parts.append(teacher.decode(latents).cpu())
    return torch.cat(parts)


def evaluate_teacher(
    path: str, output: Path, *, samples: int, steps: int, guidance: float, seed: int, command: str
) -> VideoEvaluation:
    """Judge the teacher at `path` beside real clips; writes evaluation.json and samples.png into `output`."""
    judges = load_judges(Path(path) / "judges")
    real = held_out_clips(REFERENCE_CLIPS + samples)
    reference = video_reference(judges, real.pixels[:REFERENCE_CLIPS])
    rest = slice(REFERENCE_CLIPS, None)
    floor = measure_clips(judges, real.pixels[rest], prompts=real.captions[rest], reference=reference)
    prompts = evaluation_prompts(samples, seed=seed)
    pixels = generate_clips(Teacher.load(path), prompts, steps=steps, guidance=guidance, seed=seed)
    evaluation = VideoEvaluation(
        teacher=path,
        steps=steps,
        guidance=guidance,
        seed=seed,
        torch_version=torch.__version__,
        command=command,
        result=measure_clips(judges, pixels, prompts=prompts, reference=reference),
        floor=floor,
    )
    output.mkdir(parents=True, exist_ok=True)
    (output / "evaluation.json").write_text(json.dumps(asdict(evaluation), indent=1) + "\n", encoding="ascii")
    sheet = [clip[:, ::SHEET_EVERY].transpose(0, 1) for clip in pixels[:SHEET_CLIPS]]
    save_grid(sheet, output / "samples.png", labels=prompts[:SHEET_CLIPS])
    return evaluation
