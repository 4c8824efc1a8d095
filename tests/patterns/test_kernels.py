"""Opaque attention kernels: known by name, by a schema that says q, k, v, or by a description."""

from __future__ import annotations

import math

import pytest
import torch
from projected import Attention, B, D, H, S
from projected import x as _x
from torch.nn import functional

from foreshock import Watch
from foreshock.errors import PatternError
from foreshock.patterns import attention_op
from foreshock.patterns.ops import op

sdpa = functional.scaled_dot_product_attention


torch.library.define(
    "foreshock_tests::flash", "(Tensor q, Tensor k, Tensor v, bool causal=False, float? softmax_scale=None) -> Tensor"
)
torch.library.define(
    "foreshock_tests::flash_lse", "(Tensor query, Tensor key, Tensor value, *, float scale=1.0) -> (Tensor, Tensor)"
)
torch.library.define("foreshock_tests::flash_drop", "(Tensor q, Tensor k, Tensor v, float dropout_p=0.0) -> Tensor")
torch.library.define(
    "foreshock_tests::flash_more", "(Tensor q, Tensor k, Tensor v, Tensor? extra=None, bool causal=False) -> Tensor"
)
torch.library.define("foreshock_tests::three", "(Tensor a, Tensor b, Tensor c) -> Tensor")


@torch.library.impl("foreshock_tests::flash", "CompositeImplicitAutograd")
def _flash(q, k, v, causal=False, softmax_scale=None):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return sdpa(q, k, v, is_causal=causal, scale=softmax_scale).transpose(1, 2)


@torch.library.impl("foreshock_tests::flash_lse", "CompositeImplicitAutograd")
def _flash_lse(query, key, value, *, scale=1.0):
    return sdpa(query, key, value, scale=scale), (query @ key.mT * scale).logsumexp(-1)


@torch.library.impl("foreshock_tests::flash_drop", "CompositeImplicitAutograd")
def _flash_drop(q, k, v, dropout_p=0.0):
    return sdpa(q, k, v, dropout_p=dropout_p)


@torch.library.impl("foreshock_tests::flash_more", "CompositeImplicitAutograd")
def _flash_more(q, k, v, extra=None, causal=False):
    return sdpa(q, k, v, is_causal=causal)


@torch.library.impl("foreshock_tests::three", "CompositeImplicitAutograd")
def _three(a, b, c):
    return sdpa(a, b, c)


kernels = torch.ops.foreshock_tests


def test_a_schema_with_q_k_v_is_enough_positions_first(capture) -> None:
    match = capture(Attention(lambda q, k, v: kernels.flash(q, k, v, True), layout="BSHD"), _x()).match
    assert (match.pattern, match.layout["k"]) == ("foreshock_tests::flash", "b s h d")
    assert match.facts.items() >= {"heads": H, "kv_heads": H, "causal": True, "scale": D**-0.5}.items()
    assert match.weights["q_weight"].names == ("q.weight",)
    assert any("schema" in note for note in match.notes)


def test_a_schema_with_query_key_value_is_enough_heads_first(capture) -> None:
    match = capture(Attention(lambda q, k, v: kernels.flash_lse(q, k, v, scale=0.5)[0]), _x()).match
    assert (match.pattern, match.layout["q"]) == ("foreshock_tests::flash_lse", "b h s d")
    assert match.facts["scale"] == 0.5
    assert match.facts["causal"] is None
    assert op(match.roles["out"]) == "getitem"


def test_arguments_left_out_take_the_default_of_the_schema(capture) -> None:
    assert capture(Attention(lambda q, k, v: kernels.flash_lse(q, k, v)[0]), _x()).match.facts["scale"] == 1.0
    assert capture(Attention(kernels.flash, layout="BSHD"), _x()).match.facts["causal"] is False


def test_dropout_of_a_kernel_is_seen_in_its_schema(capture) -> None:
    match = capture(Attention(lambda q, k, v: kernels.flash_drop(q, k, v, 0.5)), _x()).match
    assert match.facts["dropout"] == 0.5
    assert "dropout" in match.laws["law/value_mass"]
    assert capture(Attention(kernels.flash_drop), _x()).match.laws["law/value_mass"] == ""


