"""Every family with teacher and run in bf16, for every kind of objective: one step beside that in fp32.

Consistency methods on SD3 and Wan are in tests/consistency/test_consistency_half_precision.py; here are the families
beside them, distribution matching on all, adapters on the bf16 base, and the causal stages.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image

from fewstep.causal_video.stages.consistency import check_tangent as check_causal_tangent
from fewstep.causal_video.stages.redmd import RolloutReward
from fewstep.causal_video.stages.sections import RedmdConfig
from fewstep.causal_video.stages.train import train_step as causal_step
from fewstep.consistency.config import ConsistencyMatchingConfig
from fewstep.consistency.sections import DcmConfig, EctConfig, PairsConfig, ScmConfig
from fewstep.consistency.tangent_check import check_tangent
from fewstep.consistency.train import train_step as consistency_step
from fewstep.core.data import LatentDataset
from fewstep.core.media.pictures import find_pictures
from fewstep.core.randomness import sample_noise
from fewstep.core.settings import FakeScoreConfig, ModelSource
from fewstep.core.teacher import Teacher
from fewstep.dmd.config import FDistillObjective, GanConfig, ReflConfig, SidObjective
from fewstep.dmd.train import train_step as dmd_step
from fewstep.evaluation.scorers.settings import ScorerConfig
from tests.causal_video.tiny_causal_run import start_causal, tiny_causal, with_joint, with_teacher
from tests.causal_video.tiny_causal_run import write_inputs as write_causal_inputs
from tests.consistency.tiny_consistency_run import OPTIMIZER, start_consistency, tiny_consistency
from tests.core.families.checks import TinyModel
from tests.core.families.test_families_cogvideox import LARGE as COGVIDEOX
from tests.core.families.test_families_cosmos import MODEL as COSMOS
from tests.core.families.test_families_dit import MODEL as DIT
from tests.core.families.test_families_flux import MODEL as FLUX
from tests.core.families.test_families_flux2 import KLEIN, KLEIN_PICTURE
from tests.core.families.test_families_flux_kontext import MODEL as KONTEXT
from tests.core.families.test_families_hunyuan_video import MODEL as HUNYUAN_VIDEO
from tests.core.families.test_families_ltx import MODEL as LTX
from tests.core.families.test_families_pixart import MODEL as PIXART
from tests.core.families.test_families_qwen_image import MODEL as QWEN_IMAGE
from tests.core.families.test_families_qwen_image_edit import EDIT_MODEL as QWEN_IMAGE_EDIT
from tests.core.families.test_families_wan_experts import PICTURE as WAN_IMAGE_EXPERTS
from tests.core.families.test_families_wan_experts import TEXT as WAN_EXPERTS
from tests.core.families.test_families_wan_image import MODEL as WAN_IMAGE
from tests.core.families.test_families_wan_image import TI2V as WAN_TI2V
from tests.core.families.test_families_z_image import MODEL as Z_IMAGE
from tests.dmd.tiny_run import PROMPTS, TinyInputs, changed, start, tiny_config
from tests.tiny_pipelines import build_sd3, build_sd15, build_sdxl, save_pipeline
from tests.tiny_sana import build_sana
from tests.tiny_videos import build_video_pipeline

pytestmark = pytest.mark.usefixtures("fresh_accelerate")

FAMILIES: dict[str, Any] = {
    "sd3": build_sd3,
    "sd15": build_sd15,
    "sdxl": build_sdxl,
    "sana": lambda: build_sana(dense=True),
    "wan": lambda: build_video_pipeline(text_tokens=8),
    "wan_time_per_token": lambda: build_video_pipeline(text_tokens=8, expand_timesteps=True),
}
# Families that came later: one step of distribution matching, of adapters, of dCM and of rCM on each.
LATER: dict[str, TinyModel] = {
    "flux": FLUX,
    "flux_kontext": KONTEXT,
    "flux2": KLEIN,
    "flux2_picture": KLEIN_PICTURE,
    "qwen_image": QWEN_IMAGE,
    "qwen_image_edit": QWEN_IMAGE_EDIT,
    "z_image": Z_IMAGE,
    "hunyuan_video": HUNYUAN_VIDEO,
    "ltx": LTX,
    "cosmos": COSMOS,
    "pixart": PIXART,
    "dit": DIT,
    "cogvideox": COGVIDEOX,
    "wan_image": WAN_IMAGE,
    "wan_ti2v": WAN_TI2V,
    "wan_experts": WAN_EXPERTS,
    "wan_image_experts": WAN_IMAGE_EXPERTS,
}
# Tangents along time of SD3 and Wan are tested elsewhere; those of a table's U-Net and of SANA here.
# DiT's stock call knows even grids of its table alone.
GRIDS: dict[str, Any] = {"dit": {"student.steps": 2, "student.timesteps": (999.0, 499.0)}}
# Their networks are told 1,000 times the guidance, in bf16: 3,500 is 3,504 there, and 6,000 is 6,016, of which the
# embedding is another. 4,000 is a number of bf16.
TOLD_GUIDANCE, EXACT_GUIDANCE = ("flux", "flux_kontext", "hunyuan_video"), 4.0


def exact_grid(name: str) -> DcmConfig:
    """Times that bf16 does not move: most networks round the thousandfold of a time, Qwen-Image the time itself."""
    return DcmConfig(grid_steps=8 if name.startswith("qwen") else 5, grid_shift=1.0)


def later_cases(*objectives: str) -> list[tuple[str, str]]:
    """Every later family with these objectives; Qwen-Image-Edit has pictures of a megapixel, and rCM holds dCM."""
    slow = {("qwen_image_edit", "adapters"), ("qwen_image_edit", "dcm")}
    return [case for case in itertools.product(LATER, objectives) if case not in slow]


VIDEOS = ("wan", "wan_time_per_token")
CONSISTENT = ("sd15", "sdxl", "sana", "wan_time_per_token")
ADAPTERS = {"student.lora_rank": 2, "fake_score.lora_rank": 2}
MATCHINGS = ("dmd", "told_exit", "sid", "f_distill", "adapters", "teacher_gan", "refl")
OBJECTIVES = ("scm", "dcm", "ect", "rcm", "adapters", "pairs")
STAGES = (
    "teacher_forcing",
    "diffusion_forcing",
    "tf_dcm",
    "tf_scm",
    "tf_meanflow",
    "tf_anyflow",
    "ode",
    "self_forcing",
    "self_forcing_jumps",
    "self_forcing_redmd",
    "self_forcing_causal",
    "self_forcing_joint",
)
# Logged numbers that are means over a batch of 4, so that bf16's errors of single numbers average out.
CLOSE: dict[str, Any] = {"rel": 0.1, "abs": 4e-3}
# The grids of students are not exact in bf16: networks that are told t in it, as by their stock calls, see another time
# by up to 0.4 %; these have wide weights.
ROUGH: dict[str, Any] = {"rel": 0.2, "abs": 4e-3}


@dataclass(frozen=True)
class FamilyInputs:
    """A tiny model of a family on disk, data of its shape, and the settings that a run of it needs."""

    inputs: TinyInputs
    settings: dict[str, Any]


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], FamilyInputs]:
    """Inputs of a family, made when they are first asked for."""

    @functools.cache
    def of(name: str) -> FamilyInputs:
        folder = tmp_path_factory.mktemp(name)
        pipeline = LATER[name].build() if name in LATER else FAMILIES[name]()
        if name == "cosmos":
            # The stand-in of its guardrail is no part of a model.
            pipeline.register_modules(safety_checker=None)
        teacher = save_pipeline(pipeline, folder / "teacher")
        size: dict[str, Any] = {"height": 32, "width": 32, "frames": 5} if name in VIDEOS else {}
        size = dict(LATER[name].size) if name in LATER else size
        told = name in LATER and LATER[name].told_picture
        loaded = Teacher.load(ModelSource(path=str(teacher), told_picture=told))
        shape = loaded.latent_shape(**size)
        # A teacher that is told classes reads numbers alone.
        prompts = ("207", "1", "2", "3", "4") if name == "dit" else PROMPTS
        (folder / "prompts.txt").write_text("\n".join(prompts) + "\n", encoding="utf-8")
        latents = 0.3 + 0.8 * sample_noise(9, range(5), shape, stream="data")
        captions = prompts if name == "dit" else tuple(f"picture {number}" for number in range(5))
        settings = {f"data.{key}": value for key, value in size.items()} | GRIDS.get(name, {})
        settings |= {"teacher.embedded_guidance": EXACT_GUIDANCE} if name in TOLD_GUIDANCE else {}
        before: tuple[Path, ...] = ()
        if loaded.family.takes_picture:
            settings["data.pictures"] = str(write_pictures(folder / "pictures", len(PROMPTS)))
            settings |= {"teacher.told_picture": True} if told else {}
            before = () if loaded.family.makes_videos else tuple(find_pictures(folder / "pictures"))
        LatentDataset(latents, captions, None, before).save(folder / "latents")
        LatentDataset(latents, captions, latents.flip(0), before).save(folder / "pairs")
        inputs = TinyInputs(teacher, folder / "prompts.txt", folder / "latents", folder / "pairs")
        return FamilyInputs(inputs, settings)

    return of


def write_pictures(folder: Path, count: int) -> Path:
    folder.mkdir()
    for number in range(count):
        pixels = torch.randint(256, (24, 40, 3), generator=torch.Generator().manual_seed(number), dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / f"{number}.png")
    return folder


def in_both(config: Any, first_step: Any) -> tuple[dict[str, float], dict[str, float]]:
    """The metrics of the first step in fp32, and with teacher and run in bf16."""
    results = []
    for dtype, precision in (("float32", "no"), ("bfloat16", "bf16")):
        AcceleratorState._reset_state(reset_partial_state=True)
        changes = {"teacher.dtype": dtype, "run.mixed_precision": precision}
        directory = f"{config.run.directory}_{precision}"
        results.append(first_step(changed(config, {**changes, "run.directory": directory})))
    return results[0], results[1]


def assert_close(
    exact: dict[str, float], half: dict[str, float], names: tuple[str, ...], allowed: dict[str, Any] = CLOSE
) -> None:
    assert exact.keys() == half.keys()
    for name in names:
        assert half[name] == pytest.approx(exact[name], **allowed), name
    assert exact != half


def dmd_first(config: Any) -> dict[str, float]:
    setup, trainer = start(config)
    metrics = dmd_step(config, setup, trainer)
    trainer.close()
    return {name: float(value) for name, value in metrics.items()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "objective"),
    [*itertools.product(FAMILIES, MATCHINGS), *later_cases("dmd", "adapters")],
)
def test_matching(families: Callable[[str], FamilyInputs], tmp_path: Path, name: str, objective: str) -> None:
    family = families(name)
    gan = GanConfig(latents=str(family.inputs.latents), weight=0.1, discriminator_weight=0.5)
    changes: dict[str, Any] = {"student.steps": 2, **family.settings}
    changes |= {
        "dmd": {},
        "told_exit": {"fake_score.told_exit": True},
        "sid": {"dmd": None, "sid": SidObjective()},
        "f_distill": {"dmd": None, "f_distill": FDistillObjective(), "gan": gan},
        "adapters": ADAPTERS,
        "teacher_gan": {
            "gan": dataclasses.replace(gan, features="teacher", optimizer=OPTIMIZER, discriminator_weight=0.01)
        },
        "refl": {"refl": ReflConfig(scorers=(ScorerConfig(name="stroke_weight"),))},
    }[objective]
    exact, half = in_both(tiny_config(family.inputs, tmp_path / "run", changes), dmd_first)
    rewards = tuple(key for key in exact if key.startswith("reward_"))
    assert len(rewards) == (objective == "refl")
    names = ("fake_score_loss", "matching_student_std", "matching_teacher_std", *rewards)
    assert_close(exact, half, names, ROUGH if name in LATER else CLOSE)


def consistency_first(config: Any) -> dict[str, float]:
    setup, trainer = start_consistency(config)
    checked = check_tangent(config, setup, trainer)
    assert (checked is not None) == (config.scm is not None and config.scm.check_tangent)
    metrics = consistency_step(config, setup, trainer)
    trainer.close()
    return {name: float(value) for name, value in metrics.items()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "objective"),
    [*itertools.product(CONSISTENT, OBJECTIVES), *later_cases("dcm", "rcm")],
)
def test_consistency(families: Callable[[str], FamilyInputs], tmp_path: Path, name: str, objective: str) -> None:
    family = families(name)
    sections: dict[str, Any] = {
        "scm": {"scm": ScmConfig(time_std=0.8, time_smoothing=0.01)},
        "dcm": {"dcm": exact_grid(name)},
        "ect": {"ect": EctConfig(), "teacher.guidance": 1.0},
        "rcm": {
            "dcm": exact_grid(name),
            "matching": ConsistencyMatchingConfig(weight=0.5),
            "fake_score": FakeScoreConfig(optimizer=OPTIMIZER, ratio=1),
        },
        "adapters": {"scm": ScmConfig(time_std=0.8, check_tangent=False), "student.lora_rank": 2},
        "pairs": {
            "pairs": PairsConfig(),
            "data.latents": str(family.inputs.pairs),
            "student.steps": 1,
            "teacher.guidance": 1.0,
        },
    }[objective]
    config = tiny_consistency(family.inputs, tmp_path / "run", "dcm")
    config = changed(config, {"dcm": None, **family.settings, **sections})
    exact, half = in_both(config, consistency_first)
    names = tuple(
        name for name in ("consistency_loss", "tangent", "pair_distance", "student_grad_norm") if name in exact
    )
    if name in LATER:
        # Their loss is the square of a small difference, whose gradient bf16's rounding moves by a third.
        assert_close(exact, half, ("consistency_loss",))
        assert 0 < half["student_grad_norm"] < 2 * exact["student_grad_norm"]
    else:
        assert_close(exact, half, names)


@pytest.mark.slow
def test_a_time_that_bf16_rounds_names_what_to_set(families: Callable[[str], FamilyInputs], tmp_path: Path) -> None:
    """FLUX rounds its time to the dtype of the frozen weights, a stair that central differences cannot judge."""
    family = families("flux")
    config = tiny_consistency(family.inputs, tmp_path / "run", "dcm")
    config = changed(config, {"dcm": None, "scm": ScmConfig(), "student.lora_rank": 2, **family.settings})
    # In fp32 the tangent is exact, and the tiny network's wiggle is what is said.
    with pytest.raises(ValueError, match="follows a wiggle of the network"):
        consistency_first(config)
    AcceleratorState._reset_state(reset_partial_state=True)
    half = changed(config, {"teacher.dtype": "bfloat16", "run.mixed_precision": "bf16"})
    with pytest.raises(ValueError, match=r"start once with teacher\.dtype float32 .* then with check_tangent false"):
        consistency_first(half)
    AcceleratorState._reset_state(reset_partial_state=True)
    unchecked = changed(half, {"scm": ScmConfig(check_tangent=False)})
    setup, trainer = start_consistency(unchecked)
    metrics = consistency_step(unchecked, setup, trainer)
    trainer.close()
    assert 0 < float(metrics["consistency_loss"]) < math.inf


@pytest.mark.slow
@pytest.mark.parametrize("adapters", [False, True])
@pytest.mark.parametrize("stage", STAGES)
def test_causal_stages(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, stage: str, adapters: bool) -> None:
    inputs = write_causal_inputs(tmp_path_factory.mktemp("videos"))
    changes: dict[str, Any] = {"student.lora_rank": 2} if adapters else {}
    if stage == "tf_scm":
        changes |= {"tf_scm.check_tangent": not adapters, "tf_scm.time_smoothing": 0.0 if adapters else 0.01}
    if stage == "self_forcing_redmd":
        changes["redmd"] = RedmdConfig(scorers=(ScorerConfig(name="stroke_weight"),), saliency=True)
    if stage == "self_forcing_joint":
        changes |= {"joint": with_joint(), "causal_teacher": with_teacher(inputs)}
    if stage == "self_forcing_causal":
        changes["self_forcing.scores"] = "causal"
    case = "self_forcing" if stage.startswith("self_forcing") else stage
    if stage == "self_forcing_jumps":
        changes["student.second_time"] = "gate"
    config = tiny_causal(inputs, tmp_path / "run", case, changes)

    def first(config: Any) -> dict[str, float]:
        setup, trainer = start_causal(config)
        if config.redmd is not None:
            setup = dataclasses.replace(setup, weigh=RolloutReward(config.redmd, trainer, PROMPTS).weigh)
        if config.tf_scm is not None:
            assert (check_causal_tangent(config.tf_scm, setup, trainer) is None) == adapters
        metrics = causal_step(config, setup, trainer)
        trainer.close()
        return {name: float(value) for name, value in metrics.items()}

    exact, half = in_both(config, first)
    names = ("forcing_loss",)
    if case == "self_forcing":
        assert ("joint_loss" in half) == (stage == "self_forcing_joint")
        names = ("matching_student_std", "matching_teacher_std")
        names += tuple(name for name in ("reward", "reward_weight", "joint_loss") if name in exact)
    assert_close(exact, half, names)


@pytest.mark.parametrize(("guidance", "least", "most"), [(3.5, 0.3, 1.0), (EXACT_GUIDANCE, 0.0, 0.02)])
def test_what_bf16_makes_of_flux_is_its_rounded_guidance(guidance: float, least: float, most: float) -> None:
    teacher = Teacher(FLUX.build(), path="owner/tiny", embedded_guidance=guidance)
    # Times whose thousandfold is a number of bf16.
    x_t, t = sample_noise(1, range(2), FLUX.shape(teacher), stream="data"), torch.tensor([0.4, 0.7])
    condition = teacher.encode(list(FLUX.prompts))
    with torch.no_grad():
        exact = teacher.denoiser(x_t, t, condition)
        with torch.autocast("cpu", torch.bfloat16):
            half = teacher.denoiser(x_t, t, condition)
    assert least < float((half.float() - exact).norm() / exact.norm()) < most
