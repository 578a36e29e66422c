"""Make a causal video student better by a reward: accelerate launch scripts/train_causal_reward.py --config
configs/digits_video/astrolabe.yaml"""

from fewstep.commands.train import run_training

if __name__ == "__main__":
    run_training("causal_reward", prog="train_causal_reward.py", description=__doc__ or "")
