"""Wan 2.2 A14B: two experts, of which the time chooses, against the stock pipelines."""

# diffusers annotates constructors with the types of their defaults, which are narrower than what they take.
# pyright: reportArgumentType=false

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanImageToVideoPipeline, WanPipeline

from fewstep.core.denoiser import Denoiser
from fewstep.core.families.table import build_family, configs_of
from fewstep.core.families.wan import require_wan
from fewstep.core.networks.experts import Experts
from fewstep.core.networks.lora import add_lora, lora_layers
from fewstep.core.teacher import Teacher
from tests.core.families.checks import FamilyChecks, TinyModel, distance, noise_of, stock_latents, student_of, told
from tests.core.families.test_families_wan_image import CHANNELS, build_transformer, build_vae
from tests.tiny_pipelines import build_t5_tokenizer
from tests.tiny_videos import build_umt5

BOUNDARY = 0.875


def build_experts(*, pictures: bool = False, seed: int = 0) -> Any:
    """A14B text-to-video, or image-to-video, whose experts are told the picture without CLIP."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizer = build_t5_tokenizer()
        tokenizer.model_max_length = 512 if pictures else 16
        channels = 2 * CHANNELS + 4 if pictures else CHANNELS
        kind: Any = WanImageToVideoPipeline if pictures else WanPipeline
        pipeline = kind(
            tokenizer=tokenizer,
            text_encoder=build_umt5(tokenizer),
            vae=build_vae(),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
            transformer=build_transformer(channels),
            transformer_2=build_transformer(channels),
            boundary_ratio=BOUNDARY,
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


SIZE = {"height": 32, "width": 16, "frames": 5}
# 1, 0.9375 and 0.8333, 0.625: two steps of each expert.
TEXT = TinyModel(build_experts, SIZE, guidance=4.0, grids={}, shift=5.0)
PICTURE = TinyModel(lambda: build_experts(pictures=True), SIZE, guidance=3.5, grids={}, shift=5.0)


class ExpertChecks(FamilyChecks):
    def test_features_are_of_the_latents_positions(self) -> None:
        teacher = self.model.teacher()
        with pytest.raises(ValueError, match="features of a network of two experts"):
            teacher.family.feature_modules(teacher.denoiser.network, None)


class TestTextToVideo(ExpertChecks):
    model = TEXT


class TestImageToVideo(ExpertChecks):
    model = PICTURE


def test_each_sample_goes_to_the_expert_of_its_time() -> None:
    teacher = TEXT.teacher()
    experts = teacher.denoiser.network
    assert isinstance(experts, Experts)
    condition, x_t = told(TEXT, teacher, ["a", "bb", "c 7"]), noise_of(TEXT.shape(teacher), 3)
    t = torch.tensor([0.9, 0.2, BOUNDARY])
    with torch.no_grad():
        found = teacher.denoiser(x_t, t, condition)
        high, low = (Denoiser(part, teacher.family)(x_t, t, condition) for part in experts.parts.values())
    expected = torch.stack([high[0], low[1], high[2]])
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)
    assert distance(high, low) > 0.1
    with pytest.raises(ValueError, match="one time a sample"):
        teacher.denoiser(x_t, t[:, None].expand(-1, 2), condition)


def test_an_expert_without_samples_has_gradients_of_zero() -> None:
    teacher = TEXT.teacher()
    student = teacher.denoiser.copy()
    condition, x_t = told(TEXT, teacher), noise_of(TEXT.shape(teacher))
    student(x_t, torch.tensor([0.95, 1.0]), condition).square().mean().backward()
    experts: Any = student.network
    networks = experts.parts
    norms = {
        name: sum(float(p.grad.abs().sum()) for p in part.parameters() if p.grad is not None)
        for name, part in networks.items()
    }
    assert norms["transformer"] > 0
    assert norms["transformer_2"] == 0
    assert all(p.grad is not None for p in networks["transformer_2"].parameters())


def test_each_expert_has_its_own_guidance() -> None:
    teacher = TEXT.teacher()
    teacher.guidance_low = 3.0
    noise = noise_of(TEXT.shape(teacher))
    found = teacher.sample(noise, told(TEXT, teacher), steps=4, guidance=4.0)
    pipeline: Any = teacher.pipeline
    expected = pipeline(
        list(TEXT.prompts),
        height=32,
        width=16,
        num_frames=5,
        num_inference_steps=4,
        guidance_scale=4.0,
        guidance_scale_2=3.0,
        latents=noise.clone(),
        max_sequence_length=16,
        output_type="latent",
        return_dict=False,
    )[0]
    assert distance(found, expected) < 1e-4
    assert distance(stock_latents(TEXT, teacher, noise, steps=4, guidance=4.0), expected) > 1e-3


def test_an_export_holds_both_networks_and_their_boundary(tmp_path: Path) -> None:
    from tests.core.families.checks import export_student

    build_experts().save_pretrained(tmp_path / "model")
    teacher = Teacher.load(tmp_path / "model")
    student = student_of(teacher)
    export_student(TEXT, tmp_path / "model", tmp_path / "export", (1.0, 0.5), "ode", student=student)
    index = json.loads((tmp_path / "export" / "model_index.json").read_text(encoding="utf-8"))
    assert index["boundary_ratio"] == BOUNDARY
    again = Teacher.load(tmp_path / "export").denoiser.network
    for (name, mine), (other, theirs) in zip(student.state_dict().items(), again.state_dict().items(), strict=True):
        assert name == other
        assert torch.equal(mine, theirs)


def test_adapters_sit_on_both_experts(tmp_path: Path) -> None:
    teacher = TEXT.teacher()
    network = copy.deepcopy(teacher.denoiser.network)
    add_lora(network, rank=2, alpha=2.0, targets=teacher.family.lora_targets, seed=0)
    places = {name.partition(".")[0] for name in lora_layers(network)}
    assert places == {"transformer", "transformer_2"}


@pytest.mark.parametrize(("shift", "fits"), [(3.0, True), (7.0, False)])
def test_times_on_the_boundary_are_refused(shift: float, fits: bool) -> None:
    family = build_family(build_experts())
    # A grid of two steps: 1 and shift / (shift + 1).
    times = (1.0, shift / (shift + 1))
    if fits:
        family.require_exportable("ode", times)
        assert abs(times[1] - BOUNDARY) > 0.1
    else:
        with pytest.raises(ValueError, match=r"0\.875 lies on the boundary"):
            family.require_exportable("ode", times)


def test_half_a_pair_is_refused_by_its_configs() -> None:
    configs = configs_of(build_experts())
    index = configs[""]
    for changed in (
        {name: config for name, config in configs.items() if name != "transformer_2"},
        {name: config for name, config in configs.items() if name != "transformer"},
        {**configs, "": {**index, "boundary_ratio": None}},
    ):
        with pytest.raises(ValueError, match="two switch there"):
            require_wan(changed)
    with pytest.raises(ValueError, match=r"boundary_ratio is 1\.5"):
        require_wan({**configs, "": {**index, "boundary_ratio": 1.5}})
