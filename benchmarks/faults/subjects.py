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
        Config(layers=3, hidden=96, heads=6, kv_heads=2, experts=0, width=192),
        "3 layers, width 96, 6 query and 2 key heads, dense feed-forward",
    ),
}
