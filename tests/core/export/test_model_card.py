"""Records and model cards: what they say, and that they read back."""

import ast
from dataclasses import replace

import pytest
import yaml

from fewstep.core.export.model_card import add_figures, license_of, loading_snippet, model_card, write_model_card
from fewstep.core.export.record import (
    ExportRecord,
    Figure,
    Verification,
    hub_id_of,
    public_name,
    read_record,
    write_record,
)

RECORD = ExportRecord(
    name="digits",
    method="dmd",
    base_model="owner/teacher",
    steps=2,
    sampler="sde",
    times=(1.0, 0.75),
    network_timesteps=(1000.0, 750.0),
    training_guidance=4.5,
    num_inference_steps=2,
    guidance_scale=1.0,
    sigmas=None,
    timesteps=None,
    height=None,
    width=None,
    step_noise="global",
    pipeline="StableDiffusion3Pipeline",
    scheduler="FlowMatchEulerDiscreteScheduler",
    weights="merged",
    dtype="float32",
    absent_components=(),
    training_step=1200,
    ema=True,
    figures=(Figure("FID (lower is better)", 1.5, "5000 samples"),),
    verification=Verification(3e-7, 1e-5, 0.0, 1e-5),
    versions=(("diffusers", "0.42.1"), ("torch", "2.15.0")),
)


def front_matter(card: str) -> dict:
    parts = card.split("---\n", 2)
    assert parts[0] == ""
    return yaml.safe_load(parts[1])


@pytest.mark.parametrize(
    "record",
    [
        RECORD,
        replace(RECORD, sigmas=(1.0, 0.7), verification=None, figures=()),
        replace(RECORD, timesteps=(999, 399), absent_components=("text_encoder_3",), height=64, width=32),
    ],
)
def test_record_reads_back(tmp_path, record):
    write_record(record, tmp_path)
    assert read_record(tmp_path) == record


def test_missing_record_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"distillation\.json"):
        read_record(tmp_path)


def test_front_matter_is_what_the_hub_reads():
    front = front_matter(model_card(RECORD, license_fields={"license": "apache-2.0"}))
    assert front == {
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "tags": ["diffusers", "text-to-image", "few-step", "distillation", "dmd"],
        "license": "apache-2.0",
    }
    assert "license" not in front_matter(model_card(RECORD, license_fields={}))
    named = replace(RECORD, base_model_id="owner/teacher", weights="lora", picture_step=1000)
    front = front_matter(model_card(named, license_fields={}))
    assert (front["base_model"], front["base_model_relation"]) == ("owner/teacher", "adapter")
    assert front["thumbnail"] == "samples.png"
    card = model_card(named, license_fields={})
    assert "![Samples of teacher and student](samples.png)" in card
    assert "at step 1000 of the training" in card


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ("owner/teacher", "owner/teacher"),
        ("/cache/models--owner--teacher/snapshots/0123abc", "owner/teacher"),
        ("/data/teacher", None),
        ("tests/core", None),
        ("teacher", None),
    ],
)
def test_a_base_model_is_an_id_or_none(given, found):
    assert hub_id_of(given) == found


def test_the_first_line_is_the_call():
    body = model_card(RECORD, license_fields={}).split("---\n", 2)[2]
    assert body.startswith("\n# digits\n\n**Call it with `num_inference_steps=2, guidance_scale=1.0`.**")


@pytest.mark.parametrize(
    ("pipeline", "rows", "bound"),
    [
        ("StableDiffusion3Pipeline", ["| 0.25 | 1 | 0.75 |"], "above 0.5"),
        ("StableDiffusionXLPipeline", ["| 0.75 | 1 | 0.75 |"], "1"),
    ],
)
def test_the_card_says_from_which_strength_a_picture_counts(pipeline, rows, bound):
    card = model_card(replace(RECORD, pipeline=pipeline), license_fields={})
    assert [
        line for line in card.splitlines() if line.startswith("| 0.25 | 1") or line.startswith("| 0.75 | 1")
    ] == rows
    assert f"`strength` {bound} begins with noise alone" in card
    one = model_card(
        replace(RECORD, pipeline=pipeline, steps=1, times=(1.0,), network_timesteps=(1000.0,)), license_fields={}
    )
    assert "One step begins with noise alone" in one
    assert "From a picture" not in model_card(replace(RECORD, pipeline="WanPipeline"), license_fields={})


