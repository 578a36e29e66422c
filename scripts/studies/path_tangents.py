"""Derivatives along the embedded teachers' own paths, with and without a smoothed time.

    python scripts/studies/path_tangents.py --output assets/benchmarks/path_tangents.json

At each time the exact derivative of the velocity along the guided path is held against the central difference of the
unsmoothed teacher over 0.04 of time: mean cosine over the samples, and ratio of mean lengths.
"""

from __future__ import annotations

import argparse
import copy
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.consistency.tangents import central_derivative, total_derivative
from fewstep.core.data import LatentDataset
from fewstep.core.denoiser import Denoiser
from fewstep.core.paths import add_noise
from fewstep.core.randomness import sample_noise
from fewstep.core.tangents.network import use_jvp_attention
from fewstep.core.tangents.smooth import smooth_time
from fewstep.core.teacher import Teacher

TEACHERS = {"pictures, SD3": "assets/digits_image", "videos, Wan": "assets/digits_video"}
TIMES, SIGMAS, SECANT = (0.95, 0.8, 0.6, 0.4, 0.2), (0.0, 0.005, 0.01, 0.02), 0.02


def rows_of(folder: str, *, samples: int, guidance: float, seed: int) -> list[dict[str, Any]]:
    """One row for each sigma of one teacher."""
    teacher, data = Teacher.load(folder), LatentDataset.load(f"{folder}/train_latents")
    x0, condition = data.latents[:samples], teacher.encode(list(data.prompts[:samples]))
    eps = sample_noise(seed, range(samples), tuple(x0.shape[1:]), stream="path_tangents")
    rows = []
    for sigma in SIGMAS:
        denoiser = Denoiser(copy.deepcopy(teacher.denoiser.network), teacher.family)
        smooth_time(denoiser.network, sigma, time_scale=teacher.family.time_scale)
        use_jvp_attention(denoiser.network)
        row: dict[str, Any] = {"sigma": sigma, "cosine": [], "length": [], "moved": []}
        for time in TIMES:
            t = torch.full((samples,), time)
            x_t = add_noise(x0, eps, t)
            direction, ones = teacher.velocity(x_t, t, condition, guidance), torch.ones(samples)

            def called(x: Tensor, s: Tensor, network: Denoiser = denoiser) -> Tensor:
                return network(x, s, condition)

            exact = total_derivative(called, x_t, t, direction, ones).derivative
            path = central_derivative(
                lambda x, s: teacher.denoiser(x, s, condition), x_t, t, direction, ones, step=SECANT
            )
            with torch.no_grad():
                plain, smooth = teacher.denoiser(x_t, t, condition), denoiser(x_t, t, condition)
            row["cosine"].append(torch.cosine_similarity(exact.flatten(1), path.flatten(1)).mean().item())
            row["length"].append((exact.flatten(1).norm(dim=1).mean() / path.flatten(1).norm(dim=1).mean()).item())
            row["moved"].append(((smooth - plain).norm() / plain.norm()).item())
        rows.append(row)
    return rows


def main() -> None:
    """Write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, help="file to write, .json")
    parser.add_argument("--samples", type=int, default=16, help="of each teacher's data")
    parser.add_argument("--guidance", type=float, default=2.5, help="of the path")
    parser.add_argument("--seed", type=int, default=0, help="of the noise")
    options = parser.parse_args()
    torch.set_num_threads(1)
    settings = {"samples": options.samples, "guidance": options.guidance, "seed": options.seed}
    record = {
        "command": f"python scripts/studies/path_tangents.py --output {options.output}",
        "settings": {**settings, "times": TIMES, "secant": SECANT},
        "versions": {library: version(library) for library in ("torch", "diffusers")},
        "rows": [{"teacher": name, **row} for name, folder in TEACHERS.items() for row in rows_of(folder, **settings)],
    }
    Path(options.output).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
