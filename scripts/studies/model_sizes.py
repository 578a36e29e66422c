"""Parameters of released networks, counted without their weights, and what they hold in memory in training.

    python scripts/studies/model_sizes.py --output assets/benchmarks/model_sizes.json

Networks are built on torch's meta device from the numbers of their released configs, where those differ from the
defaults of diffusers. Bytes follow from the rules of training here: full training holds the teacher in bf16 and student
and fake score in fp32 with gradients, two Adam moments, and an average of the student; adapters sit on one bf16 base.
"""

from __future__ import annotations

import argparse
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import diffusers
import torch

# name: (class of the network, what its config has beside the defaults, networks of the pipeline, tokens at stock size)
NETWORKS: dict[str, tuple[str, dict[str, Any], int, int]] = {
    "PixArt-Sigma": ("PixArtTransformer2DModel", {"use_additional_conditions": False}, 1, 4096),
    "DiT-XL/2": ("DiTTransformer2DModel", {"num_attention_heads": 16, "out_channels": 8}, 1, 256),
    "Wan 2.1 1.3B": ("WanTransformer3DModel", {"num_attention_heads": 12, "num_layers": 30, "ffn_dim": 8960}, 1, 32760),
    "CogVideoX-2b": ("CogVideoXTransformer3DModel", {}, 1, 17550),
    "CogVideoX-5b": (
        "CogVideoXTransformer3DModel",
        {"num_attention_heads": 48, "num_layers": 42, "use_rotary_positional_embeddings": True},
        1,
        17550,
    ),
    "LTX-Video 2B": ("LTXVideoTransformer3DModel", {}, 1, 7392),
    "FLUX.2 klein 4B": (
        "Flux2Transformer2DModel",
        {
            "num_layers": 5,
            "num_single_layers": 20,
            "num_attention_heads": 24,
            "joint_attention_dim": 7680,
            "guidance_embeds": False,
        },
        1,
        4096,
    ),
    "Wan 2.2 TI2V-5B": (
        "WanTransformer3DModel",
        {"num_attention_heads": 24, "num_layers": 30, "ffn_dim": 14336, "in_channels": 48, "out_channels": 48},
        1,
        27280,
    ),
    "Z-Image": ("ZImageTransformer2DModel", {}, 1, 4096),
    "FLUX.1": ("FluxTransformer2DModel", {"guidance_embeds": True}, 1, 4096),
    "HunyuanVideo": ("HunyuanVideoTransformer3DModel", {}, 1, 118800),
    "LTX-Video 13B": (
        "LTXVideoTransformer3DModel",
        {"num_layers": 48, "attention_head_dim": 128, "cross_attention_dim": 4096},
        1,
        7392,
    ),
    "Wan 2.1 14B": ("WanTransformer3DModel", {}, 1, 75600),
    "Wan 2.1 I2V 14B": (
        "WanTransformer3DModel",
        {"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120},
        1,
        75600,
    ),
    "Wan 2.2 A14B": ("WanTransformer3DModel", {}, 2, 75600),
    "Qwen-Image": ("QwenImageTransformer2DModel", {}, 1, 4096),
    "FLUX.2 dev": ("Flux2Transformer2DModel", {}, 1, 4096),
}
# Teacher in bf16; student and fake score: weights, gradients and two moments in fp32; the student's average in fp32.
FULL_BYTES, BASE_BYTES = 2 + 2 * 16 + 4, 2


def parameters_of(kind: str, changes: dict[str, Any]) -> int:
    """Number of parameters of a network of this class."""
    with torch.device("meta"):
        network = getattr(diffusers, kind)(**changes)
    return sum(parameter.numel() for parameter in network.parameters())


def main() -> None:
    """Count and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, help="file to write, .json")
    options = parser.parse_args()
    rows = []
    for name, (kind, changes, networks, tokens) in NETWORKS.items():
        count = networks * parameters_of(kind, changes)
        rows.append(
            {
                "model": name,
                "network": kind,
                "parameters": count,
                "billions": count / 1e9,
                "base_gb": count * BASE_BYTES / 1e9,
                "full_gb": count * FULL_BYTES / 1e9,
                "tokens": tokens,
            }
        )
        print(f"{name}: {count / 1e9:.2f} B")
    command = "python scripts/studies/model_sizes.py --output assets/benchmarks/model_sizes.json"
    record = {"command": command, "diffusers": version("diffusers"), "rows": rows}
    Path(options.output).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
