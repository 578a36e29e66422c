"""The cost of an sCM step: what is timed, and what is refused."""

from pathlib import Path

import pytest
from studies.scm_step_cost import measure_scm_step, scm_calls

from tests.consistency.tiny_consistency_run import start_consistency, tiny_consistency
from tests.dmd.tiny_run import TinyInputs, write_inputs


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> TinyInputs:
    """A tiny teacher and data on disk."""
    return write_inputs(tmp_path_factory.mktemp("inputs"))


def test_the_bare_calls_are_the_teachers_the_tangent_and_one_gradient(inputs: TinyInputs, tmp_path: Path) -> None:
    config = tiny_consistency(inputs, tmp_path, "scm_rf")
    setup, trainer = start_consistency(config)
    calls: list[str] = []
    hooks = [
        module.register_forward_hook(lambda *_, name=name: calls.append(name))
        for name, module in (("teacher", setup.teacher.denoiser), ("student", setup.student_role.module))
    ]
    scm_calls(config, setup, trainer)()
    for hook in hooks:
        hook.remove()
    trainer.close()
    assert calls == ["teacher", "student", "student"]
    assert all(value.grad is None for _, value in setup.student_role.parameters)


def test_a_measured_step_has_its_rounds(inputs: TinyInputs, tmp_path: Path) -> None:
    cost = measure_scm_step(tiny_consistency(inputs, tmp_path, "scm_rf"), rounds=3)
    assert (len(cost.ratios), cost.steps_per_cycle, cost.batch_size) == (3, 1, 4)
    assert sorted(cost.ratios)[1] == cost.ratio > 0


def test_other_methods_and_no_rounds_are_refused(inputs: TinyInputs, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the method is dcm; the step cost is that of scm"):
        measure_scm_step(tiny_consistency(inputs, tmp_path, "dcm"), rounds=3)
    with pytest.raises(ValueError, match="rounds is 0; time at least one"):
        measure_scm_step(tiny_consistency(inputs, tmp_path, "scm_rf"), rounds=0)
