"""Draw the pictures of docs/concepts.md from the runs that `foreshock demo` leaves: ``python docs/draw.py runs/demo``.

Each is an SVG of its own that follows the reader's light or dark setting. Numbers are the runs'; only the axes are chosen here.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import foreshock
from foreshock.demo.departure import MARGIN, WINDOW, departure
from foreshock.monitors.laws import floor

PICTURES = Path(__file__).parent / "pictures"
LEFT, RIGHT, TOP, PANEL, GAP, WIDTH = 70, 24, 62, 150, 50, 720
STYLE = """\
.back { fill: #ffffff; } text { fill: #1f2937; font: 13px ui-sans-serif, system-ui, sans-serif; } .small { font-size: 11.5px; }
.title { font-weight: 600; font-size: 14px; } .axis { stroke: #9ca3af; fill: none; } .line { fill: none; stroke-width: 1.8; }
.broken { stroke: #dc2626; } .healthy { stroke: #6b7280; } .limit { stroke: #b45309; stroke-dasharray: 6 4; }
.mark { stroke: #2563eb; } .a { fill: #dc2626; } .b { fill: #6b7280; } .c { fill: #b45309; } .d { fill: #2563eb; }
@media (prefers-color-scheme: dark) {
.back { fill: #0d1117; } text { fill: #e5e7eb; } .axis { stroke: #6b7280; }
.broken { stroke: #f87171; } .healthy { stroke: #9ca3af; } .limit { stroke: #fbbf24; } .mark { stroke: #60a5fa; }
.a { fill: #f87171; } .b { fill: #9ca3af; } .c { fill: #fbbf24; } .d { fill: #60a5fa; }
}"""


@dataclass(frozen=True)
class Panel:
    """One chart: each line is a class of `STYLE`, steps and values; ``marks`` are steps with what happened there."""

    title: str
    lines: Sequence[tuple[str, np.ndarray, np.ndarray]]
    marks: Sequence[tuple[int, str]] = ()
    limit: float | None = None
    log: bool = False


def draw(name: str, label: str, panels: Sequence[Panel], legend: Sequence[tuple[str, str]]) -> None:
    """Write docs/pictures/NAME.svg: the panels below each other over one axis of steps."""
    last = max(int(steps[-1]) for panel in panels for _, steps, _ in panel.lines)
    height = TOP + len(panels) * (PANEL + GAP) + 12
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{label}">']
    parts.append(f'<style>\n{STYLE}\n</style>\n<rect class="back" width="100%" height="100%"/>')
    words = " ".join(
        f'<tspan class="{kind}" dx="{16 if at else 0}">\u25a0 {said}</tspan>' for at, (kind, said) in enumerate(legend)
    )
    parts.append(f'<text class="small" x="{LEFT}" y="22">{words}</text>')
    for at, panel in enumerate(panels):
        parts += _panel(panel, TOP + at * (PANEL + GAP), last, at == len(panels) - 1)
    (PICTURES / f"{name}.svg").write_text("\n".join([*parts, "</svg>\n"]), encoding="utf-8")


def _panel(panel: Panel, top: float, last: int, lowest: bool) -> list[str]:
    scale = np.log10 if panel.log else np.asarray
    values = [scale(value) for _, _, value in panel.lines] + ([scale([panel.limit])] if panel.limit else [])
    low, high = min(map(np.min, values)), max(map(np.max, values))
    low, high = low - 0.06 * (high - low), high + 0.14 * (high - low)

    def x(step: float) -> float:
        return LEFT + step / last * (WIDTH - LEFT - RIGHT)

    def y(value: float) -> float:
        return top + PANEL * (high - float(scale(value))) / (high - low)

    parts = [f'<text class="title" x="{LEFT}" y="{top - 8}">{panel.title}</text>']
    parts.append(f'<path class="axis" d="M{LEFT} {top} V{top + PANEL} H{WIDTH - RIGHT}"/>')
    parts.extend(
        f'<text class="small" x="{LEFT - 6}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:g}</text>'
        for tick in _ticks(low, high, panel.log)
    )
    for step in range(0, last + 1, 200):
        name = f"step {step}" if lowest and step == 0 else str(step)
        parts.append(f'<text class="small" x="{x(step):.1f}" y="{top + PANEL + 16}" text-anchor="middle">{name}</text>')
    if panel.limit:
        parts.append(f'<path class="limit" d="M{LEFT} {y(panel.limit):.1f} H{WIDTH - RIGHT}"/>')
    for kind, steps, value in panel.lines:
        path = " L".join(f"{x(step):.1f} {y(one):.1f}" for step, one in zip(steps, value, strict=True))
        parts.append(f'<path class="line {kind}" d="M{path}"/>')
    for row, (step, said) in enumerate(panel.marks):
        side, anchor = (6, "start") if x(step) < WIDTH / 2 else (-6, "end")
        parts.append(f'<path class="mark" d="M{x(step):.1f} {top} V{top + PANEL}"/>')
        parts.append(
            f'<text class="small d" x="{x(step) + side:.1f}" y="{top + 12 + 15 * row}" text-anchor="{anchor}">{said}</text>'
        )
    return parts


def _ticks(low: float, high: float, log: bool) -> list[float]:
    if log:
        return [10.0**power for power in range(int(np.ceil(low)), int(np.floor(high)) + 1)]
    size = 10.0 ** np.floor(np.log10(high - low))
    step = next(size * part for part in (0.1, 0.2, 0.5, 1) if (high - low) / (size * part) <= 5)
    return [float(step * k) for k in range(int(np.ceil(low / step)), int(np.floor(high / step)) + 1)]


def _trailing(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return steps[WINDOW - 1 :], np.convolve(values.reshape(-1), np.ones(WINDOW) / WINDOW, "valid")


def main(folder: Path) -> None:
    """Draw law.svg and drift.svg."""
    with foreshock.open_run(folder / "none") as healthy:
        with foreshock.open_run(folder / "attention") as run:
            (alarm, *_) = run.alarms
            site = alarm.site
            assert site is not None
            lines = []
            for kind, one in (("healthy", healthy), ("broken", run)):
                steps, values = one.series("law/key_shift", site)
                lines.append((kind, steps, np.nanmax(values, axis=1)))
            title = f"law/key_shift at {site.partition(':')[2]}, the largest of its heads"
            panel = Panel(
                title,
                lines,
                [(alarm.step, f"alarm at step {alarm.step}")],
                limit=floor("key_shift", "bfloat16"),
                log=True,
            )
            legend = [("b", "healthy"), ("a", "rounded to one side from 400 on"), ("c", "floor of bfloat16")]
            draw("law", "A law of a broken kernel leaves its floor at once", [panel], legend)
        with foreshock.open_run(folder / "learning-rate") as run:
            (alarm, *_) = run.alarms
            site = alarm.site
            assert site is not None
            runs = (("healthy", healthy), ("broken", run))
            spectra = [(kind, *_mean(*one.series("attention/delta2_norm", site))) for kind, one in runs]
            steps, broken = run.series("run/loss")
            whole = healthy.series("run/loss")[1]
            left = departure(broken.reshape(-1), whole.reshape(-1))
            gap = _trailing(steps, broken - whole)
            gone = [] if left is None else [(int(steps[left]), f"the loss departs at step {steps[left]}")]
            panels = [
                Panel(
                    f"norm of Delta2 at {site.partition(':')[2]}, mean of its heads",
                    spectra,
                    [(alarm.step, f"alarm at step {alarm.step}")],
                    log=True,
                ),
                Panel(f"loss above the twin's, mean of {WINDOW} steps", [("broken", *gap)], gone, limit=MARGIN),
            ]
            legend = [
                ("b", "healthy twin"),
                ("a", "learning rate of q and k ramped up from 400 on"),
                ("c", "0.02 nats"),
            ]
            draw("drift", "The norm of Delta2 drifts before the loss does", panels, legend)


def _mean(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return steps, np.nanmean(values.reshape(len(steps), -1), axis=1)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/demo"))
