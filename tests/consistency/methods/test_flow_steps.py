"""Steps of flow maps with exact networks: the loss has nothing left to teach, and guidance is where it should be."""

# The exact networks stand where a Denoiser and a Teacher are annotated.
# pyright: reportArgumentType=false

from dataclasses import dataclass, replace
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from fewstep.consistency.batch import ConsistencyStep, DataBatch, Networks
from fewstep.consistency.config import FlowMapSettings
from fewstep.consistency.methods.alphaflow import alphaflow_step
from fewstep.consistency.methods.anyflow import anyflow_step
from fewstep.consistency.methods.dmf import dmf_step
from fewstep.consistency.methods.flow_map import draw_pair, flow_batch, folded_guide, own_guided_velocity
from fewstep.consistency.methods.imf import imf_step, improved_guide
from fewstep.consistency.methods.meanflow import meanflow_step
from fewstep.consistency.sections import AlphaflowConfig, AnyflowConfig, DmfConfig, ImfConfig, MeanflowConfig
from fewstep.consistency.times import TimePair
from fewstep.consistency.train import consistency_step
from fewstep.core.condition import Condition
from fewstep.core.randomness import Draw
from tests.consistency.analytic import Gaussian

SHAPE = (1, 4, 4)
COUNT = 12
MEANS = {"prompt": 0.7, "null": -0.4}
STEPS: dict[type, Any] = {
    MeanflowConfig: meanflow_step,
    ImfConfig: imf_step,
    AlphaflowConfig: alphaflow_step,
    DmfConfig: dmf_step,
    AnyflowConfig: anyflow_step,
}


class ExactFlowMap(nn.Module):
    """u*(x, t, r) for N(mean, 1.6^2), the mean being the condition's one number; plus `off`, which is trained.

    With `guidance` the conditional output is that of the guided mean.
    """

    def __init__(self, off: float = 0.0, guidance: float = 1.0) -> None:
        super().__init__()
        self.off = nn.Parameter(torch.tensor(off, dtype=torch.float64))
        self.guidance = guidance
        self.sizes: list[int] = []

    def forward(self, x: Tensor, t: Tensor, condition: Condition, r: Tensor | None = None) -> Tensor:
        self.sizes.append(len(x))
        mean = condition.text[:, 0, 0].view(-1, 1, 1, 1)
        mean = MEANS["null"] + self.guidance * (mean - MEANS["null"])
        t = t.view(-1, 1, 1, 1)
        r = t if r is None else r.view(-1, 1, 1, 1)
        return Gaussian(mean=mean).average_velocity(x, t, r) + self.off


@dataclass(frozen=True)
class ExactTeacher:
    """The guided velocity of these Gaussians."""

    null_condition: Condition

    def velocity(self, x_t: Tensor, t: Tensor, condition: Condition, guidance: float) -> Tensor:
        return ExactFlowMap(guidance=guidance)(x_t, t, condition).detach()


def condition_of(name: str, count: int) -> Condition:
    return Condition(torch.full((count, 1, 1), MEANS[name], dtype=torch.float64))


def exact_networks(*, off: float = 0.0, guidance: float = 1.0, own: float | None = None) -> Networks:
    """An exact student of a teacher with that guidance; `own` is another guidance of the student."""
    student = ExactFlowMap(off, guidance if own is None else own)
    return Networks(student, student, ExactTeacher(condition_of("null", 1)), guidance)


def data_batch(progress: float = 0.5) -> DataBatch:
    draw = Draw(3, list(range(COUNT)), torch.device("cpu"))
    eps = draw.noise(SHAPE, "eps").double()
    x0 = MEANS["prompt"] + 1.6 * draw.noise(SHAPE, "x0").double()
    return DataBatch(x0, eps, condition_of("prompt", COUNT), draw, step=4, progress=progress)


def some_times(data: DataBatch) -> Tensor:
    return 0.05 + 0.9 * data.draw.uniform("t").double()


def settings_of(method: type, **changes: Any) -> Any:
    """Settings with a share of r = t of 0.4, where it is read."""
    share = {} if changes.get("pairs") == "partition" else {"equal_share": 0.4}
    return method(**{**share, **changes})


def double_pair(data: DataBatch, settings: FlowMapSettings) -> TimePair:
    """The pair that is drawn, in fp64."""
    pair = draw_pair(data, settings)
    return TimePair(pair.t.double(), pair.r.double())


