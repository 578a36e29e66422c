"""Matching a teacher that a reward tilts: the same strength along thin and wide directions, in closed form."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.core.condition import Condition
from fewstep.core.paths import add_noise
from fewstep.core.randomness import sample_noise
from fewstep.core.settings import TimeLawConfig
from fewstep.core.teacher import Teacher
from fewstep.dmd.loss import distribution_matching_loss
from fewstep.dmd.reward.config import RewardMatchingConfig, RewardSettings, ScorerConfig
from fewstep.dmd.reward.matching import ComparedScores
from fewstep.dmd.reward.methods.rtdmd import effective_tilt
from fewstep.dmd.reward.methods.tilted_teacher import reward_gradient, tilted_teacher_loss
from fewstep.dmd.reward.scores import RewardModel
from fewstep.dmd.reward.sections import DirectConfig, RtdmdConfig, TiltedTeacherConfig
from fewstep.evaluation.measures.spectrum import LatentSpread, band_variances
from fewstep.evaluation.scorers.scorer import ScorerCard
from tests.core.families.test_families_flux import MODEL as FLUX
from tests.dmd.gaussian_bench import Gaussian
from tests.dmd.reward.reward_run import reward_config
from tests.dmd.tiny_run import TinyInputs
from tests.tiny_pipelines import build_sd3, build_sdxl, save_pipeline
from tests.tiny_sana import build_sana
from tests.tiny_videos import build_video_pipeline

VARIANCES = torch.tensor([1.0, 0.1, 0.01, 0.001], dtype=torch.float64)


def shifted_times(count: int, shift: float) -> Tensor:
    u = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    return (shift * u / (1 + (shift - 1) * u)).clamp(0.02, 0.98)


def strengths(t: Tensor) -> list[float]:
    """The tilt of a reward on the sample along each direction, over that of the first."""
    one = torch.ones((), dtype=torch.float64)
    sizes: dict[str, Any] = {"reward_weight": 1.0, "matching_weight": 1.0, "elements": 1, "student_variance": one}
    found = [float(effective_tilt(t, teacher_variance=variance, **sizes).mean) for variance in VARIANCES]
    return [tilt / found[0] for tilt in found]


def test_a_reward_on_the_sample_is_stronger_along_thin_directions() -> None:
    """With RTDMD's times nearly as 1 / variance; compared at times of .02 to .1 alone, within 2 down to .01."""
    assert strengths(shifted_times(20_000, 4.0)) == pytest.approx([1, 8.5086, 79.648, 777.05], rel=1e-4)
    u = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    assert strengths(0.02 + 0.08 * u) == pytest.approx([1, 1.0645, 1.6551, 6.4870], rel=1e-4)


