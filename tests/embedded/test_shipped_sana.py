"""The shipped SANA teacher: small, complete, ready for SANA-Sprint, and it draws what it is told."""

from pathlib import Path

import pytest
import torch

from fewstep.core.data import LatentDataset
from fewstep.core.families.sana import SanaFamily
from fewstep.core.teacher import Teacher
from fewstep.embedded.digits.classifier import load_classifier
from fewstep.embedded.digits.images import balanced_prompt, label_of_prompt, load_digits_split
from fewstep.evaluation.accuracy import class_accuracy
from fewstep.evaluation.generation import generate, load_pipeline


@pytest.fixture(scope="module")
def shipped(repository: Path) -> Path:
    return repository / "assets" / "digits_sana"


def test_shipped_teacher_is_small_complete_and_ready_for_sprint(shipped: Path) -> None:
    assert sum(file.stat().st_size for file in shipped.rglob("*") if file.is_file()) < 10e6
    teacher = Teacher.load(shipped)
    assert teacher.family == SanaFamily(time_scale=1.0)
    assert teacher.latent_shape() == (16, 4, 4)
    assert teacher.pipeline.transformer.config["qk_norm"] == "rms_norm_across_heads"
    data = LatentDataset.load(shipped / "train_latents")
    assert len(data.latents) == 1297
    assert data.latents.std().item() == pytest.approx(1.0, abs=1e-3)
    images = load_digits_split("train")
    assert [label_of_prompt(prompt) for prompt in data.prompts] == images.labels.tolist()
    restored = teacher.decode(data.latents[:64])
    assert (restored - images.pixels[:64]).abs().mean() < 0.03


@pytest.mark.slow
def test_shipped_teacher_draws_what_it_is_told(shipped: Path, repository: Path) -> None:
    prompts = [balanced_prompt(index) for index in range(100)]
    pixels = generate(load_pipeline(shipped), prompts, indices=range(100), seed=0, steps=20, guidance=2.0)
    labels = torch.tensor([label_of_prompt(prompt) for prompt in prompts])
    classifier = load_classifier(repository / "assets" / "digits_image" / "classifier")
    accuracy, _ = class_accuracy(classifier, pixels, labels=labels)
    assert accuracy >= 0.93
