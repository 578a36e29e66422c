"""Files that are whole or not there."""

from __future__ import annotations

import os
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Write a text under another name and rename it; folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def link_file(source: Path, target: Path) -> None:
    """Give a file a second name; a copy where the file system has none. Folders are made."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        target.hardlink_to(source.resolve())
    except OSError:
        partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
        partial.write_bytes(source.read_bytes())
        partial.replace(target)
