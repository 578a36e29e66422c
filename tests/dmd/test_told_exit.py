"""A fake score that is told at which step the student stopped: its closed form, its network, its run."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from torch import Tensor, nn

from fewstep.core.condition import Condition
from fewstep.core.denoiser import Denoiser
from fewstep.core.export.network import export_network
from fewstep.core.fake_score import FakeScore
from fewstep.core.networks.exit_shift import ExitShift
from fewstep.core.randomness import Draw, sample_noise, shared_integer
from fewstep.core.teacher import Teacher
from fewstep.core.training.checkpoint import load_checkpoint
from fewstep.dmd.config import BlendedRealConfig, NoisedDataConfig
from fewstep.dmd.matching import fake_score_step, telling
from fewstep.dmd.train import train_dmd, train_step
from tests.core.families.test_families_hunyuan_video import MODEL as HUNYUAN_VIDEO
from tests.core.families.test_families_qwen_image import MODEL as QWEN_IMAGE
from tests.core.families.test_families_wan_experts import TEXT as EXPERTS
from tests.core.families.test_families_z_image import MODEL as Z_IMAGE
from tests.dmd.tiny_run import WITH_GAN, TinyInputs, assert_same_checkpoint, start, tiny_config
from tests.tiny_pipelines import build_sd3, build_sdxl
from tests.tiny_sana import build_sana
from tests.tiny_videos import build_video_pipeline


def drift(scale: Tensor, t: Tensor, others: tuple[float, ...]) -> Tensor:
    """Mean over x of fake minus real x0 against a sample of deviation `scale`, the direction of distribution matching.

    The teacher is N(0, 1). The fake score is that of the equal mixture of N(0, scale^2) and the others; the integral
    over noised samples x_t is taken on a fine grid, float64.
    """
    x = torch.linspace(-8, 8, 4001, dtype=torch.float64)
    total = torch.zeros((), dtype=torch.float64)
    for time in t.tolist():
        a, b = 1 - time, time
        variances = torch.tensor([float(scale), *others], dtype=torch.float64).square() * a**2 + b**2
        densities = torch.exp(-(x[:, None] ** 2) / (2 * variances)) / (2 * math.pi * variances).sqrt()
        fake = -(densities / variances).sum(1) / densities.sum(1) * x
        real = -x / (a**2 + b**2)
        # d x0 / d scale = x0 / scale, and E[x0 | x_t] = a scale^2 / var x_t.
        own = a * float(scale) ** 2 / variances[0]
        total = total + ((fake - real) * own * x * densities[:, 0]).sum() * (x[1] - x[0])
    return total


def rest(others: tuple[float, ...]) -> float:
    """The deviation at which the last exit comes to rest, by bisection."""
    t = torch.linspace(0.02, 0.98, 49, dtype=torch.float64)
    low, high = 0.5, 2.0
    for _ in range(40):
        middle = (low + high) / 2
        # Falling: below the rest samples are spread, above it they are drawn together.
        low, high = (middle, high) if drift(torch.tensor(middle), t, others) < 0 else (low, middle)
    return (low + high) / 2


def test_mixture_pulls_the_last_exit_away_and_its_own_score_does_not() -> None:
    """Other exits are stuck at a deviation of 0.9: with one score for all the last is pushed beyond the teacher's."""
    assert rest(()) == pytest.approx(1.0, abs=1e-6)
    two, four = rest((0.9,)), rest((0.9, 0.9, 0.9))
    assert two == pytest.approx(1.086, abs=2e-3)
    assert four == pytest.approx(1.207, abs=2e-3)


