"""Imports point down, third-party libraries stay behind their adapters, nothing unpickles."""

import ast
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest

LAYERS = ("kernels", "core", "evaluation", "embedded", "dmd", "consistency", "causal_video", "commands", "scripts")
# Where a library may be imported. A star also matches in sub-folders.
ALLOWED_PLACES = {
    "accelerate": ("core/training/trainer.py", "core/training/trackers.py", "commands/*", "scripts/*"),
    "diffusers": (
        "core/denoiser.py",
        "core/teacher.py",
        "core/teacher_files.py",
        "core/families/*",
        "core/networks/*",
        "core/tangents/*",
        "core/export/*",
        "embedded/*",
        "evaluation/generation.py",
        "causal_video/*",
        "scripts/*",
    ),
    "triton": ("kernels/*_triton.py",),
}
# Run by the interpreter of another package, of which it imports what it is told.
OTHER_INTERPRETERS = ("evaluation/vbench/worker.py",)
UNSAFE_MODULES = {"pickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
UNSAFE_CALLS = {"torch.load", "torch.save", "torch.serialization.load", "allow_pickle"}
IMPORT_BY_STRING = {"__import__", "import_module", "importlib.import_module"}


def imported_modules(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of each import; `from a import b` gives a.b, a relative import starts with dots."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield node.lineno, f"{'.' * node.level}{node.module or ''}.{alias.name}"


def called_names(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of each call, and "allow_pickle" where a call has that argument."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            if isinstance(node.func, ast.Name | ast.Attribute):
                yield node.lineno, ast.unparse(node.func)
            if any(keyword.arg == "allow_pickle" for keyword in node.keywords):
                yield node.lineno, "allow_pickle"


def import_violation(place: str, module: str) -> str | None:
    """What is wrong with the import of `module` in the file `place` ("core/paths.py"), or None."""
    layer = place.split("/")[0]
    parts = module.split(".")
    if module.startswith("."):
        return "relative import; write the full fewstep name"
    if parts[0] in LAYERS:
        return f"import of the folder {parts[0]}; write fewstep.{parts[0]}"
    if layer == "tests":
        return None
    if parts[0] == "tests":
        return "import of tests from the package"
    if parts[0] == "fewstep":
        if len(parts) < 2 or parts[1] not in LAYERS[:-1]:
            return f"{module}: no such part of fewstep; parts are {', '.join(LAYERS[:-1])}"
        if LAYERS.index(parts[1]) > LAYERS.index(layer):
            return f"{layer} imports {parts[1]}; imports point {' <- '.join(LAYERS)}"
    allowed = ALLOWED_PLACES.get(parts[0])
    if allowed is not None and not any(fnmatch(place, pattern) for pattern in allowed):
        return f"{parts[0]} imported here; it may be in {', '.join(allowed)}"
    if parts[0] in UNSAFE_MODULES:
        return f"{parts[0]} can run code from a file; write safetensors and JSON"
    if module in UNSAFE_CALLS:
        return f"{module} pickles; write safetensors and JSON"
    return None


def call_violation(place: str, name: str) -> str | None:
    """What is wrong with a call of `name` in the file `place`, or None."""
    if place.startswith("tests/"):
        return None
    if name in UNSAFE_CALLS:
        return f"{name} pickles; write safetensors and JSON"
    if name in IMPORT_BY_STRING and place not in OTHER_INTERPRETERS:
        return f"{name} hides an import from this test; import the module"
    return None


def violations(root: Path, files: list[Path]) -> list[str]:
    """One line "file:line: what" per broken rule in the Python files of the layers and of tests."""
    found: list[str] = []
    for path in files:
        place = path.relative_to(root).as_posix()
        if path.suffix != ".py" or place.split("/")[0] not in (*LAYERS, "tests"):
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"), filename=place)
        checks = [(line, import_violation(place, module)) for line, module in imported_modules(tree)]
        checks += [(line, call_violation(place, name)) for line, name in called_names(tree)]
        found += [f"{place}:{line}: {problem}" for line, problem in checks if problem is not None]
    return found


@pytest.mark.slow
def test_repository_follows_the_architecture(repository: Path, repository_files: list[Path]) -> None:
    found = violations(repository, repository_files)
    assert len(found) == 0, "\n".join(found)


def test_documented_order_is_the_tested_order(repository: Path) -> None:
    text = (repository / "docs" / "architecture.md").read_text(encoding="utf-8")
    assert text.count(" <- ".join(LAYERS)) == 1


@pytest.mark.parametrize(
    ("place", "source", "message"),
    [
        ("kernels/attention.py", "from fewstep.core.paths import add_noise", "kernels imports core"),
        ("core/student.py", "import fewstep.evaluation.metrics", "core imports evaluation"),
        ("core/student.py", "def f():\n    from fewstep import dmd", "core imports dmd"),
        ("evaluation/report.py", "from fewstep.dmd.loss import x", "evaluation imports dmd"),
        ("evaluation/report.py", "from fewstep.embedded.digits import x", "evaluation imports embedded"),
        ("dmd/train.py", "from fewstep.consistency.loss import x", "dmd imports consistency"),
        ("consistency/train.py", "from fewstep.causal_video import cache", "consistency imports causal_video"),
        ("dmd/train.py", "from fewstep import nowhere", "no such part"),
        ("core/student.py", "from . import paths", "relative import"),
        ("core/student.py", "import core.paths", "write fewstep.core"),
        ("tests/test_x.py", "from kernels import attention", "write fewstep.kernels"),
        ("core/student.py", "import tests.conftest", "import of tests"),
        ("core/student.py", "import accelerate.utils", "accelerate imported here"),
        ("dmd/train.py", "from diffusers import UNet2DConditionModel", "diffusers imported here"),
        ("evaluation/report.py", "if True:\n    import diffusers", "diffusers imported here"),
        ("kernels/attention.py", "import triton.language as tl", "triton imported here"),
        ("core/checkpoint.py", "import pickle", "can run code"),
        ("core/checkpoint.py", "import torch\nx = torch.load('a')", "torch.load pickles"),
        ("core/checkpoint.py", "from torch import save", "torch.save pickles"),
        ("core/data.py", "import numpy as np\nx = np.load('a', allow_pickle=True)", "allow_pickle pickles"),
        ("core/config.py", "import importlib\nx = importlib.import_module('dmd')", "hides an import"),
    ],
)
def test_planted_violation_is_found(tmp_path: Path, place: str, source: str, message: str) -> None:
    path = tmp_path / place
    path.parent.mkdir(parents=True)
    path.write_text(source + "\n", encoding="utf-8")
    found = violations(tmp_path, [path])
    assert len(found) == 1
    assert message in found[0]
    assert found[0].startswith(place)


@pytest.mark.parametrize(
    ("place", "source"),
    [
        ("core/families/sd3.py", "from diffusers import SD3Transformer2DModel"),
        ("core/export/model_card.py", "import diffusers"),
        ("core/training/trainer.py", "from accelerate import Accelerator"),
        ("scripts/train_dmd.py", "from fewstep.dmd.train import train_dmd"),
        ("dmd/train.py", "from fewstep.core.student import Student\nfrom fewstep.dmd.loss import x"),
        ("kernels/attention_triton.py", "import triton"),
        ("tests/core/test_checkpoint.py", "import pickle\nfrom fewstep.core import checkpoint"),
    ],
)
def test_allowed_imports_are_not_reported(tmp_path: Path, place: str, source: str) -> None:
    path = tmp_path / place
    path.parent.mkdir(parents=True)
    path.write_text(source + "\n", encoding="utf-8")
    assert len(violations(tmp_path, [path])) == 0
