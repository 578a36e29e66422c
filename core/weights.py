"""Weights that a run starts from: one meaning of `student.init` for every script.

It may be a run directory (the averaged weights of its latest checkpoint), one of its checkpoints, a diffusers export or
pipeline (its transformer or unet, also in shards), the folder of such a network, or a .safetensors file.
"""

from __future__ import annotations

import json
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from fewstep.core.run_settings import SETTINGS_FILE
from fewstep.core.training.checkpoint import STATE_FILE, latest_checkpoint, verify_checkpoint
from fewstep.core.two_time import DELTA_KINDS, SITES, SUM_SCALE

# The embedding of the guidance by which exports of U-Nets switch guidance off: all zeros there.
IDLE_EMBEDDING = "time_embedding.cond_proj.weight"
LIVE_FILE, EMA_FILE = "student", "student_ema"
# What states things of a student: of a run, of an export, and of a causal student in either.
RECORDS = (SETTINGS_FILE, "distillation.json", "causal_video.json")
# Folders of a diffusers pipeline that may hold the denoising network, and the names of its files there.
NETWORK_FOLDERS = ("transformer", "unet")
EXPERT_FOLDERS = (*NETWORK_FOLDERS, "transformer_2")
# A pair of experts, of much noise and of little, has the networks of its two folders under their names.
EXPERTS = ("transformer", "transformer_2")
WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"
# Of one network, and of the second of two experts.
LORA_FILES = ("pytorch_lora_weights.safetensors", "pytorch_lora_weights_2.safetensors")
# Key of the header in which diffusers keeps rank and scale.
LORA_METADATA = "lora_adapter_metadata"
# A Denoiser's, a causal student's and a fake score's parameters carry the name of their one child.
PREFIXES = ("network.", "transformer.")
# In the files of diffusers' AnyFlow classes: what tells them, and what only their causal one has.
TIMES = SITES["WanTransformer3DModel"].layers
DELTA, OLD_CHUNKS = f"{TIMES.rpartition('.')[0]}.delta_embedder.", "far_patch_embedding."


