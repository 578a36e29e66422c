"""The state of a torch optimizer as tensors and JSON, and back, so that no checkpoint needs pickle."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor


def optimizer_to_tensors(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """State tensors named `<parameter number>.<name>`, and everything else as JSON values.

    What bitsandbytes keeps in a mapping of its own is named `<parameter number>.<mapping>/<name>`.

    Raises:
        ValueError: the optimizer keeps something that is neither a tensor nor a JSON value.
    """
    state = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, Any] = {}
    for index, entries in state["state"].items():
        for name, value in _flat(entries):
            if isinstance(value, Tensor):
                tensors[f"{index}.{name}"] = value
            else:
                numbers[f"{index}.{name}"] = _plain(value, where=f"state {name} of parameter {index}")
    groups = [
        {name: _plain(value, where=f"option {name}") for name, value in group.items()}
        for group in state["param_groups"]
    ]
    kind = type(optimizer).__name__
    return tensors, {"optimizer": kind, "groups": groups, "numbers": numbers, "tensors": sorted(tensors)}


def load_optimizer(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], description: Mapping[str, Any]
) -> None:
    """Restore what `optimizer_to_tensors` gave into an optimizer over the same parameters, bit for bit.

    Raises:
        ValueError: another kind of optimizer, other groups, parameters, options or shapes; nothing is changed then.
    """
    current = optimizer.state_dict()["param_groups"]
    _check_fits(optimizer, tensors, description)
    groups = []
    for group, saved in zip(current, description["groups"], strict=True):
        groups.append(
            {name: tuple(value) if isinstance(group[name], tuple) else value for name, value in saved.items()}
        )
    state: dict[int, dict[str, Any]] = {}
    # Copies: the optimizer writes into its state in place, and the checkpoint stays as it was read.
    copies = {key: tensor.clone() for key, tensor in tensors.items()}
    for key, value in [*copies.items(), *description["numbers"].items()]:
        index, _, name = key.partition(".")
        *outer, inner = name.split("/")
        entries = state.setdefault(int(index), {})
        for part in outer:
            entries = entries.setdefault(part, {})
        entries[inner] = value
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _check_fits(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], description: Mapping[str, Any]
) -> None:
    if description["optimizer"] != type(optimizer).__name__:
        raise ValueError(f"optimizer: saved {description['optimizer']}, this run has {type(optimizer).__name__}")
    current, saved = optimizer.state_dict()["param_groups"], description["groups"]
    if len(current) != len(saved):
        raise ValueError(f"optimizer: saved {len(saved)} parameter groups, this run has {len(current)}")
    for group, other in zip(current, saved, strict=True):
        if group["params"] != other["params"]:
            given, found = len(other["params"]), len(group["params"])
            raise ValueError(f"optimizer: saved for {given} parameters, this run trains {found}; use the same network")
        if group.keys() != other.keys():
            difference = sorted(group.keys() ^ other.keys())
            raise ValueError(f"optimizer: options {difference} are only on one side; use the same torch version")
    if sorted(tensors) != description["tensors"]:
        difference = sorted(set(tensors) ^ set(description["tensors"]))
        raise ValueError(f"optimizer: state tensors {difference[:3]} are missing or unexpected")
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for key, tensor in tensors.items():
        index = int(key.partition(".")[0])
        shape = parameters[index].shape if index < len(parameters) else None
        if key.rpartition(".")[2].startswith("exp_avg") and shape is not None and not _of_parameter(tensor, shape):
            raise ValueError(f"optimizer: state {key} has shape {tuple(tensor.shape)}, its parameter {shape}")


def _flat(entries: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in entries.items():
        if isinstance(value, Mapping):
            yield from ((f"{name}/{inner}", found) for inner, found in _flat(value))
        else:
            yield name, value


def _of_parameter(tensor: Tensor, shape: torch.Size) -> bool:
    """Whether a moment has the shape of its parameter, or of its rows or columns alone (CAME)."""
    return tensor.shape in (shape, shape[:-1], shape[:-2] + shape[-1:])


def _plain(value: Any, *, where: str) -> Any:
    if isinstance(value, (tuple, list)):
        return [_plain(item, where=where) for item in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise ValueError(f"optimizer: {where} is a {type(value).__name__}; only tensors, numbers and strings can be saved")
