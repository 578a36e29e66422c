"""The network against the stock transformer, masked calls against cached ones, tangents, and adapters."""

from collections.abc import Callable

import pytest
import torch
from diffusers import SanaTransformer2DModel, WanTransformer3DModel
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fewstep.causal_video.layout import ChunkLayout
from fewstep.causal_video.model import masks
from fewstep.causal_video.model.calls import condition_first_frame, packed_call, per_frame, whole_call
from fewstep.causal_video.model.network import CausalWan
from fewstep.causal_video.policy import CachePolicy
from fewstep.core.networks.lora import add_lora, lora_state_dict
from fewstep.kernels.check_jvp import Float64Inside, check_jvp
from tests.causal_video.tiny_causal import (
    FRAME_TOKENS,
    FRAMES,
    LAYOUTS,
    build_student,
    chunk_times,
    fill,
    largest,
    latents,
    layouts,
    shared_student,
    span,
    text,
    windows,
)
from tests.tiny_networks import build_sana, build_wan, distance

T = torch.tensor([0.25, 0.75], dtype=torch.float64)


def stock(student: CausalWan, x: Tensor, timestep: Tensor, tokens: Tensor) -> Tensor:
    """diffusers' own forward."""
    with torch.no_grad():
        return student.transformer(x, timestep, tokens, return_dict=False)[0]


def test_constant_time_equals_the_stock_forward() -> None:
    student = shared_student()
    ours = student.bidirectional(latents(), T, text())
    assert ours.shape == (2, 4, FRAMES, 4, 4)
    # diffusers narrows norms to fp32.
    assert largest(ours, stock(student, latents(), 1000 * T, text())) < 1e-6


def test_time_per_frame_equals_the_stock_path_per_token() -> None:
    student, t = shared_student(), torch.rand(2, FRAMES, dtype=torch.float64)
    per_token = (1000 * t).repeat_interleave(FRAME_TOKENS, dim=1)
    ours = student.bidirectional(latents(), t, text())
    assert largest(ours, stock(student, latents(), per_token, text())) < 1e-6
    assert largest(ours, student.bidirectional(latents(), t.mean(dim=1), text())) > 1e-2


def test_norms_with_weights_and_odd_sizes_equal_the_stock_forward() -> None:
    student = CausalWan(build_wan().double().requires_grad_(False))  # with cross_attn_norm, which has weights
    x = torch.randn(2, 4, 3, 4, 6, dtype=torch.float64)
    assert largest(student.bidirectional(x, T, text()), stock(student, x, 1000 * T, text())) < 1e-6


@pytest.mark.parametrize("lengths", LAYOUTS)
def test_one_chunk_is_bidirectional_and_more_are_not(lengths: tuple[int, ...]) -> None:
    student, layout = shared_student(), ChunkLayout(lengths)
    causal = student.causal(latents(), T, text(), mask=masks.block_causal(layout, FRAME_TOKENS))
    difference = largest(causal, student.bidirectional(latents(), T, text()))
    assert (difference < 1e-12) == (layout.chunks == 1)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_appending_chunks_equals_one_masked_call(data: st.DataObject) -> None:
    # I1 and I2: for all layers, since the last one sees what the first ones stored.
    layout = data.draw(layouts(most=5))
    policy = data.draw(windows(layout))
    student, x, t = shared_student(), latents(layout.frames), chunk_times(layout)
    streamed, _, _ = fill(student, x, t, text(), layout, policy)
    masked = student.causal(x, t, text(), mask=masks.block_causal(layout, FRAME_TOKENS, policy))
    assert largest(streamed, masked) < 1e-12


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_a_noisy_chunk_over_a_clean_cache_is_the_noisy_half_of_teacher_forcing(data: st.DataObject) -> None:
    # I3.
    layout = data.draw(layouts(most=5))
    policy = data.draw(windows(layout))
    student, clean, noisy = shared_student(), latents(layout.frames), latents(layout.frames, seed=9)
    t = chunk_times(layout)
    _, _, prefixes = fill(student, clean, torch.zeros_like(t), text(), layout, policy)
    parts = [span(layout, chunk) for chunk in range(layout.chunks)]
    streamed = torch.cat(
        [student.readonly(noisy[:, :, p], t[:, p], text(), seen) for p, seen in zip(parts, prefixes, strict=True)],
        dim=2,
    )
    mask = masks.teacher_forcing(layout, FRAME_TOKENS, policy)
    assert largest(streamed, student.packed(clean, noisy, t, text(), mask=mask)) < 1e-12


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_a_clean_noisy_half_equals_the_clean_half(data: st.DataObject) -> None:
    # With x_noisy = x_clean at t = 0 a noisy chunk sees what the clean one sees, position for position.
    layout = data.draw(layouts(most=5))
    policy = data.draw(windows(layout))
    student, x = shared_student(), latents(layout.frames)
    t = torch.zeros(2, dtype=torch.float64)
    mask = masks.teacher_forcing(layout, FRAME_TOKENS, policy)
    causal = student.causal(x, t, text(), mask=masks.block_causal(layout, FRAME_TOKENS, policy))
    assert largest(student.packed(x, x, t, text(), mask=mask), causal) < 1e-12


