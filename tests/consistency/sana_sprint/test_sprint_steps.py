"""The two kinds of steps of SANA-Sprint on tiny networks: values, and who receives gradients."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fewstep.consistency.batch import Networks, Noised
from fewstep.consistency.sana_sprint.config import SprintConfig, SprintConsistencyConfig, SprintDiscriminatorConfig
from fewstep.consistency.sana_sprint.step import (
    adversarial_samples,
    judge,
    sprint_discriminator_step,
    sprint_student_step,
    with_drawn_guidance,
)
from fewstep.core.config import OptimizerConfig
from fewstep.core.denoiser import Denoiser
from fewstep.core.discriminator import build_heads
from fewstep.core.networks.sana_networks import with_guidance_embedding
from fewstep.core.paths import x0_from_velocity
from fewstep.core.randomness import Draw
from fewstep.core.tangents.network import check_denoiser_jvp, use_jvp_attention
from fewstep.core.teacher import Teacher
from tests.tiny_sana import LATENT_SHAPE, build_sana

DRAW = Draw(seed=3, indices=[0, 1, 2], device=torch.device("cpu"))
DISCRIMINATOR = SprintDiscriminatorConfig(optimizer=OptimizerConfig(learning_rate=1e-3))
SPRINT = SprintConfig(time_mean=0.693, consistency=SprintConsistencyConfig(), discriminator=DISCRIMINATOR)
PROMPTS = ["the digit seven", "a bold two", "a three"]


@pytest.fixture(scope="module")
def parts() -> tuple[Networks, Noised]:
    """Networks whose student is the teacher with a guidance embedding, heads that say something, and data."""
    teacher = Teacher(build_sana(dense=True), path="tiny")
    student = Denoiser(with_guidance_embedding(teacher.pipeline.transformer), teacher.family)
    use_jvp_attention(student.network)
    student.requires_grad_(True)
    heads = build_heads(teacher.denoiser, None, width=8, seed=1)
    with torch.no_grad():
        for index, parameter in enumerate(heads.parameters()):
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index)))
    x0, eps = (DRAW.noise(LATENT_SHAPE, name) for name in ("data", "noise"))
    noised = Noised(x0, eps, torch.tensor([0.3, 0.6, 0.9]), teacher.encode(PROMPTS), step=0)
    return Networks(student, student, teacher, 1.0, heads=heads), noised


def gradients(module: torch.nn.Module) -> list[Tensor | None]:
    found = [parameter.grad for parameter in module.parameters()]
    module.zero_grad(set_to_none=True)
    return found


def test_networks_tangent_is_its_derivative(parts) -> None:
    networks, noised = parts
    told = with_drawn_guidance(noised, draw=DRAW, sprint=SPRINT)
    check = check_denoiser_jvp(networks.student, told.x_t, torch.tensor([0.3, 0.5, 0.7]), told.condition)
    assert check.state.error < 1e-2
    assert check.time.error < 1e-2


def test_students_loss_is_scm_plus_half_the_adversarial_loss(parts) -> None:
    networks, noised = parts
    step = sprint_student_step(noised, networks, draw=DRAW, sprint=SPRINT)
    expected = step.record["scm_loss"] + 0.5 * step.record["adversarial_loss"]
    assert step.loss.item() == pytest.approx(expected.item(), rel=1e-6)
    none = replace(SPRINT, discriminator=None)
    alone = sprint_student_step(noised, networks, draw=DRAW, sprint=none)
    assert alone.loss.item() == pytest.approx(step.record["scm_loss"].item(), rel=1e-6)
    assert "adversarial_loss" not in alone.record
    no_scm = sprint_student_step(noised, networks, draw=DRAW, sprint=replace(SPRINT, consistency=None))
    assert no_scm.loss.item() == pytest.approx(0.5 * step.record["adversarial_loss"].item(), rel=1e-6)
    assert no_scm.record.keys() == {"adversarial_loss"}
    # Elements are summed: with the normaliser |g| / (|g| + c) the loss is just below 1 whatever their number is.
    assert 0.5 < step.record["scm_loss"].item() < 1
    with pytest.raises(ValueError, match=r"give the section sana_sprint\.discriminator"):
        sprint_student_step(noised, replace(networks, heads=None), draw=DRAW, sprint=SPRINT)
    # The student is its teacher without guidance, the target has guidance: there is a gap, and a tangent.
    assert step.record["tangent_gap"] > 0.1
    assert step.record["isolated_samples"] == 0
    guided = with_drawn_guidance(noised, draw=DRAW, sprint=SPRINT).condition
    assert guided.guidance is not None
    assert set(guided.guidance.tolist()) <= {4.0, 4.5, 5.0}
    with pytest.raises(ValueError, match=r"sana_sprint\.discriminator is not there"):
        sprint_discriminator_step(noised, networks, draw=DRAW, sprint=none)


def test_only_the_student_learns_in_its_step(parts) -> None:
    networks, noised = parts
    sprint_student_step(noised, networks, draw=DRAW, sprint=SPRINT).loss.backward()
    student, heads = gradients(networks.student), gradients(networks.heads)
    teacher = gradients(networks.teacher.denoiser)
    assert all(gradient is None for gradient in (*heads, *teacher))
    assert sum(gradient is not None for gradient in student) == len(student)
    assert all(parameter.requires_grad for parameter in networks.heads.parameters())


def test_gradient_passes_through_the_frozen_features(parts) -> None:
    networks, noised = parts
    x0 = noised.x0.clone().requires_grad_()
    logits = judge(x0, noised.condition, networks, draw=DRAW, settings=DISCRIMINATOR, stream="test")
    assert logits.shape == (3,)
    (gradient,) = torch.autograd.grad(logits.sum(), x0)
    assert gradient.abs().amax(dim=(1, 2, 3)).min() > 1e-6
    assert all(not parameter.requires_grad for parameter in networks.teacher.denoiser.parameters())


def test_only_the_heads_learn_in_the_discriminators_step(parts) -> None:
    networks, noised = parts
    step = sprint_discriminator_step(noised, networks, draw=DRAW, sprint=SPRINT)
    step.loss.backward()
    heads, student = gradients(networks.heads), gradients(networks.student)
    assert all(gradient is None for gradient in (*student, *gradients(networks.teacher.denoiser)))
    assert all(gradient is not None for gradient in heads)
    assert step.loss.item() == pytest.approx(step.record["discriminator_loss"].item())
    aligned = replace(SPRINT, discriminator=replace(DISCRIMINATOR, misaligned=False))
    plain = sprint_discriminator_step(noised, networks, draw=DRAW, sprint=aligned)
    # Misaligned pairs change the loss and not what is said of the student's samples and of data.
    assert plain.record["fake_logit"].item() == pytest.approx(step.record["fake_logit"].item(), abs=1e-5)
    assert plain.record["real_logit"].item() == pytest.approx(step.record["real_logit"].item(), abs=1e-5)
    assert abs(plain.loss.item() - step.loss.item()) > 1e-6


def test_discriminators_loss_is_one_at_chance(parts) -> None:
    networks, noised = parts
    fresh = replace(networks, heads=build_heads(networks.teacher.denoiser, None, width=8, seed=1))
    step = sprint_discriminator_step(noised, fresh, draw=DRAW, sprint=SPRINT)
    assert step.loss.item() == pytest.approx(1.0)


def test_a_batch_of_one_has_no_misaligned_pair(parts) -> None:
    networks, noised = parts
    one = Noised(noised.x0[:1], noised.eps[:1], noised.t[:1], noised.condition.index(slice(0, 1)), step=0)
    draw = Draw(seed=3, indices=[0], device=torch.device("cpu"))
    a, b = (
        sprint_discriminator_step(
            one,
            networks,
            draw=draw,
            sprint=replace(SPRINT, discriminator=replace(DISCRIMINATOR, misaligned=misaligned)),
        ).loss
        for misaligned in (True, False)
    )
    assert a.item() == b.item()


def test_max_time_branch_starts_from_noise_alone(parts) -> None:
    networks, noised = parts
    told = with_drawn_guidance(noised, draw=DRAW, sprint=SPRINT)
    always = replace(DISCRIMINATOR, max_time_share=1.0)
    other = replace(told, x0=torch.zeros_like(told.x0))
    with torch.no_grad():
        found = adversarial_samples(told, networks.student, draw=DRAW, settings=always)
        assert torch.equal(found, adversarial_samples(other, networks.student, draw=DRAW, settings=always))
        velocity = networks.student(told.eps, torch.ones(3), told.condition)
        never = adversarial_samples(
            told, networks.student, draw=DRAW, settings=replace(DISCRIMINATOR, max_time_share=0.0)
        )
        expected = x0_from_velocity(told.x_t, networks.student(told.x_t, told.t, told.condition), told.t)
    assert (found - (told.eps - velocity)).abs().max() < 1e-6
    assert torch.equal(never, expected)


def test_teacher_is_guided_by_each_samples_own_scale(parts) -> None:
    networks, noised = parts
    scales = torch.tensor([1.0, 2.0, 5.0])
    with torch.no_grad():
        together = networks.teacher.velocity(noised.x_t, noised.t, noised.condition, scales)
        for row, scale in enumerate(scales.tolist()):
            part = slice(row, row + 1)
            alone = networks.teacher.velocity(noised.x_t[part], noised.t[part], noised.condition.index(part), scale)
            assert (together[part] - alone).abs().max() < 1e-5
