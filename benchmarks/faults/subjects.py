"""The models that are trained: the demo's transformer, small enough that a core makes fifty steps a second."""

from __future__ import annotations

from dataclasses import dataclass

from foreshock.demo.model import Config


@dataclass(frozen=True)
class Subject:
    """``note`` is what a report calls it."""

    config: Config
    note: str


SUBJECTS = {
    "moe": Subject(Config(), "2 layers, width 64, 4 query and 2 key heads, 8 experts of which 2 are chosen"),
    "dense": Subject(
        Config(layers=2, hidden=48, heads=4, kv_heads=2, experts=0, width=128),
        "2 layers, width 48, 4 query and 2 key heads, dense feed-forward",
    ),
}
