"""Pictures of sites: what is in the slice, one picture a form, and well-formed, escaped, repeatable SVG."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from foreshock.drawing import Drawings, Picture, picture, svg
from foreshock.errors import ConfigError


class Attention(nn.Module):
    """``shared`` comes from the layer before; the mask serves every layer."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.width = width

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.view(2, -1, 2, self.width // 2).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        return scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).reshape(2, -1, self.width)


class Stack(nn.Module):
    """Two layers, or one layer twice."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mask = (torch.arange(6)[:, None] >= torch.arange(6)).expand(2, 1, 6, 6)
        for layer in self.layers:
            x = x + layer(x, mask)
        return x


def drawn(capture: Callable[..., Any], model: nn.Module) -> list[Picture]:
    found = capture(model, torch.randn(2, 6, 8))
    return [picture(found.view, match) for match in found.findings.matches]


def test_the_slice_runs_from_the_weight_to_the_output(capture: Callable[..., Any]) -> None:
    first, second = drawn(capture, Stack(Attention(), Attention()))
    roles = [box.role for box in second.boxes]
    assert sorted(filter(None, roles)) == ["k", "mask", "out", "q", "v", "weight"]
    (weight,) = [box for box in second.boxes if box.role == "weight"]
    assert (weight.label, weight.size) == ("layers.1.qkv.weight", "[24, 8] float32")
    # The shared mask feeds the layer before as well: nothing of it is drawn.
    assert [box.label for box in second.boxes].count("scaled_dot_product_attention") == 1
    assert [box.label for box in second.boxes].count("linear") == 1
    assert [box.label for box in second.boxes].count("transpose") == 3  # the fused projection makes v too
    tapped = {role: (second.boxes[a].role, second.boxes[b].role) for a, b, role in second.edges if role}
    assert tapped == {role: (role, "out") for role in ("q", "k", "v")}
    assert first.form == second.form


def test_one_layer_used_twice_is_drawn_once(capture: Callable[..., Any]) -> None:
    layer = Attention()
    first, second = drawn(capture, Stack(layer, layer))
    assert [box.label for box in second.boxes].count("linear") == 1
    assert first.form == second.form


def test_svg_is_well_formed_escaped_and_the_same_twice(capture: Callable[..., Any]) -> None:
    (found,) = drawn(capture, Stack(Attention()))
    evil = replace(found, title="<script>&", boxes=(replace(found.boxes[0], label='"<b>'), *found.boxes[1:]))
    text = svg(evil)
    root = ElementTree.fromstring(text)
    assert root.tag.endswith("svg")
    assert "<script>" not in text
    assert "<b>" not in text
    boxes = [node for node in root.iter() if node.get("class") == "op" and node.get("height") == "40"]
    assert len(boxes) == len(found.boxes)
    assert text == svg(evil)
    assert "prefers-color-scheme: dark" in text


def test_boxes_do_not_overlap(capture: Callable[..., Any]) -> None:
    (found,) = drawn(capture, Stack(Attention()))
    root = ElementTree.fromstring(svg(found))
    corners = [(float(node.attrib["x"]), float(node.attrib["y"])) for node in root.iter() if node.get("height") == "40"]
    assert all(abs(x - a) >= 196 or abs(y - b) >= 40 for i, (x, y) in enumerate(corners) for a, b in corners[i + 1 :])


def test_a_folder_that_cannot_be_written(tmp_path: Path, capture: Callable[..., Any]) -> None:
    (found,) = drawn(capture, Stack(Attention()))
    drawings = Drawings()
    drawings.pictures[found.form] = found
    assert [path.name for path in drawings.write(tmp_path / "new")] == ["attention-scaled-dot-product-attention.svg"]
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="--draw"):
        drawings.write(tmp_path / "file")
