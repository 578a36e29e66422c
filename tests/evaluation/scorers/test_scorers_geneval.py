"""GenEval without mmdet: its rules in closed form, its detector's reading, and the whole on tiny models."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from open_clip.transform import image_transform
from PIL import Image
from safetensors.torch import save_file
from transformers import (
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    Mask2FormerImageProcessor,
    SwinConfig,
)

from fewstep.dmd.reward.scorers import ScorerChoice, make_scorer
from fewstep.evaluation.scorers.geneval import (
    COLOURS,
    GenEval,
    Task,
    Wanted,
    is_correct,
    load_geneval,
    read_tasks,
    relations_of,
    score_of,
)
from fewstep.evaluation.scorers.geneval_detector import (
    CLASSES,
    IMAGENET_MEAN,
    Detector,
    FoundObject,
    candidates,
    fitted,
    load_detector,
    objects_of,
)
from fewstep.evaluation.scorers.preprocess import normalise
from fewstep.evaluation.scorers.scorer import score
from tests.evaluation.scorers.test_scorers_clip import MODEL, PREPROCESS

COCO = {11: "stop sign", 62: "tv", 64: "mouse", 65: "remote", 66: "keyboard"}
TASKS = (
    {"tag": "single_object", "include": [{"class": "cat", "count": 1}], "prompt": "a photo of a cat"},
    {
        "tag": "counting",
        "include": [{"class": "tv", "count": 2}],
        "exclude": [{"class": "tv", "count": 3}],
        "prompt": "two tvs",
    },
    {
        "tag": "position",
        "include": [
            {"class": "dog", "count": 1},
            {"class": "tie", "count": 1, "color": "red", "position": ["right of", 0]},
        ],
        "prompt": "a red tie right of a dog",
    },
)


def found(left: float, top: float, right: float, bottom: float, sure: float = 0.9) -> FoundObject:
    return FoundObject(sure, (left, top, right, bottom), torch.ones(1, 1, dtype=torch.bool))


def no_colours(objects: list[FoundObject], name: str) -> list[str]:
    raise AssertionError("no colour was asked for")


def painted(*colours: str) -> Any:
    return lambda objects, name: list(colours[: len(objects)])


CAT, DOG = Wanted("cat", 1), Wanted("dog", 1)
LEFT_BOX, RIGHT_BOX = found(0, 0, 10, 10), found(30, 0, 40, 10)


@pytest.mark.parametrize(
    ("objects", "include", "exclude", "colours", "correct", "points"),
    [
        ({"cat": [LEFT_BOX]}, (CAT,), (), no_colours, True, 1.0),
        ({}, (CAT,), (), no_colours, False, 0.0),
        # More than wanted do not hurt the verdict, and do the score.
        ({"cat": [LEFT_BOX] * 3}, (CAT,), (), no_colours, True, 1 - 2 / 1),
        ({"cat": [LEFT_BOX] * 3}, (Wanted("cat", 4),), (), no_colours, False, 0.75),
        ({"cat": [LEFT_BOX] * 3}, (Wanted("cat", 2),), (Wanted("cat", 3),), no_colours, False, 0.5),
        ({"cat": [LEFT_BOX]}, (CAT, DOG), (), no_colours, False, 0.5),
        ({"cat": [LEFT_BOX]}, (Wanted("cat", 1, "red"),), (), painted("red"), True, 1.0),
        ({"cat": [LEFT_BOX]}, (Wanted("cat", 1, "red"),), (), painted("blue"), False, 0.5),
        ({"cat": [LEFT_BOX] * 2}, (Wanted("cat", 2, "red"),), (), painted("red", "blue"), False, 0.75),
        # A wrong number leaves no point for the colour, which nobody looks at.
        ({"cat": [LEFT_BOX] * 2}, (Wanted("cat", 1, "red"),), (), painted("red", "red"), True, 0.0),
        (
            {"cat": [LEFT_BOX], "dog": [RIGHT_BOX]},
            (CAT, Wanted("dog", 1, relation="right of", target=0)),
            (),
            no_colours,
            True,
            1.0,
        ),
        # The released score adds the 1 of a place even where it is wrong.
        (
            {"cat": [LEFT_BOX], "dog": [RIGHT_BOX]},
            (CAT, Wanted("dog", 1, relation="left of", target=0)),
            (),
            no_colours,
            False,
            3 / 4,
        ),
        ({"dog": [RIGHT_BOX]}, (CAT, Wanted("dog", 1, relation="left of", target=0)), (), no_colours, False, 1 / 3),
    ],
)
def test_the_rules(objects: Any, include: Any, exclude: Any, colours: Any, correct: bool, points: float) -> None:
    task = Task("x", include, exclude)
    assert is_correct(objects, task, colours) is correct
    assert score_of(objects, task, colours) == pytest.approx(points, abs=1e-12)


def test_relations_have_a_slack_and_a_direction() -> None:
    assert relations_of(RIGHT_BOX, LEFT_BOX) == {"right of"}
    assert relations_of(LEFT_BOX, RIGHT_BOX) == {"left of"}
    assert relations_of(found(0, 30, 10, 40), LEFT_BOX) == {"below"}
    # 45 degrees is more than half of the length in both directions.
    assert relations_of(found(30, 30, 40, 40), LEFT_BOX) == {"right of", "below"}
    # Offset 2 of sizes 10 and 10: within the slack, (10 + 10) / 10.
    assert relations_of(found(2, 0, 12, 10), LEFT_BOX) == set()
    # Offset 5: beyond the slack by 3, 3 / 5 of the length; offset 3.9: by 1.9, less than half.
    assert relations_of(found(5, 0, 15, 10), LEFT_BOX) == {"right of"}
    assert relations_of(found(3.9, 0, 13.9, 10), LEFT_BOX) == set()


BOXES = st.tuples(*[st.integers(0, 40)] * 2, *[st.integers(1, 30)] * 2)


@given(BOXES, BOXES)
def test_relations_turn_round_with_the_objects(first: tuple[int, ...], second: tuple[int, ...]) -> None:
    one, other = (found(x, y, x + width, y + height) for x, y, width, height in (first, second))
    opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    assert {opposite[name] for name in relations_of(one, other)} == relations_of(other, one)
    assert not {"left of", "right of"} <= relations_of(one, other)


def test_queries_become_objects() -> None:
    """The score is the class's probability times the mean probability inside the mask, and the box ends behind it."""
    logits = torch.full((3, 81), -20.0)
    logits[0, 15] = 20.0
    logits[1, 15], logits[1, 80] = 0.0, 0.0
    logits[2, 0], logits[2, 80] = math.log(9.0), 0.0
    sure = candidates(logits, 0.3)
    assert [(each.query, each.name) for each in sure] == [(0, "cat"), (2, "person"), (1, "cat")]
    assert [each.probability for each in sure] == pytest.approx([1.0, 0.9, 0.5], abs=1e-6)
    masks = torch.full((3, 8, 10), -1.0)
    masks[0, 2:5, 3:9] = math.log(3.0)
    masks[1, 0, 0] = 50.0
    objects = objects_of(sure, masks, 0.3)
    # The third mask is empty, and counts nothing.
    assert set(objects) == {"cat", "person"}
    (cat,), (person,) = objects["cat"], objects["person"]
    assert cat.score == pytest.approx(0.75, abs=1e-5)
    assert cat.box == (3.0, 2.0, 9.0, 5.0)
    assert int(cat.mask.sum()) == 18
    assert person.score == pytest.approx(0.9, abs=1e-5)
    assert person.box == (0.0, 0.0, 1.0, 1.0)
    assert "person" not in objects_of(sure, masks, 0.95)


