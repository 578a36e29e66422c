"""Random streams against one masked call, in float64 on a small random Wan.

    python scripts/studies/random_streams.py --output assets/benchmarks/random_streams.json

Of each stream layout, window, sink, positions, times, weights' seed and batch are drawn. Its velocities, chunk after
chunk over the rolling cache, are compared with those of one call under the block-causal mask; and those of noisy chunks
over a cache of clean ones with the noisy half of a packed call. The record has the largest difference of all.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import Counter
from importlib.metadata import version
from itertools import accumulate
from pathlib import Path

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

from fewstep.causal_video.cache.rolling import RollingCache
from fewstep.causal_video.layout import ChunkLayout
from fewstep.causal_video.model import masks
from fewstep.causal_video.model.calls import CallOutput, packed_call, whole_call
from fewstep.causal_video.model.network import CausalWan
from fewstep.causal_video.policy import CachePolicy

CHANNELS, SIDE, TOKENS, WIDTH, NETWORKS = 4, 4, 5, 16, 8


def random_network(seed: int) -> CausalWan:
    """Three layers whose weights are wide, so that attention is far from uniform."""
    torch.manual_seed(seed)
    transformer = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        text_dim=WIDTH,
        freq_dim=32,
        ffn_dim=48,
        num_layers=3,
        rope_max_seq_len=64,
    )
    for weight in transformer.parameters():
        torch.nn.init.normal_(weight, std=0.15)
    return CausalWan(transformer.double().eval().requires_grad_(False))


def random_policy(draw: random.Random, layout: ChunkLayout) -> CachePolicy:
    """All of the past, a window, or a window and a sink: what a mask can express."""
    window = draw.choice((None, 1, 2, 3))
    if window is None:
        return CachePolicy()
    sink = draw.randint(0, min(2, layout.chunks))
    frames = [0, *accumulate(layout.lengths)][sink]
    return CachePolicy(window * layout.longest, frames, "none" if sink == 0 else "identity", positions="absolute")


@torch.no_grad()
def differences(network: CausalWan, draw: random.Random) -> tuple[float, float, ChunkLayout, CachePolicy]:
    """Of one random stream: chunks against the causal call, noisy chunks against the packed one."""
    layout = ChunkLayout(tuple(draw.randint(1, 3) for _ in range(draw.randint(1, 7))))
    policy, batch = random_policy(draw, layout), draw.randint(1, 3)
    generator = torch.Generator().manual_seed(draw.randrange(2**31))

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    clean, noisy = (noise(batch, CHANNELS, layout.frames, SIDE, SIDE) for _ in range(2))
    text = noise(batch, TOKENS, WIDTH)
    times = torch.rand(batch, layout.chunks, generator=generator, dtype=torch.float64)
    t = times.repeat_interleave(torch.tensor(layout.lengths), dim=1)
    tokens = network.tokens_per_frame(clean)

    def streamed(x: Tensor, times: Tensor, over: Tensor | None) -> Tensor:
        """Velocities of x chunk by chunk; `over` is what the cache is filled with at t = 0, None is x itself."""
        cache, parts = RollingCache.empty(layout, policy), []
        for chunk in range(layout.chunks):
            part, prefix = slice(layout.start(chunk), layout.end(chunk)), cache.read()
            filled, at = (x, times) if over is None else (over, torch.zeros_like(times))
            output = network.append(filled[:, :, part], at[:, part], text, prefix)
            assert output.keys_values is not None
            own = output.velocity if over is None else network.readonly(x[:, :, part], times[:, part], text, prefix)
            parts.append(own)
            cache = cache.commit(output.keys_values)
        return torch.cat(parts, dim=2)

    causal = network(whole_call(noisy, t, text, mask=masks.block_causal(layout, tokens, policy)))
    packed = network(packed_call(clean, noisy, t, text, mask=masks.teacher_forcing(layout, tokens, policy)))
    assert isinstance(causal, CallOutput)
    assert isinstance(packed, CallOutput)
    one = (streamed(noisy, t, None) - causal.velocity).abs().max().item()
    other = (streamed(noisy, t, clean) - packed.velocity).abs().max().item()
    return one, other, layout, policy


def main() -> None:
    """Write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, help="file to write, .json")
    parser.add_argument("--streams", type=int, default=1000, help="how many")
    parser.add_argument("--seed", type=int, default=0, help="of all draws")
    options = parser.parse_args()
    torch.set_num_threads(1)
    draw, networks = random.Random(options.seed), [random_network(seed) for seed in range(NETWORKS)]
    worst = {"causal": 0.0, "teacher forcing": 0.0}
    layouts: set[tuple[int, ...]] = set()
    kinds: Counter[str] = Counter()
    for number in range(options.streams):
        one, other, layout, policy = differences(networks[number % NETWORKS], draw)
        worst["causal"], worst["teacher forcing"] = max(worst["causal"], one), max(worst["teacher forcing"], other)
        layouts.add(layout.lengths)
        window = "all" if policy.window_frames is None else "window"
        kinds[window if policy.sink == "none" else f"{window} and sink"] += 1
    record = {
        "command": f"python scripts/studies/random_streams.py --output {options.output}",
        "settings": {"streams": options.streams, "seed": options.seed, "networks": NETWORKS},
        "versions": {library: version(library) for library in ("torch", "diffusers")},
        "layouts": len(layouts),
        "policies": dict(sorted(kinds.items())),
        "largest_difference": worst,
    }
    Path(options.output).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(record["largest_difference"]))


if __name__ == "__main__":
    main()
