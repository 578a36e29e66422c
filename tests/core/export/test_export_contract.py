"""What an export is called with survives saving, loading and other programs; guidance off; pictures as a start."""

from __future__ import annotations

import json
import logging
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AutoPipelineForImage2Image,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    WanTransformer3DModel,
)
from PIL import Image
from torch import Tensor

from fewstep.core.export.contract import CALL_KEY, stored_call
from fewstep.core.export.pipeline import export_pipeline
from fewstep.core.export.record import RECORD_FILE, StudentReport, read_record
from fewstep.core.export.sampler import SamplerSpec
from fewstep.core.export.workflow import write_comfyui_files
from fewstep.core.grids import step_grid
from fewstep.core.networks.guidance_off import drop_guidance_off, with_guidance_off
from fewstep.core.networks.other_models import load_network
from fewstep.core.weights import find_weights, load_weights
from fewstep.evaluation.systems import read_system
from tests.tiny_pipelines import save_pipeline
from tests.tiny_students import BUILDERS, PROMPTS, draw, lora_student, stock_reference, student_network, student_times
from tests.tiny_videos import build_video_pipeline

REPORT = StudentReport("dmd", "owner/teacher", guidance=3.0, step=7, ema=True, height=16, width=16)
STEPS = 4


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A four-step sde student of each tiny pipeline."""
    root, found = tmp_path_factory.mktemp("exports"), {}
    for name in ("sd3", "sd15", "sdxl"):
        teacher = save_pipeline(BUILDERS[name](), root / f"{name}_teacher")
        sampler = SamplerSpec(student_times(name, STEPS, 3.0), "sde")
        found[name] = root / name
        export_pipeline(str(teacher), student_network(name), sampler=sampler, output=found[name], report=REPORT)
    return found


@pytest.fixture(scope="module")
def wan_export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("wan")
    pipeline = build_video_pipeline(text_tokens=8)
    teacher = save_pipeline(pipeline, root / "teacher")
    sampler = SamplerSpec(step_grid(STEPS, shift=5.0), "sde")
    report = StudentReport("dmd", "owner/wan", guidance=3.0, step=7, ema=True, height=16, width=16, frames=9)
    export_pipeline(str(teacher), pipeline.transformer, sampler=sampler, output=root / "export", report=report)
    return root / "export"


def loaded(folder: Path) -> Any:
    pipeline: Any = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize("name", ["sd3", "sdxl"])
def test_the_call_survives_saving_again(exports: dict[str, Path], tmp_path: Path, name: str) -> None:
    """In the scheduler's configuration, through another scheduler class, and where evaluations look for it."""
    call = read_record(exports[name]).call_arguments()
    assert stored_call(exports[name]) == call
    pipeline = loaded(exports[name])
    pipeline.save_pretrained(tmp_path / "again")
    assert not (tmp_path / "again" / RECORD_FILE).exists()
    assert stored_call(tmp_path / "again") == call
    once_more = type(pipeline.scheduler).from_config(pipeline.scheduler.config)
    assert once_more.config[CALL_KEY] == call
    system = read_system(tmp_path / "again")
    assert (system.steps, system.guidance) == (STEPS, 1.0)
    assert (system.grid.height, system.grid.width) == (16, 16)


