"""A trained network with all that belongs to it: optimizer, warmup, average, and how they are saved."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.core.config import OptimizerConfig
from fewstep.core.networks.quantised import parts_of
from fewstep.core.training.ema import Ema
from fewstep.core.training.optimizer_state import load_optimizer, optimizer_to_tensors


@dataclass(kw_only=True)
class Role:
    """One network in training: `module` is bare, `wrapped` reduces gradients over processes when there are several.

    `parameters` are those that were trainable when the role was made; freezing them for a while changes nothing.
    `buffers` are saved with them. `updates` counts optimizer steps, and with them warmup, decay and EMA; the whole run
    has `total_updates`.
    """

    name: str
    module: nn.Module
    wrapped: nn.Module
    optimizer: torch.optim.Optimizer
    parameters: tuple[tuple[str, nn.Parameter], ...]
    buffers: Mapping[str, Tensor]
    settings: OptimizerConfig
    ema: Ema | None
    total_updates: int
    updates: int = 0


@dataclass(frozen=True, kw_only=True)
class RoleMemory:
    """Parameters of a network, and the bytes its training keeps on this process (activations not included)."""

    name: str
    parameters: int
    trainable: int
    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    ema_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.weight_bytes + self.gradient_bytes + self.optimizer_bytes + self.ema_bytes


def trainable_parameters(name: str, module: nn.Module, *, half: bool = False) -> tuple[tuple[str, nn.Parameter], ...]:
    """Named parameters with requires_grad.

    Raises:
        ValueError: there are none, or one is held in half precision, where `half` does not say that it may be
            (optimizer steps are rounded away).
    """
    found = tuple((key, parameter) for key, parameter in module.named_parameters() if parameter.requires_grad)
    if not found:
        raise ValueError(f"role {name}: no parameter requires a gradient; unfreeze the network or its LoRA")
    for key, parameter in found:
        if parameter.dtype in (torch.float16, torch.bfloat16) and not half:
            raise ValueError(
                f"role {name}: parameter {key} is {parameter.dtype}; keep trained weights in fp32 "
                "and set run.mixed_precision instead"
            )
    return found


def scheduled_rate(settings: OptimizerConfig, updates: int, *, total: int) -> float:
    """Learning rate of the update that follows `updates` earlier ones of `total`.

    Linear warmup, full from number `warmup_steps` on. With x = updates / total and the floor f, times
    f + (1 - f) (1 + cos(pi x)) / 2 (cosine) or f + (1 - f) (1 - x) (linear); with inverse_sqrt times
    1 / sqrt(max(1, updates / decay_start)), as in EDM2 (arXiv:2312.02696).
    """
    rate = settings.learning_rate
    if settings.warmup_steps > 0:
        rate *= min(1.0, (updates + 1) / settings.warmup_steps)
    done, floor = min(1.0, updates / total), settings.decay_floor
    match settings.decay:
        case "cosine":
            rate *= floor + (1.0 - floor) * (0.5 * (1.0 + math.cos(math.pi * done)))
        case "linear":
            rate *= floor + (1.0 - floor) * (1.0 - done)
        case "inverse_sqrt":
            rate /= math.sqrt(max(1.0, updates / settings.decay_start))
        case "none":
            pass
    return rate


def first_non_finite_gradient(parameters: Iterable[tuple[str, nn.Parameter]]) -> str | None:
    """Name of the first parameter whose gradient holds NaN or infinity."""
    for name, parameter in parameters:
        if parameter.grad is not None and not bool(torch.isfinite(parameter.grad).all()):
            return name
    return None


def apply_gradients(role: Role, total_norm: Tensor, *, scaler: torch.amp.GradScaler | None) -> bool:  # pyright: ignore
    """Clip, step at the scheduled rate, clear gradients, update the EMA; False if fp16 skipped the step."""
    if role.settings.clip is not None:
        parameters = [parameter for _, parameter in role.parameters]
        torch.nn.utils.clip_grads_with_norm_(parameters, role.settings.clip, total_norm)
    rate = scheduled_rate(role.settings, role.updates, total=role.total_updates)
    for group in role.optimizer.param_groups:
        group["lr"] = rate
    stepped = True
    if scaler is None:
        role.optimizer.step()
    else:
        scaler.step(role.optimizer)
        scaler.update()
        stepped = bool(torch.isfinite(total_norm))
    role.optimizer.zero_grad(set_to_none=True)
    if stepped:
        if role.ema is not None:
            role.ema.update(role.updates)
        role.updates += 1
    return stepped


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Let gradients flow through a module to its input without collecting any in its parameters.

    For the fake score inside the student's loss: call the bare module in the block, not the wrapped one.
    """
    thawed = [parameter for parameter in module.parameters() if parameter.requires_grad]
    try:
        for parameter in thawed:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in thawed:
            parameter.requires_grad_(True)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Keep what follows a network's calls in training mode, such as spectral norms, as it is."""
    training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(training)


