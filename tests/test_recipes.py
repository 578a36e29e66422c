"""Recipes as published: what a file's header says of its source is what the file sets, and every file trains.

A header is YAML behind '# ': recipe, source, published (keys of the file with the source's values), deviates (a key and
'published -> here, why', or none), unknown, trained; prose may follow it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from fewstep.causal_video.stages.config import CausalConfig
from fewstep.causal_video.stages.train import train_causal_video
from fewstep.consistency.config import ConsistencyConfig
from fewstep.consistency.train import train_consistency
from fewstep.core.config import plain_values
from fewstep.core.data import LatentDataset
from fewstep.core.randomness import sample_noise
from fewstep.core.teacher import Teacher
from fewstep.core.training.checkpoint import list_checkpoints, load_checkpoint
from fewstep.core.training.run_directory import read_metrics
from fewstep.dmd.config import DmdConfig
from fewstep.dmd.reward.train import train_reward
from fewstep.dmd.train import train_dmd
from tests.core.families.checks import TinyModel
from tests.core.families.test_families_flux import MODEL as FLUX
from tests.core.families.test_families_flux2 import DEV as FLUX2_DEV
from tests.core.families.test_families_flux2 import KLEIN
from tests.core.families.test_families_hunyuan_video import MODEL as HUNYUAN_VIDEO
from tests.core.families.test_families_qwen_image import MODEL as QWEN_IMAGE
from tests.core.families.test_families_wan_experts import TEXT as WAN_EXPERTS
from tests.core.families.test_families_wan_image import MODEL as WAN_IMAGE
from tests.core.families.test_families_z_image import MODEL as Z_IMAGE
from tests.test_bf16_matrix import write_pictures
from tests.test_settings import ROOT, class_of, load
from tests.tiny_pipelines import build_sd3, build_sd15, build_sdxl, save_pipeline
from tests.tiny_sana import build_sana
from tests.tiny_videos import build_video_pipeline

pytestmark = pytest.mark.usefixtures("fresh_accelerate")

OWN = ("accelerate", "digits", "digits_video")
RECIPES = sorted(path for path in (ROOT / "configs").rglob("*.yaml") if path.parent.name not in OWN)
FIELDS = {"recipe", "source", "published", "deviates", "unknown", "trained"}
# Keys that this project's own place decides.
PLACES = ("data.prompts", "data.latents", "gan.latents", "noised_data.latents")
NEGATIVE = "ce96e0324e4b54ce4b6e867f669ca520952e1a34cc116543516b1897f0d3c47e"
IDS = [f"{path.parent.name}-{path.stem}" for path in RECIPES]
# A tiny model for each folder, and the size that its clips or pictures have there.
SMALL: dict[str, Any] = {
    "sd15": build_sd15,
    "sdxl": build_sdxl,
    "sd35": build_sd3,
    "sana": lambda: build_sana(timestep_scale=0.001),
    "wan21_1b": lambda: build_video_pipeline(text_tokens=8),
    "wan21_14b": lambda: build_video_pipeline(text_tokens=8),
    "wan22_5b": lambda: build_video_pipeline(text_tokens=8, expand_timesteps=True),
}
# Folders of models whose tiny ones say their size.
MODELS: dict[str, TinyModel] = {
    "flux1_dev": FLUX,
    "flux2_dev": FLUX2_DEV,
    "flux2_klein": KLEIN,
    "qwen_image": QWEN_IMAGE,
    "z_image": Z_IMAGE,
    "wan21_i2v_14b": WAN_IMAGE,
    "wan22_a14b": WAN_EXPERTS,
    "hunyuan_video": HUNYUAN_VIDEO,
}


def header_of(path: Path) -> dict[str, Any]:
    """The header of a recipe, up to the prose after it."""
    lines: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("# "):
            break
        lines.append(line[2:])
    last = next(number for number, line in enumerate(lines) if line.startswith("trained:"))
    # Texts may hold ': ', which YAML would take for a key.
    return {name: read_value(name, text) for name, text in sections_of(lines[: last + 1])}


def sections_of(lines: list[str]) -> Iterator[tuple[str, list[str]]]:
    found: list[str] = []
    for line in lines:
        if found and not line.startswith(" "):
            yield found[0].partition(":")[0], found
            found = []
        found.append(line)
    yield found[0].partition(":")[0], found


def read_value(name: str, lines: list[str]) -> Any:
    if name == "published":
        return yaml.safe_load("\n".join(lines))[name]
    if name == "deviates" and len(lines) > 1:
        text: dict[str, str] = {}
        for line in lines[1:]:
            if line.startswith("    "):
                text[list(text)[-1]] += " " + line.strip()
            else:
                key, _, value = line.strip().partition(": ")
                text[key] = value.strip("'\"")
        return text
    return " ".join(line.strip() for line in lines).partition(": ")[2]


def at(values: Any, key: str) -> Any:
    for part in key.split("."):
        values = values[part]
    return values


def holds(found: Any, published: Any) -> bool:
    """Whether a setting is the published one; of a group the published keys count."""
    if isinstance(published, dict):
        return all(holds(found[name], value) for name, value in published.items())
    return found == published


def problems_of(path: Path, header: dict[str, Any]) -> list[str]:
    """What a header says that its file does not do, and what it leaves out."""
    problems = [f"no field {name}" for name in sorted(FIELDS - header.keys())]
    values = plain_values(load(class_of(path), "--config", str(path)))
    deviates = header.get("deviates", "none")
    deviates = {} if deviates == "none" else deviates
    for key, published in header.get("published", {}).items():
        if not holds(at(values, key), published) and key not in deviates:
            problems.append(f"{key} is {at(values, key)}, published {published}, and deviates has no line for it")
    for key, text in deviates.items():
        at(values, key) if key not in PLACES else None
        if " -> " not in text:
            problems.append(f"deviates {key}: {text!r} does not say 'published -> here'")
    if header.get("trained") != "no":
        problems.append("trained is not 'no', and no record is named")
    return problems


@pytest.mark.parametrize("path", RECIPES, ids=IDS)
def test_a_header_says_what_the_file_sets(path: Path) -> None:
    header = header_of(path)
    assert problems_of(path, header) == []
    assert len(header["published"]) >= 2


def test_recipes_of_wan_lead_away_from_its_own_negative_prompt() -> None:
    """The long one of its repository, in every file that guides."""
    found = {
        path.parent.name + path.stem: load(class_of(path), "--config", str(path)).teacher.negative_prompt
        for path in RECIPES
        if path.parent.name.startswith("wan")
    }
    assert len(set(found.values())) == 1
    (text,) = set(found.values())
    assert text is not None
    assert hashlib.sha256(text.encode()).hexdigest() == NEGATIVE
    assert len(text.split("\uff0c")) == 28


def test_headers_that_are_wrong_are_found() -> None:
    path = ROOT / "configs" / "sdxl" / "dmd2_4step_lora.yaml"
    header = header_of(path)
    assert header["published"]["student.lora_rank"] == 64
    assert header["deviates"]["student.optimizer.warmup_steps"].startswith("500, which")
    wrong = {**header, "published": {**header["published"], "student.lora_rank": 32}}
    assert problems_of(path, wrong) == ["student.lora_rank is 64, published 32, and deviates has no line for it"]
    laws = {"matching.score_times": {"unit": "timestep", "min": 0}}
    assert len(problems_of(path, {**header, "published": laws})) == 1
    less = {name: text for name, text in header["deviates"].items() if name != "student.optimizer.warmup_steps"}
    assert len(problems_of(path, {**header, "deviates": less})) == 1
    assert problems_of(path, {**header, "deviates": {"run.steps": "fewer"}})[-1].endswith("'published -> here'")
    del header["source"]
    assert problems_of(path, header) == ["no field source"]


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Path]]:
    """For each folder a tiny model, a smaller one where there are two, and data at its own size."""
    found: dict[str, dict[str, Path]] = {}
    for name, build in {**SMALL, **{name: model.build for name, model in MODELS.items()}}.items():
        folder = tmp_path_factory.mktemp(name)
        model = save_pipeline(build(), folder / "model")
        teacher, is_video = Teacher.load(model), name in SMALL and name.startswith("wan")
        size = {"height": 32, "width": 32, "frames": 9} if is_video else {}
        size = MODELS[name].size if name in MODELS else size
        shape = teacher.latent_shape(**size)
        latents = 0.2 + 0.8 * sample_noise(9, range(5), shape, stream="data")
        captions = tuple(f"caption {number}" for number in range(5))
        LatentDataset(latents, captions).save(folder / "data")
        LatentDataset(latents, captions, latents.flip(0)).save(folder / "pairs")
        (folder / "prompts.txt").write_text("a red cat\ntwo dogs\nblue 7\n", encoding="utf-8")
        places = {key: folder / key for key in ("data", "pairs")}
        places["pictures"] = write_pictures(folder / "pictures", 3)
        found[name] = {"model": model, **places, "prompts": folder / "prompts.txt"}
        if is_video:
            other: Any = build_video_pipeline(text_tokens=8, blocks=2, expand_timesteps=name == "wan22_5b")
            other.register_modules(text_encoder=teacher.pipeline.text_encoder, vae=teacher.pipeline.vae)
            found[name]["small"] = save_pipeline(other, folder / "small")
    return found


def judged(values: dict[str, Any]) -> dict[str, Any]:
    """Scorers without weights, in small groups."""
    found: dict[str, Any] = {}
    if "reward" in values:
        found |= {
            "reward.group_size": min(2, values["reward"]["group_size"]),
            "reward.scorers": '[{"name": "stroke_weight"}]',
            "monitor.samples_per_prompt": 2,
        }
        found["rtdmd.direct"] = "null" if "direct" in values["rtdmd"] else None
    if "refl" in values:
        found["refl.scorers"] = '[{"name": "stroke_weight", "weight": 0.1}]'
    if "redmd" in values:
        judge = "stroke_weight" if values["redmd"].get("saliency") else "clip_light"
        found |= {"redmd.scorers": f'[{{"name": "{judge}"}}]'}
    return found


def unchecked(values: dict[str, Any]) -> dict[str, Any]:
    """No check of the tangent: random layers of a time of 1,000 t turn faster than any path."""
    return {f"{section}.check_tangent": "false" for section in ("scm", "tf_scm") if section in values}


def overrides(path: Path, parts: dict[str, Path], directory: Path) -> list[str]:
    """The settings of a tiny run: sizes, counts and places; what the recipe is about stays."""
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    is_video, batch = path.parent.name.startswith("wan"), 4
    size = {"height": 32, "width": 32} if is_video else {"height": "null", "width": "null"}
    size = MODELS[path.parent.name].size if path.parent.name in MODELS else size
    found: dict[str, Any] = {
        "teacher.path": parts["model"],
        "data.prompts": parts["prompts"],
        "data.height": size["height"],
        "data.width": size["width"],
        "data.sample_count": 1,
        "run.directory": directory,
        "run.steps": 2,
        "run.batch_size": batch,
        "run.gradient_accumulation": 1,
        "run.checkpoint_every": 2,
        "run.log_every": 1,
    }
    if values["run"]["mixed_precision"] == "fp16":
        # Scaled gradients need a GPU.
        found |= {"run.mixed_precision": "bf16", "teacher.dtype": "bfloat16"}
    found |= judged(values) | unchecked(values)
    if "ema_every" in values["student"]:
        # Two steps would take in no update.
        found["student.ema_every"] = 1
    if "policy" in values["student"] and "layout" in values["student"]:
        # A running mean needs equal chunks.
        found |= {"student.layout": "[1, 1, 1]", "student.policy.window_frames": 1, "student.policy.sink_frames": 1}
    for section, key in (("data", "latents"), ("gan", "latents"), ("noised_data", "latents")):
        if key in values.get(section, {}):
            found[f"{section}.{key}"] = parts["data"]
    if "pairs" in values:
        # tests/consistency/methods/test_pairs.py has LPIPS and tiny autoencoders.
        found |= {"data.latents": parts["pairs"], "pairs.metric": "latent", "pairs.mean_pooling": "false"}
        found |= {"pairs.lpips": "null", "pairs.autoencoder": "null"}
    if "frames" in values["data"]:
        found["data.frames"] = size.get("frames", 9)
    if "pictures" in values["data"]:
        found["data.pictures"] = parts["pictures"]
    if "layout" in values["student"] and "policy" not in values["student"]:
        found["student.layout"] = "[1, 2]"
    if values["teacher"].get("lora") is not None:
        # No tiny adapters are at hand: tests/dmd/test_adapters_and_videos.py has such a run.
        found |= {"teacher.lora": "null", "teacher.lora_apart": "false"}
    for section in ("student", "fake_score"):
        if values.get(section, {}).get("path") is not None:
            found[f"{section}.path"] = parts.get("small", parts["model"])
        if values.get(section, {}).get("init") is not None:
            found[f"{section}.init"] = init_of(values, section, parts)
    if "ode" in values:
        found |= {"ode.count": 4, "ode.steps": 4}
    if values.get("gan", {}).get("blocks"):
        found["gan.blocks"] = "[0, 1]"
    if values.get("gan", {}).get("head") == "multiscale":
        found |= {"gan.scales": "[1, 2]", "gan.head_width": 8}
    if "sana_sprint" in values:
        found["sana_sprint.discriminator.blocks"] = "[0, 1]"
    return [text for key, value in found.items() if value is not None for text in (f"--{key}", str(value))]


def init_of(values: dict[str, Any], section: str, parts: dict[str, Path]) -> Any:
    """Weights of the right kind: the network of the tiny model, or none where the recipe goes on from adapters."""
    if values[section].get("lora_rank", 0) > 0:
        return "null"
    model = parts["small"] if values[section].get("path") is not None else parts["model"]
    return next(model / name for name in ("transformer", "unet") if (model / name).is_dir())


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("path", RECIPES, ids=IDS)
def test_a_recipe_trains_a_tiny_model_of_its_kind(
    path: Path, stand_ins: dict[str, dict[str, Path]], tmp_path: Path
) -> None:
    """Two steps in bf16 with everything that the recipe sets but its size; all weights stay finite and some move."""
    config_class = class_of(path)
    arguments = overrides(path, stand_ins[path.parent.name], tmp_path / "run")
    config = load(config_class, "--config", str(path), *arguments)
    train = {DmdConfig: train_dmd, ConsistencyConfig: train_consistency, CausalConfig: train_causal_video}
    assert train.get(config_class, train_reward)(config) == 0
    checkpoint = load_checkpoint(list_checkpoints(tmp_path / "run")[-1])
    for tensors in checkpoint.tensors.values():
        assert all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values() if tensor.is_floating_point())
    assert checkpoint.state["roles"]["student"]["updates"] >= 1
    assert len([record for record in read_metrics(tmp_path / "run" / "metrics.jsonl") if "note" not in record]) >= 2