@pytest.mark.parametrize("lengths", LAYOUTS[:3])
def test_later_chunks_change_nothing_before_them(lengths: tuple[int, ...]) -> None:
    # I6, exactly.
    student, layout = shared_student(), ChunkLayout(lengths)
    mask = masks.block_causal(layout, FRAME_TOKENS)
    x, t = latents(), chunk_times(layout)
    for chunk in range(layout.chunks - 1):
        changed = x.clone()
        changed[:, :, layout.end(chunk) :] += 1
        before = student.causal(x, t, text(), mask=mask)
        after = student.causal(changed, t, text(), mask=mask)
        assert torch.equal(before[:, :, : layout.end(chunk)], after[:, :, : layout.end(chunk)])
        assert largest(before[:, :, layout.end(chunk) :], after[:, :, layout.end(chunk) :]) > 1e-3


def test_a_noised_context_has_its_own_time() -> None:
    student, layout = shared_student(), ChunkLayout((1, 2, 2, 2))
    mask = masks.teacher_forcing(layout, FRAME_TOKENS)
    noised = student.packed(latents(), latents(seed=9), T, text(), mask=mask, clean_time=torch.full_like(T, 0.1))
    clean = student.packed(latents(), latents(seed=9), T, text(), mask=mask)
    assert largest(noised[:, :, :1], clean[:, :, :1]) == 0
    assert largest(noised[:, :, 1:], clean[:, :, 1:]) > 1e-3


def test_sequences_of_any_number_of_tokens() -> None:
    # 128 tokens leave no padding in a tile of 128, 4 tokens nearly nothing else.
    student = shared_student()
    for x in (torch.randn(1, 4, 2, 16, 16, dtype=torch.float64), latents(1, batch=1)):
        layout = ChunkLayout.uniform(x.shape[2], 1)
        tokens = student.tokens_per_frame(x)
        assert tokens * x.shape[2] in (128, 4)
        causal = student.causal(x, T[:1], text(1), mask=masks.block_causal(layout, tokens))
        streamed, _, _ = fill(student, x, per_frame(T[:1], x.shape[2]), text(1), layout)
        assert largest(causal, streamed) < 1e-12


def jvp_of_packed(student: CausalWan, promise: bool) -> Callable[[Tensor, Tensor], Tensor]:
    """Velocity of the noisy half as a function of noisy latents and their times."""
    mask = masks.teacher_forcing(ChunkLayout((1, 2)), FRAME_TOKENS, clean_is_constant=promise)
    return lambda noisy, t: student.packed(latents(3), noisy, t, text(), mask=mask)


def test_tangents_go_through_the_packed_mask() -> None:
    student = shared_student()
    directions = (latents(3, seed=5), torch.ones_like(T))
    with Float64Inside():
        check = check_jvp(
            jvp_of_packed(student, True), (latents(3, seed=9), T), (directions[0], None), dtype=torch.float64
        )
        assert check.error < 1e-6
        check = check_jvp(
            jvp_of_packed(student, True),
            (latents(3, seed=9), T),
            (None, directions[1]),
            dtype=torch.float64,
            largest_step=2.0**-8,
            halvings=10,
        )
        assert check.error < 1e-6


