"""A model that scores noisy latents: train_latent_reward.py --config configs/digits/latent_reward.yaml"""

from fewstep.commands.train import run_training

if __name__ == "__main__":
    run_training("latent_reward", prog="train_latent_reward.py", description=__doc__ or "")
