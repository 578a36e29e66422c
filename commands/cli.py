"""The command `fewstep`: the scripts of the repository under one name, for those who installed the wheel alone.

fewstep train dmd --config sdxl/dmd2_4step_lora --data.prompts prompts.txt
accelerate launch -m fewstep.commands train dmd --config sdxl/dmd2_4step_lora ...
fewstep export --run runs/x
fewstep evaluate image --pipeline runs/x/export ...
fewstep stream --model runs/y/export --prompt "a seven moving left slowly"
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version

from fewstep.commands.draw_suite import draw_suite
from fewstep.commands.encode import encode_images, encode_videos, make_pairs
from fewstep.commands.evaluate_image import evaluate_image
from fewstep.commands.evaluate_video import evaluate_video
from fewstep.commands.export import export_causal_video, export_network_folder, export_pipeline
from fewstep.commands.report_runs import report_runs
from fewstep.commands.stream import stream_video
from fewstep.commands.teacher import write_teacher
from fewstep.commands.train import TRAININGS, config_names, run_training

HELP = ("-h", "--help", "help")


def _list_configs(about: str) -> None:
    del about
    print("\n".join(config_names()))


# Words after `fewstep`, what they do, and the command, which reads its own options.
COMMANDS: dict[str, tuple[str, Callable[[str], None]]] = {
    "encode": ("pictures with captions as latents, for gan.latents and data.latents", encode_images),
    "encode videos": ("videos with captions as latents", encode_videos),
    "pairs": ("pairs of noise and teacher sample, for regression.pairs", make_pairs),
    "export": ("a student as a diffusers pipeline", export_pipeline),
    "export video": ("a causal student as a streamable pipeline", export_causal_video),
    "export network": ("a network of a run as a folder to start from", export_network_folder),
    "evaluate image": ("judge pipelines or pictures, and write a page", evaluate_image),
    "evaluate video": ("draw, measure, and score videos with VBench", evaluate_video),
    "evaluate suite": ("pictures for GenEval, DPG-Bench or T2I-CompBench", draw_suite),
    "report": ("a page of training runs, with their settings compared", report_runs),
    "stream": ("a video of a causal student, to a file", stream_video),
    "teacher": ("the embedded digits teacher, where configurations look for it", write_teacher),
    "configs": ("list the configurations for --config NAME", _list_configs),
}


def run_cli() -> None:
    """Find the command in sys.argv, and hand it the rest. Ends the process."""
    words = sys.argv[1:]
    if not words or words[0] in HELP:
        print(overview())
        sys.exit(0 if words else 2)
    if words[0] == "--version":
        print(version("fewstep"))
        sys.exit(0)
    if words[0] == "train":
        _train(words[1:])
    for length in (2, 1):
        name = " ".join(words[:length])
        if name in COMMANDS:
            sys.argv = [f"fewstep {name}", *words[length:]]
            about, command = COMMANDS[name]
            command(f"{about[0].upper()}{about[1:]}.")
            return
    _unknown(" ".join(words[:2]), [*COMMANDS, "train"])


def _train(words: Sequence[str]) -> None:
    if not words or words[0] in HELP:
        print("fewstep train NAME --config FILE_OR_NAME ..., where NAME is one of\n")
        print("\n".join(f"  {name:14} {training.about}" for name, training in TRAININGS.items()))
        sys.exit(0 if words else 2)
    if words[0] not in TRAININGS:
        _unknown(f"train {words[0]}", [f"train {name}" for name in TRAININGS])
    run_training(words[0], prog=f"fewstep train {words[0]}", description=TRAININGS[words[0]].about, arguments=words[1:])


def _unknown(given: str, known: Sequence[str]) -> None:
    near = difflib.get_close_matches(given, known, n=1, cutoff=0.3)
    meant = f"; did you mean {near[0]!r}?" if near else ""
    sys.exit(f"error: fewstep has no command {given!r}{meant} `fewstep --help` lists them")


def overview() -> str:
    """All commands with a line each."""
    lines = [(f"train {name}", training.about) for name, training in TRAININGS.items()]
    lines += [(name, about) for name, (about, _) in COMMANDS.items()]
    return "fewstep COMMAND ..., each with --help:\n\n" + "\n".join(f"  {name:20} {about}" for name, about in lines)
