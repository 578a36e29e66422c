"""Which folders are the package: each of these, with all that lies below, is installed as `fewstep.<folder>`.

A list in pyproject.toml would have to name every folder below, too, and one left out would be missing in the wheel
without a word.
"""

from setuptools import find_packages, setup

FOLDERS = ("core", "evaluation", "embedded", "dmd", "consistency", "causal_video", "commands", "kernels")

setup(
    packages=[
        f"fewstep.{name}"
        for folder in FOLDERS
        for name in (folder, *(f"{folder}.{inner}" for inner in find_packages(folder)))
    ]
    # Files alone: configurations, so that `--config NAME` finds them, and the teacher that `fewstep teacher` writes.
    + ["fewstep.configs", "fewstep.assets.digits_image"],
    package_dir={
        **{f"fewstep.{folder}": folder for folder in (*FOLDERS, "configs")},
        "fewstep.assets.digits_image": "assets/digits_image",
    },
)
