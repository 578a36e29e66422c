"""Exports open with stock diffusers and do what the student was trained to do."""

import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, LCMScheduler
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fewstep.core.export.check import ExportMismatchError, check_timesteps, relative_difference
from fewstep.core.export.components import absent_components
from fewstep.core.export.pipeline import ROUNDING_TOLERANCES, export_pipeline
from fewstep.core.export.record import Figure, StudentReport, read_record
from fewstep.core.export.sampler import SamplerSpec
from fewstep.core.export.schedulers import nearest_exportable_times, plan_scheduler
from fewstep.core.families.table import build_family
from fewstep.core.grids import step_grid
from tests.tiny_pipelines import build_sd3, build_sd15, save_pipeline
from tests.tiny_students import (
    BUILDERS,
    PROMPTS,
    SEED,
    UNIFORM,
    draw,
    lora_student,
    stock_reference,
    student_network,
    student_times,
)

REPORT = StudentReport("dmd", "owner/teacher", guidance=3.0, step=7, ema=True, figures=(Figure("FID", 2.5),))


@pytest.fixture(scope="module")
def teachers(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("teachers")
    return {name: save_pipeline(build(), root / name) for name, build in BUILDERS.items()}


def run_export(directory: Path, steps: int) -> tuple[Tensor, list[float]]:
    """Latents of the export as a user calls it, and the timesteps its network saw."""
    pipeline: Any = DiffusionPipeline.from_pretrained(directory)
    pipeline.set_progress_bar_config(disable=True)
    seen: list[float] = []
    component = pipeline.transformer if hasattr(pipeline, "transformer") else pipeline.unet
    component.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(float((kwargs.get("timestep", args[1:2]))[0])), with_kwargs=True
    )
    latents, _ = draw(steps)
    torch.manual_seed(SEED)
    call = read_record(directory).call_arguments()
    return pipeline(prompt=PROMPTS, latents=latents, output_type="latent", return_dict=False, **call)[0], seen


def assert_close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "steps", "shift", "sampler"),
    [
        ("sd3", 1, 1.0, "sde"),
        ("sd3", 1, 3.0, "ode"),
        *(("sd3", *case) for case in itertools.product((2, 4), (1.0, 3.0), ("sde", "ode"))),
        ("sd3_t5", 4, 3.0, "sde"),
        ("sd15", 1, 1.0, "sde"),
        ("sd15", 4, 1.0, "sde"),
        ("sd15", 4, 1.0, "ode"),
        ("sd15_v", 2, 1.0, "sde"),
        ("sdxl", 4, 1.0, "sde"),
    ],
)
def test_export_equals_the_student(teachers, tmp_path, name, steps, shift, sampler):
    network = student_network(name)
    times = student_times(name, steps, shift)
    output = tmp_path / "export"
    record = export_pipeline(
        str(teachers[name]), network, sampler=SamplerSpec(times, sampler), output=output, report=REPORT
    )
    assert record.call_arguments() == {"num_inference_steps": steps, "guidance_scale": 1.0}
    assert record.verification is not None
    assert record.verification.sampler_difference < 2e-6
    latents, seen = run_export(output, steps)
    assert_close(latents, stock_reference(name, network, times, sampler))
    expected = UNIFORM[steps] if "sd3" not in name else [1000 * t for t in times]
    assert seen == pytest.approx(list(expected), abs=1e-3)
    assert record.network_timesteps == pytest.approx(tuple(expected), abs=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "times", "argument"),
    [("sd3", (1.0, 0.7, 0.5, 0.2), "sigmas"), ("sd15", (1.0, 0.6, 0.3), "timesteps"), ("sdxl", (0.5,), "timesteps")],
)
def test_any_grid_is_exported_with_an_argument(teachers, tmp_path, name, times, argument):
    times = nearest_exportable_times(BUILDERS[name](), times)
    record = export_pipeline(
        str(teachers[name]),
        student_network(name),
        sampler=SamplerSpec(times, "sde"),
        output=tmp_path / "export",
        report=REPORT,
    )
    assert len(record.call_arguments()[argument]) == len(times)
    _, seen = run_export(tmp_path / "export", len(times))
    assert seen == pytest.approx(list(record.network_timesteps), abs=1e-3)


