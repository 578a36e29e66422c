"""One dimension of VBench in VBench's own environment; this file is run by the other interpreter and needs nothing
here.

python worker.py dimension NAME --videos DIR --info FILE --output FILE --device cuda
python worker.py filter --videos DIR --info FILE --output DIR --device cuda

What it prevents: downloads (programs that fetch are not started, connections fail), means over missing videos (the
list of videos is given by name), and other reductions on several processes (there is one).
"""

import argparse
import json
import os
import socket
import subprocess
import sys

FETCHERS = ("wget", "curl", "git", "pip", "gdown")


def refuse(what):
    raise RuntimeError(f"VBench wants to fetch {what}: give it all weights before")


def offline():
    """No connection leaves the machine, and no program that fetches is started: VBench calls wget and git."""
    start, system = subprocess.Popen.__init__, os.system

    def checked(self, args, *others, **options):
        words = args.split() if isinstance(args, str) else [str(part) for part in args]
        if os.path.basename(words[0]) in FETCHERS:
            refuse(words[:2])
        return start(self, args, *others, **options)

    def checked_system(command):
        if os.path.basename(command.split()[0]) in FETCHERS:
            refuse(command)
        return system(command)

    subprocess.Popen.__init__ = checked
    os.system = checked_system
    connect = socket.socket.connect

    def local(self, address):
        if isinstance(address, tuple) and address[0] not in ("127.0.0.1", "localhost", "::1"):
            refuse(address)
        return connect(self, address)

    socket.socket.connect = local
    # Its checkpoints are pickles, which torch opens since 2.6 only when it is told to.
    os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = "1"
    os.environ["HF_HUB_OFFLINE"] = "1"


def score_dimension(options):
    """The score of one dimension, with one result per video, as VBench writes them."""
    import importlib

    from vbench.utils import init_submodules  # pyright: ignore[reportMissingImports]

    name = options.name
    submodules = init_submodules([name], local=True)[name]
    module = importlib.import_module(f"vbench.{name}")
    value, videos = getattr(module, f"compute_{name}")(options.info, options.device, submodules)
    with open(options.info, encoding="utf-8") as stream:
        given = sum(len(entry["video_list"]) for entry in json.load(stream))
    if len(videos) != given:
        raise RuntimeError(f"{name} judged {len(videos)} of {given} videos: one of them cannot be read")
    with open(options.output + ".partial", "w", encoding="utf-8") as stream:
        json.dump({name: [float(value), videos]}, stream)
    os.replace(options.output + ".partial", options.output)


def static_filter(options):
    """Videos of each prompt without motion, by VBench's own filter: {name: true or false}."""
    from vbench.cli import static_filter as filters  # pyright: ignore[reportMissingImports]
    from vbench.utils import CACHE_DIR  # pyright: ignore[reportMissingImports]

    filters.DEVICE = options.device
    model = os.path.join(CACHE_DIR, "raft_model", "models", "raft-things.pth")
    settings = argparse.Namespace(model=model, small=False, mixed_precision=False, alternate_corr=False)
    chosen = filters.StaticFilter(settings, device=options.device)
    with open(options.info, encoding="utf-8") as stream:
        names = [path for entry in json.load(stream) for path in entry["video_list"]]
    found = {os.path.basename(path): bool(chosen.infer(path)) for path in names}
    with open(options.output + ".partial", "w", encoding="utf-8") as stream:
        json.dump(found, stream)
    os.replace(options.output + ".partial", options.output)


def long(options):
    """A dimension of VBench-Long, from a checkout: its clips are cut beside the videos, and scored by clip."""
    import glob
    import shutil

    sys.path.insert(0, options.root)
    from vbench2_beta_long import eval_long  # pyright: ignore[reportMissingImports]

    draft = options.output + ".draft"
    shutil.rmtree(draft, ignore_errors=True)
    sys.argv = ["eval_long.py", "--videos_path", options.videos, "--dimension", options.name]
    sys.argv += ["--mode", "long_vbench_standard", "--dev_flag", "--load_ckpt_from_local", "true"]
    sys.argv += ["--full_json_dir", options.info, "--output_path", draft]
    if options.name == "temporal_flickering":
        sys.argv.append("--static_filter_flag")
    eval_long.main()
    (written,) = glob.glob(os.path.join(draft, "*_eval_results.json"))
    os.replace(written, options.output)
    shutil.rmtree(draft)


def check(_):
    """Import what the dimensions import, and say what fails."""
    import importlib

    found = {}
    for name in sys.stdin.read().split():
        try:
            importlib.import_module(f"vbench.{name}")
            found[name] = ""
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
    print(json.dumps(found))


def run_command():
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(required=True)
    for name, run in (("dimension", score_dimension), ("filter", static_filter), ("long", long), ("check", check)):
        command = commands.add_parser(name)
        command.set_defaults(run=run)
        if name in ("dimension", "long"):
            command.add_argument("name")
        for option in ("--videos", "--info", "--output", "--root"):
            command.add_argument(option)
        command.add_argument("--device", default="cuda")
    options = parser.parse_args()
    offline()
    options.run(options)


if __name__ == "__main__":
    run_command()
