"""Write the student of a causal run as a streamable Wan pipeline: python scripts/export_causal_video.py --run runs/x"""

from fewstep.commands.export import export_causal_video

if __name__ == "__main__":
    export_causal_video(__doc__ or "")
