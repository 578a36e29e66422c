"""Encode a folder of pictures with captions into latents, the real data of the GAN loss."""

from __future__ import annotations

import argparse


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--teacher", required=True, help="diffusers directory or hub id whose autoencoder encodes")
    parser.add_argument("--images", required=True, help="folder with pictures and metadata.jsonl (file_name, text)")
    parser.add_argument("--output", required=True, help="folder to write")
    parser.add_argument("--height", type=int, required=True, help="pixels")
    parser.add_argument("--width", type=int, required=True, help="pixels")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--device", default="cpu")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    from fewstep.core.latent_sources import encode_image_folder
    from fewstep.core.teacher import Teacher

    teacher = Teacher.load(arguments.teacher, device=arguments.device)
    size = {"height": arguments.height, "width": arguments.width}
    dataset = encode_image_folder(teacher, arguments.images, batch_size=arguments.batch_size, **size)
    dataset.save(arguments.output)
    print(f"wrote {len(dataset.prompts)} latents to {arguments.output}")


if __name__ == "__main__":
    main()
