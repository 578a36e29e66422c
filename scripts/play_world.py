"""Steer a causal video student live in a browser: python scripts/play_world.py --model runs/x/export
--prompt "a seven moving {action} quickly" (a student that takes actions needs no {action})"""

import argparse
import sys


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", required=True, help="directory of scripts/export_causal_video.py")
    parser.add_argument("--prompt", required=True, help="what to begin with; {action} is where keys enter a text")
    parser.add_argument("--actions", nargs="+", default=["left", "right", "up", "down"], help="what {action} can be")
    parser.add_argument("--mode", choices=("recache", "cross_only", "hard"), default="recache", help="of new prompts")
    parser.add_argument("--seed", type=int, default=0, help="of the noise")
    parser.add_argument("--snapshot_gb", type=float, default=2.0, help="memory for snapshots; the oldest go first")
    parser.add_argument("--port", type=int, default=8770, help="on 127.0.0.1; 0 takes a free one")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32", help="of arithmetic")
    options = parser.parse_args()

    import torch

    from fewstep.causal_video.stream.pipeline import CausalVideoPipeline
    from fewstep.causal_video.stream.play import World
    from fewstep.causal_video.stream.server import serve

    try:
        dtype = getattr(torch, options.dtype)
        pipe = CausalVideoPipeline.from_pretrained(options.model, device=options.device, dtype=dtype)
        world = World(
            pipe,
            options.prompt,
            seed=options.seed,
            mode=options.mode,
            actions=tuple(options.actions),
            snapshot_bytes=int(options.snapshot_gb * 1024**3),
        )
        serve(world, port=options.port)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
