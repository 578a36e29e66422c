"""What published recipes of DMD set beyond the loop's own: discriminators, noised data, starts, alignment."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.core.config import OptimizerConfig
from fewstep.core.denoiser import Denoiser
from fewstep.core.discriminator import ConvHead, DiscriminatorHeads
from fewstep.core.paths import add_noise, x0_from_velocity
from fewstep.core.randomness import Draw, shared_integer
from fewstep.core.settings import TimeLawConfig
from fewstep.core.training.checkpoint import list_checkpoints, load_checkpoint
from fewstep.dmd.config import FDistillObjective, GanConfig, MatchingConfig, NoisedDataConfig
from fewstep.dmd.discriminator import feature_sizes
from fewstep.dmd.gan_loss import approximate_r1_penalty, discriminator_loss, hinge_discriminator_loss
from fewstep.dmd.matching import judged_samples
from fewstep.dmd.train import student_samples, train_dmd, train_step
from tests.dmd.tiny_run import TinyInputs, assert_same_checkpoint, start, tiny_config
from tests.tiny_pipelines import build_sdxl, save_pipeline

HEADS = OptimizerConfig(learning_rate=1e-3)
GANS: dict[str, dict[str, Any]] = {
    "softplus": {},
    "hinge": {"loss": "hinge"},
    "r1": {"r1_weight": 0.5, "r1_scale": 0.05},
    "same noise": {"same_noise": True},
    "convolutions": {"head": "conv"},
    "blocks": {"blocks": (0, 1), "head_width": 8},
    "teacher": {"features": "teacher", "optimizer": HEADS},
    "teacher, all of it": {
        "features": "teacher",
        "optimizer": HEADS,
        "blocks": (1,),
        "loss": "hinge",
        "same_noise": True,
        "r1_weight": 0.1,
    },
}


def gan(inputs: TinyInputs, **values: Any) -> GanConfig:
    return GanConfig(latents=str(inputs.latents), weight=0.1, **values)


def trained(setup: Any) -> dict[str, Tensor]:
    roles = {"student": setup.student_role, "fake": setup.fake_role, "heads": setup.heads_role}
    return {name: torch.cat([p.detach().flatten() for _, p in role.parameters]) for name, role in roles.items() if role}


@pytest.mark.parametrize("name", list(GANS))
def test_every_discriminator_trains_what_it_should(inputs: TinyInputs, tmp_path: Path, name: str) -> None:
    config = tiny_config(inputs, tmp_path, {"gan": gan(inputs, **GANS[name]), "fake_score.ratio": 1})
    setup, trainer = start(config)
    on_teacher = config.gan is not None and config.gan.features == "teacher"
    assert (setup.heads_role is not None) == on_teacher
    assert any(key.startswith("heads.") for key, _ in setup.fake_role.parameters) != on_teacher
    teacher = torch.cat([p.flatten() for p in setup.teacher.denoiser.parameters()])
    before = trained(setup)
    metrics = [train_step(config, setup, trainer) for _ in range(2)]
    trainer.close()
    assert all(bool(torch.isfinite(torch.as_tensor(value)).all()) for record in metrics for value in record.values())
    assert float(metrics[1]["discriminator_loss"]) > 0
    assert float(metrics[1]["student_gan_loss"]) != float(metrics[0]["student_gan_loss"])
    after = trained(setup)
    assert all(not torch.equal(after[key], before[key]) for key in before)
    assert torch.equal(torch.cat([p.flatten() for p in setup.teacher.denoiser.parameters()]), teacher)
    assert all(p.grad is None for p in setup.teacher.denoiser.parameters())


@pytest.mark.slow
def test_f_distill_and_a_discriminator_on_the_teacher_resume_exactly(inputs: TinyInputs, tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "dmd": None,
        "f_distill": FDistillObjective(divergence="js"),
        "gan": gan(inputs, **{**GANS["teacher, all of it"], "loss": "softplus"}),
        "noised_data": NoisedDataConfig(latents=str(inputs.latents), share=0.5),
        "student.steps": 4,
        "fake_score.student_share": 0.02,
        "matching.score_times": TimeLawConfig(law="logit_normal", shift=2.0, ends="truncate"),
    }
    assert train_dmd(tiny_config(inputs, tmp_path / "straight", changes)) == 0
    assert train_dmd(tiny_config(inputs, tmp_path / "resumed", {**changes, "run.steps": 3})) == 0
    assert train_dmd(tiny_config(inputs, tmp_path / "resumed", {**changes, "run.resume": "latest"})) == 0
    left, right = (load_checkpoint(list_checkpoints(tmp_path / name)[-1]) for name in ("straight", "resumed"))
    assert_same_checkpoint(left, right)
    assert "discriminator" in left.tensors


@pytest.mark.parametrize("name", ["softplus", "hinge", "r1", "same noise"])
def test_the_discriminators_loss_in_closed_form(inputs: TinyInputs, tmp_path: Path, name: str) -> None:
    setup, trainer = start(tiny_config(inputs, tmp_path, {}))
    trainer.close()
    settings = gan(inputs, **GANS[name])
    draw, law = Draw(3, [0, 1, 2], torch.device("cpu")), MatchingConfig(fake_times=TimeLawConfig(shift=3.0))
    condition, shape = setup.prompts.rows([0, 1, 2]), setup.latent_shape
    fake, real = draw.noise(shape, "a"), draw.noise(shape, "b")
    clock = setup.teacher.family
    found = judged_samples(fake, condition, (real, condition), draw=draw, times=law, clock=clock, gan=settings)
    parts = len(found.t) // 3
    assert parts == (3 if name == "r1" else 2)
    assert found.condition.batch_size == 3 * parts
    states, times = found.x_t.split(3), found.t.split(3)
    streams = ("fake", "fake") if name == "same noise" else ("fake", "real")
    for state, t, clean, stream in zip(states, times, (fake, real), streams, strict=False):
        eps = draw.noise(shape, f"discriminator_{stream}_noise")
        assert torch.equal(state, add_noise(clean, eps, t))
    assert torch.equal(times[0], times[1]) == (name == "same noise")
    logits = torch.linspace(-2, 3, 3 * parts)
    first, second = logits[:3], logits[3:6]
    expected = (hinge_discriminator_loss if name == "hinge" else discriminator_loss)(first, second)
    if name == "r1":
        moved = draw.noise(shape, "discriminator_r1_noise")
        torch.testing.assert_close(states[2], states[1] + 0.05 * moved)
        assert torch.equal(times[2], times[1])
        expected = expected + 0.5 * approximate_r1_penalty(second, logits[6:]) / 0.05**2
    assert torch.equal(found.losses(logits, 3, settings), expected)


def test_dmd2s_convolutions_have_its_sizes() -> None:
    """Three of stride 2 and one of 4 x 4 for SDXL's 32 x 32, one and one for the 8 x 8 of Stable Diffusion 1.5."""
    for size, count in (((32, 32), 4), ((8, 8), 2), ((4, 4), 1), ((2, 2), 1), ((32, 48), 4)):
        head = ConvHead(64, size, generator=torch.Generator().manual_seed(0))
        layers = [layer for layer in head.layers if isinstance(layer, torch.nn.Conv2d)]
        assert len(layers) == count
        assert {layer.in_channels for layer in layers} == {64}
        logits = head(torch.randn(3, 64, size[0] * size[1]))
        assert logits.shape == (3,)
        assert float(logits.abs().max()) == 0
    first, again = (ConvHead(8, (8, 8), generator=torch.Generator().manual_seed(1)).state_dict() for _ in range(2))
    assert all(torch.equal(first[key], again[key]) for key in first)
    heads = DiscriminatorHeads.of([ConvHead(8, (4, 4), generator=torch.Generator().manual_seed(1))])
    assert heads([torch.randn(2, 8, 16)]).shape == (2,)


