"""A rolling cache of keys and values as a value: committing gives a new cache, and nothing ever changes an old one.

Segments are tensors that are written once. A snapshot is the cache itself, a branch shares all it has in common,
forward passes that only read can be repeated or recomputed, and no slot exists before it is filled. The cost is one
concatenation per layer and call, which attention needs in any case to put a chunk's own keys behind the stored ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fewstep.causal_video.cache.plan import CachePlan, Segment, positions_of
from fewstep.causal_video.cache.quantised import stored
from fewstep.causal_video.cache.sinks import ema_sink
from fewstep.causal_video.layout import ChunkLayout
from fewstep.causal_video.model.block import Prompt
from fewstep.causal_video.model.network import CausalWan
from fewstep.causal_video.model.prefix import KeysValues, Prefix, StoredKeysValues
from fewstep.causal_video.policy import CachePolicy


@dataclass(frozen=True, eq=False)
class Entry:
    """A segment and its keys and values."""

    segment: Segment
    content: StoredKeysValues


@dataclass(frozen=True, eq=False)
class RollingCache:
    """What the next chunk sees of those before it.

    Attributes:
        plan: which chunks are kept.
        next_chunk: the chunk that is read for, and committed next.
        entries: sink, then window, in the order of positions; keys are those before RoPE.
    """

    plan: CachePlan
    next_chunk: int = 0
    entries: tuple[Entry, ...] = ()

    @classmethod
    def empty(cls, layout: ChunkLayout, policy: CachePolicy) -> RollingCache:
        """The cache before the first chunk. Raises ValueError if the policy does not fit the layout."""
        return cls(CachePlan(layout, policy))

    @property
    def frames(self) -> int:
        """Latent frames that are stored."""
        return sum(entry.segment.frames for entry in self.entries)

    def bytes(self) -> int:
        """Size of the stored numbers; equals `cache_bytes` where nothing is quantised."""
        return sum(entry.content.bytes() for entry in self.entries)

    def read(self) -> Prefix:
        """The prefix of the next chunk, for any number of calls; it has no graph."""
        segments = tuple(entry.segment for entry in self.entries)
        query = self.plan.segment(self.next_chunk)
        positions, own = positions_of(segments, query, self.plan.policy.positions)
        return Prefix(tuple(entry.content for entry in self.entries), positions, own)

    def commit(self, keys_values: KeysValues) -> RollingCache:
        """The cache after the next chunk: its keys and values go in, what no later chunk sees goes out.

        Eviction happens here, once per chunk, so nothing is stored that is not read. With a running mean, what leaves
        the window enters the sink.

        Args:
            keys_values: of `CausalWan.append` on the chunk; stored without a graph.

        Raises:
            ValueError: the tokens are no whole number per frame of this chunk, or differ from those stored.
        """
        segment = self.plan.segment(self.next_chunk)
        self._check(keys_values, segment)
        added = Entry(segment, stored(keys_values, self.plan.policy.quantise))
        candidates = (*self.entries, added)
        leaving = {s.chunk for s in self.plan.evicted(self.next_chunk)}
        kept = tuple(entry for entry in candidates if entry.segment.chunk not in leaving)
        if self.plan.policy.sink == "ema":
            for entry in candidates:
                if entry.segment.chunk in leaving:
                    kept = (self._averaged(kept[0], entry), *kept[1:])
        return RollingCache(self.plan, self.next_chunk + 1, kept)

    def with_contents(self, contents: Sequence[StoredKeysValues]) -> RollingCache:
        """The same segments with other keys and values.

        Raises:
            ValueError: not one content per segment.
        """
        if len(contents) != len(self.entries):
            raise ValueError(f"{len(self.entries)} segments need as many contents, got {len(contents)}")
        entries = tuple(replace(e, content=content) for e, content in zip(self.entries, contents, strict=True))
        return replace(self, entries=entries)

    def _averaged(self, sink: Entry, leaving: Entry) -> Entry:
        if not isinstance(sink.content, KeysValues) or not isinstance(leaving.content, KeysValues):
            raise ValueError("a running mean needs keys and values that are not quantised")
        return replace(sink, content=ema_sink(sink.content, leaving.content, self.plan.policy.ema_decay))

    def _check(self, keys_values: KeysValues, segment: Segment) -> None:
        if keys_values.tokens % segment.frames:
            raise ValueError(
                f"chunk {segment.chunk} has {segment.frames} frames, and {keys_values.tokens} tokens are no whole "
                "number per frame: commit what `append` gave for this chunk"
            )
        if len(self.entries) == 0:
            return
        first = self.entries[0]
        shape = first.content.layer(0)[0].shape
        per_frame = shape[2] // first.segment.frames
        expected = (shape[0], shape[1], segment.frames * per_frame, shape[3])
        if tuple(keys_values.keys.shape[1:]) != expected:
            raise ValueError(
                f"chunk {segment.chunk} must bring keys [layers, {', '.join(map(str, expected))}], got "
                f"{list(keys_values.keys.shape)}"
            )


@torch.no_grad()
def recache(
    network: CausalWan,
    cache: RollingCache,
    latents: Sequence[Tensor],
    text: Tensor | Prompt,
    *,
    keep_sink: bool = True,
    extras: Sequence[Tensor] | None = None,
    times: Sequence[Tensor] | None = None,
) -> RollingCache:
    """Compute the stored keys and values again under another prompt (KV-recache of LongLive, arXiv:2509.22622).

    Chunk by chunk, each seeing the recomputed ones before it: block-causal, from the oldest stored chunk on; each at
    the time at which the policy shows it, 0 for clean context.
    Under the same prompt this gives back what was stored if nothing was evicted; after evictions the oldest chunks lose
    the context they were first computed with. LongLive's released code lets recached frames see each other both ways;
    this follows the mask of training.

    Args:
        network: the student.
        cache: of a stream; not changed.
        latents: what each stored segment shows, [B, C, n, h, w] in order: clean chunks, or noised to their time; those
            of a kept sink are not used.
        text: the new prompt.
        keep_sink: keep the sink as it is (LongLive's global sink); a running mean can only be kept.
        extras: conditioning channels of each segment.
        times: [B] or [B, n] of each segment, at which it is shown; None is 0 for all.

    Raises:
        ValueError: not one latent and one time per segment, or a running mean is to be computed again.
    """
    times = [torch.zeros_like(x[:, 0, 0, 0, 0]) for x in latents] if times is None else times
    if len(times) != len(latents):
        raise ValueError(f"{len(latents)} latents with {len(times)} times: give the time at which each is shown")
    if len(latents) != len(cache.entries) or (extras is not None and len(extras) != len(cache.entries)):
        raise ValueError(f"the cache has {len(cache.entries)} segments, got {len(latents)} latents")
    if cache.plan.policy.sink == "ema" and not keep_sink:
        raise ValueError("a running mean has no latents to be computed from: use keep_sink=True")
    done: list[Entry] = []
    for index, (entry, x0) in enumerate(zip(cache.entries, latents, strict=True)):
        if not (keep_sink and entry.segment.is_sink):
            segments = tuple(e.segment for e in done)
            positions, own = positions_of(segments, entry.segment, cache.plan.policy.positions)
            prefix = Prefix(tuple(e.content for e in done), positions, own)
            extra = None if extras is None else extras[index]
            keys_values = network.append(x0, times[index], text, prefix, extra=extra).keys_values
            assert keys_values is not None
            entry = Entry(entry.segment, stored(keys_values, cache.plan.policy.quantise))
        done.append(entry)
    return replace(cache, entries=tuple(done))
