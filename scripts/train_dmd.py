"""Distil a teacher by DMD: accelerate launch scripts/train_dmd.py --config configs/digits/dmd_1step.yaml"""

from fewstep.commands.train import run_training

if __name__ == "__main__":
    run_training("dmd", prog="train_dmd.py", description=__doc__ or "")
