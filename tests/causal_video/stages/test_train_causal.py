"""The loop of the stages: what moves when, exact resume, replay, initial weights, and mistakes."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file
from torch import Tensor

from fewstep.causal_video.policy import CachePolicy
from fewstep.causal_video.settings import CausalSettings
from fewstep.causal_video.stages.config import CausalConfig
from fewstep.causal_video.stages.consistency import check_tangent
from fewstep.causal_video.stages.sections import TfScmConfig
from fewstep.causal_video.stages.self_forcing import weighed_student_loss
from fewstep.causal_video.stages.setup import CausalData, CausalSetup
from fewstep.causal_video.stages.train import train_causal_video, train_step
from fewstep.core.training.checkpoint import list_checkpoints, load_checkpoint
from fewstep.core.training.roles import Role
from fewstep.core.training.run_directory import read_metrics
from fewstep.core.training.trainer import Trainer
from fewstep.dmd.config import GanConfig
from fewstep.dmd.loss import MatchingStatistics
from fewstep.dmd.matching import StudentStep
from tests.causal_video.tiny_causal_run import CASES, VideoInputs, start_causal, tiny_causal
from tests.dmd.tiny_run import assert_same_checkpoint


def weights_of(role: Role | None) -> Tensor:
    assert role is not None
    return torch.cat([value.detach().flatten() for _, value in role.parameters])


def gradients_of_first_step(config: CausalConfig, setup: CausalSetup, trainer: Trainer) -> list[Tensor]:
    """The student's gradients of a step whose update is not made."""
    found: list[Tensor] = []

    def keep(role: Role) -> float:
        found.extend(p.grad.clone() for _, p in role.parameters if p.grad is not None)
        return 0.0

    trainer.update = keep  # pyright: ignore[reportAttributeAccessIssue]
    train_step(config, setup, trainer)
    return found


def test_steps_of_self_forcing_with_a_discriminator(inputs: VideoInputs, tmp_path: Path) -> None:
    config = tiny_causal(inputs, tmp_path, "self_forcing_asd")
    setup, trainer = start_causal(config)
    scores = setup.scores
    assert scores is not None
    roles = (setup.student_role, scores.fake_role, scores.discriminator_role)
    moved, calls = [], []
    handles = [
        module.register_forward_hook(lambda *_, name=name: calls.append(name))
        for name, module in (
            ("student", setup.student.transformer.patch_embedding),
            ("teacher", setup.teacher.denoiser),
            ("fake", scores.fake),
        )
    ]
    counts = []
    for _ in range(5):
        calls.clear()
        before = [weights_of(role) for role in roles]
        train_step(config, setup, trainer)
        trainer.advance()
        after = [weights_of(role) for role in roles]
        moved.append(tuple(not torch.equal(a, b) for a, b in zip(before, after, strict=True)))
        counts.append(tuple(calls.count(name) for name in ("student", "teacher", "fake")))
    for handle in handles:
        handle.remove()
    trainer.close()
    # Exits of the student are 0 and 1, of the fake score 0, 1 and 2. After the last exit nothing is compared.
    student, critic = (True, False, False), (False, True, True)
    assert moved == [student, critic, critic, student, (False, True, False)]
    # Two chunks: exit 0 is 2 calls and 2 contexts, exit 1 is 4 and 2, exit 2 of schedule [3, 2] is 5 and 2.
    zero, one, two = 4, 6, 7
    assert [c[0] for c in counts] == [zero + one, zero + one, one + two, one + two, two]
    assert [c[1] for c in counts] == [1, 0, 0, 1, 0]
    assert [c[2] for c in counts] == [1, 1, 1, 1, 1]


