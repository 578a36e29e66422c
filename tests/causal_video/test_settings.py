"""The file beside the weights, and the weights as an ordinary Wan transformer."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel

from fewstep.causal_video.layout import ChunkLayout
from fewstep.causal_video.policy import CachePolicy
from fewstep.causal_video.schedule import StepSchedule
from fewstep.causal_video.settings import FILE_NAME, CausalSettings
from tests.causal_video.tiny_causal import build_student, largest, latents, text

SETTINGS = CausalSettings(
    ChunkLayout.first(7, 2, 1),
    CachePolicy(4, 1, "static", positions="slot", noisy_from=1, quantise="fp8"),
    StepSchedule.steps([4, 2]),
)


def test_settings_come_back(tmp_path: Path) -> None:
    path = SETTINGS.save(tmp_path)
    assert path.name == FILE_NAME
    assert CausalSettings.load(tmp_path) == SETTINGS
    content = json.loads(path.read_text())
    assert content["layout"] == [1, 2, 2, 2]
    assert content["policy"]["window_frames"] == 4


def test_files_of_another_kind_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        CausalSettings.load(tmp_path)
    path = SETTINGS.save(tmp_path)
    content = json.loads(path.read_text())
    for changed in ({**content, "format": 2}, {**content, "more": 1}, {**content, "policy": {"window_frames": 4}}):
        path.write_text(json.dumps(changed))
        with pytest.raises(ValueError, match="no file of format 1"):
            CausalSettings.load(tmp_path)


def test_settings_must_fit_their_layout() -> None:
    with pytest.raises(ValueError, match="no multiple"):
        CausalSettings(ChunkLayout.uniform(6, 3), CachePolicy(4))


def test_weights_are_those_of_an_ordinary_transformer(tmp_path: Path) -> None:
    student = build_student()
    keys = set(student.transformer.state_dict())
    student.transformer.save_pretrained(tmp_path)
    loaded = WanTransformer3DModel.from_pretrained(tmp_path).double()
    assert set(loaded.state_dict()) == keys
    assert not any("causal" in key or key.startswith("transformer.") for key in keys)
    t = torch.tensor([0.25, 0.5], dtype=torch.float64)
    with torch.no_grad():
        stock = loaded(latents(), 1000 * t, text(), return_dict=False)[0]
        assert largest(student.bidirectional(latents(), t, text()), stock) < 2e-6