def role_to_tensors(role: Role) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Files of a role for a checkpoint: weights, EMA, optimizer; and its JSON state. Frozen weights are not saved."""
    tensors, description = optimizer_to_tensors(role.optimizer)
    files = {role.name: _saved_weights(role), f"{role.name}_optimizer": tensors}
    if role.ema is not None:
        files[f"{role.name}_ema"] = role.ema.state_dict()
    return files, {"updates": role.updates, "ema": role.ema is not None, "optimizer": description}


@torch.no_grad()
def load_role(role: Role, files: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> None:
    """Restore what `role_to_tensors` gave, bit for bit.

    The learning rate, warmup, clip and EMA decay are those of this run's configuration.

    Raises:
        ValueError: names, shapes or dtypes differ from this role's, or only one side has an EMA.
    """
    weights, saved = _saved_weights(role), files[role.name]
    # Runs before this kept frozen tables beside their adapters.
    tables = {name for name, _ in role.module.named_buffers()} - weights.keys()
    saved = {name: tensor for name, tensor in saved.items() if name not in tables}
    if weights.keys() != saved.keys():
        missing, unexpected = sorted(weights.keys() - saved.keys()), sorted(saved.keys() - weights.keys())
        raise ValueError(
            f"role {role.name}: checkpoint lacks {len(missing)} tensors {missing[:3]} and has {len(unexpected)} "
            f"others {unexpected[:3]}; resume with the same network and LoRA setting"
        )
    for name, tensor in weights.items():
        if tensor.shape != saved[name].shape or tensor.dtype != saved[name].dtype:
            given, here = saved[name], tensor
            raise ValueError(
                f"role {role.name}: {name} is {tuple(given.shape)} {given.dtype} in the checkpoint "
                f"and {tuple(here.shape)} {here.dtype} here; resume with the same network"
            )
    if state["ema"] != (role.ema is not None):
        raise ValueError(f"role {role.name}: EMA in checkpoint: {state['ema']}, in this run: {role.ema is not None}")
    load_optimizer(role.optimizer, files[f"{role.name}_optimizer"], state["optimizer"])
    for name, tensor in weights.items():
        tensor.copy_(saved[name])
    if role.ema is not None:
        averages = files[f"{role.name}_ema"].items()
        role.ema.load_state_dict({name: tensor for name, tensor in averages if name not in tables})
    role.updates = state["updates"]


def _saved_weights(role: Role) -> dict[str, Tensor]:
    return {**dict(role.parameters), **role.buffers}


def memory_of_role(role: Role, counted: set[int]) -> RoleMemory:
    """Memory of a trained network; AdamW's two moments are counted before the first step, too.

    Weights whose addresses are in `counted` belong to a network that is counted already; those of this one join them.
    """
    trainable = [parameter for _, parameter in role.parameters]
    trainable_bytes = _bytes(trainable)
    return RoleMemory(
        name=role.name,
        parameters=sum(parameter.numel() for parameter in role.module.parameters()),
        trainable=sum(parameter.numel() for parameter in trainable),
        weight_bytes=_new_bytes(role.module, counted),
        gradient_bytes=trainable_bytes,
        optimizer_bytes=2 * trainable_bytes,
        ema_bytes=0 if role.ema is None else _bytes(role.ema.state_dict().values()),
    )


def memory_of_frozen(name: str, module: nn.Module, counted: set[int]) -> RoleMemory:
    """Memory of a network that is only evaluated, such as the teacher; `counted` as in `memory_of_role`."""
    return RoleMemory(
        name=name,
        parameters=sum(parameter.numel() for parameter in module.parameters()),
        trainable=0,
        weight_bytes=_new_bytes(module, counted),
        gradient_bytes=0,
        optimizer_bytes=0,
        ema_bytes=0,
    )


def memory_table(rows: Sequence[RoleMemory]) -> str:
    """A plain text table, one network a line and a sum, in millions of parameters and MiB."""
    titles = ("role", "params M", "trained M", "weights", "gradients", "optimizer", "EMA", "MiB")
    lines = [f"{titles[0]:<12}" + "".join(f"{title:>11}" for title in titles[1:])]
    for row in rows:
        counts = [row.parameters / 1e6, row.trainable / 1e6]
        sizes = [row.weight_bytes, row.gradient_bytes, row.optimizer_bytes, row.ema_bytes, row.total_bytes]
        numbers = [*counts, *(size / 2**20 for size in sizes)]
        lines.append(f"{row.name:<12}" + "".join(f"{number:>11.2f}" for number in numbers))
    total = sum(row.total_bytes for row in rows) / 2**20
    lines.append(f"{'all':<12}" + " " * 66 + f"{total:>11.2f}")
    return "\n".join(lines)


def _new_bytes(module: nn.Module, counted: set[int]) -> int:
    """Bytes of the weights and buffers of a module that no network before it holds."""
    tensors = (part for tensor in (*module.parameters(), *module.buffers()) for part in parts_of(tensor))
    held = {tensor.data_ptr(): tensor for tensor in tensors}
    fresh = held.keys() - counted
    counted |= fresh
    return _bytes(held[place] for place in fresh)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@torch.no_grad()
def inject_student(fake_weights: Iterable[Tensor], student_weights: Iterable[Tensor], *, decay: float) -> None:
    """fake <- decay fake + (1 - decay) student, in place, after each student update.

    Keeps the fake score close to a student that moves fast. It moves it off its own optimum, since a sampler is no
    denoiser, so compare scores only after the next update of the fake score. The paper's decay was not found.

    Raises:
        ValueError: decay is outside [0, 1], or the weights do not correspond.
    """
    if not 0 <= decay <= 1:
        raise ValueError(f"decay must lie in [0, 1], got {decay}; 1 leaves the fake score alone")
    fakes, students = list(fake_weights), list(student_weights)
    if [w.shape for w in fakes] != [w.shape for w in students]:
        raise ValueError(
            f"fake score ({len(fakes)} tensors) and student ({len(students)}) do not have the same weights; "
            "inject adapters of the same rank, or whole networks"
        )
    for fake, student in zip(fakes, students, strict=True):
        fake.lerp_(student.to(fake), 1 - decay)
