"""Draw videos of any export, score them with VBench, add up its total, or measure motion, flicker and drift.

python scripts/evaluate_video.py sample --pipeline runs/x/export --vbench_root VBench --output videos
python scripts/evaluate_video.py score --videos videos/videos --vbench_root VBench --output videos/scores
python scripts/evaluate_video.py aggregate --results videos/scores
python scripts/evaluate_video.py measure --videos videos/store --output videos/page
"""

from fewstep.commands.evaluate_video import evaluate_video

if __name__ == "__main__":
    evaluate_video((__doc__ or "").splitlines()[0])