def test_a_discriminator_of_real_videos_learns_with_the_fake_score(inputs: VideoInputs, tmp_path: Path) -> None:
    """Its heads move in the fake score's steps alone, and the student's gradient has a part of it once they have."""
    config = tiny_causal(inputs, tmp_path / "run", "self_forcing_gan")
    setup, trainer = start_causal(config)
    assert setup.scores is not None
    # The real score is the bidirectional teacher's, as without a discriminator.
    assert setup.scores.real is None
    heads = {name: p for name, p in setup.scores.fake_role.parameters if name.startswith("heads.")}
    assert len(heads) > 3
    moved: list[int] = []
    metrics: dict[str, Any] = {}
    for _ in range(3):
        before = {name: p.detach().clone() for name, p in heads.items()}
        metrics = train_step(config, setup, trainer)
        moved.append(sum(not torch.equal(p, before[name]) for name, p in heads.items()))
        trainer.advance()
    assert 0 < float(metrics["discriminator_loss"]) < 10
    assert moved[0] == 0
    # Last layers begin at zero, so that those before them move after them.
    assert 0 < moved[1] < moved[2] == len(heads)
    found = []
    for gan in (config.gan, None):
        trainer.step = 3
        for _, weight in setup.student_role.parameters:
            weight.grad = None
        found.append(gradients_of_first_step(dataclasses.replace(config, gan=gan), setup, trainer))
    trainer.close()
    assert max(float((a - b).abs().max()) for a, b in zip(*found, strict=True)) > 1e-6


def test_weights_of_a_window_leave_the_discriminator_as_it_is() -> None:
    counts = torch.tensor([False, True, True, True])
    zero = torch.zeros(())
    statistics = MatchingStatistics(*[zero] * len(dataclasses.fields(MatchingStatistics)))
    gan = GanConfig(latents="x", weight=0.5)
    step = StudentStep(torch.tensor(3.0 + 0.5 * 2.0), statistics, torch.tensor(2.0))
    assert weighed_student_loss(step, counts, gan).item() == pytest.approx(3.0 / 0.75 + 1.0)
    plain = StudentStep(torch.tensor(3.0), statistics)
    assert weighed_student_loss(plain, counts, None).item() == pytest.approx(4.0)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["self_forcing", "self_forcing_long", "self_forcing_sid", "self_forcing_asd", "self_forcing_gan"]
)
def test_replayed_gradients_are_those_of_the_single_graph(inputs: VideoInputs, tmp_path: Path, name: str) -> None:
    changes = {"run.seed": 7, "student.steps": (2,), **({"student.steps": (1, 1)} if name.endswith("long") else {})}
    found = []
    for replay in (False, True):
        folder = tmp_path / str(replay)
        config = tiny_causal(inputs, folder, name, {**changes, "self_forcing.replay": replay})
        setup, trainer = start_causal(config)
        trainer.step = 3
        found.append(gradients_of_first_step(config, setup, trainer))
        trainer.close()
    assert len(found[0]) == len(found[1]) > 40
    scale = max(float(g.abs().max()) for g in found[0])
    assert scale > 1e-6
    assert max(float((a - b).abs().max()) for a, b in zip(*found, strict=True)) < 2e-5 * scale


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        *("teacher_forcing_context", "tf_scm", "ode"),
        *("self_forcing", "self_forcing_long", "self_forcing_asd", "self_forcing_gan"),
    ],
)
def test_a_resumed_run_equals_an_uninterrupted_one(inputs: VideoInputs, tmp_path: Path, name: str) -> None:
    straight = tiny_causal(inputs, tmp_path / "straight", name)
    assert train_causal_video(straight) == 0
    assert train_causal_video(tiny_causal(inputs, tmp_path / "resumed", name, {"run.steps": 2})) == 0
    assert train_causal_video(tiny_causal(inputs, tmp_path / "resumed", name, {"run.resume": "latest"})) == 0
    left, right = (load_checkpoint(list_checkpoints(tmp_path / folder)[-1]) for folder in ("straight", "resumed"))
    assert left.step == 4
    assert_same_checkpoint(left, right)


