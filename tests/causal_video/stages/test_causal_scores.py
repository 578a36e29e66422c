"""Real and fake score under the student's own mask (LongLive 2)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fewstep.causal_video.denoise import ChunkNoise, VideoCondition
from fewstep.causal_video.export.pipeline import export_causal_run
from fewstep.causal_video.layout import ChunkLayout
from fewstep.causal_video.model.calls import whole_call
from fewstep.causal_video.model.masks import block_causal
from fewstep.causal_video.model.network import CausalWan
from fewstep.causal_video.policy import KEEP_ALL, CachePolicy
from fewstep.causal_video.stages.batch import CausalDenoiser
from fewstep.causal_video.stages.sampling import euler_rollout
from fewstep.causal_video.stages.setup import CausalData
from fewstep.causal_video.stages.train import train_causal_video, train_step
from fewstep.causal_video.stages.watch import VideoWatch
from fewstep.core.denoiser import guided_velocity
from fewstep.core.fake_score import FakeScoreOutput
from fewstep.core.paths import add_noise, x0_from_velocity
from fewstep.core.randomness import Draw
from fewstep.core.training.checkpoint import list_checkpoints, load_checkpoint
from fewstep.core.training.watch import GRID_SEED
from fewstep.dmd.config import MatchingConfig
from fewstep.dmd.loss import distribution_matching_loss
from fewstep.dmd.matching import SampleWeights, Scores, student_step
from tests.causal_video.tiny_causal_run import VideoInputs, start_causal, tiny_causal
from tests.dmd.tiny_run import assert_same_checkpoint

CAUSAL: dict[str, Any] = {"self_forcing.scores": "causal", "self_forcing.exit": "random"}
LORA: dict[str, Any] = {"student.lora_rank": 2, "student.lora_alpha": 2.0}


def test_a_score_sees_earlier_chunks_alone_and_is_the_students_own_call(inputs: VideoInputs, tmp_path: Path) -> None:
    config = tiny_causal(inputs, tmp_path, "self_forcing", CAUSAL)
    setup, trainer = start_causal(config)
    trainer.close()
    assert setup.scores is not None
    assert setup.scores.real is not None
    real, fake = setup.scores.real.denoiser, setup.scores.fake.denoiser
    assert isinstance(real, CausalDenoiser)
    assert isinstance(fake, CausalDenoiser)
    assert setup.teacher.denoiser is not real
    draw = Draw(5, [0, 1], torch.device("cpu"))
    x, t = draw.noise(setup.latent_shape, "x"), torch.tensor([0.3, 0.8])
    condition = setup.prompts.rows([0, 1])
    with torch.no_grad():
        found = fake(x, t, condition)
        wan = CausalWan(fake.network)  # pyright: ignore[reportArgumentType]
        mask = block_causal(ChunkLayout((1, 2)), wan.tokens_per_frame(x), KEEP_ALL)
        assert torch.equal(found, wan(whole_call(x, t, condition.text, mask=mask)).velocity)
        changed = x.clone()
        changed[:, :, 1:] += 1.0
        later = fake(changed, t, condition)
        torch.testing.assert_close(later[:, :, :1], found[:, :, :1], rtol=0, atol=1e-6)
        assert not torch.allclose(later[:, :, 1:], found[:, :, 1:], atol=1e-2)
        whole = setup.teacher.denoiser(x, t, condition)
        assert not torch.allclose(real(x, t, condition), whole, atol=1e-3)
        # Of the last chunk, which sees everything, only the frames before it are others.
        guided = setup.scores.real.velocity(x, t, condition, 3.0)
        null = setup.teacher.null_condition
        torch.testing.assert_close(guided, guided_velocity(real, x, t, condition, null, 3.0))
    with pytest.raises(ValueError, match="causal scores judge 3 frames at one time, got 2"):
        fake(x[:, :, :2], t, condition)


def test_the_direction_is_normalised_for_each_chunk(inputs: VideoInputs, tmp_path: Path) -> None:
    """The mean over elements of the losses of the chunks, each with its own normaliser."""
    config = tiny_causal(inputs, tmp_path, "self_forcing", CAUSAL)
    setup, trainer = start_causal(config)
    trainer.close()
    assert setup.scores is not None
    assert setup.scores.real is not None
    fake, real = setup.scores.fake, setup.scores.real
    with torch.no_grad():
        for number, parameter in enumerate(fake.parameters()):
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)))
    draw, times = Draw(5, [0, 1], torch.device("cpu")), MatchingConfig()
    condition, x0 = setup.prompts.rows([0, 1]), Draw(6, [0, 1], torch.device("cpu")).noise(setup.latent_shape, "x0")
    # The first chunk ten times as large: one normaliser for all would nearly silence the second.
    x0[:, :, :1] *= 10
    x0.requires_grad_()
    step = student_step(
        x0, condition, scores=Scores(real, fake, 2.0), draw=draw, times=times, samples=SampleWeights(chunks=(1, 2))
    )
    (found,) = torch.autograd.grad(step.loss, x0)
    with torch.no_grad():
        t = draw.uniform("score_time").clamp(0.02, 0.98)
        x_t = add_noise(x0, draw.noise(setup.latent_shape, "score_noise"), t)
        output = fake(x_t, t, condition)
        assert isinstance(output, FakeScoreOutput)
        fake_x0, real_x0 = x0_from_velocity(x_t, output.velocity, t), real.x0(x_t, t, condition, 2.0)
    first, second = ([video[:, :, a:b] for video in (x0, fake_x0, real_x0)] for a, b in ((0, 1), (1, 3)))
    expected = (distribution_matching_loss(*first) + 2 * distribution_matching_loss(*second)) / 3
    torch.testing.assert_close(step.loss, expected)
    gap = (fake_x0 - real_x0).detach()
    scale = torch.ones_like(gap)
    for a, b in ((0, 1), (1, 3)):
        size = (x0 - real_x0)[:, :, a:b].abs().flatten(1).mean(dim=1).detach()
        scale[:, :, a:b] = size[:, None, None, None, None]
    torch.testing.assert_close(found, gap / scale / x0.numel(), rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("lora", [False, True])
def test_such_a_run_trains_student_and_fake_score(inputs: VideoInputs, tmp_path: Path, lora: bool) -> None:
    config = tiny_causal(inputs, tmp_path, "self_forcing", {**CAUSAL, **(LORA if lora else {})})
    setup, trainer = start_causal(config)
    assert setup.scores is not None
    assert setup.scores.real is not None
    roles = (setup.student_role, setup.scores.fake_role)
    before = [torch.cat([p.detach().flatten() for _, p in role.parameters]) for role in roles]
    assert all(name.startswith("denoiser.network.") for name, _ in roles[1].parameters)
    for _ in range(3):
        metrics = train_step(config, setup, trainer)
        assert all(bool(torch.isfinite(torch.as_tensor(value))) for value in metrics.values())
        trainer.advance()
    trainer.close()
    for role, old in zip(roles, before, strict=True):
        assert not torch.equal(torch.cat([p.detach().flatten() for _, p in role.parameters]), old)


@pytest.mark.slow
def test_such_a_run_resumes_exactly(inputs: VideoInputs, tmp_path: Path) -> None:
    assert train_causal_video(tiny_causal(inputs, tmp_path / "straight", "self_forcing", CAUSAL)) == 0
    assert (
        train_causal_video(tiny_causal(inputs, tmp_path / "resumed", "self_forcing", {**CAUSAL, "run.steps": 2})) == 0
    )
    again = {**CAUSAL, "run.resume": "latest"}
    assert train_causal_video(tiny_causal(inputs, tmp_path / "resumed", "self_forcing", again)) == 0
    left, right = (load_checkpoint(list_checkpoints(tmp_path / name)[-1]) for name in ("straight", "resumed"))
    assert_same_checkpoint(left, right)


@pytest.mark.slow
def test_the_export_of_a_causal_stage_is_the_teacher_of_all_three(inputs: VideoInputs, tmp_path: Path) -> None:
    """Its weights are those that real score, fake score and student start from, with adapters on one base."""
    assert train_causal_video(tiny_causal(inputs, tmp_path / "first", "teacher_forcing")) == 0
    folder = tmp_path / "export"
    export_causal_run(tmp_path / "first", output=folder, steps=(2,))
    changes = {**CAUSAL, **LORA, "teacher.path": str(folder)}
    setup, trainer = start_causal(tiny_causal(inputs, tmp_path / "second", "self_forcing", changes))
    trainer.close()
    assert setup.scores is not None
    assert setup.scores.real is not None
    stored = load_checkpoint(list_checkpoints(tmp_path / "first")[-1]).tensors["student_ema"]
    name = "blocks.0.attn1.to_q.weight"
    trained = next(tensor for key, tensor in stored.items() if key.endswith(name))
    for network in (setup.scores.real.denoiser.network, setup.scores.fake.denoiser.network):
        torch.testing.assert_close(dict(network.named_parameters())[name], trained)


def test_what_does_not_go_together_is_named(inputs: VideoInputs, tmp_path: Path) -> None:
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"self_forcing.longest_frames": 5}, r"longest_frames.*scores is 'causal'"),
        ({"self_forcing.input": "noised_data", "self_forcing.exit": "cycled"}, r"input.*scores is 'causal'"),
        ({"data.image_share": 0.5}, "'causal' with asd, sid or data.image_share"),
    ]
    for changes, told in wrong:
        with pytest.raises(ValueError, match=told):
            tiny_causal(inputs, tmp_path, "self_forcing", {**CAUSAL, **changes})


@pytest.mark.parametrize("changes", [CAUSAL, {"self_forcing.input": "noised_data"}])
def test_a_policy_that_no_mask_expresses_is_refused_before_anything_is_loaded(
    inputs: VideoInputs, tmp_path: Path, changes: dict[str, Any]
) -> None:
    moved = {"student.layout": (1, 1, 1), "student.policy": CachePolicy(1, 1, "static")}
    config = tiny_causal(inputs, tmp_path, "self_forcing", {**changes, **moved})
    with pytest.raises(ValueError, match="positions='shifted' move the sink with the window"):
        CausalData.read(config)


@pytest.mark.slow
def test_the_sheet_shows_what_a_causal_teacher_makes(inputs: VideoInputs, tmp_path: Path) -> None:
    """Chunk by chunk over its cache, and not all frames in one call, which such a network never saw."""
    setup, trainer = start_causal(tiny_causal(inputs, tmp_path, "self_forcing", CAUSAL))
    watch = VideoWatch(setup, trainer, sample_count=1, guidance=2.0, is_flow=False)
    shown = watch._reference()
    trainer.close()
    expected = euler_rollout(
        CausalWan(setup.teacher.denoiser.network),  # pyright: ignore[reportArgumentType]
        VideoCondition(setup.prompts.rows([0]).text),
        ChunkNoise(GRID_SEED, (0,), (setup.latent_shape[0], *setup.latent_shape[2:]), stream="sheet"),
        setup.settings,
        times=setup.teacher.family.teacher_grid(setup.teacher.pipeline, 50),
        guidance=2.0,
        null_text=setup.teacher.null_condition.tokens,
    )
    assert torch.equal(shown, expected)
    assert tuple(shown.shape) == (1, *setup.latent_shape)
