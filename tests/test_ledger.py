"""What the ledger says of code that Dynamo did not capture, and of sites that never trained."""

from __future__ import annotations

import inspect
import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo import utils
from torch.nn.functional import scaled_dot_product_attention

from foreshock import Coverage, Site, SiteStatus, Watch, WeightView, _torch
from foreshock.monitors.ledger import beside, summary, table
from foreshock.watch import NEVER_TRAINED


class Attention(nn.Module):
    def __init__(self, after: Callable[[torch.Tensor], torch.Tensor] | None = None) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))
        self.after = after

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (f(x).view(2, 6, 2, 4).transpose(1, 2) for f in (self.q, self.k, self.v))
        out = scaled_dot_product_attention(q, k, v, is_causal=True)
        return out if self.after is None else self.after(out)


class Layer(Attention):
    """Dynamo guards on ``index``: each layer is a recompilation."""

    def __init__(self, index: int) -> None:
        super().__init__()
        self.index = index

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.index * super().forward(x).transpose(1, 2).reshape(2, 6, 8)


def branch(x: torch.Tensor) -> torch.Tensor:
    if x.sum() > 0:
        x = x + 1
    return x * 2


@torch._dynamo.disable
def opaque(x: torch.Tensor) -> torch.Tensor:
    return x + 1


def loop(x: torch.Tensor) -> torch.Tensor:
    for _ in range(2):
        x = opaque(x)
    return x


def line_of(function: Any, code: str) -> str:
    """``file:line`` of the first line of ``function`` that holds ``code``."""
    function = getattr(function, "__wrapped__", function)
    lines, first = inspect.getsourcelines(function)
    return f"{__file__}:{first + next(i for i, line in enumerate(lines) if code in line)}"


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def watched(module: nn.Module, steps: int = 1) -> Watch:
    watch = Watch(every=1, inner="eager", strict=True, detectors=[])
    compiled = torch.compile(module, backend=watch.backend)
    for _ in range(steps):
        compiled(torch.randn(2, 6, 8)).sum().backward()
    return watch


def test_a_branch_on_data_is_a_break() -> None:
    """In an inlined function it cuts two frames, as Dynamo counts: the caller's, and then the function's own."""
    with watched(Attention(branch)) as watch:
        said = watch.coverage.graph_breaks
    assert said == (f"Data-dependent branching ({line_of(branch, 'if x.sum')} in branch: if x.sum() > 0:)",) * 2
    assert watch.coverage.eager == ()


def test_a_disabled_function_is_a_break() -> None:
    with watched(Attention(opaque)) as watch:
        (said,) = watch.coverage.graph_breaks
    assert said.startswith("Skip calling `torch.compiler.disable()`d function (")
    assert line_of(Attention.forward, "self.after(out)") in said


def test_a_frame_given_up_for_a_break_in_a_loop() -> None:
    with watched(Attention(loop)) as watch:
        coverage = watch.coverage
    (said,) = [line for line in coverage.eager if line.startswith("`loop`")]
    assert "inside a loop" in said
    assert line_of(loop, "opaque(x)") in said


def test_a_library_function_that_breaks_the_graph_runs_eagerly() -> None:
    """PyTorch's decoder looks at the values of its mask, and Dynamo compiles no module of torch.nn by itself."""
    layer = nn.TransformerDecoderLayer(8, 2, 8, batch_first=True)
    decoder, mask = nn.TransformerDecoder(layer, 1), nn.Transformer.generate_square_subsequent_mask(6)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.decoder = decoder

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.decoder(x, x, tgt_mask=mask)

    with watched(Model()) as watch:
        coverage = watch.coverage
    assert len(coverage) == 0
    assert any("runs eagerly, for it breaks the graph" in line and "transformer.py" in line for line in coverage.eager)


def test_one_that_was_evaluated_first_learns_its_laws_in_training() -> None:
    model = Attention()
    with Watch(every=1, inner="eager", strict=True, detectors=[]) as watch:
        compiled = torch.compile(model, backend=watch.backend)
        with torch.no_grad():
            compiled(torch.randn(2, 6, 8))
        (before,) = watch.coverage
        compiled(torch.randn(2, 6, 8)).sum().backward()
        torch.optim.SGD(model.parameters(), lr=0.1).step()
        (after,) = watch.coverage
        unsaid = {law for law, reason in before.laws.items() if reason.startswith("no gradient")}
        assert unsaid == {"law/key_shift", "law/value_mass", "law/euler", "law/bias"}
        assert set(after.laws.values()) == {""}
        assert after.site.id == before.site.id
        assert (before.evaluations, after.evaluations, after.sampled) == (1, 2, 1)
        assert "law/key_shift" in watch.metrics()