def test_card_states_arguments_grid_figures_and_check():
    card = model_card(RECORD, license_fields={})
    for part in (
        "# digits\n",
        "2 network calls: owner/teacher, distilled with dmd against a teacher guidance of 4.5",
        "step 1200, moving average of the weights",
        'pipeline("a prompt", num_inference_steps=2, guidance_scale=1.0)',
        "| 2 | 0.75 | 750 |",
        "| FID (lower is better) | 1.5 | 5000 samples |",
        "largest difference 3.0e-07 of the largest value (allowed 1e-05)",
        "diffusers 0.42.1, torch 2.15.0",
    ):
        assert card.count(part) == 1, part


@pytest.mark.parametrize(
    ("step_noise", "sentence", "seeded"),
    [
        ("global", "StableDiffusion3Pipeline does not hand its `generator` to the scheduler", 1),
        ("generator", "decides the first noise and the noise between the steps", 0),
        ("none", "No noise enters after the first", 0),
    ],
)
def test_seed_remark_follows_the_source_of_the_noise(step_noise, sentence, seeded):
    record = replace(RECORD, step_noise=step_noise)
    assert model_card(record, license_fields={}).count(sentence) == 1
    assert loading_snippet(record, "x").count("torch.manual_seed(0)\nimage = ") == seeded


@pytest.mark.parametrize(
    ("changes", "call"),
    [
        ({}, 'pipeline("a prompt", num_inference_steps=2, guidance_scale=1.0)'),
        ({"sigmas": (1.0, 0.7)}, 'pipeline("a prompt", num_inference_steps=2, guidance_scale=1.0, sigmas=[1.0, 0.7])'),
        (
            {"timesteps": (999, 399), "height": 64},
            'pipeline("a prompt", num_inference_steps=2, guidance_scale=1.0, timesteps=[999, 399], height=64)',
        ),
        ({"dtype": "bfloat16"}, 'DiffusionPipeline.from_pretrained("out", dtype=torch.bfloat16)'),
        ({"weights": "lora"}, 'pipeline.load_lora_weights("out")'),
        (
            {"weights": "lora", "absent_components": ("text_encoder_3",)},
            'DiffusionPipeline.from_pretrained("owner/teacher", text_encoder_3=None)',
        ),
    ],
)
def test_snippet_is_python_with_the_right_call(changes, call):
    snippet = loading_snippet(replace(RECORD, **changes), "out")
    calls = {ast.unparse(node) for node in ast.walk(ast.parse(snippet)) if isinstance(node, ast.Call)}
    assert ast.unparse(ast.parse(call)) in calls


def test_card_says_that_stand_ins_are_inside():
    record = replace(RECORD, absent_components=("text_encoder_3", "tokenizer_3"))
    assert model_card(record, license_fields={}).count("without text_encoder_3, tokenizer_3") == 1
    assert model_card(replace(record, weights="lora"), license_fields={}).count("stand-ins") == 0


@pytest.mark.parametrize(
    ("given", "public"),
    [
        ("owner/teacher", "owner/teacher"),
        ("assets/digits_teacher", "assets/digits_teacher"),
        ("/data/models/teacher", "teacher"),
        ("/data/models/teacher/", "teacher"),
        ("~/models/teacher", "teacher"),
        ("../teacher", "teacher"),
        ("C:\\models\\teacher", "teacher"),
    ],
)
def test_paths_of_a_machine_stay_there(given, public):
    assert public_name(given) == public


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("---\nlicense: mit\ntags: [a]\n---\n# x\n", {"license": "mit"}),
        (
            "---\nlicense: other\nlicense_name: community\nlicense_link: LICENSE.md\n---\n",
            {"license": "other", "license_name": "community", "license_link": "LICENSE.md"},
        ),
        ("# no front matter\n\n--- license: mit ---\n", {}),
        ("---\n- a list\n---\n", {}),
        (None, {}),
    ],
)
def test_license_comes_from_the_front_matter_of_the_teacher(tmp_path, text, expected):
    if text is not None:
        (tmp_path / "README.md").write_text(text, encoding="utf-8")
    assert license_of(tmp_path) == expected


def test_figures_are_added_to_record_and_card(tmp_path):
    write_record(RECORD, tmp_path)
    write_model_card(RECORD, tmp_path, license_fields={"license": "mit"})
    figures = [Figure("FID (lower is better)", 1.25, "5000 samples"), Figure("accuracy", 0.875, "500 samples")]
    assert add_figures(tmp_path, figures).figures == tuple(figures)
    assert read_record(tmp_path).figures == tuple(figures)
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert card.count("| accuracy | 0.875 | 500 samples |") == 1
    assert card.count("| 1.5 |") == 0
    assert front_matter(card)["license"] == "mit"
