"""Flow maps on clean context, in float64: at rest at the exact map of a process, and what each loss looks at."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.causal_video.export.pipeline import export_causal_run
from fewstep.causal_video.layout import ChunkLayout
from fewstep.causal_video.model import masks
from fewstep.causal_video.model.calls import CallOutput
from fewstep.causal_video.policy import CachePolicy
from fewstep.causal_video.stages.batch import CausalTeacher, ForcingNetworks, VideoBatch
from fewstep.causal_video.stages.config import FlowMapStage, JointConfig
from fewstep.causal_video.stages.flow_map import tf_flow_map_step
from fewstep.causal_video.stages.sections import TfAnyflowConfig, TfDcmConfig, TfMeanflowConfig
from fewstep.causal_video.stages.train import train_causal_video
from fewstep.core.condition import Condition
from fewstep.core.paths import add_noise, expand_time
from fewstep.core.randomness import Draw
from fewstep.core.training.checkpoint import list_checkpoints, load_checkpoint
from fewstep.core.two_time import SecondTime, add_second_time, second_time_of
from tests.causal_video.stages.test_stages_steps import AutoregressiveGaussian, autoregressive, batch_of, networks_of
from tests.causal_video.tiny_causal import build_student, largest, latents, text
from tests.causal_video.tiny_causal_run import VideoInputs, start_causal, tiny_causal, with_teacher

A, COUNT = 0.8, 64
MEAN = TfMeanflowConfig(time_mean=0.0, time_std=1.0, equal_share=0.25)
SQUARE = dataclasses.replace(MEAN, power=0.0)
ANY = TfAnyflowConfig(pairs="partition", pair_shift=1.0)
NO_TEACHER: Any = None


def mean_and_variance(call: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Noisy half [B, 1, F, h, w], and mean and variance of a frame given the clean one before it."""
    frames = call.skip
    clean, noisy = call.x[:, :, :frames], call.x[:, :, frames:]
    variance = torch.full((1, 1, frames, 1, 1), 1 - A**2, dtype=noisy.dtype)
    variance[:, :, 0] = 1.0
    return noisy, A * torch.cat([torch.zeros_like(clean[:, :, :1]), clean[:, :, :-1]], dim=2), variance


class ExactMap(AutoregressiveGaussian):
    """u(x_t, t, r) = (x_t - x_r) / (t - r) of that process: x_r = m_r + sqrt(V_r / V_t) (x_t - m_t); `off` is added."""

    def __init__(self, a: float, off: float = 0.0) -> None:
        super().__init__(a)
        self.off = off

    def forward(self, call: Any) -> CallOutput:
        if call.r is None:
            return super().forward(call)
        noisy, mean, variance = mean_and_variance(call)
        t, r = (expand_time(time[:, call.skip :], noisy) for time in (call.t, call.r))
        total, left = ((1 - time).square() * variance + time.square() for time in (t, r))
        gap = torch.where(t == r, 1.0, t - r)
        # (1 - q) / (t - r) for q = sqrt(V_r / V_t), without the difference of nearly equal numbers: V_t - V_r is
        # (t - r) ((t + r) (1 + s^2) - 2 s^2).
        slope = ((t + r) * (1 + variance) - 2 * variance) / (total * (1 + (left / total).sqrt()))
        # x_t - x_r = (x_t - m_t) (1 - q) + m_t - m_r, and the means fall by (t - r) a x_before.
        found = slope * (noisy - (1 - t) * mean) - mean
        return CallOutput(found + self.off * torch.where(t == r, 0.0, gap), None)


def process() -> tuple[VideoBatch, Draw, ChunkLayout]:
    x0 = autoregressive(COUNT, A)
    draw = Draw(1, list(range(COUNT)), torch.device("cpu"))
    eps = draw.noise((1, 5, 2, 2), "eps").double()
    batch = VideoBatch(x0, eps, Condition(torch.zeros(COUNT, 1, 1)), x0, None, None, 0)
    return batch, draw, ChunkLayout.uniform(5, 1)


