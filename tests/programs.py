"""Random small models in the words that patterns know: a row of steps, each with options that hypothesis draws."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

WIDTH, HEADS, EXPERTS, LENGTH = 8, 2, 4, 5


class Step(nn.Module):
    """``forward(x, before)``: from ``x [batch, length, width]`` and an earlier value of that shape to the next one."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options
        for name, value in options.items():
            setattr(self, name, value)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


def weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape) / shape[-1] ** 0.5)


def project(spelling: str, x: Tensor, w: Tensor) -> Tensor:
    """``x @ w.T`` in one of its spellings; ``w [out, in]``."""
    match spelling:
        case "linear":
            return functional.linear(x, w)
        case "matmul":
            return x @ w.T
        case "einsum":
            return torch.einsum("bsi,oi->bso", x, w)
        case _:
            return torch.mm(x.reshape(-1, x.shape[-1]), w.t()).view(*x.shape[:-1], -1)


SPELLINGS = st.sampled_from(["linear", "matmul", "einsum", "mm"])


class Linear(Step):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.w = weight(WIDTH, WIDTH)

    def forward(self, x: Tensor, before: Tensor) -> Tensor:
        return project(self.spelling, x, self.w)


class Elementwise(Step):
    def forward(self, x: Tensor, before: Tensor) -> Tensor:
        match self.op:
            case "gelu":
                return functional.gelu(x)
            case "dropout":
                return functional.dropout(x, 0.3, training=False)
            case "norm":
                return functional.layer_norm(x, (WIDTH,))
            case "rms":
                return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
            case "residual":
                return x + before
            case "frozen":
                return x.detach() + before
            case "views":
                return x.transpose(1, 2).reshape(-1, WIDTH * x.shape[1]).unflatten(1, (WIDTH, -1)).mT
            case "gather":
                return x.gather(1, (x.argmax(-1, keepdim=True) % x.shape[1]).expand_as(x))
            case "scatter":
                at = (x.argmax(-1, keepdim=True) % x.shape[1]).expand_as(x)
                return torch.zeros_like(x).scatter_add(1, at, x)
            case "softmax":
                return x.softmax(-1)
            case "in place":
                return (x * 1.5).add_(before).relu_()
            case _:
                x = x.clone()
                x[:, 0] = before[:, 0]
                return x


ELEMENTWISE = [
    "gelu",
    "dropout",
    "norm",
    "rms",
    "residual",
    "frozen",
    "views",
    "gather",
    "scatter",
    "softmax",
    "in place",
    "index",
]