def flow_step(data: DataBatch, pair: TimePair, networks: Networks, settings: FlowMapSettings) -> ConsistencyStep:
    return STEPS[type(settings)](data, pair, networks, settings)


@pytest.mark.parametrize("pairs", ["ordered", "partition"])
@pytest.mark.parametrize("method", [MeanflowConfig, ImfConfig, DmfConfig, AnyflowConfig])
def test_an_exact_flow_map_has_nothing_to_learn(method: type, pairs: Literal["ordered", "partition"]) -> None:
    data, settings = data_batch(), settings_of(method, pairs=pairs)
    pair = double_pair(data, settings)
    found = flow_step(data, pair, exact_networks(guidance=2.0), settings)
    assert found.record["flow_error_equal"] < 1e-24
    assert found.record["flow_error_apart"] < 1e-24
    assert found.record["isolated_samples"] == 0
    assert found.record["tangent_drift"] > 1e-2
    worse = flow_step(data, pair, exact_networks(off=0.1, guidance=2.0), settings)
    # An offset has no derivative: each of 16 elements is off by 0.1, and the errors of AnyFlow and DMF are means.
    expected = 0.01 * (16 if method in (MeanflowConfig, ImfConfig) else 1)
    assert worse.record["flow_error_equal"].item() == pytest.approx(expected)
    if method is not ImfConfig:
        assert worse.record["flow_error_apart"].item() == pytest.approx(expected, rel=1e-6)


def test_central_differences_miss_by_the_square_of_their_step() -> None:
    data, errors = data_batch(), []
    for step in (4e-3, 2e-3):
        settings = settings_of(MeanflowConfig, tangent="central", central_step=step)
        found = flow_step(data, double_pair(data, settings), exact_networks(), settings)
        errors.append(found.record["flow_error_apart"].sqrt().item())
    assert errors[1] < 1e-4
    assert errors[0] / errors[1] == pytest.approx(4.0, abs=0.1)


def test_the_derivative_is_taken_where_it_counts() -> None:
    data, settings, networks = data_batch(), settings_of(MeanflowConfig), exact_networks()
    student: Any = networks.student
    t = some_times(data)
    flow_step(data, TimePair(t, torch.where(torch.arange(COUNT) < 5, t, t / 3)), networks, settings)
    assert student.sizes == [COUNT - 5, COUNT]
    student.sizes.clear()
    flow_step(data, TimePair(t, t), networks, settings)
    assert student.sizes == [COUNT]


def test_alphaflow_goes_from_its_velocity_to_meanflow() -> None:
    errors = {}
    for progress in (0.0, 0.45, 0.6, 1.0):
        data, settings = data_batch(progress), settings_of(AlphaflowConfig)
        found = flow_step(data, double_pair(data, settings), exact_networks(), settings)
        errors[progress] = found.record["flow_error_apart"].item()
        assert ("alpha" in found.record) == (progress < 1)
    data = data_batch()
    pair = double_pair(data, settings_of(MeanflowConfig))
    x_t = data.at(pair.t).x_t
    velocity = exact_networks().teacher.velocity(x_t, pair.t, data.condition, 1.0)
    average = ExactFlowMap()(x_t, pair.t, data.condition, pair.r)
    apart = ~pair.equal
    expected = (average - velocity)[apart].square().flatten(1).sum(dim=1).mean().item()
    assert errors[0.0] == pytest.approx(expected)
    assert errors[0.0] > errors[0.45] > errors[0.6] > 1e-8
    assert errors[1.0] < 1e-24


@pytest.mark.parametrize("kappa", [0.0, 0.5, None])
def test_the_guided_velocity_is_the_fixed_point(kappa: float | None) -> None:
    """Given the marginal velocity in place of a sample's, a student of the guided mean is to stay; None is iMF."""
    data, networks = data_batch(), exact_networks(guidance=2.5)
    noised = data.at(some_times(data))
    velocity = ExactFlowMap()(noised.x_t, noised.t, data.condition).detach()
    guide = improved_guide(2.5)
    if kappa is not None:
        guide = folded_guide(2.5, settings_of(MeanflowConfig, velocity="data", kappa=kappa))
    found = own_guided_velocity(noised.x_t, noised.t, velocity, data.condition, networks, guide)
    expected = networks.student(noised.x_t, noised.t, data.condition)
    assert (found - expected).abs().max() < 1e-13
    assert (found - velocity).abs().max() > 0.1
    assert not found.requires_grad


