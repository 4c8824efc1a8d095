"""Attention written out: every spelling is one site, its layouts bring heads to their place, and its numbers are right."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from foreshock import Watch
from foreshock.layout import canonical

B, S, H, G, D, HIDDEN = 2, 6, 4, 2, 8, 32
CAUSAL = torch.ones(S, S).tril().bool()
ADDED = torch.zeros(S, S).masked_fill(~CAUSAL, -math.inf)
BIAS = torch.linspace(-1, 1, H * S * S).view(H, S, S)
SINKS = torch.linspace(-1, 1, H)


class Attention(nn.Module):
    """Separate projections; ``call(q, k, v)`` on ``[B, heads, S, h]``, or ``[B, S, heads, h]`` with ``heads_first=False``."""

    def __init__(self, call: Callable[..., Any], kv_heads: int = H, heads_first: bool = True):
        super().__init__()
        self.q = nn.Linear(HIDDEN, H * D, bias=False)
        self.k, self.v = (nn.Linear(HIDDEN, kv_heads * D, bias=False) for _ in range(2))
        self.call, self.heads_first = call, heads_first

    def parts(self, x: Tensor) -> list[Tensor]:
        parts = [y(x).view(*x.shape[:2], -1, D) for y in (self.q, self.k, self.v)]
        return [y.transpose(1, 2) for y in parts] if self.heads_first else parts

    def forward(self, x: Tensor) -> Any:
        return self.call(*self.parts(x))


def _merged(x: Tensor) -> Tensor:
    return x.reshape(-1, *x.shape[2:])


def bmm(q, k, v):
    return torch.bmm(torch.bmm(_merged(q), _merged(k).transpose(1, 2)).div(D**0.5).softmax(-1), _merged(v))


def baddbmm_scaled_query(q, k, v):
    q, k, v = (_merged(x) for x in (q, k, v))
    return torch.bmm(torch.baddbmm(ADDED, q * D**-0.5, k.transpose(-2, -1)).softmax(-1), v)


def baddbmm_alpha_and_views(q, k, v):
    """Bloom: a bias goes into the product, and views stand between it and the softmax."""
    batch = len(q)
    q, k, v = (_merged(x) for x in (q, k, v))
    bias = BIAS[:, :1].repeat(batch, 1, 1)
    a = bias.baddbmm(batch1=q, batch2=k.transpose(1, 2), beta=1.0, alpha=0.5).view(batch, H, S, S)
    return torch.bmm(functional.softmax(a.float(), dim=-1).to(q.dtype).view(-1, S, S), v)


def grouped(q, k, v):
    q = q.unflatten(1, (G, H // G))
    p = torch.einsum("bgrqd,bgkd->bgrqk", q, k).softmax(-1)
    return torch.einsum("bgrqk,bgkd->bgrqd", p, v)


def grouped_the_other_way(q, k, v):
    q = q.unflatten(1, (G, H // G)).transpose(1, 2)
    p = torch.einsum("brgqd,bgkd->brgqk", q, k).softmax(-1)
    return torch.einsum("brgqk,bgkd->brgqd", p, v)


def repeated(q, k, v):
    k, v = (x[:, :, None].expand(-1, -1, H // G, -1, -1).reshape(len(q), H, S, D) for x in (k, v))
    return (q @ k.mT * 0.3).softmax(-1) @ v


def one_key_head(q, k, v):
    p = torch.einsum("bhqd,bkd->bhqk", q, k[:, 0]).softmax(-1)
    return torch.einsum("bhqk,bkd->bhqd", p, v[:, 0])


def broadcast_key_head(q, k, v):
    return (q @ k.mT).softmax(-1) @ v


def sinks(q, k, v):
    """gpt-oss: one more column, and the row's maximum taken away first."""
    a = torch.cat([q @ k.mT * 0.3, SINKS.reshape(1, -1, 1, 1).expand(len(q), -1, S, -1)], dim=-1)
    a = a - a.max(dim=-1, keepdim=True).values
    return functional.softmax(a, dim=-1, dtype=a.dtype)[..., :-1] @ v


