"""What tells pipeline folders apart, and in which dtype their weights are."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fewstep.evaluation.samples import identity
from fewstep.evaluation.samples.identity import pipeline_fingerprint, stored_dtype


def write(folder: Path, *, scale: float = 1.0, dtype: torch.dtype = torch.float32, steps: int = 2) -> Path:
    (folder / "transformer").mkdir(parents=True)
    (folder / "model_index.json").write_text(f'{{"steps": {steps}}}')
    weights = torch.linspace(0, 1, 4000) * scale
    save_file({"w": weights.to(dtype), "norm": torch.ones(3)}, folder / "transformer" / "model.safetensors")
    return folder


@pytest.mark.parametrize("whole", [2**26, 1024])
def test_other_weights_are_another_pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: int) -> None:
    monkeypatch.setattr(identity, "WHOLE", whole)
    monkeypatch.setattr(identity, "BLOCK", 256)
    first = pipeline_fingerprint(write(tmp_path / "a"))
    assert pipeline_fingerprint(write(tmp_path / "b")) == first
    assert pipeline_fingerprint(write(tmp_path / "c", scale=1.01)) != first
    assert pipeline_fingerprint(write(tmp_path / "d", steps=4)) != first
    (tmp_path / "a" / "distillation.json").write_text("{}")
    (tmp_path / "a" / "README.md").write_text("a card")
    assert pipeline_fingerprint(tmp_path / "a") == first


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_dtype_is_that_of_most_weights(tmp_path: Path, dtype: torch.dtype) -> None:
    assert stored_dtype(write(tmp_path / "a", dtype=dtype)) == str(dtype).removeprefix("torch.")
    assert stored_dtype(tmp_path) == "float32"
