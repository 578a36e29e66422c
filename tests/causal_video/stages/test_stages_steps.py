"""Steps on given videos, in float64 on the tiny student: closed forms, tangents, masks, a given first frame."""

import dataclasses
import functools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.causal_video.layout import ChunkLayout
from fewstep.causal_video.model import masks
from fewstep.causal_video.model.calls import CallOutput, packed_call
from fewstep.causal_video.model.network import CausalWan
from fewstep.causal_video.stages.batch import (
    CausalTeacher,
    ForcingNetworks,
    VideoBatch,
    chunk_uniform,
    context_of_batch,
    gives_image,
    over_frames,
)
from fewstep.causal_video.stages.consistency import path_derivative, teacher_velocity, tf_dcm_step, tf_scm_step
from fewstep.causal_video.stages.forcing import diffusion_forcing_step, drop_captions, teacher_forcing_step
from fewstep.causal_video.stages.ode import OdeBatch, ode_step
from fewstep.causal_video.stages.sections import (
    DiffusionForcingConfig,
    OdeConfig,
    TeacherForcingConfig,
    TfDcmConfig,
    TfScmConfig,
)
from fewstep.core.condition import Condition
from fewstep.core.paths import add_noise, expand_time
from fewstep.core.randomness import Draw
from fewstep.kernels.check_jvp import Float64Inside
from tests.causal_video.tiny_causal import FRAME_TOKENS, build_student, largest, latents, text

LAYOUT = ChunkLayout((1, 2, 2, 2))
SCM, ODE = TfScmConfig(), OdeConfig()
# Each step with a configuration of its stage.
STEPS = {
    "teacher_forcing": (teacher_forcing_step, TeacherForcingConfig()),
    "diffusion_forcing": (diffusion_forcing_step, DiffusionForcingConfig()),
    "tf_dcm": (tf_dcm_step, TfDcmConfig(grid_steps=4)),
    "tf_scm": (tf_scm_step, TfScmConfig(time_mean=0.0)),
}
DRAW = Draw(3, [0, 1], torch.device("cpu"))
NULL = Condition(text(1, seed=8))


def batch_of(*, image: bool = False, context_time: float | None = None) -> VideoBatch:
    """Two videos of seven frames."""
    x0, eps = latents(seed=1), latents(seed=2)
    context, time = x0, None
    if context_time is not None:
        time = torch.full((2,), context_time, dtype=torch.float64)
        context = add_noise(x0, latents(seed=3), time)
    return VideoBatch(x0, eps, Condition(text()), context, time, x0[:, :, :1] if image else None, 0)


def networks_of(student: nn.Module, teacher: CausalWan | None = None, guidance: float = 1.0) -> ForcingNetworks:
    packed = masks.teacher_forcing(LAYOUT, FRAME_TOKENS, clean_is_constant=True)
    causal = masks.block_causal(LAYOUT, FRAME_TOKENS)
    held = None if teacher is None else CausalTeacher(teacher, NULL, guidance)
    return ForcingNetworks(student, student, LAYOUT, packed, causal, held)


@functools.cache
def frozen_teacher() -> CausalWan:
    return build_student(seed=5).requires_grad_(False)


class AutoregressiveGaussian(nn.Module):
    """The exact velocity of x_1 ~ N(0, 1), x_i ~ N(a x_{i-1}, 1 - a^2) per number, in a packed call of frame chunks.

    Chunk i sees the clean chunk before it, so its velocity is that of a Gaussian with mean a x_{i-1}. With `leak` it
    looks at its own clean chunk, which is the mistake that a mask with <= makes.
    """

    def __init__(self, a: float, *, leak: bool = False) -> None:
        super().__init__()
        self.a, self.leak = a, leak

    def forward(self, call: Any) -> CallOutput:
        frames = call.skip
        clean, noisy = call.x[:, :, :frames], call.x[:, :, frames:]
        t = expand_time(call.t[:, frames:], noisy)
        before = torch.cat([torch.zeros_like(clean[:, :, :1]), clean[:, :, :-1]], dim=2)
        mean = self.a * before
        variance = torch.full((1, 1, frames, 1, 1), 1 - self.a**2, dtype=noisy.dtype)
        variance[:, :, 0] = 1.0
        if self.leak:
            return CallOutput((noisy - clean) / t, None)
        total = (1 - t).square() * variance + t.square()
        slope = (t - (1 - t) * variance) / total
        return CallOutput(-mean + slope * (noisy - (1 - t) * mean), None)


