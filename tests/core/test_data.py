"""Prompts and latents: what is read, in which order, and what is refused."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from fewstep.core.data import ENCODE_BATCH, LatentDataset, PromptConditions, read_prompts, rows_of_samples
from fewstep.core.teacher import Teacher
from tests.tiny_pipelines import build_sd3, build_sdxl


def test_prompts_are_lines_without_blank_ones(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes("  a cat \n\n\t\ncaf\u00e9, two tables\r\nlast".encode())
    assert read_prompts(path) == ("a cat", "caf\u00e9, two tables", "last")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist; give a text file"),
        (b"", "holds no prompt; write one prompt a line"),
        (b" \n\t\n\n", "holds no prompt; write one prompt a line"),
        (b"a cat\n\xff\xfe\n", "is not UTF-8 text; save it as UTF-8"),
    ],
)
def test_unusable_prompt_files_are_named(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "prompts.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as raised:
        read_prompts(path)
    assert str(raised.value).startswith(f"prompt file {path} ")


@settings(max_examples=30, deadline=None)
@given(count=st.integers(1, 40), seed=st.integers(0, 2**40), epoch=st.integers(0, 1000))
def test_every_epoch_visits_every_row_once(count: int, seed: int, epoch: int) -> None:
    rows = rows_of_samples(range(epoch * count, (epoch + 1) * count), count, seed)
    assert sorted(rows) == list(range(count))


@settings(max_examples=30, deadline=None)
@given(count=st.integers(1, 20), seed=st.integers(0, 1000), samples=st.lists(st.integers(0, 200), max_size=20))
def test_a_row_depends_on_the_sample_number_alone(count: int, seed: int, samples: list[int]) -> None:
    whole = rows_of_samples(range(201), count, seed)
    assert rows_of_samples(samples, count, seed) == [whole[sample] for sample in samples]


def test_orders_differ_between_epochs_and_seeds() -> None:
    orders = {
        tuple(rows_of_samples(range(epoch * 30, epoch * 30 + 30), 30, seed)) for epoch in (0, 1) for seed in (0, 1)
    }
    assert len(orders) == 4
    assert tuple(range(30)) not in orders


def test_equal_prompts_are_kept_once() -> None:
    teacher = Teacher(build_sd3(), path="tiny")
    conditions = PromptConditions(teacher, ["a cat", "a dog", "a cat", "a cat"], cache=True)
    assert conditions.cached is not None
    assert conditions.cached.batch_size == 2
    assert len(conditions) == 4
    found = conditions.rows([3, 1, 0]).text
    assert torch.equal(found[0], found[2])
    expected = teacher.encode(["a cat", "a dog"]).text
    torch.testing.assert_close(found[:2], expected, rtol=0, atol=1e-5)


def test_cached_conditions_equal_encoded_ones() -> None:
    teacher = Teacher(build_sd3(), path="tiny")
    prompts = [f"cat {number}" for number in range(ENCODE_BATCH + 3)]
    cached, fresh = (PromptConditions(teacher, prompts, cache=cache) for cache in (True, False))
    assert cached.cached is not None
    assert fresh.cached is None
    assert len(cached) == len(fresh) == ENCODE_BATCH + 3
    rows = [1, ENCODE_BATCH, ENCODE_BATCH + 2, 1]
    left, right = cached.rows(rows), fresh.rows(rows)
    torch.testing.assert_close(left.text, right.tokens, rtol=0, atol=1e-5)
    torch.testing.assert_close(left.pooled, right.pooled, rtol=0, atol=1e-5)
    assert (left.text[0] - left.text[1]).abs().max() > 1e-3
    samples = [5, 70, 3]
    assert torch.equal(
        cached.of_samples(samples, seed=4).text, cached.rows(rows_of_samples(samples, len(prompts), 4)).text
    )
    with pytest.raises(ValueError, match="no prompts given; at least one is needed"):
        PromptConditions(teacher, [], cache=True)


def test_sizes_are_told_to_sdxl() -> None:
    conditions = PromptConditions(Teacher(build_sdxl(), path="tiny"), ["a", "b"], cache=True, height=24, width=32)
    time_ids = conditions.rows([1, 0]).time_ids
    assert time_ids is not None
    assert time_ids.tolist() == [[24, 32, 0, 0, 24, 32]] * 2


@pytest.mark.parametrize("with_noise", [False, True])
def test_latents_survive_a_round_trip(tmp_path: Path, with_noise: bool) -> None:
    latents = torch.randn(3, 4, 2, 5).transpose(2, 3)
    noise = torch.randn(latents.shape) if with_noise else None
    dataset = LatentDataset(latents, ("a cat", "caf\u00e9 \u2603", "three"), noise)
    dataset.save(tmp_path / "deep" / "folder")
    again = LatentDataset.load(tmp_path / "deep" / "folder")
    assert torch.equal(again.latents, latents)
    assert again.prompts == dataset.prompts
    assert (again.noise is None) == (noise is None)
    if noise is not None:
        assert again.noise is not None
        assert torch.equal(again.noise, noise)
    assert sorted(path.name for path in (tmp_path / "deep" / "folder").iterdir()) == [
        "latents.safetensors",
        "prompts.txt",
    ]


@pytest.mark.parametrize(
    ("latents", "prompts", "noise", "message"),
    [
        ((3, 1, 2, 2), ("a", "b"), None, "3 latents and 2 prompts; give one prompt per latent"),
        ((0, 1, 2, 2), (), None, "0 latents and 0 prompts"),
        ((2, 1, 2, 2), ("a", "b"), (2, 1, 2, 3), r"noise is \(2, 1, 2, 3\), latents \(2, 1, 2, 2\); they must agree"),
        ((2, 1, 2, 2), ("a", " "), None, "prompt 1 is ' '; each must be one line of text that is not blank"),
        ((1, 1, 2, 2), ("a\nb",), None, "prompt 0 is 'a.nb'; each must be one line"),
        ((1, 1, 2, 2), ("a\u2028b",), None, "prompt 0 is .*; each must be one line"),
    ],
)
def test_latents_that_do_not_fit_are_refused(latents, prompts, noise, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LatentDataset(torch.zeros(latents), prompts, None if noise is None else torch.zeros(noise))


def test_broken_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"latents.safetensors does not exist; make it with scripts/encode_latents.py"):
        LatentDataset.load(tmp_path)
    LatentDataset(torch.zeros(2, 1, 2, 2), ("a", "b")).save(tmp_path)
    file, prompts = tmp_path / "latents.safetensors", tmp_path / "prompts.txt"
    prompts.write_text("a\nb\nc\n", encoding="utf-8")
    with pytest.raises(ValueError, match="2 latents and 3 prompts"):
        LatentDataset.load(tmp_path)
    prompts.unlink()
    with pytest.raises(ValueError, match=r"prompts.txt does not exist"):
        LatentDataset.load(tmp_path)
    prompts.write_text("a\nb\n", encoding="utf-8")
    content = file.read_bytes()
    for length in (0, 5, len(content) - 1):
        file.write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"latents.safetensors cannot be read .*; write it again"):
            LatentDataset.load(tmp_path)
    save_file({"images": torch.zeros(2, 1)}, file)
    with pytest.raises(ValueError, match=r"holds \['images'\]; a tensor named 'latents' is needed"):
        LatentDataset.load(tmp_path)
