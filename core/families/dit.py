"""DiT: transformers that are told a class and predict eps on a DDPM noise table (arXiv:2212.09748).

Legend: B batch, M image tokens; latents [B, 4, h, w].
"""

# diffusers annotates calls with types that are narrower than what they take.
# pyright: reportArgumentType=false

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from diffusers import DiTPipeline, DiTTransformer2DModel
from diffusers.models.embeddings import LabelEmbedding
from torch import Tensor

from fewstep.core.condition import Condition
from fewstep.core.families.family import Configs, network_dtype, require_pictures
from fewstep.core.families.parts.latents import require_scaling
from fewstep.core.families.parts.noise_table import TableFamily, noise_table, require_table

# What the stock call takes for no class, whatever the network's table.
NULL_CLASS = 1000


@dataclass(frozen=True)
class DitFamily(TableFamily):
    """DiT in canonical coordinates: half of the network's channels are eps, the rest a variance it learnt.

    A prompt is a class: its number, or its name where the pipeline knows names. The stock call draws its own noise and
    gives no latents, and it makes one size.

    Attributes:
        classes: numbers of the classes by their names.
    """

    classes: tuple[tuple[str, int], ...] = ()
    name: ClassVar[str] = "dit"
    probe_prompts: ClassVar[tuple[str, ...]] = ("207", "7")
    example_call: ClassVar[str] = "class_labels=[207]"
    lora_targets: ClassVar[tuple[str, ...]] = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2")

    @staticmethod
    def from_pipeline(pipeline: DiTPipeline) -> DitFamily:
        """The family of a pipeline that `require_dit` lets through."""
        return DitFamily(noise_table(pipeline.scheduler), "epsilon", classes=tuple(pipeline.labels.items()))

    def prepare_network(self, network: DiTTransformer2DModel) -> None:
        """Keep its labels: in training mode it would drop some of them at random."""
        for module in network.modules():
            if isinstance(module, LabelEmbedding):
                module.dropout_prob = 0.0

    def velocity(self, network: DiTTransformer2DModel, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """See `TableFamily`. Raises ValueError for a condition without labels."""
        if condition.labels is None:
            raise ValueError("DiT needs a class, and the condition has none: encode with its family")
        t = t.expand(x_t.shape[0])
        (x, time), dtype = self.network_input(x_t, t), network_dtype(network)
        output = network(x.to(dtype), timestep=time, class_labels=condition.labels, return_dict=False)[0]
        return self.velocity_of(output[:, : x_t.shape[1]].to(x_t.dtype), x_t, x, t)

    def encode_prompts(
        self, pipeline: DiTPipeline, prompts: list[str], *, height: int | None = None, width: int | None = None
    ) -> Condition:
        """The classes that the prompts name. Raises ValueError for one that is no class."""
        return Condition(labels=torch.tensor(self._numbers(prompts), device=pipeline.device))

    def _numbers(self, prompts: Sequence[str]) -> list[int]:
        known = dict(self.classes)
        found = []
        for prompt in prompts:
            text = prompt.strip()
            number = int(text) if text.isdecimal() else known.get(text, -1)
            if not 0 <= number < NULL_CLASS:
                examples = ", ".join(list(known)[:3]) or "no names here"
                raise ValueError(
                    f"the prompt {prompt!r} is no class: write its number, 0 to {NULL_CLASS - 1}, or its name "
                    f"({examples})"
                )
            found.append(number)
        return found

    def encode_null(self, pipeline: DiTPipeline, *, height: int | None = None, width: int | None = None) -> Condition:
        """No class."""
        return Condition(labels=torch.tensor([NULL_CLASS], device=pipeline.device))

    def latent_shape(
        self, pipeline: DiTPipeline, height: int | None, width: int | None, frames: int | None = None
    ) -> tuple[int, int, int]:
        """(C, h, w) of its one size. Raises ValueError for another."""
        require_pictures(self.name, frames)
        config = pipeline.transformer.config
        side, factor = config["sample_size"], 2 ** (len(pipeline.vae.config["block_out_channels"]) - 1)
        for name, given in (("height", height), ("width", width)):
            if given not in (None, side * factor):
                raise ValueError(f"{name} is {given}, and this DiT makes {side * factor} pixels alone")
        return config["in_channels"], side, side

    def call_arguments(
        self, pipeline: DiTPipeline, *, height: int | None = None, width: int | None = None, frames: int | None = None
    ) -> dict[str, Any]:
        """Nothing. Raises ValueError as `latent_shape`."""
        self.latent_shape(pipeline, height, width, frames)
        return {}

    def text_arguments(self, prompts: Sequence[str], *, guided: bool) -> dict[str, Any]:
        """Numbers of classes."""
        return {"class_labels": self._numbers(prompts)}

    def prompt_arguments(
        self, pipeline: DiTPipeline, condition: Condition, null: Condition | None
    ) -> dict[str, Any] | None:
        """Numbers of classes."""
        assert condition.labels is not None
        return {"class_labels": condition.labels.tolist()}

    def latent_arguments(self, pipeline: DiTPipeline, latents: Tensor, seed: int | Sequence[int]) -> dict[str, Any]:
        """The generator: the stock call takes no latents."""
        if isinstance(seed, int):
            return {"generator": torch.Generator().manual_seed(seed)}
        return {"generator": [torch.Generator().manual_seed(one) for one in seed]}

    def latent_call(self, pipeline: DiTPipeline, arguments: Mapping[str, Any]) -> Tensor:
        """What the stock call decodes, for it gives pixels alone."""
        vae: Any = pipeline.vae
        decode, kept = vae.decode, []

        def keeping(latents: Tensor, *positional: Any, **named: Any) -> Any:
            kept.append(latents * vae.config["scaling_factor"])
            return decode(latents, *positional, **named)

        vae.decode = keeping
        try:
            pipeline(**arguments, output_type="pt", return_dict=False)
        finally:
            del vae.decode
        return kept[0]


def require_dit(configs: Configs) -> None:
    """Raises ValueError for a DiT with another null class than the stock call's, or on another noise table."""
    network, scheduler = configs["transformer"], configs["scheduler"]
    require_table(scheduler, "DiT")
    prediction = scheduler.get("prediction_type", "epsilon")
    if prediction != "epsilon" or scheduler.get("rescale_betas_zero_snr"):
        raise ValueError(f"DiT predicts eps on a table that does not end in noise alone, got {prediction!r}")
    if network.get("num_embeds_ada_norm", NULL_CLASS) != NULL_CLASS:
        raise ValueError(
            f"the transformer knows {network.get('num_embeds_ada_norm')} classes, and the stock call takes "
            f"{NULL_CLASS} for none"
        )
    require_scaling(configs["vae"])