@dataclass(frozen=True)
class StoredWeights:
    """Files that together hold the weights of one network.

    `run` and `checkpoint` are the run directory and the checkpoint that they are of, where they are of one; `key` is
    the setting that named them. `experts` are the names, in a pair of experts, of the network that each file is of;
    none where the files are of one network.
    """

    key: str
    source: str
    files: tuple[Path, ...]
    run: Path | None = None
    checkpoint: Path | None = None
    experts: tuple[str, ...] = ()

    def names(self) -> tuple[str, ...]:
        """Names of the tensors without what stands around the network. Raises ValueError for a file that is broken."""
        found: list[str] = []
        for number, path in enumerate(self.files):
            try:
                with safe_open(path, framework="pt") as file:
                    found += [self._expert(number) + _name_in(name, frozenset()) for name in list(file.keys())]
            except (OSError, SafetensorError) as error:
                raise ValueError(f"{self.key} {path} cannot be read ({error}); give a .safetensors file") from error
        return tuple(self._of_two_times(dict.fromkeys(found)))

    def _expert(self, number: int) -> str:
        """What stands before the names of a file's tensors in a pair of experts."""
        return f"{self.experts[number]}." if self.experts else ""

    @property
    def holds_adapters(self) -> bool:
        """Whether these are LoRA adapters without the weights under them. Raises ValueError for a broken file."""
        return any(".lora_" in name for name in self.names())

    def metadata(self) -> dict[str, Any]:
        """What diffusers wrote of the adapters into the header of their file; nothing for other files."""
        found: dict[str, Any] = {}
        for path in self.files:
            with safe_open(path, framework="pt") as file:
                text = (file.metadata() or {}).get(LORA_METADATA)
            if text is not None:
                found |= json.loads(text)
        return found

    def tensors(self, own: AbstractSet[str] = frozenset()) -> dict[str, Tensor]:
        """The tensors by their names in the network whose names are `own`. Raises ValueError for a broken file."""
        own = frozenset() if self.experts else own
        children = frozenset(name.partition(".")[0] for name in own)
        found: dict[str, Tensor] = {}
        for number, path in enumerate(self.files):
            try:
                found |= {
                    self._expert(number) + _name_in(name, own, children): tensor
                    for name, tensor in load_file(path).items()
                }
            except (OSError, SafetensorError) as error:
                raise ValueError(f"{self.key} {path} cannot be read ({error}); give a .safetensors file") from error
        if self.kind_of_export() == "sum":
            ends = tuple(f"{layers}linear_2.{part}" for layers in (f"{TIMES}.", DELTA) for part in ("weight", "bias"))
            found |= {name: found[name] / SUM_SCALE for name in ends if name in found}
        return self._of_two_times(found)

    def _of_two_times(self, found: dict[str, Any]) -> dict[str, Any]:
        """Tensors of an AnyFlow class by their names in a network of one or two times; others as they are.

        Raises:
            ValueError: no config.json beside the file says how the two times are joined, or in a way unknown here.
        """
        if not any(name.startswith(DELTA) for name in found):
            return found
        kind = self.kind_of_export()
        if kind is None:
            raise ValueError(
                f"{self.key} {self.source} holds two embeddings of time of diffusers' AnyFlow classes, and no "
                "config.json beside it says how they are joined, or one with another gate than students here have: "
                "give the export or its transformer folder"
            )
        moves = () if kind == "none" else ((f"{TIMES}.", f"{TIMES}.first."), (DELTA, f"{TIMES}.second."))
        unused = (OLD_CHUNKS, DELTA) if kind == "none" else (OLD_CHUNKS,)
        renamed: dict[str, Any] = {}
        for name, tensor in found.items():
            prefix, own = next(((a, b) for a, b in moves if name.startswith(a)), ("", ""))
            if not name.startswith(unused):
                renamed[own + name.removeprefix(prefix)] = tensor
        return renamed

    def stated(self, name: str) -> Any:
        """What the run or the export that holds these weights states of its student, such as its `second_time` or its
        `sampler` (`student.json` and others of `RECORDS`); None where nothing is stated."""
        folders = [] if self.run is None else [self.run]
        folders += [parent for file in self.files for parent in file.resolve().parents[:2]]
        files = [folder / record for folder in folders for record in RECORDS]
        stated = [json.loads(file.read_text(encoding="utf-8")).get(name) for file in files if file.is_file()]
        found = next((found for found in stated if found is not None), None)
        return self.kind_of_export() if found is None and name == "second_time" else found

    def kind_of_export(self) -> str | None:
        """The second time of a network that diffusers' AnyFlow classes hold, as its config says it; "none" where its
        gate is 0, None for all others."""
        for file in {path.parent / "config.json" for path in self.files}:
            if file.is_file():
                said = json.loads(file.read_text(encoding="utf-8"))
                return DELTA_KINDS.get((said.get("gate_value"), said.get("deltatime_type")))
        return None

    def require_own_times(self) -> None:
        """Raises ValueError for an export of a flow map whose second time went into the time layers of one grid."""
        pipeline = self.stated("pipeline")
        if pipeline is not None and self.stated("sampler") == "flow_map" and pipeline != "AnyFlowPipeline":
            raise ValueError(
                f"{self.key} {self.source} is an export of a flow map: its second time is baked into the time layers "
                "for its own steps alone, and nothing can go on from there. Give the run directory it was made from"
            )

    def beside(self, name: str) -> Path | None:
        """Another file of the checkpoint, such as the fake score beside the student; None where there is none."""
        if self.checkpoint is None:
            return None
        file = self.checkpoint / f"{name}.safetensors"
        return file if file.is_file() else None


def _name_in(name: str, own: AbstractSet[str], children: AbstractSet[str] = frozenset()) -> str:
    """The name without what stands around the network; one of the network's own is kept as it is.

    A network may have a child that is called like a wrapper: SANA with a ControlNet has a `transformer`, and so has a
    pair of experts. Adapters, which the network may not have yet, are known by the names of its `children`.
    """
    for prefix in PREFIXES:
        if name in own or (".lora_" in name and name.partition(".")[0] in children):
            return name
        name = name.removeprefix(prefix)
    return name