def test_the_promise_of_a_constant_clean_half_changes_no_tangent() -> None:
    student = shared_student()
    primals, directions = (latents(3, seed=9), T), (latents(3, seed=5), torch.ones_like(T))
    promised = torch.func.jvp(jvp_of_packed(student, True), primals, directions)
    plain = torch.func.jvp(jvp_of_packed(student, False), primals, directions)
    assert largest(promised[0], plain[0]) < 1e-12
    assert largest(promised[1], plain[1]) < 1e-12
    assert float(plain[1].abs().max()) > 1e-2
    # The clean half has no tangent at all, in any layer: verified by the kernel on each call.
    mask = masks.teacher_forcing(ChunkLayout((1, 2)), FRAME_TOKENS, clean_is_constant=True)
    verified = mask.with_activity(queries=mask.query_active, keys=mask.key_active, verify=True)
    checked = torch.func.jvp(
        lambda noisy, t: student.packed(latents(3), noisy, t, text(), mask=verified), primals, directions
    )
    assert torch.equal(checked[1], promised[1])
    with pytest.raises(ValueError, match="tangent"):
        torch.func.jvp(
            lambda clean: student.packed(clean, primals[0], T, text(), mask=verified), primals[:1], directions[:1]
        )


def test_checkpointing_changes_no_gradient() -> None:
    gradients = []
    for recompute in (False, True):
        student = build_student()
        if recompute:
            student.transformer.enable_gradient_checkpointing()
        layout = ChunkLayout((1, 2, 2, 2))
        _, cache, prefixes = fill(student, latents(), chunk_times(layout), text(), layout, CachePolicy(2))
        student.readonly(latents(2), T, text(), prefixes[-1]).square().sum().backward()
        gradients.append([p.grad for p in student.parameters()])
        assert cache.frames == 0
    for a, b in zip(*gradients, strict=True):
        assert a is not None
        assert b is not None
        assert torch.equal(a, b)


def test_cross_attention_uses_stored_text_without_gradients_and_computes_it_with_them() -> None:
    student = build_student()
    prompt = student.prompt(text())
    with torch.no_grad():
        assert torch.equal(student.bidirectional(latents(), T, prompt), student.bidirectional(latents(), T, text()))
        stored = student.prompt(text(seed=8))
        other = student.bidirectional(latents(), T, type(prompt)(prompt.tokens, stored.keys, stored.values))
        assert largest(other, student.bidirectional(latents(), T, prompt)) > 1e-3
    student.bidirectional(latents(), T, prompt).square().sum().backward()
    for block in student.blocks:
        for layer in (block.attn2.to_k, block.attn2.to_v):
            assert layer.weight.grad is not None
            assert float(layer.weight.grad.abs().max()) > 1e-6


def test_adapters_work_and_base_names_stay() -> None:
    student = build_student()
    with torch.no_grad():
        before = student.bidirectional(latents(), T, text())
    add_lora(student.transformer, rank=2, alpha=2.0, targets=("to_q", "to_k", "to_v"), seed=0)
    student.double()
    assert largest(student.bidirectional(latents(), T, text()).detach(), before) == 0
    mask = masks.block_causal(ChunkLayout((1, 2, 2, 2)), FRAME_TOKENS)
    student.causal(latents(), T, text(), mask=mask).square().sum().backward()
    with_gradient = {name for name, p in student.named_parameters() if p.grad is not None}
    assert len(with_gradient) > 0
    assert all("lora_" in name for name in with_gradient)
    assert all(name.startswith("blocks.") for name in lora_state_dict(student.transformer))