def test_attentions_of_one_weight_set_are_told_apart_by_their_laws() -> None:
    class Both(Attention):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k, v = (f(x).view(2, 6, 2, 4).transpose(1, 2) for f in (self.q, self.k, self.v))
            first = (q @ k.mT).softmax(-1) @ v
            return (
                first
                + ((q @ k.mT).tanh().softmax(-1) @ v)
                + scaled_dot_product_attention(q, k[:, :1], v, enable_gqa=True)
            )

    with watched(Both()) as watch:
        statuses = [status for status in watch.coverage if status.site.pattern == "written-out attention"]
        assert [sorted(law for law, reason in status.laws.items() if not reason) for status in statuses] == [
            ["law/bias", "law/euler", "law/hull", "law/key_shift", "law/shadow", "law/value_mass"],
            ["law/euler", "law/hull", "law/shadow", "law/value_mass"],
        ]
        assert len({status.site.id for status in watch.coverage}) == 3


def guarded(x: torch.Tensor) -> torch.Tensor:
    x = x * 2
    try:
        x = opaque(x)
    finally:
        x = x + 1
    return x


def test_a_frame_that_cannot_go_on_after_a_break() -> None:
    with watched(Attention(guarded)) as watch:
        (said,) = watch.coverage.eager
    assert said.startswith(("`guarded` runs eagerly: Skip calling", "the rest of a function runs eagerly"))
    assert line_of(guarded, "opaque(x)") in said


def test_layers_behind_the_recompile_limit(caplog: pytest.LogCaptureFixture) -> None:
    """Torch's own line stands in the log as without foreshock; the ledger names function, cause and place."""
    layers = nn.ModuleList(Layer(index) for index in range(12))
    with Watch(every=1, inner="eager", strict=True, detectors=[]).bind(layers) as watch:
        for layer in layers:
            layer.compile(backend=watch.backend)
        x = torch.randn(2, 6, 8, requires_grad=True)
        with caplog.at_level(logging.WARNING, logger="torch._dynamo.convert_frame"):
            for layer in layers:
                x = layer(x)
        assert len(watch.sites) == 8
        (said,) = watch.coverage.eager
        assert watch.coverage.eager == (said,)  # asked again, told once
    assert "`forward` hit the recompile limit of 8: its later variants run eagerly and are not watched" in said
    assert "self.index == 7" in said
    assert line_of(Layer.forward, "def forward") in said
    assert watch.coverage.graph_breaks == ()


