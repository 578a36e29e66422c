"""Settings of every test: no network, few threads, fixed seeds, and the list of the repository's files."""

import os
import random
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Read by huggingface_hub, transformers and open_clip when they are first imported, which is after this line.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("MPLBACKEND", "Agg")

import numpy as np
import pytest
import torch

REPOSITORY = Path(__file__).resolve().parent.parent
SKIPPED_FOLDERS = {".venv", ".git", "runs", "build", "dist", "__pycache__", ".pytest_cache", ".ruff_cache"}
CLASSIFIER_EPOCHS = 6
LOOPBACK = {"localhost", "127.0.0.1", "::1", ""}

torch.set_num_threads(max(1, min(2, int(os.environ.get("OMP_NUM_THREADS", "1")))))


# A worker takes whole files: the longest first, so that none is left for the end.
LONGEST = (
    "test_documented_commands.py",
    "test_attention_triton.py",
    "test_recipes.py",
    "test_settings.py",
    "test_bf16_matrix.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Order the files; tests of a file stay as they are."""
    items.sort(key=lambda item: item.path.name not in LONGEST)


def list_repository_files(root: Path) -> list[Path]:
    """Files under `root` that git tracks or would offer to track, links left out; without git, a walk.

    A folder that merely lies inside somebody else's repository counts as one without git.
    """
    top = subprocess.run(
        ["git", "-C", str(root), "rev-parse", "--show-toplevel"], capture_output=True, text=True, check=False
    )
    if top.returncode == 0 and Path(top.stdout.strip()).resolve() == root.resolve():
        command = ["git", "-C", str(root), "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        files = [root / name for name in listing.split("\0") if name]
    else:
        files = [
            Path(folder, name)
            for folder, folders, names in os.walk(root)
            if not (set(Path(folder).relative_to(root).parts) & SKIPPED_FOLDERS)
            for name in names
        ]
    return sorted(path for path in set(files) if path.is_file() and not path.is_symlink())


@pytest.fixture
def fresh_accelerate() -> Iterator[None]:
    """For tests under another precision: accelerate keeps that of the first run of a process."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root folder of the repository."""
    return REPOSITORY


@pytest.fixture(scope="session")
def repository_files() -> list[Path]:
    """Absolute paths of the repository's files, generated and ignored ones left out."""
    files = list_repository_files(REPOSITORY)
    assert REPOSITORY / "pyproject.toml" in files
    return files


@pytest.fixture(autouse=True)
def seeds() -> None:
    """Same global seeds for each test. Code under test takes its randomness as an argument; this is for test data."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def no_network() -> Iterator[None]:
    """Connections that leave this machine are errors; those to the machine itself (process groups) stay possible."""
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: Any) -> None:
        if isinstance(address, tuple) and address[0] not in LOOPBACK:
            raise RuntimeError(f"A test connects to {address}; tests run without network, give them local files.")
        connect(self, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", guarded)
        yield


@pytest.fixture(scope="session")
def trained() -> Any:
    """A classifier of the digits after a few seconds of training, and its record."""
    from fewstep.embedded.digits.classifier import train_classifier

    return train_classifier(0, CLASSIFIER_EPOCHS, command="pytest")


@pytest.fixture(scope="session")
def classifier_folder(trained: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That classifier as files."""
    from fewstep.embedded.digits.classifier import save_classifier

    folder = tmp_path_factory.mktemp("classifier")
    save_classifier(trained[0], trained[1], path=folder)
    return folder
