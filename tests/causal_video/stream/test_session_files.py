"""Snapshots in files: a stream goes on to the last bit in another session, whatever the cache is like."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fewstep.causal_video.layout import ChunkLayout
from fewstep.causal_video.policy import CachePolicy
from fewstep.causal_video.schedule import StepSchedule
from fewstep.causal_video.settings import CausalSettings
from fewstep.causal_video.stream.files import HEADER, load_state, save_state
from fewstep.causal_video.stream.session import StreamSession
from tests.causal_video.tiny_causal import build_student, build_vae, latents, noise, shared_student, text

SCHEDULE = StepSchedule.steps([3, 2])
LAYOUT = ChunkLayout((1, 2))
CASES = {
    "clean": CausalSettings(LAYOUT, CachePolicy(4, 1, "static"), SCHEDULE),
    "noisy": CausalSettings(LAYOUT, CachePolicy(4, noisy_from=0), SCHEDULE),
    "int8": CausalSettings(LAYOUT, CachePolicy(4, quantise="int8"), SCHEDULE),
    "fp8": CausalSettings(LAYOUT, CachePolicy(4, quantise="fp8"), SCHEDULE),
    "ema": CausalSettings(ChunkLayout.uniform(2, 2), CachePolicy(4, 2, "ema"), SCHEDULE),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("chunks", [0, 1, 4])
def test_a_stream_goes_on_from_a_file(name: str, chunks: int, tmp_path: Path) -> None:
    vae, student = build_vae(), shared_student()
    session = StreamSession(student, text(), noise(), CASES[name], vae=vae, image=latents(1, seed=4), caption="one")
    list(session.stream(chunks))
    session.set_prompt(text(seed=5), "cross_only", at_chunk=chunks + 1, caption="two")
    path = save_state(session.snapshot(), tmp_path / "state.safetensors")
    # Another seed, prompt and image: all of them come from the file.
    other = StreamSession(student, text(seed=9), noise(seed=3), CASES[name], vae=vae)
    other.restore(load_state(path, student))
    for _ in range(2):
        one, two = session.step(), other.step()
        assert one.chunk == two.chunk
        assert one.frames is not None
        assert two.frames is not None
        assert torch.equal(one.latents, two.latents)
        assert torch.equal(one.frames, two.frames)
    assert other.snapshot().caption == "two"
    assert other.snapshot().cache.bytes() == session.snapshot().cache.bytes()


def test_the_latents_of_a_branch_are_those_of_the_trunk_until_the_prompt_changes(tmp_path: Path) -> None:
    session = StreamSession(shared_student(), text(), noise(), CASES["clean"])
    list(session.stream(2))
    path = save_state(session.snapshot(), tmp_path / "branch.safetensors")
    trunk = session.step().latents
    branch = StreamSession(shared_student(), text(), noise(), CASES["clean"])
    branch.restore(load_state(path, shared_student()))
    branch.set_prompt(text(seed=5))
    assert float((branch.step().latents - trunk).abs().max()) > 1e-3


def test_files_of_other_models_and_other_kinds_are_refused(tmp_path: Path) -> None:
    session = StreamSession(shared_student(), text(), noise(), CASES["clean"])
    session.step()
    path = save_state(session.snapshot(), tmp_path / "state.safetensors")
    with pytest.raises(ValueError, match="another model"):
        load_state(path, build_student(seed=1))
    save_file({"x": torch.zeros(1)}, tmp_path / "plain.safetensors")
    save_file({"x": torch.zeros(1)}, tmp_path / "earlier.safetensors", metadata={HEADER: json.dumps({"format": 1})})
    for name in ("plain", "earlier"):
        with pytest.raises(ValueError, match="no snapshot of a stream of format 2"):
            load_state(tmp_path / f"{name}.safetensors", shared_student())
    noisy = StreamSession(shared_student(), text(), noise(), CASES["noisy"])
    with pytest.raises(ValueError, match="another layout, policy or schedule"):
        noisy.restore(load_state(path, shared_student()))
    decoding = StreamSession(shared_student(), text(), noise(), CASES["clean"], vae=build_vae())
    with pytest.raises(ValueError, match="knows 0 decoded latent frames of 1"):
        decoding.restore(load_state(path, shared_student()))
