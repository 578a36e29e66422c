"""What DMDR (arXiv:2511.13649) adds: adapters of the fake score in the real one, laws that become uniform, guidance
that is drawn, and whole samples of the student as its input."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import beta as beta_law
from torch import Tensor

from fewstep.core.families.table import build_family
from fewstep.core.networks.lora import ADAPTER, lora_layers
from fewstep.core.paths import add_noise, x0_from_velocity
from fewstep.core.randomness import Draw
from fewstep.core.settings import TimeLawConfig
from fewstep.core.time_law import law_times
from fewstep.core.training.checkpoint import list_checkpoints, load_checkpoint
from fewstep.dmd.blended_real import share_at
from fewstep.dmd.config import BlendedRealConfig, DmdConfig, MatchingConfig, NoisedDataConfig, matching_at
from fewstep.dmd.matching import drawn_guidance
from fewstep.dmd.reward.config import RewardMatchingConfig
from fewstep.dmd.train import student_samples, train_dmd, train_step
from tests.dmd.tiny_run import TinyInputs, assert_same_checkpoint, start, tiny_config
from tests.tiny_pipelines import build_sd3

ANNEALED = TimeLawConfig(law="beta", alpha=4.0, beta=1.5, anneal_steps=4, min=0.0, max=1.0)
DMDR: dict[str, Any] = {
    "fake_score.lora_rank": 2,
    "fake_score.lora_alpha": 4.0,
    "fake_score.ratio": 1,
    "blended_real": BlendedRealConfig(share=0.25, steps=3),
    "matching.score_times": ANNEALED,
    "matching.fake_times": ANNEALED,
    "matching.guidance_spread": 0.5,
    "noised_data": NoisedDataConfig(),
    "student.steps": 4,
    "student.sampler": "ode",
}


@pytest.mark.parametrize(("alpha", "beta", "shift"), [(4.0, 1.5, 1.0), (1.0, 1.0, 1.0), (0.5, 2.0, 3.0)])
@pytest.mark.parametrize("ends", ["clamp", "truncate"])
def test_times_have_a_beta_distribution(alpha: float, beta: float, shift: float, ends: Any) -> None:
    u = (torch.arange(4096, dtype=torch.float64) + 0.5) / 4096
    law = TimeLawConfig(law="beta", alpha=alpha, beta=beta, shift=shift, min=0.1, max=0.9, ends=ends)
    t = law_times(u, law, build_family(build_sd3())).numpy()
    assert (np.diff(t) >= 0).all()

    def below(x: float) -> float:
        return float(beta_law.cdf(x / (shift - (shift - 1) * x), alpha, beta))

    mass = below(0.9) - below(0.1)
    for x in (0.25, 0.5, 0.75):
        expected = below(x) if ends == "clamp" else (below(x) - below(0.1)) / mass
        assert float((t <= x).mean()) == pytest.approx(expected, abs=5e-4)


def test_a_law_becomes_uniform_by_half_a_cosine() -> None:
    assert ANNEALED.at(0) == TimeLawConfig(law="beta", alpha=4.0, beta=1.5, min=0.0, max=1.0)
    half = ANNEALED.at(2)
    assert (half.alpha, half.beta) == pytest.approx((2.5, 1.25))
    quarter = ANNEALED.at(1)
    assert quarter.alpha == pytest.approx(1 + 3 * 0.5 * (1 + math.cos(math.pi / 4)))
    for updates in (4, 40):
        last = ANNEALED.at(updates)
        u = torch.linspace(0, 1, 65)
        torch.testing.assert_close(law_times(u, last, build_family(build_sd3())), u, rtol=0, atol=1e-6)
    plain = TimeLawConfig(law="beta")
    assert plain.at(7) is plain


def test_the_share_of_the_fake_score_falls_by_half_a_cosine() -> None:
    settings = BlendedRealConfig(share=0.25, steps=2000)
    found = [share_at(settings, updates) for updates in (0, 1000, 2000, 5000)]
    assert found == pytest.approx([0.25, 0.125, 0.0, 0.0])


def test_the_blended_score_is_the_teacher_with_scaled_adapters(inputs: TinyInputs, tmp_path: Path) -> None:
    """By hand: W + share s B A in every layer; the fake score, its memory and its gradients stay as they are."""
    config = tiny_config(inputs, tmp_path, DMDR)
    setup, trainer = start(config)
    trainer.close()
    assert setup.blended is not None
    fake = setup.fake_score.denoiser
    with torch.no_grad():
        for number, (_, weight) in enumerate(setup.fake_role.parameters):
            weight.copy_(0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(number)))
    draw = Draw(5, [0, 1], trainer.device)
    x, t = draw.noise(setup.latent_shape, "x"), torch.tensor([0.3, 0.8])
    condition = setup.prompts.rows([0, 1])
    before = fake(x, t, condition)
    blended = setup.blended.teacher(0)
    found = blended.velocity(x, t, condition, 2.0)
    by_hand = setup.teacher.denoiser.copy()
    for name in lora_layers(fake.network):
        layer: Any = fake.network.get_submodule(name)
        factors = [getattr(layer, f"lora_{factor}")[ADAPTER].weight.detach() for factor in "BA"]
        plain = by_hand.network.get_submodule(name).get_parameter("weight")
        with torch.no_grad():
            plain.add_(0.25 * (4.0 / 2) * (factors[0] @ factors[1]).reshape(plain.shape))
    expected = setup.teacher.with_denoiser(by_hand).velocity(x, t, condition, 2.0)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found, setup.teacher.velocity(x, t, condition, 2.0), atol=1e-3)
    assert torch.equal(fake(x, t, condition), before)
    assert not any(parameter.requires_grad for parameter in blended.denoiser.parameters())
    pointers = {weight.data_ptr() for weight in fake.network.parameters()}
    assert all(weight.data_ptr() in pointers for weight in blended.denoiser.network.parameters())
    assert setup.blended.teacher(3) is setup.teacher


def test_guidance_is_drawn_for_each_sample_around_its_middle(inputs: TinyInputs, tmp_path: Path) -> None:
    config = tiny_config(inputs, tmp_path, {"matching.guidance": 7.0, "matching.guidance_spread": 0.5})
    found = drawn_guidance(config.matching, config.teacher, Draw(5, list(range(4000)), torch.device("cpu")))
    assert isinstance(found, Tensor)
    assert found.shape == (4000,)
    assert (float(found.min()), float(found.max())) == pytest.approx((6.5, 7.5), abs=1e-3)
    assert float(found.mean()) == pytest.approx(7.0, abs=0.02)
    assert drawn_guidance(MatchingConfig(), config.teacher, Draw(5, [0], torch.device("cpu"))) == 2.0


@pytest.mark.parametrize("due", [True, False])
def test_whole_samples_are_noised_for_the_student_and_shown_to_the_fake_score(
    inputs: TinyInputs, tmp_path: Path, due: bool
) -> None:
    config = tiny_config(inputs, tmp_path, DMDR)
    setup, trainer = start(config)
    draw = Draw(5, [0, 1, 2, 3], trainer.device)
    condition = setup.prompts.of_samples(draw.indices, 5)
    with torch.set_grad_enabled(due):
        made = student_samples(config, setup, trainer, condition=condition, draw=draw)
        x0, told, shown = made.x0, made.condition, made.shown
    trainer.close()
    assert told is condition
    with torch.no_grad():
        whole = setup.student.sample(draw.noise(setup.latent_shape, "noise"), condition)
        torch.testing.assert_close(shown, whole)
        if not due:
            assert x0 is shown
            return
        places = (draw.uniform("noised_data_time") * 4).long().tolist()
        assert len(set(places)) > 1
        t = torch.tensor([setup.student.times[place] for place in places])
        x_t = add_noise(whole, draw.noise(setup.latent_shape, "input_noise"), t)
        torch.testing.assert_close(x0, x0_from_velocity(x_t, setup.student.denoiser(x_t, t, condition), t))
    assert x0.requires_grad
    assert not shown.requires_grad


def test_a_run_moves_adapters_and_student_and_the_base_stays(inputs: TinyInputs, tmp_path: Path) -> None:
    config = tiny_config(inputs, tmp_path, DMDR)
    setup, trainer = start(config)
    teacher = torch.cat([p.detach().flatten() for p in setup.teacher.denoiser.parameters()])
    roles = {"student": setup.student_role, "fake": setup.fake_role}

    def weights() -> dict[str, Tensor]:
        return {name: torch.cat([p.detach().flatten() for _, p in role.parameters]) for name, role in roles.items()}

    before, directions = weights(), []
    for _ in range(4):
        metrics = train_step(config, setup, trainer)
        directions.append(float(metrics["matching_direction_rms"]) if "matching_direction_rms" in metrics else 0.0)
        assert all(bool(torch.isfinite(torch.as_tensor(value)).all()) for value in metrics.values())
        trainer.advance()
    trainer.close()
    after = weights()
    assert all(not torch.equal(after[name], before[name]) for name in before)
    assert torch.equal(torch.cat([p.detach().flatten() for p in setup.teacher.denoiser.parameters()]), teacher)


@pytest.mark.slow
def test_such_a_run_resumes_exactly(inputs: TinyInputs, tmp_path: Path) -> None:
    """In the middle of both schedules."""
    assert train_dmd(tiny_config(inputs, tmp_path / "straight", DMDR)) == 0
    assert train_dmd(tiny_config(inputs, tmp_path / "resumed", {**DMDR, "run.steps": 2})) == 0
    assert train_dmd(tiny_config(inputs, tmp_path / "resumed", {**DMDR, "run.resume": "latest"})) == 0
    left, right = (load_checkpoint(list_checkpoints(tmp_path / name)[-1]) for name in ("straight", "resumed"))
    assert_same_checkpoint(left, right)


def test_settings_that_cannot_be_are_named(inputs: TinyInputs, tmp_path: Path) -> None:
    config = tiny_config(inputs, tmp_path, DMDR)
    assert isinstance(config, DmdConfig)
    assert matching_at(config, 2).matching.score_times == ANNEALED.at(2)
    assert matching_at(tiny_config(inputs, tmp_path, {}), 2).matching == MatchingConfig()
    with pytest.raises(ValueError, match=r"set fake_score\.lora_rank"):
        tiny_config(inputs, tmp_path, {**DMDR, "fake_score.lora_rank": 0, "fake_score.lora_alpha": 64.0})
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"alpha": 2.0}, "alpha is 2.0, and law is uniform"),
        ({"anneal_steps": 5}, "anneal_steps is 5, and law is uniform"),
        ({"law": "logit_normal", "beta": 2.0}, "beta is 2.0, and law is logit_normal"),
        ({"law": "beta", "mean": 1.0}, "mean is 1.0, and law is beta"),
        ({"law": "beta", "alpha": 0.0}, "alpha 0.0 and beta 1.5 must be positive"),
        ({"law": "beta", "unit": "timestep", "min": 1, "max": 9}, "law is beta, and unit timestep"),
    ]
    for values, told in wrong:
        with pytest.raises(ValueError, match=told):
            TimeLawConfig(**values)
    for share, steps in ((0.0, 5), (1.5, 5), (0.5, 0)):
        with pytest.raises(ValueError, match="they must lie in"):
            BlendedRealConfig(share=share, steps=steps)
    with pytest.raises(ValueError, match="guidance_spread is -1"):
        MatchingConfig(guidance_spread=-1)
    with pytest.raises(ValueError, match="anneal_steps in a reward run"):
        RewardMatchingConfig(score_times=ANNEALED)
