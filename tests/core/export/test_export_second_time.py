"""A second time baked into stock time layers: exact on any grid, and the export opens in stock diffusers."""

# diffusers annotates narrower types than it takes.
# pyright: reportArgumentType=false

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from diffusers.models.embeddings import TimestepEmbedding
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fewstep.core.denoiser import Denoiser
from fewstep.core.export.pipeline import export_pipeline
from fewstep.core.export.record import StudentReport, read_record
from fewstep.core.export.sampler import SamplerSpec
from fewstep.core.export.schedulers import plan_scheduler
from fewstep.core.export.second_time import bake_second_time
from fewstep.core.families.table import build_family
from fewstep.core.grids import step_grid
from fewstep.core.networks.lora import add_lora
from fewstep.core.student import Student
from fewstep.core.two_time import SecondTime, add_second_time, second_time_of
from tests.tiny_pipelines import LATENT_SHAPE, build_sd3, build_sd15, save_pipeline
from tests.tiny_students import PROMPTS

REPORT = StudentReport(method="meanflow", base_model="tiny", guidance=1.0, step=7, ema=True)
WIDTH = 16


def two_time_network(kind: SecondTime, *, seed: int = 3, lora: bool = False) -> Any:
    """The tiny SD3 with a second time, after some training, here noise on every weight."""
    pipeline = build_sd3(sd35=True)
    network: Any = pipeline.transformer
    if lora:
        add_lora(network, rank=2, alpha=4.0, targets=build_family(pipeline).lora_targets, seed=0)
    add_second_time(network, kind)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return network


def embeddings(network: Any, timesteps: tuple[float, ...]) -> Tensor:
    """What the network's time layers give at each timestep and the one after it, 0 at the end."""
    start, end = torch.tensor(timesteps), torch.tensor((*timesteps[1:], 0.0))
    layers, sinusoids = second_time_of(network), network.time_text_embed.time_proj
    if layers is None:
        return network.time_text_embed.timestep_embedder(sinusoids(start))
    return layers(sinusoids(torch.cat([start, layers.second_input(start, end)])))


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(["gate", "sum"]),
    st.lists(st.integers(1, 50), min_size=1, max_size=WIDTH, unique=True),
    st.integers(0, 5),
)
@torch.no_grad()
def test_baked_layers_are_exact_on_any_grid(kind: SecondTime, places: list[int], seed: int) -> None:
    network = two_time_network(kind, seed=seed)
    timesteps = tuple(20.0 * place for place in sorted(places, reverse=True))
    wanted = embeddings(network, timesteps)
    error = bake_second_time(network, timesteps)
    assert error < 1e-6
    assert type(network.time_text_embed.timestep_embedder) is TimestepEmbedding
    found = embeddings(network, timesteps)
    assert (found - wanted).abs().max() < 1e-5 * wanted.abs().max()


