"""Which rows a call looks at hangs on the call alone, so that there is nothing to save."""

from __future__ import annotations

from typing import Any

import torch

from foreshock.rows import Rows


class _At:
    def __init__(self, *sites: str) -> None:
        self.instances: Any = [type("Instance", (), {"site": type("Site", (), {"id": site})}) for site in sites]


def test_a_draw_hangs_on_the_call_alone() -> None:
    long, fresh, a, b = Rows(), Rows(), _At("a").instances, _At("b").instances
    for step in range(5):
        for sites in (a, b, a):
            long.draw(step, sites, 8)
    drawn = [long.draw(5, sites, 8) for sites in (a, b, a, b, _At("a", "b").instances)]
    again = [fresh.draw(5, sites, 8) for sites in (b, a, b, a, _At("a", "b").instances)]
    assert torch.equal(torch.stack(drawn), torch.stack([again[at] for at in (1, 0, 3, 2, 4)]))
    assert len({tuple(x.tolist()) for x in [*drawn, fresh.draw(6, a, 8)]}) == 6
    assert all(((x >= 0) & (x < 1)).all() for x in drawn)


def test_a_recomputation_is_no_call_of_its_own() -> None:
    rows, plain_rows, a = Rows(), Rows(), _At("a").instances
    found = [rows.draw(3, a, 4, again) for again in (False, True, False)]
    assert torch.equal(found[2], [plain_rows.draw(3, a, 4) for _ in range(2)][1])
