"""A video of a causal student, written while it is made: `fewstep stream`, and what scripts/stream_video.py starts."""

from __future__ import annotations

import argparse
import sys


def _options(about: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--model", required=True, help="directory of scripts/export_causal_video.py")
    add("--prompt", required=True, help="what to begin with")
    add("--chunks", type=int, default=20, help="length of the video in chunks")
    add("--seed", type=int, default=0, help="of the noise")
    add("--switch", action="append", default=[], metavar="CHUNK:PROMPT", help="another prompt from a chunk on")
    add("--mode", choices=("recache", "cross_only", "hard"), default="recache", help="what a switch does to the past")
    add("--actions", nargs="+", help="of a steered student: one name per chunk, the last one repeats")
    add("--image", help="picture file to begin with")
    add("--output", default="stream.gif", help=".gif, or .mp4 with fewstep[video]")
    add("--scale", type=int, default=1, help="enlarge each pixel, for small videos")
    add("--pipelined", action="store_true", help="decode a chunk while the next one is generated")
    add("--device", default="cpu", help="cpu or cuda")
    add("--dtype", choices=("float32", "float16", "bfloat16"), default="float32", help="of the arithmetic")
    return parser.parse_args()


def stream_video(about: str = "") -> None:
    """Stream to a file, and end the process."""
    options = _options(about)
    import torch

    from fewstep.causal_video.stream.output import check_video_path, hold_last, parse_switch, until_told, write_video
    from fewstep.causal_video.stream.pipeline import CausalVideoPipeline
    from fewstep.causal_video.stream.speed import TimedStream
    from fewstep.core.media.pictures import read_picture
    from fewstep.core.training.interrupt import Interrupt

    try:
        check_video_path(options.output)
        switches = [parse_switch(text) for text in options.switch]
        pipe = CausalVideoPipeline.from_pretrained(
            options.model, device=options.device, dtype=getattr(torch, options.dtype)
        )
        picture = None if options.image is None else read_picture(options.image, *pipe.pixel_size())
        session = pipe.open(options.prompt, image=picture, seed=options.seed)
        for chunk, prompt in switches:
            session.set_prompt(prompt, options.mode, at_chunk=chunk)
        actions = hold_last(options.actions, options.chunks)
        stream = TimedStream(session.stream(options.chunks, actions, pipelined=options.pipelined))
        # Ctrl-C ends the video after the chunk in the works, and what was made is kept.
        with Interrupt() as interrupt:
            images = until_told(stream, lambda: interrupt.signum)
            write_video(images, options.output, rate=pipe.defaults.frames_per_second, scale=options.scale)
    except ValueError as error:
        sys.exit(f"error: {error}")
    print(f"{options.output}: {stream.frames} frames in {stream.chunks} chunks; {stream.speed.text()}")
    if interrupt.signum:
        sys.exit(128 + interrupt.signum)