def test_a_slice_at_a_time_gives_the_gradient_of_the_batch(inputs: VideoInputs, tmp_path: Path) -> None:
    found = []
    for parts in (1, 2):
        changes = {"run.gradient_accumulation": parts}
        config = tiny_causal(inputs, tmp_path / str(parts), "diffusion_forcing", changes)
        setup, trainer = start_causal(config)
        found.append(gradients_of_first_step(config, setup, trainer))
        trainer.close()
    assert max(float((a - b).abs().max()) for a, b in zip(*found, strict=True)) < 1e-5


@pytest.mark.slow
def test_stages_follow_each_other(inputs: VideoInputs, tmp_path: Path) -> None:
    """Teacher forcing, then consistency from its run, then self-forcing from a checkpoint and from a file."""
    first = tiny_causal(inputs, tmp_path / "tf", "teacher_forcing", {"run.sample_every": 2})
    assert train_causal_video(first) == 0
    sheets = sorted(path.name for path in (tmp_path / "tf" / "samples").iterdir())
    assert sheets == ["step-0000000.png", "step-0000002.png", "step-0000004.png"]
    assert CausalSettings.load(tmp_path / "tf").layout.lengths == (1, 2)
    last = list_checkpoints(tmp_path / "tf")[-1]
    average = load_file(last / "student_ema.safetensors")
    second = tiny_causal(inputs, tmp_path / "scm", "tf_scm", {"student.init": str(tmp_path / "tf")})
    setup, trainer = start_causal(dataclasses.replace(second))
    assert setup.networks is not None
    teacher = setup.networks.teacher
    assert teacher is not None
    for network in (setup.student, teacher.network):
        state = network.state_dict()
        assert all(torch.equal(state[name], average[name]) for name in state)
    assert teacher.guidance == 2.0
    train_step(second, setup, trainer)
    trainer.close()
    assert all(torch.equal(tensor, average[name]) for name, tensor in teacher.network.state_dict().items())
    for init in (str(last), str(inputs.init)):
        third = tiny_causal(inputs, tmp_path / Path(init).name, "self_forcing", {"student.init": init})
        setup, trainer = start_causal(third)
        trained: Any = setup.student.transformer
        stock: Any = setup.teacher.denoiser.network
        assert not torch.equal(trained.proj_out.weight, stock.proj_out.weight)
        trainer.close()
    notes = [record["note"] for record in read_metrics(tmp_path / "tf" / "metrics.jsonl") if "note" in record]
    assert "chunks of [1, 2] latent frames at t = 1, " in notes[0]


def test_a_student_begins_with_the_weights_of_an_export(inputs: VideoInputs, tmp_path: Path) -> None:
    """Also with those of a pipeline whose transformer is in several files."""
    network: Any = WanTransformer3DModel.from_pretrained(inputs.init.parent)
    network.save_pretrained(tmp_path / "pipeline" / "transformer", max_shard_size="50KB")
    assert len(list((tmp_path / "pipeline" / "transformer").glob("*.safetensors"))) > 1
    config = tiny_causal(inputs, tmp_path / "run", "tf_dcm", {"student.init": str(tmp_path / "pipeline")})
    setup, trainer = start_causal(config)
    stored = load_file(inputs.init)
    state = setup.student.transformer.state_dict()
    assert state.keys() == stored.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in stored.items())
    trainer.close()


def test_pairs_are_made_once_and_kept(inputs: VideoInputs, tmp_path: Path) -> None:
    for name in ("ode", "ode_causal"):
        config = tiny_causal(inputs, tmp_path / name, name)
        assert train_causal_video(config) == 0
        tensors = load_file(tmp_path / name / "ode_pairs" / "ode_pairs.safetensors")
        assert tensors["states"].shape == (5, 4, 4, 3, 8, 8)
        assert ("context" in tensors) == (name == "ode_causal")
        # Steps [3, 2] at shift 5: thirds and a half.
        assert tensors["times"].tolist() == pytest.approx([1.0, 10 / 11, 5 / 6, 5 / 7])
    # Trajectories that are there already have no settings of how to make them.
    given = {"ode.count": 64, "ode.steps": 48}
    again = tiny_causal(inputs, tmp_path / "again", "ode", {**given, "ode.pairs": str(tmp_path / "ode" / "ode_pairs")})
    assert CausalData.read(again).pairs is not None
    mixed = tiny_causal(
        inputs, tmp_path / "again", "ode", {**given, "ode.pairs": str(tmp_path / "ode_causal" / "ode_pairs")}
    )
    with pytest.raises(ValueError, match="were not made by the bidirectional teacher"):
        CausalData.read(mixed)