def test_the_size_of_a_feature_map_is_found_by_a_call(inputs: TinyInputs, tmp_path: Path) -> None:
    pipeline = build_sdxl()
    folder = save_pipeline(pipeline, tmp_path / "sdxl")
    changes = {"teacher.path": str(folder), "gan": gan(inputs, head="conv"), "data.height": 16, "data.width": 32}
    config = tiny_config(inputs, tmp_path / "run", {**changes, "gan": None})
    setup, trainer = start(config)
    trainer.close()
    denoiser: Denoiser = setup.teacher.denoiser
    shape = setup.latent_shape
    (found,) = feature_sizes(denoiser, shape, setup.teacher.null_condition, None)
    assert found[1] == 2 * found[0]


@pytest.mark.parametrize("step", [0, 1, 2, 5])
def test_noised_data_is_the_input_of_its_share_of_the_steps(inputs: TinyInputs, tmp_path: Path, step: int) -> None:
    noised = NoisedDataConfig(latents=str(inputs.latents), share=0.5)
    config = tiny_config(inputs, tmp_path, {"noised_data": noised, "student.steps": 4, "run.batch_size": 2})
    setup, trainer = start(config)
    trainer.step = step
    draw = Draw(5, [2 * step, 2 * step + 1], trainer.device)
    condition = setup.prompts.of_samples(draw.indices, 5)
    made = student_samples(config, setup, trainer, condition=condition, draw=draw)
    x0, told, shown = made.x0, made.condition, made.shown
    on_data = shared_integer(5, step, "noised_data", 10**6) < 500_000
    grad_step = shared_integer(5, step, "grad_step", 4)
    noise = draw.noise(setup.latent_shape, "noise")
    assert setup.inputs is not None
    if on_data:
        _, clean, expected = setup.inputs.rows(draw.indices, trainer.device)
        places = (draw.uniform("noised_data_time") * 4).long()
        t = torch.tensor([setup.student.times[place] for place in places.tolist()])
        x_t = add_noise(clean, noise, t)
        right = x0_from_velocity(x_t, setup.student.denoiser(x_t, t, expected), t)
    else:
        expected = condition
        renoise = [draw.noise(setup.latent_shape, f"renoise_{i}") for i in range(grad_step)]
        right = setup.student.rollout(noise, condition, renoise, grad_step).x0
    trainer.close()
    assert torch.equal(x0, right)
    assert shown is x0
    assert torch.equal(told.text, expected.text)


