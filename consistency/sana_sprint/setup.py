"""What a SANA-Sprint run has in place of the other consistency runs' parts: student, prompts, heads, and step grid."""

from __future__ import annotations

from typing import Any

from fewstep.consistency.sana_sprint.config import SprintConfig
from fewstep.core.data import LatentDataset
from fewstep.core.denoiser import Denoiser
from fewstep.core.discriminator import build_heads
from fewstep.core.families.sana import SanaFamily
from fewstep.core.families.sana_control import SanaControlFamily
from fewstep.core.networks.build import build_denoiser
from fewstep.core.networks.projected_heads import ProjectedHeads
from fewstep.core.networks.sana_networks import with_guidance_embedding
from fewstep.core.settings import StudentConfig
from fewstep.core.teacher import Teacher
from fewstep.core.training.roles import Role
from fewstep.core.training.trainer import Trainer
from fewstep.core.weights import StoredWeights, load_weights

# A step of the student, then one of the discriminator.
CYCLE = 2


def check_sprint_teacher(teacher: Teacher, *, controlled: bool) -> None:
    """Raise ValueError unless the teacher is a many-step SANA with dense time, which the exported pipeline calls.

    `controlled` says whether it must have a ControlNet or must have none.
    """
    family = teacher.family
    if not isinstance(family, SanaFamily):
        raise ValueError(
            f"{teacher.path} is of the family {family.name!r}; sana_sprint distils a SanaPipeline: use scm, rcm or "
            "another method for it"
        )
    if family.sprint:
        raise ValueError(f"{teacher.path} is a few-step SANA-Sprint already: give the SanaPipeline it was made from")
    if isinstance(family, SanaControlFamily) != controlled:
        raise ValueError(
            f"{teacher.path} has {'no' if controlled else 'a'} ControlNet and sana_sprint.control is "
            f"{'set' if controlled else 'empty'}: a ControlNet needs the latents of the pictures it follows"
        )
    if family.time_scale != 1:
        raise ValueError(
            f"{teacher.path} calls its network at {family.time_scale:g} t and not at t, which makes its tangent as "
            "many times larger: fine-tune it with fine_tune_teacher of consistency/sana_sprint/teacher.py first"
        )


def build_sprint_student(settings: StudentConfig, teacher: Teacher, init: StoredWeights | None) -> Denoiser:
    """A trainable fp32 copy of the teacher's network with guidance as an input, from `init` if given.

    With a ControlNet, both networks are trained, and there is no guidance input.

    Raises:
        ValueError: `init` does not hold exactly this network's weights, the guidance embedding included.
    """
    if isinstance(teacher.family, SanaControlFamily):
        return build_denoiser(settings, teacher, init, seed=0)
    network: Any = teacher.denoiser.network
    denoiser = Denoiser(with_guidance_embedding(network).float(), teacher.family)
    denoiser.requires_grad_(True)
    if init is not None:
        load_weights(denoiser.network, init)
    if settings.gradient_checkpointing:
        denoiser.network.enable_gradient_checkpointing()  # pyright: ignore[reportCallIssue]
    return denoiser


def add_heads(sprint: SprintConfig, teacher: Teacher, trainer: Trainer) -> Role | None:
    """The discriminator's heads on the frozen teacher's features as a role; None without the section discriminator.

    Raises:
        ValueError: the network has no such blocks.
    """
    settings = sprint.discriminator
    if settings is None:
        return None
    if settings.head == "projected":
        channels = teacher.family.feature_channels(teacher.denoiser.network, settings.blocks)
        heads = ProjectedHeads(channels, seed=trainer.run.seed)
    else:
        heads = build_heads(teacher.denoiser, settings.blocks, width=settings.head_width, seed=trainer.run.seed)
    return trainer.add_role("heads", heads, settings.optimizer, every=CYCLE)


def check_control(control: LatentDataset | None, real: LatentDataset) -> None:
    """Raise ValueError unless there is one control picture of the data's shape for each of the data, if any."""
    if control is not None and control.latents.shape != real.latents.shape:
        raise ValueError(
            f"sana_sprint.control holds latents {tuple(control.latents.shape)}, data.latents "
            f"{tuple(real.latents.shape)}: give the control picture of each of the data, in their order"
        )
