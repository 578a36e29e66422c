"""The documentation as a site: pages of the repository where they stand, and a page of reference per module.

Pages keep their places, so their links among each other hold in the repository and in the site alike; what else they
link to (records, pictures, single files of code) comes along.
"""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

PACKAGES = ("core", "dmd", "consistency", "causal_video", "kernels", "evaluation", "embedded", "commands")
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)\s]*)?\)")
# A file of each site, by which an earlier one is known.
SITE_MARK = "objects.inv"
TITLES = {"README.md": "Overview", "CONTRIBUTING.md": "Contributing", "CHANGELOG.md": "Changes"}
# What mkdocs says of a name in brackets that is no reference is not about links.
OPTIONS: dict[str, Any] = {
    "show_source": False,
    "show_root_heading": True,
    "show_root_full_path": True,
    "members_order": "source",
    "docstring_style": "google",
    "docstring_options": {"warnings": False},
    "filters": ["!^_"],
    "heading_level": 1,
    "separate_signature": True,
    "show_signature_annotations": True,
}


def pages_of(root: Path) -> list[Path]:
    """README, docs and the two pages about the project, relative to the repository."""
    own = [Path(name) for name in TITLES]
    return own + sorted(path.relative_to(root) for path in (root / "docs").rglob("*.md"))


def linked_files(root: Path, pages: Sequence[Path]) -> set[Path]:
    """Files beside the pages that they link to, and pages that those link to. Raises ValueError for a dead link."""
    found: set[Path] = set()
    waiting = list(pages)
    while waiting:
        page = waiting.pop()
        for target in LINK.findall((root / page).read_text(encoding="utf-8")):
            if re.match(r"[a-z]+:", target):
                continue
            path = (root / page).parent / target
            if not path.exists():
                raise ValueError(f"{page} links to {target}, and there is no such file")
            inside = path.resolve().relative_to(root.resolve())
            if path.is_file() and inside not in found and inside not in pages:
                found.add(inside)
                if inside.suffix == ".md":
                    waiting.append(inside)
    return found


def modules_of(root: Path) -> list[str]:
    """Modules with public classes or functions, by their names as they are imported."""
    names = []
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            kinds = (ast.ClassDef, ast.FunctionDef)
            if any(isinstance(node, kinds) and not node.name.startswith("_") for node in tree.body):
                names.append("fewstep." + ".".join(path.relative_to(root).with_suffix("").parts))
    return names


def build_site(output: str | Path, *, modules: Sequence[str] | None = None, root: Path | None = None) -> int:
    """Write the site; returns how many pages it has.

    Raises:
        ValueError: a page links to nothing, or a module is unknown.
        RuntimeError: mkdocs is missing, or finds a link or a name that leads nowhere.
    """
    root = Path(__file__).resolve().parents[2] if root is None else root
    place = Path(output)
    if place.exists() and not (
        place.is_dir() and (SITE_MARK in {p.name for p in place.iterdir()} or not any(place.iterdir()))
    ):
        raise ValueError(
            f"{place} exists and is no site of an earlier build; give another folder, or remove it yourself"
        )
    known = modules_of(root)
    chosen = known if modules is None else list(modules)
    for name in chosen:
        if name not in known:
            raise ValueError(f"{name} is no module with public names; such as {known[0]}")
    pages = pages_of(root)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "pages"
        for path in [*pages, *linked_files(root, pages)]:
            # A README is the front page of its folder, and code is shown as text.
            target = source / path
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(root / path, target)
        for name in chosen:
            place = source / "reference" / f"{name}.md"
            place.parent.mkdir(exist_ok=True)
            place.write_text(f"::: {name}\n", encoding="utf-8")
        config = Path(folder) / "mkdocs.yml"
        config.write_text(yaml.safe_dump(_config(root, source, pages, chosen), sort_keys=False), encoding="utf-8")
        target = Path(output).resolve()
        command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--config-file", str(config)]
        told = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "NO_COLOR": "1"}
        run = {"capture_output": True, "text": True, "check": False, "env": told}
        done = subprocess.run([*command, "--site-dir", str(target)], **run)
        if done.returncode != 0:
            lines = [
                line for line in done.stderr.splitlines() if "WARNING" in line or "ERROR" in line or "No module" in line
            ]
            raise RuntimeError("mkdocs: " + "\n".join(lines[:20] or [done.stderr[-800:]]))
    return len(pages) + len(chosen)


def _config(root: Path, source: Path, pages: Sequence[Path], modules: Sequence[str]) -> dict[str, Any]:
    reference: dict[str, list[Any]] = {}
    for name in modules:
        reference.setdefault(name.split(".")[1], []).append({name.removeprefix("fewstep."): f"reference/{name}.md"})
    docs = [str(page) for page in pages if page.parts[0] == "docs" and "methods" not in page.parts]
    methods = [str(page) for page in pages if "methods" in page.parts]
    return {
        "site_name": "fewstep",
        "docs_dir": str(source),
        "theme": {
            "name": "material",
            "font": False,
            "features": ["navigation.tabs", "navigation.indexes", "content.code.copy", "toc.follow"],
            "palette": [{"media": "(prefers-color-scheme)", "scheme": "default", "primary": "blue grey"}],
        },
        "plugins": [
            "search",
            {"mkdocstrings": {"handlers": {"python": {"paths": [str(root / ".typing")], "options": OPTIONS}}}},
        ],
        "markdown_extensions": ["tables", "toc", "pymdownx.highlight"],
        "validation": {
            "omitted_files": "info",
            "absolute_links": "warn",
            "unrecognized_links": "warn",
            "anchors": "warn",
        },
        "nav": [
            {"Overview": "README.md"},
            {"Guides": docs},
            {"Methods": methods},
            {"Reference": [{package: found} for package, found in reference.items()]},
            {"Project": ["CONTRIBUTING.md", "CHANGELOG.md"]},
        ],
    }
