from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import tempfile
import textwrap
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fewstep.core.training.checkpoint import (
    find_resume,
    latest_checkpoint,
    list_checkpoints,
    load_checkpoint,
    save_checkpoint,
    set_aside_newer,
)
from fewstep.core.training.optimizer_state import load_optimizer, optimizer_to_tensors

DiskUsage = namedtuple("DiskUsage", "total used free")


def some_tensors(seed: int = 0) -> dict[str, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "student": {
            "weight": torch.randn(5, 3, generator=generator),
            "half": torch.randn(4, generator=generator).to(torch.bfloat16),
            "double": torch.randn(2, 2, generator=generator, dtype=torch.float64),
        },
        "generators": {"cpu": torch.randint(0, 255, (1, 16), dtype=torch.uint8, generator=generator)},
    }


def save(directory: Path, step: int, keep: int = 10) -> Path:
    return save_checkpoint(directory, step, tensors=some_tensors(step), state={"x": [step, 0.1, None]}, keep=keep)


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_round_trip_is_exact(tmp_path: Path) -> None:
    tensors = some_tensors(3)
    path = save_checkpoint(
        tmp_path / "run", 7, tensors=tensors, state={"rate": 0.1, "names": ["a"], "none": None}, keep=1
    )
    loaded = load_checkpoint(path)
    assert loaded.step == 7
    assert loaded.state == {"rate": 0.1, "names": ["a"], "none": None}
    assert loaded.tensors.keys() == tensors.keys()
    for name, group in tensors.items():
        assert loaded.tensors[name].keys() == group.keys()
        for key, tensor in group.items():
            assert loaded.tensors[name][key].dtype == tensor.dtype
            assert torch.equal(loaded.tensors[name][key], tensor)


def test_tied_sliced_and_transposed_tensors_keep_their_values(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    group = {"a": base, "b": base, "row": base[1], "transposed": base.T, "empty": torch.zeros(0, 3)}
    loaded = load_checkpoint(save_checkpoint(tmp_path, 1, tensors={"w": group, "nothing": {}}, state={}, keep=1))
    assert all(torch.equal(loaded.tensors["w"][name], tensor) for name, tensor in group.items())
    assert loaded.tensors["nothing"] == {}


def test_only_safetensors_and_json_are_written(tmp_path: Path) -> None:
    assert names(save(tmp_path, 1)) == ["generators.safetensors", "state.json", "student.safetensors"]


def test_rotation_keeps_the_newest(tmp_path: Path) -> None:
    for step in (2, 4, 10, 12):
        save(tmp_path, step, keep=2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-10", "checkpoint-12"]
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoint-12"


def test_same_step_is_replaced(tmp_path: Path) -> None:
    save(tmp_path, 5)
    save_checkpoint(tmp_path, 5, tensors=some_tensors(99), state={"x": "new"}, keep=1)
    assert load_checkpoint(tmp_path / "checkpoint-5").state == {"x": "new"}
    assert names(tmp_path) == ["checkpoint-5"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"step": -1}, "step of a checkpoint: given -1"),
        ({"keep": 0}, "keep: given 0"),
        ({"tensors": {"../a": {}}}, r"given '\.\./a'"),
        ({"state": {"x": float("nan")}}, "is not JSON"),
        ({"state": {"x": object()}}, "is not JSON"),
    ],
)
def test_unusable_arguments_write_nothing(tmp_path: Path, arguments: dict, message: str) -> None:
    valid = {"step": 1, "tensors": some_tensors(), "state": {}, "keep": 1}
    chosen = {**valid, **arguments}
    step = chosen.pop("step")
    with pytest.raises(ValueError, match=message):
        save_checkpoint(tmp_path, step, **chosen)
    assert names(tmp_path) == []


def test_unfinished_folders_are_ignored_and_cleaned(tmp_path: Path) -> None:
    save(tmp_path, 1)
    partial = tmp_path / ".checkpoint-2.partial"
    partial.mkdir()
    (partial / "student.safetensors").write_bytes(b"half")
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoint-1"
    save(tmp_path, 3)
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-3"]