def test_a_fake_score_starts_from_that_of_a_run(inputs: TinyInputs, tmp_path: Path) -> None:
    """DMD2's second stage: student and fake score go on, and the discriminator begins."""
    for lora in (0, 2):
        ranks = {"student.lora_rank": lora, "fake_score.lora_rank": lora}
        first = tmp_path / f"first{lora}"
        assert train_dmd(tiny_config(inputs, first, {**ranks, "run.steps": 2})) == 0
        stored = load_checkpoint(list_checkpoints(first)[-1]).tensors["fake_score"]
        changes = {**ranks, "fake_score.init": str(first), "student.init": str(first), "gan": gan(inputs)}
        setup, trainer = start(tiny_config(inputs, tmp_path / f"second{lora}", changes))
        own = dict(setup.fake_role.parameters)
        same = [name for name, tensor in stored.items() if name in own and torch.equal(own[name], tensor)]
        assert len(same) == sum(not name.startswith("heads.") for name in own)
        trainer.close()
        with pytest.raises(ValueError, match="does not fit this fake score: "):
            start(tiny_config(inputs, tmp_path / "wrong", {"fake_score.lora_rank": 3, "fake_score.init": str(first)}))
    network = str(inputs.teacher / "transformer")
    setup, trainer = start(tiny_config(inputs, tmp_path / "network", {"fake_score.init": network}))
    trainer.close()
    with pytest.raises(ValueError, match=r"fake_score\.init .* is no \.safetensors file"):
        start(tiny_config(inputs, tmp_path / "none", {"fake_score.init": str(tmp_path)}))


def test_the_fake_score_moves_towards_the_student(inputs: TinyInputs, tmp_path: Path) -> None:
    config = tiny_config(inputs, tmp_path, {"fake_score.student_share": 0.25, "fake_score.ratio": 1})
    still = dataclasses.replace(config.fake_score.optimizer, learning_rate=1e-12)
    config = dataclasses.replace(config, fake_score=dataclasses.replace(config.fake_score, optimizer=still))
    setup, trainer = start(config)
    before = {name: p.detach().clone() for name, p in setup.fake_role.parameters}
    train_step(config, setup, trainer)
    student = dict(setup.student_role.parameters)
    for name, parameter in setup.fake_role.parameters:
        expected = before[name].lerp(student[name.removeprefix("denoiser.")].detach(), 0.25)
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-5, atol=1e-6)
    trainer.close()
    with pytest.raises(ValueError, match=r"with adapters \(lora_rank 2 and 0"):
        tiny_config(inputs, tmp_path, {"fake_score.student_share": 0.25, "student.lora_rank": 2})


def test_another_guidance_of_the_real_score(inputs: TinyInputs, tmp_path: Path) -> None:
    losses = []
    for changes in ({"teacher.guidance": 3.0}, {"teacher.guidance": 2.0, "matching.guidance": 3.0}, {}):
        config = tiny_config(inputs, tmp_path, {**changes, "fake_score.ratio": 1})
        setup, trainer = start(config)
        losses.append(float(train_step(config, setup, trainer)["student_loss"]))
        trainer.close()
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"features": "teacher"}, "features is teacher and optimizer empty"),
        ({"optimizer": HEADS}, "features is fake_score and optimizer given"),
        (
            {"features": "teacher", "optimizer": HEADS, "discriminator_weight": 0.5},
            "discriminator_weight is 0.5, which no",
        ),
        ({"head": "conv", "head_width": 8}, "head_width is 8, which nothing reads here"),
        ({"r1_scale": 0.5}, "r1_scale is 0.5, which nothing reads here"),
        ({"r1_weight": -1.0}, "r1_weight -1.0 must be 0 or more"),
        ({"r1_weight": float("nan")}, "must be 0 or more"),
    ],
)
def test_settings_of_a_discriminator_that_do_nothing_are_named(values: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        GanConfig(latents="x", weight=0.1, **values)