def sinks_in_front(q, k, v):
    a = torch.cat([SINKS.reshape(1, -1, 1, 1).expand(len(q), -1, S, -1), q @ k.mT * 0.3], dim=-1)
    return a.softmax(-1)[..., 1:] @ v


def capped(q, k, v):
    a = torch.tanh(q @ k.transpose(2, 3) * 0.3 / 2.0) * 2.0 + ADDED
    return functional.dropout(functional.softmax(a, -1, dtype=torch.float32).to(q.dtype), 0.0) @ v


def by_hand(q, k, v):
    a = q @ k.mT * 0.3
    e = (a - a.amax(-1, keepdim=True)).exp()
    return (e / e.sum(-1, keepdim=True)) @ v


def by_hand_detached(q, k, v):
    a = (q @ k.mT) / torch.full([], 8.0)
    e = torch.exp(a - a.max(dim=-1, keepdim=True)[0].detach())
    return (e / (e.sum(-1).unsqueeze(-1) + 1e-9)) @ v


def by_logsumexp(q, k, v):
    a = q @ k.mT
    return (a - a.logsumexp(-1, keepdim=True)).exp() @ v


def by_log_softmax(q, k, v):
    return (q @ k.mT).log_softmax(-1).exp() @ v


def divided_afterwards(q, k, v):
    a = q @ k.mT * 0.3
    e = (a - a.amax(-1, keepdim=True)).exp()
    return (e @ v) / e.sum(-1, keepdim=True).clamp(min=1e-9)


def times_the_inverse_afterwards(q, k, v):
    e = torch.exp(q @ k.mT * 0.3)
    return torch.einsum("bhqk,bhkd->bhqd", e, v) * (1 / e.sum(-1))[..., None]


def multiplied_and_summed(q, k, v):
    p = ((q[:, :, :, None] * k[:, :, None]).sum(-1) * 0.3).softmax(-1)
    return (p[..., None] * v[:, :, None]).sum(3)


def linear_as_product(q, k, v):
    """One head of one sequence at a time would be `F.linear(q, k)`."""
    p = functional.linear(q[0, 0], k[0, 0]).softmax(-1)
    return p @ v[0, 0]


def with_output_projection(q, k, v):
    p = torch.einsum("bhqd,bhkd->bhqk", q, k).softmax(-1)
    return torch.einsum("bhqk,bhkd,hdo->bqo", p, v, torch.ones(H, D, 3) / 10)


def einsum_positions_first(q, k, v):
    p = torch.einsum("bqhd,bkhd->bhqk", q, k).mul(0.3).softmax(-1)
    return torch.einsum("bhqk,bkhd->bqhd", p, v)


def softmax_in_the_middle(q, k, v):
    p = torch.einsum("bqhd,bkhd->bqkh", q, k).softmax(2)
    return torch.einsum("bqkh,bkhd->bqhd", p, v)


def keys_on_the_left(q, k, v):
    return (k @ q.mT * 0.3).softmax(-2).mT @ v


def everything_transposed(q, k, v):
    return (v.mT @ (k @ q.mT * 0.3).mT.softmax(-1).mT).mT


def where_and_sqrt(q, k, v):
    a = torch.where(CAUSAL, q @ k.mT / math.sqrt(D), torch.finfo(torch.float32).min)
    return a.softmax(-1) @ v


def masked_in_place(q, k, v):
    a = q @ k.mT
    a.masked_fill_(~CAUSAL, -1e9)
    a += BIAS
    return a.softmax(-1) @ v


def head_mask(q, k, v):
    return ((q @ k.mT).softmax(-1) * torch.linspace(0.5, 1, H).view(1, H, 1, 1)) @ v


def windows(q, k, v):
    a = (q @ k.mT).view(1, -1, H, S, S) + torch.zeros(len(q), S, S)[None, :, None]
    return a.view(-1, H, S, S).softmax(-1) @ v


