"""What layers of the time and of the modulation in fp32 change under bf16 autocast, on the embedded SD3 teacher.

    python scripts/studies/time_precision.py --output assets/benchmarks/time_precision.json

Errors of the velocity and of its central difference along the guided path against fp32. "time": the layers that embed
the time are left out of autocast; "vectors": all linear layers of one vector per sample are, whose numbers make the
stream between the blocks fp32, too; "vectors rounded": the same layers, their results rounded to bf16.
"""

from __future__ import annotations

import argparse
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.core.data import LatentDataset
from fewstep.core.denoiser import Denoiser
from fewstep.core.paths import add_noise
from fewstep.core.randomness import sample_noise
from fewstep.core.teacher import Teacher

TEACHER, TIMES, HALF_STEP = "assets/digits_image", (0.95, 0.8, 0.6, 0.4, 0.2), 0.01
CASES = ("plain", "time", "vectors", "vectors rounded")


class OutsideAutocast:
    """A linear layer's call outside of autocast where its input is one vector per sample."""

    def __init__(self, layer: nn.Linear, *, rounded: bool) -> None:
        self.layer, self.rounded = layer, rounded

    def __call__(self, x: Tensor) -> Tensor:
        if x.ndim != 2 or not torch.is_autocast_enabled("cpu"):
            return nn.Linear.forward(self.layer, x)
        with torch.autocast("cpu", enabled=False):
            found = nn.functional.linear(x.float(), self.layer.weight, self.layer.bias)
        return found.bfloat16() if self.rounded else found


def changed(network: nn.Module, case: str) -> list[nn.Linear]:
    """The layers of a case, their calls replaced."""
    layers = [
        layer
        for name, layer in network.named_modules()
        if isinstance(layer, nn.Linear) and (case != "time" or ".timestep_embedder." in f"{name}.")
    ]
    for layer in [] if case == "plain" else layers:
        called = OutsideAutocast(layer, rounded=case == "vectors rounded")
        layer.forward = called  # pyright: ignore[reportAttributeAccessIssue]
    return layers


def errors_of(
    denoiser: Denoiser, x_t: Tensor, t: Tensor, condition: Any, *, direction: Tensor
) -> tuple[Tensor, Tensor]:
    """The velocity, and its central difference along the direction."""

    def at(step: float) -> Tensor:
        return denoiser(x_t + step * direction, t + step, condition).float()

    with torch.no_grad():
        return at(0.0), (at(HALF_STEP) - at(-HALF_STEP)) / (2 * HALF_STEP)


def main() -> None:
    """Write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, help="file to write, .json")
    parser.add_argument("--samples", type=int, default=8, help="of the teacher's data")
    parser.add_argument("--guidance", type=float, default=2.5, help="of the path")
    parser.add_argument("--seed", type=int, default=0, help="of the noise")
    options = parser.parse_args()
    torch.set_num_threads(1)
    teacher, data = Teacher.load(TEACHER), LatentDataset.load(f"{TEACHER}/train_latents")
    x0, condition = data.latents[: options.samples], teacher.encode(list(data.prompts[: options.samples]))
    eps = sample_noise(options.seed, range(options.samples), tuple(x0.shape[1:]), stream="time_precision")
    rows = []
    for time in TIMES:
        t = torch.full((options.samples,), time)
        x_t = add_noise(x0, eps, t)
        direction = teacher.velocity(x_t, t, condition, options.guidance)
        exact = errors_of(teacher.denoiser, x_t, t, condition, direction=direction)
        for case in CASES:
            layers = changed(teacher.denoiser.network, case)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                found = errors_of(teacher.denoiser, x_t, t, condition, direction=direction)
            for layer in layers:
                layer.__dict__.pop("forward", None)
            relative = [((a - b).norm() / b.norm()).item() for a, b in zip(found, exact, strict=True)]
            rows.append({"time": time, "case": case, "velocity": relative[0], "difference": relative[1]})
    record = {
        "command": f"python scripts/studies/time_precision.py --output {options.output}",
        "settings": {"samples": options.samples, "guidance": options.guidance, "seed": options.seed},
        "versions": {library: version(library) for library in ("torch", "diffusers")},
        "rows": rows,
    }
    Path(options.output).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
