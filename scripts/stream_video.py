"""Stream a video of an exported causal student to a file: python scripts/stream_video.py --model runs/x/export
--prompt "a seven moving left slowly" --chunks 20 --switch 12:"a three moving up slowly" --output seven.gif"""

from fewstep.commands.stream import stream_video

if __name__ == "__main__":
    stream_video(__doc__ or "")