def loss_of(network: Any, stage: FlowMapStage) -> dict[str, float]:
    """What a step records with this student and the exact causal teacher."""
    batch, draw, layout = process()
    mask, causal = masks.teacher_forcing(layout, 1), masks.block_causal(layout, 1)
    teacher: Any = AutoregressiveGaussian(A)
    networks = ForcingNetworks(
        network, network, layout, mask, causal, CausalTeacher(teacher, Condition(torch.zeros(1, 1, 1)), 1.0)
    )
    found = tf_flow_map_step(batch, networks, draw=draw, stage=stage, teacher=NO_TEACHER, guidance=1.0)
    return {"loss": float(found.loss), **{name: float(value) for name, value in found.record.items()}}


@pytest.mark.parametrize("stage", [MEAN, ANY], ids=["tf_meanflow", "tf_anyflow"])
def test_the_exact_map_of_an_autoregressive_gaussian_has_no_error(stage: FlowMapStage) -> None:
    exact, off = loss_of(ExactMap(A), stage), loss_of(ExactMap(A, off=0.05), stage)
    # Times are drawn in fp32.
    assert exact["flow_error_equal"] < 1e-13
    assert exact["flow_error_apart"] < 1e-13
    assert off["flow_error_equal"] < 1e-13
    # du/dt of the added off (t - r) is off: the target is off by -(t - r) off, the map by (t - r) off.
    assert off["flow_error_apart"] > 1e-5


def test_the_error_of_a_map_that_is_off_is_known() -> None:
    """An added c (t - r) is off by 2 c (t - r) from its target, in each of the 20 numbers of a sample."""
    stage, draw = dataclasses.replace(SQUARE, equal_share=0.0), process()[1]
    times = [torch.sigmoid(draw.noise((), name)).double() for name in ("consistency_time", "flow_second_time")]
    gap = (times[0] - times[1]).abs()
    expected = float((20 * (2 * 0.05 * gap).square()).mean())
    assert loss_of(ExactMap(A, off=0.05), stage)["loss"] == pytest.approx(expected, rel=1e-5)


def two_time_networks(kind: SecondTime = "gate") -> tuple[Any, ForcingNetworks]:
    """A random student of two times on the shared batch, and the causal teacher that it starts from."""
    student = build_student()
    add_second_time(student.transformer, kind)
    layers = second_time_of(student.transformer)
    assert layers is not None
    with torch.no_grad():
        for parameter in layers.second.parameters():
            parameter.add_(0.1)
    student.double()
    return student, networks_of(student, build_student(seed=5).requires_grad_(False))


@pytest.mark.parametrize("stage", [SQUARE, dataclasses.replace(ANY, tangent="central")], ids=["tf_meanflow", "central"])
def test_a_given_frame_does_not_count_and_gradients_reach_all(stage: FlowMapStage) -> None:
    student, networks = two_time_networks()
    draw = Draw(3, [0, 2], torch.device("cpu"))

    def loss(batch: VideoBatch) -> Tensor:
        return tf_flow_map_step(batch, networks, draw=draw, stage=stage, teacher=NO_TEACHER, guidance=1.0).loss

    loss(batch_of()).backward()
    assert [name for name, p in student.named_parameters() if p.grad is None] == []
    batch = batch_of(image=True)
    eps = batch.eps.clone()
    eps[:, :, 0] += 1.0
    given, other = loss(batch), loss(dataclasses.replace(batch, eps=eps))
    assert float(given.detach()) == pytest.approx(float(other.detach()), rel=1e-12)
    assert float(given.detach()) != pytest.approx(float(loss(batch_of()).detach()))


class Unconditional:
    """What a step reads of a teacher."""

    null_condition = Condition(text(1, seed=8))


def test_a_given_frame_has_no_velocity_under_guidance_of_the_data() -> None:
    """The target of a given frame is zero whatever guides it: what is asked of the network there changes nothing."""
    _, networks = two_time_networks()
    stage = dataclasses.replace(SQUARE, velocity="data")
    draw, teacher = Draw(3, [0, 2], torch.device("cpu")), Unconditional()
    batch = batch_of(image=True)

    class Louder(nn.Module):
        """The student, with another velocity of the given frame."""

        def forward(self, call: Any) -> CallOutput:
            output = networks.student(call)
            velocity = output.velocity.clone()
            velocity[:, :, :1] += 7.0
            return CallOutput(velocity, output.keys_values)

    found = []
    for student in (networks.student, Louder()):
        called = dataclasses.replace(networks, student=student, wrapped=student)
        step = tf_flow_map_step(batch, called, draw=draw, stage=stage, teacher=teacher, guidance=2.5)  # pyright: ignore
        found.append(float(step.loss.detach()))
    assert found[0] == pytest.approx(found[1], rel=1e-12)