def find_weights(source: str, key: str = "student.init") -> StoredWeights:
    """The weights that a setting names; nothing is loaded yet.

    Raises:
        ValueError: there are none, or a checkpoint is damaged; names the setting `key`.
    """
    path = Path(source)
    if path.is_file():
        return StoredWeights(key, source, (path,))
    # A run directory may hold an export, too: its checkpoints are newer or equal, so they come first.
    checkpoint = path if (path / STATE_FILE).is_file() else latest_checkpoint(path) if path.is_dir() else None
    if checkpoint is not None:
        return _of_checkpoint(source, checkpoint, key)
    for folder in (path, *(path / name for name in NETWORK_FOLDERS)):
        files = _of_network(folder, key)
        second = path / EXPERTS[1]
        if files and folder.name == EXPERTS[0] and second.is_dir():
            more = _of_network(second, key)
            names = (*[EXPERTS[0]] * len(files), *[EXPERTS[1]] * len(more))
            return StoredWeights(key, source, (*files, *more), experts=names)
        if files:
            return StoredWeights(key, source, files)
    adapters = tuple(path / name for name in LORA_FILES if (path / name).is_file())
    if adapters:
        return StoredWeights(key, source, adapters, experts=EXPERTS if len(adapters) == len(EXPERTS) else ())
    raise ValueError(
        f"{key} {source} is no .safetensors file, no run directory or checkpoint, and no export with a transformer or "
        "unet: give one of them"
    )


def _of_checkpoint(source: str, checkpoint: Path, key: str) -> StoredWeights:
    verify_checkpoint(checkpoint)
    file = checkpoint / f"{EMA_FILE}.safetensors"
    if not file.is_file():
        raise ValueError(f"{key} {checkpoint} holds no {file.name}: it is no checkpoint of a student")
    return StoredWeights(key, source, (file,), run=checkpoint.resolve().parent, checkpoint=checkpoint)


def _of_network(folder: Path, key: str) -> tuple[Path, ...]:
    """The files of a network that diffusers saved in this folder, none where there is none."""
    file, index = folder / WEIGHTS_NAME, folder / f"{WEIGHTS_NAME}.index.json"
    if file.is_file():
        return (file,)
    if not index.is_file():
        return ()
    shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
    files = tuple(folder / name for name in sorted(set(shards)))
    lost = [path.name for path in files if not path.is_file()]
    if lost:
        raise ValueError(f"{key} {folder} lacks {len(lost)} of its {len(files)} files: {', '.join(lost[:3])}")
    return files


def load_weights(network: nn.Module, weights: StoredWeights) -> None:
    """Load into a network in place.

    Raises:
        ValueError: a file cannot be read, or does not hold exactly this network's weights.
    """
    weights.require_own_times()
    if weights.holds_adapters:
        raise ValueError(
            f"{weights.key} {weights.source} holds adapters alone, without the weights under them: export that run, "
            "and give its export"
        )
    own = network.state_dict()
    tensors = weights.tensors(own.keys())
    # An average holds all floating buffers, also computed tables that no state_dict has.
    computed = {name for name, _ in network.named_buffers()} - own.keys()
    tensors = {name: tensor for name, tensor in tensors.items() if name not in computed}
    # Of a U-Net's export, see core/networks/guidance_off.py.
    if IDLE_EMBEDDING not in own and IDLE_EMBEDDING in tensors and not bool(tensors[IDLE_EMBEDDING].any()):
        del tensors[IDLE_EMBEDDING]
    wrong = [name for name, tensor in tensors.items() if name in own and own[name].shape != tensor.shape]
    missing, unexpected = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    if missing or unexpected or wrong:
        raise ValueError(
            f"{weights.key} {weights.source} does not fit the teacher's network: {len(missing)} weights missing "
            f"{missing[:3]}, {len(unexpected)} unknown {unexpected[:3]}, {len(wrong)} of another shape {wrong[:3]}"
        )
    network.load_state_dict(tensors)
