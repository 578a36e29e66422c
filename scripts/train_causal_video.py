"""Train a stage of a causal video student: accelerate launch scripts/train_causal_video.py --config
configs/digits_video/teacher_forcing.yaml"""

from fewstep.commands.train import run_training

if __name__ == "__main__":
    run_training("causal_video", prog="train_causal_video.py", description=__doc__ or "")
