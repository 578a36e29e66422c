"""A smoothed time is the mean over nearby times, on networks of the real classes and on the embedded teachers."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fewstep.consistency.tangents import path_check, total_derivative
from fewstep.core.data import LatentDataset
from fewstep.core.denoiser import Denoiser
from fewstep.core.paths import add_noise
from fewstep.core.randomness import sample_noise
from fewstep.core.tangents.network import use_jvp_attention
from fewstep.core.tangents.smooth import KEPT, fading, radians_per_time, smooth_time, time_sites
from fewstep.core.teacher import Teacher
from tests.core.families.checks import distance, noise_of, told
from tests.test_bf16_matrix import LATER
from tests.tiny_pipelines import build_sd3, build_sdxl
from tests.tiny_videos import build_video_pipeline

SIGMA = 0.01
# Nodes and weights of a mean over a standard normal number.
NODES, WEIGHTS = np.polynomial.hermite_e.hermegauss(40)
SMOOTHED = ("flux", "flux2", "qwen_image", "hunyuan_video", "ltx", "wan_image")


def time_inputs(denoiser: Denoiser, x_t: Tensor, t: Tensor, condition: Any) -> list[Tensor]:
    """What the layers after the sinusoids are given in one call."""
    seen: list[Tensor] = []
    handles = [
        layers.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].double()))
        for _, layers in time_sites(denoiser.network)
    ]
    with torch.no_grad():
        denoiser(x_t, t, condition)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("name", SMOOTHED)
def test_faded_sinusoids_are_the_mean_over_nearby_times(name: str) -> None:
    model = LATER[name]
    teacher = model.teacher()
    x_t, condition = noise_of(model.shape(teacher)), told(model, teacher)
    t = torch.tensor([0.4, 0.7])
    plain = time_inputs(teacher.denoiser, x_t, t, condition)
    # HunyuanVideo tells its time to the refiner of the text, too.
    assert len(plain) == (2 if name == "hunyuan_video" else 1)
    means = [torch.zeros_like(one) for one in plain]
    for node, weight in zip(NODES, WEIGHTS / WEIGHTS.sum(), strict=True):
        moved = time_inputs(teacher.denoiser, x_t, t + SIGMA / 4 * float(node), condition)
        means = [mean + weight * one for mean, one in zip(means, moved, strict=True)]
    for mean, one, (sinusoids, _) in zip(means, plain, time_sites(teacher.denoiser.network), strict=True):
        factors = fading(radians_per_time(sinusoids, teacher.family.time_scale), SIGMA / 4)
        # The sinusoids are of fp32 numbers up to 1,000.
        assert float((mean - one * factors).abs().max()) < 5e-4
        assert float((mean - one).abs().max()) > 0.1


@pytest.mark.parametrize("build", [lambda: build_sd3(with_t5=True), lambda: build_video_pipeline(text_tokens=8)])
def test_the_factors_are_in_the_columns_of_the_first_layer(build: Any) -> None:
    teacher = Teacher(build(), path="owner/tiny")
    size = {"frames": 5} if teacher.family.makes_videos else {}
    shape = teacher.latent_shape(32, 32, **size)
    x_t, t, condition = noise_of(shape), torch.tensor([0.4, 0.7]), teacher.encode(["a", "b"])
    smooth = teacher.denoiser.copy(trainable=True)
    smooth_time(smooth.network, SIGMA, time_scale=teacher.family.time_scale)
    ((sinusoids, layers),) = time_sites(teacher.denoiser.network)
    factors = fading(radians_per_time(sinusoids, 1000.0), SIGMA)
    handle = layers.register_forward_pre_hook(lambda _, inputs: (inputs[0] * factors.to(inputs[0]), *inputs[1:]))
    with torch.no_grad():
        expected = teacher.denoiser(x_t, t, condition)
        handle.remove()
        assert distance(smooth(x_t, t, condition), expected) < 1e-5
        assert distance(teacher.denoiser(x_t, t, condition), expected) > 1e-4


def test_faded_columns_stay_in_half_precision_that_is_set_later() -> None:
    network = Teacher(build_sd3(), path="owner/tiny").denoiser.copy(trainable=True).network
    smooth_time(network, SIGMA, time_scale=1000.0)
    ((sinusoids, layers),) = time_sites(network)
    first: Any = layers.linear_1
    first.to(torch.bfloat16)
    first(torch.ones(1, first.in_features, dtype=torch.bfloat16)).sum().backward()
    kept = fading(radians_per_time(sinusoids, 1000.0), SIGMA) >= KEPT
    assert first.weight.grad.dtype == torch.bfloat16
    assert float(first.weight.grad[:, ~kept].abs().max()) == 0
    assert float(first.weight.grad[:, kept].abs().min()) > 0


def test_variances_add_up_and_faded_columns_stay() -> None:
    teacher = Teacher(build_sd3(), path="owner/tiny")
    once, twice = (teacher.denoiser.copy(trainable=True).network for _ in range(2))
    smooth_time(once, SIGMA, time_scale=1000.0)
    smooth_time(twice, 0.006, time_scale=1000.0)
    smooth_time(twice, SIGMA, time_scale=1000.0, already=0.006)
    first, second = (time_sites(network)[0][1].get_submodule("linear_1") for network in (once, twice))
    torch.testing.assert_close(first.weight, second.weight, rtol=1e-5, atol=1e-9)
    sinusoids = time_sites(once)[0][0]
    kept = fading(radians_per_time(sinusoids, 1000.0), SIGMA) >= KEPT
    assert 0 < int(kept.sum()) < len(kept)
    first(torch.ones(1, len(kept))).sum().backward()
    gradient: Any = first.weight.grad
    assert float(gradient[:, ~kept].abs().max()) == 0
    assert float(gradient[:, kept].abs().min()) > 0


@pytest.mark.parametrize(("sigma", "network"), [(-0.1, "sd3"), (float("nan"), "sd3"), (0.01, "linear")])
def test_what_cannot_be_smoothed_is_refused(sigma: float, network: str) -> None:
    module = nn.Linear(2, 2) if network == "linear" else build_sd3().transformer
    with pytest.raises(ValueError, match=r"time_smoothing is"):
        smooth_time(module, sigma, time_scale=1000.0)


def test_u_nets_are_told_their_time_alone() -> None:
    # Not the sizes, which have sinusoids of their own.
    pipeline = build_sdxl()
    assert len(time_sites(pipeline.unet)) == 1


def embedded(folder: str, count: int = 8) -> tuple[Teacher, Tensor, Any]:
    teacher, data = Teacher.load(folder), LatentDataset.load(f"{folder}/train_latents")
    return teacher, data.latents[:count], teacher.encode(list(data.prompts[:count]))


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["assets/digits_image", "assets/digits_video"])
def test_the_derivative_along_a_teachers_path_is_that_of_the_path(folder: str) -> None:
    """The fault first: as it is, the exact derivative says little of where the path leads."""
    teacher, x0, condition = embedded(folder)
    smooth = Denoiser(copy.deepcopy(teacher.denoiser.network), teacher.family)
    smooth_time(smooth.network, SIGMA, time_scale=teacher.family.time_scale)
    use_jvp_attention(smooth.network)
    plain = Denoiser(copy.deepcopy(teacher.denoiser.network), teacher.family)
    use_jvp_attention(plain.network)
    eps = sample_noise(3, range(len(x0)), tuple(x0.shape[1:]), stream="path")
    worst, moved = 0.0, 0.0
    for time in (0.95, 0.8, 0.6, 0.4, 0.2):
        t = torch.full((len(x0),), time)
        x_t = add_noise(x0, eps, t)
        direction = teacher.velocity(x_t, t, condition, 2.5)

        def cosine(denoiser: Denoiser, x_t: Tensor = x_t, t: Tensor = t, direction: Tensor = direction) -> float:
            return path_check(lambda x, s: denoiser(x, s, condition), x_t, (t,), direction).cosine

        assert cosine(smooth) > 0.98
        worst = max(worst, cosine(plain))
        with torch.no_grad():
            moved = max(moved, distance(smooth(x_t, t, condition), teacher.denoiser(x_t, t, condition)))
    assert worst < 0.9
    assert moved < 0.06


def test_a_path_check_sees_a_wiggle() -> None:
    # v = x + a sin(w t) along dx = 1: the derivative is 1 + a w cos(w t), the difference 1 + a sin(w h) cos(w t) / h.
    amplitude, turns, step = 0.1, 400.0, 0.01
    t = torch.tensor([0.3, 0.7], dtype=torch.float64)
    x = torch.ones(2, 3, dtype=torch.float64)
    pattern = torch.tensor([1.0, -1.0, 0.5], dtype=torch.float64)

    def function(state: Tensor, time: Tensor) -> Tensor:
        return state + amplitude * torch.sin(turns * time)[:, None] * pattern

    found = path_check(function, x, (t,), torch.ones_like(x))
    wave = torch.cos(turns * t)[:, None] * pattern
    exact = 1 + amplitude * turns * wave
    coarse = 1 + amplitude * np.sin(turns * step) / step * wave
    assert found.cosine == pytest.approx(torch.cosine_similarity(exact, coarse).mean().item(), abs=1e-9)
    assert found.length == pytest.approx((exact.norm(dim=1).mean() / coarse.norm(dim=1).mean()).item(), rel=1e-9)
    torch.testing.assert_close(
        total_derivative(function, x, t, torch.ones_like(x), torch.ones_like(t)).derivative, exact
    )
    with pytest.raises(ValueError, match=r"Set scm\.time_smoothing to 0\.01"):
        found.required("scm")
    assert found._replace(cosine=0.95).required("scm").cosine == 0.95