def test_a_tensor_of_unknown_meaning_keeps_laws_and_recomputed_rows_out(capture) -> None:
    def call(q, k, v):
        return kernels.flash_more(q, k, v, torch.zeros(H), True)

    match = capture(Attention(call), _x()).match
    assert match.facts["causal"] is None
    assert match.facts["recompute"] is False
    assert all("extra" in reason for reason in match.laws.values())
    known = capture(Attention(lambda q, k, v: kernels.flash_more(q, k, v, None, True)), _x()).match
    assert known.facts["causal"] is True
    assert set(known.laws.values()) == {""}


def test_an_op_nobody_described_is_left_alone_until_someone_does(capture) -> None:
    model = Attention(lambda q, k, v: kernels.three(k, q, v))
    assert capture(model, _x()).findings.matches == ()
    described = attention_op("foreshock_tests::three", q="b", k=0, v="c", layout="BHSD", causal=False, scale=0.125)
    match = capture(model, _x(), extra=(described,)).match
    assert match.pattern == "foreshock_tests::three"
    assert match.facts.items() >= {"causal": False, "scale": 0.125}.items()
    assert match.weights["q_weight"].names == ("q.weight",)
    assert match.weights["k_weight"].names == ("k.weight",)
    assert match.operands == {"q": 1, "k": 0, "v": 2}


def test_a_description_reads_its_arguments_by_place_or_name(capture) -> None:
    described = attention_op("foreshock_tests::flash", layout="BSHD", causal="causal", scale=4)
    by_name = Attention(lambda q, k, v: kernels.flash(q, v=v, k=k, causal=True, softmax_scale=0.5), layout="BSHD")
    match = capture(by_name, _x(), extra=(described,)).match
    assert match.facts.items() >= {"causal": True, "scale": 0.5}.items()
    assert match.operands == {"q": 0, "k": "k", "v": "v"}
    by_place = Attention(lambda q, k, v: kernels.flash(q, k, v, True, 0.5), layout="BSHD")
    match = capture(by_place, _x(), extra=(described,)).match
    assert match.facts.items() >= {"causal": True, "scale": 0.5}.items()


def test_a_bad_description_says_what_to_give() -> None:
    with pytest.raises(PatternError, match="namespace::name"):
        attention_op("flash")
    with pytest.raises(PatternError, match="BHSD"):
        attention_op("a::b", layout="SBHD")


@pytest.mark.parametrize("layout", ["b s h d", "b s h0 h1 d"])
def test_a_description_takes_any_layout(capture, layout: str) -> None:
    described = attention_op("foreshock_tests::three", layout=layout, causal=False)

    def call(q, k, v):
        if layout == "b s h d":
            return kernels.three(q, k, v)
        return kernels.three(*(x.unflatten(2, (2, 2)) for x in (q, k, v)))

    match = capture(Attention(call, layout="BSHD"), _x(), extra=(described,)).match
    assert match.layout == dict.fromkeys(("q", "k", "v", "out"), layout)
    assert (match.facts["heads"], match.weights["k_weight"].heads) == (H, H)


def test_tensors_that_do_not_fit_the_layout_are_a_miss(capture) -> None:
    captured = capture(Attention(lambda q, k, v: kernels.flash(q, k, v), layout="packed"), _x())
    assert captured.findings.matches == ()
    assert "attention_op(layout=...)" in captured.reasons[0]


# -- public kernels ------------------------------------------------------------------------------------------------------