def autoregressive(count: int, a: float) -> Tensor:
    """[count, 1, 5, 2, 2] draws of that process."""
    noise = torch.randn(count, 1, 5, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    frames = [noise[:, :, 0]]
    for frame in range(1, 5):
        frames.append(a * frames[-1] + (1 - a**2) ** 0.5 * noise[:, :, frame])
    return torch.stack(frames, dim=2)


def test_teacher_forcing_finds_the_floor_of_an_autoregressive_gaussian() -> None:
    a, count = 0.8, 20000
    x0 = autoregressive(count, a)
    layout = ChunkLayout.uniform(5, 1)
    draw = Draw(1, list(range(count)), torch.device("cpu"))
    eps = draw.noise((1, 5, 2, 2), "eps").double()
    batch = VideoBatch(x0, eps, Condition(torch.zeros(count, 1, 1)), x0, None, None, 0)
    mask, causal = masks.teacher_forcing(layout, 1), masks.block_causal(layout, 1)
    stage = TeacherForcingConfig(weight="none", shift=1.0)

    def loss_of(network: nn.Module) -> float:
        networks = ForcingNetworks(network, network, layout, mask, causal)
        return float(teacher_forcing_step(batch, networks, draw=draw, stage=stage).loss)

    # E |eps - x0 - v|^2 at t is the variance s^2 / ((1 - t)^2 s^2 + t^2) of eps - x0 given x_t; its mean over t.
    t = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    floors = [float((s / ((1 - t).square() * s + t.square())).mean()) for s in (1.0, *[1 - a**2] * 4)]
    floor = sum(floors) / 5
    assert loss_of(AutoregressiveGaussian(a)) == pytest.approx(floor, rel=0.01)
    assert loss_of(AutoregressiveGaussian(0.0)) > 1.1 * floor
    assert loss_of(AutoregressiveGaussian(a, leak=True)) < 1e-12


def test_consistency_is_at_rest_at_the_exact_function_of_that_gaussian() -> None:
    """f = mean + s / sqrt(V_t) (x - m_t) is constant along the causal teacher's path: both steps see no error."""
    a = 0.8
    x0 = autoregressive(64, a)
    layout = ChunkLayout.uniform(5, 1)
    draw = Draw(1, list(range(64)), torch.device("cpu"))
    eps = draw.noise((1, 5, 2, 2), "eps").double()
    batch = VideoBatch(x0, eps, Condition(torch.zeros(64, 1, 1)), x0, None, None, 0)

    class Exact(AutoregressiveGaussian):
        def forward(self, call: Any) -> CallOutput:
            frames = call.skip
            clean, noisy = call.x[:, :, :frames], call.x[:, :, frames:]
            t = expand_time(call.t[:, frames:], noisy)
            mean = self.a * torch.cat([torch.zeros_like(clean[:, :, :1]), clean[:, :, :-1]], dim=2)
            variance = torch.full((1, 1, frames, 1, 1), 1 - self.a**2, dtype=noisy.dtype)
            variance[:, :, 0] = 1.0
            total = (1 - t).square() * variance + t.square()
            x0 = mean + (variance / total).sqrt() * (noisy - (1 - t) * mean)
            return CallOutput((noisy - x0) / t, None)

    mask, causal = masks.teacher_forcing(layout, 1), masks.block_causal(layout, 1)
    teacher: Any = AutoregressiveGaussian(a)
    held = CausalTeacher(teacher, Condition(torch.zeros(1, 1, 1)), 1.0)
    exact = ForcingNetworks(Exact(a), Exact(a), layout, mask, causal, held)
    plain = ForcingNetworks(teacher, teacher, layout, mask, causal, held)
    scm, dcm = TfScmConfig(time_mean=0.0, time_std=1.0), TfDcmConfig(grid_steps=400, grid_shift=1.0)
    gaps = [tf_scm_step(batch, n, draw=draw, stage=scm).record for n in (exact, plain)]
    assert float(gaps[0]["tangent"]) < 1e-6 * float(gaps[1]["tangent"])
    jumps = [float(tf_dcm_step(batch, n, draw=draw, stage=dcm).loss) for n in (exact, plain)]
    assert jumps[0] < 1e-2 * jumps[1]


@pytest.mark.parametrize("context_time", [None, 0.3])
def test_the_clean_half_has_no_tangent(context_time: float | None) -> None:
    """Tangents of the packed call with clean_is_constant are those of the honest mask, where clean tokens have zero."""
    student, batch = build_student().requires_grad_(False), batch_of(context_time=context_time)
    t = torch.tensor([0.4, 0.8], dtype=torch.float64)
    x_t, dx = add_noise(batch.x0, batch.eps, t), latents(seed=6)
    networks = networks_of(student)
    honest = dataclasses.replace(networks, packed=masks.teacher_forcing(LAYOUT, FRAME_TOKENS))
    found, expected = (path_derivative(batch, n, x_t, t, dx=dx, stage=SCM) for n in (networks, honest))
    assert largest(found, expected) < 1e-12
    central = dataclasses.replace(SCM, tangent="central", central_step=1e-6)
    with Float64Inside():
        exact, difference = (path_derivative(batch, networks, x_t, t, dx=dx, stage=stage) for stage in (SCM, central))
    assert largest(difference, exact) < 1e-5 * float(exact.abs().max())

    def clean_keys(x: Tensor, time: Tensor) -> Tensor:
        call = packed_call(batch.context, x, time, text(), mask=honest.packed, clean_time=batch.context_time)  # pyright: ignore
        output = student(dataclasses.replace(call, skip=0))
        return output.velocity

    _, tangent = torch.func.jvp(clean_keys, (x_t, t), (dx, torch.ones_like(t)))[:2]
    assert float(tangent[:, :, :7].abs().max()) == 0
    assert float(tangent[:, :, 7:].abs().max()) > 0.1


def test_guidance_of_the_causal_teacher_is_on_packed_calls() -> None:
    batch, t = batch_of(context_time=0.2), torch.tensor([0.4, 0.8], dtype=torch.float64)
    x_t, teacher = add_noise(batch.x0, batch.eps, t), frozen_teacher()
    networks = networks_of(build_student(), teacher, guidance=2.5)
    sides = []
    for tokens in (NULL.text.expand(2, -1, -1), text()):
        mask, time = networks.packed, batch.context_time
        sides.append(teacher.packed(batch.context, x_t, t, tokens, mask=mask, clean_time=time))  # pyright: ignore
    expected = sides[0] + 2.5 * (sides[1] - sides[0])
    assert largest(teacher_velocity(networks, x_t, t, batch), expected) < 1e-12


@pytest.mark.parametrize("name", STEPS)
def test_gradients_reach_text_projections_and_a_given_frame_does_not_count(name: str) -> None:
    student = build_student()
    networks = networks_of(student, frozen_teacher())
    step: Any
    step, stage = STEPS[name]
    step(batch_of(), networks, draw=DRAW, stage=stage).loss.backward()
    assert [name for name, p in student.named_parameters() if p.grad is None] == []
    blocks: Any = student.transformer.blocks
    for block in blocks:
        assert float(block.attn2.to_k.weight.grad.abs().max()) > 1e-9
    # What the noise was in a frame that is given changes nothing.
    batch = batch_of(image=True)
    eps = batch.eps.clone()
    eps[:, :, 0] += 1.0
    losses = [step(b, networks, draw=DRAW, stage=stage).loss for b in (batch, dataclasses.replace(batch, eps=eps))]
    assert float(losses[0].detach()) == pytest.approx(float(losses[1].detach()), rel=1e-12)
    assert float(losses[0].detach()) != pytest.approx(
        float(step(batch_of(), networks, draw=DRAW, stage=stage).loss.detach())
    )


@pytest.mark.parametrize("name", ["tf_dcm"])
def test_sums_over_frames_are_seven_means(name: str) -> None:
    networks = networks_of(build_student(), frozen_teacher())
    step: Any
    stage: Any
    step, stage = STEPS[name]
    means, sums = (
        step(batch_of(), networks, draw=DRAW, stage=dataclasses.replace(stage, frames=frames)).loss
        for frames in ("mean", "sum")
    )
    assert float(sums.detach()) == pytest.approx(7 * float(means.detach()), rel=1e-12)


def test_diffusion_forcing_has_a_time_per_chunk() -> None:
    uniform = chunk_uniform(Draw(3, list(range(50)), DRAW.device), LAYOUT, "forcing_chunk_time")
    t = over_frames(uniform, LAYOUT)
    assert t.shape == (50, 7)
    for chunk in range(4):
        part = t[:, LAYOUT.start(chunk) : LAYOUT.end(chunk)]
        assert float((part - part[:, :1]).abs().max()) == 0
    assert len(set(uniform.flatten().tolist())) == 200
    assert float(uniform.mean()) == pytest.approx(0.5, abs=0.06)


def test_regression_is_zero_at_its_target_and_context_does_not_count() -> None:
    student = build_student().requires_grad_(False)
    networks = networks_of(student)
    t = torch.tensor([[0.0, 0.5, 0.5, 0.0, 0.0, 1.0, 1.0]] * 2, dtype=torch.float64)
    x, condition = latents(seed=4), Condition(text())
    velocity = student.causal(x, t, text(), mask=networks.causal)  # pyright: ignore
    x0 = x - expand_time(t, x) * velocity
    found = ode_step(OdeBatch(x, t, x0, condition, None), networks, ODE)
    assert float(found.loss) < 1e-24
    away = x0.clone()
    away[:, :, [0, 3, 4]] += 1.0
    assert float(ode_step(OdeBatch(x, t, away, condition, None), networks, ODE).loss) < 1e-24
    away = x0.clone()
    away[:, :, 1] += 1.0
    expected = 1 / 4
    assert float(ode_step(OdeBatch(x, t, away, condition, None), networks, ODE).loss) == pytest.approx(expected)
    # On clean context the packed call is made: another context, another prediction.
    packed = [
        float(ode_step(OdeBatch(x, t, x0, condition, context), networks, ODE).loss)
        for context in (latents(seed=5), latents(seed=6))
    ]
    assert abs(packed[0] - packed[1]) > 1e-5


def test_context_captions_and_images_are_drawn_in_shares() -> None:
    many = Draw(0, list(range(400)), DRAW.device)
    x0 = torch.zeros(400, 1, 2, 1, 1, dtype=torch.float64)
    context, time = context_of_batch(x0, many, 0.4)
    assert time is not None
    assert 0 <= float(time.min()) < 0.02
    assert 0.38 < float(time.max()) < 0.4
    assert float((context.flatten(1).std(dim=1) / time).mean()) == pytest.approx((2 / math.pi) ** 0.5, abs=0.06)
    assert context_of_batch(x0, many, 0.0)[1] is None
    full, null = Condition(torch.ones(400, 1, 1)), Condition(torch.zeros(1, 1, 1))
    assert float(drop_captions(full, null, many, 0.25).text.mean()) == pytest.approx(0.75, abs=0.06)
    assert drop_captions(full, null, many, 0.0) is full
    assert sum(gives_image(0.3, 7, step) for step in range(1000)) == pytest.approx(300, abs=45)
    assert not any(gives_image(0.0, 7, step) for step in range(100))
    assert all(gives_image(1.0, 7, step) for step in range(100))
