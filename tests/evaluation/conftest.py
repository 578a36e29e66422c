"""An untrained pipeline of the embedded teacher's size, shared by these tests."""

from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from fewstep.core.export.record import ExportRecord, write_record
from fewstep.embedded.digits.autoencoder import build_autoencoder
from fewstep.embedded.digits.teacher import build_pipeline


def build_untrained():
    """The embedded teacher's pipeline with random weights: 32 x 32 pixels, no T5."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        pipeline = build_pipeline(build_autoencoder())
    # Training sets these from the latents of the data.
    pipeline.vae.register_to_config(scaling_factor=1.0, shift_factor=0.0)
    pipeline.set_progress_bar_config(disable=True)
    for module in (pipeline.transformer, pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2):
        module.requires_grad_(False).eval()
    return pipeline


@pytest.fixture(scope="session")
def pipeline_folder(tmp_path_factory) -> Path:
    """A deterministic pipeline without a record of distillation."""
    folder = tmp_path_factory.mktemp("pipelines") / "teacher"
    build_untrained().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def export_folder(tmp_path_factory) -> Path:
    """A two-step pipeline that draws noise between its steps, with the record of an export."""
    folder = tmp_path_factory.mktemp("pipelines") / "student"
    pipeline = build_untrained()
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0, shift_terminal=0.5, stochastic_sampling=True)
    pipeline.save_pretrained(folder)
    record = ExportRecord(
        name="student",
        method="dmd",
        base_model="owner/teacher",
        steps=2,
        sampler="sde",
        times=(1.0, 0.5),
        network_timesteps=(1000.0, 500.0),
        training_guidance=1.0,
        num_inference_steps=2,
        guidance_scale=1.0,
        sigmas=None,
        timesteps=None,
        height=None,
        width=None,
        step_noise="global",
        pipeline="StableDiffusion3Pipeline",
        scheduler="FlowMatchEulerDiscreteScheduler",
        weights="merged",
        dtype="float32",
        absent_components=(),
        training_step=1,
        ema=True,
        figures=(),
        verification=None,
        versions=(),
    )
    write_record(record, folder)
    return folder