def test_experts_in_a_loop() -> None:
    """The loop breaks the graph in the library's own source; the attention around it is watched, the router is named."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = transformers.MixtralConfig(
        **sizes, num_hidden_layers=2, num_local_experts=4, vocab_size=31, experts_implementation="eager"
    )
    model = transformers.MixtralForCausalLM(config)
    with Watch(every=1, inner="eager", strict=True, detectors=[]) as watch:
        torch.compile(model, backend=watch.backend)(torch.ones(2, 6, dtype=torch.long)).logits.sum().backward()
        coverage = watch.coverage
    assert [s.site.kind for s in coverage].count("attention") == 2
    assert any("modeling_mixtral.py" in line and ".nonzero()" in line for line in coverage.graph_breaks)
    assert any("inside a loop" in line and "modeling_mixtral.py" in line for line in coverage.eager)


def test_only_what_came_after_the_watch_was_made_counts() -> None:
    torch.compile(Attention(branch), backend="eager")(torch.randn(2, 6, 8))
    with Watch(inner="eager", strict=True) as watch:
        assert watch.coverage.graph_breaks == ()


def test_a_reset_loses_nothing_that_was_read() -> None:
    with watched(Attention(branch)) as watch:
        torch._dynamo.reset()
        assert len(watch.coverage.graph_breaks) == 2
        torch.compile(Attention(branch), backend=watch.backend)(torch.randn(2, 6, 8))
        assert len(watch.coverage.graph_breaks) == 4


def test_a_torch_without_these_records_is_reported_and_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone() -> Any:
        raise ImportError("no such record")

    monkeypatch.setattr(_torch, "break_records", gone)
    with Watch(every=1, inner="eager", detectors=[]) as watch:
        torch.compile(Attention(branch), backend=watch.backend)(torch.randn(2, 6, 8)).sum().backward()
        assert [w.partition(":")[0] for w in watch.coverage.warnings] == ["reading what Dynamo left to eager"]
        assert len(watch.sites) == 1


def test_records_are_left_as_they_are() -> None:
    with watched(Attention(branch)) as watch:
        before = len(utils.graph_break_reasons), len(utils.get_compilation_metrics())
        assert len(watch.coverage.graph_breaks) == 2
        assert (len(utils.graph_break_reasons), len(utils.get_compilation_metrics())) == before


def test_a_site_that_is_only_evaluated_says_so() -> None:
    with Watch(every=1, inner="eager", strict=True, detectors=[]) as watch:
        model = Attention()
        compiled = torch.compile(model, backend=watch.backend)
        with torch.no_grad():
            compiled(torch.randn(2, 6, 8))
        (status,) = watch.coverage
        assert status.notes == (NEVER_TRAINED,)
        out = compiled(torch.randn(2, 6, 8))
        assert [s.notes for s in watch.coverage] == [(NEVER_TRAINED,)]
        out.sum().backward()
        assert [s.notes for s in watch.coverage] == [()]
        torch.optim.SGD(model.parameters(), 0.1).step()
        with torch.no_grad():
            compiled(torch.randn(2, 6, 8))
        assert [s.notes for s in watch.coverage] == [()]


def status(name: str, **values: Any) -> SiteStatus:
    weight = WeightView.from_json({"names": [f"{name}.q.weight"], "axis": 0, "heads": 2})
    laws = {"law/euler": "", "law/value_mass": values.pop("reason", ""), "law/bias": ""}
    return SiteStatus(
        Site(name, name, "attention", "sdpa", heads=2, kv_heads=2, head_dim=4, q_weight=weight, **values), 1, 1, laws
    )


@pytest.mark.parametrize(
    ("names", "shown"),
    [
        ([f"h.{i}.attn" for i in range(12)], [("h.{0-11}.attn", 12)]),
        ([f"h.{i}.attn" for i in range(0, 12, 2)], [("h.{0,2..10}.attn", 6)]),
        (["h.0.attn", "h.1.attn", "h.5.attn"], [("h.{0,1,5}.attn", 3)]),
        (["a.0.b.0", "a.0.b.1", "a.1.b.0", "a.1.b.1"], [("a.{0-1}.b.{0-1}", 4)]),
        (["a.0.b.0", "a.0.b.1", "a.1.b.0"], [("a.0.b.{0-1}", 2), ("a.1.b.0", 1)]),
        (["attn2", "attn3"], [("attn2", 1), ("attn3", 1)]),
        (["attn", "attn"], [("attn", 2)]),
    ],
)
def test_sites_that_differ_in_a_number_are_one_row(names: list[str], shown: list[tuple[str, int]]) -> None:
    rows, _ = table([status(name) for name in names])
    assert [(row.name, row.sites) for row in rows] == shown
    assert {row.weights for row in rows} == {"q: q.weight"}
    assert len(table([status(name) for name in names], every=True)[0]) == len(names)


def test_what_differs_stays_apart_and_a_reason_is_told_once() -> None:
    """Every second layer has a soft cap, another has a mask."""
    found = [status(f"h.{i}", softcap=50.0 if i % 2 else None, reason="dropout") for i in range(4)]
    rows, footnotes = table([*found, status("h.4", masked=True, reason="dropout")])
    assert [(row.name, row.details) for row in rows] == [
        ("h.{0,2}", "not known if causal"),
        ("h.{1,3}", "not known if causal, softcap 50"),
        ("h.4", "not known if causal, masked"),
    ]
    assert footnotes == ["value_mass not checked: dropout"]
    assert {row.footnotes for row in rows} == {(1,)}
    assert {row.laws for row in rows} == {"euler, bias"}


def test_the_ledger_survives_its_json() -> None:
    full = Coverage((status("h.0"),), ("left",), ("broke", "broke"), ("eager",), ("failed",))
    assert Coverage.from_json(json.loads(json.dumps(full.to_json()))) == full
    assert summary(full) == "1 attention site; 1 candidate left out; 2 graph breaks; 1 left to eager; 1 warning"
    assert beside(full)[1] == ("Graph breaks", ["broke (2 times)"])


def test_alike_but_for_the_number_of_a_node_is_alike() -> None:
    assert beside(Coverage((), ("softmax: no (a.py:1: x)", "softmax_12: no (a.py:1: x)"))) == [
        ("Left out", ["softmax: no (a.py:1: x) (2 times)"])
    ]
    noted = [replace(status(f"h.{i}"), notes=(f"getitem_{i}: lost",)) for i in range(3)]
    rows, footnotes = table(noted)
    assert [row.name for row in rows] == ["h.{0-2}"]
    assert footnotes == ["getitem: lost"]
