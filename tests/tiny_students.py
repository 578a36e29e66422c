"""Students on the tiny pipelines, and their samplers written with stock parts alone, for the tests of exports."""

import torch
from torch import Tensor, nn

from fewstep.core.families.table import build_family
from fewstep.core.grids import step_grid
from fewstep.core.networks.lora import add_lora
from tests.tiny_pipelines import LATENT_SHAPE, build_sd3, build_sd15, build_sdxl

PROMPTS = ["a red house", "x"]
SEED = 11
UNIFORM = {1: (999,), 2: (999, 499), 4: (999, 749, 499, 249)}
BUILDERS = {
    "sd3": lambda: build_sd3(sd35=True),
    "sd3_t5": lambda: build_sd3(with_t5=True),
    "sd15": build_sd15,
    "sd15_v": lambda: build_sd15(prediction_type="v_prediction"),
    "sdxl": build_sdxl,
}


def student_network(name: str) -> nn.Module:
    """The teacher's network after some training, here noise on every weight."""
    pipeline = BUILDERS[name]()
    network = build_family(pipeline).network(pipeline)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return network


def student_times(name: str, steps: int, shift: float) -> tuple[float, ...]:
    """A grid of the student; U-Nets step on uniform table indices, whatever the shift."""
    if name.startswith("sd3"):
        return step_grid(steps, shift=shift)
    path = build_family(BUILDERS[name]()).path  # pyright: ignore[reportAttributeAccessIssue]
    return tuple(path.to_flow_time(torch.tensor(UNIFORM[steps], dtype=torch.float64)).tolist())


def draw(steps: int) -> tuple[Tensor, list[Tensor]]:
    """Latents, and what torch's global generator draws from `SEED` on."""
    latents = torch.randn((2, *LATENT_SHAPE), generator=torch.Generator().manual_seed(5))
    torch.manual_seed(SEED)
    return latents, [torch.randn((2, *LATENT_SHAPE)) for _ in range(steps)]


@torch.no_grad()
def stock_reference(name: str, network: nn.Module, times: tuple[float, ...], sampler: str) -> Tensor:
    """The student's sampler in the coordinates of its network, on stock embeddings, with nothing of this package."""
    pipeline = BUILDERS[name]()
    x, draws = draw(len(times))
    if name.startswith("sd3"):
        tokens, _, pooled, _ = pipeline.encode_prompt(PROMPTS, None, None, do_classifier_free_guidance=False)
        coefficients = [(1 - t, t) for t in times]
        positions = [1000 * t for t in times]
        extra = {"pooled_projections": pooled, "encoder_hidden_states": tokens}
    else:
        table = pipeline.scheduler.alphas_cumprod.double()
        positions = list(UNIFORM[len(times)])
        coefficients = [(table[i].sqrt().item(), (1 - table[i]).sqrt().item()) for i in positions]
        extra = {}
        if name == "sdxl":
            tokens, _, pooled, _ = pipeline.encode_prompt(PROMPTS, do_classifier_free_guidance=False)
            sizes = torch.tensor([[16, 16, 0, 0, 16, 16]]).expand(2, -1)
            extra = {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": sizes}}
        else:
            tokens, _ = pipeline.encode_prompt(PROMPTS, "cpu", 1, do_classifier_free_guidance=False)
        extra["encoder_hidden_states"] = tokens
    for i, ((alpha, sigma), position) in enumerate(zip(coefficients, positions, strict=True)):
        output = network(x, timestep=torch.tensor([float(position)] * 2), return_dict=False, **extra)[0]
        if name.startswith("sd3"):
            x0, eps = x - sigma * output, x + alpha * output
        elif name == "sd15_v":
            x0, eps = alpha * x - sigma * output, sigma * x + alpha * output
        else:
            x0, eps = (x - sigma * output) / alpha, output
        alpha, sigma = coefficients[i + 1] if i + 1 < len(times) else (1.0, 0.0)
        x = alpha * x0 + sigma * (draws[i] if sampler == "sde" else eps)
    return x


def lora_student(name: str) -> nn.Module:
    """The teacher's network with adapters that do something."""
    pipeline = BUILDERS[name]()
    family = build_family(pipeline)
    network = family.network(pipeline)
    add_lora(network, rank=4, alpha=8.0, targets=family.lora_targets, seed=0)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for key, parameter in network.named_parameters():
            if "lora_B" in key:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return network
