"""How long finding sites and rewriting graphs takes: against Dynamo's own capture, and against the size of the graph.

    python benchmarks/matching.py

The first table trains nothing: it captures a Llama of 32 layers with and without foreshock, in turns. The second one repeats the
layer of a captured graph until it has 10^2 to 10^5 nodes.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn
from torch.fx import GraphModule
from torch.nn import functional

from foreshock import Watch, _torch
from foreshock.cost import REWRITING
from foreshock.monitors.attention_probe import ATTENTION
from foreshock.passes import Plan, SitePlan, copy_graph, expand, instrument
from foreshock.patterns import GraphView, find

WIDTH, HEADS = 32, 4


def against_capture(layers: int, repeats: int) -> None:
    """Rewriting time over the time of `torch.compile` with a backend that does nothing."""
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=WIDTH,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=2,
        intermediate_size=WIDTH,
    )
    model = transformers.LlamaForCausalLM(config).train()
    tokens = torch.randint(0, 64, (2, 16))
    shares = []
    for _ in range(repeats + 1):
        torch._dynamo.reset()
        start = time.perf_counter()
        torch.compile(model, backend=lambda module, inputs: module.forward)(input_ids=tokens, labels=tokens)
        capture = time.perf_counter() - start
        torch._dynamo.reset()
        with Watch(every=1, inner="eager", strict=True, detectors=[]) as watch:
            torch.compile(model, backend=watch.backend)(input_ids=tokens, labels=tokens)
            shares.append((capture, watch.costs.seconds[REWRITING], len(watch.coverage)))
    capture, rewriting, sites = (statistics.median(column) for column in zip(*shares[1:], strict=True))
    print(f"{layers} layers, {sites} sites: capture {capture:.2f} s, matching and rewriting {rewriting:.3f} s")
    print(f"share: {rewriting / capture:.1%} (median of {repeats}, in turns)\n")


class Layer(nn.Module):
    """Attention with grouped keys, and a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q = self.q(x).unflatten(-1, (HEADS, -1)).transpose(1, 2)
        k, v = (y.unflatten(-1, (2, -1)).transpose(1, 2) for y in self.kv(x).chunk(2, -1))
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return x + self.out(y.transpose(1, 2).flatten(2))


def _tiled(module: GraphModule, nodes: int, sites: int | None) -> GraphModule:
    """The graph of ``module`` with all but its placeholders repeated, each repetition reading what the one before returned: until
    there are so many ``nodes``, or ``sites``, of which each repetition has one; what lacks then are sines."""
    graph = torch.fx.Graph()
    mapping: dict[Any, Any] = {}
    for node in module.graph.nodes:
        if node.op == "placeholder":
            mapping[node] = graph.node_copy(node)
    (x,) = [node for node in mapping if not isinstance(node.meta["grapharg"].example, nn.Parameter)]
    (output,) = [node for node in module.graph.nodes if node.op == "output"]
    body = [node for node in module.graph.nodes if node.op not in ("placeholder", "output")]
    made = 0
    while made != sites and len(graph.nodes) < nodes:
        for node in body:
            mapping[node] = graph.node_copy(node, mapping.__getitem__)
        mapping[x] = mapping[output.args[0][0]]
        made += 1
    while len(graph.nodes) < nodes:
        filler = graph.call_function(torch.sin, (mapping[x],))
        filler.meta = dict(mapping[x].meta)
        mapping[x] = filler
    graph.output((mapping[x],))
    return _torch.graph_module(module, graph)


def by_size(sizes: Sequence[tuple[int, int | None]]) -> list[tuple[int, int, float, float]]:
    """Nodes, sites, processor seconds of matching and of rewriting, for graphs of about so many nodes, and so many sites or as many
    as they have room for."""
    measured: list[tuple[int, int, float, float]] = []

    def backend(module: GraphModule, inputs: list[Any]) -> Any:
        for nodes, sites in sizes:
            tiled = _tiled(module, nodes, sites)
            start = time.process_time()
            copied, _ = copy_graph(tiled)
            expand(copied)
            view = GraphView.of(copied.graph, inputs)
            matches = find(view).matches
            found = time.process_time()
            facts = [{**match.facts, "layout": match.layout, "rows": 16} for match in matches]
            plans = [SitePlan(i, str(i), match, (ATTENTION,), facts[i]) for i, match in enumerate(matches)]
            fakes = [node.meta["example_value"] for node in copied.graph.nodes if node.op == "placeholder"]
            instrument(Plan(copied, view, plans, _torch.fake_mode_of(fakes), torch.device("cpu"), 16, True))
            measured.append((len(tiled.graph.nodes), len(plans), found - start, time.process_time() - found))
        return module.forward

    torch._dynamo.reset()
    torch.compile(Layer(), backend=backend, fullgraph=True)(torch.randn(2, 16, WIDTH).requires_grad_())
    return measured


def against_size(largest: int) -> None:
    """Seconds for graphs of 100 to ``largest`` nodes, and the slope on log axes."""
    measured = by_size([(round(10 ** (power / 2)), None) for power in range(4, 1 + round(2 * np.log10(largest)))])
    for nodes, sites, matching, rewriting in measured:
        print(f"{nodes:>8} nodes {sites:>6} sites: matching {matching:8.3f} s, rewriting {rewriting:8.3f} s")
    nodes, _, matching, rewriting = (np.array(column, float) for column in zip(*measured[-5:], strict=True))
    slope = np.polyfit(np.log(nodes), np.log(matching + rewriting), 1)[0]
    print(f"slope on log axes, the last five: {slope:.2f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--largest", type=int, help="also graphs of 100 to so many nodes, as benchmarks/scaling.py does"
    )
    options = parser.parse_args()
    against_capture(options.layers, options.repeats)
    if options.largest:
        against_size(options.largest)
