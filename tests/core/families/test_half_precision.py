"""Every family in bf16: a teacher that is kept in it, and tangents of fp32 weights under autocast, against fp32."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.core.condition import Condition
from fewstep.core.config import OptimizerConfig, RunConfig
from fewstep.core.denoiser import Denoiser
from fewstep.core.families.family import network_dtype
from fewstep.core.networks.lora import add_lora
from fewstep.core.settings import TeacherConfig
from fewstep.core.tangents.network import check_denoiser_jvp, use_jvp_attention
from fewstep.core.teacher import Teacher
from fewstep.core.training.run_directory import RunDirectory
from fewstep.core.training.trainer import Trainer
from tests.tiny_networks import widen_weights
from tests.tiny_pipelines import build_sd3, build_sd15, build_sdxl, save_pipeline
from tests.tiny_sana import build_sana
from tests.tiny_videos import build_video_pipeline

pytestmark = pytest.mark.usefixtures("fresh_accelerate")

BUILDERS: dict[str, Callable[[], Any]] = {
    "sd3": build_sd3,
    "sd15": build_sd15,
    "sdxl": build_sdxl,
    "sana": build_sana,
    "wan": build_video_pipeline,
    "wan_time_per_token": lambda: build_video_pipeline(expand_timesteps=True),
}
SIZES = {"wan": (32, 32, 5), "wan_time_per_token": (32, 32, 5)}
PROMPTS = ["a red cat", "two dogs"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each pipeline on disk, as a user has it: what stays in fp32 is decided when it is loaded."""
    return {name: save_pipeline(build(), tmp_path_factory.mktemp(name) / "teacher") for name, build in BUILDERS.items()}


def inputs(teacher: Teacher, name: str) -> tuple[Tensor, Tensor, Condition]:
    height, width, frames = SIZES.get(name, (None, None, None))
    shape = teacher.latent_shape(height, width, frames=frames)
    x_t = torch.randn((2, *shape), generator=torch.Generator().manual_seed(1))
    return x_t, torch.tensor([0.3, 0.7]), teacher.encode(PROMPTS)


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.slow
@pytest.mark.parametrize("name", list(BUILDERS))
def test_a_teacher_in_bf16_is_the_one_in_fp32_but_for_rounding(folders: dict[str, Path], name: str) -> None:
    exact, half = (Teacher.load(folders[name], dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    x_t, t, condition = inputs(exact, name)
    assert network_dtype(half.denoiser.network) == torch.bfloat16
    expected = exact.velocity(x_t, t, condition, 2.0)
    found = half.velocity(x_t, t, half.encode(PROMPTS), 2.0)
    assert found.dtype == torch.float32
    assert 1e-5 < relative(found, expected) < 0.05


@pytest.mark.parametrize("name", list(BUILDERS))
def test_the_autoencoder_has_a_precision_of_its_own(folders: dict[str, Path], name: str) -> None:
    """Exact weights, not those of bf16 widened again."""
    exact = Teacher.load(folders[name])
    settings = TeacherConfig(path=str(folders[name]), dtype="bfloat16")
    mixed = Teacher.of(settings, device=torch.device("cpu"))
    assert network_dtype(mixed.denoiser.network) == torch.bfloat16
    expected = exact.pipeline.components["vae"].state_dict()
    found = mixed.pipeline.components["vae"].state_dict()
    assert len(found) > 10
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    narrow = Teacher.load(folders[name], dtype=torch.bfloat16)
    assert network_dtype(narrow.pipeline.components["vae"]) == torch.bfloat16


def test_adapters_do_not_change_the_dtype_of_a_network(folders: dict[str, Path]) -> None:
    teacher = Teacher.load(folders["wan"], dtype=torch.bfloat16)
    network = teacher.denoiser.network
    kept = {parameter.dtype for parameter in network.parameters()}
    assert kept == {torch.float32, torch.bfloat16}, "this class keeps no layers in fp32, and tests nothing here"
    assert next(network.parameters()).dtype == torch.float32
    add_lora(network, rank=2, alpha=2.0, targets=teacher.family.lora_targets, seed=0)
    assert network_dtype(network) == torch.bfloat16


def autocast_student(teacher: Teacher, folder: Path) -> tuple[Denoiser, Trainer]:
    """A student of fp32 weights whose call a trainer has put under bf16 autocast."""
    denoiser = teacher.denoiser.copy().float()
    widen_weights(denoiser.network)
    use_jvp_attention(denoiser.network)
    run = RunConfig(
        directory=str(folder),
        seed=0,
        steps=1,
        batch_size=2,
        checkpoint_every=1,
        keep_checkpoints=1,
        sample_every=1,
        log_every=1,
        mixed_precision="bf16",
    )
    trainer = Trainer(run, RunDirectory(folder), cpu=True)
    trainer.add_role("student", denoiser, OptimizerConfig(learning_rate=1e-4))
    return denoiser, trainer


@pytest.mark.parametrize("name", list(BUILDERS))
def test_tangents_under_autocast(folders: dict[str, Path], tmp_path: Path, name: str) -> None:
    """Within 2 % of fp32 while the time stays in fp32; the check before a run is not disturbed by autocast."""
    teacher = Teacher.load(folders[name])
    x_t, t, condition = inputs(teacher, name)
    student, trainer = autocast_student(teacher, tmp_path / "run")
    found = check_denoiser_jvp(student, x_t, t, condition)
    assert max(found.state.error, found.time.error) < 0.02

    def tangent(call: Callable[..., Tensor], time: Tensor) -> Tensor:
        dx, dt = torch.ones_like(x_t), torch.ones_like(time)
        return torch.func.jvp(lambda x, s: call(x, s, condition), (x_t, time), (dx, dt))[1]

    with torch.no_grad():
        exact = tangent(lambda *arguments: Denoiser.forward(student, *arguments), t)
        half = tangent(student, t)
        rounded = tangent(lambda x, time, condition: student(x, time.bfloat16(), condition), t)
    trainer.close()
    assert 1e-4 < relative(half, exact) < 0.02
    # A time that is rounded to bf16 is another time, on whose scale networks turn: this is what the bound must catch.
    assert relative(rounded, exact) > 0.1
