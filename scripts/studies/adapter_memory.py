"""Memory of a LoRA distillation step: adapters on one base against a copy of the network for each role.

    python scripts/studies/adapter_memory.py --output assets/benchmarks/adapter_memory.json

Each variant runs in a process of its own, on a random SD3 of 141 M parameters in bf16: build student and fake
score, then whole steps of DMD with gradient checkpointing, AdamW and an average. What is read is the anonymous resident
memory of the process (Linux), over what it held before the teacher was there, and its highest value in a step.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

RANK, STEPS, BATCH = 16, 2, 1
MIB = 2**20


@dataclass(frozen=True)
class Measured:
    """MiB of one variant: `expected` are base, adapters, their gradients, moments and average, by arithmetic."""

    variant: str
    parameters: int
    adapters: int
    expected: float
    after_build: float
    after_steps: float
    highest: float


def resident() -> float:
    """Anonymous resident memory of this process in MiB, after free pages went back to the system."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return anonymous()


def anonymous() -> float:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024


def build_teacher() -> Any:
    """A random SD3 transformer of 141 M parameters around the tiny rest of a pipeline, in bf16."""
    import torch
    from diffusers import SD3Transformer2DModel

    from fewstep.core.teacher import Teacher

    teacher = Teacher.load(Path(__file__).resolve().parents[2] / "assets" / "digits_image")
    tiny: Any = teacher.denoiser.network
    torch.manual_seed(0)
    kept = ("in_channels", "out_channels", "patch_size", "joint_attention_dim", "pooled_projection_dim", "sample_size")
    network = SD3Transformer2DModel(
        **{name: tiny.config[name] for name in kept},
        num_layers=12,
        num_attention_heads=9,
        attention_head_dim=64,
        caption_projection_dim=576,
        pos_embed_max_size=32,
    )
    torch.nn.Module.to(network.eval(), torch.bfloat16)
    pipeline: Any = teacher.pipeline
    pipeline.register_modules(transformer=network)
    return Teacher(pipeline, path="random")


def measure(variant: str) -> Measured:
    """Build the roles of a variant and make whole steps."""
    import torch

    from fewstep.core.config import OptimizerConfig
    from fewstep.core.fake_score import FakeScore
    from fewstep.core.networks.lora import add_lora
    from fewstep.core.training.ema import Ema
    from fewstep.core.training.optimizers import build_optimizer

    torch.set_num_threads(1)
    before = resident()
    teacher = build_teacher()

    def role(seed: int) -> Any:
        denoiser = teacher.denoiser.beside() if variant == "shared" else teacher.denoiser.copy(trainable=False).float()
        add_lora(denoiser.network, rank=RANK, alpha=RANK, targets=teacher.family.lora_targets, seed=seed)
        denoiser.network.enable_gradient_checkpointing()
        return denoiser

    student, trunk = role(1), role(2)
    fake = FakeScore(trunk)
    settings = OptimizerConfig(learning_rate=1e-4)
    trained = {
        name: [(key, p) for key, p in module.named_parameters() if p.requires_grad]
        for name, module in (("student", student), ("fake", fake))
    }
    optimizers = {name: build_optimizer(parameters, settings) for name, parameters in trained.items()}
    average = Ema(student, 0.99)
    built = resident() - before
    highest = watched_steps(teacher, student, fake, list(optimizers.values()), average, before=before)
    base = sum(p.numel() * p.element_size() for p in teacher.denoiser.parameters())
    adapters = {name: sum(p.numel() for _, p in parameters) for name, parameters in trained.items()}
    # Weights, gradients and two moments of both, and the average of the student.
    expected = base + 4 * (4 * sum(adapters.values()) + adapters["student"])
    return Measured(
        variant=variant,
        parameters=sum(p.numel() for p in teacher.denoiser.parameters()),
        adapters=sum(adapters.values()),
        expected=round(expected / MIB, 1),
        after_build=round(built, 1),
        after_steps=round(resident() - before, 1),
        highest=round(highest, 1),
    )


def watched_steps(
    teacher: Any, student: Any, fake: Any, optimizers: list[Any], average: Any, *, before: float
) -> float:
    """Whole steps of DMD; the highest memory in them, in MiB over `before`."""
    import torch

    from fewstep.core.randomness import Draw
    from fewstep.core.training.roles import frozen
    from fewstep.dmd.config import MatchingConfig
    from fewstep.dmd.matching import Scores, fake_score_step, student_step

    highest, stop = [0.0], threading.Event()

    def watch() -> None:
        while not stop.is_set():
            highest[0] = max(highest[0], anonymous() - before)
            time.sleep(0.002)

    thread = threading.Thread(target=watch)
    thread.start()
    condition, shape = teacher.encode(["the digit seven"] * BATCH), teacher.latent_shape()
    for step in range(STEPS):
        draw = Draw(step, list(range(BATCH)), torch.device("cpu"))
        noise = draw.noise(shape, "noise")
        x0 = noise - student(noise, torch.ones(BATCH), condition)
        with frozen(fake):
            scores, times = Scores(teacher, fake, 2.0), MatchingConfig()
            student_step(x0, condition, scores=scores, draw=draw, times=times).loss.backward()
        fake_score_step(
            x0.detach(), condition, fake_score=fake, draw=draw, times=MatchingConfig(), clock=teacher.family
        ).loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        average.update(step)
    stop.set()
    thread.join()
    return highest[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", help="file to write the record to")
    parser.add_argument("--variant", choices=["shared", "copies"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.variant is not None:
        print(json.dumps(asdict(measure(arguments.variant))))
        return
    rows = []
    for variant in ("shared", "copies"):
        command = [sys.executable, __file__, "--variant", variant]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        print(rows[-1])
    record = {
        "command": "python scripts/studies/adapter_memory.py --output assets/benchmarks/adapter_memory.json",
        "rank": RANK,
        "batch": BATCH,
        "unit": "MiB of anonymous resident memory over that before the teacher",
        "variants": rows,
    }
    if arguments.output is not None:
        Path(arguments.output).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
