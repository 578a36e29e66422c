"""The documentation as a site: all pages and a reference in it, and no link that leads nowhere."""

from __future__ import annotations

from pathlib import Path

import pytest
from studies.site import build_site, linked_files, modules_of, pages_of


@pytest.mark.slow
def test_the_repositorys_pages_become_a_site(repository: Path, tmp_path: Path) -> None:
    """All pages, with a part of the reference; `make docs` builds all of it."""
    modules = ["fewstep.core.paths", "fewstep.kernels.attention"]
    count = build_site(tmp_path / "site", modules=modules)
    assert count == len(pages_of(repository)) + 2
    front = (tmp_path / "site" / "index.html").read_text(encoding="utf-8")
    assert "Two commands" in front
    reference = (tmp_path / "site" / "reference" / "fewstep.core.paths" / "index.html").read_text(encoding="utf-8")
    assert 'id="fewstep.core.paths.add_noise"' in reference
    assert "_private" not in reference
    assert (tmp_path / "site" / "assets" / "benchmarks" / "training_step.json").is_file()
    assert len(modules_of(repository)) > 250


def small(root: Path, text: str) -> Path:
    """A repository of three pages."""
    (root / "docs").mkdir(parents=True)
    (root / "README.md").write_text(text, encoding="utf-8")
    for name in ("CONTRIBUTING.md", "CHANGELOG.md", "docs/guide.md"):
        (root / name).write_text("# Title\n\n## Part\n", encoding="utf-8")
    return root


def test_a_link_to_nothing_is_an_error(tmp_path: Path) -> None:
    root = small(tmp_path, "# A\n\n[gone](docs/gone.md)\n")
    with pytest.raises(ValueError, match=r"README\.md links to docs/gone\.md, and there is no such file"):
        build_site(tmp_path / "site", root=root)
    assert not (tmp_path / "site").exists()


@pytest.mark.slow
def test_a_link_to_no_heading_is_an_error(tmp_path: Path) -> None:
    root = small(tmp_path, "# A\n\n[a part](docs/guide.md#no-such-part)\n")
    with pytest.raises(RuntimeError, match="no-such-part"):
        build_site(tmp_path / "site", root=root)
    (root / "README.md").write_text("# A\n\n[a part](docs/guide.md#part)\n", encoding="utf-8")
    assert build_site(tmp_path / "site", root=root) == 4


def test_what_pages_link_to_comes_along(tmp_path: Path) -> None:
    root = small(tmp_path, "# A\n\n[record](record.json) [more](notes/more.md) [web](https://example.org/a)\n")
    (root / "record.json").write_text("{}", encoding="utf-8")
    (root / "notes").mkdir()
    (root / "notes" / "more.md").write_text("[picture](picture.png)\n", encoding="utf-8")
    (root / "notes" / "picture.png").write_bytes(b"")
    found = linked_files(root, pages_of(root))
    assert found == {Path("record.json"), Path("notes/more.md"), Path("notes/picture.png")}


def test_an_unknown_module_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"fewstep\.core\.nothing is no module with public names"):
        build_site(tmp_path / "site", modules=["fewstep.core.nothing"])


def test_a_folder_of_something_else_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "mine.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(ValueError, match="exists and is no site of an earlier build"):
        build_site(tmp_path / "site", modules=[])
    assert (tmp_path / "site" / "mine.txt").is_file()
