"""Controls in the layers of a network, and guidance for text and controls apart: closed forms, runs, exports."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch import Tensor, nn

from fewstep.causal_video.cache.rolling import RollingCache
from fewstep.causal_video.denoise import VideoCondition
from fewstep.causal_video.export.pipeline import export_causal_run
from fewstep.causal_video.layout import ChunkLayout
from fewstep.causal_video.model.calls import chunk_call, packed_call, whole_call
from fewstep.causal_video.model.controls import FrameControls, add_features, features_of, with_controls
from fewstep.causal_video.model.masks import block_causal, teacher_forcing
from fewstep.causal_video.model.network import CausalWan
from fewstep.causal_video.policy import KEEP_ALL
from fewstep.causal_video.settings import CausalSettings
from fewstep.causal_video.stages.forcing import drop_controls
from fewstep.causal_video.stages.sampling import Sides, euler_rollout
from fewstep.causal_video.stages.train import train_causal_video
from fewstep.causal_video.stream.pipeline import CausalVideoPipeline
from fewstep.causal_video.stream.world import spread
from fewstep.core.condition import Condition
from fewstep.core.denoiser import guided_velocity
from fewstep.core.randomness import Draw
from fewstep.core.training.checkpoint import list_checkpoints, load_checkpoint
from tests.causal_video.tiny_causal import FRAME_TOKENS, build_student, largest, latents, noise, text
from tests.causal_video.tiny_causal_run import VideoInputs, start_causal, tiny_causal
from tests.dmd.tiny_run import assert_same_checkpoint

NAMES = ("left", "right")
LAYOUT = ChunkLayout((1, 2, 2, 2))


def told_student(seed: int = 0) -> CausalWan:
    """A random student that is told two numbers of each frame in its layers."""
    student = build_student(seed=seed)
    features = add_features(student.transformer, 2)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed + 7)
        for parameter in features.parameters():
            parameter.normal_()
    student.double()
    return student.requires_grad_(False)


def controls(seed: int = 0) -> Tensor:
    """[2, 2, 7, 4, 4], the same all over a frame."""
    generator = torch.Generator().manual_seed(seed)
    return spread(torch.randn(2, 2, 7, generator=generator, dtype=torch.float64), 4, 4)


def test_zeros_tell_nothing_and_a_frame_sees_its_own() -> None:
    plain, told = build_student().requires_grad_(False), told_student()
    x, t, values = latents(), torch.tensor([0.3, 0.8], dtype=torch.float64), controls()
    mask = block_causal(LAYOUT, FRAME_TOKENS)
    assert (plain.extra_channels, told.extra_channels) == (0, 2)
    silent = told.causal(x, t, text(), mask=mask, extra=torch.zeros_like(values))
    assert largest(silent, plain.causal(x, t, text(), mask=mask)) < 1e-13
    found = told.causal(x, t, text(), mask=mask, extra=values)
    assert largest(found, silent) > 1e-2
    # Controls of the third chunk move it and the one after it, and nothing before.
    later = values.clone()
    later[:, :, 3:5] += 1.0
    moved = (told.causal(x, t, text(), mask=mask, extra=later) - found).abs().amax(dim=(0, 1, 3, 4))
    assert float(moved[:3].max()) == 0
    assert float(moved[3:].min()) > 1e-4
    with pytest.raises(ValueError, match="takes 6 channels, 4 of latents and 2 of conditioning"):
        told.causal(x, t, text(), mask=mask)


def test_training_and_stream_are_told_the_same() -> None:
    told, values = told_student(), controls()
    clean, noisy, t = latents(seed=1), latents(seed=2), torch.tensor([0.7, 0.4], dtype=torch.float64)
    mask = teacher_forcing(LAYOUT, FRAME_TOKENS)
    packed = told(packed_call(clean, noisy, t, text(), mask=mask, extra=values)).velocity
    cache = RollingCache.empty(LAYOUT, KEEP_ALL)
    for chunk in range(4):
        part = slice(LAYOUT.start(chunk), LAYOUT.end(chunk))
        call = chunk_call(noisy[:, :, part], t, text(), cache.read(), extra=values[:, :, part])
        assert largest(told(call).velocity, packed[:, :, part]) < 1e-12
        zero = torch.zeros_like(t)
        kept = told.append(clean[:, :, part], zero, text(), cache.read(), extra=values[:, :, part]).keys_values
        assert kept is not None
        cache = cache.commit(kept)


class Additive(nn.Module):
    """v = x + a text + b control + c text control, in numbers: the last term is what is not independent."""

    def forward(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        assert condition.control is not None
        words, told = condition.text.mean(dim=(1, 2)), condition.control.mean(dim=(1, 2, 3))
        return x + (2 * words + 3 * told + 5 * words * told).view(-1, 1, 1, 1, 1)


def test_guidance_of_text_and_controls_apart() -> None:
    x, t = torch.zeros(2, 1, 3, 2, 2, dtype=torch.float64), torch.tensor([0.5, 0.5], dtype=torch.float64)
    plain = Condition(torch.full((2, 1, 1), 0.5, dtype=torch.float64))
    condition = with_controls(plain, torch.full((2, 1, 3, 2, 2), 0.25, dtype=torch.float64))
    null = Condition(torch.zeros(1, 1, 1, dtype=torch.float64))
    # v(0, 0) = 0, v(c, 0) = 1, v(c, k) = 1 + 0.75 + 0.625.
    for guidance, told, expected in ((3.0, 2.0, 3 + 2 * 1.375), (1.0, 2.0, 1 + 2 * 1.375), (3.0, 0.0, 3.0)):
        found = guided_velocity(Additive(), x, t, condition, null, guidance, control_guidance=told)
        assert largest(found, torch.full_like(found, expected)) < 1e-12
    # Without it both sides have the controls.
    shared = guided_velocity(Additive(), x, t, condition, null, 3.0)
    assert largest(shared, torch.full_like(shared, 0.75 + 3 * (1 + 0.625))) < 1e-12
    # And where a condition has none, there is nothing to guide.
    assert torch.equal(
        guided_velocity(Bare(), x, t, plain, null, 3.0, control_guidance=2.0),
        guided_velocity(Bare(), x, t, plain, null, 3.0),
    )


class Bare(nn.Module):
    def forward(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return x + condition.text.mean(dim=(1, 2)).view(-1, 1, 1, 1, 1)


@pytest.mark.parametrize(("guidance", "told"), [(1.0, None), (2.5, None), (1.0, 3.0), (2.5, 3.0)])
def test_many_step_samples_have_a_cache_for_each_side(guidance: float, told: float | None) -> None:
    """The sides of a sample are those of `guided_velocity` on one chunk that sees no other."""
    student, values, null = told_student(), controls(), text(1, seed=9)
    settings = CausalSettings(ChunkLayout((7,)))
    condition = VideoCondition(text(), extra=values)
    how: dict[str, Any] = {"times": (1.0, 0.5), "guidance": guidance, "null_text": null, "control_guidance": told}
    found = euler_rollout(student, condition, noise(), settings, **how)

    class Whole(nn.Module):
        def forward(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
            assert condition.control is not None
            extra = condition.control.view(len(x), 2, 7, 4, 4)
            return student(whole_call(x, t, condition.text, extra=extra)).velocity

    x, asked = noise().draw(0, 0, 7, text()), with_controls(Condition(text()), values)
    for t, t_next in ((1.0, 0.5), (0.5, 0.0)):
        time = torch.full((2,), t, dtype=torch.float64)
        velocity = guided_velocity(Whole(), x, time, asked, Condition(null), guidance, control_guidance=told)
        x = x + (t_next - t) * velocity
    assert largest(found, x) < 1e-12
    assert Sides(guidance, told).count == 1 + (guidance != 1) + (told is not None)


def test_controls_are_dropped_apart_from_captions() -> None:
    draw = Draw(0, list(range(400)), torch.device("cpu"))
    condition = with_controls(Condition(torch.ones(400, 1, 1)), torch.ones(400, 1, 2, 1, 1))
    dropped = drop_controls(condition, draw, 0.25)
    assert dropped.control is not None
    assert float(dropped.control.mean()) == pytest.approx(0.75, abs=0.06)
    assert torch.equal(dropped.text, condition.text)
    assert drop_controls(condition, draw, 0.0) is condition


@pytest.fixture(scope="module")
def told_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two controls of five videos of three frames."""
    values = torch.rand(5, 2, 3, generator=torch.Generator().manual_seed(2))
    return FrameControls(values, NAMES).save(tmp_path_factory.mktemp("controls"))