WITHOUT_FEWSTEP = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "fewstep":
            raise ImportError("fewstep is blocked")

sys.meta_path.insert(0, Blocker())
try:
    import fewstep
except ImportError:
    blocked = True
assert blocked

import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

found = {}
for directory, steps in zip(sys.argv[2::2], sys.argv[3::2]):
    pipeline = DiffusionPipeline.from_pretrained(directory)
    torch.manual_seed(11)
    found[directory] = pipeline(
        ["a red house", "x"],
        latents=load_file(sys.argv[1])["latents"],
        output_type="latent",
        return_dict=False,
        num_inference_steps=int(steps),
        guidance_scale=1.0,
    )[0]
assert not any(name.split(".")[0] == "fewstep" for name in sys.modules)
save_file(found, sys.argv[1] + ".found")
"""


@pytest.mark.slow
def test_exports_work_in_a_process_without_this_package(teachers, tmp_path):
    cases = {"sd3": 4, "sd15": 2}
    arguments, expected = [], {}
    for name, steps in cases.items():
        network, times, output = student_network(name), student_times(name, steps, 3.0), tmp_path / name
        export_pipeline(str(teachers[name]), network, sampler=SamplerSpec(times, "sde"), output=output, report=REPORT)
        arguments += [str(output), str(steps)]
        expected[str(output)] = stock_reference(name, network, times, "sde")
    save_file({"latents": draw(1)[0]}, tmp_path / "latents")
    command = [sys.executable, "-c", WITHOUT_FEWSTEP, str(tmp_path / "latents"), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    found = load_file(tmp_path / "latents.found")
    assert set(found) == set(expected)
    for directory, latents in expected.items():
        assert_close(found[directory], latents)


def export_sd3(teachers, output: Path, **changes):
    arguments = {
        "network": student_network("sd3"),
        "sampler": SamplerSpec(step_grid(2, shift=3.0), "sde"),
        "report": REPORT,
    }
    return export_pipeline(str(teachers["sd3"]), output=output, **(arguments | changes))


def test_overwriting_needs_to_be_asked_for_and_touches_exports_alone(teachers, tmp_path):
    output = tmp_path / "export"
    export_sd3(teachers, output)
    weights = load_file(output / "transformer" / "diffusion_pytorch_model.safetensors")
    with pytest.raises(FileExistsError, match="overwrite=True"):
        export_sd3(teachers, output)
    (output / "stale.txt").write_text("x", encoding="utf-8")
    pipeline = BUILDERS["sd3"]()
    export_sd3(teachers, output, network=pipeline.transformer, overwrite=True)
    replaced = load_file(output / "transformer" / "diffusion_pytorch_model.safetensors")
    name = "proj_out.weight"
    assert not torch.equal(weights[name], replaced[name])
    assert torch.equal(replaced[name], pipeline.transformer.state_dict()[name])
    assert [path.name for path in tmp_path.iterdir()] == ["export"]
    assert not (output / "stale.txt").exists()
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("x", encoding="utf-8")
    with pytest.raises(ValueError, match="is no export"):
        export_sd3(teachers, other, overwrite=True)
    assert (other / "thesis.txt").read_text(encoding="utf-8") == "x"


def test_network_that_does_more_than_its_weights_say_is_refused(teachers, tmp_path):
    network = student_network("sd3")
    network.register_forward_hook(lambda module, args, output: (1.01 * output[0],))
    with pytest.raises(ExportMismatchError, match=r"move the latents by \d\.\d+e-\d\d .*allowed 1e-05"):
        export_sd3(teachers, tmp_path / "export", network=network)
    assert list(tmp_path.iterdir()) == []


def test_failed_overwrite_keeps_the_earlier_export(teachers, tmp_path):
    output = tmp_path / "export"
    export_sd3(teachers, output)
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    network = student_network("sd3")
    network.register_forward_hook(lambda module, args, output: (1.01 * output[0],))
    with pytest.raises(ExportMismatchError):
        export_sd3(teachers, output, network=network, overwrite=True)
    assert {path: path.read_bytes() for path in output.rglob("*") if path.is_file()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


def test_wrong_scheduler_parameters_are_seen_in_the_timesteps(teachers, tmp_path):
    output = tmp_path / "export"
    spec = SamplerSpec(step_grid(4, shift=3.0), "sde")
    export_sd3(teachers, output, sampler=spec)
    pipeline = BUILDERS["sd3"]()
    plan = plan_scheduler(pipeline, build_family(pipeline), spec)
    _, seen = run_export(output, 4)
    check_timesteps(seen, plan)
    file = output / "scheduler" / "scheduler_config.json"
    settings = json.loads(file.read_text(encoding="utf-8"))
    for wrong in ({"shift": 2.0}, {"shift_terminal": 0.6}):
        file.write_text(json.dumps(settings | wrong), encoding="utf-8")
        _, seen = run_export(output, 4)
        expected = r"timesteps \[1000\.0, .*trained at \[1000\.0, 900\.0, 750\.0, 500\.0\]"
        with pytest.raises(ExportMismatchError, match=expected):
            check_timesteps(seen, plan)
    with pytest.raises(ExportMismatchError, match=r"timesteps \[1000\.0\]"):
        check_timesteps([1000.0], plan)


def test_relative_difference_is_of_the_largest_value():
    reference = torch.tensor([[1.0, -4.0]])
    assert relative_difference(reference + torch.tensor([0.0, 1.0]), reference) == pytest.approx(0.25)
    assert relative_difference(torch.full((1, 2), float("nan")), reference) == float("inf")
    with pytest.raises(ExportMismatchError, match=r"\(1, 3\), expected \(1, 2\)"):
        relative_difference(torch.zeros(1, 3), reference)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_files(teachers, tmp_path, dtype):
    record = export_sd3(teachers, tmp_path / "export", dtype=dtype)
    assert record.dtype == str(dtype).removeprefix("torch.")
    assert record.verification is not None
    assert record.verification.sampler_difference < 1e-5
    assert 1e-5 < record.verification.rounding_difference < ROUNDING_TOLERANCES[dtype]
    for folder in ("transformer", "vae", "text_encoder", "text_encoder_3"):
        (file,) = (tmp_path / "export" / folder).glob("*.safetensors")
        assert {tensor.dtype for tensor in load_file(file).values()} == {dtype}
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "export", dtype=dtype)
    assert pipeline.transformer.dtype == dtype


def test_weights_that_do_not_fit_the_dtype_are_named(teachers, tmp_path):
    network = student_network("sd3")
    with torch.no_grad():
        network.get_parameter("proj_out.bias")[0] = 1e6
    with pytest.raises(ValueError, match=r"proj_out\.bias is not finite as torch\.float16"):
        export_sd3(teachers, tmp_path / "export", network=network, dtype=torch.float16)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd3", "sdxl"])
def test_adapters_are_merged(teachers, tmp_path, name):
    network = lora_student(name)
    times = student_times(name, 2, 3.0)
    expected = stock_reference(name, network, times, "sde")
    output = tmp_path / "export"
    export_pipeline(str(teachers[name]), network, sampler=SamplerSpec(times, "sde"), output=output, report=REPORT)
    folder = output / ("transformer" if name == "sd3" else "unet")
    keys = load_file(folder / "diffusion_pytorch_model.safetensors").keys()
    assert sum("lora" in key for key in keys) == 0
    assert_close(run_export(output, 2)[0], expected)
    unchanged = stock_reference(name, network, times, "sde")
    assert torch.equal(unchanged, expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd3", "sd15"])
def test_adapters_alone_are_loaded_on_the_teacher(teachers, tmp_path, name):
    network = lora_student(name)
    times = student_times(name, 2, 3.0)
    expected = stock_reference(name, network, times, "sde")
    output = tmp_path / "lora"
    record = export_pipeline(
        str(teachers[name]), network, sampler=SamplerSpec(times, "sde"), output=output, report=REPORT, lora_only=True
    )
    assert record.weights == "lora"
    names = {path.name for path in output.iterdir()}
    assert names == {"README.md", "distillation.json", "pytorch_lora_weights.safetensors", "scheduler", "comfyui"}
    absent = dict.fromkeys(record.absent_components)
    assert len(absent) == (2 if name == "sd3" else 0)
    pipeline: Any = DiffusionPipeline.from_pretrained(teachers[name], **absent)
    pipeline.load_lora_weights(output)
    scheduler = FlowMatchEulerDiscreteScheduler if name == "sd3" else LCMScheduler
    pipeline.scheduler = scheduler.from_pretrained(output, subfolder="scheduler")
    latents, _ = draw(2)
    torch.manual_seed(SEED)
    call = record.call_arguments()
    found = pipeline(prompt=PROMPTS, latents=latents, output_type="latent", return_dict=False, **call)[0]
    assert_close(found, expected)


def stock_tokens(pipeline: Any) -> Tensor:
    tokens, *_ = pipeline.encode_prompt(PROMPTS, None, None, do_classifier_free_guidance=False)
    return tokens


def test_stand_ins_give_the_zeros_that_the_pipeline_uses_without_t5():
    pipeline = build_sd3()
    tokens = stock_tokens(pipeline)
    pipeline.register_modules(**build_family(pipeline).stand_ins(pipeline, absent_components(pipeline)))
    parameters = sum(parameter.numel() for parameter in pipeline.text_encoder_3.parameters())
    assert parameters < 1000
    filled = stock_tokens(pipeline)
    assert filled.shape == (2, 77 + 256, 40)
    assert torch.equal(tokens, filled)
    assert build_family(pipeline).stand_ins(pipeline, absent_components(pipeline)) == {}


def test_other_absent_components_are_refused():
    pipeline = build_sd15()
    pipeline.register_modules(text_encoder=None)
    with pytest.raises(ValueError, match="StableDiffusionPipeline\\) has no text_encoder"):
        build_family(pipeline).stand_ins(pipeline, absent_components(pipeline))


def test_directory_tells_its_origin_but_no_path(teachers, tmp_path):
    (teachers["sd3_t5"] / "README.md").write_text("---\nlicense: mit\n---\n", encoding="utf-8")
    report = StudentReport("dmd", str(teachers["sd3_t5"]), guidance=2.0, step=3, ema=False, height=32, width=16)
    record = export_pipeline(
        str(teachers["sd3_t5"]),
        student_network("sd3_t5"),
        sampler=SamplerSpec((1.0, 0.5), "sde"),
        output=tmp_path / "two_steps",
        report=report,
    )
    assert record == read_record(tmp_path / "two_steps")
    assert (record.base_model, record.ema, record.name) == ("sd3_t5", False, "two_steps")
    assert record.call_arguments() == {"num_inference_steps": 2, "guidance_scale": 1.0, "height": 32, "width": 16}
    assert dict(record.versions)["diffusers"].split(".")[0] == "0"
    card = (tmp_path / "two_steps" / "README.md").read_text(encoding="utf-8")
    assert card.count("license: mit") == 1
    texts = [path for path in (tmp_path / "two_steps").rglob("*") if path.suffix in (".json", ".md")]
    assert len(texts) > 10
    assert [path.name for path in texts if str(tmp_path.parent) in path.read_text(encoding="utf-8")] == []


def test_random_numbers_and_network_of_the_caller_are_left_alone(teachers, tmp_path):
    network = student_network("sd3").train()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    processors = [type(module.processor) for module in network.modules() if hasattr(module, "processor")]
    state = torch.get_rng_state()
    export_sd3(teachers, tmp_path / "export", network=network, dtype=torch.bfloat16)
    assert torch.equal(torch.get_rng_state(), state)
    assert network.training
    assert processors == [type(module.processor) for module in network.modules() if hasattr(module, "processor")]
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": torch.float64}, "dtype is torch.float64, allowed are torch.float32"),
        ({"lora_only": True}, "the network has no adapters"),
        ({"network": nn.Linear(2, 2)}, "the student is a Linear, the teacher's network a SD3Transformer2DModel"),
    ],
)
def test_unusable_arguments_are_named(teachers, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        export_sd3(teachers, tmp_path / "export", **changes)
    assert list(tmp_path.iterdir()) == []
