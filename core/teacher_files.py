"""The files of a teacher: what its JSON says before anything is downloaded, where its weights are, what is missing."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from huggingface_hub import hf_hub_download, snapshot_download

from fewstep.core.families.table import (
    config_components,
    is_told_picture,
    require_known_class,
    require_teacher,
    text_components,
)
from fewstep.core.settings import ModelSource

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
INDEX = "model_index.json"
# Components of these kinds hold no weights; a folder with a config is all they need.
WEIGHTLESS = ("Scheduler", "Tokenizer", "TokenizerFast", "Processor", "Extractor")
VARIANT = re.compile(r"[^.]+\.([\w-]+?)(?:-\d{5}-of-\d{5})?\.safetensors")


def check_teacher(source: ModelSource) -> None:
    """Check from JSON files alone that a model can be a teacher; of the hub nothing else is fetched.

    Raises:
        ValueError: it is neither a folder nor a model of the hub, no family knows its class or can call its networks,
            or a component of the folder is missing.
    """
    folder = local_folder(source)
    index = read_index(folder) if folder is not None else _hub_json(source, INDEX)
    # The class first: what is missing in a folder that cannot be a teacher is no news.
    name = source.pipeline or str(index.get("_class_name"))
    require_known_class(name)
    configs: dict[str, Mapping[str, Any]] = {"": index}
    for component in config_components(name):
        entry = index.get(component)
        if entry is not None and _is_there(entry):
            configs[component] = _component_config(source, folder, component, str(entry[1]))
    require_teacher(name, configs)
    is_told_picture(name, chosen=source.told_picture)
    if source.embedded_guidance is not None and not any(one.get("guidance_embeds") for one in configs.values()):
        raise ValueError(
            f"embedded_guidance is {source.embedded_guidance}, and the network of {source.path} has no embedding of a "
            "guidance (guidance_embeds): leave it out; guidance is the scale of two calls"
        )
    for component in text_components(name):
        if not _is_there(index.get(component)):
            raise ValueError(f"{source.path} has no {component} in its {INDEX}: prompts could not be encoded")
    if folder is not None:
        check_pipeline_folder(folder, variant=source.variant)


def needs_pictures(source: ModelSource) -> bool:
    """Whether the network of a model is told a picture with each prompt; from its index alone."""
    folder = local_folder(source)
    index = read_index(folder) if folder is not None else _hub_json(source, INDEX)
    return is_told_picture(source.pipeline or str(index.get("_class_name")), chosen=source.told_picture)


def require_told_pictures(source: ModelSource, pictures: Sequence[Path]) -> None:
    """Raises ValueError unless there are pictures just where the network of a model is told one; from its index."""
    told = needs_pictures(source)
    if told and not pictures:
        raise ValueError(
            f"{source.path} is told a picture beside the text: set data.pictures to a folder with one for each prompt"
        )
    if pictures and not told:
        raise ValueError(
            f"data.pictures is set, and {source.path} is told no picture: leave it out, or set teacher.told_picture "
            "for a model that edits pictures as well"
        )


def local_folder(source: ModelSource) -> Path | None:
    """The folder that a path names, None for a model of the hub.

    Raises:
        ValueError: it is neither.
    """
    path = Path(source.path)
    if path.is_file():
        raise ValueError(
            f"{path} is a file, and a teacher is the folder of a pipeline: load it once with diffusers' "
            "from_single_file of its pipeline class, save_pretrained(FOLDER), and give that folder"
        )
    if path.is_dir():
        if source.revision is not None:
            raise ValueError(f"teacher.revision is {source.revision} beside the folder {path}, which has none")
        return path / (source.subfolder or "")
    if not HUB_ID.fullmatch(source.path):
        raise ValueError(f"{path} is neither a folder nor the name of a model on the hub (owner/name): check the path")
    return None


def fetch(source: ModelSource) -> Path:
    """The local folder of a model, downloaded from the hub if it is there; safetensors alone. Raises ValueError."""
    folder = local_folder(source)
    if folder is not None:
        return folder
    check_teacher(source)
    try:
        if source.subfolder is not None:
            patterns = [f"{source.subfolder}/*.json", f"{source.subfolder}/*.txt", f"{source.subfolder}/*.model"]
            patterns.append(
                f"{source.subfolder}/*{'' if source.variant is None else '.' + source.variant}*.safetensors"
            )
            found = snapshot_download(source.path, revision=source.revision, allow_patterns=patterns)
            return Path(found) / source.subfolder
        return Path(
            DiffusionPipeline.download(
                source.path, use_safetensors=True, revision=source.revision, variant=source.variant
            )
        )
    except OSError as error:
        raise _unreachable(source, error) from error


def download_pipeline(name: str) -> Path:
    """The local folder of any pipeline of the hub, whether or not it could be a teacher. Raises ValueError."""
    try:
        return Path(DiffusionPipeline.download(name, use_safetensors=True))
    except OSError as error:
        raise _unreachable(ModelSource(path=name), error) from error


def fetch_network(source: ModelSource, component: str) -> Path:
    """The local folder of one component's config and weights, downloaded from the hub if it is there."""
    folder = local_folder(source)
    if folder is not None:
        return folder / component
    place = f"{source.subfolder}/{component}" if source.subfolder else component
    try:
        patterns = [f"{place}/*.json", f"{place}/*.safetensors"]
        return Path(snapshot_download(source.path, revision=source.revision, allow_patterns=patterns)) / place
    except OSError as error:
        raise _unreachable(source, error) from error


