"""The public functions: which code computes a call, that no call loses its tangent, what is refused, and memory."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.functional import scaled_dot_product_attention

from fewstep.kernels import mask as masks
from fewstep.kernels.attention import attention, attention_jvp, attention_with_lse
from fewstep.kernels.attention_dispatch import choose_path, library_attention, mask_kind
from fewstep.kernels.attention_reference import attention_jvp_reference, attention_reference
from fewstep.kernels.mask import AttentionMask
from tests.kernels.attention_cases import MASKS, Inputs, close, distance, draw, leaves

LIBRARIES = ("sdpa", "flash", "xformers")


def square(dtype: torch.dtype = torch.float64, mask: AttentionMask | None = None) -> Inputs:
    """Twelve tokens and equal widths, which every backend takes."""
    return draw(masks.full(12) if mask is None else mask, widths=(8, 8), heads=(2, 2)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", ["auto", "sdpa"])
def test_full_and_causal_calls_are_those_of_torch(backend: str, dtype: torch.dtype) -> None:
    q, k, v = square(dtype).primals
    full, causal = masks.full(12), masks.causal(12)
    theirs = scaled_dot_product_attention(q, k, v, scale=0.2)
    assert torch.equal(attention(q, k, v, scale=0.2, backend=backend), theirs)
    assert torch.equal(attention(q, k, v, mask=full, scale=0.2, backend=backend), theirs)
    theirs = scaled_dot_product_attention(q, k, v, is_causal=True)
    assert torch.equal(attention(q, k, v, mask=causal, backend=backend), theirs)
    assert not torch.equal(theirs, scaled_dot_product_attention(q, k, v))


def test_grouped_heads_go_to_torch_too() -> None:
    q, k, v = draw(masks.full(9, 11), widths=(8, 8), heads=(4, 2)).primals
    assert torch.equal(attention(q, k, v), scaled_dot_product_attention(q, k, v, enable_gqa=True))


@pytest.mark.parametrize("name", MASKS)
def test_outputs_equal_the_reference(name: str) -> None:
    inputs = draw(MASKS[name]())
    exact = attention_reference(*inputs.primals, mask=inputs.mask)
    for backend in ("auto", "tiled"):
        close(attention(*inputs.primals, mask=inputs.mask, backend=backend), exact.output)
    output, lse = attention_with_lse(*inputs.primals, mask=inputs.mask)
    close(output, exact.output)
    close(lse, exact.lse)


# torch 2.11 has no tangents at all in inference mode: not even those of sin.
MODES = [torch.no_grad, torch.inference_mode] if torch.__version__ >= "2.15" else [torch.no_grad]


@pytest.mark.parametrize("mode", MODES)
def test_without_grad(mode: Callable[[], AbstractContextManager[None]]) -> None:
    for name in ("causal", "block_causal"):
        inputs = draw(MASKS[name]())
        exact = attention_jvp_reference(*inputs.primals, *inputs.tangents, mask=inputs.mask)

        def attend(*parts: Tensor, mask: AttentionMask = inputs.mask) -> Tensor:
            return attention(*parts, mask=mask)

        points = leaves(inputs.primals)
        with mode():
            output = attend(*points)
            tangent = torch.func.jvp(attend, points, inputs.tangents)[1]
        assert not output.requires_grad
        assert not tangent.requires_grad
        close(output, exact.output)
        close(tangent, exact.tangent)
        # A gradient that is asked for inside is taken, as with any function of torch.
        grad = torch.func.grad(lambda *x, attend=attend: attend(*x).sin().sum())
        with torch.no_grad():
            within = grad(*inputs.primals)
        assert within.norm() > 0.1
        close(within, grad(*inputs.primals))


@pytest.mark.parametrize("backend", ["auto", "tiled"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["none", "full", "causal", "block_causal", "teacher_forcing_constant", "lengths"])
def test_no_path_of_the_public_functions_loses_the_tangent(kind: str, dtype: torch.dtype, backend: str) -> None:
    inputs = draw(MASKS["full" if kind == "none" else kind]()).to(dtype)
    mask = None if kind == "none" else inputs.mask
    truth = inputs.to(torch.float64)
    exact = attention_jvp_reference(*truth.primals, *truth.tangents, mask=mask)
    bound = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 8e-3}[dtype]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        output, lse = attention_with_lse(q, k, v, mask=mask, backend=backend)
        return attention(q, k, v, mask=mask, backend=backend), output, lse

    (_, _, _), (first, second, mean) = torch.func.jvp(attend, inputs.primals, inputs.tangents)[:2]
    assert torch.equal(first, second)
    assert first.dtype == dtype
    assert distance(first, exact.tangent) < bound
    assert distance(mean, exact.mean) < bound


@pytest.mark.parametrize("place", range(3), ids=["q", "k", "v"])
@pytest.mark.parametrize("kind", ["full", "causal", "documents"])
def test_one_dual_input_is_enough(kind: str, place: int) -> None:
    inputs = draw(MASKS[kind]())
    only = [x if i == place else None for i, x in enumerate(inputs.tangents)]
    exact = attention_jvp_reference(*inputs.primals, *only, mask=inputs.mask)
    with forward_ad.dual_level():
        duals = [x if t is None else forward_ad.make_dual(x, t) for x, t in zip(inputs.primals, only, strict=True)]
        close(forward_ad.unpack_dual(attention(*duals, mask=inputs.mask)).tangent, exact.tangent)


def test_mixed_dtypes_of_primal_and_tangent_are_refused() -> None:
    q, k, v = square(torch.bfloat16).primals
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(q, torch.ones_like(q, dtype=torch.float32))
        with pytest.raises(ValueError, match=r"tangent of q is torch\.float32.*Cast the tangent"):
            attention(dual, k, v)
        with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match="Cast the tangent"):
            attention(dual, k, v)
    with pytest.raises(ValueError, match=r"tangent of v is torch\.float32"):
        attention_jvp(q, k, v, None, None, v.float())


@pytest.mark.parametrize("kind", ["full", "block_causal"])
def test_autocast_casts_as_for_torch(kind: str) -> None:
    inputs = square(torch.float32, None if kind == "full" else masks.block_causal([5, 7]))
    narrow = inputs.to(torch.bfloat16)
    q, k, v = inputs.primals

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, mask=inputs.mask)

    wanted = torch.func.jvp(attend, narrow.primals, narrow.tangents)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(attend(q, k.bfloat16(), v), attend(*narrow.primals))
        found = torch.func.jvp(attend, inputs.primals, inputs.tangents)
        explicit = attention_jvp(q, k, v.bfloat16(), *inputs.tangents, mask=inputs.mask)
        kept = attention(q.double(), k.double(), v.double(), mask=inputs.mask)
        theirs = scaled_dot_product_attention(q, k, v)
    for x, y in zip((*found, explicit.output, explicit.tangent), (*wanted, *wanted), strict=True):
        assert x is not None
        assert x.dtype == theirs.dtype == torch.bfloat16
        assert torch.equal(x, y)
    assert kept.dtype == torch.float64
    assert attend(q, k, v).dtype == torch.float32


def test_linear_layers_under_autocast_keep_primal_and_tangent_in_one_dtype() -> None:
    inputs = square(torch.float32)
    layer = torch.nn.Linear(8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        output, tangent = torch.func.jvp(
            lambda x: attention(layer(x), layer(x), layer(x), mask=inputs.mask), inputs.primals[:1], inputs.tangents[:1]
        )[:2]
    assert output.dtype == tangent.dtype == torch.bfloat16
    assert tangent.norm() > 0.01


Edit = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
REFUSED: list[tuple[Edit, str]] = [
    (lambda q, k, v: (q[0], k, v), r"q has shape \(2, 12, 8\).*unflatten"),
    (lambda q, k, v: (q, k.flatten(2), v), r"k has shape \(2, 2, 96\).*unflatten"),
    (lambda q, k, v: (q.long(), k, v), r"q is torch\.int64.*Cast it"),
    (lambda q, k, v: (q, k.float(), v), r"k is torch\.float32.*cast or move"),
    (lambda q, k, v: (q, k, v.to("meta")), "v is torch.float64 on meta; cast or move"),
    (lambda q, k, v: (q[:1], k, v), "batches 1, 2, 2; expand"),
    (lambda q, k, v: (q, k, v[:, :, :5]), "must agree in all but the last"),
    (lambda q, k, v: (q, k[:, :1], v), "must agree in all but the last"),
    (lambda q, k, v: (q[..., :4], k, v), "Heads of q are 4 wide and those of k 8"),
    (lambda q, k, v: (q.repeat(1, 2, 1, 1)[:, :3], k, v), "q has 3 heads and k 2; .* multiple"),
    (lambda q, k, v: (q, k[:, :0], v[:, :0]), "q has 2 heads and k 0; .* multiple"),
]


@pytest.mark.parametrize(("edit", "message"), REFUSED)
def test_inputs_that_do_not_fit_are_refused(edit: Edit, message: str) -> None:
    parts = edit(*square().primals)
    for function in (attention, attention_with_lse):
        with pytest.raises(ValueError, match=message):
            function(*parts)
    with pytest.raises(ValueError, match=message):
        attention_jvp(*parts, None, None, None)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (masks.full(11), "mask is for 11 queries and 11 keys, but q has 12 and k 12 tokens. Build the mask"),
        (masks.full(12, 13), "12 queries and 13 keys"),
        (masks.lengths(torch.tensor([1, 2, 3]), queries=12, keys=12), "batch of 3 and q has 2; build it for one"),
    ],
)
def test_masks_that_do_not_fit_are_refused(mask: AttentionMask, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attention(*square().primals, mask=mask)


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        ((2, 2, 1, 8), torch.float64, r"tangent of k has shape \(2, 2, 1, 8\).*Expand it, or pass None"),
        ((2, 2, 12, 8), torch.float32, r"tangent of k is torch\.float32.*Cast the tangent"),
    ],
)
def test_tangents_that_do_not_fit_are_refused(shape: tuple[int, ...], dtype: torch.dtype, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attention_jvp(*square().primals, None, torch.ones(shape, dtype=dtype), None)


@pytest.mark.parametrize("backend", LIBRARIES)
def test_libraries_have_no_tangent_no_lse_and_no_other_masks(backend: str) -> None:
    inputs = square()
    q, k, v = inputs.primals
    with pytest.raises(ValueError, match=f"'{backend}' has no tangent"):
        torch.func.jvp(lambda x: attention(x, k, v, backend=backend), (q,), inputs.tangents[:1])
    with pytest.raises(ValueError, match=f"'{backend}' has no tangent, no log-sum-exp"):
        attention_with_lse(q, k, v, backend=backend)
    with pytest.raises(ValueError, match=f"'{backend}' takes full and causal masks alone; use backend='auto'"):
        attention(q, k, v, mask=masks.documents([5, 7]), backend=backend)
    with pytest.raises(ValueError, match="full and causal"):
        attention(q[:, :, :0], k, v, backend=backend)


@pytest.mark.parametrize(("backend", "package"), [("flash", "flash-attn"), ("xformers", "xformers")])
def test_libraries_that_cannot_run_here_are_named(backend: str, package: str) -> None:
    with pytest.raises(ValueError, match=f"{package} (is not installed; pip install {package}|runs on CUDA)"):
        attention(*square().primals, backend=backend)


def test_backends_that_cannot_be_had_are_refused() -> None:
    q, k, v = square().primals
    with pytest.raises(
        ValueError, match="'cudnn' is unknown; choose 'auto', 'sdpa', 'flash', 'xformers', 'triton', 'ti"
    ):
        attention(q, k, v, backend="cudnn")
    for dtype in (torch.float64, torch.float32):
        with pytest.raises(ValueError, match=r"Triton kernels take fp32, fp16 and bf16 on CUDA.*use backend='tiled'"):
            attention(q.to(dtype), k.to(dtype), v.to(dtype), backend="triton")


def test_paths_by_device() -> None:
    wide, narrow = torch.empty(1, 1, 4, 320, device="meta"), torch.empty(1, 1, 4, 64)
    assert choose_path(narrow, narrow, "auto") == choose_path(narrow, wide, "auto") == "tiled"
    assert choose_path(wide, wide, "auto") == choose_path(wide, wide, "tiled") == "tiled"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_heads_that_are_too_wide_for_the_gpu_are_refused() -> None:
    q = torch.zeros(1, 1, 4, 320, device="cuda")
    with pytest.raises(ValueError, match=r"320 wide.*at most 256.*backend='tiled'"):
        choose_path(q, q, "auto")
    assert choose_path(q, q, "tiled") == choose_path(q.double(), q.double(), "auto") == "tiled"
    assert choose_path(q[..., :256], q[..., :8], "auto") == "triton"


@pytest.mark.parametrize(
    ("mask", "kind"),
    [
        (None, "full"),
        (masks.full(4, 7), "full"),
        (masks.block_causal([5]), "full"),
        (masks.causal(4), "causal"),
        (masks.block_causal([1, 1, 1]), "causal"),
        (masks.block_causal([2, 1]), "other"),
        (masks.from_predicate(lambda i, j: j <= i, 4, 6), "other"),
        (masks.from_predicate(lambda i, j: j < i, 4, 4), "other"),
        (masks.from_predicate(lambda i, j: (j <= i) & ((j != 1) | (i < 3)), 4, 4), "other"),
        (masks.lengths(torch.tensor([4, 4]), queries=4, keys=4), "full"),
        (masks.lengths(torch.tensor([4, 3]), queries=4, keys=4), "other"),
    ],
)
def test_kinds_of_masks(mask: AttentionMask | None, kind: str) -> None:
    assert [mask_kind(mask), mask_kind(mask)] == [kind, kind]
    if mask is not None:
        primals = draw(mask, heads=(1, 1)).primals
        assert (library_attention(primals, mask, 0.5, "auto") is None) == (kind == "other")


@pytest.mark.parametrize(("queries", "keys"), [(0, 5), (5, 0), (0, 0)])
def test_no_tokens(queries: int, keys: int) -> None:
    inputs = draw(masks.full(queries, keys))
    for mask in (None, inputs.mask):
        output, tangent = torch.func.jvp(
            lambda *x, mask=mask: attention(*x, mask=mask), inputs.primals, inputs.tangents
        )[:2]
        plain, lse = attention_with_lse(*inputs.primals, mask=mask)
        for x in (output, tangent, plain, attention(*inputs.primals, mask=mask)):
            assert x.shape == (2, 4, queries, 5)
            assert x.count_nonzero() == 0
        assert lse.tolist() == [[[-math.inf] * queries] * 4] * 2


@pytest.mark.parametrize("place", range(3), ids=["q", "k", "v"])
def test_a_broken_promise_is_found(place: int) -> None:
    mask = masks.teacher_forcing([4, 3], clean_is_constant=True)
    mask = mask.with_activity(queries=mask.query_active, keys=mask.key_active, verify=True)
    inputs = draw(mask)
    attention_jvp(*inputs.primals, *inputs.tangents, mask=mask)
    inputs.tangents[place][1, 1, 2, 3] = 0.25
    with pytest.raises(
        ValueError, match=f"tangent of {'qkv'[place]} is zero at 7 tokens.*0.25.*clean_is_constant=False"
    ):
        torch.func.jvp(lambda *x: attention(*x, mask=mask), inputs.primals, inputs.tangents)
    trusted = masks.teacher_forcing([4, 3], clean_is_constant=True)
    assert attention_jvp(*inputs.primals, *inputs.tangents, mask=trusted).output.isfinite().all()


def test_a_promise_that_holds_passes_through_two_layers() -> None:
    mask = masks.teacher_forcing([5, 6, 2], clean_is_constant=True)
    mask = mask.with_activity(queries=mask.query_active, keys=mask.key_active, verify=True)
    inputs = square(mask=mask)

    def layers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        x = attention(q, k, v, mask=mask)
        return attention(x, x.sin(), x.tanh(), mask=mask)

    tangent = torch.func.jvp(layers, inputs.primals, inputs.tangents)[1]
    assert tangent[:, :, :13].count_nonzero() == 0
    assert tangent[:, :, 13:].count_nonzero() == 2 * 2 * 13 * 8


MEMORY = """
import torch
from pathlib import Path
from fewstep.kernels.attention import attention_jvp
from fewstep.kernels.mask import teacher_forcing
torch.set_num_threads(1)
def peak():
    # Not resource.ru_maxrss: that starts at the peak of the process that started this one.
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024
def run(chunk):
    mask = teacher_forcing([chunk] * 16, window=4, clean_is_constant=True)
    parts = [torch.randn(1, 8, 32 * chunk, 64) for _ in range(6)]
    for tangent in parts[3:]:
        tangent[:, :, : 16 * chunk] = 0
    before = peak()
    result = attention_jvp(*parts, mask=mask)
    return peak() - before, result.tangent.norm().item()
run(8)
print(*run(256))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_of_eight_thousand_tokens() -> None:
    found = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True, timeout=150)
    megabytes, norm = map(float, found.stdout.split())
    # Output and tangent are 16 MB each; the matrix of one head would be 256 MB.
    assert 16 < megabytes < 64
    assert norm > 1
