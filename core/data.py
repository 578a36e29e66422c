"""Prompts and latents for training, in an order that depends on the seed and the sample's number alone.

Shapes: latents [N, C, H, W], or [N, C, F, H, W] of videos. Sample number = training step * global batch size + place in
the global batch, so a resumed run reads on where it stopped and two processes read what one process would.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fewstep.core.condition import Condition
from fewstep.core.media.pictures import find_pictures, read_picture, require_readable
from fewstep.core.randomness import shared_integer
from fewstep.core.settings import SampleDataConfig
from fewstep.core.teacher import Teacher

ENCODE_BATCH = 64


LATENTS_FILE, PROMPTS_FILE, PICTURES_FOLDER = "latents.safetensors", "prompts.txt", "pictures"


def read_prompts(path: str | Path) -> tuple[str, ...]:
    """Prompts of a text file, one a line; blank lines are dropped.

    Raises ValueError when the file is missing, is not UTF-8 text, or holds no prompt.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"prompt file {path} does not exist; give a text file with one prompt a line")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"prompt file {path} is not UTF-8 text; save it as UTF-8, one prompt a line") from error
    prompts = tuple(line.strip() for line in lines if line.strip())
    if not prompts:
        raise ValueError(f"prompt file {path} holds no prompt; write one prompt a line")
    return prompts


def find_prompt_pictures(folder: str | None, prompts: Sequence[str]) -> tuple[Path, ...]:
    """The pictures of a folder in the order of their names, one for each prompt; none for no folder.

    Raises ValueError when they are not as many, or cannot be found.
    """
    if folder is None:
        return ()
    found = find_pictures(folder)
    if len(found) != len(prompts):
        raise ValueError(
            f"data.pictures {folder} holds {len(found)} pictures for {len(prompts)} prompts: give one for each, named "
            "in their order"
        )
    require_readable(found)
    return tuple(found)


@lru_cache(maxsize=8)
def epoch_order(count: int, seed: int, epoch: int) -> tuple[int, ...]:
    """The order in which an epoch visits `count` rows: a permutation given by (seed, epoch)."""
    key = shared_integer(seed, epoch, "epoch_order", 2**31)
    return tuple(torch.randperm(count, generator=torch.Generator().manual_seed(key)).tolist())


