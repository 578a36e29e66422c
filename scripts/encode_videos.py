"""Encode a folder of videos with captions into latents, the real data of teacher forcing and of the GAN loss.

A video is a folder of numbered pictures, or an animated GIF, PNG or WebP.
"""

from __future__ import annotations

import argparse


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--teacher", required=True, help="diffusers directory or hub id whose autoencoder encodes")
    parser.add_argument("--videos", required=True, help="folder with videos and metadata.jsonl (file_name, text)")
    parser.add_argument("--output", required=True, help="folder to write")
    parser.add_argument("--frames", type=int, required=True, help="pixel frames of each video, 4 k + 1 for Wan")
    parser.add_argument("--every", type=int, default=1, help="take one of so many frames")
    parser.add_argument("--height", type=int, required=True, help="pixels")
    parser.add_argument("--width", type=int, required=True, help="pixels")
    parser.add_argument("--device", default="cpu")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    from fewstep.core.latent_sources import encode_video_folder
    from fewstep.core.teacher import Teacher

    teacher = Teacher.load(arguments.teacher, device=arguments.device)
    dataset = encode_video_folder(
        teacher,
        arguments.videos,
        frames=arguments.frames,
        height=arguments.height,
        width=arguments.width,
        every=arguments.every,
    )
    dataset.save(arguments.output)
    print(f"wrote {len(dataset.prompts)} latents to {arguments.output}")


if __name__ == "__main__":
    main()
