"""Names become scorers, and what is missing is said before anything is trained."""

import pytest

from fewstep.dmd.reward.scorers import SCORERS, ScorerChoice, make_scorer

WITH_WEIGHTS = [name for name, row in SCORERS.items() if row.has_weights and not row.judges_clips and name != "remote"]
WITHOUT_WEIGHTS = [name for name, row in SCORERS.items() if not row.has_weights]


@pytest.mark.parametrize("name", WITH_WEIGHTS)
def test_every_name_asks_for_its_weights(name, tmp_path) -> None:
    clip = str(tmp_path / "clip") if name == "aesthetic" else None
    with pytest.raises(ValueError, match=f"scorer {name} needs weights"):
        ScorerChoice(name, clip=clip)
    with pytest.raises(ValueError, match="nowhere"):
        make_scorer(ScorerChoice(name, str(tmp_path / "nowhere"), clip=clip))


def test_names_without_weights() -> None:
    for name in WITHOUT_WEIGHTS:
        assert make_scorer(ScorerChoice(name)).card.name == name
    lifted = make_scorer(ScorerChoice("slant", frames=0.3))
    assert (lifted.card.name, lifted.card.needs_video) == ("slant_best_0.3", True)


def test_digits(repository) -> None:
    classifier_folder = repository / "assets" / "digits_image" / "classifier"
    card = make_scorer(ScorerChoice("digit_log_probability", str(classifier_folder))).card
    assert (card.high, card.differentiable, card.weights) == (0.0, True, str(classifier_folder))


def test_mistakes() -> None:
    with pytest.raises(ValueError, match="scorer is 'hps'; use one of stroke_weight"):
        ScorerChoice("hps")
    with pytest.raises(ValueError, match="has no weights; leave"):
        ScorerChoice("slant", "somewhere")
    with pytest.raises(ValueError, match="clip is for 'aesthetic'"):
        ScorerChoice("hpsv2", "a", clip="b")
    with pytest.raises(ValueError, match="model is for clip_score, hpsv2, aesthetic, leave it out"):
        ScorerChoice("pickscore", "a", model="ViT-B-32")
    assert ScorerChoice("hpsv2", "a", model="ViT-B-32").architecture() == {"model": "ViT-B-32"}
    with pytest.raises(ValueError, match="which needs it"):
        ScorerChoice("aesthetic", "a")
