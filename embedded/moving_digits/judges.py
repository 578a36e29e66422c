"""Judges of clips of moving digits: which digit is it, where does it move, and how fast?

Both are trained on moving training digits alone and tested on clips of digits that neither they nor the teacher saw.

Shapes: B clips, F pixel frames, pixels [B, 3, F, 32, 32] in [0, 1], frames [B, 3, 32, 32], features [B, 64].
Run `python scripts/make_digits_judge.py clips --output DIR` to train and save them.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from fewstep.embedded.moving_digits.clips import CANVAS, CLIP_FRAMES, MovingDigits, moving_digits

FEATURES = 64
DIGITS, DIRECTIONS, SPEEDS = 10, 4, 2
WEIGHTS_FILE, RECORD_FILE = "judges.safetensors", "judges.json"
BATCH = 32
# Frames of each clip of a step that the frame judge sees.
FRAMES_SEEN = 4
LEARNING_RATE = 2e-3
LABEL_SMOOTHING = 0.05
TEST_CLIPS = 1000
# Clips of the judges start here, so that they are none of those that the teacher or its autoencoder saw.
FIRST_TRAINING_CLIP, FIRST_TEST_CLIP = 2_000_000, 3_000_000


class FrameJudge(nn.Module):
    """A convolutional network with smooth activations: frames [B, 3, 32, 32] to the logits [B, 10] of their digit."""

    num_features = FEATURES
    name = "video frame judge, 64 features"

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Conv2d(1, 24, 3, padding=1, stride=2),
            nn.GroupNorm(4, 24),
            nn.SiLU(),
            nn.Conv2d(24, 48, 3, padding=1, stride=2),
            nn.GroupNorm(8, 48),
            nn.SiLU(),
            nn.Conv2d(48, 64, 3, padding=1),
            nn.GroupNorm(8, 64),
            nn.SiLU(),
            nn.Conv2d(64, 64, 3, padding=1, stride=2),
            nn.GroupNorm(8, 64),
            nn.SiLU(),
        )
        self.embed = nn.Linear(64 * 4 * 4, FEATURES)
        self.head = nn.Linear(FEATURES, DIGITS)

    def features(self, frames: Tensor) -> Tensor:
        """Penultimate features [B, 64]. Raises ValueError unless frames are [B, 3, 32, 32]."""
        if frames.ndim != 4 or tuple(frames.shape[1:]) != (3, CANVAS, CANVAS):
            raise ValueError(f"frames have shape {tuple(frames.shape)}; the frame judge takes [B, 3, 32, 32] in [0, 1]")
        grey = frames.mean(dim=1, keepdim=True)
        return F.silu(self.embed(self.trunk(2.0 * grey - 1.0).flatten(1)))

    def forward(self, frames: Tensor) -> Tensor:
        return self.head(self.features(frames))


@dataclass(frozen=True)
class ClipLogits:
    """What a clip judge says: digits [B, 10], directions [B, 4], speeds [B, 2]."""

    digits: Tensor
    directions: Tensor
    speeds: Tensor


class ClipJudge(nn.Module):
    """A network of convolutions over space and time: clips [B, 3, 25, 32, 32] to digit, direction and speed.

    The digit is there so that the features, which clips are compared by, see it; accuracy is the frame judge's matter.
    """

    num_features = FEATURES
    name = "video clip judge, 64 features"

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Conv3d(1, 16, 3, padding=1, stride=2),
            nn.GroupNorm(4, 16),
            nn.SiLU(),
            nn.Conv3d(16, 32, 3, padding=1, stride=2),
            nn.GroupNorm(8, 32),
            nn.SiLU(),
            nn.Conv3d(32, 64, 3, padding=1, stride=2),
            nn.GroupNorm(8, 64),
            nn.SiLU(),
        )
        self.embed = nn.Linear(64 * 4 * 4 * 4, FEATURES)
        self.head = nn.Linear(FEATURES, DIGITS + DIRECTIONS + SPEEDS)

    def features(self, pixels: Tensor) -> Tensor:
        """Penultimate features [B, 64]. Raises ValueError unless pixels are [B, 3, 25, 32, 32]."""
        if pixels.ndim != 5 or tuple(pixels.shape[1:]) != (3, CLIP_FRAMES, CANVAS, CANVAS):
            raise ValueError(
                f"pixels have shape {tuple(pixels.shape)}; the clip judge takes [B, 3, 25, 32, 32] in [0, 1]: give it "
                "25 frames of a longer clip"
            )
        grey = pixels.mean(dim=1, keepdim=True)
        return F.silu(self.embed(self.trunk(2.0 * grey - 1.0).flatten(1)))

    def forward(self, pixels: Tensor) -> ClipLogits:
        return ClipLogits(*self.head(self.features(pixels)).split((DIGITS, DIRECTIONS, SPEEDS), dim=1))


@dataclass(frozen=True)
class VideoJudges:
    """The two judges, frozen."""

    frame: FrameJudge
    clip: ClipJudge


@dataclass(frozen=True)
class JudgesRecord:
    """How judges were made. Accuracies are fractions in [0, 1] on clips of held-out digits, measured once at the end;
    `digit` is that of the mean logits over the frames of a clip, `frame_digit` that of single frames.
    """

    seed: int
    steps: int
    test_clips: int
    digit: float
    frame_digit: float
    direction: float
    speed: float
    seconds: float
    torch_version: str
    command: str


def frames_of(pixels: Tensor) -> Tensor:
    """Frames [B F, 3, H, W] of clips [B, 3, F, H, W], clip after clip."""
    return pixels.transpose(1, 2).flatten(0, 1)


def frame_logits(judge: FrameJudge, pixels: Tensor) -> Tensor:
    """Digit logits [B, F, 10] of each frame."""
    logits = torch.cat([judge(part) for part in frames_of(pixels).split(512)])
    return logits.unflatten(0, (len(pixels), -1))


def clip_logits(judge: ClipJudge, pixels: Tensor) -> ClipLogits:
    """The clip judge on clips [B, 3, F, 32, 32] by their first 25 frames."""
    parts = [judge(part) for part in pixels[:, :, :CLIP_FRAMES].split(128)]
    return ClipLogits(
        torch.cat([part.digits for part in parts]),
        torch.cat([part.directions for part in parts]),
        torch.cat([part.speeds for part in parts]),
    )


def _roughen(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Brightness by 15 % and noise, so that small faults of a decoder do not confuse a judge."""
    gain = 1.0 + 0.15 * (2.0 * torch.rand(len(pixels), generator=generator) - 1.0)
    noise = 0.05 * torch.rand(len(pixels), generator=generator)
    shape = (-1, *[1] * (pixels.ndim - 1))
    rough = pixels * gain.view(shape) + noise.view(shape) * torch.randn(pixels.shape, generator=generator)
    return rough.clamp(0.0, 1.0)


