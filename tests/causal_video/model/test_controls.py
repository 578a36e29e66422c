"""Controls per frame: files, conditions, new input channels, and the same numbers in training and in streams."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from studies.steered_clips import action_channels, encode_steered_digits
from torch import Tensor

from fewstep.causal_video.denoise import VideoCondition
from fewstep.causal_video.layout import ChunkLayout
from fewstep.causal_video.model import masks
from fewstep.causal_video.model.calls import joined
from fewstep.causal_video.model.controls import FrameControls, controls_of, with_controls
from fewstep.causal_video.model.network import CausalWan
from fewstep.causal_video.schedule import StepSchedule
from fewstep.causal_video.settings import CausalSettings
from fewstep.causal_video.stages.batch import CausalTeacher, ForcingNetworks, PackedNetwork, VideoBatch
from fewstep.causal_video.stages.consistency import path_derivative, teacher_velocity, tf_dcm_step, tf_scm_step
from fewstep.causal_video.stages.forcing import diffusion_forcing_step, drop_captions, teacher_forcing_step
from fewstep.causal_video.stages.sampling import euler_rollout
from fewstep.causal_video.stages.sections import (
    DiffusionForcingConfig,
    TeacherForcingConfig,
    TfDcmConfig,
    TfScmConfig,
)
from fewstep.causal_video.stages.student import widened
from fewstep.causal_video.stream.session import StreamSession
from fewstep.causal_video.stream.world import ActionSpace, latent_actions, spread
from fewstep.core.condition import Condition
from fewstep.core.randomness import Draw
from fewstep.core.teacher import Teacher
from fewstep.embedded.moving_digits.clips import ACTION_WORDS
from fewstep.kernels.check_jvp import Float64Inside
from tests.causal_video.tiny_causal import FRAME_TOKENS, build_student, largest, latents, noise, text
from tests.causal_video.tiny_causal_run import VideoInputs
from tests.tiny_networks import draw

LAYOUT = ChunkLayout((1, 2, 2, 2))
NAMES = ("left", "right", "up")
SCM = TfScmConfig(time_mean=0.0)
DRAW = Draw(3, [0, 1], torch.device("cpu"))
NULL = Condition(text(1, seed=8))


def controls(frames: int = 7, *, seed: int = 7) -> Tensor:
    """[2, 3, frames, 4, 4] in float64, the same all over a frame."""
    return spread(draw((2, 3, frames), seed, torch.float64), 4, 4)


def steered_batch(values: Tensor, x0: Tensor | None = None, eps: Tensor | None = None) -> VideoBatch:
    x0 = latents(seed=1) if x0 is None else x0
    return VideoBatch(
        x0, latents(seed=2) if eps is None else eps, with_controls(Condition(text()), values), x0, None, None, 0
    )


def networks_of(student: CausalWan, teacher: CausalWan | None = None, guidance: float = 1.0) -> ForcingNetworks:
    packed = masks.teacher_forcing(LAYOUT, FRAME_TOKENS, clean_is_constant=True)
    causal = masks.block_causal(LAYOUT, FRAME_TOKENS)
    held = None if teacher is None else CausalTeacher(teacher, NULL, guidance)
    return ForcingNetworks(student, student, LAYOUT, packed, causal, held)


def test_files_hold_values_and_names(tmp_path: Path) -> None:
    flat, wide = torch.rand(5, 3, 7), torch.rand(5, 3, 7, 4, 4, dtype=torch.float64)
    for values in (flat, wide):
        path = FrameControls(values, NAMES).save(tmp_path / str(values.ndim))
        again = FrameControls.load(path)
        assert again.names == NAMES
        assert again.channels == 3
        assert torch.equal(again.values, values.float())
        chosen = again.rows([3, 0], (4, 4))
        assert chosen.shape == (2, 3, 7, 4, 4)
        expected = values[3] if values.ndim == 3 else values[3, :, :, 2, 1]
        assert torch.equal(chosen[0, :, :, 2, 1], expected.float())
        again.check(torch.zeros(5, 8, 7, 4, 4))
    for shape in ((4, 8, 7, 4, 4), (5, 8, 6, 4, 4)):
        with pytest.raises(ValueError, match=r"data\.controls holds \[5, 3, 7\]"):
            FrameControls(flat, NAMES).check(torch.zeros(shape))
    with pytest.raises(ValueError, match=r"data\.controls holds \[5, 3, 7, 4, 4\]"):
        FrameControls(wide, NAMES).check(torch.zeros(5, 8, 7, 8, 8))


def test_what_holds_no_controls_is_named(tmp_path: Path) -> None:
    for values, names, message in (
        (torch.zeros(5, 3), NAMES, r"\[N, K, F\]"),
        (torch.zeros(5, 0, 7), (), r"\[N, K, F\]"),
        (torch.zeros(5, 3, 7), NAMES[:2], "3 control channels and 2 names"),
        (torch.zeros(5, 3, 7), ("left", "left", "up"), "distinct names"),
        (torch.full((5, 3, 7), float("nan")), NAMES, "not finite"),
    ):
        with pytest.raises(ValueError, match=message):
            FrameControls(values, names)
    with pytest.raises(ValueError, match="is no file"):
        FrameControls.load(tmp_path / "none")
    save_file({"controls": torch.zeros(5, 3, 7)}, tmp_path / "nameless")
    save_file({"other": torch.zeros(5)}, tmp_path / "other", metadata={"names": "[]"})
    for name in ("nameless", "other"):
        with pytest.raises(ValueError, match="lacks a tensor 'controls' or 'names'"):
            FrameControls.load(tmp_path / name)
    (tmp_path / "broken").write_bytes(b"no tensors")
    with pytest.raises(ValueError, match="cannot be read"):
        FrameControls.load(tmp_path / "broken")


@given(batch=st.integers(1, 3), channels=st.integers(1, 4), frames=st.integers(1, 5), share=st.floats(0, 0.9))
def test_conditions_carry_controls(batch: int, channels: int, frames: int, share: float) -> None:
    values = torch.arange(batch * channels * frames * 4.0).view(batch, channels, frames, 2, 2)
    condition = with_controls(Condition(torch.ones(batch, 2, 3)), values)
    null = Condition(torch.zeros(1, 2, 3))
    kept = drop_captions(condition, null, Draw(0, list(range(batch)), DRAW.device), share)
    both = Condition.cat([condition, kept]).index(torch.arange(batch, 2 * batch))
    for found in (controls_of(condition, frames), controls_of(kept, frames), controls_of(both, frames)):
        assert found is not None
        assert torch.equal(found, values)
    assert controls_of(null, frames) is None
    if frames > 1 and channels * frames % (frames + 1):
        with pytest.raises(ValueError, match="do not divide"):
            controls_of(condition, frames + 1)


def test_new_channels_begin_as_nothing() -> None:
    plain = build_student()
    plain.transformer.blocks[0].to(torch.float32)
    wide = CausalWan(widened(plain.transformer, 3))
    assert (wide.extra_channels, wide.transformer.config["in_channels"]) == (3, 7)
    assert {p.dtype for p in wide.transformer.blocks[0].parameters()} == {torch.float32}
    assert {p.dtype for p in wide.transformer.blocks[1].parameters()} == {torch.float64}
    plain, wide = build_student(), CausalWan(widened(build_student().transformer, 3))
    assert not wide.transformer.training
    x, t, values = latents(), torch.tensor([0.3, 0.8], dtype=torch.float64), controls()
    assert largest(wide.bidirectional(x, t, text(), extra=values), plain.bidirectional(x, t, text())) < 1e-12
    batch = steered_batch(values)
    steered, plain_velocity = (
        PackedNetwork(network, batch, networks_of(network).packed)(x, t, condition)  # pyright: ignore[reportArgumentType]
        for network, condition in ((wide, batch.condition), (plain, Condition(text())))
    )
    assert largest(steered, plain_velocity) < 1e-12
    before = plain.transformer.patch_embedding.weight.clone()
    with torch.no_grad():
        wide.transformer.patch_embedding.weight[:, 4:].normal_(std=0.1)
    assert torch.equal(plain.transformer.patch_embedding.weight, before)
    assert largest(wide.bidirectional(x, t, text(), extra=values), plain.bidirectional(x, t, text())) > 1e-3
    with pytest.raises(ValueError, match="takes 3 conditioning channels already"):
        widened(wide.transformer, 1)


def test_training_and_stream_tell_the_same() -> None:
    """One step from t = 1: what a session makes chunk by chunk is z - v of the packed call on it, with latent_actions
    of the whole clip as controls."""
    student, space = build_student(extra=3).requires_grad_(False), ActionSpace(NAMES)
    settings = CausalSettings(LAYOUT, schedule=StepSchedule(((1.0,),)))
    held = ["left", *["none"] * 2, *["up"] * 6, *["right"] * 5, *["left"] * 11]
    session = StreamSession(student, text(), noise(), settings)
    made = []
    for chunk in range(4):
        frames = slice(*(LAYOUT.extended(chunk + 1).frames - step for step in (LAYOUT.length(chunk), 0)))
        pixels = held[0 if chunk == 0 else 4 * frames.start - 3 : 4 * frames.stop - 3]
        action = space.channels(pixels, (2, LAYOUT.length(chunk), 4, 4), is_start=chunk == 0)
        made.append(session.step(action).latents)
    video = torch.cat(made, dim=2)
    values = spread(latent_actions(space.one_hot(held)[None]).double().expand(2, -1, -1), 4, 4)
    z = torch.cat([noise().draw(c, 0, LAYOUT.length(c), text()) for c in range(4)], dim=2)
    t = torch.ones(2, dtype=torch.float64)
    batch = steered_batch(values, x0=video)
    packed = PackedNetwork(student, batch, networks_of(student).packed)  # pyright: ignore[reportArgumentType]
    assert largest(z - packed(z, t, batch.condition), video) < 1e-11
    asked = VideoCondition(text(), extra=values)
    guided = euler_rollout(student, asked, noise(), settings, times=(1.0,), guidance=2.0, null_text=text(1))
    assert guided.shape == video.shape
    assert largest(euler_rollout(student, asked, noise(), settings, times=(1.0,)), video) < 1e-11
    other = steered_batch(values.flip(2), x0=video)
    assert largest(z - packed(z, t, other.condition), video) > 1e-2
    with pytest.raises(ValueError, match="takes 3 conditioning channels beside its latents"):
        session.step()
    with pytest.raises(ValueError, match="takes 0 conditioning channels beside its latents"):
        StreamSession(build_student(), text(), noise(), settings).step(values[:, :, :1])


@pytest.mark.parametrize(
    ("step", "stage"),
    [
        (teacher_forcing_step, TeacherForcingConfig()),
        (diffusion_forcing_step, DiffusionForcingConfig()),
        (tf_dcm_step, TfDcmConfig(grid_steps=4)),
        (tf_scm_step, SCM),
    ],
)
def test_every_step_teaches_the_new_channels(step: Any, stage: Any) -> None:
    student = CausalWan(widened(build_student().transformer, 3))
    networks = networks_of(student, build_student(extra=3, seed=5).requires_grad_(False), guidance=2.0)
    found = step(steered_batch(controls()), networks, draw=DRAW, stage=stage)
    found.loss.backward()
    grad = student.transformer.patch_embedding.weight.grad
    assert grad is not None
    assert float(grad[:, 4:].abs().max()) > 1e-6
    batch = dataclasses.replace(steered_batch(controls()), condition=Condition(text()))
    with pytest.raises(ValueError, match="takes 7 channels, 4 of latents and 3 of conditioning"):
        step(batch, networks, draw=DRAW, stage=stage)


def test_both_sides_of_guidance_get_the_controls_and_the_tangent_sees_controls() -> None:
    teacher, batch = build_student(extra=3, seed=5).requires_grad_(False), steered_batch(controls())
    networks, t, x = networks_of(teacher, teacher, guidance=2.5), torch.tensor([0.4, 0.8]).double(), latents(seed=4)
    sides = [
        teacher.packed(batch.context, x, t, tokens, mask=networks.packed, extra=controls())  # pyright: ignore
        for tokens in (NULL.text.expand(2, -1, -1), text())
    ]
    assert largest(teacher_velocity(networks, x, t, batch), sides[0] + 2.5 * (sides[1] - sides[0])) < 1e-12
    central = dataclasses.replace(SCM, tangent="central", central_step=1e-6)
    with Float64Inside():
        exact, difference = (
            path_derivative(batch, networks, x, t, dx=latents(seed=6), stage=stage) for stage in (SCM, central)
        )
    assert largest(difference, exact) < 1e-5 * float(exact.abs().max())
    assert joined(x, controls()).shape == (2, 7, 7, 4, 4)


def test_digits_come_with_their_actions(inputs: VideoInputs) -> None:
    actions = torch.tensor([[0, 1, 1, 1, 1, 4, 4, 4, 4], [0, 0, 0, 3, 3, 2, 2, 2, 2]])
    expected = [[[0, 1, 0], [0, 0, 0], [0, 0, 0], [0, 0, 1]], [[0, 0, 0], [0, 0, 1], [0, 0.5, 0], [0, 0, 0]]]
    assert action_channels(actions).tolist() == expected
    dataset, found = encode_steered_digits(Teacher.load(inputs.teacher), count=3, seed=4, frames=9)
    assert dataset.latents.shape == (3, 4, 3, 8, 8)
    assert found.values.shape == (3, 4, 3)
    assert found.names == ACTION_WORDS[1:] == ("left", "right", "up", "down")
    assert [caption.split()[0] for caption in dataset.prompts] == ["a"] * 3
    # Each latent frame has one action or none.
    assert set(found.values.flatten().tolist()) == {0.0, 1.0}
    assert float(found.values[:, :, 0].abs().max()) == 0
    with pytest.raises(ValueError, match="count is 0"):
        encode_steered_digits(Teacher.load(inputs.teacher), count=0, seed=4)
