"""The embedded teacher where configurations look for it, for those who installed the wheel alone: `fewstep teacher`."""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

# As the configurations of the digits name it.
PLACE = "assets/digits_image"


def _options(about: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--output", default=PLACE, help="folder to create")
    return parser.parse_args()


def write_teacher(about: str = "") -> None:
    """Write the digits teacher with its prompts, latents and classifiers, and end the process."""
    options = _options(about)
    # Beside this package, in the repository as in a wheel.
    source, output = Path(__file__).resolve().parent.parent / PLACE, Path(options.output)
    if output.exists() and output.resolve() != source:
        sys.exit(f"error: {output} exists; give another folder, or remove it yourself")
    if not output.exists():
        try:
            _copy(source, output)
        except OSError as error:
            sys.exit(f"error: {output} cannot be written: {error}")
    print(f"{output}: a Stable Diffusion 3 of 1.7 M parameters that draws digits")
    print("next: fewstep train dmd --config digits/dmd_1step")


def _copy(source: Path, output: Path) -> None:
    """The whole folder, or nothing."""
    output.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    try:
        shutil.copytree(source, draft / "teacher")
        (draft / "teacher").rename(output)
    finally:
        shutil.rmtree(draft)