def test_the_surest_sixteen_of_a_class_count() -> None:
    logits = torch.full((20, 81), -20.0)
    strengths = torch.linspace(2.0, 4.0, 20)
    logits[:, 15], logits[:, 80] = strengths, 0.0
    sure = candidates(logits, 0.3)
    objects = objects_of(sure, torch.full((len(sure), 2, 2), 20.0), 0.3)
    scores = [each.score for each in objects["cat"]]
    assert len(scores) == 16
    assert scores == sorted(scores, reverse=True)
    assert scores[0] == pytest.approx(float(strengths.sigmoid()[-1]), abs=1e-5)


@pytest.mark.parametrize(
    ("size", "scaled", "padded"),
    [
        ((1024, 1024), (800, 800), (800, 800)),
        ((480, 832), (769, 1333), (800, 1344)),
        ((512, 512), (800, 800), (800, 800)),
    ],
)
def test_pictures_are_scaled_and_padded_as_the_detector_saw_them(
    size: tuple[int, int], scaled: tuple[int, int], padded: tuple[int, int]
) -> None:
    picture = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(0))
    found_size, result = fitted(picture)
    assert found_size == scaled
    assert tuple(result.shape[-2:]) == padded
    border = normalise(result, mean=IMAGENET_MEAN, std=(1.0, 1.0, 1.0))[..., scaled[0] :, :]
    assert border.numel() == 0 or float(border.abs().max()) < 1e-6