def test_conditioning_channels_lie_beside_the_latents() -> None:
    student = build_student(extra=2)
    student.requires_grad_(False)
    extra = latents(seed=7, channels=2)
    joined = torch.cat([latents(), extra], dim=1)
    ours = student.bidirectional(latents(), T, text(), extra=extra)
    assert student.extra_channels == 2
    assert largest(ours, stock(student, joined, 1000 * T, text())) < 1e-6
    layout = ChunkLayout((1, 2, 2, 2))
    packed = student.packed(
        latents(),
        latents(),
        torch.zeros_like(T),
        text(),
        mask=masks.teacher_forcing(layout, FRAME_TOKENS),
        extra=extra,
    )
    causal = student.causal(
        latents(), torch.zeros_like(T), text(), mask=masks.block_causal(layout, FRAME_TOKENS), extra=extra
    )
    assert largest(packed, causal) < 1e-12
    with pytest.raises(ValueError, match="takes 6 channels"):
        student.bidirectional(latents(), T, text())
    with pytest.raises(ValueError, match="does not lie beside"):
        student.bidirectional(latents(), T, text(), extra=extra[:, :, :3])


def test_a_given_first_frame_is_its_own_prediction() -> None:
    image = latents(1, seed=4)
    x, t = condition_first_frame(latents(), T, image)
    assert torch.equal(x[:, :, :1], image)
    assert torch.equal(x[:, :, 1:], latents()[:, :, 1:])
    assert t[:, 0].tolist() == [0, 0]
    assert torch.equal(t[:, 1:], T[:, None].expand(-1, FRAMES - 1))
    velocity = shared_student().bidirectional(x, t, text())
    assert torch.equal((x - t[:, None, :, None, None] * velocity)[:, :, :1], image)
    unchanged, _ = condition_first_frame(latents(), T, None)
    assert torch.equal(unchanged, latents())
    with pytest.raises(ValueError, match="image latent must be"):
        condition_first_frame(latents(), T, latents(2))


def test_calls_of_other_shapes_are_refused() -> None:
    student, mask = shared_student(), masks.block_causal(ChunkLayout((1, 2)), FRAME_TOKENS)
    with pytest.raises(ValueError, match=r"\[B, C, F, h, w\]"):
        student.bidirectional(latents()[:, :, 0], T, text())
    with pytest.raises(ValueError, match="rounds times"):
        student.bidirectional(latents(), T.bfloat16(), text())
    with pytest.raises(ValueError, match=r"\[B\] or \[B, 7\]"):
        student.bidirectional(latents(), torch.rand(2, 3), text())
    with pytest.raises(ValueError, match="must be of one shape"):
        packed_call(latents(), latents(3), T, text(), mask=mask)
    with pytest.raises(ValueError, match="do not divide into patches"):
        student.bidirectional(torch.randn(2, 4, 2, 3, 4, dtype=torch.float64), T, text())
    with pytest.raises(ValueError, match="28"):
        student.causal(latents(), T, text(), mask=mask)
    with pytest.raises(ValueError, match="one time per frame"):
        student(whole_call(latents(), T[:1], text()))


def test_networks_of_other_kinds_are_refused() -> None:
    with pytest.raises(ValueError, match="wraps a WanTransformer3DModel"):
        CausalWan(build_sana())  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="attend to image tokens"):
        CausalWan(build_wan(image_to_video=True))
    over_time = WanTransformer3DModel(
        patch_size=(2, 2, 2),
        num_attention_heads=1,
        attention_head_dim=12,
        num_layers=1,
        ffn_dim=8,
        freq_dim=8,
        text_dim=4,
    )
    with pytest.raises(ValueError, match="must not reach over frames"):
        CausalWan(over_time)
    assert issubclass(SanaTransformer2DModel, torch.nn.Module)
    fused = build_student(layers=1)
    fused.transformer.fuse_qkv_projections()
    with pytest.raises(ValueError, match="projections are fused"):
        fused.bidirectional(latents(), T, text())


def test_half_precision_stays_close_to_fp64() -> None:
    student = build_student()
    mask = masks.block_causal(ChunkLayout((1, 2, 2, 2)), FRAME_TOKENS)
    with torch.no_grad():
        wide = student.causal(latents(), T, text(), mask=mask)
        narrow = student.to(torch.bfloat16).causal(latents().float(), T.float(), text(), mask=mask)
    assert narrow.dtype == torch.float32
    assert distance(narrow, wide) < 0.05