class Attention(Step):
    """PyTorch's call or written out; ``mask``, ``extra`` use of a tensor at the boundary, ``frozen`` weights, ``then`` in place."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.fused = options["split"] == "fused"
        shapes = [(3 * WIDTH, WIDTH)] if self.fused else [(WIDTH, WIDTH)] * 3
        self.w = nn.ParameterList(weight(*shape) for shape in shapes)
        if options["frozen"]:
            for one in list(self.w)[:2]:
                one.requires_grad_(False)

    def forward(self, x: Tensor, before: Tensor) -> Tensor:
        apart = [project(self.spelling, x, w) for w in self.w]
        rows = apart[0].chunk(3, -1) if self.fused else apart
        if self.heads_by == "view":
            q, k, v = (y.view(*y.shape[:2], HEADS, -1).transpose(1, 2) for y in rows)
        else:
            q, k, v = (y.unflatten(-1, (HEADS, -1)).permute(0, 2, 1, 3) for y in rows)
        if self.norm:
            q = functional.rms_norm(q, (WIDTH // HEADS,))
        allowed = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
        if self.form == "sdpa":
            given = {"causal": {"is_causal": True}, "none": {}, "bool": {"attn_mask": allowed}}
            bias = torch.zeros(allowed.shape).masked_fill(~allowed, float("-inf"))
            out = functional.scaled_dot_product_attention(q, k, v, **given.get(self.mask, {"attn_mask": bias}))
        else:
            logits = (
                q @ k.transpose(-2, -1) / 2.0 if self.form == "written" else torch.einsum("bhid,bhjd->bhij", q * 0.5, k)
            )
            if self.mask == "bool":
                logits = logits.masked_fill(~allowed, float("-inf"))
            elif self.mask == "float":
                logits = logits + torch.zeros(allowed.shape).masked_fill(~allowed, -1e4)
            elif self.mask == "causal":
                logits = torch.where(allowed, logits, torch.finfo(logits.dtype).min)
            weights = functional.softmax(logits, dim=-1, dtype=torch.float32)
            if self.extra == "probabilities":
                before = before + weights.mean()
            out = weights @ v
        if self.extra in ("q", "out"):
            before = before + (q if self.extra == "q" else out).square().mean()
        if self.then == "in place":
            out = out.mul_(0.5)
        out = out.transpose(1, 2).flatten(2)
        return out + before if self.extra != "none" else out


class Router(Step):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.gate, self.experts = weight(EXPERTS, WIDTH), weight(EXPERTS, WIDTH, WIDTH)

    def forward(self, x: Tensor, before: Tensor) -> Tensor:
        logits = project(self.spelling, x, self.gate)
        if self.scoring == "topk first":
            chosen_logits, chosen = logits.topk(self.k, dim=-1)
            weights = chosen_logits.softmax(-1)
        else:
            scores = logits.sigmoid() if self.scoring == "sigmoid" else logits.softmax(-1)
            weights, chosen = scores.topk(self.k, dim=-1)
        if self.normalized:
            weights = weights / weights.sum(-1, keepdim=True)
        if self.dispatch == "scatter":
            spread = torch.zeros_like(logits).scatter(-1, chosen, weights)
        elif self.dispatch == "scatter in place":
            spread = torch.zeros_like(logits)
            spread.scatter_(-1, chosen, weights)
        else:
            spread = (functional.one_hot(chosen, EXPERTS).to(weights.dtype) * weights[..., None]).sum(-2)
        out = torch.einsum("bse,bsd,edf->bsf", spread, x, self.experts)
        return out + logits.square().mean() if self.extra else out


class Checkpointed(Step):
    def __init__(self, inner: Step) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, before: Tensor) -> Tensor:
        out: Tensor = checkpoint(self.inner, x, before, use_reentrant=False)
        return out


class Program(nn.Module):
    """The steps in a row; ``uses`` says which earlier value each gets beside the last one."""

    def __init__(self, steps: list[Step], uses: list[int]) -> None:
        super().__init__()
        self.steps, self.uses = nn.ModuleList(steps), uses

    def forward(self, x: Tensor) -> Tensor:
        values = [x]
        for step, back in zip(self.steps, self.uses, strict=True):
            values.append(step(values[-1], values[max(0, len(values) - 1 - back)]))
        return values[-1]


def flag() -> st.SearchStrategy[bool]:
    return st.booleans()


LINEAR = st.builds(Linear, spelling=SPELLINGS)
PLAIN = st.builds(Elementwise, op=st.sampled_from(ELEMENTWISE))
ATTENTION = st.builds(
    Attention,
    form=st.sampled_from(["sdpa", "written", "einsum"]),
    mask=st.sampled_from(["none", "causal", "bool", "float"]),
    split=st.sampled_from(["fused", "apart"]),
    spelling=SPELLINGS,
    heads_by=st.sampled_from(["view", "unflatten"]),
    norm=flag(),
    extra=st.sampled_from(["none", "q", "out", "probabilities"]),
    frozen=flag(),
    then=st.sampled_from(["nothing", "nothing", "in place"]),
)
ROUTER = st.builds(
    Router,
    scoring=st.sampled_from(["softmax", "sigmoid", "topk first"]),
    k=st.integers(1, EXPERTS),
    normalized=flag(),
    dispatch=st.sampled_from(["scatter", "scatter in place", "one hot"]),
    spelling=SPELLINGS,
    extra=flag(),
)
ONE = st.one_of(ATTENTION, ROUTER, LINEAR, PLAIN)
STEP = st.one_of(ATTENTION, ROUTER, LINEAR, PLAIN, st.builds(Checkpointed, ONE))


@st.composite
def programs(draw: st.DrawFn) -> Program:
    torch.manual_seed(draw(st.integers(0, 99)))
    steps = draw(st.lists(STEP, min_size=1, max_size=4))
    return Program(steps, [draw(st.integers(0, 2)) for _ in steps])