def test_the_check_of_the_tangent_passes_and_is_reported(inputs: VideoInputs, tmp_path: Path) -> None:
    changes = {"tf_scm.check_tangent": True, "tf_scm.time_smoothing": 0.01}
    setup, trainer = start_causal(tiny_causal(inputs, tmp_path, "tf_scm", changes))
    said = check_tangent(TfScmConfig(), setup, trainer)
    assert said is not None
    assert said.startswith("tangent of the packed network against differences: off by ")
    assert check_tangent(TfScmConfig(check_tangent=False), setup, trainer) is None
    assert check_tangent(TfScmConfig(tangent="central"), setup, trainer) is None
    trainer.close()
    assert float(said.rpartition("of time is ")[2].partition(",")[0]) > 0.98
    # What the student is distilled from is not smoothed, and the student begins beside it.
    assert setup.networks is not None
    assert setup.networks.teacher is not None
    name = "condition_embedder.time_embedder.linear_1.weight"
    ours, theirs = (
        network.transformer.get_parameter(name) for network in (setup.student, setup.networks.teacher.network)
    )
    assert float((ours - theirs).abs().max()) > 1e-3


def test_a_tangent_that_follows_a_wiggle_is_refused(inputs: VideoInputs, tmp_path: Path) -> None:
    setup, trainer = start_causal(tiny_causal(inputs, tmp_path, "tf_scm"))
    with pytest.raises(ValueError, match=r"Set tf_scm\.time_smoothing to 0\.01"):
        check_tangent(TfScmConfig(), setup, trainer)
    trainer.close()
    lora = {"tf_scm.time_smoothing": 0.01, "student.lora_rank": 2}
    with pytest.raises(ValueError, match=r"tf_scm\.time_smoothing is 0\.01 with student\.lora_rank 2"):
        tiny_causal(inputs, tmp_path, "tf_scm", lora)


def test_a_dry_run_makes_one_step_and_keeps_nothing(inputs: VideoInputs, tmp_path: Path) -> None:
    config = tiny_causal(inputs, tmp_path / "dry", "self_forcing", {"run.dry_run": True})
    assert train_causal_video(config) == 0
    assert not (tmp_path / "dry").exists()


def test_files_that_do_not_fit_are_named(inputs: VideoInputs, tmp_path: Path) -> None:
    for changes, message in (
        ({"student.layout": (2, 2), "data.image_share": 0.5}, r"3 latent frames, and student\.layout \[2, 2\] cuts 4"),
        ({"student.init": str(tmp_path / "none")}, "is no .safetensors file, no run directory or checkpoint"),
        ({"data.prompts": str(tmp_path / "none.txt")}, "does not exist"),
        ({"student.times": ((1.0, 1.5),), "student.steps": (4, 2)}, r"student\.times: times must lie in \(0, 1\]"),
    ):
        with pytest.raises(ValueError, match=message):
            train_causal_video(tiny_causal(inputs, tmp_path / "run", "self_forcing", changes))
    policy = {"student.layout": (1, 1, 1), "student.policy": CachePolicy(1, 1, "static")}
    with pytest.raises(ValueError, match="positions='shifted' move the sink"):
        train_causal_video(tiny_causal(inputs, tmp_path / "masked", "teacher_forcing", policy))
    assert not any(tmp_path.glob("*/config.yaml"))
    assert len(CASES) == 22
