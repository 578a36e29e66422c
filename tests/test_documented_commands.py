"""The commands of README and docs: each one's options exist, and those of the README run, in the order they stand in.

They run in a folder that holds what a reader has: the repository's scripts, configs and assets, pictures with captions,
prompts, and a model. Only sizes and names of what would be downloaded differ, by the tables below.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import fewstep.commands.train
from fewstep.commands.cli import run_cli
from fewstep.core.config import load_config
from fewstep.evaluation.measures.inception import WEIGHTS_NAME, _empty_network
from tests.dmd.run_server import RunServer
from tests.tiny_pipelines import build_sdxl, save_pipeline

COMMAND = re.compile(r"^(python (scripts/|-c|-m)|accelerate launch |fewstep |make |pip install )")
# Not run here: they set up the environment that this test runs in, or are this test, or are run by tests of their own.
ELSEWHERE = ("make demo", "make test", "make vbench-env", "pip install")
# Words that a reader replaces by something of his own: such a command has its options looked at alone.
PLACEHOLDERS = re.compile(r"\b(TEACHER|RUN|NAME|FILE|FOLDER|DIR|VBENCH|VBench)\b|\$k")
SDXL = "stabilityai/stable-diffusion-xl-base-1.0"
STAND_INS = {
    SDXL: "sdxl",
    WEIGHTS_NAME: "inception.safetensors",
    "--height 1024 --width 1024": "--height 16 --width 16",
    "--device cuda": "--device cpu",
    "configs/accelerate/gpus_8.yaml": "configs/accelerate/cpu.yaml",
    "--samples 5000": "--samples 20 --timing_repeats 1",
    "--chunks 40": "--chunks 3",
    "--chunks 20 --switch 12:": "--chunks 3 --switch 2:",
    "runs/student": "runs/digits_self_forcing",
    "--output runs/digits_pairs": "--output runs/digits_pairs --count 8 --steps 2",
    "make_digits_steered.py": "make_digits_steered.py --count 20",
    "runs/demo/digits_1step_seed0/export": "assets/digits_image",
    "chunks=40": "chunks=2",
}
# What makes a training short; the settings of the method stay.
SHORT = ("--run.steps", "2", "--run.sample_every", "1000", "--data.sample_count", "1")
SMALLER: dict[str, Sequence[str]] = {
    "configs/digits/flash.yaml": ("--run.batch_size", "8", "--reward.group_size", "4"),
    "configs/digits_video/astrolabe.yaml": ("--run.batch_size", "4", "--reward.group_size", "2"),
    "configs/sdxl/dmd2_4step_lora.yaml": (
        *("--teacher.path", "sdxl", "--data.height", "16", "--data.width", "16", "--run.batch_size", "2"),
        *("--run.gradient_accumulation", "1"),
    ),
    "configs/digits/dmd_2step.yaml": ("--run.batch_size", "4"),
    "configs/digits/rtdmd.yaml": ("--run.batch_size", "8", "--reward.group_size", "4"),
    **dict.fromkeys(
        [f"configs/digits_video/{name}.yaml" for name in ("teacher_forcing", "tf_dcm", "self_forcing")],
        ("--run.batch_size", "2"),
    ),
}


def commands_of(text: str) -> list[str]:
    """The commands of a page's indented blocks, each on one line, loops unrolled, remarks left out."""
    found: list[str] = []
    joined = re.sub(r" *\\\n +", " ", text)
    for line in joined.split("\n"):
        if not line.startswith("    ") or line.startswith("     "):
            continue
        command = re.sub(r" {2,}#.*$", "", line.strip())
        loop = re.fullmatch(r"for (\w) in ([\w ]+); do (.*); done", command)
        each = [command] if loop is None else [loop[3].replace(f"${loop[1]}", value) for value in loop[2].split()]
        found += [one for one in each if COMMAND.match(one)]
    return found


def snippets_of(text: str) -> list[str]:
    """The Python blocks of a page, which begin with an import."""
    blocks = re.findall(r"(?:^    .*\n|^\n(?=    ))+", text, flags=re.MULTILINE)
    plain = ["\n".join(line[4:] for line in block.split("\n")).strip() for block in blocks]
    starts = [re.search(r"^(?:from|import) .*", block, flags=re.MULTILINE | re.DOTALL) for block in plain]
    return [start[0] for start in starts if start is not None]


