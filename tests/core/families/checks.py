"""What every family has to pass, on a tiny random model of its stock class.

A family's test file builds its model and inherits `FamilyChecks`; the same functions make the recorded table
(`python -m tests.core.families.table`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from fewstep.core.condition import Condition
from fewstep.core.denoiser import Denoiser
from fewstep.core.export.pipeline import export_pipeline
from fewstep.core.export.record import ExportRecord, StudentReport
from fewstep.core.export.sampler import SamplerSpec
from fewstep.core.grids import step_grid
from fewstep.core.networks.lora import add_lora
from fewstep.core.settings import ModelSource
from fewstep.core.tangents.network import check_denoiser_jvp, use_jvp_attention
from fewstep.core.teacher import Teacher
from fewstep.kernels.check_jvp import Float64Inside

PROMPTS = ("a red house 42", "x")
SEED = 7
# A whole trajectory in fp32, of its largest latent.
PARITY = 1e-4
TANGENT = 1e-9


@dataclass(frozen=True)
class TinyModel:
    """A tiny random pipeline and how it is called.

    Attributes:
        build: the pipeline, its modules in eval mode.
        size: height, width and frames of a sample.
        guidance: canonical, of the trajectory; 1 where the stock call has none by two calls.
        prompts: what it is asked for.
        grids: uneven grids of a student by sampler, which the stock call takes as an argument; none where it does not.
        lora: whether the pipeline loads adapters.
        samplers: those of its exports.
        shift: of the grids of its students.
        parts: components that those who load an export bring along.
        indices: of its students' grids by their steps, for networks on a noise table.
        calls_one: whether the stock call makes one sample.
        told_picture: whether it is told a picture by choice.
    """

    build: Callable[[], Any]
    size: dict[str, Any]
    guidance: float = 3.0
    prompts: tuple[str, ...] = PROMPTS
    grids: Mapping[str, tuple[float, ...]] = field(
        default_factory=lambda: {"sde": (1.0, 0.7, 0.4, 0.15), "ode": (1.0, 0.6, 0.5, 0.2)}
    )
    lora: bool = True
    indices: Mapping[int, tuple[int, ...]] | None = None
    parts: Callable[[], dict[str, Any]] = dict
    samplers: tuple[str, ...] = ("ode", "sde")
    shift: float = 3.0
    calls_one: bool = False
    told_picture: bool = False

    @property
    def called(self) -> list[str]:
        """The prompts of one stock call."""
        return list(self.prompts[:1] if self.calls_one else self.prompts)

    def times(self, steps: int, teacher: Teacher) -> tuple[float, ...]:
        """The grid of a student of so many steps."""
        if self.indices is None:
            return step_grid(steps, shift=self.shift)
        return tuple(teacher.family.flow_time(torch.tensor(self.indices[steps], dtype=torch.float64)).tolist())

    def teacher(self) -> Teacher:
        """The model as a teacher."""
        return Teacher(self.build(), path="owner/tiny", told_picture=self.told_picture)

    def source(self, folder: Path) -> ModelSource:
        """The model on disk."""
        return ModelSource(path=str(folder), told_picture=self.told_picture)

    def shape(self, teacher: Teacher) -> tuple[int, ...]:
        """Of its latents."""
        size = dict(self.size)
        return teacher.latent_shape(size.get("height"), size.get("width"), frames=size.get("frames"))


def picture_of(model: TinyModel) -> Tensor:
    """One picture of 8 bits, [1, 3, H, W]."""
    generator = torch.Generator().manual_seed(SEED)
    return torch.randint(256, (1, 3, model.size["height"], model.size["width"]), generator=generator) / 255


def told(model: TinyModel, teacher: Teacher, prompts: Sequence[str] | None = None) -> Condition:
    """The condition of prompts, with the picture where the network is told one."""
    texts = list(model.prompts if prompts is None else prompts)
    if not teacher.family.takes_picture:
        return teacher.encode(texts, height=model.size.get("height"), width=model.size.get("width"))
    pictures = picture_of(model).expand(len(texts), -1, -1, -1)
    return teacher.encode(texts, pictures=pictures, frames=model.size.get("frames"))


def noise_of(shape: tuple[int, ...], count: int = len(PROMPTS), seed: int = SEED) -> Tensor:
    return torch.randn((count, *shape), generator=torch.Generator().manual_seed(seed))


def distance(found: Tensor, expected: Tensor) -> float:
    """Largest difference, of the largest number."""
    return ((found - expected).abs().max() / expected.abs().max()).item()


def stock_latents(model: TinyModel, teacher: Teacher, noise: Tensor, *, steps: int, guidance: float) -> Tensor:
    """What the stock pipeline makes of this noise, as canonical latents."""
    family, pipeline = teacher.family, teacher.pipeline
    arguments = family.text_arguments(model.called, guided=guidance != 1)
    arguments |= family.call_arguments(pipeline, **model.size) | family.guidance_arguments(guidance)
    arguments |= family.latent_arguments(pipeline, noise, SEED) | {"num_inference_steps": steps}
    arguments |= family.picture_arguments(picture_of(model))
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        found = family.latent_call(pipeline, arguments)
    return family.canonical_latents(pipeline, found, tuple(noise.shape[1:]))


def trajectory_difference(model: TinyModel, *, steps: int = 4) -> float:
    """The teacher's sampler against the stock pipeline, with guidance."""
    teacher = model.teacher()
    noise = noise_of(model.shape(teacher), len(model.called))
    expected = stock_latents(model, teacher, noise, steps=steps, guidance=model.guidance)
    condition = told(model, teacher, model.called)
    return distance(teacher.sample(noise, condition, steps=steps, guidance=model.guidance), expected)