def test_loading_says_how_to_call(exports: dict[str, Path], caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("diffusers")
    logger.addHandler(caplog.handler)
    try:
        DiffusionPipeline.from_pretrained(exports["sd3"])
    finally:
        logger.removeHandler(caplog.handler)
    told = [record.getMessage() for record in caplog.records if CALL_KEY in record.getMessage()]
    assert len(told) == 1
    assert "'guidance_scale': 1.0" in told[0]
    assert "'num_inference_steps': 4" in told[0]


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_unets_leave_guidance_out_whatever_they_are_called_with(exports: dict[str, Path], name: str) -> None:
    """The same bits at the default guidance, in one call a step; without steps the call is refused."""
    pipeline, calls = loaded(exports[name]), []
    pipeline.unet.register_forward_pre_hook(lambda module, args: calls.append(args[0].shape[0]))
    size = {"height": 16, "width": 16, "output_type": "latent", "return_dict": False, "num_inference_steps": STEPS}

    def latents(**more: Any) -> Tensor:
        return pipeline("a red house", generator=torch.Generator().manual_seed(3), **size, **more)[0]

    assert torch.equal(latents(), latents(guidance_scale=1.0))
    assert calls == [1] * 2 * STEPS
    with pytest.raises(ValueError, match=r"cannot be smaller than `num_inference_steps`|smaller than|larger than"):
        pipeline("a red house")


def test_within_the_package_a_unet_has_no_idle_embedding(exports: dict[str, Path]) -> None:
    """Exports are teachers and starts like any folder; what LCM has learnt is not dropped."""
    like = BUILDERS["sd15"]().unet
    network: Any = load_network(like, "unet", str(exports["sd15"]), dtype=torch.float32, device=torch.device("cpu"))
    assert network.config.time_cond_proj_dim is None
    assert not any("cond_proj" in name for name, _ in network.named_parameters())
    other = BUILDERS["sd15"]().unet
    load_weights(other, find_weights(str(exports["sd15"])))
    assert all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in network.state_dict().items())
    learnt: Any = with_guidance_off(other)
    learnt.time_embedding.cond_proj.weight.data[0, 0] = 1.0
    drop_guidance_off(learnt)
    assert learnt.config.time_cond_proj_dim == 256
    assert with_guidance_off(learnt) is learnt


@pytest.mark.parametrize("name", ["sd3", "sd15", "sdxl"])
def test_a_picture_starts_where_the_card_says(exports: dict[str, Path], name: str) -> None:
    """For each row of the card the stock pipeline makes the last steps of the training, and no other."""
    card = (exports[name] / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"\| ([\d.]+) \| (\d) \| ([\d.]+) \|", card.partition("## From a picture")[2].partition("##")[0])
    assert [int(kept) for _, kept, _ in rows] == [1, 2, 3]
    record = read_record(exports[name])
    pipeline: Any = AutoPipelineForImage2Image.from_pipe(loaded(exports[name]))
    pipeline.set_progress_bar_config(disable=True)
    seen: list[float] = []
    network = pipeline.transformer if name == "sd3" else pipeline.unet

    def look(module: Any, args: Any, kwargs: Any) -> None:
        seen.append(float(torch.as_tensor(kwargs.get("timestep", args[1:2])).flatten()[0]))

    network.register_forward_pre_hook(look, with_kwargs=True)
    picture = Image.fromarray((np.arange(16 * 16 * 3).reshape(16, 16, 3) % 256).astype(np.uint8))
    call = {**record.call_arguments()}
    if name != "sd3":
        # These take the picture's size.
        call = {key: value for key, value in call.items() if key not in ("height", "width")}
    for strength, kept, time in rows:
        seen.clear()
        pipeline("a red house", image=picture, strength=float(strength), output_type="latent", **call)
        assert seen == pytest.approx(list(record.network_timesteps[-int(kept) :]), abs=1e-3)
        assert record.times[-int(kept)] == pytest.approx(float(time), rel=1e-3)


def test_vllms_block_places_the_steps(wan_export: Path) -> None:
    """Stock diffusers loads beside it, and the scheduler that vLLM-Omni derives from reads the grid off it."""
    block = json.loads((wan_export / "model_index.json").read_text(encoding="utf-8"))["dmd2_config"]
    record = read_record(wan_export)
    assert {key: block[key] for key in ("num_inference_steps", "solver", "guidance_scale")} == {
        "num_inference_steps": STEPS,
        "solver": "sde",
        "guidance_scale": 1.0,
    }
    scheduler: Any = FlowMatchEulerDiscreteScheduler(shift=1.0)
    scheduler.set_timesteps(timesteps=block["denoising_timesteps"])
    assert scheduler.sigmas[:-1].tolist() == pytest.approx(list(record.times), abs=1e-6)
    assert type(loaded(wan_export)).__name__ == "WanPipeline"


KINDS: dict[str, tuple[str, Any]] = {
    "sd3": ("transformer", SD3Transformer2DModel),
    "sd15": ("unet", UNet2DConditionModel),
    "sdxl": ("unet", UNet2DConditionModel),
}