def test_samples_that_need_no_derivative_are_not_asked_for_one() -> None:
    """The derivative of a part of the batch is taken on the context of that part."""
    student, networks = two_time_networks()
    draw = Draw(3, [0, 1], torch.device("cpu"))
    batch = batch_of(context_time=0.3)
    x_t, t = add_noise(batch.x0, batch.eps, torch.tensor([0.4, 0.8], dtype=torch.float64)), torch.tensor([0.4, 0.8])
    whole = networks.on_context(batch)(x_t, t.double(), batch.condition, t.double() / 2)
    for row in (0, 1):
        rows = torch.tensor([row])
        part = networks.on_context(batch.index(rows))(
            x_t[rows], t[rows].double(), batch.condition.index(rows), t[rows].double() / 2
        )
        assert largest(part, whole[rows]) < 1e-12
    calls: list[int] = []
    student.transformer.patch_embedding.register_forward_pre_hook(lambda _, inputs: calls.append(len(inputs[0])))
    stage = dataclasses.replace(MEAN, equal_share=1.0)
    tf_flow_map_step(batch, networks, draw=draw, stage=stage, teacher=NO_TEACHER, guidance=1.0)
    assert calls == [2]
    calls.clear()
    # Of two samples with the numbers 0 and 2 the second goes to 0, and alone has a derivative.
    one = dataclasses.replace(ANY, tangent="central")
    draw = Draw(3, [0, 2], torch.device("cpu"))
    tf_flow_map_step(batch, networks, draw=draw, stage=one, teacher=NO_TEACHER, guidance=1.0)
    assert calls == [1, 1, 2]


@pytest.mark.parametrize("kind", ["gate", "sum"])
def test_at_its_end_the_velocity_is_that_of_before(kind: SecondTime) -> None:
    plain, student = build_student(), build_student()
    add_second_time(student.transformer, kind)
    student.double()
    t = torch.tensor([0.3, 0.9], dtype=torch.float64)
    mask = networks_of(plain).causal
    before, after = (network.causal(latents(), t, text(), mask=mask) for network in (plain, student))
    assert largest(before, after) < 1e-13
    assert (plain.has_two_times, student.has_two_times) == (False, True)


def test_settings_that_do_not_fit_are_named(inputs: VideoInputs, tmp_path: Path) -> None:
    joint = {
        "student.second_time": "sum",
        "joint": JointConfig(tf_dcm=TfDcmConfig()),
        "causal_teacher": with_teacher(inputs),
    }
    cases: list[tuple[str, dict[str, Any], str]] = [
        ("tf_meanflow", {"student.second_time": "none"}, "student.second_time is 'none': set it to 'sum'"),
        ("tf_dcm", {"student.second_time": "sum"}, "'sum', which tf_dcm does not train: leave it out"),
        ("tf_meanflow", {"student.policy": CachePolicy(noisy_from=1)}, "flow maps have clean context"),
        ("tf_meanflow", {"student.init": None}, "tf_meanflow distils a causal teacher, and student.init is empty"),
        (
            "tf_meanflow",
            {"data.controls": str(tmp_path / "controls")},
            "data.controls with student.second_time 'sum'",
        ),
        ("self_forcing", joint, "joint with student.second_time 'sum'"),
        ("tf_anyflow", {"tf_anyflow.context_noise": 1.0}, "context_noise is 1.0; it must lie in"),
        ("tf_meanflow", {"tf_meanflow.time_smoothing": 0.01, "student.lora_rank": 2}, "tf_meanflow.time_smoothing"),
    ]
    for case, changes, message in cases:
        with pytest.raises(ValueError, match=message):
            tiny_causal(inputs, tmp_path / "run", case, changes)


