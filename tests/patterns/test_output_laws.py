"""Where the laws of the output alone, hull and shadow, hold, and what the ledger says where they do not."""

from __future__ import annotations

import math

import pytest
import torch
from projected import Attention, D, H, S
from projected import x as _x
from torch.nn import functional

from foreshock.patterns import attention_op

sdpa = functional.scaled_dot_product_attention
MASK = torch.ones(S, S).tril().bool()


def _softmax(q, k):
    return (q @ k.mT * D**-0.5).softmax(-1)


if not hasattr(torch.ops.outputlaws, "attend"):
    torch.library.define("outputlaws::attend", "(Tensor a, Tensor b, Tensor c) -> Tensor")
    torch.library.impl("outputlaws::attend", "CompositeImplicitAutograd")(lambda a, b, c: sdpa(a, b, c))


class Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v):
        p = (q @ k.mT * D**-0.5).masked_fill(~MASK, -math.inf).softmax(-1)
        ctx.save_for_backward(p)
        return p @ v

    @staticmethod
    def backward(ctx, grad):
        (p,) = ctx.saved_tensors
        return torch.zeros_like(grad), torch.zeros_like(grad), p.mT @ grad


NONE: tuple[str, str] = ("", "")
FORMS = {
    "plain": (lambda q, k, v: sdpa(q, k, v), NONE),
    "a mask": (lambda q, k, v: sdpa(q, k, v, MASK), NONE),
    "written out": (lambda q, k, v: _softmax(q, k) @ v, NONE),
    "dropout": (lambda q, k, v: sdpa(q, k, v, dropout_p=0.1), ("dropout", "dropout")),
    "probabilities altered": (lambda q, k, v: (_softmax(q, k) * MASK) @ v, ("multiplied after", "multiplied after")),
    "added to something": (
        lambda q, k, v: torch.baddbmm(
            q.flatten(0, 1), _softmax(q, k).flatten(0, 1), v.flatten(0, 1)
        ).unflatten(0, (-1, H)),
        ("added to another", "added to another"),
    ),
    "a kernel of unknown causality": (torch.ops.outputlaws.attend, ("", "causal is not known")),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_each_form(capture, form: str) -> None:
    call, reasons = FORMS[form]
    extra = (attention_op("outputlaws::attend", layout="BHSD"),)
    laws = capture(Attention(call), _x(), extra=extra).match.laws
    for law, reason in zip(("law/hull", "law/shadow"), reasons, strict=True):
        assert (reason in laws[law]) if reason else laws[law] == "", law


def test_no_gradient_is_needed(capture) -> None:
    laws = capture(Attention(lambda q, k, v: sdpa(q.detach(), k.detach(), v.detach())), _x()).match.laws
    assert (laws["law/hull"], laws["law/shadow"]) == NONE
    assert "no gradient" in laws["law/euler"]


def test_logits_inside_an_autograd_function_cannot_be_read(capture) -> None:
    match = capture(Attention(lambda q, k, v: Function.apply(q, k, v)), _x()).match
    assert "logits" not in match.roles
    assert match.laws["law/hull"] == ""
    assert "no recomputed rows" in match.laws["law/shadow"]
