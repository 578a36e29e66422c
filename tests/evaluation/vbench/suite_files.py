"""A small VBench on disk: prompts of some dimensions, under the names and in the form of the real file."""

import json
from pathlib import Path

ENTRIES = [
    {"prompt_en": "In a still frame, a stop sign", "dimension": ["temporal_flickering"]},
    {"prompt_en": "a dog", "dimension": ["object_class"], "auxiliary_info": {"object_class": {"object": "dog"}}},
    {"prompt_en": "a cat playing in park", "dimension": ["subject_consistency", "dynamic_degree", "motion_smoothness"]},
    {"prompt_en": "a still vase", "dimension": ["temporal_flickering"]},
    {"prompt_en": "a dog", "dimension": ["overall_consistency"]},
]


def write_suite(folder: Path) -> Path:
    """A root with vbench/VBench_full_info.json."""
    (folder / "vbench").mkdir(parents=True)
    (folder / "vbench" / "VBench_full_info.json").write_text(json.dumps(ENTRIES))
    return folder