def in_layers(told_file: Path, **changes: Any) -> dict[str, Any]:
    return {"data.controls": str(told_file), "student.controls_in": "layers", **changes}


@pytest.fixture(scope="module")
def told_run(inputs: VideoInputs, told_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four steps of teacher forcing with controls in the layers."""
    folder = tmp_path_factory.mktemp("told") / "run"
    changes = in_layers(told_file, **{"teacher_forcing.control_drop": 0.3, "data.control_guidance": 2.0})
    assert train_causal_video(tiny_causal(inputs, folder, "teacher_forcing", changes)) == 0
    return folder


def test_a_run_is_resumed_exactly_and_exported(
    inputs: VideoInputs, told_file: Path, told_run: Path, tmp_path: Path
) -> None:
    for changes in ({"run.steps": 2}, {"run.resume": "latest"}):
        given = in_layers(told_file, **{"teacher_forcing.control_drop": 0.3, "data.control_guidance": 2.0}, **changes)
        assert train_causal_video(tiny_causal(inputs, tmp_path / "run", "teacher_forcing", given)) == 0
    left, right = (load_checkpoint(list_checkpoints(folder)[-1]) for folder in (told_run, tmp_path / "run"))
    assert_same_checkpoint(left, right)
    moved = left.tensors["student"]["transformer.frame_features.layers.1.weight"]
    assert 1e-5 < float(moved.abs().max()) < 1e-1
    output, record = export_causal_run(told_run, tmp_path / "export", steps=[2, 1])
    assert record.verification.sampler_difference < 1e-6
    assert record.stock_difference < 1e-5
    pipe = CausalVideoPipeline.from_pretrained(output)
    made = {action: pipe.open("a red cat").step(action).latents for action in ("none", *NAMES)}
    assert largest(made["left"], made["right"]) > 1e-6
    # Diffusers opens it as the network without.
    stock = WanTransformer3DModel.from_pretrained(output / "transformer")
    assert features_of(stock) is None
    half, kept = export_causal_run(told_run, tmp_path / "half", steps=[1], dtype="bfloat16")
    assert kept.verification.rounding_difference > 0
    features = features_of(CausalVideoPipeline.from_pretrained(half, dtype=torch.bfloat16).network.transformer)
    assert features is not None
    assert features.layers[0].weight.dtype == torch.bfloat16


@pytest.mark.slow
@pytest.mark.parametrize("adapters", [False, True])
def test_later_stages_go_on(
    inputs: VideoInputs, told_file: Path, told_run: Path, tmp_path: Path, adapters: bool
) -> None:
    """Consistency under guidance of both, with a smoothed time, then self-forcing judged by a teacher with the same."""
    rank = {"student.lora_rank": 2} if adapters else {}
    init = {"student.init": str(told_run), "data.control_guidance": 2.0}
    scm = {} if adapters else {"tf_scm.time_smoothing": 0.01}
    first = tiny_causal(inputs, tmp_path / "scm", "tf_scm", in_layers(told_file, **init, **rank, **scm))
    assert train_causal_video(first) == 0
    held = load_checkpoint(list_checkpoints(tmp_path / "scm")[-1]).tensors["student"]
    assert "transformer.frame_features.layers.0.weight" in held
    _, record = export_causal_run(tmp_path / "scm")
    assert record.verification.sampler_difference < 1e-6
    judge = {"student.layout": (3,), "run.steps": 1}
    judging = tiny_causal(inputs, tmp_path / "judge", "diffusion_forcing", in_layers(told_file, **judge))
    assert train_causal_video(judging) == 0
    forced = {"self_forcing.steered_teacher": str(tmp_path / "judge"), "data.control_guidance": 3.0}
    init = {"student.init": str(tmp_path / "scm" / "export")}
    config = tiny_causal(inputs, tmp_path / "forced", "self_forcing", in_layers(told_file, **forced, **init, **rank))
    assert train_causal_video(config) == 0
    again = {**forced, **init, **rank}
    setup, trainer = start_causal(
        tiny_causal(inputs, tmp_path / "again", "self_forcing", in_layers(told_file, **again))
    )
    trainer.close()
    x, t = torch.randn(2, 4, 3, 8, 8), torch.tensor([0.3, 0.6])
    asked = setup.controlled(setup.prompts.rows([0, 1]), [0, 1])
    with torch.no_grad():
        off = asked.with_control(torch.zeros_like(asked.control))  # pyright: ignore[reportArgumentType]
        null = setup.teacher.null_condition.expand(2).of_same_samples(off)
        told, plain, none = (setup.teacher.denoiser(x, t, each) for each in (asked, off, null))
        found = setup.teacher.velocity(x, t, asked, 2.0)
    assert largest(found, none + 2.0 * (plain - none) + 3.0 * (told - plain)) < 1e-5


def test_mistakes_are_named(inputs: VideoInputs, told_file: Path, tmp_path: Path) -> None:
    cases: list[tuple[str, dict[str, Any], str]] = [
        ("teacher_forcing", {"student.controls_in": "layers"}, "controls_in 'layers' or control_drop without data"),
        ("teacher_forcing", {"teacher_forcing.control_drop": 0.1}, "or control_drop without data.controls"),
        ("teacher_forcing", {"data.control_guidance": 2.0}, "control_guidance is 2.0; it is a finite number beside"),
        ("self_forcing_asd", in_layers(told_file), "controls_in 'layers' with asd or gan"),
    ]
    for case, changes, message in cases:
        with pytest.raises(ValueError, match=message):
            tiny_causal(inputs, tmp_path / "run", case, changes)
    # Weights that know no controls: the layers that would be told them are missing, and named.
    config = tiny_causal(inputs, tmp_path / "run", "tf_dcm", in_layers(told_file))
    with pytest.raises(ValueError, match=r"3 weights missing .*frame_features"):
        start_causal(config)
    values = torch.rand(5, 2, 3, 8, 8)
    places = FrameControls(values, NAMES).save(tmp_path / "places")
    with pytest.raises(ValueError, match="one number for a whole frame"):
        start_causal(tiny_causal(inputs, tmp_path / "run", "teacher_forcing", in_layers(places)))
