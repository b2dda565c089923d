"""Token losses from hidden states: the same numbers and gradients as plain cross-entropy on all logits."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ftrun.models import head as head_module
from ftrun.models.head import Head, token_nll

WIDTH, VOCABULARY = 6, 23
COMBINATIONS = list(itertools.product([False, True], [1.0, 0.3], [None, 2.0], ["none", "weight", "all"]))


def parts(
    bias: bool, trained: str, count: int, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    draw = torch.Generator().manual_seed(count)
    hidden = torch.randn(count, WIDTH, generator=draw, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(VOCABULARY, WIDTH, generator=draw, dtype=torch.float64).to(dtype)
    offset = torch.randn(VOCABULARY, generator=draw, dtype=torch.float64).to(dtype) if bias else None
    weight.requires_grad_(trained != "none")
    if offset is not None:
        offset.requires_grad_(trained == "all")
    targets = torch.randint(0, VOCABULARY, (count,), generator=draw)
    return hidden, weight, offset, targets


def plain(hidden: Tensor, head: Head, targets: Tensor) -> Tensor:
    assert head.weight is not None
    logits = F.linear(hidden, head.weight, head.bias) * head.scale
    if head.cap is not None:
        logits = torch.tanh(logits / head.cap) * head.cap
    return F.cross_entropy(logits, targets, reduction="none")


@pytest.fixture(params=[1, 3, 1000], ids=lambda rows: f"chunk{rows}")
def chunk(request, monkeypatch):
    """Chunks of one position, of a few, and one chunk for all (float64; half of it with two buffers)."""
    monkeypatch.setattr(head_module, "LOGITS_BYTES", request.param * VOCABULARY * 8)


@pytest.mark.parametrize(("bias", "scale", "cap", "trained"), COMBINATIONS)
@pytest.mark.parametrize("count", [0, 1, 10])
def test_equals_cross_entropy(chunk, bias, scale, cap, trained, count):
    hidden, weight, offset, targets = parts(bias, trained, count)
    head = Head(weight, offset, scale, cap, VOCABULARY)
    leaves = [leaf for leaf in (hidden, weight, offset) if leaf is not None and leaf.requires_grad]
    upstream = torch.linspace(-1, 2, count, dtype=torch.float64)
    ours, wanted = token_nll(hidden, head, targets), plain(hidden, head, targets)
    torch.testing.assert_close(ours, wanted)
    for mine, theirs in zip(
        torch.autograd.grad((ours * upstream).sum(), leaves),
        torch.autograd.grad((wanted * upstream).sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs)
    with torch.no_grad():
        torch.testing.assert_close(token_nll(hidden, head, targets), wanted)


@pytest.mark.parametrize(("bias", "scale", "cap", "trained"), COMBINATIONS)
def test_gradcheck(bias, scale, cap, trained):
    hidden, weight, offset, targets = parts(bias, trained, 4)
    torch.autograd.gradcheck(
        lambda h, w, b: token_nll(h, Head(w, b, scale, cap, VOCABULARY), targets),
        (hidden, weight, offset),
        fast_mode=True,
    )


@pytest.mark.parametrize("trained", ["none", "all"])
def test_no_tokens_is_a_zero_loss_with_a_graph(trained):
    hidden, weight, offset, targets = parts(True, trained, 0, torch.float32)
    loss = token_nll(hidden, Head(weight, offset, vocabulary=VOCABULARY), targets).sum()
    loss.backward()
    assert loss.item() == 0.0 and hidden.grad is not None
    if trained == "all":
        assert weight.grad is not None and not weight.grad.any()


def test_huge_logits_stay_finite():
    """A target that is hopeless in float32 has its true loss, not infinity."""
    hidden = torch.tensor([[300.0]], requires_grad=True)
    head = Head(torch.tensor([[1.0], [-1.0]]), vocabulary=2)
    nll = token_nll(hidden, head, torch.tensor([1]))
    nll.sum().backward()
    assert nll.item() == pytest.approx(600.0) and torch.isfinite(hidden.grad).all()


@pytest.mark.parametrize("trained", ["none", "weight"])
def test_bfloat16_is_summed_in_float32(trained):
    hidden, weight, _, targets = parts(False, trained, 10, torch.bfloat16)
    head = Head(weight, vocabulary=VOCABULARY)
    exact = Head(weight.detach().float(), vocabulary=VOCABULARY)
    states = hidden.detach().float().requires_grad_()
    ours, wanted = token_nll(hidden, head, targets), token_nll(states, exact, targets)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, wanted, rtol=2e-2, atol=2e-2)
    ours.sum().backward()
    wanted.sum().backward()
    torch.testing.assert_close(hidden.grad.float(), states.grad, rtol=3e-2, atol=3e-2)


def test_autocast_computes_in_its_dtype():
    hidden, weight, _, targets = parts(False, "weight", 5, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = token_nll(hidden, Head(weight, vocabulary=VOCABULARY), targets)
    ours.sum().backward()
    assert ours.dtype == torch.float32 and weight.grad.dtype == torch.float32
    torch.testing.assert_close(ours, plain(hidden, Head(weight), targets), rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize("count", [0, 1, 10])
def test_module_head(chunk, count):
    """A head that can only be called gives the same losses and gradients, chunk by chunk."""
    hidden, weight, offset, targets = parts(True, "all", count)
    called = Head(None, vocabulary=VOCABULARY, forward=lambda states: F.linear(states, weight, offset))
    ours, wanted = token_nll(hidden, called, targets), plain(hidden, Head(weight, offset), targets)
    torch.testing.assert_close(ours, wanted)
    if count:
        leaves = [hidden, weight, offset]
        for mine, theirs in zip(
            torch.autograd.grad(ours.sum(), leaves), torch.autograd.grad(wanted.sum(), leaves), strict=True
        ):
            torch.testing.assert_close(mine, theirs)
    else:
        ours.sum().backward()
        assert hidden.grad is not None


@pytest.mark.parametrize(("bias", "scale", "cap"), list(itertools.product([False, True], [1.0, 0.3], [None, 2.0])))
@pytest.mark.parametrize("count", [0, 1, 10])
def test_without_a_gradient_blocks_of_the_vocabulary_give_the_same(monkeypatch, bias, scale, cap, count):
    """Positions and words in blocks that do not divide them."""
    monkeypatch.setattr(head_module, "CACHED_ROWS", 4)
    monkeypatch.setattr(head_module, "CACHED_WORDS", 5)
    hidden, weight, offset, targets = parts(bias, "none", count, torch.float32)
    head = Head(weight, offset, scale, cap, VOCABULARY)
    with torch.no_grad():
        torch.testing.assert_close(token_nll(hidden, head, targets), plain(hidden, head, targets))


def test_logits_never_exceed_the_bound(monkeypatch):
    """Every product with the vocabulary stays within the bytes allowed, forward and backward."""
    monkeypatch.setattr(head_module, "LOGITS_BYTES", 4 * VOCABULARY * 4)
    seen: list[int] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if (
                isinstance(result, Tensor)
                and result.ndim == 2
                and result.shape[1] == VOCABULARY
                and len(result) != WIDTH
            ):
                seen.append(result.numel() * result.element_size())
            return result

    for trained in ("none", "weight"):
        hidden, weight, _, targets = parts(False, trained, 50, torch.float32)
        with Watch():
            token_nll(hidden, Head(weight, vocabulary=VOCABULARY), targets).sum().backward()
    assert seen and max(seen) <= 4 * VOCABULARY * 4