def build_detector(labels: int = 80) -> Mask2FormerForUniversalSegmentation:
    stages: dict[str, Any] = {"out_features": ["stage1", "stage2", "stage3", "stage4"]}
    backbone = SwinConfig(embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=4, **stages)
    small: dict[str, Any] = {"feature_size": 32, "mask_feature_size": 32, "hidden_dim": 32}
    config = Mask2FormerConfig(
        backbone_config=backbone,
        encoder_layers=1,
        encoder_feedforward_dim=16,
        decoder_layers=2,
        num_attention_heads=2,
        dim_feedforward=16,
        num_queries=6,
        id2label={number: COCO.get(number, name) for number, name in enumerate(CLASSES[:labels])},
        **small,
    )
    with torch.random.fork_rng():
        torch.manual_seed(11)
        model = Mask2FormerForUniversalSegmentation(config)
        # A random head is as sure of nothing as of each class; sharper, some queries are sure of something.
        model.class_predictor.weight.data.mul_(60.0)
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("geneval")
    build_detector().save_pretrained(place / "detector")
    (place / "clip").mkdir()
    with torch.random.fork_rng():
        torch.manual_seed(7)
        clip = open_clip.CLIP(**copy.deepcopy(MODEL))
    (place / "clip" / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": MODEL, "preprocess_cfg": PREPROCESS})
    )
    save_file(clip.state_dict(), place / "clip" / "open_clip_model.safetensors")
    (place / "tasks.jsonl").write_text("\n".join(map(json.dumps, TASKS)) + "\n", encoding="utf-8")
    return place


def picture_of(height: int, width: int) -> torch.Tensor:
    coarse = torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    return (F.interpolate(coarse, size=(height, width), mode="bilinear") * 255).round()[0] / 255


