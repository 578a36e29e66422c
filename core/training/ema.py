"""Exponential moving average of weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from fewstep.core.settings import StudentConfig


@dataclass(frozen=True)
class EmaSettings:
    """How an average is taken: see `Ema`; `length` is the relative length of a power average, None for one decay."""

    decay: float = 0.0
    start: int = 0
    length: float | None = None
    every: int = 1

    @staticmethod
    def of_student(settings: StudentConfig) -> EmaSettings:
        """The average that a student's settings ask for."""
        length = settings.ema_length if settings.ema_kind == "power" else None
        return EmaSettings(settings.ema_decay, settings.ema_start, length, settings.ema_every)

    def of(self, module: nn.Module) -> Ema:
        """The average of a module."""
        power = None if self.length is None else power_of_length(self.length)
        return Ema(module, self.decay, start_step=self.start, power=power, every=self.every)


def power_of_length(length: float) -> float:
    """gamma of the power average whose standard deviation is that share of the run (EDM2): the real root of
    length^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)).

    Raises:
        ValueError: there is none above 0, for a length outside (0, 0.28).
    """
    if not 0 < length < 0.28:
        raise ValueError(f"the relative length of an average must lie between 0 and 0.28, got {length}")
    inverse = length**-2
    roots = np.roots([1, 7, 16 - inverse, 12 - inverse])
    return float(max(root.real for root in roots if abs(root.imag) < 1e-6))


class Ema:
    """fp32 running average of the trainable parameters and saved floating buffers of a module (fp64 ones stay fp64).

    shadow <- decay shadow + (1 - decay) live, from `start_step` on; before that the shadow is the live weights. With
    `power` gamma the decay of update n is (1 - 1 / n)^(gamma + 1) (EDM2, arXiv:2312.02696, Sec. 3.1), n counted from
    `start_step`, and `decay` is not read. With `every` k only each k-th update from `start_step` on is taken in, and n
    counts those. What is trainable is decided once, at construction; freezing a parameter for
    a while later changes nothing. Give the bare module, not a distributed wrapper.

    Raises:
        ValueError: decay is outside [0, 1), start_step is negative, or every is below 1.
    """

    def __init__(
        self, module: nn.Module, decay: float, *, start_step: int = 0, power: float | None = None, every: int = 1
    ) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay must lie in [0, 1), got {decay}; 0 keeps the live weights")
        if start_step < 0:
            raise ValueError(f"start_step must not be negative, got {start_step}")
        if every < 1:
            raise ValueError(f"every must be at least 1, got {every}")
        self.decay = decay
        self.power = power
        self.start_step = start_step
        self.every = every
        self._module = module
        trainable = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
        floating = {name for name, buffer in stored_buffers(module).items() if buffer.dtype.is_floating_point}
        live = _tensors(module)
        self._shadow = {name: _averaged(tensor) for name, tensor in live.items() if name in trainable | floating}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the live weights after optimizer step `step` (counted from 0)."""
        count = step - self.start_step
        if count >= 0 and (count + 1) % self.every:
            return
        live = _tensors(self._module)
        decay = self.decay_of(count // self.every)
        for name, shadow in self._shadow.items():
            if shadow.device != live[name].device:
                shadow = self._shadow[name] = shadow.to(live[name].device)
            if step < self.start_step:
                shadow.copy_(live[name])
            else:
                shadow.lerp_(live[name].to(shadow.dtype), 1 - decay)

    def decay_of(self, update: int) -> float:
        """The decay of an update, counted from 0 at `start_step`."""
        return self.decay if self.power is None else (1 - 1 / (max(update, 0) + 1)) ** (self.power + 1)

    @torch.no_grad()
    def copy_to(self, module: nn.Module) -> None:
        """Write the average into a module of the same structure, rounded to its dtypes; other weights stay.

        Raises:
            ValueError: the module lacks an averaged tensor or holds it in another shape.
        """
        target = _tensors(module)
        for name, shadow in self._shadow.items():
            if name not in target or target[name].shape != shadow.shape:
                found = "no such tensor" if name not in target else f"shape {tuple(target[name].shape)}"
                raise ValueError(f"the average holds {name} {tuple(shadow.shape)}, the module has {found}")
        for name, shadow in self._shadow.items():
            target[name].copy_(shadow)

    @contextmanager
    def applied(self, module: nn.Module) -> Iterator[None]:
        """Use the averaged weights in `module` inside the block; the live ones return bit for bit, also on an error."""
        target = _tensors(module)
        kept = {name: target[name].detach().clone() for name in self._shadow if name in target}
        try:
            self.copy_to(module)
            yield
        finally:
            with torch.no_grad():
                for name, tensor in kept.items():
                    target[name].copy_(tensor)

    def state_dict(self) -> dict[str, Tensor]:
        """The averaged tensors by parameter name: tensors only, so safetensors can hold it. They are not copies."""
        return dict(self._shadow)

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state_dict` gave.

        Raises:
            ValueError: names or shapes differ from those averaged here.
        """
        missing, unexpected = sorted(self._shadow.keys() - state.keys()), sorted(state.keys() - self._shadow.keys())
        if missing or unexpected:
            raise ValueError(
                f"EMA state does not fit: {len(missing)} missing {missing[:3]}, "
                f"{len(unexpected)} unexpected {unexpected[:3]}; was it saved from another network or LoRA setting?"
            )
        for name, shadow in self._shadow.items():
            if state[name].shape != shadow.shape:
                raise ValueError(f"EMA state {name} has shape {tuple(state[name].shape)}, not {tuple(shadow.shape)}")
        for name, shadow in self._shadow.items():
            shadow.copy_(state[name])


def stored_buffers(module: nn.Module) -> dict[str, Tensor]:
    """The buffers that belong into a file of a network's weights, by name.

    Not those that are computed and not saved (Wan's rotary tables), and none of a network with adapters: its tables
    belong to the frozen weights under them, which are stored elsewhere.
    """
    if any(isinstance(layer, LoraLayer) for layer in module.modules()):
        return {}
    kept = module.state_dict().keys()
    return {name: buffer for name, buffer in module.named_buffers() if name in kept}


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _averaged(tensor: Tensor) -> Tensor:
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32), copy=True).contiguous()
