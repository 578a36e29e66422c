"""Students as diffusers' causal network, `AnyFlowFARTransformer3DModel` (arXiv:2605.13724, diffusers 0.42), and back.

What that class computes is a Wan transformer with a coarser patch embedding for old chunks and a second time beside the
first, (1 - g) E(t) + g E_r(d) with d = r or t - r. A `full_chunk_limit` of at least the number of chunks leaves no old
chunks, and a gate g of 0 leaves the second time out. Networks of two times are the same function there as in
`core.export.anyflow`: "gate" has d = r and g = 1/4, "sum" has d = t - r, g = 1/2 and the last layers of both embeddings
doubled, which loses no bit.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AnyFlowFARTransformer3DModel, WanTransformer3DModel
from torch import Tensor, nn
from torch.nn import functional

from fewstep.causal_video.layout import ChunkLayout
from fewstep.core.export.anyflow import SIZES
from fewstep.core.two_time import DELTA_KINDS, GATE, SITES, SUM_GATE, SUM_SCALE, add_second_time, second_time_of

# Patches of the branch for old chunks, which is never called.
COMPRESSED_PATCH = (1, 4, 4)
SITE = SITES["WanTransformer3DModel"].layers
DELTA = f"{SITE.rpartition('.')[0]}.delta_embedder"
OLD_CHUNKS = "far_patch_embedding."


def far_transformer(transformer: WanTransformer3DModel, layout: ChunkLayout) -> AnyFlowFARTransformer3DModel:
    """A network of diffusers' class with the student's weights, for the chunks that `layout` lists.

    Raises:
        ValueError: a network with conditioning channels, image tokens or other norms than Wan 2.1.
    """
    config, layers = transformer.config, second_time_of(transformer)
    if config["in_channels"] != config["out_channels"] or config["image_dim"] is not None:
        raise ValueError("AnyFlowFAR takes latents and text alone: this network takes more")
    if config["qk_norm"] != "rms_norm_across_heads" or tuple(config["patch_size"]) != (1, 2, 2):
        raise ValueError("AnyFlowFAR has norms across heads and patches of 2 x 2: this network has others")
    is_sum = layers is not None and layers.kind == "sum"
    # Its random weights are thrown away: the caller's random numbers stay as they were.
    with torch.random.fork_rng(devices=[]):
        network = AnyFlowFARTransformer3DModel(
            compressed_patch_size=COMPRESSED_PATCH,  # pyright: ignore[reportArgumentType]
            full_chunk_limit=layout.chunks,
            gate_value=0.0 if layers is None else SUM_GATE if is_sum else GATE,
            deltatime_type="t-r" if is_sum else "r",
            chunk_partition=layout.lengths,
            **{name: config[name] for name in SIZES},
        )
    state = {_far_name(name): tensor for name, tensor in transformer.state_dict().items()}
    missing, unexpected = network.load_state_dict(state, strict=False)
    unused = (OLD_CHUNKS, DELTA) if layers is None else (OLD_CHUNKS,)
    lost = [name for name in missing if not name.startswith(unused)]
    if lost or unexpected:
        raise ValueError(f"the weights are not those of a Wan 2.1 transformer: missing {lost}, unexpected {unexpected}")
    _settle_unused(network, has_delta=layers is not None)
    if is_sum:
        _scale_times(network, SUM_SCALE)
    nn.Module.to(network, device=transformer.device, dtype=transformer.dtype)
    return network.eval()


def wan_of_far(network: AnyFlowFARTransformer3DModel) -> WanTransformer3DModel:
    """The Wan transformer of two times, or of one where the gate is 0, that `far_transformer` made this of; weights in
    their dtypes.

    Raises:
        ValueError: its gate is none of those.
    """
    config: Any = network.config
    found = (config["gate_value"], config["deltatime_type"])
    if found not in DELTA_KINDS:
        raise ValueError(
            f"a gate of {found[0]} on {found[1]!r} is none of {list(DELTA_KINDS)}: this is no student of fewstep"
        )
    kind: Any = DELTA_KINDS[found]
    with torch.random.fork_rng(devices=[]):
        sizes: dict[str, Any] = {name: config[name] for name in SIZES}
        sizes["patch_size"] = tuple(config["patch_size"])
        wan = WanTransformer3DModel(**sizes)
    if kind != "none":
        add_second_time(wan, kind)
    names = {_far_name(name): name for name in wan.state_dict()}
    stored: dict[str, Tensor] = {names[name]: x for name, x in network.state_dict().items() if name in names}
    if kind == "sum":
        halved = [f"{SITE}.{half}.linear_2.{part}" for half in ("first", "second") for part in ("weight", "bias")]
        stored |= {name: stored[name] / SUM_SCALE for name in halved}
    # The weights keep their dtypes, which are not one for all where the layers of the time stay in fp32.
    wan.load_state_dict(stored, assign=True)
    return wan.eval()


def _far_name(name: str) -> str:
    """The name of a Wan's weight in diffusers' causal class."""
    return name.replace(f"{SITE}.first.", f"{SITE}.").replace(f"{SITE}.second.", f"{DELTA}.")


@torch.no_grad()
def _settle_unused(network: AnyFlowFARTransformer3DModel, *, has_delta: bool) -> None:
    """Weights that no call reads, as functions of the others: a file of a student is the same whenever it is made."""
    patches, coarse = network.patch_embedding, network.far_patch_embedding
    kernel = patches.weight.flatten(0, 1)[:, None]
    wide = functional.interpolate(kernel, size=COMPRESSED_PATCH, mode="trilinear", align_corners=False)
    coarse.load_state_dict({"weight": wide.view_as(coarse.weight), "bias": patches.bias})
    if not has_delta:
        network.get_submodule(DELTA).load_state_dict(network.get_submodule(SITE).state_dict())


@torch.no_grad()
def _scale_times(network: AnyFlowFARTransformer3DModel, scale: float) -> None:
    for name in (SITE, DELTA):
        for parameter in network.get_submodule(f"{name}.linear_2").parameters():
            parameter.mul_(scale)
