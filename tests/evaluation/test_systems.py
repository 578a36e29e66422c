"""Steps, guidance and grids come from the command line or from distillation.json."""

import json

import pytest

from fewstep.evaluation.systems import StepGrid, parse_systems, read_system


@pytest.fixture
def export(tmp_path):
    """A folder with a record; nothing here loads the pipeline."""
    folder = tmp_path / "student"
    folder.mkdir()
    (folder / "model_index.json").write_text("{}")
    record = {"num_inference_steps": 2, "guidance_scale": 1.0, "sigmas": [1.0, 0.4], "timesteps": None}
    (folder / "distillation.json").write_text(json.dumps(record))
    return folder


def test_record_gives_defaults_and_its_grid(export) -> None:
    system = read_system(export)
    assert (system.name, system.steps, system.guidance) == ("student", 2, 1.0)
    assert system.grid == StepGrid(sigmas=(1.0, 0.4), own_call={"guidance_scale": 1.0})
    assert system.grid.arguments() == {"sigmas": [1.0, 0.4]}


def test_options_win_and_drop_a_grid_of_another_length(export) -> None:
    system = read_system(export, name="mine", steps=4, guidance=3.5)
    assert (system.name, system.steps, system.guidance) == ("mine", 4, 3.5)
    assert system.grid.arguments() == {}


def test_lists_of_options(export) -> None:
    first, second = parse_systems([str(export), f"other={export}"], steps=[3], guidance=[1.0, 2.0])
    assert (first.name, first.steps, first.guidance) == ("student", 3, 1.0)
    assert (second.name, second.steps, second.guidance) == ("other", 3, 2.0)
    odd = export.rename(export.parent / "lr=1")
    assert [system.name for system in parse_systems([str(odd), f"a={odd}"])] == ["lr=1", "a"]
    with pytest.raises(ValueError, match="--steps has 3 values for 2 pipelines"):
        parse_systems([str(export)] * 2, steps=[1, 2, 3])


def test_missing_things_are_errors(export, tmp_path) -> None:
    with pytest.raises(ValueError, match="there is no directory"):
        read_system(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"no model_index\.json"):
        read_system(tmp_path)
    with pytest.raises(ValueError, match="steps is 0"):
        read_system(export, steps=0)
    (export / "distillation.json").unlink()
    with pytest.raises(ValueError, match="give --steps"):
        read_system(export)
    with pytest.raises(ValueError, match="give --guidance"):
        read_system(export, steps=3)
