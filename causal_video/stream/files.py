"""A stream in a file: one safetensors file with every tensor of a `StreamState`, and the rest as JSON in its header.

Keys and values of a prompt are not stored: the network computes them again from the embeddings.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fewstep.causal_video.cache.plan import CachePlan, Segment
from fewstep.causal_video.cache.quantised import QuantisedKeysValues, QuantisedTensor
from fewstep.causal_video.cache.rolling import Entry, RollingCache
from fewstep.causal_video.denoise import ChunkNoise, ChunkResult, ExitStep, VideoCondition
from fewstep.causal_video.layout import ChunkLayout
from fewstep.causal_video.model.network import CausalWan
from fewstep.causal_video.model.prefix import KeysValues, StoredKeysValues
from fewstep.causal_video.policy import CachePolicy
from fewstep.causal_video.schedule import StepSchedule
from fewstep.causal_video.settings import CausalSettings
from fewstep.causal_video.stream.state import KeptChunk, PendingChunk, PromptSwitch, StreamState, fingerprint
from fewstep.causal_video.vae_stream import VaeState

HEADER, FORMAT = "fewstep_stream", 2


@dataclass(frozen=True)
class StoredTensors:
    """The tensors of a file by name."""

    tensors: dict[str, Tensor]

    def maybe(self, name: str) -> Tensor | None:
        """The tensor of a name, or None."""
        return self.tensors.get(name)


def save_state(state: StreamState, path: str | Path) -> Path:
    """Write a snapshot; gives the path. The file has no code in it, and is of use with the same model alone."""
    tensors: dict[str, Tensor | None] = {"text": state.prompt.tokens, "image": state.condition.image}
    entries = []
    for index, entry in enumerate(state.cache.entries):
        entries.append({"segment": asdict(entry.segment), "dtype": put_content(tensors, f"cache.{index}", entry)})
    for index, kept in enumerate(state.kept):
        tensors |= {f"kept.{index}.x0": kept.shown, f"kept.{index}.t": kept.times, f"kept.{index}.extra": kept.extra}
    for index, switch in enumerate(state.switches):
        tensors[f"switch.{index}"] = switch.prompt.tokens
    words: list[str | None] = []
    for index, feature in enumerate(state.vae.features):
        # The decoder keeps words for convolutions that have not begun.
        words.append(feature if isinstance(feature, str) else None)
        tensors[f"vae.{index}"] = feature if isinstance(feature, Tensor) else None
    pending = state.pending
    if pending is not None:
        seen, condition = pending.result, pending.condition
        tensors |= {"pending.x0": seen.x0, "pending.x": seen.exit.x, "pending.t": seen.exit.t, "pending.r": seen.exit.r}
        tensors |= {"pending.image": condition.image, "pending.extra": condition.extra}
        if seen.keys_values is not None:
            tensors |= {"pending.keys": seen.keys_values.keys, "pending.values": seen.keys_values.values}
    header = {
        "format": FORMAT,
        "model": state.model,
        "chunk": state.chunk,
        "caption": state.caption,
        "noise": asdict(state.noise),
        "layout": list(state.settings.layout.lengths),
        "policy": asdict(state.settings.policy),
        "times": [list(times) for times in state.settings.schedule.times],
        "second_time": state.settings.second_time,
        "next_chunk": state.cache.next_chunk,
        "entries": entries,
        "kept": [kept.chunk for kept in state.kept],
        "switches": [{"chunk": s.chunk, "mode": s.mode, "caption": s.caption} for s in state.switches],
        "vae": {"frames": state.vae.frames, "words": words},
        "pending": None if pending is None else pending.number,
    }
    # Tensors of one file must not share memory.
    content = {name: x.detach().cpu().clone().contiguous() for name, x in tensors.items() if x is not None}
    save_file(content, path, metadata={HEADER: json.dumps(header)})
    return Path(path)


def load_state(path: str | Path, network: CausalWan) -> StreamState:
    """Read what `save_state` wrote, on the device of the network.

    Raises:
        ValueError: the file is no snapshot, or one of another model.
    """
    device = network.transformer.device
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            header = json.loads((file.metadata() or {}).get(HEADER, "null"))
            if header is None or header["format"] != FORMAT:
                raise ValueError(f"{path} is no snapshot of a stream of format {FORMAT}: give a file of save_state")
            if header["model"] != fingerprint(network):
                raise ValueError(f"{path} is a snapshot of another model: its keys and values mean nothing to this one")
            stored = StoredTensors({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    except (SafetensorError, FileNotFoundError) as error:
        raise ValueError(f"{path} cannot be read as a snapshot ({error}): give a file of save_state") from error
    return build_state(header, stored, network)


def build_state(header: dict[str, Any], stored: StoredTensors, network: CausalWan) -> StreamState:
    """The state of a header and its tensors."""
    tensors = stored.tensors
    settings = CausalSettings(
        ChunkLayout(tuple(header["layout"])),
        CachePolicy(**header["policy"]),
        StepSchedule(tuple(tuple(times) for times in header["times"])),
        # Files from before flow maps do not say it.
        header.get("second_time", "none"),
    )
    entries = tuple(
        Entry(Segment(**entry["segment"]), content(stored, f"cache.{index}", entry["dtype"]))
        for index, entry in enumerate(header["entries"])
    )
    cache = RollingCache(CachePlan(settings.layout, settings.policy), header["next_chunk"], entries)
    condition = VideoCondition(network.prompt(tensors["text"]), stored.maybe("image"))
    noise = header["noise"]
    words: Sequence[str | None] = header["vae"]["words"]
    features = tuple(word if word is not None else stored.maybe(f"vae.{index}") for index, word in enumerate(words))
    return StreamState(
        chunk=header["chunk"],
        cache=cache,
        pending=None if header["pending"] is None else pending_chunk(header["pending"], stored, condition, cache),
        kept=tuple(
            KeptChunk(
                chunk,
                tensors[f"kept.{index}.x0"],
                tensors[f"kept.{index}.t"],
                stored.maybe(f"kept.{index}.extra"),
            )
            for index, chunk in enumerate(header["kept"])
        ),
        condition=condition,
        vae=VaeState(features, header["vae"]["frames"]),
        caption=header["caption"],
        switches=tuple(
            PromptSwitch(switch["chunk"], network.prompt(tensors[f"switch.{index}"]), switch["mode"], switch["caption"])
            for index, switch in enumerate(header["switches"])
        ),
        noise=ChunkNoise(
            noise["seed"], tuple(noise["indices"]), tuple(noise["size"]), noise["iteration"], noise["stream"]
        ),
        settings=settings,
        model=header["model"],
    )


def pending_chunk(number: int, stored: StoredTensors, condition: VideoCondition, cache: RollingCache) -> PendingChunk:
    """The chunk that is not context yet; what it saw is the cache."""
    tensors, extra = stored.tensors, stored.maybe("pending.extra")
    keys = stored.maybe("pending.keys")
    seen = None if keys is None else KeysValues(keys, tensors["pending.values"])
    seen_until = stored.maybe("pending.r")
    exit_step = ExitStep(tensors["pending.x"], tensors["pending.t"], cache.read(), extra, seen_until)
    own = VideoCondition(condition.text, stored.maybe("pending.image"), extra)
    return PendingChunk(ChunkResult(tensors["pending.x0"], exit_step, seen), own, number)


def put_content(tensors: dict[str, Tensor | None], name: str, entry: Entry) -> str | None:
    """Add the keys and values of a segment; returns the dtype that quantised ones are restored in, else None."""
    kept = entry.content
    if isinstance(kept, KeysValues):
        tensors |= {f"{name}.keys": kept.keys, f"{name}.values": kept.values}
        return None
    assert isinstance(kept, QuantisedKeysValues)
    for part, quantised in (("keys", kept.keys), ("values", kept.values)):
        tensors |= {f"{name}.{part}": quantised.numbers, f"{name}.{part}.scales": quantised.scales}
    return str(kept.dtype).removeprefix("torch.")


def content(stored: StoredTensors, name: str, dtype: str | None) -> StoredKeysValues:
    """What `put_content` added."""
    keys, values = (stored.tensors[f"{name}.{part}"] for part in ("keys", "values"))
    if dtype is None:
        return KeysValues(keys, values)
    scales = [stored.tensors[f"{name}.{part}.scales"] for part in ("keys", "values")]
    return QuantisedKeysValues(
        QuantisedTensor(keys, scales[0]), QuantisedTensor(values, scales[1]), getattr(torch, dtype)
    )