def returned(q, k, v):
    p = (q @ k.mT).softmax(-1)
    return p @ v, p


def dropped(q, k, v):
    return functional.dropout((q @ k.mT).softmax(-1), 0.5, True) @ v


def times_a_table(q, k, v):
    return (q @ k.mT * torch.linspace(0.5, 1, S)).softmax(-1) @ v


def per_query_temperature(q, k, v):
    return (q @ k.mT * torch.linspace(0.5, 1, S)[:, None]).softmax(-1) @ v


def _logits(q: Tensor, k: Tensor, scale: float = 1.0) -> Tensor:
    return q @ k.repeat_interleave(H // k.shape[1], 1).mT * scale


def _scaled(scale: float) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda q, k: _logits(q, k, scale)


@dataclass
class Form:
    """``logits(q, k)`` is what the softmax has to see, keys alone; ``broken`` the laws that must not be said to hold."""

    call: Callable[..., Any]
    logits: Callable[[Tensor, Tensor], Tensor] = _logits
    layout: str = "b h s d/b h d s/b h s d/b h s d"
    facts: dict[str, Any] = field(default_factory=dict)
    broken: tuple[str, ...] = ()
    kv_heads: int = H
    heads_first: bool = True


_MERGED = "(b h=4) s d/(b h=4) d s/(b h=4) s d/(b h=4) s d"
_PLAIN = "b h s d/b h s d/b h s d/b h s d"
_SHIFT = ("key_shift", "bias")
_OUTPUT = ("hull", "shadow")
_ALL_BUT_EULER = (*_SHIFT, "value_mass")
FORMS = [
    Form(bmm, _scaled(D**-0.5), _MERGED, {"scale": pytest.approx(D**-0.5), "causal": False}),
    Form(
        baddbmm_scaled_query,
        lambda q, k: _logits(q, k, D**-0.5) + ADDED,
        "(b h=4) s d/(b h=4) s d/(b h=4) s d/(b h=4) s d",
        {"masked": True, "causal": None, "scale": pytest.approx(D**-0.5)},
    ),
    Form(baddbmm_alpha_and_views, lambda q, k: _logits(q, k, 0.5) + BIAS[:, :1], _MERGED, {"scale": 0.5}),
    Form(grouped, layout="b h0 h1 s d/b h s d/b h s d/b h0 h1 s d", facts={"kv_heads": G}, kv_heads=G),
    Form(grouped_the_other_way, layout="b h1 h0 s d/b h s d/b h s d/b h1 h0 s d", facts={"kv_heads": G}, kv_heads=G),
    Form(repeated, _scaled(0.3), facts={"kv_heads": G, "scale": 0.3}, kv_heads=G),
    Form(one_key_head, layout="b h s d/b s d/b s d/b h s d", facts={"kv_heads": 1}, kv_heads=1),
    Form(broadcast_key_head, facts={"kv_heads": 1}, kv_heads=1),
    Form(sinks, _scaled(0.3), facts={"sinks": True, "scale": 0.3}, broken=_ALL_BUT_EULER),
    Form(sinks_in_front, _scaled(0.3), facts={"sinks": True, "first_key": 1}, broken=_ALL_BUT_EULER),
    Form(
        capped,
        lambda q, k: 2 * torch.tanh(_logits(q, k, 0.3) / 2) + ADDED,
        facts={"softcap": 2.0, "scale": pytest.approx(0.3), "masked": True},
        broken=_SHIFT,
    ),
    Form(by_hand, _scaled(0.3), facts={"scale": 0.3}),
    Form(by_hand_detached, _scaled(1 / 8), facts={"scale": 1 / 8}),
    Form(by_logsumexp),
    Form(by_log_softmax),
    Form(divided_afterwards, _scaled(0.3), facts={"scale": 0.3}),
    Form(times_the_inverse_afterwards, _scaled(0.3), facts={"scale": 0.3}),
    Form(multiplied_and_summed, _scaled(0.3), "b1 h s b0 d/b1 h b0 s d/b1 h b0 s d/b h s d", {"scale": 0.3}),
    Form(linear_as_product, lambda q, k: _logits(q, k)[:1, :1], "s d/s d/s d/s d", {"heads": 1, "kv_heads": 1}),
    Form(
        with_output_projection, layout="b h s d/b h s d/b h s d/", broken=("key_shift", "value_mass", "bias", *_OUTPUT)
    ),
    Form(einsum_positions_first, _scaled(0.3), "b s h d/b s h d/b s h d/b s h d", heads_first=False),
    Form(softmax_in_the_middle, layout="b s h d/b s h d/b s h d/b s h d", heads_first=False),
    Form(keys_on_the_left, _scaled(0.3), "b h d s/b h s d/b h s d/b h s d"),
    Form(everything_transposed, _scaled(0.3), "b h d s/b h s d/b h d s/b h d s"),
    Form(where_and_sqrt, lambda q, k: _logits(q, k, D**-0.5) + ADDED, facts={"masked": True}),
    Form(masked_in_place, lambda q, k: _logits(q, k) + ADDED + BIAS, facts={"masked": True}),
    Form(head_mask, facts={"shadow": False, "masked": False}, broken=("value_mass", *_OUTPUT)),
    Form(windows, facts={"masked": False}),
    Form(returned, broken=("bias",)),
    Form(dropped, facts={"dropout": 0.5}, broken=("value_mass", *_OUTPUT)),
    Form(times_a_table, lambda q, k: _logits(q, k) * torch.linspace(0.5, 1, S), facts={"scale": None}, broken=_SHIFT),
    Form(
        per_query_temperature,
        lambda q, k: _logits(q, k) * torch.linspace(0.5, 1, S)[:, None],
        facts={"scale": None},
        broken=("bias",),
    ),
]
by_name = pytest.mark.parametrize("form", FORMS, ids=lambda form: form.call.__name__)


def _model(form: Form) -> Attention:
    torch.manual_seed(0)
    return Attention(form.call, form.kv_heads, form.heads_first)


@by_name
def test_every_spelling_is_one_site(capture, form: Form) -> None:
    captured = capture(_model(form), torch.randn(B, S, HIDDEN))
    match = captured.match
    assert captured.reasons == []
    assert match.kind == "attention"
    assert "/".join(match.layout.get(role, "") for role in ("q", "k", "v", "out")) == form.layout
    expected = {"heads": H, "kv_heads": H, "head_dim": D, "value_dim": D, "softcap": None, "sinks": False, "scale": 1.0}
    given = {name: match.facts[name] for name in {**expected, **form.facts}}
    if "scale" in form.facts or form.logits is _logits:
        assert given == {**expected, **form.facts}
    assert {law.removeprefix("law/") for law, reason in match.laws.items() if reason} == set(form.broken)
    assert match.weights["q_weight"].names == ("q.weight",)
    assert match.weights["k_weight"].names == ("k.weight",)
    for role in match.operands:
        assert match.edge(role).source is match.roles[role]


@by_name
def test_layouts_bring_heads_to_their_place(capture, form: Form) -> None:
    """The factors of the weights, head by head, give the tensors that the layouts say they do."""
    model, x = _model(form), torch.randn(B, S, HIDDEN)
    match = capture(model, x).match
    q_view, k_view = match.weights["q_weight"], match.weights["k_weight"]
    env = _values(match, model, x)
    for role, view in (("q", q_view), ("k", k_view)):
        lies = canonical(env[role], match.layout[role])
        for head, own in enumerate(view.head_map):
            torch.testing.assert_close(lies[:, head], (x @ view.factor(own))[: len(lies)])
    expected = form.logits(*(y.detach() for y in _heads_first(model, x)[:2]))
    first = match.facts.get("first_key", 0)
    found = canonical(env["logits"], match.layout["logits"])[..., first : first + S]
    order = [match.weights["q_weight"].index[h].tolist() for h in range(match.facts["heads"])]
    natural = [expected[:, own[0] // D] for own in order]
    hidden = found < -1e8
    torch.testing.assert_close(found.masked_fill(hidden, -math.inf), torch.stack(natural, 1))


def _heads_first(model: Attention, x: Tensor) -> list[Tensor]:
    return [y if model.heads_first else y.transpose(1, 2) for y in model.parts(x)]


def _values(match, model: Attention, x: Tensor) -> dict[str, Tensor]:
    """The real tensors of the roles, from running the captured graph node by node."""
    from torch.fx import Interpreter

    seen: dict[str, Tensor] = {}
    graph = match.anchor.graph
    held = dict(model.named_parameters())

    class Run(Interpreter):
        def run_node(self, n):
            result = super().run_node(n)
            seen.update({role: result.detach().clone() for role, node in match.roles.items() if node is n})
            return result

    names = [node for node in graph.nodes if node.op == "placeholder"]
    by_end = {name.replace(".", "_parameters_"): parameter for name, parameter in held.items()}
    inputs = [next((p for end, p in by_end.items() if end in node.name), None) for node in names]
    tables = {BIAS.shape: BIAS, SINKS.shape: SINKS}
    for i, node in enumerate(names):
        if inputs[i] is None:
            size = node.meta["example_value"].shape
            boolean = node.meta["example_value"].dtype == torch.bool
            inputs[i] = x if size == x.shape else CAUSAL if boolean else tables.get(size, ADDED)
    Run(graph.owning_module).run(*inputs)
    return seen


@by_name
def test_numbers_are_those_of_the_softmax_and_laws_hold(one_thread, form: Form) -> None:
    model, x = _model(form), torch.randn(1, S, HIDDEN)
    q, k = (y.detach() for y in _heads_first(model, x)[:2])
    logits = form.logits(q, k).double()
    whole = logits
    if form.call in (sinks, sinks_in_front):
        whole = torch.cat([logits, SINKS.double().view(1, H, 1, 1).expand(-1, -1, S, -1)], -1)
    p = (logits - whole.logsumexp(-1, keepdim=True)).exp()
    entropy = -torch.special.xlogy(p, p).sum(-1).mean((0, 2))
    with Watch(every=1, inner="eager", strict=True, detectors=[], rows=S) as watch:
        compiled = torch.compile(model, backend=watch.backend)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        out = compiled(x)
        (out[0] if isinstance(out, tuple) else out).square().sum().backward()
        optimizer.step()
        watch.flush()
        got = {name: watch.series(name)[1].reshape(-1) for name in watch.metrics()}
        (status,) = watch.coverage
    order = np.argsort([int(i) // D for i in status.site.q_weight.index[:, 0]])
    np.testing.assert_allclose(got["attention/entropy"][order], entropy, rtol=1e-5)
    np.testing.assert_allclose(got["attention/logit_max"][order], logits.amax((0, 2, 3)), rtol=1e-5)
    altered = form.call in (head_mask, dropped, with_output_projection)
    assert ("attention/shadow_rms" in got) == (not altered)
    if not altered:
        assert (got["attention/shadow_rms"] < 1e-6).all()
    for law, reason in status.laws.items():
        if law != "law/bias" and not reason:
            assert (got[law] < 1e-5).all(), law


@pytest.mark.parametrize("call", [sinks, capped, dropped, head_mask, times_a_table])
def test_laws_that_are_said_to_be_broken_are(call: Callable[..., Any]) -> None:
    q, k, v = (torch.randn(1, H, S, D, requires_grad=True) for _ in range(3))
    out = call(q, k, v)
    given = torch.randn_like(out)
    dk, dv = torch.autograd.grad(out, (k, v), given)
    residuals = {"key_shift": dk.sum(2).norm() / dk.norm(), "value_mass": (dv.sum(2) - given.sum(2)).norm() / dv.norm()}
    (broken,) = [form.broken for form in FORMS if form.call is call]
    assert {law for law, residual in residuals.items() if residual > 1e-2} == set(broken) - {"bias", *_OUTPUT}