class Told(nn.Module):
    """A network of one number that is told its time as diffusers' are: sinusoids, two layers, and a product."""

    def __init__(self) -> None:
        super().__init__()
        self.time_proj = Timesteps(16, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.timestep_embedder = TimestepEmbedding(16, 32)
        self.out = nn.Linear(32, 1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return x * self.out(self.timestep_embedder(self.time_proj(1000 * t)))


def fitted(told: bool) -> list[float]:
    """The slope of E[eps - x0 | x_t] / x_t that a trained network has at t = 0.5 for samples of deviation 0.4 and 1."""
    torch.manual_seed(0)
    network = Told()
    shift = ExitShift(network, 2)
    optimizer = torch.optim.Adam([*network.parameters(), *shift.parameters()], lr=3e-3)
    for _ in range(400):
        exits = torch.randint(2, (256,))
        x0, eps = torch.randn(256, 1) * torch.where(exits == 0, 0.4, 1.0)[:, None], torch.randn(256, 1)
        t = torch.full((256,), 0.5)
        with shift.told(network, exits, 256) if told else nullcontext():
            velocity = network(0.5 * x0 + 0.5 * eps, t)
        loss = (velocity - (eps - x0)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    slopes = []
    for number in range(2):
        with torch.no_grad(), shift.told(network, torch.tensor([number]), 1) if told else nullcontext():
            slopes.append(network(torch.ones(1, 1), torch.tensor([0.5])).item())
    return slopes


def test_one_network_that_is_told_follows_both_distributions() -> None:
    """E[eps - x0 | x_t] = (b - a s^2) / (a^2 s^2 + b^2) x_t."""
    expected = [(0.5 - 0.5 * s**2) / (0.25 * s**2 + 0.25) for s in (0.4, 1.0)]
    told, untold = fitted(told=True), fitted(told=False)
    assert told == pytest.approx(expected, abs=0.12)
    assert untold[0] == untold[1]
    assert max(abs(a - b) for a, b in zip(untold, expected, strict=True)) > 0.5


NETWORKS: dict[str, Callable[[], Any]] = {
    "sd3": build_sd3,
    "sdxl": build_sdxl,
    "sana": lambda: build_sana(dense=True),
    "wan": lambda: build_video_pipeline(text_tokens=8),
    "wan_time_per_token": lambda: build_video_pipeline(text_tokens=8, expand_timesteps=True),
    "hunyuan_video": HUNYUAN_VIDEO.build,
    "qwen_image": QWEN_IMAGE.build,
}


def told_network(name: str) -> tuple[FakeScore, Tensor, Condition]:
    """A fake score with two exits, four samples of noise and what they are asked for."""
    teacher = Teacher(NETWORKS[name](), path=name)
    denoiser = Denoiser(copy.deepcopy(teacher.denoiser.network), teacher.family).requires_grad_(True)
    size = {"hunyuan_video": HUNYUAN_VIDEO.size, "qwen_image": QWEN_IMAGE.size}.get(name, {})
    size = {"height": 32, "width": 32, "frames": 5} if name.startswith("wan") else dict(size)
    shape = teacher.latent_shape(size.get("height"), size.get("width"), frames=size.get("frames"))
    x_t = sample_noise(0, range(4), shape, stream="told")
    return FakeScore(denoiser, exit_shift=ExitShift(denoiser.network, 2)), x_t, teacher.encode(list("abcd"))


class TestShift:
    @pytest.mark.parametrize("name", NETWORKS)
    def test_begins_as_the_network_and_moves_what_is_told_alone(self, name: str) -> None:
        fake, x_t, condition = told_network(name)
        shift, t = fake.exit_shift, torch.tensor([0.2, 0.4, 0.6, 0.8])
        assert shift is not None
        with torch.no_grad():
            plain = fake(x_t, t, condition).velocity
            assert torch.equal(fake(x_t, t, condition, torch.tensor([0, 1, 1, 0])).velocity, plain)
            for weight in shift.parameters():
                weight.normal_(std=2.0, generator=torch.Generator().manual_seed(3))
            told = fake(x_t, t, condition, torch.tensor([0, 1])).velocity
            one_by_one = [
                fake(x_t[i : i + 1], t[i : i + 1], condition.index(torch.tensor([i])), torch.tensor([i]))
                for i in (0, 1)
            ]
            assert torch.equal(fake(x_t, t, condition).velocity, plain)
        # Two of four are told: the others are as they were, and the two are as they are alone.
        torch.testing.assert_close(told[2:], plain[2:], rtol=1e-4, atol=1e-5)
        assert (told[:2] - plain[:2]).flatten(1).norm(dim=1).min() > 1e-3 * plain.norm()
        torch.testing.assert_close(told[:2], torch.cat([one.velocity for one in one_by_one]), rtol=1e-4, atol=1e-5)

    def test_gradients_reach_the_rows_of_the_exits(self) -> None:
        fake, x_t, condition = told_network("sd3")
        fake(x_t, torch.full((4,), 0.5), condition, torch.tensor([1, 1, 1])).velocity.square().sum().backward()
        assert fake.exit_shift is not None
        (shift,) = fake.exit_shift.parameters()
        assert shift.grad is not None
        assert shift.grad[0].abs().sum() == 0
        assert shift.grad[1].abs().sum() > 0

    def test_what_is_refused(self) -> None:
        fake, x_t, condition = told_network("sd3")
        t = torch.full((4,), 0.5)
        for exits, match in (
            ([0, 2], r"exits \[0, 2\] must lie in \[0, 2\)"),
            ([0] * 5, "a list of at most 4, the samples"),
        ):
            with pytest.raises(ValueError, match=match):
                fake(x_t, t, condition, torch.tensor(exits))
        with pytest.raises(ValueError, match="this fake score is not told any"):
            FakeScore(fake.denoiser)(x_t, t, condition, torch.tensor([0]))
        with pytest.raises(ValueError, match="told one of 1 exits; there must be two or more"):
            ExitShift(fake.denoiser.network, 1)
        for model, match in ((Z_IMAGE, "embeds its time in a way that is not known here"), (EXPERTS, "two experts")):
            with pytest.raises(ValueError, match=f"fake_score.told_exit.*{match}"):
                ExitShift(model.teacher().denoiser.network, 2)

    def test_discriminator_is_told_nothing(self, inputs: TinyInputs, tmp_path: Path) -> None:
        """Told the exit of fakes alone it would know them by that: its loss is the same for every shift."""
        config = tiny_config(inputs, tmp_path / "run", {"fake_score.told_exit": True, "student.steps": 2, **WITH_GAN})
        setup, trainer = start(config)
        draw = Draw(5, [0, 1, 2, 3], trainer.device)
        condition = setup.prompts.of_samples(draw.indices, 5)
        x0 = draw.noise(setup.latent_shape, "x0")
        assert setup.real is not None
        real = setup.real.rows(draw.indices, trainer.device)[1:]
        losses, flows = [], []
        for scale in (0.0, 3.0):
            assert setup.fake_score.exit_shift is not None
            for weight in setup.fake_score.exit_shift.parameters():
                nn.init.constant_(weight, scale)
            told = telling(setup.fake_score, torch.tensor([0, 1, 0, 1]))
            step = fake_score_step(
                x0, condition, fake_score=told, draw=draw, times=config.matching, clock=setup.teacher.family,
                gan=config.gan, real=real,
            )  # fmt: skip
            assert step.discriminator_loss is not None
            losses.append(step.discriminator_loss.item())
            flows.append(step.flow_loss.item())
        trainer.close()
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
        assert abs(flows[0] - flows[1]) > 1e-3


TOLD: dict[str, Any] = {"fake_score.told_exit": True, "student.steps": 3, "run.steps": 6}


class TestRun:
    def test_only_the_row_of_the_exit_moves(self, inputs: TinyInputs, tmp_path: Path) -> None:
        config = tiny_config(inputs, tmp_path / "run", TOLD)
        setup, trainer = start(config)
        assert setup.fake_score.exit_shift is not None
        (shift,) = setup.fake_score.exit_shift.parameters()
        assert shift.shape[0] == 3
        seen = set()
        for step in range(6):
            before, place = shift.detach().clone(), shared_integer(5, step, "grad_step", 3)
            # Without the momentum of earlier steps.
            setup.fake_role.optimizer.state.clear()
            train_step(config, setup, trainer)
            rows = (shift.detach() != before).any(dim=1).tolist()
            assert rows == [number == place for number in range(3)]
            seen.add(place)
            trainer.advance()
        trainer.close()
        assert len(seen) > 1

    def test_adapters_on_the_layers_of_the_time_are_told_as_well(self, inputs: TinyInputs, tmp_path: Path) -> None:
        changes = {**TOLD, "fake_score.lora_rank": 2, "fake_score.lora_targets": ("all",)}
        config = tiny_config(inputs, tmp_path / "run", changes)
        setup, trainer = start(config)
        assert setup.fake_score.exit_shift is not None
        (shift,) = setup.fake_score.exit_shift.parameters()
        assert "exit_shift.shifts.0" in dict(setup.fake_role.parameters)
        assert any("timestep_embedder.linear_1.lora" in name for name, _ in setup.fake_role.parameters)
        train_step(config, setup, trainer)
        trainer.close()
        place = shared_integer(5, 0, "grad_step", 3)
        assert [bool(row.abs().sum() > 0) for row in shift.detach()] == [number == place for number in range(3)]

    def test_resume_is_exact_and_an_untold_fake_score_can_be_gone_on_from(
        self, inputs: TinyInputs, tmp_path: Path
    ) -> None:
        whole = tiny_config(inputs, tmp_path / "whole", TOLD)
        assert train_dmd(whole) == 0
        first = tiny_config(inputs, tmp_path / "parts", {**TOLD, "run.steps": 3})
        assert train_dmd(first) == 0
        assert train_dmd(tiny_config(inputs, tmp_path / "parts", {**TOLD, "run.resume": "latest"})) == 0
        one, other = (load_checkpoint(tmp_path / name / "checkpoint-6") for name in ("whole", "parts"))
        assert_same_checkpoint(one, other)
        assert one.tensors["fake_score"]["exit_shift.shifts.0"].abs().sum() > 0
        assert train_dmd(tiny_config(inputs, tmp_path / "plain", {"student.steps": 3})) == 0
        changes = {**TOLD, "run.steps": 1, "fake_score.init": str(tmp_path / "plain")}
        assert train_dmd(tiny_config(inputs, tmp_path / "next", changes)) == 0
        untold = {"student.steps": 3, "fake_score.init": str(tmp_path / "whole")}
        with pytest.raises(ValueError, match=r"its fake score is told the student's exit, and this one is not"):
            train_dmd(tiny_config(inputs, tmp_path / "not", untold))
        with pytest.raises(ValueError, match="its fake score is told the exit"):
            export_network(tmp_path / "whole", tmp_path / "network", role="fake_score")

    @pytest.mark.parametrize(
        ("changes", "match"),
        [
            ({"student.steps": 1}, "a student of one step"),
            ({"noised_data": NoisedDataConfig()}, "noised_data of the student's own samples"),
            (
                {"blended_real": BlendedRealConfig(share=0.5, steps=2), "fake_score.lora_rank": 2},
                "whose real score is told nothing",
            ),
        ],
    )
    def test_what_is_refused(self, inputs: TinyInputs, tmp_path: Path, changes: dict[str, Any], match: str) -> None:
        with pytest.raises(ValueError, match=match):
            tiny_config(inputs, tmp_path, {**TOLD, **changes})
