"""What an exported pipeline is to be called with, kept where `save_pretrained` and `from_pretrained` keep it.

Stock pipelines have no place for the number of steps and the guidance; a scheduler keeps keys of its configuration that
it does not know, writes them again, and names them when it is loaded. So they stand in scheduler_config.json, and
whoever loads the files reads them in the log. For Wan they also stand in model_index.json as vLLM-Omni's `dmd2_config`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

CALL_KEY = "call_pipeline_with"
SCHEDULER_FILE = Path("scheduler") / "scheduler_config.json"
INDEX_FILE = "model_index.json"
# vllm-project/vllm-omni pull request 2974: `num_inference_steps`, `denoising_timesteps`, `solver`, `guidance_scale`.
VLLM_KEY = "dmd2_config"


def keep_call(scheduler: Any, call: Mapping[str, Any]) -> None:
    """Put the arguments of a pipeline's call into the configuration of its scheduler."""
    scheduler.register_to_config(**{CALL_KEY: dict(call)})


def stored_call(folder: str | Path) -> dict[str, Any] | None:
    """The arguments that a pipeline folder says it is to be called with, None where it says nothing.

    Raises ValueError for a scheduler_config.json that is no JSON.
    """
    file = Path(folder) / SCHEDULER_FILE
    if not file.is_file():
        return None
    try:
        call = json.loads(file.read_text(encoding="utf-8")).get(CALL_KEY)
    except (json.JSONDecodeError, AttributeError) as error:
        raise ValueError(f"{file} is no JSON of a scheduler ({error}); export again") from error
    return dict(call) if isinstance(call, Mapping) else None


def own_size(folder: str | Path) -> tuple[int, int]:
    """(height, width) in pixels that a pipeline folder draws by itself, from its configuration files.

    Raises ValueError when they do not tell.
    """
    place = Path(folder)
    network = "transformer" if (place / "transformer").is_dir() else "unet"
    try:
        # Networks that take any size do not say one; their pipelines draw 128 latents a side.
        latent = json.loads((place / network / "config.json").read_text(encoding="utf-8")).get("sample_size", 128)
        vae = json.loads((place / "vae" / "config.json").read_text(encoding="utf-8"))
        halvings = vae.get("temperal_downsample")
        if halvings is None:
            # Every level of the autoencoder but the last halves both sides.
            halvings = vae.get("encoder_block_out_channels") or vae["block_out_channels"]
            halvings = halvings[1:]
    except (OSError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{place} does not tell its picture size: {network}/config.json and vae/config.json with "
            f"block_out_channels are needed ({error!r})"
        ) from error
    height, width = (latent, latent) if isinstance(latent, int) else latent
    factor = 2 ** len(halvings)
    return height * factor, width * factor


def keep_vllm_call(folder: Path, *, timesteps: tuple[float, ...], sampler: str, guidance: float) -> None:
    """Add vLLM-Omni's block to a folder's model_index.json, of which its scheduler places its steps.

    It takes timesteps over 1,000 of rectified flow, and an "ode" or "sde" solver.
    """
    file = folder / INDEX_FILE
    index = json.loads(file.read_text(encoding="utf-8"))
    block = {
        "num_inference_steps": len(timesteps),
        "denoising_timesteps": [int(one) if float(one).is_integer() else one for one in timesteps],
        "solver": sampler,
        "guidance_scale": guidance,
    }
    file.write_text(json.dumps({**index, VLLM_KEY: block}, indent=2) + "\n", encoding="utf-8")