@pytest.mark.parametrize("name", ["sd3", "sd15", "sdxl", "wan"])
def test_one_file_holds_the_network_by_its_original_names(
    exports: dict[str, Path], wan_export: Path, name: str
) -> None:
    """diffusers' own reader of single files gives the weights of the folder back, bit for bit."""
    export = wan_export if name == "wan" else exports[name]
    written = write_comfyui_files(export)
    assert [path.name for path in written] == ["diffusion_model.safetensors", "workflow.json"]
    part, kind = ("transformer", WanTransformer3DModel) if name == "wan" else KINDS[name]
    network: Any = kind.from_pretrained(export / part)
    drop_guidance_off(network)
    config = export.parent / f"{name}_config"
    network.save_config(config)
    again: Any = kind.from_single_file(str(written[0]), config=str(config))
    expected = network.state_dict()
    assert again.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in again.state_dict().items())


def workflow_of(export: Path) -> dict[str, dict[str, Any]]:
    nodes = json.loads((export / "comfyui" / "workflow.json").read_text(encoding="utf-8"))
    return {node["class_type"]: node["inputs"] for node in nodes.values()}


@pytest.mark.parametrize("name", ["sd3", "sd15"])
def test_the_workflow_samples_what_the_student_does(exports: dict[str, Path], name: str) -> None:
    """ComfyUI's arithmetic on the workflow's sigmas: noise scaled in, x0, and x0 with fresh noise at the next sigma."""
    write_comfyui_files(exports[name])
    nodes = workflow_of(exports[name])
    assert nodes["KSamplerSelect"] == {"sampler_name": "lcm"}
    # As its node reads them.
    sigmas = [float(one) for one in re.findall(r"[-+]?(?:\d*\.*\d+)", nodes["ManualSigmas"]["sigmas"])]
    assert len(sigmas) == STEPS + 1
    assert sigmas[-1] == 0.0
    record, pipeline = read_record(exports[name]), loaded(exports[name])
    noise, fresh = draw(STEPS)
    if name == "sd3":
        times, scale = [1000 * sigma for sigma in sigmas[:-1]], [1.0] * STEPS
        x = noise
    else:
        table = pipeline.scheduler.alphas_cumprod.double()
        logs = (0.5 * ((1 - table) / table).log()).tolist()
        times = [float(np.argmin([abs(math.log(sigma) - one) for one in logs])) for sigma in sigmas[:-1]]
        scale = [1 / math.sqrt(1 + sigma**2) for sigma in sigmas[:-1]]
        x = noise * math.sqrt(1 + sigmas[0] ** 2)
    assert times == pytest.approx(list(record.network_timesteps), abs=1e-3)
    extra: dict[str, Any] = {}
    if name == "sd3":
        tokens, _, pooled, _ = pipeline.encode_prompt(PROMPTS, None, None, do_classifier_free_guidance=False)
        extra["pooled_projections"] = pooled
    else:
        tokens, _ = pipeline.encode_prompt(PROMPTS, "cpu", 1, do_classifier_free_guidance=False)
    network = pipeline.transformer if name == "sd3" else pipeline.unet
    for step, time in enumerate(times):
        with torch.no_grad():
            found = network(
                x * scale[step],
                timestep=torch.tensor([time] * 2, dtype=torch.float32),
                encoder_hidden_states=tokens,
                return_dict=False,
                **extra,
            )[0]
        x0, after = x - sigmas[step] * found, sigmas[step + 1]
        kept = 1 - after if name == "sd3" else 1.0
        x = kept * x0 + after * fresh[step] if after else x0
    expected = stock_reference(name, student_network(name), student_times(name, STEPS, 3.0), "sde")
    torch.testing.assert_close(x, expected, rtol=0, atol=2e-4 * expected.abs().max().item())


