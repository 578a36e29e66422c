"""Distil a teacher by consistency: accelerate launch scripts/train_consistency.py --config
configs/digits/scm.yaml"""

from fewstep.commands.train import run_training

if __name__ == "__main__":
    run_training("consistency", prog="train_consistency.py", description=__doc__ or "")