def network_times(model: TinyModel, dtype: torch.dtype) -> tuple[list[float], list[float]]:
    """The times that the network is called with, by the stock pipeline and by the teacher's sampler."""
    teacher = model.teacher()
    teacher.pipeline.to(dtype)
    seen: list[float] = []

    def record(_: nn.Module, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
        time = next((named[name] for name in ("timestep", "t") if name in named), None)
        time = positional[1] if time is None else time
        seen.append(torch.as_tensor(time).double().flatten()[-1].item())

    for network in teacher.family.parts(teacher.denoiser.network).values():
        network.register_forward_pre_hook(record, with_kwargs=True)
    noise = noise_of(model.shape(teacher), len(model.called))
    condition = told(model, teacher, model.called)
    stock_latents(model, teacher, noise.to(dtype), steps=3, guidance=1.0)
    stock = list(seen)
    seen.clear()
    teacher.sample(noise, condition, steps=3, guidance=1.0)
    return stock, list(seen)


def student_of(teacher: Teacher) -> nn.Module:
    """The teacher's network after some training, here noise on every weight."""
    network = copy.deepcopy(teacher.denoiser.network)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return network


def adapted_network(teacher: Teacher) -> nn.Module:
    """The teacher's network with adapters that do something."""
    network = copy.deepcopy(teacher.denoiser.network)
    add_lora(network, rank=2, alpha=4.0, targets=teacher.family.lora_targets, seed=0)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return network


def export_student(
    model: TinyModel, folder: Path, output: Path, times: tuple[float, ...], sampler: Any, **arguments: Any
) -> ExportRecord:
    """Export a student of the model in `folder`."""
    student = arguments.pop("student", None)
    network = student_of(Teacher.load(model.source(folder))) if student is None else student
    report = StudentReport("dmd", "owner/tiny", guidance=3.0, step=1, ema=True, **model.size)
    return export_pipeline(
        model.source(folder), network, sampler=SamplerSpec(times, sampler), output=output, report=report, **arguments
    )


def tangent_errors(model: TinyModel) -> tuple[float, float]:
    """Errors of the tangents along the state and along time against central differences in fp64."""
    teacher = model.teacher()
    denoiser = teacher.denoiser.copy(trainable=False).double()
    use_jvp_attention(denoiser.network)
    condition = told(model, teacher).to(dtype=torch.float64)
    x_t = noise_of(model.shape(teacher), len(model.prompts)).double()
    with Float64Inside():
        found = check_denoiser_jvp(denoiser, x_t, torch.tensor([0.4, 0.7], dtype=torch.float64), condition)
    assert found.state.norm > 1e-3
    assert found.time.norm > 1e-3
    return found.state.error, found.time.error


def alone_difference(model: TinyModel) -> float:
    """A batch of two prompts of different lengths against each prompt alone."""
    teacher = model.teacher()
    x_t, t = noise_of(model.shape(teacher)), torch.tensor([0.4, 0.7])
    with torch.no_grad():
        joined = Condition.cat([told(model, teacher, [prompt]) for prompt in model.prompts])
        together = teacher.denoiser(x_t, t, joined)
        alone = [
            teacher.denoiser(x_t[i : i + 1], t[i : i + 1], told(model, teacher, [model.prompts[i]])) for i in (0, 1)
        ]
    return distance(together, torch.cat(alone))


class FamilyChecks:
    """The checks as tests; a test file of a family sets `model`."""

    model: TinyModel

    @pytest.fixture(scope="class")
    @classmethod
    def folder(cls, tmp_path_factory: pytest.TempPathFactory) -> Path:
        """The model on disk."""
        folder = tmp_path_factory.mktemp("model")
        cls.model.build().save_pretrained(folder, safe_serialization=True)
        return folder

    def test_a_trajectory_is_that_of_the_stock_pipeline(self) -> None:
        assert trajectory_difference(self.model) < PARITY

    def test_each_prompt_of_a_batch_is_what_it_is_alone(self) -> None:
        assert alone_difference(self.model) < 1e-5

    def test_times_in_bf16_are_those_of_the_stock_call(self) -> None:
        stock, ours = network_times(self.model, torch.bfloat16)
        assert len(stock) == 3
        assert ours == stock

    def test_latents_go_into_the_stock_call_and_come_back(self) -> None:
        teacher = self.model.teacher()
        latents = noise_of(self.model.shape(teacher))
        packed = teacher.family.stock_latents(teacher.pipeline, latents)
        found = teacher.family.canonical_latents(teacher.pipeline, packed, tuple(latents.shape[1:]))
        assert torch.equal(found, latents)

    def test_features_are_of_the_latents_positions(self) -> None:
        teacher = self.model.teacher()
        x_t, t = noise_of(self.model.shape(teacher)), torch.tensor([0.4, 0.7])
        blocks = range(len(teacher.family.blocks(teacher.denoiser.network)))
        with torch.no_grad():
            velocity, features = teacher.denoiser.velocity_and_features(x_t, t, told(self.model, teacher), list(blocks))
        assert velocity.shape == x_t.shape
        channels = teacher.family.feature_channels(teacher.denoiser.network, list(blocks))
        assert [tuple(one.shape[:2]) for one in features] == [(2, width) for width in channels]
        positions = {one.shape[2] for one in features}
        assert len(positions) == 1
        assert x_t[0, 0].numel() % positions.pop() == 0

    def test_pixels_are_those_of_the_stock_decoder(self) -> None:
        teacher = self.model.teacher()
        latents = noise_of(self.model.shape(teacher), 1)
        with torch.no_grad():
            pixels = teacher.decode(latents)
            again = teacher.encode_pixels(pixels)
        assert pixels.shape[-2:] == (self.model.size["height"], self.model.size["width"])
        assert again.shape == latents.shape
        assert 0 <= pixels.min() < pixels.max() <= 1

    @pytest.mark.slow
    @pytest.mark.parametrize(("steps", "sampler"), [(1, "ode"), (2, "sde"), (4, "ode"), (4, "sde")])
    def test_an_export_steps_where_the_student_was_trained(
        self, folder: Path, tmp_path: Path, steps: int, sampler: str
    ) -> None:
        if sampler not in self.model.samplers:
            pytest.skip(f"no export of {sampler}")
        times = self.model.times(steps, Teacher.load(self.model.source(folder)))
        record = export_student(self.model, folder, tmp_path / "export", times, sampler)
        assert record.verification is not None
        assert record.verification.sampler_difference < record.verification.sampler_tolerance
        assert (record.sigmas, record.timesteps) == (None, None)

    @pytest.mark.slow
    def test_any_grid_goes_into_the_call_or_is_refused(self, folder: Path, tmp_path: Path) -> None:
        for sampler, times in self.model.grids.items():
            record = export_student(self.model, folder, tmp_path / sampler, times, sampler)
            assert (record.sigmas or record.timesteps) is not None
            assert record.verification is not None
            assert record.verification.sampler_difference < record.verification.sampler_tolerance
        if not self.model.grids:
            times = (1.0, 0.8, 0.7, 0.1)
            if self.model.indices is not None:
                indices = torch.tensor([999.0, 700.0, 650.0, 100.0], dtype=torch.float64)
                times = tuple(Teacher.load(self.model.source(folder)).family.flow_time(indices).tolist())
            with pytest.raises(
                ValueError, match=r"is not a uniform grid with a time shift|takes no `timesteps`|even steps"
            ):
                export_student(self.model, folder, tmp_path / "export", times, "ode")

    @pytest.mark.slow
    def test_an_export_does_alone_what_its_card_says(self, folder: Path, tmp_path: Path) -> None:
        teacher = Teacher.load(self.model.source(folder))
        times = self.model.times(2, teacher)
        student = student_of(teacher)
        record = export_student(self.model, folder, tmp_path / "export", times, "ode", student=student)
        stock: Any = DiffusionPipeline.from_pretrained(tmp_path / "export", **self.model.parts())
        stock.set_progress_bar_config(disable=True)
        noise = noise_of(self.model.shape(teacher), len(self.model.called))
        family = teacher.family
        call = record.call_arguments() | family.text_arguments(self.model.called, guided=False)
        call |= family.picture_arguments(picture_of(self.model))
        found = family.latent_call(stock, call | family.latent_arguments(stock, noise, SEED))
        found = family.canonical_latents(stock, found, tuple(noise.shape[1:]))
        condition = told(self.model, teacher, self.model.called)
        x, denoiser = family.initial_state(noise, times[0]), Denoiser(student, family)
        for t, after in zip(times, (*times[1:], 0.0), strict=True):
            with torch.no_grad():
                x = x + (after - t) * denoiser(x, torch.full((len(x),), t, dtype=torch.float32), condition)
        assert distance(found, x) < 3e-5

    @pytest.mark.slow
    def test_adapters_load_into_the_stock_pipeline_or_are_refused(self, folder: Path, tmp_path: Path) -> None:
        teacher = Teacher.load(self.model.source(folder))
        network = adapted_network(teacher)
        times = self.model.times(2, teacher)
        sampler = self.model.samplers[-1]
        if self.model.lora:
            record = export_student(
                self.model, folder, tmp_path / "lora", times, sampler, student=network, lora_only=True
            )
            assert record.weights == "lora"
        else:
            with pytest.raises(ValueError, match="cannot load adapters"):
                export_student(self.model, folder, tmp_path / "lora", times, sampler, student=network, lora_only=True)
        merged = export_student(self.model, folder, tmp_path / "merged", times, sampler, student=network)
        assert merged.verification is not None
        assert merged.verification.sampler_difference < 3e-5

    @pytest.mark.slow
    def test_tangents_are_the_derivatives(self) -> None:
        assert max(tangent_errors(self.model)) < TANGENT