def test_a_unet_of_velocities_says_so(tmp_path: Path) -> None:
    """Its sigmas are those of epsilon, and ComfyUI is told what the network predicts."""
    teacher = save_pipeline(BUILDERS["sd15_v"](), tmp_path / "teacher")
    sampler = SamplerSpec(student_times("sd15_v", 2, 1.0), "sde")
    export_pipeline(str(teacher), student_network("sd15_v"), sampler=sampler, output=tmp_path / "v", report=REPORT)
    write_comfyui_files(tmp_path / "v")
    nodes = json.loads((tmp_path / "v" / "comfyui" / "workflow.json").read_text(encoding="utf-8"))
    kinds = {node["class_type"]: (number, node["inputs"]) for number, node in nodes.items()}
    number, inputs = kinds["ModelSamplingDiscrete"]
    assert (inputs["sampling"], inputs["zsnr"]) == ("v_prediction", False)
    assert kinds["BasicGuider"][1]["model"] == [number, 0]
    assert inputs["model"] == [kinds["UNETLoader"][0], 0]


@pytest.mark.parametrize(("name", "alone", "side"), [("sd3", False, 16), ("sd15", False, 16), ("sdxl", True, 1024)])
def test_a_workflow_has_a_size_where_the_record_leaves_it_open(
    tmp_path: Path, name: str, alone: bool, side: int
) -> None:
    """The pipeline's own, or for adapters alone that of the models they are made for."""
    teacher = save_pipeline(BUILDERS[name](), tmp_path / "teacher")
    sampler = SamplerSpec(student_times(name, 1, 1.0), "sde")
    report = StudentReport("dmd", "owner/teacher", guidance=3.0, step=7, ema=True)
    export_pipeline(
        str(teacher), lora_student(name), sampler=sampler, output=tmp_path / "x", report=report, lora_only=alone
    )
    assert len(write_comfyui_files(tmp_path / "x")) == (1 if alone else 2)
    nodes = workflow_of(tmp_path / "x")
    latent = nodes["EmptySD3LatentImage" if name == "sd3" else "EmptyLatentImage"]
    assert latent == {"width": side, "height": side, "batch_size": 1}


def test_adapters_have_a_workflow_on_their_base(tmp_path: Path) -> None:
    teacher = save_pipeline(BUILDERS["sdxl"](), tmp_path / "teacher")
    sampler = SamplerSpec(student_times("sdxl", 1, 1.0), "sde")
    output = tmp_path / "lora"
    export_pipeline(str(teacher), lora_student("sdxl"), sampler=sampler, output=output, report=REPORT, lora_only=True)
    assert [path.name for path in write_comfyui_files(output)] == ["workflow.json"]
    nodes = workflow_of(output)
    assert nodes["LoraLoaderModelOnly"]["lora_name"] == "lora.safetensors"
    assert nodes["EmptyLatentImage"] == {"width": 16, "height": 16, "batch_size": 1}
    assert "UNETLoader" not in nodes
    assert stored_call(output) == read_record(output).call_arguments()


@pytest.mark.parametrize("kind", ["int8", "float8"])
def test_an_export_survives_eight_bits(exports: dict[str, Path], kind: str) -> None:
    """Loaded by diffusers with torchao's weights of 8 bits, a sample is near that of full weights."""
    torchao = pytest.importorskip("torchao.quantization")
    from diffusers import PipelineQuantizationConfig, TorchAoConfig

    weights = torchao.Int8WeightOnlyConfig() if kind == "int8" else torchao.Float8WeightOnlyConfig()
    config = PipelineQuantizationConfig(quant_mapping={"transformer": TorchAoConfig(weights)})
    half = {"dtype": torch.bfloat16}
    small: Any = DiffusionPipeline.from_pretrained(exports["sd3"], quantization_config=config, **half)
    full: Any = DiffusionPipeline.from_pretrained(exports["sd3"], **half)
    call = {**read_record(exports["sd3"]).call_arguments(), "output_type": "latent", "return_dict": False}
    found = []
    for pipeline in (small, full):
        pipeline.set_progress_bar_config(disable=True)
        torch.manual_seed(0)
        found.append(pipeline("a red house", latents=draw(1)[0][:1].bfloat16(), **call)[0].float())
    error = (found[0] - found[1]).norm() / found[1].norm()
    assert 0 < error < 0.2