def test_killed_while_replacing_gets_the_replaced_one_back(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (tmp_path / "checkpoint-1").rename(tmp_path / ".checkpoint-1.replaced")
    save(tmp_path, 2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-1", "checkpoint-2"]
    assert load_checkpoint(tmp_path / "checkpoint-1").state["x"][0] == 1


@pytest.mark.slow
def test_killed_while_writing_leaves_the_previous_checkpoint(tmp_path: Path) -> None:
    script = textwrap.dedent(
        """
        import os, signal, sys
        import torch
        from fewstep.core.training import checkpoint
        directory = sys.argv[1]
        checkpoint.save_checkpoint(directory, 1, tensors={"w": {"a": torch.ones(3)}}, state={"x": 1}, keep=1)
        storable = {"a": torch.ones(3)}
        tensors = {"first": storable, "second": storable}
        class DiesAtSecond(dict):
            passes = 0
            def items(self):
                DiesAtSecond.passes += 1
                for name, group in super().items():
                    if DiesAtSecond.passes == 1 and name == "second":
                        assert os.path.exists(os.path.join(directory, ".checkpoint-2.partial", "first.safetensors"))
                        os.kill(os.getpid(), signal.SIGKILL)
                    yield name, group
        checkpoint.save_checkpoint(directory, 2, tensors=DiesAtSecond(tensors), state={}, keep=1)
        """
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=False, capture_output=True, timeout=60)
    assert done.returncode == -9
    assert names(tmp_path) == [".checkpoint-2.partial", "checkpoint-1"]
    assert load_checkpoint(find_resume(tmp_path, "latest")).state == {"x": 1}


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_every_truncation_and_every_changed_byte_is_noticed(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        save(directory, 1)
        path = save(directory, 2)
        victim = path / data.draw(st.sampled_from(names(path)))
        content = victim.read_bytes()
        position = data.draw(st.integers(0, len(content) - 1))
        if data.draw(st.booleans()):
            victim.write_bytes(content[:position])
        else:
            flipped = content[position] ^ (1 << data.draw(st.integers(0, 7)))
            victim.write_bytes(content[:position] + bytes([flipped]) + content[position + 1 :])
        for call in (lambda: load_checkpoint(path), lambda: latest_checkpoint(directory)):
            with pytest.raises(ValueError, match=f"{victim.name}.*--resume .*checkpoint-1"):
                call()
        assert load_checkpoint(directory / "checkpoint-1").step == 1


@pytest.mark.parametrize("victim", ["state.json", "student.safetensors"])
def test_missing_file_names_it_and_the_intact_one_before(tmp_path: Path, victim: str) -> None:
    save(tmp_path, 1)
    save(tmp_path, 2)
    save(tmp_path, 3)
    (tmp_path / "checkpoint-3" / victim).unlink()
    (tmp_path / "checkpoint-2" / "generators.safetensors").write_bytes(b"")
    with pytest.raises(
        ValueError, match=rf"checkpoint-3 cannot be used: {victim} is missing; use --resume .*checkpoint-1"
    ):
        latest_checkpoint(tmp_path)


def test_another_format_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    content = json.loads((path / "state.json").read_text())
    assert content["record"]["format"] == 1
    content["record"]["format"] = 2
    (path / "state.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"does not match its checksum.*no other intact checkpoint"):
        load_checkpoint(path)


def test_find_resume(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no checkpoint"):
        find_resume(tmp_path, "latest")
    first, second = save(tmp_path, 1), save(tmp_path, 2)
    assert find_resume(tmp_path, "latest") == second
    assert find_resume(tmp_path, str(first)) == first
    with pytest.raises(ValueError, match=r"no such checkpoint; checkpoints of .*checkpoint-1, .*checkpoint-2"):
        find_resume(tmp_path, str(tmp_path / "checkpoint-9"))
    with pytest.raises(ValueError, match=r"state\.json is missing"):
        find_resume(tmp_path, str(tmp_path))


def test_later_checkpoints_are_set_aside_not_deleted(tmp_path: Path) -> None:
    for _ in range(2):
        for step in (1, 2, 3):
            save(tmp_path, step)
        assert len(set_aside_newer(tmp_path, 1)) == 2
    assert names(tmp_path) == [
        "checkpoint-1",
        "checkpoint-2.abandoned",
        "checkpoint-2.abandoned-2",
        "checkpoint-3.abandoned",
        "checkpoint-3.abandoned-2",
    ]
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoint-1"
    assert load_checkpoint(tmp_path / "checkpoint-3.abandoned").step == 3


def test_too_little_space_is_told_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: DiskUsage(10**9, 10**9 - 1000, 1000))
    with pytest.raises(OSError, match=r"needs 1\.0 MiB and 0\.0 MiB are free; free some space") as raised:
        save(tmp_path, 2)
    assert raised.value.errno == errno.ENOSPC
    assert names(tmp_path) == ["checkpoint-1"]


@pytest.mark.slow
def test_full_disk_while_writing(tmp_path: Path) -> None:
    """On a real file system of 4 MiB in a mount namespace of its own, where the system allows one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    namespace = ["unshare", "--map-root-user", "--mount", "sh", "-c"]
    mount = f"mount -t tmpfs -o size=4m tmpfs '{disk}'"
    if shutil.which("unshare") is None or subprocess.run([*namespace, mount], capture_output=True).returncode:
        pytest.skip("needs the right to make a mount namespace")
    script = textwrap.dedent(
        """
        import collections, os, shutil, sys
        import torch
        from fewstep.core.training.checkpoint import load_checkpoint, save_checkpoint
        directory = sys.argv[1]
        small = {"student": {"weight": torch.ones(8)}}
        save_checkpoint(directory, 1, tensors=small, state={}, keep=1)
        # Another process fills the disk between the check and the write.
        usage = collections.namedtuple("usage", "free")(10**9)
        shutil.disk_usage = lambda path: usage
        large = {"student": {"weight": torch.zeros(2**19)}, "other": {"weight": torch.zeros(2**20)}}
        try:
            save_checkpoint(directory, 2, tensors=large, state={}, keep=1)
        except OSError as error:
            print(error)
        print(sorted(os.listdir(directory)), load_checkpoint(directory + "/checkpoint-1").step)
        print(save_checkpoint(directory, 3, tensors=small, state={}, keep=1).name, sorted(os.listdir(directory)))
        """
    )
    (tmp_path / "fill.py").write_text(script)
    command = f"{mount} && exec '{sys.executable}' '{tmp_path / 'fill.py'}' '{disk}'"
    done = subprocess.run([*namespace, command], capture_output=True, text=True, check=True, timeout=60)
    lines = done.stdout.splitlines()
    assert "writing checkpoint 2 failed" in lines[0]
    assert "No space left on device" in lines[0]
    assert lines[1:] == ["['checkpoint-1'] 1", "checkpoint-3 ['checkpoint-3']"]


def test_failing_write_removes_the_unfinished_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)

    def no_room(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", no_room)
    with pytest.raises(OSError, match="older checkpoints are intact") as raised:
        save(tmp_path, 2)
    assert raised.value.errno == errno.ENOSPC
    assert names(tmp_path) == ["checkpoint-1"]


def make_optimizer(kind: str, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    if kind == "adamw":
        return torch.optim.AdamW(parameters, lr=0.1, betas=(0.0, 0.99))
    if kind == "groups":
        return torch.optim.AdamW(
            [{"params": parameters[:1], "lr": 0.3}, {"params": parameters[1:]}], lr=0.1, amsgrad=True
        )
    if kind == "rprop":
        return torch.optim.Rprop(parameters, lr=0.1)
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9 if kind == "momentum" else 0.0)


def make_parameters() -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((3, 2), (4,), ())]


def take_steps(optimizer: torch.optim.Optimizer, parameters: list[torch.nn.Parameter], steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()


@pytest.mark.parametrize("kind", ["adamw", "groups", "sgd", "momentum", "rprop"])
@pytest.mark.parametrize("before", [0, 3])
def test_optimizer_continues_bit_for_bit(tmp_path: Path, kind: str, before: int) -> None:
    parameters = make_parameters()
    optimizer = make_optimizer(kind, parameters)
    take_steps(optimizer, parameters, range(before))
    tensors, description = optimizer_to_tensors(optimizer)
    weights = {str(index): parameter for index, parameter in enumerate(parameters)}
    files = {"optimizer": tensors, "weights": weights}
    loaded = load_checkpoint(save_checkpoint(tmp_path, 1, tensors=files, state=description, keep=1))
    take_steps(optimizer, parameters, range(before, 6))

    again = [torch.nn.Parameter(loaded.tensors["weights"][str(index)].clone()) for index in range(3)]
    other = make_optimizer(kind, again)
    load_optimizer(other, loaded.tensors["optimizer"], loaded.state)
    take_steps(other, again, range(before, 6))
    assert len(again) == 3
    assert all(torch.equal(left, right) for left, right in zip(parameters, again, strict=True))
    left, right = optimizer_to_tensors(optimizer), optimizer_to_tensors(other)
    assert left[1] == right[1]
    assert all(torch.equal(left[0][name], right[0][name]) for name in left[0])


def test_loading_an_optimizer_does_not_share_memory_with_the_checkpoint() -> None:
    parameters = make_parameters()
    optimizer = make_optimizer("adamw", parameters)
    take_steps(optimizer, parameters, range(2))
    tensors, description = optimizer_to_tensors(optimizer)
    kept = {name: tensor.clone() for name, tensor in tensors.items()}
    other = make_optimizer("adamw", make_parameters())
    load_optimizer(other, kept, description)
    take_steps(other, make_parameters(), range(0))
    take_steps(other, other.param_groups[0]["params"], range(3))
    assert float(kept["0.step"]) == 2.0
    assert torch.equal(kept["0.exp_avg"], tensors["0.exp_avg"])


def test_optimizer_mismatches_are_named() -> None:
    parameters = make_parameters()
    optimizer = make_optimizer("adamw", parameters)
    take_steps(optimizer, parameters, range(2))
    tensors, description = optimizer_to_tensors(optimizer)
    with pytest.raises(ValueError, match="saved AdamW, this run has SGD"):
        load_optimizer(make_optimizer("sgd", make_parameters()), tensors, description)
    with pytest.raises(ValueError, match="saved 1 parameter groups, this run has 2"):
        load_optimizer(make_optimizer("groups", make_parameters()), tensors, description)
    with pytest.raises(ValueError, match="saved for 3 parameters, this run trains 2"):
        load_optimizer(make_optimizer("adamw", make_parameters()[:2]), tensors, description)
    fewer = {name: tensor for name, tensor in tensors.items() if name != "1.exp_avg"}
    with pytest.raises(ValueError, match=r"1\.exp_avg.* missing or unexpected"):
        load_optimizer(make_optimizer("adamw", make_parameters()), fewer, description)
    with pytest.raises(ValueError, match=r"state 0\.exp_avg has shape \(5,\)"):
        load_optimizer(
            make_optimizer("adamw", make_parameters()), {**tensors, "0.exp_avg": torch.zeros(5)}, description
        )
