"""README and docs say what the records say, and rank nothing that no interval ranks."""

import json
import re
from pathlib import Path

import pytest
import yaml
from studies import documents

RANKING = re.compile(
    r"\b(better|best|ahead of|outperform\w*|beats?|superior|worst|worse|pays least|state of the art)\b", re.I
)
# Sentences with such a word that compare no measured systems: what is optimised, chosen or asked for, and other papers.
NO_CLAIM = (
    "few-step students made better by a reward",
    "students made better by a reward",
    "student better by a reward",
    "made better by a reward model",
    "Lower is better? `higher_is_better=False`",
    "signed so that higher is better",
    "higher is better, not bounded",
    "best share of them",
    "`frames: 0.3` of their best",
    "pairs of the best and the worst, a discriminator on pixels",
    "best against worst of a group",
    "With certain winners (best against worst)",
    "how much better the policy denoises than the old one",
    "best for `monitor.patience` measurements",
    "and since that best it fell and the reward rose",
    "Its best w is minus the log",
    "worst row 2.2 times that of the dense one",
    "data that are better than the teacher",
    "when the data are better",
    "videos that move better than they look",
    "of the same videos or of better pictures",
    "look worse than the result should",
    "more steps should mean better samples",
    "DMD2 (arXiv:2405.14867) reports students ahead of their teacher",
    "Samplers that add noise between steps get worse",
    "trials that are not recorded 3e-4 was worse and 1e-3 diverged",
    "the page calls nothing better whose interval holds 0",
    "of [that table](docs/methods/consistency.md#measured) is called better than another",
    "No method is called better than another here",
    "so neither is called better",
    "is called better or worse where its interval leaves out 0",
    "headline, whiskers, twelve colours and markers, best and worst samples",
    "`--checkpoint best` takes the best weights of a [validation]",
    "runs/NAME/best/ the best averaged weights by a validation",
    "keeps those of the best figure",
    "--checkpoint best` exports them",
    "The best of many is better than it deserves",
    "finds the same best",
)


def pages(repository: Path) -> list[Path]:
    return [repository / "README.md", *sorted((repository / "docs").rglob("*.md"))]


def test_documents_agree_with_their_records(repository: Path) -> None:
    marked = documents.documents(repository)
    assert len(marked) >= 3
    for path in marked:
        text = path.read_text(encoding="utf-8")
        assert documents.updated(repository, text) == text, f"{path.name}: run python scripts/update_documents.py"


def test_every_figure_and_table_is_used(repository: Path) -> None:
    known = yaml.safe_load((repository / documents.FIGURES).read_text(encoding="utf-8"))
    text = "".join(path.read_text(encoding="utf-8") for path in pages(repository))
    assert [name for name in known["figures"] if f"<!--={name}-->" not in text] == []
    assert [name for name in known["tables"] if f"<!--table {name}-->" not in text] == []


def test_nothing_is_ranked_without_an_interval(repository: Path) -> None:
    """Words of tables come from decided differences (the test above); sentences may not have them."""
    found = []
    for path in pages(repository):
        text = documents.TABLE.sub("", path.read_text(encoding="utf-8"))
        # Sentences go over lines.
        flat = re.sub(r"\s+", " ", text)
        for sentence in NO_CLAIM:
            flat = flat.replace(sentence, "")
        found += [f"{path.name}: ...{flat[max(0, m.start() - 60) : m.end() + 40]}" for m in RANKING.finditer(flat)]
    assert found == []


def small_record(tmp_path: Path) -> Path:
    (tmp_path / "docs").mkdir()
    rows = [{"name": "a", "steps": 1, "value": 2.0}, {"name": "a", "steps": 2, "value": 0.5}]
    (tmp_path / "record.json").write_text(json.dumps({"rows": rows, "word": "x"}))
    figures = {
        "two": {"file": "record.json", "path": "rows[name=a;steps=2].value", "format": ".1f"},
        "ratio": {
            "file": "record.json",
            "path": "rows[0].value",
            "over": "rows[1].value",
            "scale": 100,
            "format": ".0f",
        },
        "word": {"file": "record.json", "path": "word"},
        "gone": {"file": "record.json", "path": "rows[name=b].value"},
    }
    (tmp_path / "docs" / "figures.yaml").write_text(yaml.safe_dump({"figures": figures, "tables": {}}))
    return tmp_path


def test_marks_are_filled_and_changed_numbers_found(tmp_path: Path) -> None:
    root = small_record(tmp_path)
    text = "a <!--=two-->9.9<!--/--> b <!--=ratio--><!--/--> <!--=word-->y<!--/-->"
    expected = "a <!--=two-->0.5<!--/--> b <!--=ratio-->400<!--/--> <!--=word-->x<!--/-->"
    assert documents.updated(root, text) == expected
    assert documents.updated(root, expected) == expected
    for mark, message in (("other", "has no figure 'other'"), ("gone", r"has nothing at 'rows\[name=b\]'")):
        with pytest.raises(ValueError, match=message):
            documents.updated(root, f"<!--={mark}--><!--/-->")
    with pytest.raises(ValueError, match="has no table 'other'"):
        documents.updated(root, "<!--table other-->\n<!--/table-->")


def test_differences_carry_the_word_of_their_interval() -> None:
    decided = {"value": -0.2, "low": -0.3, "high": -0.1, "decided": True}
    open_ = {**decided, "high": 0.1, "decided": False}
    assert documents._difference({"minus_baseline": {"fid": decided}}) == "-0.20 [-0.30, -0.10] better"
    assert documents._difference({"minus_baseline": {"fid": open_}}) == "-0.20 [-0.30, +0.10] same"
    assert documents._difference({"minus_baseline": {}}) == "baseline"