def read_configs(source: ModelSource, components: Sequence[str]) -> dict[str, Mapping[str, Any]]:
    """The index (as "") and the configs of these components, from JSON files alone. Raises ValueError."""
    folder = local_folder(source)
    index = read_index(folder) if folder is not None else _hub_json(source, INDEX)
    found: dict[str, Mapping[str, Any]] = {"": index}
    for component in components:
        entry = index.get(component)
        if entry is not None and _is_there(entry):
            found[component] = _component_config(source, folder, component, str(entry[1]))
    return found


def check_pipeline_folder(folder: Path, *, variant: str | None = None) -> list[str]:
    """Check that every component of the index is there; return the names of those that the index leaves out as null.

    Raises:
        ValueError: the index is missing or broken, or a component has no folder, no config or no safetensors weights.
    """
    entries = read_index(folder)
    components = {name: entry for name, entry in entries.items() if isinstance(entry, list) and len(entry) == 2}
    for name, (library, class_name) in components.items():
        if library is not None:
            _check_component(folder, name, class_name, variant=variant)
    return [name for name, (library, _) in components.items() if library is None]


def variant_of(folder: Path, variant: str | None) -> str | None:
    """The variant to read: the given one, or the only one there is where no plain weights are."""
    if variant is not None:
        return variant
    files = list(folder.glob("*/*.safetensors"))
    found = {_variant(file.name) for file in files}
    return found.pop() if len(found) == 1 else None


def read_index(folder: Path) -> dict[str, Any]:
    """The content of a pipeline's model_index.json. Raises ValueError when it is missing or broken."""
    index = folder / INDEX
    if not index.is_file():
        told = ""
        if (folder / "config.json").is_file():
            told = " (this is the folder of one network, and a teacher is the folder above it)"
        raise ValueError(f"{folder} has no {INDEX}: give the folder that pipeline.save_pretrained wrote{told}")
    return _json_of(index)


def _is_there(entry: Any) -> bool:
    """Whether an entry of the index names a library and a class."""
    return isinstance(entry, list) and len(entry) == 2 and entry[0] is not None


def _component_config(source: ModelSource, folder: Path | None, component: str, class_name: str) -> Mapping[str, Any]:
    name = "scheduler_config.json" if class_name.endswith("Scheduler") else "config.json"
    if folder is None:
        return _hub_json(source, f"{component}/{name}")
    file = folder / component / name
    if not file.is_file():
        raise ValueError(f"component {component} ({class_name}) is missing in {folder}: download its folder")
    return _json_of(file)


def _json_of(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is no JSON ({error}): save the pipeline again, or download it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds a {type(content).__name__}, and an object was expected: download it again")
    return content


def _hub_json(source: ModelSource, name: str) -> dict[str, Any]:
    """One small file of the hub."""
    try:
        file = hf_hub_download(source.path, name, subfolder=source.subfolder, revision=source.revision)
    except OSError as error:
        raise _unreachable(source, error) from error
    return _json_of(Path(file))


def _unreachable(source: ModelSource, error: OSError) -> ValueError:
    return ValueError(
        f"{source.path} is no folder here and could not be fetched from the hub ({error}): check the name, "
        "teacher.revision, variant and subfolder, the network, and for a model behind an agreement the access token in "
        "the environment variable HF_TOKEN"
    )


def _variant(name: str) -> str | None:
    """fp16 of model.fp16.safetensors or model.fp16-00001-of-00002.safetensors; None of plain names."""
    found = VARIANT.fullmatch(name)
    return None if found is None else found[1]


def _check_component(folder: Path, name: str, class_name: str, *, variant: str | None) -> None:
    place = folder / name
    optional = ""
    if name in ("text_encoder_3", "tokenizer_3", "safety_checker", "feature_extractor"):
        optional = f', or set "{name}" to [null, null] in model_index.json to do without it'
    if not place.is_dir() or not any(place.glob("*.json")):
        raise ValueError(f"component {name} ({class_name}) is missing in {folder}: download its folder{optional}")
    if class_name.endswith(WEIGHTLESS):
        return
    files = [file.name for file in place.glob("*.safetensors")]
    if not files:
        raise ValueError(
            f"component {name} ({class_name}) in {folder} has no .safetensors weights: download them (no other "
            f"format is read){optional}"
        )
    there = {_variant(file) for file in files}
    wanted = variant_of(folder, variant)
    # diffusers takes plain weights where a component has none of the variant.
    if wanted not in there and None not in there:
        known = ", ".join(sorted(str(found) for found in there))
        raise ValueError(
            f"component {name} ({class_name}) in {folder} has the weights of {known} alone, and teacher.variant is "
            f"{variant}: set it to one of these, or download the others"
        )