FLASH = (
    "(Tensor q, Tensor k, Tensor v, float dropout_p, float softmax_scale, bool causal, SymInt window_size_left,"
    " SymInt window_size_right, float softcap, Tensor? alibi_slopes, bool return_softmax) -> (Tensor, Tensor, Tensor, Tensor)"
)
VARLEN = (
    "(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k,"
    " float dropout_p, float softmax_scale, bool causal, SymInt window_size_left=-1, SymInt window_size_right=-1,"
    " float softcap=0.0, Tensor? alibi_slopes=None, bool return_softmax=False, Tensor? block_table=None,"
    " Tensor? leftpad_k=None, Tensor? seqused_k=None, bool zero_tensors=False) -> (Tensor, Tensor, Tensor, Tensor)"
)
EFFICIENT = (
    "(Tensor query, Tensor key, Tensor value, Tensor? attn_bias, Tensor? seqstart_q, Tensor? seqstart_k,"
    " SymInt? max_seqlen_q, float dropout_p, bool compute_logsumexp, int custom_mask_type, float? scale,"
    " Tensor? seqlen_k, int? window_size) -> (Tensor, Tensor, Tensor, Tensor)"
)
SINKS = (
    "(Tensor q, Tensor k, Tensor v, Tensor? k_new=None, Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None,"
    " float? softmax_scale=None, bool causal=False, int window_size_left=-1, int window_size_right=-1, float softcap=0.0,"
    " Tensor? s_aux=None) -> (Tensor, Tensor)"
)