def rows_of_samples(samples: Sequence[int], count: int, seed: int) -> list[int]:
    """The dataset row of each sample number: every epoch visits every row once, in its own order."""
    return [epoch_order(count, seed, sample // count)[sample % count] for sample in samples]


class PromptConditions:
    """Prompts with their embeddings: when `cache`, each different one is encoded once and kept; else per batch.

    Height and width in pixels are told to networks that are conditioned on them (SDXL). `pictures` are files, one for
    each prompt, that a network is told besides; they are read when their row is, and where the text encoder is shown
    them, it is a row with its picture that is kept.
    Raises ValueError without prompts.
    """

    def __init__(
        self,
        teacher: Teacher,
        prompts: Sequence[str],
        *,
        cache: bool,
        height: int | None = None,
        width: int | None = None,
        frames: int | None = None,
        pictures: Sequence[Path] = (),
    ) -> None:
        if not prompts:
            raise ValueError("no prompts given; at least one is needed")
        self.teacher = teacher
        self.prompts = tuple(prompts)
        self.height, self.width, self.frames = height, width, frames
        self.pictures = tuple(pictures)
        self.cached: Condition | None = None
        self.text_sees_picture = bool(self.pictures) and teacher.family.text_sees_picture
        if cache and self.text_sees_picture:
            # One by one: a text encoder that is shown pictures holds many times the tokens of a prompt.
            self.cached = Condition.cat([self._encode_shown([row]) for row in range(len(self.prompts))])
        elif cache:
            different = list(dict.fromkeys(self.prompts))
            self.places = {prompt: place for place, prompt in enumerate(different)}
            starts = range(0, len(different), ENCODE_BATCH)
            self.cached = Condition.cat([self._encode(different[at : at + ENCODE_BATCH]) for at in starts])

    def _encode(self, prompts: Sequence[str]) -> Condition:
        return self.teacher.encode(list(prompts), height=self.height, width=self.width)

    def _encode_shown(self, rows: Sequence[int]) -> Condition:
        """The prompts of these rows, encoded together with their pictures."""
        texts = [self.prompts[row] for row in rows]
        return self.teacher.encode(texts, pictures=self._read_pictures(rows), frames=self.frames)

    def _read_pictures(self, rows: Sequence[int]) -> Tensor:
        size = self.teacher.family.call_arguments(
            self.teacher.pipeline, height=self.height, width=self.width, frames=self.frames
        )
        return torch.stack([read_picture(self.pictures[row], size["height"], size["width"]) for row in rows])

    def __len__(self) -> int:
        return len(self.prompts)

    def rows(self, rows: Sequence[int]) -> Condition:
        """The condition of the prompts at these rows, with their pictures where there are any."""
        if self.text_sees_picture:
            if self.cached is None:
                return self._encode_shown(rows)
            return self.cached.index(torch.tensor(list(rows), device=self.cached.device))
        if self.cached is not None:
            places = [self.places[self.prompts[row]] for row in rows]
            condition = self.cached.index(torch.tensor(places, device=self.cached.device))
        else:
            condition = self._encode([self.prompts[row] for row in rows])
        if not self.pictures:
            return condition
        return self.teacher.with_pictures(condition, self._read_pictures(rows), frames=self.frames)

    def of_samples(self, samples: Sequence[int], seed: int) -> Condition:
        """The condition of these sample numbers: every epoch visits every prompt once."""
        return self.rows(rows_of_samples(samples, len(self), seed))

    def texts_of_samples(self, samples: Sequence[int], seed: int) -> list[str]:
        """The prompts of these sample numbers."""
        return [self.prompts[row] for row in rows_of_samples(samples, len(self), seed)]


@dataclass(frozen=True)
class LatentDataset:
    """Latents [N, C, H, W] or [N, C, F, H, W] with a prompt each and, for teacher pairs, the noise they were made from.

    `pictures` are files, one for each, that a network is told with the prompt: those that an edited picture was before.
    Raises ValueError when counts or shapes disagree, or a prompt is not one line of text, which the file cannot hold.
    """

    latents: Tensor
    prompts: tuple[str, ...]
    noise: Tensor | None = None
    pictures: tuple[Path, ...] = ()

    def __post_init__(self) -> None:
        if len(self.latents) != len(self.prompts) or not self.prompts:
            raise ValueError(f"{len(self.latents)} latents and {len(self.prompts)} prompts; give one prompt per latent")
        for number, prompt in enumerate(self.prompts):
            if len(prompt.strip().splitlines()) != 1:
                raise ValueError(f"prompt {number} is {prompt!r}; each must be one line of text that is not blank")
        if self.pictures and len(self.pictures) != len(self.prompts):
            raise ValueError(
                f"{len(self.pictures)} pictures and {len(self.prompts)} prompts; give one picture per prompt"
            )
        if self.noise is not None and self.noise.shape != self.latents.shape:
            raise ValueError(
                f"noise is {tuple(self.noise.shape)}, latents {tuple(self.latents.shape)}; they must agree"
            )

    def require_shape(self, shape: tuple[int, ...], key: str) -> None:
        """Raises ValueError that names the setting `key` unless each latent has this shape."""
        found = tuple(self.latents.shape[1:])
        if found != tuple(shape):
            raise ValueError(
                f"{key} holds latents of shape {found}, this run makes {tuple(shape)}; set data.height/width, and "
                "data.frames for videos"
            )

    def require_pictures(self, teacher: Teacher, key: str) -> None:
        """Raises ValueError that names the setting `key` unless there are pictures where the teacher needs them.

        Latents of videos bring their first frame; of a picture that was edited nothing says what it was before.
        """
        family = teacher.family
        if self.pictures and not family.takes_picture:
            raise ValueError(
                f"{key} has pictures that a network is told, and {teacher.path} is told none: set teacher.told_picture "
                "for a model that edits pictures as well, or encode without pictures"
            )
        if family.takes_picture and not family.makes_videos and not self.pictures:
            raise ValueError(
                f"{teacher.path} is told a picture with each prompt, and {key} has none: name it in metadata.jsonl "
                "(picture) and encode again, or make pairs with --pictures"
            )

    def require_noise(self, key: str) -> None:
        """Raises ValueError that names the setting `key` unless these are teacher pairs."""
        if self.noise is None:
            raise ValueError(f"{key} holds latents without noise; make pairs with scripts/make_teacher_pairs.py")

    def save(self, folder: str | Path) -> None:
        """Write `latents.safetensors` and `prompts.txt` into a folder, and copies of the pictures into `pictures`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {"latents": self.latents.contiguous()}
        if self.noise is not None:
            tensors["noise"] = self.noise.contiguous()
        save_file(tensors, folder / LATENTS_FILE)
        (folder / PROMPTS_FILE).write_text("\n".join(self.prompts) + "\n", encoding="utf-8")
        # Apart at first: those of an earlier set must not be counted with the new ones, and may be the same files.
        draft = folder / f"{PICTURES_FOLDER}.partial"
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir()
        for number, picture in enumerate(self.pictures):
            shutil.copyfile(picture, draft / f"{number:08d}{picture.suffix.lower()}")
        shutil.rmtree(folder / PICTURES_FOLDER, ignore_errors=True)
        if self.pictures:
            draft.rename(folder / PICTURES_FOLDER)
        else:
            draft.rmdir()

    @classmethod
    def load(cls, folder: str | Path) -> LatentDataset:
        """Read a folder that `save` wrote. Raises ValueError that names what is missing or broken."""
        folder = Path(folder)
        file = folder / LATENTS_FILE
        if not file.is_file():
            raise ValueError(f"{file} does not exist; make it with scripts/encode_latents.py or make_teacher_pairs.py")
        try:
            tensors = load_file(file)
        except SafetensorError as error:
            raise ValueError(f"{file} cannot be read ({error}); write it again") from error
        if "latents" not in tensors:
            raise ValueError(f"{file} holds {sorted(tensors)}; a tensor named 'latents' is needed")
        prompts = read_prompts(folder / PROMPTS_FILE)
        told = folder / PICTURES_FOLDER
        pictures = tuple(find_pictures(told)) if told.is_dir() else ()
        if pictures and len(pictures) != len(prompts):
            raise ValueError(f"{told} holds {len(pictures)} pictures for {len(prompts)} prompts: write the set again")
        require_readable(pictures)
        return cls(tensors["latents"], prompts, tensors.get("noise"), pictures)


class PromptsWithGuidance(PromptConditions):
    """Prompts whose conditions also tell one guidance scale to a network with a guidance embedding.

    Args:
        teacher, prompts, cache, height, width: as in `PromptConditions`.
        guidance: the scale w of u + w (c - u).
        control: [N, C, h, w] latents of the pictures that a ControlNet follows, one for each prompt.
    """

    def __init__(
        self,
        teacher: Teacher,
        prompts: Sequence[str],
        *,
        cache: bool,
        height: int | None,
        width: int | None,
        guidance: float,
        control: Tensor | None = None,
    ) -> None:
        self.guidance, self.control = guidance, control
        super().__init__(teacher, prompts, cache=cache, height=height, width=width)

    def rows(self, rows: Sequence[int]) -> Condition:
        condition = super().rows(rows)
        if self.control is None:
            return condition
        return condition.with_control(self.control[list(rows)])

    def _encode(self, prompts: Sequence[str]) -> Condition:
        return super()._encode(prompts).with_guidance(self.guidance)


def embedded_prompts(
    teacher: Teacher, data: SampleDataConfig, prompts: Sequence[str], pictures: Sequence[Path] = ()
) -> PromptConditions:
    """The conditions of prompts and their pictures, for samples of the size of a run."""
    size = {"height": data.height, "width": data.width, "frames": data.frames}
    return PromptConditions(teacher, prompts, cache=data.cache_prompts, pictures=pictures, **size)


# Another order for real data and pairs than for prompts: the same seed would pair each prompt with the same picture.
REAL_SEED, PAIR_SEED, INPUT_SEED = 1, 2, 3


@dataclass(frozen=True)
class LatentSource:
    """A latent dataset with the embeddings of its prompts, read in its own order."""

    dataset: LatentDataset
    conditions: PromptConditions
    seed: int

    def rows(self, samples: Sequence[int], device: torch.device) -> tuple[list[int], Tensor, Condition]:
        """Row numbers, latents [B, C, H, W] and conditions for these sample numbers."""
        rows = rows_of_samples(samples, len(self.dataset.prompts), self.seed)
        latents = self.dataset.latents[rows].to(device)
        condition = self.conditions.rows(rows)
        if self.dataset.pictures:
            return rows, latents, condition
        return rows, latents, self.conditions.teacher.with_first_frames(condition, latents)

    def captions(self, samples: Sequence[int]) -> list[str]:
        """The captions of these sample numbers."""
        return self.conditions.texts_of_samples(samples, self.seed)

    def noise(self, rows: list[int], device: torch.device) -> Tensor:
        """The noise [B, C, H, W] that these rows were made from. Raises ValueError for latents that are no pairs."""
        if self.dataset.noise is None:
            raise ValueError("these latents have no noise; make pairs with scripts/make_teacher_pairs.py")
        return self.dataset.noise[rows].to(device)
