"""Trained networks that are made of a teacher: the student, and the fake score with its heads."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from fewstep.core.denoiser import Denoiser
from fewstep.core.discriminator import build_heads
from fewstep.core.fake_score import FakeScore
from fewstep.core.families.family import Family
from fewstep.core.networks.adapters import load_adapters, merge_stored_adapters
from fewstep.core.networks.lora import add_lora, matching_layers
from fewstep.core.settings import FakeScoreConfig, TrainedConfig
from fewstep.core.teacher import Teacher
from fewstep.core.weights import StoredWeights, load_weights

HEAD_WIDTH = 128


def build_denoiser(settings: TrainedConfig, teacher: Teacher, init: StoredWeights | None, *, seed: int) -> Denoiser:
    """A network to train: an fp32 copy of the base, or fp32 adapters on its very weights; the base is the teacher's
    network, or that of the model at `settings.path`.

    Adapters cost no second base: several roles of one teacher, and the teacher itself, hold the same frozen tensors, in
    the dtype of the teacher. `init` are weights to start from, or adapters; adapters are merged where all weights are
    trained, and otherwise trained on.

    Raises:
        ValueError: `init` does not fit, or gives a base to new adapters, with which alone an export could do nothing.
    """
    if settings.lora_rank == 0:
        denoiser = teacher.base(settings.path).copy().float()
        if init is not None and init.holds_adapters:
            merge_stored_adapters(denoiser.network, init)
        elif init is not None:
            load_weights(denoiser.network, init)
    else:
        if init is not None and not init.holds_adapters:
            raise ValueError(
                f"{init.key} {init.source} with lora_rank {settings.lora_rank}: adapters are saved without the weights "
                "under them. Set lora_rank to 0, or export the first student and give it as teacher.path"
            )
        denoiser = teacher.base(settings.path).beside()
        add_adapters(denoiser.network, settings, teacher.family, seed=seed)
        if init is not None:
            load_adapters(denoiser.network, init, alpha=settings.lora_alpha)
    if settings.gradient_checkpointing:
        denoiser.network.enable_gradient_checkpointing()  # pyright: ignore[reportCallIssue]
    return denoiser


def add_adapters(network: nn.Module, settings: TrainedConfig, family: Family, *, seed: int) -> None:
    """The adapters of a role, in place. Raises ValueError as `add_lora`."""
    add_lora(
        network,
        rank=settings.lora_rank,
        alpha=settings.lora_alpha,
        targets=adapted_layers(network, family, settings.lora_targets),
        seed=seed,
        start=settings.lora_start,
    )


def adapted_layers(network: nn.Module, family: Family, given: Sequence[str]) -> tuple[str, ...]:
    """Ends of the names of the layers that `lora_targets` means."""
    if len(given) == 0:
        return family.lora_targets
    return matching_layers(network) if tuple(given) == ("all",) else tuple(given)


def build_fake_score(settings: FakeScoreConfig, teacher: Teacher, *, seed: int, with_heads: bool) -> FakeScore:
    """The fake score: see `build_denoiser`; with discriminator heads if asked."""
    trunk = build_denoiser(settings, teacher, None, seed=seed + 1)
    heads = build_heads(trunk, None, width=HEAD_WIDTH, seed=seed) if with_heads else None
    return FakeScore(trunk, heads=heads)
