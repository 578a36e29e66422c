"""Data and whole runs of models that edit: latents with the pictures they were before, pairs, exports."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image, ImageOps

from fewstep.consistency.sections import DcmConfig
from fewstep.consistency.train import train_consistency
from fewstep.core.data import LatentDataset, LatentSource, PromptConditions, find_prompt_pictures
from fewstep.core.export.run import export_run
from fewstep.core.latent_sources import encode_image_folder, teacher_pairs
from fewstep.core.media.pictures import find_pictures, read_picture
from fewstep.core.run_settings import read_settings
from fewstep.core.teacher import Teacher
from fewstep.dmd.config import RegressionConfig
from fewstep.dmd.train import train_dmd
from fewstep.evaluation.systems import read_system
from tests.consistency.tiny_consistency_run import tiny_consistency
from tests.core.families.checks import TinyModel
from tests.core.families.test_families_flux2 import KLEIN_PICTURE
from tests.core.families.test_families_flux_kontext import MODEL as KONTEXT
from tests.core.families.test_families_qwen_image_edit import EDIT_MODEL
from tests.core.test_latent_sources import run_script
from tests.dmd.tiny_run import PROMPTS, TinyInputs, changed, tiny_config
from tests.test_bf16_matrix import write_pictures

pytestmark = pytest.mark.usefixtures("fresh_accelerate")

SIDES = (KONTEXT.size["height"], KONTEXT.size["width"])


@pytest.fixture(scope="module")
def kontext() -> Teacher:
    return KONTEXT.teacher()


def edits(folder: Path, *, count: int = 3, told: int = 3) -> Path:
    """A folder of pictures with captions, of which the first `told` say what they were before."""
    write_pictures(folder, 2 * count)
    rows: list[dict[str, str]] = [{"file_name": f"{row}.png", "text": f"turn it {row}"} for row in range(count)]
    for row in range(told):
        rows[row]["picture"] = f"{count + row}.png"
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return folder


def test_latents_come_with_the_pictures_that_they_were_before(kontext: Teacher, tmp_path: Path) -> None:
    folder = edits(tmp_path / "edits")
    made = encode_image_folder(kontext, folder, height=SIDES[0], width=SIDES[1])
    made.save(tmp_path / "latents")
    read = LatentDataset.load(tmp_path / "latents")
    assert [picture.name for picture in read.pictures] == ["00000000.png", "00000001.png", "00000002.png"]
    before = torch.stack([read_picture(folder / f"{3 + row}.png", *SIDES) for row in range(3)])
    assert torch.equal(torch.stack([read_picture(picture, *SIDES) for picture in read.pictures]), before)
    # Writing them again over themselves loses none.
    read.save(tmp_path / "latents")
    assert len(LatentDataset.load(tmp_path / "latents").pictures) == 3
    dataclasses.replace(read, pictures=()).save(tmp_path / "latents")
    assert not (tmp_path / "latents" / "pictures").exists()

    size = {"height": SIDES[0], "width": SIDES[1]}
    conditions = PromptConditions(kontext, made.prompts, cache=True, pictures=made.pictures, **size)
    rows, latents, condition = LatentSource(made, conditions, 0).rows([0, 1, 2], torch.device("cpu"))
    expected = kontext.encode([made.prompts[row] for row in rows], pictures=before[rows])
    assert torch.equal(latents, made.latents[rows])
    assert condition.image_latents is not None
    assert expected.image_latents is not None
    assert torch.equal(condition.image_latents, expected.image_latents)


@pytest.mark.parametrize(
    ("told", "message"),
    [(0, "names 0 pictures to edit, and owner/tiny is told one"), (2, "line 3 differs from the first")],
)
def test_latents_without_their_pictures_are_refused(kontext: Teacher, tmp_path: Path, told: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        encode_image_folder(kontext, edits(tmp_path / "edits", told=told), height=SIDES[0], width=SIDES[1])


def test_text_with_pictures_is_kept_by_its_row(tmp_path: Path) -> None:
    teacher = EDIT_MODEL.teacher()
    pictures = find_pictures(write_pictures(tmp_path / "pictures", 2))
    # The same prompt with two pictures is two conditions.
    texts = ("turn it", "turn it")
    size = {name: EDIT_MODEL.size[name] for name in ("height", "width")}
    kept, read = (
        PromptConditions(teacher, texts, cache=cache, pictures=pictures, **size).rows([1, 0]) for cache in (True, False)
    )
    for name, tensor in kept.present().items():
        torch.testing.assert_close(tensor, read.present()[name], rtol=0, atol=1e-3)
    assert (kept.text[0] - kept.text[1]).abs().max() > 1e-2


def test_pairs_of_edits_are_the_teachers_samples(kontext: Teacher, tmp_path: Path) -> None:
    KONTEXT.build().save_pretrained(tmp_path / "model")
    pictures = find_pictures(write_pictures(tmp_path / "pictures", 2))
    (tmp_path / "prompts.txt").write_text("turn it\nmake it blue\n", encoding="utf-8")
    options: tuple[Any, ...] = ("--teacher", tmp_path / "model", "--prompts", tmp_path / "prompts.txt", "--count", 3)
    options += ("--steps", 2, "--height", SIDES[0], "--width", SIDES[1])
    run_script("make_teacher_pairs.py", *options, "--pictures", tmp_path / "pictures", "--output", tmp_path / "pairs")
    pairs = LatentDataset.load(tmp_path / "pairs")
    assert pairs.prompts == ("turn it", "make it blue", "turn it")
    assert len(pairs.pictures) == 3
    shown = torch.stack([read_picture(pictures[row % 2], *SIDES) for row in range(3)])
    assert pairs.noise is not None
    expected = kontext.sample(pairs.noise, kontext.encode(list(pairs.prompts), pictures=shown), steps=2, guidance=1.0)
    torch.testing.assert_close(pairs.latents, expected, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="is told a picture with each prompt: give --pictures"):
        teacher_pairs(kontext, ("x",), count=1, steps=1, guidance=1.0, seed=0)


def inputs_of(model: TinyModel, folder: Path) -> tuple[TinyInputs, dict[str, Any]]:
    """A model on disk with data of its size, and the settings that name them."""
    model.build().save_pretrained(folder / "model")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n", encoding="utf-8")
    pictures = tuple(find_pictures(write_pictures(folder / "pictures", len(PROMPTS))))
    shape = model.shape(model.teacher())
    latents = torch.randn(len(PROMPTS), *shape, generator=torch.Generator().manual_seed(0))
    captions = tuple(f"edit {row}" for row in range(len(PROMPTS)))
    LatentDataset(latents, captions, None, pictures).save(folder / "latents")
    LatentDataset(latents, captions, latents.flip(0), pictures).save(folder / "pairs")
    inputs = TinyInputs(folder / "model", folder / "prompts.txt", folder / "latents", folder / "pairs")
    settings = {f"data.{name}": value for name, value in model.size.items()}
    settings |= {"data.pictures": str(folder / "pictures"), "teacher.told_picture": model.told_picture}
    return inputs, {**settings, "run.steps": 2, "student.steps": 2}


@pytest.mark.slow
def test_a_choice_to_edit_is_trained_on_pairs_and_exported(tmp_path: Path) -> None:
    inputs, settings = inputs_of(KLEIN_PICTURE, tmp_path)
    changes = {"regression": RegressionConfig(pairs=str(inputs.pairs), weight=0.25), "student.steps": 1}
    config = tiny_config(inputs, tmp_path / "run", {**settings, **changes})
    assert train_dmd(config) == 0
    assert read_settings(tmp_path / "run").base.told_picture
    folder, record = export_run(tmp_path / "run")
    assert record.verification is not None
    assert record.verification.sampler_difference < 3e-5
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert card.count('image=picture, prompt="a prompt"') == 1
    assert card.count("pipeline_tag: image-to-image") == 1
    with pytest.raises(ValueError, match="is told a picture with each prompt, which the evaluation does not give"):
        read_system(folder)
    # Without the choice, the same pictures are refused.
    plain = changed(config, {"teacher.told_picture": False, "run.directory": str(tmp_path / "plain")})
    with pytest.raises(ValueError, match=r"is told no picture: leave it out, or set teacher\.told_picture"):
        train_dmd(plain)


@pytest.mark.slow
def test_an_edit_that_the_text_encoder_sees_is_trained_on_real_edits(tmp_path: Path) -> None:
    inputs, settings = inputs_of(EDIT_MODEL, tmp_path)
    del settings["teacher.told_picture"]
    config = tiny_consistency(inputs, tmp_path / "run", "dcm")
    sections = {"dcm": DcmConfig(grid_steps=8), "teacher.guidance": 4.0, "data.cache_prompts": False}
    config = changed(config, {**settings, **sections, "data.latents": str(inputs.latents)})
    assert train_consistency(config) == 0
    folder, record = export_run(tmp_path / "run")
    assert record.verification is not None
    assert record.verification.sampler_difference < 3e-5
    assert type(DiffusionPipeline.from_pretrained(folder)).__name__ == "QwenImageEditPipeline"
    LatentDataset(LatentDataset.load(inputs.latents).latents, PROMPTS).save(tmp_path / "bare")
    bare = changed(config, {"data.latents": str(tmp_path / "bare"), "run.directory": str(tmp_path / "other")})
    with pytest.raises(ValueError, match=r"is told a picture with each prompt, and data\.latents has none"):
        train_consistency(bare)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"picture": "cut.png"}, "cut.png is no whole picture"),
        ({"picture": "b.jfif"}, "b.jfif is no picture file; read are"),
        ({"picture": ""}, "line 1 names .*, which does not exist"),
        ({"picture": 3}, "line 1 must be a JSON object"),
        ({"picture": None}, "names 0 pictures to edit"),
        ({"file_name": "cut.png", "picture": "3.png"}, "cut.png is no whole picture"),
    ],
)
def test_unusable_pictures_are_named_before_anything_is_encoded(
    kontext: Teacher, tmp_path: Path, row: dict[str, Any], message: str
) -> None:
    folder = write_pictures(tmp_path / "edits", 4)
    (folder / "cut.png").write_bytes((folder / "0.png").read_bytes()[:60])
    (folder / "b.jfif").write_bytes((folder / "0.png").read_bytes())
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": "0.png", "text": "a", **row}), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        encode_image_folder(kontext, folder, height=SIDES[0], width=SIDES[1])
    with pytest.raises(ValueError, match="multiple of 4 pixels"):
        encode_image_folder(kontext, folder, height=17, width=24)


def test_a_broken_picture_ends_a_run_before_its_models_are_read(tmp_path: Path) -> None:
    folder = write_pictures(tmp_path / "pictures", 3)
    (folder / "2.png").write_bytes((folder / "2.png").read_bytes()[:60])
    with pytest.raises(ValueError, match=r"2\.png is no whole picture"):
        find_prompt_pictures(str(folder), ("a", "b", "c"))


@pytest.mark.parametrize(("size", "message"), [((32, 48), "sides of at least 64"), ((64, 576), "at most 8 times")])
def test_pictures_that_flux2_refuses_are_refused_before(size: tuple[int, int], message: str) -> None:
    teacher = KLEIN_PICTURE.teacher()
    with pytest.raises(ValueError, match=message):
        teacher.latent_shape(*size)


@pytest.mark.parametrize(
    ("pictures", "message"),
    [
        (torch.zeros(1, 1, 16, 24), r"must be \[B, 3, H, W\]"),
        (torch.zeros(1, 3, 16, 24, dtype=torch.uint8), r"must be \[B, 3, H, W\] of numbers in"),
        (torch.full((1, 3, 16, 24), -1.0), "some number does not"),
    ],
)
def test_pictures_of_another_kind_are_refused(kontext: Teacher, pictures: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kontext.encode(["a"], pictures=pictures)


def test_a_cards_example_fits_a_picture_as_the_training_does(tmp_path: Path) -> None:
    # Tall, so that stretching it would show another part than cutting does.
    file = tmp_path / "tall.png"
    shades = np.linspace(0, 255, 300).astype(np.uint8)[:, None].repeat(100, 1)
    Image.fromarray(shades).save(file)
    with Image.open(file) as picture:
        fitted = ImageOps.fit(picture.convert("RGB"), (SIDES[1], SIDES[0]), Image.Resampling.LANCZOS)
    found = torch.from_numpy(np.array(fitted)).permute(2, 0, 1) / 255
    assert float((found - read_picture(file, *SIDES)).abs().mean()) < 0.05