class Understood(Exception):
    """The options of a command were read."""


@contextlib.contextmanager
def stopping_after_options() -> Iterator[None]:
    """Commands end where their options are read, by argparse or as settings of a training."""
    parse = argparse.ArgumentParser.parse_args

    def parse_args(self: argparse.ArgumentParser, *arguments: Any, **named: Any) -> Any:
        parse(self, *arguments, **named)
        raise Understood

    def parse_config(config_class: type, argv: Sequence[str], *, prog: str, description: str) -> Any:
        load_config(config_class, argv, prog=prog, description=description)
        raise Understood

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
        patch.setattr(fewstep.commands.train, "parse_config", parse_config)
        yield


def words_of(command: str) -> list[str]:
    """The script and its arguments, without what launches it."""
    words = shlex.split(command)
    start = next(place for place, word in enumerate(words) if word.startswith("scripts/"))
    return words[start:]


def documented(repository: Path) -> dict[str, list[str]]:
    pages = [repository / "README.md", *sorted((repository / "docs").rglob("*.md"))]
    return {str(page.relative_to(repository)): commands_of(page.read_text(encoding="utf-8")) for page in pages}


def test_commands_are_found_as_they_stand() -> None:
    text = (
        "Text.\n\n    python scripts/a.py --x 1 \\\n        --y 2   # a remark\n    a = 3\n"
        "    for k in 1 4; do python scripts/b.py --steps $k; done\n\n- a list\n"
    )
    assert commands_of(text) == [
        "python scripts/a.py --x 1 --y 2",
        "python scripts/b.py --steps 1",
        "python scripts/b.py --steps 4",
    ]
    assert snippets_of("a\n\n    make y\n\n    from x import y\n\n    z = 1\n\nb\n\n    make x\n") == [
        "from x import y\n\nz = 1"
    ]
    assert words_of("accelerate launch --config_file c scripts/t.py --a 'b c'") == ["scripts/t.py", "--a", "b c"]


