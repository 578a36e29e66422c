"""Better samples by a reward: accelerate launch scripts/train_reward.py --config configs/digits/rtdmd.yaml"""

from fewstep.commands.train import run_training

if __name__ == "__main__":
    run_training("reward", prog="train_reward.py", description=__doc__ or "")
