"""Sums of rewards, picture scorers on clips, and scores in the background."""

import threading
import time

import pytest
import torch
from torch import Tensor

from fewstep.embedded.digits.scorers import Slant, StrokeWeight
from fewstep.evaluation.scorers.frames import FrameScore
from fewstep.evaluation.scorers.overlap import OverlappedReward
from fewstep.evaluation.scorers.scorer import ScorerCard, score
from fewstep.evaluation.scorers.total import score_all, weighted_sum


class Darkness:
    """One minus brightness; lower is better. Waits for its gate and counts who is inside."""

    def __init__(self, *, gate: threading.Event | None = None) -> None:
        self.card = ScorerCard("darkness", 0.0, 1.0, higher_is_better=False, differentiable=True)
        self.gate, self.inside, self.most, self.order = gate, 0, 0, []

    def __call__(self, pixels: Tensor, prompts: list[str]) -> Tensor:
        self.inside += 1
        self.most = max(self.most, self.inside)
        if self.gate is not None:
            assert self.gate.wait(30.0)
        time.sleep(0.002)
        self.order.append(prompts[0])
        self.inside -= 1
        return 1.0 - pixels.flatten(1).mean(dim=1)


PIXELS = torch.tensor([0.2, 0.6])[:, None, None, None].expand(-1, 3, 6, 6).contiguous()


def test_parts_have_the_sign_of_better_and_sum_with_weights() -> None:
    parts = score_all([StrokeWeight(), Darkness()], PIXELS, ["a", "b"])
    assert parts.names == ("stroke_weight", "darkness")
    assert (parts.values - torch.tensor([[0.2, 0.6], [-0.8, -0.4]])).abs().max() < 1e-6
    assert parts.means() == pytest.approx({"stroke_weight": 0.4, "darkness": -0.6})
    assert weighted_sum(parts.values, [2.0, 0.5]).tolist() == pytest.approx([0.0, 1.0], abs=1e-6)


def test_gradient_of_the_sum_is_the_sum_of_gradients() -> None:
    leaf = (0.3 + 0.4 * torch.rand(2, 3, 6, 6)).requires_grad_()
    parts = score_all([StrokeWeight(), Slant()], leaf, ["a", "b"], gradient=True, chunk=1)
    (found,) = torch.autograd.grad(weighted_sum(parts.values, [2.0, -1.0]).sum(), leaf)
    pieces = [
        torch.autograd.grad(score(scorer, leaf, ["a", "b"], gradient=True).sum(), leaf)[0]
        for scorer in (StrokeWeight(), Slant())
    ]
    assert (found - 2.0 * pieces[0] + pieces[1]).abs().max() < 1e-7


def test_mistakes_of_sums() -> None:
    with pytest.raises(ValueError, match="each name once"):
        score_all([StrokeWeight(), StrokeWeight()], PIXELS, ["a", "b"])
    with pytest.raises(ValueError, match="at least one"):
        score_all([], PIXELS, ["a", "b"])
    with pytest.raises(ValueError, match=r"weights \[1\.0\] for values \(2, 3\)"):
        weighted_sum(torch.rand(2, 3), [1.0])
    with pytest.raises(ValueError, match="finite"):
        weighted_sum(torch.rand(2, 3), [1.0, float("nan")])


def test_frames_are_averaged_or_the_best_are() -> None:
    values = torch.tensor([[0.1, 0.9, 0.5, 0.3], [0.2, 0.2, 0.4, 0.8]])
    clips = values[:, None, :, None, None].expand(-1, 3, -1, 5, 5).contiguous()
    every = FrameScore(StrokeWeight())
    assert (every.card.name, every.card.needs_video) == ("stroke_weight_frames", True)
    assert score(every, clips, ["a", "b"]).tolist() == pytest.approx([0.45, 0.4])
    best = FrameScore(StrokeWeight(), share=0.3, chunk=3)
    assert score(best, clips, ["a", "b"]).tolist() == pytest.approx([0.7, 0.6])
    assert score(FrameScore(Darkness(), share=0.25), clips, ["a", "b"]).tolist() == pytest.approx([0.1, 0.2])
    leaf = clips.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(score(best, leaf, ["a", "b"], gradient=True).sum(), leaf)
    assert gradient[0, :, 0].abs().max() == 0.0
    assert gradient[0, 0, 1, 0, 0].item() == pytest.approx(0.5 / 75.0)
    with pytest.raises(ValueError, match=r"share is 0\.0"):
        FrameScore(StrokeWeight(), share=0.0)
    with pytest.raises(ValueError, match="takes clips by itself"):
        FrameScore(every)


def test_the_background_scores_in_order_on_a_copy_one_at_a_time() -> None:
    gate = threading.Event()
    scorer = Darkness(gate=gate)
    batches = [torch.full((2, 3, 4, 4), 0.1 * number) for number in range(1, 6)]
    with OverlappedReward([scorer, StrokeWeight()]) as reward:
        pending = [reward.submit(batch, [str(row), "x"]) for row, batch in enumerate(batches)]
        with pytest.raises(TimeoutError):
            pending[0].result(timeout=0.01)
        batches[4].fill_(0.9)
        gate.set()
        # Asked for in another order than they are scored in.
        found = [pending[row].result(30.0) for row in (4, 2, 0, 1, 3)]
    assert scorer.order == ["0", "1", "2", "3", "4"]
    assert scorer.most == 1
    assert [parts.values[1, 0].item() for parts in found] == pytest.approx([0.5, 0.3, 0.1, 0.2, 0.4])
    assert all(not parts.values.requires_grad for parts in found)


def test_a_failure_in_the_background_reaches_who_asks_and_the_next_batch_lives() -> None:
    with OverlappedReward([StrokeWeight()]) as reward:
        broken = reward.submit(PIXELS * 5.0, ["a", "b"])
        whole = reward.submit(PIXELS, ["a", "b"])
        with pytest.raises(ValueError, match=r"stroke_weight: pixels of samples \[1\] are outside"):
            broken.result(30.0)
        assert whole.result(30.0).values[0].tolist() == pytest.approx([0.2, 0.6])
    with pytest.raises(RuntimeError, match="shutdown"):
        reward.submit(PIXELS, ["a", "b"])