def _plain(q, k, v, scale, causal, window=-1, softcap=0.0):
    """``[B, S, heads, h]`` in plain ops; also what a cap and a window of keys to the left do."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    a = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    a = softcap * torch.tanh(a / softcap) if softcap else a
    i, j = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])
    hidden = (j > i) & causal | ((i - j > window) if window >= 0 else torch.zeros(1).bool())
    return (a.masked_fill(hidden, -math.inf).softmax(-1) @ v).transpose(1, 2)


def _flash_attn(q, k, v, p, scale, causal, left, right, softcap, alibi, soft):
    out = _plain(q, k, v, scale, causal, left, softcap)
    return out, out[..., 0].clone(), out.new_empty(0), out.new_empty(0)


def _flash_varlen(q, k, v, cu_q, cu_k, max_q, max_k, p, scale, causal, *rest):
    length = q.shape[0] // (cu_q.shape[0] - 1)
    out = _plain(*(x.unflatten(0, (-1, length)) for x in (q, k, v)), scale, causal).flatten(0, 1)
    return out, out[..., 0].clone(), out.new_empty(0), out.new_empty(0)


def _efficient(q, k, v, bias, start_q, start_k, longest, p, lse, mask_type, scale, seqlen, window):
    grouped = q.ndim == 5
    out = _plain(*(x.flatten(2, 3) if grouped else x for x in (q, k, v)), scale, mask_type > 0)
    out = out.unflatten(2, q.shape[2:4]) if grouped else out
    return out, out[..., 0].clone(), out.new_empty(0), out.new_empty(0)


def _flash_3(
    q, k, v, k_new=None, cu_q=None, cu_k=None, scale=None, causal=False, left=-1, right=-1, softcap=0.0, s_aux=None
):
    out = _plain(q, k, v, scale, causal, left, softcap)
    return out, out[..., 0].clone()


LIBRARIES = {
    "flash_attn::_flash_attn_forward": (FLASH, _flash_attn),
    "flash_attn::_flash_attn_varlen_forward": (VARLEN, _flash_varlen),
    "xformers::efficient_attention_forward_cutlass": (EFFICIENT, _efficient),
    "flash_attn_3::_flash_attn_forward": (SINKS, _flash_3),
}
for name, (declared, body) in LIBRARIES.items():
    space, _, short = name.partition("::")
    if not hasattr(getattr(torch.ops, space), short):
        torch.library.define(name, declared)
        torch.library.impl(name, "CompositeImplicitAutograd")(body)


def _flash_call(window: int = -1, softcap: float = 0.0, causal: bool = True, alibi: bool = False):
    def call(q, k, v):
        slopes = torch.zeros(H) if alibi else None
        return torch.ops.flash_attn._flash_attn_forward(q, k, v, 0.0, 0.3, causal, window, -1, softcap, slopes, False)[
            0
        ]

    return call


def _varlen_call(q, k, v):
    starts = torch.arange(B + 1, dtype=torch.int32) * S
    return torch.ops.flash_attn._flash_attn_varlen_forward(q, k, v, starts, starts, S, S, 0.0, 0.3, True)[0]


def _efficient_call(mask_type: int, grouped: bool = False):
    def call(q, k, v):
        q, k, v = (x.unflatten(2, (2, 2)) if grouped else x for x in (q, k, v))
        forward = torch.ops.xformers.efficient_attention_forward_cutlass
        return forward(q, k, v, None, None, None, None, 0.0, True, mask_type, 0.3, None, None)[0]

    return call


def _sink_call(q, k, v):
    return torch.ops.flash_attn_3._flash_attn_forward(q, k, v, softmax_scale=0.3, causal=True, s_aux=torch.zeros(H))[0]


_LOST = ("key_shift", "bias")
PUBLIC = {
    "flash": (_flash_call(), "BSHD", "b s h d", {"causal": True}, ()),
    "flash, all keys": (_flash_call(causal=False), "BSHD", "b s h d", {"causal": False}, ()),
    "flash, window": (_flash_call(2), "BSHD", "b s h d", {"causal": True, "masked": True, "recompute": False}, ("value_mass",)),
    "flash, cap": (_flash_call(softcap=5.0), "BSHD", "b s h d", {"softcap": 5.0, "recompute": False}, _LOST),
    "flash, slopes": (_flash_call(alibi=True), "BSHD", "b s h d", {"masked": True, "recompute": False}, ("value_mass",)),
    "packed": (_varlen_call, "packed", "s h d", {"causal": True, "recompute": False}, ("hull",)),
    "efficient": (_efficient_call(0), "BSHD", "b s h d", {"causal": False}, ()),
    "efficient, causal": (_efficient_call(1), "BSHD", "b s h d", {"causal": True}, ()),
    "efficient, groups": (_efficient_call(1, True), "BSHD", "b s h0 h1 d", {"causal": True}, ()),
    "sinks": (_sink_call, "BSHD", "b s h d", {"sinks": True, "recompute": False}, (*_LOST, "value_mass")),
    "aten": (
        lambda q, k, v: torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True, scale=0.3)[0],
        "BHSD", "b h s d", {"causal": True}, (),
    ),
}  # fmt: skip
by_kernel = pytest.mark.parametrize("kernel", PUBLIC)


@by_kernel
def test_public_kernels_need_no_description(capture, kernel: str) -> None:
    call, layout, lies, facts, broken = PUBLIC[kernel]
    match = capture(Attention(call, layout=layout), _x()).match
    assert match.layout == dict.fromkeys(("q", "k", "v", "out"), lies)
    assert (
        match.facts.items() >= {"heads": H, "kv_heads": H, "head_dim": D, "scale": 0.3, "dropout": 0.0, **facts}.items()
    )
    assert match.facts.get("recompute", True) == facts.get("recompute", True)
    lost = {*broken, "shadow"} if facts.get("recompute") is False else set(broken)
    assert {law.removeprefix("law/") for law, reason in match.laws.items() if reason} == lost
    assert match.weights["q_weight"].names == ("q.weight",)
    assert match.weights["k_weight"].heads == H
    assert op(match.roles["out"]) == "getitem"


@by_kernel
def test_laws_of_public_kernels_hold_where_they_are_said_to(one_thread, kernel: str) -> None:
    call, layout, _, facts, broken = PUBLIC[kernel]
    torch.manual_seed(0)
    model = Attention(call, layout=layout)
    with Watch(every=1, inner="eager", strict=True, detectors=[]) as watch:
        compiled = torch.compile(model, backend=watch.backend)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        compiled(_x()).square().sum().backward()
        optimizer.step()
        watch.flush()
        for law in {"key_shift", "value_mass", "euler", "hull"} - set(broken):
            assert (watch.series(f"law/{law}")[1] < 1e-5).all(), law
        assert ("attention/shadow_rms" in watch.metrics()) == facts.get("recompute", True)
        if facts.get("recompute", True):
            assert (watch.series("attention/shadow_rms")[1] < 1e-5).all()
