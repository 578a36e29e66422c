"""The piece of a long video for a teacher: its first latent, and where the loss counts."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fewstep.causal_video.stages.teacher_window import image_latent, teacher_window
from fewstep.causal_video.vae_stream import decode_stream, encode_stream
from tests.causal_video.tiny_causal import build_vae, largest, latents


@given(length=st.integers(2, 6), more=st.integers(1, 4), data=st.data())
def test_the_first_latent_is_replaced_and_new_frames_count(length: int, more: int, data: st.DataObject) -> None:
    new = data.draw(st.integers(1, length))
    video, first = latents(length + more), latents(1, seed=4)
    window = teacher_window(video, first, length=length, new_frames=new)
    assert torch.equal(window.latents[:, :, :1], first)
    assert torch.equal(window.latents[:, :, 1:], video[:, :, more + 1 :])
    assert window.counts.tolist() == [0 < i >= length - new for i in range(length)]


def test_the_beginning_of_a_video_is_its_own_window() -> None:
    video = latents(5)
    window = teacher_window(video, None, length=5, new_frames=5)
    assert torch.equal(window.latents, video)
    assert window.counts.tolist() == [True] * 5


def test_gradients_reach_the_frames_that_were_kept() -> None:
    video, first = latents(5).requires_grad_(), latents(1, seed=4).requires_grad_()
    teacher_window(video, first, length=3, new_frames=2).latents.sum().backward()
    assert video.grad is not None
    assert video.grad[0, 0, :, 0, 0].tolist() == [0, 0, 0, 1, 1]
    assert first.grad is None


def test_the_image_is_the_last_pixel_frame() -> None:
    vae, x = build_vae(), latents(3, batch=1)
    pixels, _ = decode_stream(vae, x)
    expected, _ = encode_stream(vae, pixels[:, :, -1:])
    assert expected.shape == (1, 4, 1, 4, 4)
    assert largest(image_latent(vae, x), expected) == 0
    _, state = decode_stream(vae, x[:, :, :2])
    assert largest(image_latent(vae, x[:, :, 2:], state), expected) == 0


def test_windows_that_do_not_fit_are_refused() -> None:
    first = latents(1, seed=4)
    with pytest.raises(ValueError, match="new_frames <= length <= frames"):
        teacher_window(latents(5), first, length=6, new_frames=1)
    with pytest.raises(ValueError, match="new_frames <= length <= frames"):
        teacher_window(latents(5), first, length=3, new_frames=0)
    with pytest.raises(ValueError, match="needs an image latent"):
        teacher_window(latents(5), None, length=3, new_frames=1)
    with pytest.raises(ValueError, match="has no use for an image latent"):
        teacher_window(latents(5), first, length=5, new_frames=1)
    with pytest.raises(ValueError, match="image latent must be"):
        teacher_window(latents(5), latents(2), length=3, new_frames=1)