def test_a_student_of_the_tilted_teacher_rests_at_the_tilt_along_every_direction() -> None:
    """N(m + lambda S a, S) for r = a x: zero gradient of every sample at every time; away from it back to it."""
    scale, slope, mean = 0.7, torch.tensor([0.8, -1.5, 2.0, 5.0], dtype=torch.float64), 0.3
    generator = torch.Generator().manual_seed(0)
    z, eps = (torch.randn(64, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    t = shifted_times(64, 4.0)
    teacher = Gaussian(mean, VARIANCES.sqrt())

    def gradient(shift: float) -> Tensor:
        """d loss / d x0 of each sample, with an exact fake score."""
        student = Gaussian(mean + scale * VARIANCES * slope + shift * VARIANCES.sqrt(), VARIANCES.sqrt())
        x0 = student.sample(z).requires_grad_()
        x_t = add_noise(x0.detach(), eps, t).requires_grad_()
        real = teacher.x0(x_t, t[:, None])
        (of_reward,) = torch.autograd.grad((real * slope).sum(), x_t)
        real, x_t = real.detach(), x_t.detach()
        loss = distribution_matching_loss(x0, student.x0(x_t, t[:, None]), real)
        loss = loss + tilted_teacher_loss(x0, real, t, of_reward, tilt_scale=scale)
        return torch.autograd.grad(loss, x0)[0]

    assert float(gradient(0.0).abs().max()) < 1e-14
    for shift in (0.5, -0.5):
        assert bool((gradient(shift).sum(dim=0).sign() == math.copysign(1.0, shift)).all())


def test_the_added_loss_has_the_stated_gradient_and_refuses_what_it_cannot_use() -> None:
    x0 = torch.tensor([[1.0, 3.0]], dtype=torch.float64, requires_grad=True)
    real, of_reward = torch.zeros(1, 2, dtype=torch.float64), torch.tensor([[2.0, -1.0]], dtype=torch.float64)
    t = torch.tensor([0.5], dtype=torch.float64)
    loss = tilted_teacher_loss(x0, real, t, of_reward, tilt_scale=3.0)
    assert loss.item() == 0.0
    # t^2 / (1 - t) = 1/2, normaliser 2, two elements.
    assert torch.autograd.grad(loss, x0)[0].tolist() == [[-0.75, 0.375]]
    with pytest.raises(ValueError, match=r"times must lie in \(0, 1\), got 1 to 1"):
        tilted_teacher_loss(x0, real, torch.ones(1), of_reward, tilt_scale=1.0)
    with pytest.raises(ValueError, match="gradient through the teacher is not finite"):
        tilted_teacher_loss(x0, real, t, of_reward * math.nan, tilt_scale=1.0)
    with pytest.raises(ValueError, match=r"tilt_scale is 0\.0; it must be above 0"):
        TiltedTeacherConfig(tilt_scale=0.0)
    with pytest.raises(ValueError, match="two strengths of one reward"):
        RtdmdConfig(direct=DirectConfig(weight=1.0), tilted_teacher=TiltedTeacherConfig(tilt_scale=1.0))


def test_settings_that_do_not_go_together_are_named(inputs: TinyInputs, tmp_path: Path) -> None:
    tilted = {"rtdmd": RtdmdConfig(tilted_teacher=TiltedTeacherConfig(tilt_scale=1.0, scorers=("beauty",)))}
    with pytest.raises(ValueError, match=r"rtdmd\.tilted_teacher\.scorers names 'beauty'"):
        reward_config(inputs, tmp_path, tmp_path, "rtdmd", tilted)
    every = {"rtdmd": RtdmdConfig(tilted_teacher=TiltedTeacherConfig(tilt_scale=1.0)), "matching.steps": "any"}
    with pytest.raises(ValueError, match=r"tilted_teacher with matching\.ambient and matching\.steps 'any'"):
        reward_config(inputs, tmp_path, tmp_path, "rtdmd", every)
    to_noise = RewardMatchingConfig(score_times=TimeLawConfig(max=1.0))
    with pytest.raises(ValueError, match=r"score_times\.max is 1\.0 with rtdmd\.tilted_teacher"):
        reward_config(inputs, tmp_path, tmp_path, "rtdmd", {**every, "matching": to_noise, "matching.steps": "last"})
    config = reward_config(inputs, tmp_path, tmp_path, "rtdmd", {**every, "matching": RewardMatchingConfig()})
    assert config.rtdmd is not None
    assert config.rtdmd.tilted_teacher == TiltedTeacherConfig(tilt_scale=1.0)


class Brightness:
    """Mean of the pixels."""

    def __init__(self, *, video: bool) -> None:
        self.card = ScorerCard("brightness", 0.0, 1.0, differentiable=True, needs_video=video)

    def __call__(self, pixels: Tensor, prompts: list[str]) -> Tensor:
        return pixels.flatten(1).mean(dim=1)


MODELS: dict[str, Any] = {
    "sd3": build_sd3,
    "sdxl": build_sdxl,
    "sana": lambda: build_sana(dense=True),
    "flux": FLUX.build,
    "wan": lambda: build_video_pipeline(text_tokens=8),
}


# In bf16 the random FLUX predicts x0 with a cosine of 0.95 already, and the random autoencoder of Wan has a gradient
# of 0.71 without any network: bounds that are theirs.
COSINES = {"flux": 0.75, "wan": 0.7}


@pytest.mark.parametrize("name", MODELS)
def test_the_gradient_goes_through_every_kind_of_teacher_in_half_precision(name: str, tmp_path: Path) -> None:
    """bf16 beside fp32, and beside a difference of the reward itself; samples of a chunk are those of the whole."""
    folder, prompts, is_video = (
        save_pipeline(MODELS[name](), tmp_path / "model"),
        ["a red cat", "two dogs"],
        name == "wan",
    )
    size: dict[str, Any] = {"height": 32, "width": 32, "frames": 9} if is_video else {}
    size = dict(FLUX.size) if name == "flux" else size
    found: dict[str, Tensor] = {}
    for case, dtype, chunk in (("fp32", "float32", None), ("chunk", "float32", 1), ("bf16", "bfloat16", None)):
        teacher = Teacher.load(folder, dtype=getattr(torch, dtype))
        settings = RewardSettings(scorers=(ScorerConfig(name="brightness"),), group_size=2, chunk=chunk, overlap=False)
        reward = RewardModel([Brightness(video=is_video)], settings, gradient=True, videos=is_video)
        shape = teacher.latent_shape(**size)
        # Times and a guidance that bf16 holds.
        x_t, t = sample_noise(3, [0, 1], shape, stream="x_t"), torch.tensor([0.25, 0.5])
        scores, condition = ComparedScores(x_t, x_t, x_t, x_t, t), teacher.encode(prompts)
        assert isinstance(condition, Condition)
        guidance = {"prompts": prompts, "guidance": 4.0}
        found[case], rewards = reward_gradient(teacher, reward, scores, condition, **guidance)
        assert rewards.shape == (2,)
        if case == "fp32":
            step = found[case] / found[case].flatten(1).norm(dim=1).view(-1, *[1] * len(shape))
            moved = [
                reward_gradient(teacher, reward, ComparedScores(x_t, x_t, x_t, x_t + sign * 0.02 * step, t), condition,
                                **guidance)[1]
                for sign in (1, -1)
            ]  # fmt: skip
            slope = (moved[0] - moved[1]) / 0.04
            torch.testing.assert_close(slope, found[case].flatten(1).norm(dim=1), rtol=0.1, atol=1e-5)
    torch.testing.assert_close(found["chunk"], found["fp32"], rtol=1e-3, atol=1e-8)
    cosine = torch.nn.functional.cosine_similarity(found["bf16"].flatten(1), found["fp32"].flatten(1))
    assert float(cosine.min()) > COSINES.get(name, 0.97)


def test_variances_of_bands_are_those_of_the_directions() -> None:
    """A sum of two cosine patterns of known variance; white noise has the same variance in every band."""
    size, generator = 8, torch.Generator().manual_seed(1)
    place = torch.arange(size, dtype=torch.float64) + 0.5
    patterns = [math.sqrt(2 / size) * torch.cos(math.pi / size * order * place) for order in (1, 7)]
    smooth, fine = (torch.outer(pattern, pattern) for pattern in patterns)
    weight = torch.randn(4000, 2, generator=generator, dtype=torch.float64)
    latents = weight[:, 0, None, None] * smooth + 0.1 * weight[:, 1, None, None] * fine
    bands = band_variances(latents[:, None], bands=2)
    # The variance of a pattern is shared by the places of its band: 16 of 64 and 48 of 64 at a radius of one half.
    places = torch.meshgrid(*[torch.arange(size, dtype=torch.float64) / size] * 2, indexing="ij")
    low = int((torch.stack(places).square().mean(dim=0).sqrt() < 0.5).sum())
    assert bands.tolist() == pytest.approx([0.01 / (64 - low), 1 / low], rel=0.1)
    white = torch.randn(2000, 3, 4, 6, generator=generator)
    found = band_variances(white)
    assert len(found) == 12
    assert float((found - 1).abs().max()) < 0.1
    spread = LatentSpread.of(white)
    assert (spread.thin, spread.wide) == (found[0].item(), found[-1].item())
    with pytest.raises(ValueError, match="1 samples have no variance"):
        band_variances(white[:1])