def _loss(judges: VideoJudges, clips: MovingDigits, generator: torch.Generator) -> Tensor:
    pixels = _roughen(clips.pixels, generator)
    said = judges.clip(pixels)
    chosen = torch.randint(pixels.shape[2], (FRAMES_SEEN,), generator=generator)
    frames = frames_of(pixels[:, :, chosen])
    pairs = (
        (judges.frame(frames), clips.labels.repeat_interleave(FRAMES_SEEN)),
        (said.digits, clips.labels),
        (said.directions, clips.directions),
        (said.speeds, clips.speeds),
    )
    losses = [F.cross_entropy(logits, target, label_smoothing=LABEL_SMOOTHING) for logits, target in pairs]
    return torch.stack(losses).sum()


@torch.no_grad()
def judge_accuracies(judges: VideoJudges, clips: MovingDigits) -> tuple[float, float, float, float]:
    """(digit by clip, digit by frame, direction, speed) as fractions of right answers on clips."""
    by_frame, said = frame_logits(judges.frame, clips.pixels), clip_logits(judges.clip, clips.pixels)
    right = (
        by_frame.mean(dim=1).argmax(dim=-1) == clips.labels,
        by_frame.argmax(dim=-1) == clips.labels[:, None],
        said.directions.argmax(dim=1) == clips.directions,
        said.speeds.argmax(dim=1) == clips.speeds,
    )
    digit, frame_digit, direction, speed = (hits.double().mean().item() for hits in right)
    return digit, frame_digit, direction, speed


def train_judges(
    seed: int = 0,
    steps: int = 700,
    *,
    test_clips: int = TEST_CLIPS,
    command: str = "",
    show_progress: bool = False,
) -> tuple[VideoJudges, JudgesRecord]:
    """Train on moving training digits alone and measure on held-out ones once, at the end.

    The result depends on (seed, steps) alone. Raises ValueError for less than one step.
    """
    if steps < 1:
        raise ValueError(f"steps is {steps}; use at least 1")
    started = time.monotonic()
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        judges = VideoJudges(FrameJudge(), ClipJudge())
    parameters = [*judges.frame.parameters(), *judges.clip.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=LEARNING_RATE, total_steps=steps, pct_start=0.1)
    for step in tqdm(range(steps), desc="video judges", unit="step", disable=not show_progress):
        first = FIRST_TRAINING_CLIP + step * BATCH
        loss = _loss(judges, moving_digits("train", seed=seed, indices=range(first, first + BATCH)), generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    for judge in (judges.frame, judges.clip):
        judge.requires_grad_(False).eval()
    digit, frame_digit, direction, speed = judge_accuracies(judges, held_out_clips(test_clips, seed=seed))
    record = JudgesRecord(
        seed=seed,
        steps=steps,
        test_clips=test_clips,
        digit=digit,
        frame_digit=frame_digit,
        direction=direction,
        speed=speed,
        seconds=round(time.monotonic() - started, 1),
        torch_version=torch.__version__,
        command=command,
    )
    return judges, record


def held_out_clips(count: int, *, seed: int = 0) -> MovingDigits:
    """The first `count` clips of held-out digits on which judges are tested, and with which clips are compared."""
    return moving_digits("test", seed=seed, indices=range(FIRST_TEST_CLIP, FIRST_TEST_CLIP + count))


def save_judges(judges: VideoJudges, record: JudgesRecord, *, path: str | Path) -> None:
    """Write weights (safetensors) and record (JSON) into the folder `path`."""
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    named = (("frame", judges.frame), ("clip", judges.clip))
    tensors = {f"{name}.{key}": value.contiguous() for name, net in named for key, value in net.state_dict().items()}
    save_file(tensors, folder / WEIGHTS_FILE)
    (folder / RECORD_FILE).write_text(json.dumps(asdict(record), indent=2) + "\n", encoding="ascii")


def load_judges(path: str | Path) -> VideoJudges:
    """The frozen judges saved in the folder `path`. Raises ValueError when their weights are missing."""
    weights = Path(path) / WEIGHTS_FILE
    if not weights.is_file():
        raise ValueError(
            f"no weights of judges at {weights}; train them with "
            f"`python scripts/make_digits_judge.py clips --output {Path(path)}`"
        )
    tensors = load_file(weights)
    judges = VideoJudges(FrameJudge(), ClipJudge())
    for name, net in (("frame", judges.frame), ("clip", judges.clip)):
        mine = {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}
        net.load_state_dict(mine)
        net.requires_grad_(False).eval()
    return judges
