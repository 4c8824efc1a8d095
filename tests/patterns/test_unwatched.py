"""What is not watched yet is in the ledger with its reason; what only looks like it is not."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint


def _qkv() -> torch.Tensor:
    return torch.randn(2, 4, 8, 16, requires_grad=True)


def test_written_out_attention_is_named(capture) -> None:
    def attend(q, k, v):
        scores = (q @ k.transpose(-2, -1) / 4).masked_fill(torch.ones(8, 8).triu(1).bool(), float("-inf"))
        return functional.dropout(scores.softmax(-1).to(v.dtype), 0.1) @ v

    found = capture(attend, _qkv(), _qkv(), _qkv())
    assert found.reasons == ["attention written out as product, softmax, product is not watched yet"]
    assert "scores.softmax(-1)" in str(found.findings.misses[0])
    assert "test_unwatched.py" in str(found.findings.misses[0])


def test_a_softmax_over_classes_is_not(capture) -> None:
    assert capture(lambda x, w: (x @ w).softmax(-1).log().sum(), torch.randn(2, 3, 4), torch.randn(4, 5)).reasons == []


def test_multi_head_attention_module_is_named(capture) -> None:
    attention = nn.MultiheadAttention(16, 2, batch_first=True)
    found = capture(lambda x: attention(x, x, x, need_weights=False)[0], torch.randn(2, 8, 16))
    assert found.reasons == ["attention inside one opaque multi_head_attention_forward call is not watched yet"]


def test_attention_under_activation_checkpointing_is_named_and_a_layer_without_is_not(capture) -> None:
    def inside(q):
        return functional.scaled_dot_product_attention(q, q, q)

    kept = capture(lambda q: checkpoint(inside, q, use_reentrant=False), _qkv())
    assert kept.reasons == ["an attention or a router inside activation checkpointing is not watched yet"]
    assert capture(lambda q: checkpoint(torch.tanh, q, use_reentrant=False), _qkv()).reasons == []
