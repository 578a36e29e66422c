"""What is installed is what is in the tree, and it lives beside the Hugging Face package `kernels`."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest

NOT_PACKAGED = {"scripts", "tests", "setup.py"}
TIMEOUT_SECONDS = 120


def run_python(*arguments: str, cwd: Path, path: tuple[Path, ...] = ()) -> str:
    """Standard output of the interpreter run in `cwd` with `path` as PYTHONPATH; the test fails if it fails."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path)), "PYTHONDONTWRITEBYTECODE": "1"}
    result = subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    assert result.returncode == 0, f"{arguments}\n{result.stdout}\n{result.stderr}"
    return result.stdout.strip()


def code_files(root: Path, files: list[Path]) -> list[str]:
    """Python files of the package, as paths below the root."""
    places = [path.relative_to(root) for path in files if path.suffix == ".py"]
    return [place.as_posix() for place in places if place.parts[0] not in NOT_PACKAGED]


@pytest.fixture(scope="module")
def project(repository: Path) -> dict[str, Any]:
    return tomllib.loads((repository / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def wheel(repository: Path, repository_files: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel built from a copy of the tree, so that neither the tree nor the editable install is touched."""
    folder = tmp_path_factory.mktemp("wheel")
    for path in repository_files:
        copy = folder / "tree" / path.relative_to(repository)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
    command = ("-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder / "dist"), str(folder / "tree"))
    run_python(*command, cwd=folder)
    (built,) = (folder / "dist").glob("*.whl")
    return built


@pytest.fixture
def stub_kernels(tmp_path: Path) -> Path:
    """A folder with a distribution that has the name and the entry function of the Hugging Face package."""
    folder = tmp_path / "stub"
    (folder / "kernels").mkdir(parents=True)
    (folder / "kernels" / "__init__.py").write_text("def get_kernel(name):\n    return 'stub ' + name\n")
    information = folder / "kernels-0.18.2.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.18.2\n")
    return folder


def top_folders(repository: Path) -> set[str]:
    """The folders that setup.py names."""
    (named,) = re.findall(r"FOLDERS = (\(.*\))", (repository / "setup.py").read_text(encoding="utf-8"))
    return set(ast.literal_eval(named))


def test_every_code_folder_is_packaged(repository: Path, repository_files: list[Path]) -> None:
    places = code_files(repository, repository_files)
    assert {place.split("/")[0] for place in places} == top_folders(repository)
    assert len(top_folders(repository)) == 8
    folders = {str(Path(place).parent) for place in places} - {"kernels"}
    assert all((repository / folder / "__init__.py").is_file() for folder in folders)


def test_type_checkers_see_every_package(repository: Path) -> None:
    links = sorted((repository / ".typing" / "fewstep").iterdir())
    assert {link.name for link in links} == top_folders(repository)
    for link in links:
        assert link.resolve() == repository / link.name
        assert (repository / link.name / "py.typed").is_file()


def test_pyright_finds_planted_errors_in_every_folder(repository: Path, tmp_path: Path) -> None:
    """Pyright skips dot folders and unnamed links without a word, so that it says 0 errors must be earned."""
    shutil.copytree(repository / ".typing", tmp_path / ".typing", symlinks=True)
    (tmp_path / ".venv").symlink_to(sys.prefix)
    packages = [link.name for link in (repository / ".typing" / "fewstep").iterdir()]
    for folder in (*packages, "scripts", "tests"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "planted.py").write_text("number: int = 'text'\n")
    # Across two files: the same class seen through the link and through the folder would be two classes.
    (tmp_path / "core" / "first.py").write_text(
        "from fewstep.core.second import g\n\n\nclass A:\n    def f(self) -> int:\n        return g(self)\n"
    )
    (tmp_path / "core" / "second.py").write_text(
        "from fewstep.core.first import A\n\n\ndef g(a: A) -> int:\n    return 1\n"
    )
    command = (sys.executable, "-m", "pyright", "-p", str(tmp_path / ".typing"), "--outputjson")
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False)
    found = json.loads(result.stdout)["generalDiagnostics"]
    places = sorted("/".join(Path(entry["file"]).parts[-2:]) for entry in found)
    assert places == sorted(f"{folder}/planted.py" for folder in (*packages, "scripts", "tests"))


def test_kernels_cannot_shadow(repository: Path) -> None:
    assert not (repository / "kernels" / "__init__.py").exists()
    code = "import importlib.util as u; s = u.find_spec('kernels'); print(s is None or s.origin is None)"
    assert run_python("-S", "-c", code, cwd=repository, path=(repository,)) == "True"


@pytest.mark.parametrize("stub_first", [True, False])
def test_get_kernel_is_the_installed_one(repository: Path, stub_kernels: Path, stub_first: bool) -> None:
    path = (stub_kernels, repository) if stub_first else (repository, stub_kernels)
    code = "from kernels import get_kernel; print(get_kernel('x'))"
    # Not in the root: `python -c` would put it first.
    assert run_python("-c", code, cwd=stub_kernels.parent, path=path) == "stub x"


@pytest.mark.slow
@pytest.mark.parametrize("with_stub", [True, False])
def test_diffusers_and_transformers_beside_the_folder(repository: Path, stub_kernels: Path, with_stub: bool) -> None:
    code = """if True:
        import importlib.metadata as m
        import diffusers, transformers
        from diffusers.utils.import_utils import is_kernels_available as first
        from transformers.utils import is_kernels_available as second
        installed = bool(list(m.distributions(name="kernels")))
        print(installed, bool(first()), bool(second("0.1", "9.9")))
    """
    # The root comes first on the path: the worse case for a package installed under the same name.
    path = (repository, stub_kernels) if with_stub else (repository,)
    installed, diffusers_says, transformers_says = run_python("-c", code, cwd=repository, path=path).split()
    assert diffusers_says == transformers_says == installed
    assert installed == "True" or not with_stub


def test_wheel_holds_the_package_and_nothing_else(wheel: Path, repository: Path, repository_files: list[Path]) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    code = {f"fewstep/{place}" for place in code_files(repository, repository_files)}
    assert {name for name in names if name.endswith(".py")} == code
    assert not any(re.search(r"study|studies|toy|benchmark", name) for name in names)
    top = {place.split("/")[1] for place in code} | {"kernels"}
    assert {name for name in names if name.endswith("py.typed")} == {f"fewstep/{folder}/py.typed" for folder in top}
    assert {name.split("/")[0] for name in names} == {"fewstep"}
    assert {name.split("/")[1] for name in names} == top | {"configs", "assets"}
    teacher = [
        path for path in repository_files if path.relative_to(repository).parts[:2] == ("assets", "digits_image")
    ]
    assert {name for name in names if "/assets/" in name} == {
        f"fewstep/{path.relative_to(repository).as_posix()}" for path in teacher
    }
    configs = {
        f"fewstep/{path.relative_to(repository).as_posix()}" for path in repository_files if path.suffix == ".yaml"
    }
    assert {name for name in names if "/configs/" in name} == {name for name in configs if "/configs/" in name}
    assert "fewstep/evaluation/vbench/requirements.txt" in names
    templates = [
        f"fewstep/{path.relative_to(repository).as_posix()}"
        for path in repository_files
        if path.suffix == ".html" and path.relative_to(repository).parts[0] == "evaluation"
    ]
    assert len(set(templates) - names) == 0


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which the wheel alone is installed."""
    target = tmp_path_factory.mktemp("site")
    command = ("-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(target), str(wheel))
    run_python(*command, cwd=target)
    return target


@pytest.mark.slow
def test_every_module_of_the_wheel_can_be_imported(installed: Path, tmp_path: Path) -> None:
    """Without the repository beside it: nothing packaged needs scripts, configurations or tests."""
    names = [path.relative_to(installed).with_suffix("").as_posix() for path in installed.glob("fewstep/**/*.py")]
    modules = sorted(name.replace("/", ".").removesuffix(".__init__") for name in names)
    assert len(modules) > 200
    # Triton's kernels are written in its own language, and are imported where there is a GPU.
    chosen = [name for name in modules if not name.endswith("_triton")]
    code = f"import importlib\nfor name in {chosen!r}: importlib.import_module(name)\nprint(len({chosen!r}))"
    assert int(run_python("-c", code, cwd=tmp_path, path=(installed,)).splitlines()[-1]) == len(chosen)


@pytest.mark.slow
def test_the_wheel_alone_trains_on_its_own_teacher(installed: Path, tmp_path: Path) -> None:
    """The three commands of the README, without the repository; two steps in place of a thousand."""

    def fewstep(*words: str) -> str:
        return run_python("-m", "fewstep.commands", *words, cwd=tmp_path, path=(installed,))

    assert "assets/digits_image: a Stable Diffusion 3" in fewstep("teacher")
    assert (tmp_path / "assets" / "digits_image" / "train_latents" / "latents.safetensors").stat().st_size > 10**6
    short = ("--run.steps", "2", "--run.batch_size", "4", "--data.sample_count", "1")
    fewstep("train", "dmd", "--config", "digits/dmd_1step", *short)
    fewstep("export", "--run", "runs/digits_1step")
    assert (tmp_path / "runs" / "digits_1step" / "export" / "model_index.json").is_file()
    failed = subprocess.run(
        [sys.executable, "-m", "fewstep.commands", "teacher"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert failed.returncode == 1
    assert "error: assets/digits_image exists; give another folder" in failed.stderr


@pytest.mark.slow
def test_wheel_works_from_elsewhere(installed: Path, tmp_path: Path, project: dict[str, Any]) -> None:
    code = """if True:
        import importlib.metadata
        import fewstep.causal_video, fewstep.consistency, fewstep.embedded, fewstep.dmd, fewstep.evaluation
        from fewstep.core import grids
        print(grids.__file__)
        print(fewstep.evaluation.__file__)
        print(grids.step_grid(2))
        print(importlib.metadata.version("fewstep"))
    """
    file, other, grid, version = run_python("-c", code, cwd=tmp_path, path=(installed,)).splitlines()
    assert Path(file) == installed / "fewstep" / "core" / "grids.py"
    assert Path(other) == installed / "fewstep" / "evaluation" / "__init__.py"
    assert grid == "(1.0, 0.5)"
    assert version == project["project"]["version"]
