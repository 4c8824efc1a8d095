"""`multi_head_attention_forward` written out: the same numbers, and the attention inside is found."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import foreshock
from foreshock import Watch
from foreshock.passes import copy_graph, expand
from foreshock.patterns import GraphView, find
from foreshock.patterns.ops import op

B, S, T, H, D, KV = 2, 4, 5, 2, 8, 6


def _run(module: nn.Module, dynamic: bool, **options) -> tuple[torch.Tensor, list, list[str]]:
    found: list = []
    ops: list[str] = []

    def backend(captured, inputs):
        copied, _ = copy_graph(captured)
        expand(copied)
        copied.graph.lint()
        copied.recompile()
        ops.extend(op(node) for node in copied.graph.nodes)
        found.extend(find(GraphView.of(copied.graph, inputs)).matches)
        return copied.forward

    x = torch.randn(S, B, D, generator=torch.Generator().manual_seed(1), requires_grad=True)
    y = torch.randn(T, B, KV, generator=torch.Generator().manual_seed(2))
    torch._dynamo.reset()
    torch.manual_seed(0)
    compiled = torch.compile(lambda x, y: module(x, y, y, **options)[0], backend=backend, dynamic=dynamic)
    return compiled(x, y), found, ops


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("bias_kv", [False, True])
def test_written_out_it_computes_the_same(one_thread, dynamic: bool, need_weights: bool, bias_kv: bool) -> None:
    module = nn.MultiheadAttention(D, H, dropout=0.2, kdim=KV, vdim=KV, add_bias_kv=bias_kv)
    padding = torch.zeros(B, T, dtype=torch.bool)
    padding[0, -1] = True
    options = {"key_padding_mask": padding, "need_weights": need_weights}
    out, found, ops = _run(module, dynamic, **options)
    x = torch.randn(S, B, D, generator=torch.Generator().manual_seed(1), requires_grad=True)
    y = torch.randn(T, B, KV, generator=torch.Generator().manual_seed(2))
    torch.manual_seed(0)
    assert torch.equal(out, module(x, y, y, **options)[0])
    assert "multi_head_attention_forward" not in ops
    if not need_weights:
        (match,) = found
        assert match.pattern == "scaled_dot_product_attention"
        assert match.facts["heads"] == H


def test_the_place_in_the_users_code_is_kept(one_thread) -> None:
    module = nn.MultiheadAttention(D, H, kdim=KV, vdim=KV)
    _, (match,), _ = _run(module, False, need_weights=False)
    assert "test_expand.py" in match.anchor.meta["stack_trace"]


@pytest.mark.parametrize("need_weights", [False, True])
def test_the_fused_projection_of_self_attention_is_traced(need_weights: bool) -> None:
    module = nn.MultiheadAttention(D, H)
    names: list[tuple[str, ...]] = []

    def backend(captured, inputs):
        copied, _ = copy_graph(captured)
        expand(copied)
        matches = find(GraphView.of(copied.graph, inputs)).matches
        names.extend(view.names for match in matches for view in match.weights.values())
        return captured.forward

    torch._dynamo.reset()
    x = torch.randn(S, B, D, requires_grad=True)
    torch.compile(lambda x: module(x, x, x, need_weights=need_weights)[0], backend=backend)(x)
    assert [parts[0].rpartition(".")[2] for parts in names] == ["in_proj_weight", "in_proj_weight"]


def test_operands_of_an_einsum_in_a_list_are_seen(one_thread) -> None:
    """Longformer and ProphetNet write ``einsum(equation, (a, b))``."""

    class Listed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))

        def forward(self, x):
            q, k, v = (y(x).unflatten(-1, (2, 4)) for y in (self.q, self.k, self.v))
            p = torch.einsum("bqhd,bkhd->bhqk", (q, k)).softmax(-1)
            return torch.einsum("bhqk,bkhd->bqhd", [p, v])

    torch.manual_seed(0)
    model, x = Listed(), torch.randn(2, 6, 8)
    (status,) = foreshock.sites(model, x)
    assert (status.site.heads, status.site.head_dim) == (2, 4)
    assert set(status.laws.values()) == {""}
    with Watch(every=1, inner="eager", strict=True, detectors=[]) as watch:
        assert torch.equal(torch.compile(model, backend=watch.backend)(x), model(x))