@pytest.mark.slow
def test_every_option_of_every_command_exists(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(repository)
    pages, seen = documented(repository), set()
    assert sum(len(found) for found in pages.values()) > 50
    for page, found in pages.items():
        for command in found:
            if command.startswith((*ELSEWHERE, "python -")) or command in seen:
                continue
            seen.add(command)
            if command.startswith("fewstep "):
                monkeypatch.setattr(sys, "argv", shlex.split(command))
                with stopping_after_options(), pytest.raises(Understood):
                    run_cli()
                continue
            script, *arguments = words_of(command)
            assert (repository / script).is_file(), f"{page}: {script} is not there"
            if "--help" in arguments:
                continue
            monkeypatch.setattr(sys, "argv", [script, *arguments])
            with stopping_after_options():
                try:
                    runpy.run_path(script, run_name="__main__")
                except Understood:
                    continue
                except (SystemExit, ValueError) as error:
                    pytest.fail(f"{page}: {command}\n{error}")
            pytest.fail(f"{page}: {command} reads no options")


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> Path:
    """A folder with what a reader of the README has."""
    folder = tmp_path_factory.mktemp("reader")
    for name in ("scripts", "configs", "assets", "commands"):
        (folder / name).symlink_to(repository / name)
    save_pipeline(build_sdxl(), folder / "sdxl")
    (folder / "photos").mkdir()
    lines = []
    for number in range(10):
        colour = tuple(int(23 * number * share) % 256 for share in (1, 2, 3))
        Image.new("RGB", (20, 24), colour).save(folder / "photos" / f"{number}.png")
        lines.append(json.dumps({"file_name": f"{number}.png", "text": f"colour {number}"}))
    (folder / "photos" / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "prompts.txt").write_text("a red fox\na blue hare\na green owl\n", encoding="utf-8")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        save_file(_empty_network().state_dict(), folder / "inception.safetensors")
    return folder


def adapted(command: str) -> list[str]:
    """The command with what stands in: a script and its arguments, or words for an interpreter after "-m"."""
    for theirs, ours in STAND_INS.items():
        command = command.replace(theirs, ours)
    words = shlex.split(command)
    if words[:2] == ["accelerate", "launch"]:
        config = words[words.index("--config") + 1]
        # With one process and no file of its own the launcher starts the script, and takes seconds for it.
        launcher = ["-m", "accelerate.commands.launch"] if "--config_file" in words else []
        few = SMALLER.get(config, ("--run.batch_size", "4"))
        words = [*launcher, *words[2:], *SHORT, *few]
    elif words[0] == "fewstep":
        words[0] = "commands/__main__.py"
        if words[1] == "train":
            words += [*SHORT, "--run.batch_size", "2"]
    else:
        words = words[1:]
    return words


# Of the docs: servers, a card of CUDA, a run of a model that is not here, help, and what takes minutes to make.
DOCS_ELSEWHERE = (
    *ELSEWHERE,
    *("python scripts/play_world.py", "python scripts/serve_scorer.py", "python -c"),
    *("python scripts/export_network.py --run runs/sd35", "python scripts/make_digits_sana_control.py"),
    "accelerate launch scripts/train_consistency.py --config configs/digits/sana_sprint_control.yaml",
    "python scripts/export_sana_control.py",
    # These go on from commands with placeholders.
    "python scripts/evaluate_video.py",
)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_readme_runs_in_its_order(repository: Path, workplace: Path) -> None:
    """From pictures to a judged export, a stream, and a reward; what one command needs, one before it has written."""
    text = (repository / "README.md").read_text(encoding="utf-8")
    with running(workplace) as run:
        ran = [run(one) for one in commands_of(text) if not one.startswith(ELSEWHERE) and not PLACEHOLDERS.search(one)]
        assert ran == [
            *("encode_latents.py", "train_dmd.py", "export_pipeline.py", "evaluate_image.py"),
            *("fewstep",) * 3,
            *("train_causal_video.py",) * 3,
            *("export_causal_video.py", "stream_video.py", "train_dmd.py", "train_reward.py"),
        ]
        assert (workplace / "runs" / "sdxl_dmd2_4step_lora" / "report" / "report.html").stat().st_size > 10_000
        snippets = snippets_of(text)
        assert len(snippets) == 2
        for number, snippet in enumerate(snippets):
            for theirs, ours in STAND_INS.items():
                snippet = snippet.replace(theirs, ours)
            (workplace / f"snippet_{number}.py").write_text(snippet, encoding="utf-8")
            run(f"python snippet_{number}.py")


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(os.environ.get("FEWSTEP_DOCUMENTS") != "all", reason="takes minutes; FEWSTEP_DOCUMENTS=all runs it")
def test_the_docs_run_in_their_order(repository: Path, workplace: Path) -> None:
    """Page by page, after the README, in the folder that it has left."""
    with running(workplace) as run:
        done, failed = set(commands_of((repository / "README.md").read_text(encoding="utf-8"))), []
        for page, found in documented(repository).items():
            for command in found:
                # Recipes and streams begin with commands of the README.
                skipped = command.startswith(DOCS_ELSEWHERE) or PLACEHOLDERS.search(command) or "--help" in command
                if page == "README.md" or skipped or command in done:
                    continue
                done.add(command)
                # A page may export again what one before it has exported.
                exports = command.startswith(("python scripts/export_pipeline.py", "python scripts/export_causal"))
                try:
                    run(f"{command} --overwrite" if exports else command)
                except AssertionError as error:
                    # All that fails at once: a page is repaired as a whole.
                    failed.append(f"{page}: {error}")
    assert len(done) > 50
    assert failed == []


@contextlib.contextmanager
def running(workplace: Path) -> Iterator[Callable[[str], str]]:
    """A function that runs a documented command to its end, and gives the name of its script."""
    shared = {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "XDG_CACHE_HOME": str(workplace)}

    def run(command: str) -> str:
        words = adapted(command)
        if words[0] == "-m":
            done = subprocess.run(
                [sys.executable, *words],
                cwd=workplace,
                env={**os.environ, **shared},
                capture_output=True,
                text=True,
                check=False,
                timeout=300,
            )
            assert done.returncode == 0, f"{command}\n{done.stderr[-4000:]}"
        else:
            log = workplace / "log.txt"
            log.unlink(missing_ok=True)
            place = {"script": workplace / words[0], "folder": workplace}
            started = server.start(*words[1:], log=log, environment=shared, **place)
            assert started.wait() == 0, f"{command}\n{log.read_text(encoding='utf-8')[-4000:]}"
        return command.split("scripts/")[-1].split()[0]

    with contextlib.closing(RunServer()) as server:
        yield run
