"""Derivatives near t = 1 of a causal teacher of the embedded videos, along its own guided path.

    python scripts/studies/edge_tangents.py --run RUN --output assets/benchmarks/edge_tangents.json

At each time the derivative of the velocity, exact under several smoothings and as a difference over one step of the
teacher, is held against its mean over 0.1 of the teacher's ODE: mean cosine over clips, and ratio of mean lengths.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from studies.causal import load_student
from studies.forcing_curves import GUIDANCE, clips_of, mask_of
from torch import Tensor

from fewstep.causal_video.model.network import TIME_SCALE
from fewstep.causal_video.stages.batch import CausalTeacher, PackedNetwork, VideoBatch
from fewstep.consistency.tangents import total_derivative
from fewstep.core.paths import add_noise
from fewstep.core.randomness import sample_noise
from fewstep.core.tangents.smooth import smooth_time
from fewstep.evaluation.provenance import collect_provenance

TIMES, SIGMAS, STEPS = (1.0, 0.99, 0.98, 0.95, 0.9, 0.8), (0.0, 0.01, 0.02, 0.05), (0.02, 0.05)
# Of the teacher's ODE, in so many Euler steps.
STRETCH, ODE_STEPS = 0.1, 10


def compared(found: Tensor, path: Tensor) -> dict[str, float]:
    """Cosine with the path's derivative, and length over its."""
    one, other = found.flatten(1), path.flatten(1)
    length = one.norm(dim=1).mean() / other.norm(dim=1).mean()
    return {"cosine": torch.cosine_similarity(one, other).mean().item(), "length": length.item()}


def rows_of(run: Path, *, clips: int, seed: int) -> list[dict[str, Any]]:
    """One row for each time and each way to differentiate."""
    found = load_student(run)
    x0, captions = clips_of(found.teacher, "train", clips)
    eps = sample_noise(seed, range(clips), tuple(x0.shape[1:]), stream="edge")
    condition = found.teacher.encode(captions)
    batch, mask = VideoBatch(x0, eps, condition, x0, None, None, 0), mask_of(found.network, found.settings, x0)
    causal = CausalTeacher(found.network, found.teacher.null_condition, GUIDANCE)
    networks = {sigma: copy.deepcopy(found.network) for sigma in SIGMAS}
    for sigma, network in networks.items():
        smooth_time(network.transformer, sigma, time_scale=TIME_SCALE)
    rows = []
    for time in TIMES:
        t = torch.full((clips,), time)
        x_t = add_noise(x0, eps, t)
        direction = causal.velocity(x_t, t, batch, mask)

        def velocity(x: Tensor, s: Tensor, network: Any = found.network) -> Tensor:
            return PackedNetwork(network, batch, mask)(x, s, condition)

        with torch.no_grad():
            here, x = velocity(x_t, t), x_t
            for step in range(ODE_STEPS):
                x = x - STRETCH / ODE_STEPS * causal.velocity(x, t - step * STRETCH / ODE_STEPS, batch, mask)
            path = (here - velocity(x, t - STRETCH)) / STRETCH
            for size in STEPS:
                difference = (here - velocity(x_t - size * direction, t - size)) / size
                rows.append({"time": time, "way": "difference", "size": size, **compared(difference, path)})
        for sigma, network in networks.items():
            exact = total_derivative(
                lambda x, s, network=network: velocity(x, s, network), x_t, t, direction, torch.ones(clips)
            ).derivative
            rows.append({"time": time, "way": "exact", "size": sigma, **compared(exact, path)})
    return rows


def main() -> None:
    """Write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True, help="run directory of a teacher_forcing stage")
    parser.add_argument("--clips", type=int, default=16, help="of the training digits")
    parser.add_argument("--seed", type=int, default=0, help="of the noise")
    parser.add_argument("--output", required=True, help="file to write, .json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = rows_of(Path(options.run), clips=options.clips, seed=options.seed)
    record = {"provenance": asdict(collect_provenance(sys.argv[0], arguments=sys.argv[1:])), "rows": rows}
    Path(options.output).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
