"""Trained networks that are made of a teacher: the student, and the fake score with its heads."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import yaml
from torch import nn

from fewstep.core.denoiser import Denoiser
from fewstep.core.fake_score import FakeScore
from fewstep.core.families.family import Family
from fewstep.core.networks.adapters import load_adapters, merge_stored_adapters
from fewstep.core.networks.exit_shift import ExitShift
from fewstep.core.networks.lora import add_lora, matching_layers
from fewstep.core.settings import FakeScoreConfig, TrainedConfig
from fewstep.core.teacher import Teacher
from fewstep.core.training.run_directory import CONFIG_FILE
from fewstep.core.weights import StoredWeights, find_weights, load_weights

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


def build_fake_score(
    settings: FakeScoreConfig, teacher: Teacher, weights: StoredWeights | None, *, seed: int, exits: int = 0
) -> FakeScore:
    """The fake score without a discriminator: see `build_denoiser`; from these weights, if any (`find_fake_score`).

    It is told one of so many `exits` of the student, or none where there are 0.
    """
    denoiser = build_denoiser(settings, teacher, None, seed=seed + 1)
    fake_score = FakeScore(denoiser, exit_shift=ExitShift(denoiser.network, exits) if exits else None)
    if weights is not None:
        load_fake_score(fake_score, weights, alpha=settings.lora_alpha)
    return fake_score


def find_fake_score(settings: FakeScoreConfig | None) -> StoredWeights | None:
    """The weights that `fake_score.init` names. Raises ValueError for a run that has no fake score."""
    if settings is None or settings.init is None:
        return None
    found = find_weights(settings.init, "fake_score.init")
    if found.checkpoint is None:
        return found
    file = found.beside("fake_score")
    if file is None:
        raise ValueError(f"fake_score.init {settings.init} is a run without a fake score: give one of train_dmd")
    return StoredWeights(found.key, found.source, (file,), run=found.run)


def load_fake_score(fake_score: FakeScore, weights: StoredWeights, *, alpha: float) -> None:
    """Load stored weights into a fake score in place: of a fake score, whose heads are left out, of a network, or
    adapters such as a teacher's LoRA, which were trained at this alpha.

    Raises:
        ValueError: they are not exactly this network's weights, or adapters where all weights are trained, or the other
            way round.
    """
    prefix = "denoiser.network."
    trained = {
        name: p for name, p in fake_score.named_parameters() if p.requires_grad and not name.startswith("heads.")
    }
    if not any(name.startswith(prefix) for name in weights.names()):
        if weights.holds_adapters and any(".lora_" in name for name in trained):
            load_adapters(fake_score.denoiser.network, weights, alpha=alpha)
        else:
            load_weights(fake_score.denoiser.network, weights)
        return
    tables = {name for name, _ in fake_score.named_buffers()}
    found = {name: t for name, t in weights.tensors().items() if not name.startswith("heads.") and name not in tables}
    told = {name for name in found if name.startswith("exit_shift.")}
    if not told:
        # One that was told nothing is one with shifts of zero.
        trained = {name: p for name, p in trained.items() if not name.startswith("exit_shift.")}
    elif fake_score.exit_shift is None:
        raise ValueError(
            f"{weights.key} {weights.source}: its fake score is told the student's exit, and this one is not: set "
            "fake_score.told_exit where there is one, or give another fake_score.init, such as the teacher's model"
        )
    wrong = sorted(name for name in found.keys() & trained.keys() if found[name].shape != trained[name].shape)
    missing, unknown = sorted(trained.keys() - found.keys()), sorted(found.keys() - trained.keys())
    if missing or unknown or wrong:
        raise ValueError(
            f"{weights.files[0]} does not fit this fake score: {len(missing)} weights missing {missing[:3]}, "
            f"{len(unknown)} unknown {unknown[:3]}, {len(wrong)} of another shape {wrong[:3]}; {weights.key} must be "
            "of the same network and LoRA settings"
        )
    if any(".lora_" in name for name in trained):
        require_same_alpha(weights, alpha)
    with torch.no_grad():
        for name, weight in trained.items():
            weight.copy_(found[name])


def require_same_alpha(weights: StoredWeights, alpha: float) -> None:
    """Raise ValueError where the run of a fake score says that its adapters were trained at another scale."""
    file = weights.files[0].resolve().parent.parent / CONFIG_FILE
    section = yaml.safe_load(file.read_text(encoding="utf-8")).get("fake_score") if file.is_file() else None
    known = None if section is None else section.get("lora_alpha")
    if known is not None and float(known) != alpha:
        raise ValueError(
            f"{weights.key} {weights.source}: its fake score was trained with lora_alpha {known}, and "
            f"fake_score.lora_alpha is {alpha}"
        )
