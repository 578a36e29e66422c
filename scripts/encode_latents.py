"""Encode a folder of pictures with captions into latents, the real data of the GAN loss."""

from fewstep.commands.encode import encode_images

if __name__ == "__main__":
    encode_images(__doc__ or "")