@torch.no_grad()
def test_the_change_is_the_smallest_one() -> None:
    """A change that is orthogonal to the features of all steps would change nothing: there is none of it."""
    network: Any = two_time_network("gate")
    before: Any = second_time_of(network)
    assert before is not None
    weight = before.first.linear_2.weight.double().clone()
    timesteps = (1000.0, 500.0, 250.0)
    layers = before.first
    hidden = layers.act(layers.linear_1(network.time_text_embed.time_proj(torch.tensor(timesteps)))).double()
    bake_second_time(network, timesteps)
    change = network.time_text_embed.timestep_embedder.linear_2.weight.double() - weight
    inside = torch.linalg.lstsq(hidden.T, change.T).solution
    assert (hidden.T @ inside - change.T).abs().max() < 1e-6
    assert change.abs().max() > 1e-3
    assert network.time_text_embed.timestep_embedder.linear_1.weight.equal(layers.linear_1.weight)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="17 steps do not fit into time layers of width 16"):
        bake_second_time(two_time_network("gate"), tuple(range(170, 0, -10)))
    with pytest.raises(ValueError, match=r"error .* of the largest embedding, allowed 1e-06\. Steps that lie close"):
        bake_second_time(two_time_network("gate"), tuple(900 - 1e-3 * i for i in range(16)))
    with pytest.raises(ValueError, match=r"'decoupled' has no export.*'gate' or 'sum'"):
        bake_second_time(two_time_network("decoupled"), (1000.0,))
    with pytest.raises(ValueError, match="no second time to bake"):
        bake_second_time(build_sd3().transformer, (1000.0,))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pipeline(build_sd3(sd35=True), tmp_path_factory.mktemp("teacher") / "tiny")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "steps", "shift"), [("gate", 1, 1.0), ("sum", 2, 3.0), ("gate", 4, 1.0), ("sum", 8, 1.0), ("gate", 8, 5.0)]
)
def test_export_equals_the_training_sampler(
    teacher: Path, tmp_path: Path, kind: SecondTime, steps: int, shift: float
) -> None:
    network = two_time_network(kind)
    times = step_grid(steps, shift=shift)
    record = export_pipeline(
        str(teacher), network, sampler=SamplerSpec(times, "flow_map"), output=tmp_path / "export", report=REPORT
    )
    assert second_time_of(network) is not None
    assert (record.sampler, record.steps, record.step_noise) == ("flow_map", steps, "none")
    assert read_record(tmp_path / "export") == record
    assert record.verification is not None
    assert record.verification.sampler_difference < 1e-5
    assert record.verification.rounding_difference < 1e-5
    pipeline: Any = DiffusionPipeline.from_pretrained(tmp_path / "export")
    assert isinstance(pipeline.scheduler, FlowMatchEulerDiscreteScheduler)
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.randn(2, *LATENT_SHAPE, generator=torch.Generator().manual_seed(1))
    found = pipeline(PROMPTS, latents=noise.clone(), output_type="latent", **record.call_arguments()).images
    source = build_sd3(sd35=True)
    family = build_family(source)
    with torch.no_grad():
        condition = family.encode_prompts(source, PROMPTS)
    expected = Student(Denoiser(network, family), times, "flow_map").sample(noise, condition)
    assert (found - expected).abs().max() < 2e-5 * expected.abs().max()
    # On another grid the same files are another student.
    other = pipeline(PROMPTS, latents=noise.clone(), output_type="latent", num_inference_steps=steps + 1).images
    assert (other - expected).abs().max() > 1e-3 * expected.abs().max()


def test_adapters_and_a_second_time_export_merged(teacher: Path, tmp_path: Path) -> None:
    network = two_time_network("gate", lora=True)
    spec = SamplerSpec(step_grid(4), "flow_map")
    record = export_pipeline(str(teacher), network, sampler=spec, output=tmp_path / "merged", report=REPORT)
    assert record.weights == "merged"
    assert record.verification is not None
    assert record.verification.rounding_difference < 1e-5
    with pytest.raises(ValueError, match="lora_only cannot hold a second time"):
        export_pipeline(str(teacher), network, sampler=spec, output=tmp_path / "lora", report=REPORT, lora_only=True)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_files_stay_near(teacher: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    record = export_pipeline(
        str(teacher),
        two_time_network("sum"),
        sampler=SamplerSpec(step_grid(4), "flow_map"),
        output=tmp_path / "half",
        report=replace(REPORT, method="anyflow"),
        dtype=dtype,
    )
    assert record.verification is not None
    assert 1e-6 < record.verification.rounding_difference < record.verification.rounding_tolerance


@pytest.mark.parametrize(
    ("kind", "sampler", "message"),
    [
        ("gate", "ode", r"sampler 'ode' with a network of 2 time\(s\)"),
        (None, "flow_map", r"sampler 'flow_map' with a network of 1 time\(s\)"),
        ("decoupled", "flow_map", "'decoupled' has no export"),
    ],
)
def test_networks_and_samplers_that_do_not_fit(
    teacher: Path, tmp_path: Path, kind: SecondTime | None, sampler: Literal["ode", "flow_map"], message: str
) -> None:
    network = build_sd3(sd35=True).transformer if kind is None else two_time_network(kind)
    with pytest.raises(ValueError, match=message):
        export_pipeline(
            str(teacher), network, sampler=SamplerSpec((1.0,), sampler), output=tmp_path / "no", report=REPORT
        )
    assert not (tmp_path / "no").exists()


def test_a_noise_table_has_no_flow_map() -> None:
    with pytest.raises(ValueError, match="DDIMScheduler; flow maps of two times are exported with FlowMatchEuler"):
        plan_scheduler(build_sd15(), build_family(build_sd15()), SamplerSpec((1.0,), "flow_map"))
