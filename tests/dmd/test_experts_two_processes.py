"""Two experts in two processes: each has gradients of both, also where its samples are all on one side."""

from pathlib import Path

import pytest

from fewstep.core.config import save_resolved
from fewstep.dmd.train import train_dmd
from tests.core.families.test_families_wan_experts import TEXT
from tests.dmd.run_server import RunServer
from tests.dmd.test_two_processes import start_two
from tests.dmd.tiny_run import PROMPTS, TinyInputs, tiny_config
from tests.two_processes import assert_same_run

pytestmark = [pytest.mark.timeout(600), pytest.mark.slow]


@pytest.mark.parametrize("rank", [0, 2])
def test_two_processes_train_two_experts_as_one_does(server: RunServer, tmp_path: Path, rank: int) -> None:
    TEXT.build().save_pretrained(tmp_path / "model", safe_serialization=True)
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n", encoding="utf-8")
    inputs = TinyInputs(tmp_path / "model", tmp_path / "prompts.txt", tmp_path / "latents", tmp_path / "pairs")
    # The student's calls are of one expert in each step, the scores' of either or both.
    changes = {"run.steps": 6, "student.steps": 4, "student.shift": 5.0, "fake_score.ratio": 2}
    changes |= {f"data.{name}": value for name, value in TEXT.size.items()}
    changes |= {"student.lora_rank": rank, "fake_score.lora_rank": rank, "student.gradient_checkpointing": True}
    assert train_dmd(tiny_config(inputs, tmp_path / "one", changes)) == 0
    save_resolved(tmp_path / "config.yaml", tiny_config(inputs, tmp_path / "two", changes))
    runs = start_two(server, tmp_path, "--config", str(tmp_path / "config.yaml"))
    assert [run.wait() for run in runs] == [0, 0], runs[0].log.read_text(encoding="utf-8")[-3000:]
    assert_same_run(tmp_path / "two", tmp_path / "one", roles=("student", "student_ema", "fake_score"))
