"""Regression on pairs: both distances against closed forms and the library's own, runs, and mistakes."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderTiny
from safetensors.torch import save_file
from torch import Tensor, nn
from torchmetrics.functional.image.lpips import _NoTrainLpips
from torchvision.models import vgg16

from fewstep.consistency.config import ConsistencyConfig, ConsistencyDataConfig
from fewstep.consistency.methods.pairs import pairs_step
from fewstep.consistency.sections import PairsConfig
from fewstep.consistency.train import train_consistency, train_step
from fewstep.core.export.run import export_run
from fewstep.core.networks.perceptual import PixelDistance, load_lpips, squared_distance
from fewstep.core.networks.tiny_vae import tiny_decoder
from fewstep.core.settings import GridStudentConfig, TeacherConfig
from fewstep.core.training.checkpoint import list_checkpoints, load_checkpoint
from tests.consistency.tiny_consistency_run import OPTIMIZER, start_consistency, tiny_consistency
from tests.dmd.tiny_run import TinyInputs, assert_same_checkpoint


@pytest.fixture(scope="module")
def trunk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random VGG-16 without its classifier, as the hub's file names it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        features: Any = vgg16(weights=None).features
    folder = tmp_path_factory.mktemp("vgg")
    save_file(
        {f"features.{name}": tensor for name, tensor in features.state_dict().items()}, folder / "model.safetensors"
    )
    return folder


@pytest.fixture(scope="module")
def tiny_vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("taesd")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        AutoencoderTiny(
            latent_channels=4,
            encoder_block_out_channels=(8, 8),
            decoder_block_out_channels=(8, 8),
            num_encoder_blocks=(1, 1),
            num_decoder_blocks=(1, 1),
            scaling_factor=0.5,
        ).save_pretrained(folder)
    return folder


def pairs_config(inputs: TinyInputs, directory: Path, settings: PairsConfig, **run: Any) -> ConsistencyConfig:
    plain = tiny_consistency(inputs, directory, "dcm", run)
    return dataclasses.replace(
        plain,
        dcm=None,
        pairs=settings,
        teacher=TeacherConfig(path=str(inputs.teacher)),
        data=ConsistencyDataConfig(prompts=str(inputs.prompts), latents=str(inputs.pairs), sample_count=2),
        student=GridStudentConfig(optimizer=OPTIMIZER, ema_decay=0.8, steps=1),
    )


def test_the_loss_is_the_mean_squared_error_and_its_gradient() -> None:
    generator = torch.Generator().manual_seed(0)
    x0, target = (torch.randn(3, 4, 2, 2, generator=generator, dtype=torch.float64) for _ in range(2))
    x0.requires_grad_()
    step = pairs_step(x0, target, squared_distance)
    torch.testing.assert_close(step.loss, (x0 - target).square().mean())
    (gradient,) = torch.autograd.grad(step.loss, x0)
    torch.testing.assert_close(gradient, 2 * (x0 - target).detach() / x0.numel())
    assert torch.equal(step.record["pair_distance"], step.loss.detach())
    with pytest.raises(ValueError, match="shape"):
        pairs_step(x0, target[:2], squared_distance)


@pytest.mark.parametrize("mean_pooling", [False, True])
def test_lpips_is_that_of_the_library_on_this_trunk(trunk: Path, mean_pooling: bool) -> None:
    """By hand: unit features of five layers, squared differences under the published weights, averaged and summed."""
    found: Any = load_lpips(trunk, mean_pooling=mean_pooling)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers: Any = vgg16(weights=None).features
    weights: Any = _NoTrainLpips(net="vgg", pnet_rand=True)
    first, second = (torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(n)) for n in (1, 2))

    def features(pixels: Tensor) -> list[Tensor]:
        shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
        x, maps = ((2 * pixels - 1) - shift[:, None, None]) / scale[:, None, None], []
        for number, layer in enumerate(layers[:30]):
            pooled = isinstance(layer, nn.MaxPool2d) and mean_pooling
            x = nn.functional.avg_pool2d(x, 2) if pooled else layer(x)
            if number in (3, 8, 15, 22, 29):
                maps.append(x / (x.square().sum(dim=1, keepdim=True).sqrt() + 1e-8))
        return maps

    with torch.no_grad():
        differences = [(a - b).square() for a, b in zip(features(first), features(second), strict=True)]
        heads = [weights.lins[number].model[-1].weight for number in range(5)]
        expected = sum(
            nn.functional.conv2d(gap, head).mean(dim=(1, 2, 3)) for gap, head in zip(differences, heads, strict=True)
        )
        assert isinstance(expected, Tensor)
        torch.testing.assert_close(found(first, second, normalize=True).flatten(), expected, rtol=1e-4, atol=1e-6)
        assert found(first, first, normalize=True).flatten().tolist() == [0.0, 0.0]
    assert not any(parameter.requires_grad for parameter in found.parameters())
    pools = {type(layer) for layer in found.net.modules() if "Pool" in type(layer).__name__}
    assert pools == {nn.AvgPool2d if mean_pooling else nn.MaxPool2d}


def test_gradients_pass_through_decoder_and_network_to_the_latents(trunk: Path, tiny_vae: Path) -> None:
    decode = tiny_decoder(str(tiny_vae), torch.device("cpu"))
    latents = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(3))
    stock: Any = AutoencoderTiny.from_pretrained(tiny_vae)
    with torch.no_grad():
        torch.testing.assert_close(decode(latents), stock.decode(latents / 0.5).sample / 2 + 0.5)
    distance = PixelDistance(load_lpips(trunk, mean_pooling=True), decode)
    x0 = latents.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(pairs_step(x0, latents.flip(0), distance).loss, x0)
    assert float(gradient.norm()) > 0
    assert pairs_step(latents, latents, distance).loss.item() == 0.0
    with pytest.raises(ValueError, match="pictures of 16 pixels or more"):
        distance(latents[..., :4, :4], latents[..., :4, :4])


@pytest.mark.slow
@pytest.mark.parametrize("metric", ["latent", "lpips"])
def test_a_run_learns_its_pairs_resumes_and_is_exported(
    inputs: TinyInputs, trunk: Path, tiny_vae: Path, tmp_path: Path, metric: Any
) -> None:
    pixels = {"lpips": str(trunk), "mean_pooling": True, "autoencoder": str(tiny_vae)} if metric == "lpips" else {}
    settings = PairsConfig(metric=metric, **pixels)
    config = pairs_config(inputs, tmp_path / "once", settings)
    setup, trainer = start_consistency(config)
    rows, _, condition = setup.real.rows([0, 1, 2, 3], trainer.device)
    noise = setup.real.noise(rows, trainer.device)
    assert setup.distance is not None
    with torch.no_grad():
        x0 = setup.student.sample(noise, condition)
        expected = setup.distance(x0, setup.real.dataset.latents[rows]).mean()
    first = train_step(config, setup, trainer)
    torch.testing.assert_close(torch.as_tensor(first["consistency_loss"]), expected, rtol=1e-4, atol=1e-6)
    losses = [float(first["consistency_loss"])]
    for _ in range(15):
        trainer.step = 0
        losses.append(float(train_step(config, setup, trainer)["consistency_loss"]))
    trainer.close()
    assert losses[-1] < 0.9 * losses[0]
    assert train_consistency(pairs_config(inputs, tmp_path / "straight", settings)) == 0
    assert train_consistency(pairs_config(inputs, tmp_path / "resumed", settings, steps=2)) == 0
    assert train_consistency(pairs_config(inputs, tmp_path / "resumed", settings, resume="latest")) == 0
    left, right = (load_checkpoint(list_checkpoints(tmp_path / name)[-1]) for name in ("straight", "resumed"))
    assert_same_checkpoint(left, right)
    _, record = export_run(tmp_path / "straight")
    assert (record.method, record.steps) == ("pairs", 1)
    assert record.verification is not None
    assert record.verification.sampler_difference < 1e-5


def test_mistakes_are_named(inputs: TinyInputs, trunk: Path, tmp_path: Path) -> None:
    plain = pairs_config(inputs, tmp_path, PairsConfig())
    with pytest.raises(ValueError, match=r"student\.steps is 2 .* set both to 1"):
        dataclasses.replace(plain, student=GridStudentConfig(optimizer=OPTIMIZER, steps=2))
    with pytest.raises(ValueError, match=r"teacher\.guidance 2\.0"):
        dataclasses.replace(plain, teacher=TeacherConfig(path=str(inputs.teacher), guidance=2.0))
    data = dataclasses.replace(plain.data, latents=str(inputs.latents))
    with pytest.raises(ValueError, match=r"data\.latents holds latents without noise"):
        start_consistency(dataclasses.replace(plain, data=data))
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"metric": "lpips"}, "'lpips' needs its weights"),
        ({"lpips": "x"}, "'latent' none"),
    ]
    for values, told in wrong:
        with pytest.raises(ValueError, match=told):
            PairsConfig(**values)
    with pytest.raises(ValueError, match="mean_pooling"):
        PairsConfig(mean_pooling=True)
    with pytest.raises(ValueError, match="cannot be read"):
        load_lpips(tmp_path / "none", mean_pooling=False)
    save_file({"features.0.weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="lacks 25 weights of VGG-16"):
        load_lpips(tmp_path / "other.safetensors", mean_pooling=False)
    with pytest.raises(ValueError, match=r"pairs\.autoencoder .* cannot be read"):
        tiny_decoder(str(trunk), torch.device("cpu"))
