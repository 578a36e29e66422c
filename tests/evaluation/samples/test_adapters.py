"""Exports of adapters are judged on the model that they are for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fewstep.core.export.pipeline import export_pipeline
from fewstep.core.export.record import StudentReport
from fewstep.core.export.sampler import SamplerSpec
from fewstep.core.grids import step_grid
from fewstep.evaluation.generation import generate, load_pipeline
from fewstep.evaluation.samples.identity import adapted_model, pipeline_fingerprint
from fewstep.evaluation.systems import picture_size, read_system
from tests.tiny_pipelines import save_pipeline
from tests.tiny_students import BUILDERS, lora_student


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same adapters, merged and alone, beside their model."""
    folder = tmp_path_factory.mktemp("adapters")
    teacher = save_pipeline(BUILDERS["sd3"](), folder / "teacher")
    found = {"teacher": teacher}
    for name, alone in (("merged", False), ("alone", True)):
        report = StudentReport("dmd", str(teacher), guidance=3.0, step=7, ema=True, height=16, width=16)
        sampler = SamplerSpec(step_grid(2, shift=3.0), "sde")
        found[name] = folder / name
        export_pipeline(
            str(teacher), lora_student("sd3"), sampler=sampler, output=found[name], report=report, lora_only=alone
        )
        # A card names no folder of a machine; whoever judges stands beside the model.
        record = json.loads((found[name] / "distillation.json").read_text(encoding="utf-8"))
        assert record["base_model"] == "teacher"
    return found


@pytest.mark.slow
def test_adapters_alone_draw_what_merged_ones_do(exports: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(exports["teacher"].parent)
    drawn: dict[str, Any] = {}
    for name in ("merged", "alone"):
        system = read_system(exports[name])
        assert (system.steps, system.guidance, picture_size(system)) == (2, 1.0, (16, 16))
        pipeline = load_pipeline(system.path)
        how = {"steps": system.steps, "guidance": system.guidance, "grid": system.grid}
        drawn[name] = generate(pipeline, ["a", "b"], indices=[0, 1], seed=3, **how)
    torch.testing.assert_close(drawn["merged"], drawn["alone"], rtol=0, atol=1e-4)
    teacher = generate(load_pipeline("teacher"), ["a", "b"], indices=[0, 1], seed=3, steps=2, guidance=1.0)
    assert float((teacher - drawn["alone"]).abs().max()) > 1e-3


def test_adapters_are_as_much_as_their_model(exports: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    assert adapted_model(exports["alone"]) == "teacher"
    assert adapted_model(exports["merged"]) is None
    monkeypatch.chdir(exports["teacher"].parent)
    here = pipeline_fingerprint(exports["alone"])
    before = pipeline_fingerprint(exports["merged"])
    (exports["merged"] / "comfyui").mkdir(exist_ok=True)
    (exports["merged"] / "comfyui" / "workflow.json").write_text("{}", encoding="utf-8")
    assert pipeline_fingerprint(exports["merged"]) == before
    monkeypatch.chdir(exports["teacher"])
    # Without the model beside it, its name is all that is known.
    assert pipeline_fingerprint(exports["alone"]) != here
    with pytest.raises(
        ValueError, match=r"holds adapters for teacher, and there is no such folder here: export them merged"
    ):
        read_system(exports["alone"])
