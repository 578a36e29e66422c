"""Encode a folder of videos with captions into latents, the real data of teacher forcing and of the GAN loss.

A video is a folder of numbered pictures, or an animated GIF, PNG or WebP.
"""

from fewstep.commands.encode import encode_videos

if __name__ == "__main__":
    encode_videos(__doc__ or "")
