"""FastGen's discriminator on videos: its layers, its dropout, and the steps that train it on a tiny Wan."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.core.config import OptimizerConfig
from fewstep.core.data import LatentDataset
from fewstep.core.discriminator import DiscriminatorHeads
from fewstep.core.randomness import Draw, sample_noise
from fewstep.core.teacher import Teacher
from fewstep.core.training.checkpoint import list_checkpoints, load_checkpoint
from fewstep.dmd.config import GanConfig
from fewstep.dmd.matching import heads_step
from fewstep.dmd.multi_scale_head import MultiScaleHead
from fewstep.dmd.train import train_dmd, train_step
from tests.dmd.tiny_run import TinyInputs, assert_same_checkpoint, start, tiny_config
from tests.tiny_pipelines import build_sd3, save_pipeline
from tests.tiny_videos import build_video_pipeline

HEADS: dict[str, Any] = {
    "features": "teacher",
    "optimizer": OptimizerConfig(learning_rate=1e-3),
    "head": "multiscale",
    "head_width": 8,
    "scales": (1, 2),
    "dropout": 0.25,
    "same_noise": True,
}


def head(**values: Any) -> MultiScaleHead:
    generator = torch.Generator().manual_seed(0)
    given = {"patch": 2, "scales": (1, 2), "width": 6, "dropout": 0.5, **values}
    return MultiScaleHead(32, (3, 4, 4), generator=generator, **given)


def test_a_head_has_a_branch_for_each_scale_and_starts_at_chance() -> None:
    """Of 32 channels on 4 x 4 tokens of 2 x 2 it makes 8 channels on 8 x 8."""
    found = head(scales=(1, 2, 3))
    convolutions = [layer for layer in found.modules() if isinstance(layer, nn.Conv3d)]
    kernels = [tuple(layer.kernel_size) for layer in convolutions]
    assert kernels == [(1, 1, 1), (3, 3, 3)] * 3
    assert {(layer.in_channels, layer.out_channels) for layer in convolutions} == {(8, 8)}
    assert [layer.kernel_size for layer in found.modules() if isinstance(layer, nn.AvgPool3d)] == [2, 3]
    assert found.hidden.in_features == 24
    logits = found(torch.randn(2, 32, 48))
    assert logits.tolist() == [0.0, 0.0]
    assert all(torch.equal(a, b) for a, b in zip(head().parameters(), head().parameters(), strict=True))


def test_tokens_are_laid_out_as_the_network_lays_out_its_last_layer() -> None:
    """Channel c of pixel (2 h + i, 2 w + j) is number (2 i + j) C / 4 + c of token (h, w)."""
    found, seen = head(scales=(1,)), []
    found.branches[0].register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    features = torch.randn(1, 32, 48, generator=torch.Generator().manual_seed(1))
    found(features)
    (maps,) = seen
    assert maps.shape == (1, 8, 3, 8, 8)
    for frame, h, w, i, j, channel in ((0, 0, 0, 0, 0, 0), (2, 3, 1, 1, 0, 5), (1, 2, 3, 0, 1, 7)):
        token = frame * 16 + h * 4 + w
        assert maps[0, channel, frame, 2 * h + i, 2 * w + j] == features[0, (i * 2 + j) * 8 + channel, token]


def test_dropout_is_that_of_the_noise_and_keeps_the_mean() -> None:
    found = head()
    with torch.no_grad():
        found.logit.weight.fill_(1.0)
        found.hidden.weight.zero_()
        found.hidden.bias.fill_(1.0)
    features = torch.randn(4000, 32, 48, generator=torch.Generator().manual_seed(2))[:, :, :48]
    noise = torch.randn(4000, 6, generator=torch.Generator().manual_seed(3))
    plain, dropped = found(features[:8]), found(features, noise)
    torch.testing.assert_close(plain, torch.full((8,), 6.0))
    kept = (torch.special.ndtr(noise) >= 0.5).sum(dim=1)
    torch.testing.assert_close(dropped, 2.0 * kept)
    assert float(dropped.detach().mean()) == pytest.approx(6.0, abs=0.2)
    assert torch.equal(found(features[5:6], noise[5:6]), dropped[5:6])


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("wan")
    model = save_pipeline(build_video_pipeline(text_tokens=8), folder / "model")
    shape = Teacher.load(model).latent_shape(height=32, width=32, frames=5)
    LatentDataset(sample_noise(9, range(5), shape, stream="data"), tuple("abcde")).save(folder / "data")
    return model, folder / "data"


def settings(wan: tuple[Path, Path], **values: Any) -> dict[str, Any]:
    size = {"data.height": 32, "data.width": 32, "data.frames": 5, "student.steps": 2, "student.shift": 5.0}
    gan = GanConfig(latents=str(wan[1]), weight=0.03, **{**HEADS, **values})
    return {"teacher.path": str(wan[0]), **size, "student.sampler": "ode", "fake_score.ratio": 1, "gan": gan}


def test_each_block_is_judged_by_itself_and_dropout_is_the_samples(
    inputs: TinyInputs, wan: tuple[Path, Path], tmp_path: Path
) -> None:
    config = tiny_config(inputs, tmp_path / "run", settings(wan, blocks=(0, 1)))
    setup, trainer = start(config)
    assert setup.judge is not None
    assert isinstance(setup.judge.heads, DiscriminatorHeads)
    with torch.no_grad():
        for number, parameter in enumerate(setup.judge.heads.parameters()):
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)))
    draw = Draw(3, [0, 1, 2, 3], trainer.device)
    condition = setup.prompts.rows([0, 1, 2, 3])
    x0, real = draw.noise(setup.latent_shape, "x0"), draw.noise(setup.latent_shape, "real")
    with torch.no_grad():
        assert setup.judge(x0, torch.full((4,), 0.4), condition).shape == (4, 2)

    def loss(rows: list[int]) -> Tensor:
        assert config.gan is not None
        assert setup.judge is not None
        given = setup.prompts.rows(rows)
        return heads_step(
            x0[rows],
            given,
            (real[rows], given),
            judge=setup.judge,
            draw=Draw(3, rows, trainer.device),
            times=config.matching,
            clock=setup.teacher.family,
            gan=config.gan,
        )

    with torch.no_grad():
        halves = (loss([0, 1]) + loss([2, 3])) / 2
        torch.testing.assert_close(loss([0, 1, 2, 3]), halves, rtol=1e-4, atol=1e-5)
    before = torch.cat([p.detach().flatten() for p in setup.judge.heads.parameters()])
    metrics = [train_step(config, setup, trainer) for _ in range(2)]
    trainer.close()
    assert all(bool(torch.isfinite(torch.as_tensor(value)).all()) for record in metrics for value in record.values())
    assert not torch.equal(torch.cat([p.detach().flatten() for p in setup.judge.heads.parameters()]), before)


@pytest.mark.slow
def test_such_a_run_resumes_exactly(inputs: TinyInputs, wan: tuple[Path, Path], tmp_path: Path) -> None:
    changes = settings(wan)
    assert train_dmd(tiny_config(inputs, tmp_path / "straight", changes)) == 0
    assert train_dmd(tiny_config(inputs, tmp_path / "resumed", {**changes, "run.steps": 2})) == 0
    assert train_dmd(tiny_config(inputs, tmp_path / "resumed", {**changes, "run.resume": "latest"})) == 0
    left, right = (load_checkpoint(list_checkpoints(tmp_path / name)[-1]) for name in ("straight", "resumed"))
    assert_same_checkpoint(left, right)
    assert any("branches" in name for name in left.tensors["discriminator"])


def test_what_does_not_fit_is_named(inputs: TinyInputs, wan: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"gan\.scales \[1, 2, 4\] on features of 2 x \d+ x \d+ with \d+ channels"):
        start(tiny_config(inputs, tmp_path / "run", settings(wan, scales=(1, 2, 4))))
    folder = save_pipeline(build_sd3(), tmp_path / "sd3")
    gan = GanConfig(latents=str(inputs.latents), weight=0.1, **HEADS)
    with pytest.raises(ValueError, match=r"'multiscale' reads features as videos"):
        start(tiny_config(inputs, tmp_path / "run", {"teacher.path": str(folder), "gan": gan}))
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"head": "mlp", "scales": (1, 2)}, r"scales is \(1, 2\), which nothing reads"),
        ({"head": "mlp", "dropout": 0.1}, "dropout is 0.1, which nothing reads"),
        ({"features": "fake_score", "optimizer": None}, "dropout is 0.25, which nothing reads"),
        ({"dropout": 1.0}, r"dropout is 1\.0; it must lie in \[0, 1\)"),
        ({"scales": ()}, r"scales is \[\]"),
        ({"scales": (2, 2)}, r"scales is \[2, 2\]"),
    ]
    for values, told in wrong:
        rest = {
            key: value
            for key, value in HEADS.items()
            if values.get("head") != "mlp" or key not in ("scales", "dropout")
        }
        with pytest.raises(ValueError, match=told):
            GanConfig(latents="latents", weight=0.1, **{**rest, **values})
