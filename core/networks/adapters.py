"""Stored LoRA adapters: of a run, of an export with `lora_only`, or of anybody, in the key layouts diffusers knows."""

from __future__ import annotations

from collections.abc import Set as AbstractSet

import torch
from torch import Tensor, nn

from fewstep.core.networks.experts import Experts
from fewstep.core.networks.lora import ADAPTER, add_lora, merge_lora
from fewstep.core.weights import StoredWeights

# In the names of the weights of a second time.
SECOND = ".second."


def load_adapters(network: nn.Module, stored: StoredWeights, *, alpha: float) -> None:
    """Load into the adapters that a network has, in place.

    Raises:
        ValueError: they are of another rank, of other layers, or of another scale.
    """
    tensors, stated = adapter_tensors(stored, frozenset(name for name, _ in network.named_parameters()))
    known = stored.stated("lora_alpha") if stated is None else stated
    if known is None:
        raise ValueError(
            f"nothing says the lora_alpha of {stored.key} {stored.source}: give the run directory or the export that "
            "holds it, or a file with the metadata of diffusers"
        )
    if float(known) != alpha:
        raise ValueError(f"{stored.key} {stored.source} was trained with lora_alpha {known}, and here it is {alpha}")
    # Beside the adapters, layers of a second time that are trained as they are.
    own = {name: weight for name, weight in network.named_parameters() if weight.requires_grad}
    if any(SECOND in name for name in tensors) and not any(SECOND in name for name, _ in network.named_parameters()):
        raise ValueError(
            f"{stored.key} {stored.source} was trained with a second time, which this method's network has not: start "
            "from another run, or from the teacher"
        )
    wrong = sorted(name for name in own.keys() & tensors.keys() if own[name].shape != tensors[name].shape)
    missing, unknown = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    if missing or unknown or wrong:
        raise ValueError(
            f"the adapters of {stored.key} {stored.source} do not fit: {len(missing)} missing {missing[:3]}, "
            f"{len(unknown)} of other layers {unknown[:3]}, {len(wrong)} of another rank {wrong[:3]}; set "
            "lora_rank and lora_targets to those they were trained with"
        )
    with torch.no_grad():
        for name, weight in own.items():
            weight.copy_(tensors[name])


def merge_stored_adapters(network: nn.Module, stored: StoredWeights) -> None:
    """Add stored adapters to the weights of a network, all of which are trainable again afterwards, in place.

    Raises:
        ValueError: the layers are not the network's, or nothing says the scale of the adapters.
    """
    tensors, alpha = adapter_tensors(stored, frozenset(name for name, _ in network.named_parameters()))
    ranks = {len(tensor) for name, tensor in tensors.items() if ".lora_A." in name}
    alpha = stored.stated("lora_alpha") if alpha is None else alpha
    if len(ranks) != 1 or alpha is None:
        raise ValueError(
            f"{stored.key} {stored.source} holds adapters of ranks {sorted(ranks)} and scale {alpha}, and one of "
            "each is needed: give the run directory that trained them, or merge them and give the network"
        )
    layers = {name.partition(".lora_")[0] for name in tensors if ".lora_" in name}
    if isinstance(network, Experts):
        # Adapters are put into each expert by the names of its own layers, which are alike in both.
        layers = {name.partition(".")[2] for name in layers}
    add_lora(network, rank=ranks.pop(), alpha=float(alpha), targets=sorted(layers), seed=0)
    for name, weight in network.named_parameters():
        # Layers of a second time that were trained as they are.
        weight.requires_grad_(weight.requires_grad or name in tensors)
    load_adapters(network, stored, alpha=float(alpha))
    merge_lora(network)
    network.requires_grad_(True)


def adapter_tensors(
    stored: StoredWeights, own: AbstractSet[str] = frozenset()
) -> tuple[dict[str, Tensor], float | None]:
    """The tensors by their names in a network, `<layer>.lora_A.default.weight`, and alpha where the file says it; with
    them layers of a second time that were trained beside them. `own` are the names of the network's parameters.

    Raises ValueError for a file that cannot be read.
    """
    tensors = stored.tensors(own)
    renamed = {}
    for name, tensor in tensors.items():
        if ".lora_" not in name and SECOND in name:
            renamed[name] = tensor
            continue
        if ".lora_" not in name:
            # Frozen tables that older runs saved beside their adapters.
            continue
        plain = name.removeprefix("unet.")
        renamed[plain.replace(".weight", f".{ADAPTER}.weight") if f".{ADAPTER}." not in plain else plain] = tensor
    metadata = {name.rpartition(".")[2]: value for name, value in stored.metadata().items()}
    unlike = [name for name in ("use_rslora", "use_dora", "alpha_pattern", "rank_pattern") if metadata.get(name)]
    if unlike:
        raise ValueError(f"{stored.key} {stored.source} holds adapters with {unlike[0]}, which are of another kind")
    alpha = metadata.get("lora_alpha")
    return renamed, None if alpha is None else float(alpha)


@torch.no_grad()
def round_weights(network: nn.Module, dtype: torch.dtype) -> None:
    """Round a network to what a teacher of that dtype holds, in place and in its own dtype.

    Adapters were trained on the rounded weights; diffusers keeps some layers in fp32 (`_keep_in_fp32_modules`).
    """
    kept = tuple(getattr(network, "_keep_in_fp32_modules", None) or ())
    for name, weight in network.named_parameters():
        if weight.is_floating_point() and not any(part in name.split(".") for part in kept):
            weight.copy_(weight.to(dtype))