def test_the_tangent_is_checked_with_its_second_time(inputs: VideoInputs, tmp_path: Path) -> None:
    from fewstep.causal_video.stages.consistency import check_tangent

    changes = {"tf_meanflow.check_tangent": True, "tf_meanflow.time_smoothing": 0.01}
    config = tiny_causal(inputs, tmp_path / "run", "tf_meanflow", changes)
    setup, trainer = start_causal(config)
    stage: Any = config.stage
    found = check_tangent(stage, setup, trainer, section="tf_meanflow")
    trainer.close()
    assert found is not None
    assert "along the teacher's path its cosine" in found
    # The causal teacher is not smoothed, and has one time.
    assert setup.networks is not None
    assert setup.networks.teacher is not None
    assert not setup.networks.teacher.network.has_two_times
    assert (
        largest(
            setup.networks.teacher.network.transformer.condition_embedder.time_embedder.linear_1.weight,
            setup.student.transformer.condition_embedder.time_embedder.first.linear_1.weight,  # pyright: ignore
        )
        > 1e-4
    )


def test_a_smoothed_time_stays_so_in_both_layers_and_is_not_smoothed_again(inputs: VideoInputs, tmp_path: Path) -> None:
    """Columns that are faded do not move; a later stage, from the run or its export, begins with them as they are."""
    smooth = {"tf_meanflow.time_smoothing": 0.01}
    assert train_causal_video(tiny_causal(inputs, tmp_path / "run", "tf_meanflow", {**smooth, "run.steps": 3})) == 0
    before, trainer = start_causal(tiny_causal(inputs, tmp_path / "start", "tf_meanflow", smooth))
    trainer.close()
    tensors = load_checkpoint(list_checkpoints(tmp_path / "run")[-1]).tensors
    names = [f"condition_embedder.time_embedder.{half}.linear_1.weight" for half in ("first", "second")]
    for name in names:
        began = before.student.transformer.state_dict()[name]
        moved = (tensors["student"][f"transformer.{name}"] - began).abs().amax(dim=0)
        assert float(moved[[0, 1]].max()) == 0
        assert float(moved[[8, 9]].min()) > 0
    output, _ = export_causal_run(tmp_path / "run")
    for number, (stage, init) in enumerate((("tf_meanflow", tmp_path / "run"), ("self_forcing", output))):
        changes = {"student.second_time": "sum", "student.init": str(init), **(smooth if number == 0 else {})}
        setup, trainer = start_causal(tiny_causal(inputs, tmp_path / str(number), stage, changes))
        trainer.close()
        assert setup.time_smoothing == 0.01
        for name in names:
            stored = tensors["student_ema"][f"transformer.{name}"]
            assert largest(setup.student.transformer.state_dict()[name], stored) < 1e-7


def test_a_run_that_would_stop_on_its_way_is_refused_before_it(inputs: VideoInputs, tmp_path: Path) -> None:
    data = {"tf_meanflow.velocity": "data", "tf_meanflow.tangent": "central"}
    data |= {"tf_meanflow.check_tangent": True}
    cases: list[tuple[str, dict[str, Any], str]] = [
        ("tf_anyflow", {"run.batch_size": 2}, "tf_anyflow with slices of 2 samples"),
        ("tf_anyflow", {"run.gradient_accumulation": 2}, "tf_anyflow with slices of 2 samples"),
        ("tf_anyflow", {"teacher.guidance": 0.0}, r"teacher\.guidance is 0\.0 with tf_anyflow\.velocity 'data'"),
        ("tf_anyflow", {"teacher.guidance": 1.0, "tf_anyflow.condition_drop": 0.9}, r"condition_drop: given 0\.9"),
        ("tf_meanflow", {**data, "teacher.guidance": 1.0, "tf_meanflow.kappa": 0.9}, r"kappa: given 0\.9"),
    ]
    for case, changes, message in cases:
        with pytest.raises(ValueError, match=message):
            train_causal_video(tiny_causal(inputs, tmp_path / "run", case, changes))
    assert not (tmp_path / "run").exists()
