"""The one table from the class of a pipeline to its family."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

from diffusers import DiffusionPipeline

from fewstep.core.families.cogvideox import CogVideoXFamily, require_cogvideox
from fewstep.core.families.cosmos import CosmosFamily, require_cosmos, without_guardrail
from fewstep.core.families.dit import DitFamily, require_dit
from fewstep.core.families.family import Configs, Family
from fewstep.core.families.flux import FluxFamily, require_flux
from fewstep.core.families.flux2 import Flux2Family, require_flux2
from fewstep.core.families.flux_kontext import FluxKontextFamily
from fewstep.core.families.hunyuan_video import HunyuanVideoFamily, require_hunyuan_video
from fewstep.core.families.ltx import LtxFamily, require_ltx
from fewstep.core.families.pixart import PixArtFamily, require_pixart
from fewstep.core.families.qwen_image import QwenImageFamily, require_qwen_image
from fewstep.core.families.qwen_image_edit import QwenImageEditFamily, require_qwen_image_edit
from fewstep.core.families.sana import SanaFamily, require_sana
from fewstep.core.families.sana_control import SanaControlFamily
from fewstep.core.families.sd3 import Sd3Family, require_sd3
from fewstep.core.families.unet import UnetFamily, require_unet
from fewstep.core.families.wan import WanFamily, require_wan
from fewstep.core.families.wan_image import WanImageFamily, require_wan_image
from fewstep.core.families.z_image import ZImageFamily, require_z_image


class Kind(NamedTuple):
    """How the family of a pipeline is made, and what refuses one that it cannot call.

    One that reads no text is told classes. `require` takes the configs of the pipeline ("") and of these `components`,
    as their JSON files have them. `stand_ins` are components that take the place of the pipeline's own when it is
    loaded here. `told_picture` says whether the network is told a picture with each prompt; by choice is one that makes
    pictures from text, and edits them where the run says so.
    """

    build: Callable[[Any], Family]
    require: Callable[[Configs], None]
    components: tuple[str, ...]
    reads_text: bool = True
    stand_ins: Callable[[], dict[str, Any]] = dict
    told_picture: Literal["never", "choice", "always"] = "never"


UNET = Kind(UnetFamily.from_pipeline, require_unet, ("unet", "scheduler", "vae"))
EXPERTS = ("transformer", "transformer_2", "scheduler", "vae")
TRANSFORMER = ("transformer", "scheduler", "vae")
FLUX2 = Kind(Flux2Family.from_pipeline, require_flux2, TRANSFORMER, told_picture="choice")
QWEN_EDIT = Kind(QwenImageEditFamily.from_pipeline, require_qwen_image_edit, TRANSFORMER, told_picture="always")
SANA = Kind(SanaFamily.from_pipeline, require_sana, TRANSFORMER)

FAMILIES: dict[str, Kind] = {
    "CogVideoXPipeline": Kind(CogVideoXFamily.from_pipeline, require_cogvideox, TRANSFORMER),
    "Cosmos2_5_PredictBasePipeline": Kind(
        CosmosFamily.from_pipeline, require_cosmos, TRANSFORMER, stand_ins=without_guardrail
    ),
    "DiTPipeline": Kind(DitFamily.from_pipeline, require_dit, TRANSFORMER, reads_text=False),
    "Flux2KleinPipeline": FLUX2,
    "Flux2Pipeline": FLUX2,
    "FluxKontextPipeline": Kind(FluxKontextFamily.from_pipeline, require_flux, TRANSFORMER, told_picture="always"),
    "FluxPipeline": Kind(FluxFamily.from_pipeline, require_flux, TRANSFORMER),
    "HunyuanVideoPipeline": Kind(HunyuanVideoFamily.from_pipeline, require_hunyuan_video, TRANSFORMER),
    "LTXPipeline": Kind(LtxFamily.from_pipeline, require_ltx, TRANSFORMER),
    "PixArtSigmaPipeline": Kind(PixArtFamily.from_pipeline, require_pixart, TRANSFORMER),
    "QwenImageEditPipeline": QWEN_EDIT,
    "QwenImageEditPlusPipeline": QWEN_EDIT,
    "QwenImagePipeline": Kind(QwenImageFamily.from_pipeline, require_qwen_image, TRANSFORMER),
    "SanaControlNetPipeline": SANA._replace(build=SanaControlFamily.from_pipeline),
    "SanaPipeline": SANA,
    "SanaSprintPipeline": SANA,
    "StableDiffusion3Pipeline": Kind(Sd3Family.from_pipeline, require_sd3, TRANSFORMER),
    "StableDiffusionPipeline": UNET,
    "StableDiffusionXLPipeline": UNET,
    "WanImageToVideoPipeline": Kind(WanImageFamily.from_pipeline, require_wan_image, EXPERTS, told_picture="always"),
    "WanPipeline": Kind(WanFamily.from_pipeline, require_wan, EXPERTS),
    "ZImagePipeline": Kind(ZImageFamily.from_pipeline, require_z_image, TRANSFORMER),
}


# Relatives of known pipelines, and why they are none of them.
TEXT_ALONE = "its network is told pictures beside the text, which its students would need in training, too; use {}"
RELATIVES = {
    **dict.fromkeys(
        ("FluxFillPipeline", "FluxControlPipeline"), TEXT_ALONE.format("FLUX.1-dev or schnell, or Kontext for editing")
    ),
    **dict.fromkeys(
        ("Cosmos2TextToImagePipeline", "Cosmos2VideoToWorldPipeline"),
        "its stock call repeats the last of its EDM sigmas, so that K steps are K - 1 and one step returns the noise, "
        "and it cannot noise a state again: no student of it could be called as it was trained; use Cosmos Predict 2.5",
    ),
    "Flux2KleinKVPipeline": "it keeps keys of pictures between its calls; use FLUX.2-klein",
    "QwenImageLayeredPipeline": TEXT_ALONE.format("Qwen-Image or Qwen-Image-Edit"),
    "ZImageOmniPipeline": TEXT_ALONE.format("Z-Image"),
    **dict.fromkeys(("WanVACEPipeline", "WanAnimatePipeline"), TEXT_ALONE.format("Wan text- or image-to-video")),
    **dict.fromkeys(
        ("LTXImageToVideoPipeline", "LTXConditionPipeline"),
        "its network is told a time for each frame and given frames, for which there is no family; use LTXPipeline",
    ),
    **dict.fromkeys(
        ("HunyuanVideoImageToVideoPipeline", "HunyuanSkyreelsImageToVideoPipeline"),
        TEXT_ALONE.format("HunyuanVideoPipeline"),
    ),
    **dict.fromkeys(
        ("CogVideoXImageToVideoPipeline", "CogVideoXVideoToVideoPipeline"), TEXT_ALONE.format("CogVideoXPipeline")
    ),
    **dict.fromkeys(
        ("HunyuanVideo15Pipeline", "HunyuanVideo15ImageToVideoPipeline", "LTX2Pipeline", "LTX2ImageToVideoPipeline"),
        "it is another network than its forerunner's, for which there is no family; use HunyuanVideoPipeline or "
        "LTXPipeline",
    ),
    "QwenImage21Pipeline": "it is another network than Qwen-Image's, for which there is no family; use Qwen-Image",
    **dict.fromkeys(
        ("FluxImg2ImgPipeline", "StableDiffusion3Img2ImgPipeline", "WanVideoToVideoPipeline"),
        "it starts the network of its text pipeline from a given state; name that pipeline in teacher.pipeline",
    ),
}


def build_family(pipeline: DiffusionPipeline) -> Family:
    """The family of a pipeline.

    Raises:
        ValueError: no family is known for its class, or the family cannot express its scheduler.
    """
    name = type(pipeline).__name__
    require_known_class(name)
    return FAMILIES[name].build(pipeline)


def configs_of(pipeline: DiffusionPipeline) -> dict[str, Mapping[str, Any]]:
    """The configs of a loaded pipeline, as its JSON files would have them."""
    found: dict[str, Mapping[str, Any]] = {"": pipeline.config}
    for name, component in pipeline.components.items():
        config = getattr(component, "config", None)
        if isinstance(config, Mapping):
            found[name] = {**config, "_class_name": type(component).__name__}
    return found


def config_components(name: str) -> tuple[str, ...]:
    """The components whose configs `require_teacher` reads for a class of pipelines."""
    return FAMILIES[name].components


def loading_arguments(name: str) -> dict[str, Any]:
    """Components with which a class of pipelines is loaded here, in the place of its own."""
    return FAMILIES[name].stand_ins() if name in FAMILIES else {}


def is_told_picture(name: str, *, chosen: bool) -> bool:
    """Whether networks of a class of pipelines are told a picture with each prompt; `chosen` where the settings say so.

    Raises ValueError where that is no choice.
    """
    kind = FAMILIES[name].told_picture
    if chosen and kind != "choice":
        known = ", ".join(sorted(other for other, one in FAMILIES.items() if one.told_picture == "choice"))
        raise ValueError(
            f"teacher.told_picture is set, and it is no choice of {name}: leave it out. It is one of {known}; models "
            "that always need a picture take it from data.pictures alone"
        )
    return chosen or kind == "always"


def text_components(name: str) -> tuple[str, ...]:
    """The components without which a class of pipelines reads no text."""
    return ("text_encoder", "tokenizer") if FAMILIES[name].reads_text else ()


def require_teacher(name: str, configs: Configs) -> None:
    """Raises ValueError for the configs of a pipeline that is no teacher: its family cannot call it as stock diffusers
    does, or it is a few-step student (which a family may well call)."""
    kind = FAMILIES[name]
    # Wan says itself which of its two networks it lacks.
    optional = ("transformer", "transformer_2") if "transformer_2" in kind.components else ()
    lost = [part for part in kind.components if part not in configs and part not in optional]
    if lost:
        raise ValueError(f"the pipeline has no {lost[0]} (null or malformed in model_index.json): a teacher needs it")
    kind.require(configs)


def require_known_class(name: str) -> None:
    """Raises ValueError for the class of a pipeline that no family is for, with the reason or those that are known."""
    if name in RELATIVES:
        raise ValueError(f"{name} is no teacher here: {RELATIVES[name]}")
    if name not in FAMILIES:
        raise ValueError(f"no family for the pipeline class {name}; known are {', '.join(sorted(FAMILIES))}")
