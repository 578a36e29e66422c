"""Local weights of known scorers: safetensors alone, loaded strictly, with errors that say what to do.

Nothing is downloaded and nothing is unpickled. A published .pt, .pth or .bin checkpoint is converted once by hand, with
the command in `CONVERT`, which refuses anything but tensors.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

PICKLED = (".pt", ".pth", ".bin", ".ckpt")
CONVERT = (
    "import sys, torch; from safetensors.torch import save_file; "
    "s = torch.load(sys.argv[1], map_location='cpu', weights_only=True); s = s.get('state_dict', s); "
    "save_file({k: v.clone().contiguous() for k, v in s.items()}, sys.argv[2])"
)


class ScoreHead(nn.Module):
    """The map from an embedding [B, width] to a score [B] of the LAION aesthetic predictor and of ImageReward.

    Five linear layers without activations between them (an affine map, factorised), with dropout that only training
    used; names of parameters as published: `layers.0`, `.2`, `.4`, `.6`, `.7`.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(width, 1024),
            nn.Dropout(0.2),
            nn.Linear(1024, 128),
            nn.Dropout(0.2),
            nn.Linear(128, 64),
            nn.Dropout(0.1),
            nn.Linear(64, 16),
            nn.Linear(16, 1),
        )

    def forward(self, embedding: Tensor) -> Tensor:
        return self.layers(embedding)[:, 0]


def read_weights(place: str | Path, *, scorer: str) -> dict[str, Tensor]:
    """All tensors of a .safetensors file, or of every .safetensors file of a folder.

    Raises:
        ValueError: there is no such place, it holds no safetensors or a name twice, or a file is broken or pickled.
    """
    place = Path(place)
    if not place.exists():
        raise ValueError(f"no weights of {scorer} at {place}; download them (docs/rewards.md) and give their path")
    if place.is_file():
        files = [place]
        if place.suffix in PICKLED:
            target = place.with_suffix(".safetensors").name
            command = shlex.join(["python", "-c", CONVERT, place.name, target])
            raise ValueError(
                f"{place.name} is a pickled checkpoint, which can run code when opened; convert it once: {command}"
            )
        if place.suffix != ".safetensors":
            raise ValueError(f"{place.name} is not a .safetensors file; {scorer} is loaded from no other format")
    else:
        files = sorted(place.glob("*.safetensors"))
        if not files:
            raise ValueError(f"{place} holds no .safetensors file; {scorer} is loaded from no other format")
    tensors: dict[str, Tensor] = {}
    for file in files:
        try:
            part = load_file(file)
        except SafetensorError as error:
            raise ValueError(f"{file} cannot be read ({error}); get it again") from error
        twice = sorted(tensors.keys() & part.keys())
        if twice:
            raise ValueError(f"{place} holds {twice[0]} in two files; keep the files of one checkpoint there")
        tensors.update(part)
    return tensors


def load_strictly(module: nn.Module, tensors: Mapping[str, Tensor], *, scorer: str) -> None:
    """Copy tensors into a module. Raises ValueError that names what is missing, left over or of another shape."""
    try:
        module.load_state_dict(tensors, strict=True)
    except RuntimeError as error:
        raise ValueError(f"the weights are not those of {scorer}: {error}") from error


def part_of(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose name starts with `prefix`, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def require_files(folder: Path, names: tuple[str, ...], *, scorer: str) -> None:
    """Raises ValueError unless the folder holds each of these files."""
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"{folder} lacks {', '.join(missing)}; copy the whole folder of {scorer} (docs/rewards.md)")
