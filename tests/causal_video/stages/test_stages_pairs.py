"""Trajectories at the times of a schedule, batches of them, and many-step sampling over the cache."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.causal_video.cache.rolling import RollingCache
from fewstep.causal_video.denoise import VideoCondition
from fewstep.causal_video.layout import ChunkLayout
from fewstep.causal_video.model import masks
from fewstep.causal_video.schedule import StepSchedule
from fewstep.causal_video.settings import CausalSettings
from fewstep.causal_video.stages.ode import OdePairs, OdeSource, merged_grid, schedule_times, trajectory
from fewstep.causal_video.stages.sampling import euler_rollout
from fewstep.core.condition import Condition
from fewstep.core.randomness import Draw
from tests.causal_video.tiny_causal import FRAME_TOKENS, largest, latents, noise, shared_student, text

SETTINGS = CausalSettings(ChunkLayout((1, 2, 2)), schedule=StepSchedule.steps([4, 2]))
TIMES = (1.0, 0.9375, 0.8333333333333334, 0.625)


class KnownConditions:
    """Conditions whose one token is the row, in place of encoded prompts."""

    def rows(self, rows: list[int]) -> Condition:
        return Condition(torch.tensor(rows, dtype=torch.float32)[:, None, None])


def pairs_of(count: int = 6, *, context: bool = False) -> OdePairs:
    """States that say where they are from: row + time, the ends say the row."""
    rows = torch.arange(count, dtype=torch.float32).view(-1, 1, 1, 1, 1, 1)
    states = (10 * rows + torch.tensor(TIMES).view(1, -1, 1, 1, 1, 1)).expand(-1, -1, 4, 5, 2, 2)
    ends = (10 * rows[:, 0]).expand(-1, 4, 5, 2, 2)
    return OdePairs(TIMES, states, ends, tuple(f"p{i}" for i in range(count)), ends + 5 if context else None)


def test_times_of_a_schedule_and_of_a_grid_are_joined() -> None:
    assert schedule_times(SETTINGS) == pytest.approx(TIMES)
    assert merged_grid((1.0, 0.5), (1.0, 0.75, 0.5 + 1e-12)) == (1.0, 0.75, 0.5)


def test_trajectory_of_a_linear_field_is_known() -> None:
    """v = x: each Euler step from t to s multiplies by 1 - (t - s)."""
    start = torch.full((2, 1, 1, 1, 1), 3.0, dtype=torch.float64)
    states, end = trajectory(lambda x, t: x, start, (1.0, 0.75, 0.5, 0.25), (1.0, 0.5))
    assert states.shape == (2, 2, 1, 1, 1, 1)
    assert states[0, :, 0, 0, 0, 0].tolist() == pytest.approx([3.0, 3.0 * 0.75**2])
    assert end.flatten().tolist() == pytest.approx([3.0 * 0.75**4] * 2)
    with pytest.raises(ValueError, match=r"\[0.3\] are not of the grid"):
        trajectory(lambda x, t: x, start, (1.0, 0.5), (1.0, 0.3))


@pytest.mark.parametrize("context", [False, True])
def test_batches_take_each_chunk_from_a_step_of_its_own(context: bool) -> None:
    conditions: Any = KnownConditions()
    source = OdeSource(pairs_of(context=context), conditions, seed=1)
    batch = source.batch(Draw(2, list(range(60)), torch.device("cpu")), SETTINGS)
    row = batch.condition.text[:, 0, 0]
    assert sorted(set(row.tolist())) == list(range(6))
    expected = 10 * row[:, None] + batch.t
    assert float((batch.x - expected[:, None, :, None, None]).abs().max()) < 1e-5
    assert float((batch.x0 - 10 * row.view(-1, 1, 1, 1, 1)).abs().max()) == 0
    for chunk in range(3):
        part = batch.t[:, SETTINGS.layout.start(chunk) : SETTINGS.layout.end(chunk)]
        assert float((part - part[:, :1]).abs().max()) == 0
        found = {round(t, 4) for t in part.flatten().tolist()}
        known = {round(t, 4) for t in SETTINGS.schedule.of(chunk)}
        assert found == (known if context else known | {0.0})
    assert (batch.context is None) != context
    if batch.context is not None:
        assert float((batch.context - batch.x0 - 5).abs().max()) == 0


def test_pairs_are_read_as_they_were_written(tmp_path: Path) -> None:
    for name, context in (("a", False), ("b", True)):
        pairs = pairs_of(3, context=context)
        pairs.save(tmp_path / name)
        again = OdePairs.load(tmp_path / name)
        assert again.times == TIMES
        assert again.prompts == ("p0", "p1", "p2")
        assert torch.equal(again.states, pairs.states)
        assert (again.context is None) != context
    with pytest.raises(ValueError, match=r"no state at t = 0\.9,"):
        pairs_of().place_of(0.9)
    with pytest.raises(ValueError, match=r"leave ode\.pairs empty"):
        OdePairs.load(tmp_path / "none")
    (tmp_path / "a" / "ode_pairs.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ValueError, match="cannot be read"):
        OdePairs.load(tmp_path / "a")
    with pytest.raises(ValueError, match="do not fit latents"):
        OdePairs((1.0,), pairs_of().states, pairs_of().latents, pairs_of().prompts)


@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_euler_rollout_is_the_packed_velocity_on_what_was_generated(guidance: float) -> None:
    """With one step from t = 1 chunk i is z_i - v(z_i, 1 | earlier chunks), which the packed call gives at once."""
    student, null = shared_student(), text(1, seed=9)
    settings = CausalSettings(ChunkLayout((1, 2, 2, 2)))
    asked = VideoCondition(text())
    found = euler_rollout(student, asked, noise(), settings, times=(1.0,), guidance=guidance, null_text=null)
    draws = noise()
    z = torch.cat([draws.draw(c, 0, settings.layout.length(c), text()) for c in range(4)], dim=2)
    mask, t = masks.teacher_forcing(settings.layout, FRAME_TOKENS), torch.ones(2, dtype=torch.float64)

    def velocity(tokens: Tensor) -> Tensor:
        return student.packed(found, z, t, tokens, mask=mask)

    guided = velocity(null.expand(2, -1, -1))
    guided = guided + guidance * (velocity(text()) - guided)
    assert largest(found, z - guided) < 1e-11
    image = latents(1, seed=12)
    given = euler_rollout(student, VideoCondition(text(), image), noise(), settings, times=(1.0, 0.5))
    assert torch.equal(given[:, :, :1], image)
    with pytest.raises(ValueError, match="give null_text"):
        euler_rollout(student, asked, noise(), settings, times=(1.0,), guidance=2.0)


def test_the_cache_of_both_sides_is_twice_as_large() -> None:
    student = shared_student()
    cache = RollingCache.empty(SETTINGS.layout, SETTINGS.policy)
    both = torch.cat([text(), text()])
    stored = student.append(latents(1, batch=4), torch.zeros(4, dtype=torch.float64), both, cache.read()).keys_values
    assert stored is not None
    assert cache.commit(stored).bytes() == 2 * 3 * 4 * FRAME_TOKENS * 24 * 8