def test_guidance_from_data_drops_conditions_and_stays_in_its_interval() -> None:
    data = data_batch()
    settings = MeanflowConfig(velocity="data", condition_drop=0.5, guidance_interval=(0.0, 0.5), equal_share=0.0)
    t = some_times(data)
    pair, guide = TimePair(t, torch.zeros_like(t)), folded_guide(2.0, settings)
    batch = flow_batch(data, pair, exact_networks(guidance=2.0), settings, guide=guide)
    dropped = data.draw.uniform("flow_condition_drop") < 0.5
    assert 2 < int(dropped.sum()) < COUNT - 2
    assert torch.equal(batch.condition.text[:, 0, 0] == MEANS["null"], dropped)
    plain = data.eps - data.x0
    same = (batch.velocity == plain).flatten(1).all(dim=1)
    assert torch.equal(same, dropped | (t > 0.5))
    # Without guidance nothing is dropped.
    batch = flow_batch(data, pair, exact_networks(), settings, guide=guide)
    assert torch.equal(batch.velocity, plain)
    assert torch.equal(batch.condition.tokens, data.condition.tokens)


def test_anyflow_brings_all_samples_to_one_size() -> None:
    data, settings = data_batch(), settings_of(AnyflowConfig, pairs="partition")
    pair = double_pair(data, settings)
    assert [int(part) for part in (pair.equal.sum(), (pair.r == 0).sum())] == [6, 3]
    networks = exact_networks(off=0.3, guidance=2.0)
    found = flow_step(data, pair, networks, settings)
    x_t = data.at(pair.t).x_t
    prediction = networks.student(x_t, pair.t, data.condition, pair.r)
    weight = pair.t * (1 - pair.t).sqrt() / (4 / 15)
    distance = weight * (prediction - (data.eps - data.x0)).square().flatten(1).mean(dim=1)
    scale = distance[pair.equal].mean()
    assert found.record["flow_scale"].item() == pytest.approx(scale.item())
    # Half of the samples have the error 0.09 with their weight, the others the common size.
    size = scale * (weight * 0.09 / (weight * 0.09 + 1e-5))
    expected = torch.where(pair.equal, weight * 0.09, size).mean()
    assert found.loss.item() == pytest.approx(expected.item())


def test_anyflow_from_data_is_guided_by_its_own_outputs() -> None:
    """With the marginal velocity for the sample's, (u_c + (w - 1) u_0) / w of the guided student is the target."""
    data, networks = data_batch(), exact_networks(guidance=2.0)
    t = some_times(data)
    settings = settings_of(AnyflowConfig, velocity="data", condition_drop=0.0)
    x_t = data.at(t).x_t
    velocity = ExactFlowMap()(x_t, t, data.condition).detach()
    # Data on the marginal velocity: eps - x0 = v at the same x_t.
    straight = replace(data, x0=x_t - t.view(-1, 1, 1, 1) * velocity, eps=x_t + (1 - t.view(-1, 1, 1, 1)) * velocity)
    found = flow_step(straight, TimePair(t, t), networks, settings)
    assert found.record["flow_error_equal"] < 1e-24
    assert networks.student.sizes == [COUNT, COUNT]


@pytest.mark.parametrize("method", STEPS)
def test_what_cannot_be_trained_is_an_error(method: type) -> None:
    data, settings = data_batch(), settings_of(method)
    t = some_times(data)
    with pytest.raises(ValueError, match="pairs with r <= t"):
        flow_step(data, TimePair(t, t + 0.01), exact_networks(), settings)
    if method is AnyflowConfig:
        with pytest.raises(ValueError, match="no sample of this batch has r = t"):
            flow_step(data, TimePair(t, t / 2), exact_networks(), settings)


@pytest.mark.parametrize("method", STEPS)
def test_gradients_reach_the_student_alone(method: type) -> None:
    data, settings, networks = data_batch(progress=0.45), settings_of(method), exact_networks(off=0.2)
    found = flow_step(data, double_pair(data, settings), networks, settings)
    found.loss.backward()
    student: Any = networks.student
    assert student.off.grad > 1e-3
    assert not any(value.requires_grad for value in found.record.values())


@pytest.mark.parametrize("method", STEPS)
def test_the_section_chooses_the_step(method: type) -> None:
    data, settings = data_batch(progress=0.45), settings_of(method)
    networks = exact_networks(off=0.2)
    expected = flow_step(data, draw_pair(data, settings), networks, settings)
    found = consistency_step(data, networks, settings)
    assert found.loss.item() == expected.loss.item()
    assert found.record.keys() == expected.record.keys()
