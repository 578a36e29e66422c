"""Streams of the Wan VAE against its own decode and encode."""

import pytest
import torch
from diffusers import AutoencoderKL
from hypothesis import given, settings
from torch import Tensor

from fewstep.causal_video.layout import ChunkLayout
from fewstep.causal_video.vae_stream import START, VaeState, decode_stream, encode_stream, latent_statistics
from tests.causal_video.tiny_causal import build_vae, largest, latents, layouts, span

VAE = build_vae()

# Of float64: pieces are summed in another order on some CPUs, by 4e-16 at most where it was seen.
ROUNDING = 2e-15


def decoded(frames: int, seed: int = 1) -> Tensor:
    """What the stock decoder makes of latents, in [0, 1]."""
    x = latents(frames, batch=1, seed=seed)
    scale, shift = latent_statistics(VAE, x)
    return VAE.decode(x * scale + shift, return_dict=False)[0] / 2 + 0.5


def streamed(x: Tensor, layout: ChunkLayout) -> list[Tensor]:
    """Pixels of each chunk."""
    pieces, state = [], START
    for chunk in range(layout.chunks):
        pixels, state = decode_stream(VAE, x[:, :, span(layout, chunk)], state)
        pieces.append(pixels)
    assert state.frames == layout.frames
    return pieces


@settings(max_examples=10, deadline=None)
@given(layout=layouts(most=3))
def test_chunks_decode_as_the_whole(layout: ChunkLayout) -> None:
    pieces = streamed(latents(layout.frames, batch=1), layout)
    assert [p.shape[2] for p in pieces] == [layout.pixel_frames(c) for c in range(layout.chunks)]
    whole = decoded(layout.frames)
    assert whole.shape == (1, 3, 4 * layout.frames - 3, 16, 16)
    assert largest(torch.cat(pieces, dim=2), whole) <= ROUNDING


def test_the_vae_of_wan_2_2_decodes_and_encodes_in_pieces_too() -> None:
    vae = build_vae(residual=True)
    x = latents(3, batch=1)
    scale, shift = latent_statistics(vae, x)
    whole = vae.decode(x * scale + shift, return_dict=False)[0] / 2 + 0.5
    first, state = decode_stream(vae, x[:, :, :1])
    rest, _ = decode_stream(vae, x[:, :, 1:], state)
    assert largest(torch.cat([first, rest], dim=2), whole) <= ROUNDING
    pixels = torch.rand(1, 3, 5, 16, 16, dtype=torch.float64)
    mode = vae.encode(2 * pixels - 1, return_dict=False)[0].mode()
    assert largest(encode_stream(vae, pixels)[0], (mode - shift) / scale) < 1e-12


def test_two_sessions_do_not_touch_each_other() -> None:
    a, b = latents(4, batch=1), latents(4, batch=1, seed=2)
    states: dict[int, VaeState] = {0: START, 1: START}
    pieces: dict[int, list[Tensor]] = {0: [], 1: []}
    for frame in range(4):
        for session, x in ((0, a), (1, b)):
            pixels, states[session] = decode_stream(VAE, x[:, :, frame : frame + 1], states[session])
            pieces[session].append(pixels)
        VAE.decode(b, return_dict=False)  # A stock call in between, which clears the VAE's own history.
    assert largest(torch.cat(pieces[0], dim=2), decoded(4)) <= ROUNDING
    assert largest(torch.cat(pieces[1], dim=2), decoded(4, seed=2)) <= ROUNDING


def test_a_state_is_a_snapshot() -> None:
    x = latents(4, batch=1)
    _, state = decode_stream(VAE, x[:, :, :2])
    first, _ = decode_stream(VAE, x[:, :, 2:], state)
    decode_stream(VAE, latents(3, batch=1, seed=6), state)
    again, after = decode_stream(VAE, x[:, :, 2:], state)
    assert torch.equal(first, again)
    assert torch.equal(first, decoded(4)[:, :, 5:])
    assert (state.frames, after.frames) == (2, 4)
    # Starting anew in the middle is another video, and another number of frames.
    cold, _ = decode_stream(VAE, x[:, :, 2:])
    assert cold.shape[2] == 5
    assert largest(cold[:, :, -4:], first[:, :, -4:]) > 1e-6


@pytest.mark.parametrize("groups", [(1, 4, 4), (5, 4), (9,), (1, 8)])
def test_clips_encode_in_pieces_as_the_whole(groups: tuple[int, ...]) -> None:
    pixels = torch.rand(1, 3, 9, 16, 16, dtype=torch.float64)
    pieces, state = [], START
    for piece in pixels.split(groups, dim=2):
        encoded, state = encode_stream(VAE, piece, state)
        pieces.append(encoded)
    mode = VAE.encode(2 * pixels - 1, return_dict=False)[0].mode()
    scale, shift = latent_statistics(VAE, mode)
    whole = torch.cat(pieces, dim=2)
    assert whole.shape == (1, 4, 3, 4, 4)
    assert largest(whole, (mode - shift) / scale) <= ROUNDING
    assert state.frames == 9


def test_pieces_and_networks_of_other_kinds_are_refused() -> None:
    with pytest.raises(ValueError, match=r"1 \+ 4 k pixel frames at the start"):
        encode_stream(VAE, torch.rand(1, 3, 4, 16, 16, dtype=torch.float64))
    _, state = encode_stream(VAE, torch.rand(1, 3, 1, 16, 16, dtype=torch.float64))
    with pytest.raises(ValueError, match="4 k pixel frames after the start"):
        encode_stream(VAE, torch.rand(1, 3, 5, 16, 16, dtype=torch.float64), state)
    tiled = build_vae()
    tiled.enable_tiling()
    with pytest.raises(ValueError, match="no streams"):
        decode_stream(tiled, latents(1, batch=1))
    with pytest.raises(ValueError, match="for AutoencoderKLWan"):
        decode_stream(AutoencoderKL(block_out_channels=(32,)), latents(1))  # pyright: ignore[reportArgumentType]
