"""What an MCM run has beside the parts of other consistency runs: a motion head, discriminator heads, and pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fewstep.consistency.mcm.config import McmConfig
from fewstep.consistency.mcm.motion_head import MotionHead
from fewstep.core.config import OptimizerConfig
from fewstep.core.data import LatentDataset, LatentSource, PromptConditions
from fewstep.core.discriminator import build_heads
from fewstep.core.teacher import Teacher
from fewstep.core.training.ema import EmaSettings
from fewstep.core.training.roles import Role
from fewstep.core.training.trainer import Trainer

# Another order than that of prompts, data and pairs, whose seeds are the run's, plus 1 and plus 2.
PICTURE_SEED = 3


@dataclass(frozen=True)
class McmParts:
    """The learned motion map (None for fixed maps), the discriminator (None without), and the pictures it sees."""

    motion_role: Role | None
    heads_role: Role | None
    pictures: LatentSource | None


def build_mcm(
    mcm: McmConfig,
    trainer: Trainer,
    *,
    student_optimizer: OptimizerConfig,
    teacher: Teacher,
    shape: tuple[int, ...],
    pictures: LatentDataset | None,
    embed: Callable[[Sequence[str]], PromptConditions],
) -> McmParts:
    """Make the heads and hand them to the trainer; the motion head learns at the student's rate.

    Raises:
        ValueError: the teacher makes no videos, there are fewer latent frames than are judged, the pictures are of
            another shape, or the network has no such blocks.
    """
    if len(shape) != 4:
        raise ValueError(
            f"{teacher.path} makes pictures, latents {shape}; mcm distils motion: give a teacher of videos"
        )
    judged = mcm.discriminator
    if judged is not None and judged.pictures is None and judged.frames > shape[1]:
        raise ValueError(
            f"mcm.discriminator.frames is {judged.frames} of {shape[1]} latent frames; judge as many at most"
        )
    channels, _, height, width = shape
    expected = (channels, 1, height, width)
    if pictures is not None and tuple(pictures.latents.shape[1:]) != expected:
        raise ValueError(
            f"mcm.discriminator.pictures holds latents of shape {tuple(pictures.latents.shape[1:])}, this run judges "
            f"{expected}: encode pictures as videos of one frame (scripts/encode_videos.py --frames 1) at the size of "
            "the run"
        )
    seed, motion_role, heads_role = trainer.run.seed, None, None
    if mcm.motion == "learned":
        head = MotionHead(channels, width=mcm.motion_width, seed=seed)
        motion_role = trainer.add_role("motion", head, student_optimizer, ema=EmaSettings(mcm.motion_ema_decay))
    if judged is not None:
        heads = build_heads(teacher.denoiser, judged.blocks, width=judged.head_width, seed=seed)
        heads_role = trainer.add_role("heads", heads, judged.optimizer)
    source = None
    if pictures is not None:
        source = LatentSource(pictures, embed(pictures.prompts), seed + PICTURE_SEED)
    return McmParts(motion_role, heads_role, source)
