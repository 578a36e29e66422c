"""Teacher pairs and encoded pictures, through the functions and through their scripts."""

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from fewstep.core.data import LatentDataset
from fewstep.core.latent_sources import PairSamples, encode_image_folder, read_captions, teacher_pairs
from fewstep.core.media.pictures import read_picture
from fewstep.core.randomness import sample_noise
from fewstep.core.settings import TeacherConfig
from fewstep.core.teacher import Teacher
from tests.core.families.test_families_flux import MODEL as FLUX
from tests.core.families.test_families_wan_image import TI2V as I2V
from tests.tiny_pipelines import LATENT_SHAPE, PIXELS, build_sd3, save_pipeline

PROMPTS = ("a red cat", "dog 12", "tree")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pipeline(build_sd3(), tmp_path_factory.mktemp("sd3") / "teacher")


@pytest.fixture(scope="module")
def teacher(folder: Path) -> Teacher:
    return Teacher.load(folder)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Three pictures of different sizes and kinds with captions."""
    images = tmp_path / "images"
    images.mkdir()
    for number, (kind, size) in enumerate((("RGB", (16, 16)), ("RGBA", (40, 20)), ("L", (17, 33)))):
        Image.effect_noise(size, 80).convert(kind).save(images / f"{number}.png")
    write_captions(images, [{"file_name": f"{number}.png", "text": f"picture\n  {number}"} for number in range(3)])
    return images


def write_captions(folder: Path, rows: list[Any]) -> None:
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def run_script(name: str, *arguments: object) -> None:
    script = Path(__file__).resolve().parent.parent.parent / "scripts" / name
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(script), *(str(argument) for argument in arguments)])
        runpy.run_path(str(script), run_name="__main__")


def test_pairs_are_the_teachers_samples(teacher: Teacher) -> None:
    pairs = teacher_pairs(teacher, PROMPTS, count=5, steps=3, guidance=2.5, seed=7)
    assert pairs.prompts == ("a red cat", "dog 12", "tree", "a red cat", "dog 12")
    assert pairs.noise is not None
    assert torch.equal(pairs.noise, sample_noise(7, range(5), LATENT_SHAPE, stream="teacher_pairs"))
    expected = teacher.sample(pairs.noise, teacher.encode(list(pairs.prompts)), steps=3, guidance=2.5)
    torch.testing.assert_close(pairs.latents, expected, rtol=0, atol=1e-5)
    assert (pairs.latents - pairs.noise).abs().max() > 0.1


@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_pairs_do_not_depend_on_the_batch_size(teacher: Teacher, batch_size: int) -> None:
    whole = teacher_pairs(teacher, PROMPTS, count=5, steps=2, guidance=2.0, seed=1)
    parts = teacher_pairs(teacher, PROMPTS, count=5, steps=2, guidance=2.0, seed=1, batch_size=batch_size)
    assert whole.noise is not None
    assert parts.noise is not None
    assert torch.equal(parts.noise, whole.noise)
    torch.testing.assert_close(parts.latents, whole.latents, rtol=0, atol=1e-5)


def test_no_pairs_are_refused(teacher: Teacher) -> None:
    with pytest.raises(ValueError, match="count is 0; at least one pair is needed"):
        teacher_pairs(teacher, PROMPTS, count=0, steps=2, guidance=2.0, seed=1)


def test_pairs_have_the_size_of_the_run(teacher: Teacher) -> None:
    pairs = teacher_pairs(
        teacher, PROMPTS, count=2, steps=2, guidance=2.0, seed=1, samples=PairSamples(height=32, width=48)
    )
    assert pairs.latents.shape == (2, *teacher.latent_shape(32, 48))
    assert pairs.latents.shape[-2:] != LATENT_SHAPE[-2:]


def test_pairs_of_a_teacher_that_is_told_pictures_are_refused(tmp_path: Path) -> None:
    I2V.build().save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="is told a picture with each prompt: give --pictures"):
        teacher_pairs(Teacher.load(tmp_path / "model"), PROMPTS, count=1, steps=1, guidance=1.0, seed=0)


def test_pairs_are_told_the_guidance_of_the_run(tmp_path: Path) -> None:
    FLUX.build().save_pretrained(tmp_path / "model")
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS), encoding="utf-8")
    options = ("--teacher", tmp_path / "model", "--prompts", tmp_path / "prompts.txt", "--count", 2, "--steps", 2)
    options = (*options, "--height", 16, "--width", 24, "--embedded_guidance", 1.5)
    run_script("make_teacher_pairs.py", *options, "--output", tmp_path / "pairs")
    written = LatentDataset.load(tmp_path / "pairs")
    assert written.noise is not None
    settings = TeacherConfig(path=str(tmp_path / "model"), embedded_guidance=1.5)
    told, other = (
        teacher.sample(written.noise, teacher.encode(list(written.prompts)), steps=2, guidance=1.0)
        for teacher in (Teacher.of(settings, device=torch.device("cpu")), Teacher.load(tmp_path / "model"))
    )
    torch.testing.assert_close(written.latents, told, rtol=0, atol=1e-5)
    assert float((written.latents - other).abs().max()) > 1e-3


def test_pairs_are_led_away_from_the_runs_negative_prompt_in_its_dtype(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS), encoding="utf-8")
    options = ("--teacher", folder, "--prompts", tmp_path / "prompts.txt", "--count", 2, "--steps", 2)
    options = (*options, "--guidance", 4.0, "--negative_prompt", "a red cat", "--dtype", "bfloat16")
    run_script("make_teacher_pairs.py", *options, "--output", tmp_path / "pairs")
    written = LatentDataset.load(tmp_path / "pairs")
    settings = TeacherConfig(path=str(folder), negative_prompt="a red cat", dtype="bfloat16")
    same, plain = (
        teacher_pairs(teacher, PROMPTS, count=2, steps=2, guidance=4.0, seed=0)
        for teacher in (Teacher.of(settings, device=torch.device("cpu")), Teacher.load(folder))
    )
    torch.testing.assert_close(written.latents, same.latents, rtol=0, atol=1e-5)
    # The first pair's prompt is the negative prompt: there guidance changes nothing, whatever its weight.
    unguided = teacher_pairs(Teacher.load(folder), PROMPTS, count=1, steps=2, guidance=1.0, seed=0)
    apart = float((plain.latents[0] - unguided.latents[0]).abs().max())
    assert float((written.latents[0] - unguided.latents[0]).abs().max()) < 0.5 * apart


def test_script_writes_pairs(folder: Path, teacher: Teacher, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS), encoding="utf-8")
    options = ("--teacher", folder, "--prompts", tmp_path / "prompts.txt", "--output", tmp_path / "pairs")
    run_script("make_teacher_pairs.py", *options, "--count", 4, "--steps", 2, "--guidance", 2.0, "--batch_size", 3)
    written = LatentDataset.load(tmp_path / "pairs")
    expected = teacher_pairs(teacher, PROMPTS, count=4, steps=2, guidance=2.0, seed=0)
    assert written.prompts == expected.prompts
    torch.testing.assert_close(written.latents, expected.latents, rtol=0, atol=1e-5)


def test_pictures_become_the_autoencoders_latents(teacher: Teacher, pictures: Path) -> None:
    dataset = encode_image_folder(teacher, pictures, height=PIXELS, width=PIXELS, batch_size=2)
    assert dataset.prompts == ("picture 0", "picture 1", "picture 2")
    assert dataset.latents.shape == (3, *LATENT_SHAPE)
    assert dataset.noise is None
    for number, latent in enumerate(dataset.latents):
        pixels = read_picture(pictures / f"{number}.png", PIXELS, PIXELS)
        torch.testing.assert_close(latent, teacher.encode_pixels(pixels[None])[0], rtol=0, atol=1e-5)


def test_script_writes_latents(folder: Path, teacher: Teacher, pictures: Path, tmp_path: Path) -> None:
    options = ("--teacher", folder, "--images", pictures, "--output", tmp_path / "latents")
    run_script("encode_latents.py", *options, "--height", PIXELS, "--width", PIXELS)
    written = LatentDataset.load(tmp_path / "latents")
    expected = encode_image_folder(teacher, pictures, height=PIXELS, width=PIXELS)
    assert written.prompts == expected.prompts
    torch.testing.assert_close(written.latents, expected.latents, rtol=0, atol=1e-5)


def test_pictures_are_resized_to_cover_and_cut_to_the_centre(tmp_path: Path) -> None:
    wide = Image.new("RGB", (40, 20), (255, 0, 0))
    wide.paste((0, 255, 0), (10, 0, 30, 20))
    wide.save(tmp_path / "wide.png")
    pixels = read_picture(tmp_path / "wide.png", 20, 20)
    assert pixels.shape == (3, 20, 20)
    assert torch.equal(pixels, torch.tensor([0.0, 1.0, 0.0])[:, None, None].expand(3, 20, 20))
    half = read_picture(tmp_path / "wide.png", 10, 20)
    assert half.shape == (3, 10, 20)
    assert half[:, 5, 10].tolist() == [0.0, 1.0, 0.0]
    assert half[:, 5, 0].tolist() == [1.0, 0.0, 0.0]
    assert read_picture(tmp_path / "wide.png", 33, 47).shape == (3, 33, 47)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], r"metadata.jsonl names no picture"),
        ([{"file_name": "0.png"}], "line 1 must be a JSON object with file_name and text: KeyError"),
        ([{"file_name": "0.png", "text": "a"}, ["0.png", "b"]], "line 2 must be a JSON object"),
        ([{"file_name": "0.png", "text": 3}], "line 1 must be a JSON object"),
        ([{"file_name": "0.png", "text": " \n"}], "line 1 has a blank caption"),
        ([{"file_name": "lost.png", "text": "a"}], r"line 1 names .*lost.png, which does not exist"),
    ],
)
def test_unusable_captions_name_the_line(pictures: Path, rows: list[Any], message: str) -> None:
    write_captions(pictures, rows)
    with pytest.raises(ValueError, match=message):
        read_captions(pictures)


def test_unreadable_files_are_named(teacher: Teacher, pictures: Path) -> None:
    (pictures / "1.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"1.png is no whole picture that PIL can read"):
        encode_image_folder(teacher, pictures, height=PIXELS, width=PIXELS)
    (pictures / "metadata.jsonl").write_text('{"file_name": "0.png", "text": "a"}\n{broken\n', encoding="utf-8")
    with pytest.raises(ValueError, match="line 2 must be a JSON object"):
        read_captions(pictures)
    (pictures / "metadata.jsonl").unlink()
    with pytest.raises(ValueError, match=r"metadata.jsonl does not exist; write one line per picture"):
        read_captions(pictures)
