"""A graph rewritten: what is inserted, that nothing else changes, and what a failing probe takes with it."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import nn
from torch.nn import functional

from foreshock import _torch
from foreshock.monitors.attention_probe import ATTENTION
from foreshock.monitors.router_probe import ROUTER
from foreshock.passes import Plan, SitePlan, copy_graph, instrument
from foreshock.patterns import GraphView, find
from foreshock.records import Probe

HIDDEN, H, E = 16, 2, 4


class Block(nn.Module):
    """Attention, then a mixture of experts; ``layers`` of it."""

    def __init__(self, layers: int = 1, router: bool = True) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(HIDDEN, 3 * HIDDEN) for _ in range(layers))
        self.gate = nn.Linear(HIDDEN, E) if router else None
        self.experts = nn.Parameter(torch.randn(E, HIDDEN, HIDDEN) * 0.2)

    def forward(self, x):
        for qkv in self.layers:
            q, k, v = (y.unflatten(-1, (H, -1)).transpose(1, 2) for y in qkv(x).chunk(3, -1))
            x = x + functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        if self.gate is not None:
            weights, chosen = self.gate(x).softmax(-1).topk(2)
            combine = torch.zeros(*x.shape[:2], E).scatter(-1, chosen, weights)
            x = x + torch.einsum("bse,bsd,edf->bsf", combine, x, self.experts)
        return x


SMALL = Probe(
    name="small",
    kind="attention",
    forward=lambda facts, t, rows: {"sum": t["q"].sum(), "max": t["out"].amax((0, 2, 3))},
    finish=lambda facts, q: {},
    backward=lambda facts, t, g: {"dk": g["k"].sum()},
    maxima=frozenset({"max"}),
)
SMALL_ROUTER = Probe(
    name="small router",
    kind="router",
    forward=lambda facts, t, rows: {"first": t["logits"].sum() + rows[0]},
    finish=lambda facts, q: {},
    backward=lambda facts, t, g: {"grad": g["logits"].square().sum()},
)


def _plan(captured, probes, strict: bool = False, rows: int = 4) -> Plan:
    copied, _ = copy_graph(captured.module)
    view = GraphView.of(copied.graph, captured.inputs)
    matches = find(view).matches
    fakes = [node.meta.get("example_value") for node in copied.graph.nodes if node.op == "placeholder"]
    sites = [
        SitePlan(i, f"site {i}", match, (probes[match.kind],), {**match.facts, "layout": match.layout, "rows": rows})
        for i, match in enumerate(matches)
        if match.kind in probes
    ]
    return Plan(copied, view, sites, _torch.fake_mode_of(fakes), torch.device("cpu"), rows, strict)


def _x() -> torch.Tensor:
    return torch.randn(2, 6, HIDDEN, generator=torch.Generator().manual_seed(0))


def _passes(plan: Plan) -> Counter[tuple[str, str]]:
    marks = [node.meta["foreshock"] for node in plan.module.graph.nodes if "foreshock" in node.meta]
    return Counter((mark["pass"], mark["site"]) for mark in marks)


def test_nodes_inserted_by_each_pass(capture) -> None:
    plan = _plan(capture(Block(), _x()), {"attention": SMALL, "router": SMALL_ROUTER})
    before = len(plan.module.graph.nodes)
    done = instrument(plan)
    assert _passes(plan) == {
        ("pipeline", ""): 2,  # rows, slot
        ("insert_reads", "site 0"): 1,
        ("insert_reads", "site 1"): 1,
        ("insert_taps", "site 0"): 1 + 5 + 1,  # enter; its results; leave
        ("insert_taps", "site 1"): 1 + 1,
        ("insert_taps", ""): 1 + 2,  # one split; a piece a site
        ("pack", ""): 1,
    }
    assert len(plan.module.graph.nodes) == before + sum(_passes(plan).values())
    assert [(q.site, q.name, q.size, q.merge) for q in done.forward] == [
        (0, "sum", 1, "sum"), (0, "max", H, "max"), (1, "first", 1, "sum"),
    ]  # fmt: skip
    assert [(q.site, q.name, q.size) for q in done.backward] == [(0, "dk", 1), (1, "grad", 1)]
    assert (done.rows, done.slot_size, plan.failures) == (4, 2, [])


def test_counts_grow_by_the_same_for_each_layer(capture) -> None:
    counts = []
    for layers in (1, 2, 3):
        plan = _plan(capture(Block(layers, router=False), _x()), {"attention": ATTENTION})
        instrument(plan)
        counts.append(sum(_passes(plan).values()))
    assert counts[2] - counts[1] == counts[1] - counts[0] > 0


def test_original_nodes_keep_their_order_and_their_meaning(capture) -> None:
    captured = capture(Block(2), _x())
    handed_out = str(captured.module.graph)
    plan = _plan(captured, {"attention": ATTENTION, "router": ROUTER})
    before = [(node, node.op, node.target) for node in plan.module.graph.nodes]
    instrument(plan)
    after = [(node, node.op, node.target) for node in plan.module.graph.nodes if "foreshock" not in node.meta]
    assert after == before
    assert str(captured.module.graph) == handed_out


def test_every_inserted_node_names_its_pass_and_site(capture) -> None:
    plan = _plan(capture(Block(), _x()), {"attention": ATTENTION, "router": ROUTER})
    original = set(plan.module.graph.nodes)
    instrument(plan)
    inserted = [node for node in plan.module.graph.nodes if node not in original]
    assert inserted
    for node in inserted:
        mark = node.meta["foreshock"]
        assert mark["pass"] in ("pipeline", "insert_reads", "insert_taps", "pack")
        assert mark["site"] in ("", "site 0", "site 1")


def test_the_kernel_reads_through_taps_and_probes_read_the_raw_tensors(capture) -> None:
    plan = _plan(capture(Block(router=False), _x()), {"attention": ATTENTION})
    (site,) = plan.sites
    roles = dict(site.match.roles)
    instrument(plan)
    for role in site.match.operands:
        view = site.match.edge(role).source
        assert view.meta["foreshock"]["pass"] == "insert_taps"
        assert view is not roles[role]
    readers = [user.meta.get("foreshock", {}).get("pass") for user in roles["out"].users]
    assert set(readers) == {"insert_reads", "insert_taps"}


def test_a_site_without_gradient_gets_no_tap(capture) -> None:
    model = Block(router=False).requires_grad_(False)
    plan = _plan(capture(model, _x()), {"attention": SMALL})
    done = instrument(plan)
    assert done.backward == ()
    assert done.slot_size == 0
    assert not any(pass_ == "insert_taps" and site for pass_, site in _passes(plan))


def test_nothing_to_insert_is_nothing_done(capture) -> None:
    assert instrument(_plan(capture(Block(), _x()), {})) is None


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_loss_and_gradients_are_bitwise_those_of_the_plain_graph(one_thread, capture, backend: str) -> None:
    model, x = Block(2), _x()
    results = []
    for probed in (False, True):
        packed_and_slot = []

        def compiler(module, inputs, probed=probed, packed_and_slot=packed_and_slot):
            inner = _torch.lookup_backend(backend)
            if not probed:
                return inner(module, inputs)
            copied = type("Captured", (), {"module": module, "inputs": inputs})
            done = instrument(_plan(copied, {"attention": ATTENTION, "router": ROUTER}, strict=True))
            run = inner(done.module, [*inputs, *_torch.to_fake(_torch.current_context(), done.examples)])

            def call(*args):
                slot = torch.zeros(done.slot_size, requires_grad=True)
                *outputs, packed = run(*args, torch.rand(2 * done.rows), slot)
                packed_and_slot[:] = [packed, slot]
                return tuple(outputs)

            return call

        torch._dynamo.reset()
        model.zero_grad()
        leaf = x.clone().requires_grad_()
        torch.manual_seed(1)
        loss = torch.compile(model, backend=compiler, fullgraph=True)(leaf).square().mean()
        loss.backward()
        results.append([loss.detach(), leaf.grad, *(p.grad.clone() for p in model.parameters())])
        if probed:
            packed, slot = packed_and_slot
            assert not packed.requires_grad
            assert torch.isfinite(packed).all()
            assert torch.isfinite(slot.grad).all()
            assert slot.grad.abs().sum() > 0
    for plain, watched in zip(*results, strict=True):
        assert torch.equal(plain, watched)


def _failing(where: str) -> Probe:
    def fail(*args):
        raise ValueError(f"{where} fails")

    functions = {"forward": SMALL.forward, "backward": SMALL.backward, where: fail}
    return Probe("failing", "attention", functions["forward"], SMALL.finish, functions["backward"], SMALL.maxima)


def test_a_failing_forward_probe_leaves_the_other_sites(capture) -> None:
    plan = _plan(capture(Block(), _x()), {"attention": _failing("forward"), "router": SMALL_ROUTER})
    done = instrument(plan)
    ((what, error),) = plan.failures
    assert what == "probe `failing` at site 0"
    assert str(error) == "forward fails"
    assert {q.site for q in done.forward} == {1}
    assert _passes(plan)["insert_reads", "site 0"] == 0


def test_a_failing_gradient_probe_leaves_the_forward_probe(capture) -> None:
    plan = _plan(capture(Block(), _x()), {"attention": _failing("backward"), "router": SMALL_ROUTER})
    done = instrument(plan)
    ((what, error),) = plan.failures
    assert what == "gradient statistics of probe `failing` at site 0"
    assert str(error) == "backward fails"
    assert {q.site for q in done.forward} == {0, 1}
    assert {q.site for q in done.backward} == {1}
    assert _passes(plan)["insert_taps", "site 0"] == 0


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_strict_raises_what_failed(capture, where: str) -> None:
    plan = _plan(capture(Block(), _x()), {"attention": _failing(where)}, strict=True)
    with pytest.raises(ValueError, match=f"{where} fails"):
        instrument(plan)


def test_a_probe_that_fails_half_way_leaves_no_node(capture) -> None:
    def half(facts, tensors, rows):
        tensors["q"].square().sum()
        raise ValueError("half way")

    probe = Probe("half", "attention", half, SMALL.finish)
    plan = _plan(capture(Block(), _x()), {"attention": probe, "router": SMALL_ROUTER})
    done = instrument(plan)
    assert len(plan.failures) == 1
    assert _passes(plan)["insert_reads", "site 0"] == 0
    done.module.graph.lint()


def test_a_copied_graph_is_the_same_and_apart(capture) -> None:
    captured = capture(Block(), _x())
    copied, mapping = copy_graph(captured.module)
    assert str(copied.graph) == str(captured.module.graph)
    assert len(mapping) == len(captured.module.graph.nodes)
    for old, new in mapping.items():
        assert old is not new
        assert new.meta.get("example_value") is old.meta.get("example_value")
        assert getattr(new, "_dynamo_source", None) is getattr(old, "_dynamo_source", None)
    with copied.graph.inserting_after(next(iter(copied.graph.nodes))):
        copied.graph.placeholder("another")
    assert len(captured.module.graph.nodes) == len(mapping)