def test_the_detector_reads_a_picture_as_its_processor_does(folder: Path) -> None:
    """Against transformers' processor at the same sizes, which has no padding, and its network called by hand."""
    detector, picture = load_detector(folder / "detector"), picture_of(400, 500)
    processor = Mask2FormerImageProcessor(size={"shortest_edge": 800, "longest_edge": 1333}, size_divisor=1)
    array = (picture * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    theirs = processor(Image.fromarray(array), return_tensors="pt")["pixel_values"]
    size, ours = fitted(picture[None])
    ours = normalise(ours, mean=IMAGENET_MEAN, std=(0.229, 0.224, 0.225))
    assert tuple(ours.shape) == (1, 3, 800, 1024)
    assert tuple(theirs.shape[-2:]) == size == (800, 1000)
    # It rounds to grey levels after scaling, 1 / 255 / 0.224.
    torch.testing.assert_close(ours[..., :1000], theirs, rtol=0, atol=0.03)
    objects = detector(picture, 0.1)
    assert sum(map(len, objects.values())) >= 1
    with torch.no_grad():
        output = detector.network(pixel_values=ours)
    masks = F.interpolate(output.masks_queries_logits, size=(800, 1024), mode="bilinear")[..., :1000]
    masks = F.interpolate(masks, size=(400, 500), mode="bilinear")[0]
    probabilities = output.class_queries_logits[0].softmax(-1)[:, :-1]
    for name, each in objects.items():
        for one in each:
            assert any(torch.equal(one.mask, mask > 0) for mask in masks)
            assert one.mask.shape == (400, 500)
            assert 0.1 < one.score <= float(probabilities[:, CLASSES.index(name)].max())


def test_a_colour_is_that_of_clip_on_the_object_before_grey(folder: Path) -> None:
    """open_clip's own transform and texts on a PIL picture, as the benchmark calls them."""
    scorer, picture = load_geneval(folder), picture_of(60, 80)
    mask = torch.zeros(60, 80, dtype=torch.bool)
    mask[10:50, 20:70] = True
    mask[10:20, 20:30] = False
    named = scorer.colour_of(picture, FoundObject(0.9, (20, 10, 70, 50), mask), "tie")
    image = Image.fromarray((picture * 255).round().to(torch.uint8).permute(1, 2, 0).numpy())
    alone = Image.composite(image, Image.new("RGB", image.size, "#999"), Image.fromarray(mask.numpy()))
    transform: Any = image_transform(32, is_train=False, mean=PREPROCESS["mean"], std=PREPROCESS["std"])
    model: Any = scorer.clip.model
    with torch.no_grad():
        seen = model.encode_image(transform(alone.crop((20, 10, 70, 50)))[None], normalize=True)
        similarities = []
        for colour in COLOURS:
            texts = (
                f"a photo of a {colour} tie",
                f"a photo of a {colour}-colored tie",
                f"a photo of a {colour} object",
            )
            text = F.normalize(model.encode_text(scorer.clip.tokenizer(list(texts)), normalize=True).mean(0), dim=0)
            similarities.append(float(seen[0] @ text))
    assert named == COLOURS[similarities.index(max(similarities))]
    torch.testing.assert_close((seen @ scorer.colour_texts("tie").T)[0], torch.tensor(similarities), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["geneval", "geneval_correct"])
def test_the_scorer_of_the_table_judges_each_picture_by_itself(folder: Path, name: str) -> None:
    scorer = make_scorer(ScorerChoice(name, str(folder)))
    assert isinstance(scorer, GenEval)
    assert (scorer.card.name, scorer.card.differentiable, scorer.card.high) == (name, False, 1.0)
    pixels = torch.stack([picture_of(64, 64), picture_of(64, 64).flip(-1), picture_of(64, 64).flip(0)])
    prompts = [task["prompt"] for task in TASKS]
    whole = score(scorer, pixels, prompts)
    alone = torch.cat([score(scorer, pixels[k : k + 1], [prompts[k]]) for k in range(3)])
    assert torch.equal(whole, alone)
    for picture, prompt, value in zip(pixels, prompts, whole, strict=True):
        task = scorer.tasks[prompt]
        objects = scorer.detector((picture * 255).round() / 255, 0.9 if prompt == "two tvs" else 0.3)
        rule = score_of if name == "geneval" else is_correct
        told = rule(
            objects, task, lambda each, what, picture=picture: [scorer.colour_of(picture, o, what) for o in each]
        )
        assert float(value) == pytest.approx(float(told))
    with pytest.raises(ValueError, match="no task for the prompt 'a unicorn'"):
        scorer(pixels[:1], ["a unicorn"])


def test_what_is_missing_or_wrong_is_named(folder: Path, tmp_path: Path) -> None:
    def tasks(*lines: str) -> Path:
        place = tmp_path / "tasks.jsonl"
        place.write_text("\n".join(lines), encoding="utf-8")
        return place

    good = json.dumps(TASKS[0])
    assert set(read_tasks(tasks(good, "", good))) == {"a photo of a cat"}
    wrong = [
        ("{", "line 2 .* is no task of GenEval"),
        (good.replace('"cat"', '"unicorn"'), "line 2 .*'unicorn' is not known"),
        (good.replace('"count": 1', '"count": 0'), "line 2 .*count is 0"),
        (good.replace('"count": 1', '"count": 1, "color": "teal"'), "'teal' is not known"),
        (good.replace('"count": 1', '"count": 1, "position": ["near", 0]'), "'near' is not known"),
        (good.replace('"count": 1', '"count": 1, "position": ["above", 0]'), "beside a later one"),
        (good.replace('"cat"', '"dog"'), "'a photo of a cat' asks for two different things"),
        (json.dumps({**TASKS[0], "include": []}), "asks for nothing"),
    ]
    for line, told in wrong:
        with pytest.raises(ValueError, match=told):
            read_tasks(tasks(good, line))
    with pytest.raises(ValueError, match="holds no task"):
        read_tasks(tasks(""))
    with pytest.raises(ValueError, match=r"lacks tasks\.jsonl"):
        load_geneval(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"lacks config\.json"):
        load_detector(tmp_path)
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ValueError, match="loaded from no other format"):
        load_detector(tmp_path)
    with pytest.raises(ValueError, match="knows 7 classes from 'person' on; GenEval needs the 80"):
        Detector(build_detector(7))
