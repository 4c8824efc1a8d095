"""The figures of a report, as plotly figures: curves, heatmaps and the loss, thinned so that a long run stays a small file.

Colours stand on a light and on a dark page alike; names from the run are escaped, for plotly reads markup in labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np
import plotly.graph_objects as go
from plotly.colors import sample_colorscale

from foreshock.records import Alarm, Array

if TYPE_CHECKING:
    from foreshock.reader import Run

POINTS = 1500  # a trace, at most
BUDGET = 200_000  # points of all traces of a report together
LINES = 32  # sites with a curve of their own in one figure
BINS = 120  # columns of a heatmap
RED = "#e5484d"
CONFIG = {"displayModeBar": False, "responsive": True}


def html(figure: go.Figure, name: str, height: int) -> str:
    """The figure as a piece of a page that already holds plotly's own script."""
    text: str = figure.to_html(
        full_html=False, include_plotlyjs=False, config=CONFIG, div_id=name, default_height=f"{height}px"
    )
    return text


def thin(steps: Array, values: Array, points: int) -> tuple[Array, Array]:
    """At most ``points`` of a curve: each stretch keeps its lowest and its highest value, so no spike is lost."""
    values = np.where(np.isfinite(values), values, np.nan).astype(np.float32)
    if len(steps) > points:
        half = max(points // 2, 1)
        edges = np.linspace(0, len(steps), half + 1).astype(int)
        rank = np.full((half, np.diff(edges).max()), np.nan)
        row = np.repeat(np.arange(half), np.diff(edges))
        rank[row, np.arange(len(steps)) - edges[row]] = values
        low = np.where(np.isnan(rank), np.inf, rank).argmin(1)
        high = np.where(np.isnan(rank), -np.inf, rank).argmax(1)
        keep = np.unique(np.concatenate([edges[:-1] + low, edges[:-1] + high]))
        steps, values = steps[keep], values[keep]
    return steps, values


def curves(
    run: Run, metric: str, sites: Sequence[tuple[str | None, str]], points: int, alarms: Sequence[Alarm]
) -> go.Figure:
    """One line a (site, label), from blue at the first to red at the last; vectors show mean and, dotted, maximum."""
    figure = _figure()
    colours = sample_colorscale("Turbo", np.linspace(0.08, 0.92, max(len(sites), 2)).tolist())
    for (site, label), colour in zip(sites, colours, strict=False):
        steps, values = run.series(metric, site)
        text = escape(label)
        if values.ndim == 1:
            figure.add_trace(_line(*thin(steps, values, points), text, colour))
            continue
        with np.errstate(invalid="ignore"):
            mean, peak = values.mean(axis=1), values.max(axis=1)
        figure.add_trace(_line(*thin(steps, mean, points), text, colour))
        figure.add_trace(_line(*thin(steps, peak, points), f"{text} max", colour, dash="dot", showlegend=False))
    _mark(figure, [alarm for alarm in alarms if alarm.metric == metric])
    figure.update_layout(showlegend=1 < len(sites) <= 6)
    if wide(figure):
        figure.update_yaxes(type="log", exponentformat="power", dtick=1)
    return figure


def wide(figure: go.Figure) -> bool:
    """Whether all values are positive and span so much that only a logarithmic axis shows them."""
    finite = [np.asarray(trace.y)[np.isfinite(trace.y)] for trace in figure.data]
    values = np.concatenate([np.zeros(0), *finite])
    return bool(len(values) and values.min() > 0 and values.max() / values.min() > 30)


def heatmap(run: Run, metric: str, sites: Sequence[tuple[str | None, str]], *, largest: bool, log: bool) -> go.Figure:
    """Sites from top to bottom over steps; a cell is the largest magnitude, or the mean, of what it covers."""
    columns = [run.series(metric, site) for site, _ in sites]
    every = np.unique(np.concatenate([steps for steps, _ in columns]))
    edges = every[np.linspace(0, len(every), min(BINS, len(every)), endpoint=False).astype(int)]
    cells = np.full((len(sites), len(edges)), np.nan)
    for row, (steps, values) in zip(cells, columns, strict=True):
        values = values.reshape(len(steps), -1)
        place = np.repeat(np.searchsorted(edges, steps, side="right") - 1, values.shape[1])
        _fill(row, place, values.reshape(-1), largest)
    if log:
        with np.errstate(divide="ignore", invalid="ignore"):
            cells = np.where(cells > 0, np.log10(cells), np.nan)
    labels = [escape(label) for _, label in sites]
    figure = _figure()
    style = {"colorscale": "Viridis", "colorbar": _bar(cells, log), "hoverongaps": False}
    figure.add_trace(go.Heatmap(z=cells.astype(np.float32), x=edges, y=np.arange(len(sites)), **_flat(cells), **style))
    shown = np.unique(np.linspace(0, len(labels) - 1, min(len(labels), 12)).astype(int)).tolist()
    figure.update_yaxes(autorange="reversed", tickvals=shown, ticktext=[labels[i] for i in shown], showgrid=False)
    return figure


def loss(steps: Array, values: Array, alarms: Sequence[Alarm]) -> go.Figure:
    """The loss, with a line where each alarm was heard and a dotted one where it began."""
    figure = _figure()
    figure.add_trace(_line(*thin(steps, values.reshape(len(steps), -1)[:, 0], POINTS), "loss", "#3b82f6"))
    _mark(figure, alarms)
    figure.update_layout(showlegend=False)
    return figure


def _fill(row: Array, place: Array, values: Array, largest: bool) -> None:
    real = np.isfinite(values)
    place, values = place[real], values[real]
    if largest:
        np.fmax.at(row, place, np.abs(values))
        return
    count = np.bincount(place, minlength=len(row))
    total = np.bincount(place, weights=values, minlength=len(row))
    row[count > 0] = total[count > 0] / count[count > 0]


def _bar(cells: Array, log: bool) -> dict[str, Any]:
    """A thin colour bar; under a logarithm its ticks say the numbers themselves."""
    bar: dict[str, Any] = {"thickness": 10, "outlinewidth": 0}
    real = cells[np.isfinite(cells)]
    if log and real.size:
        ticks = np.linspace(real.min(), real.max(), 4).tolist()
        bar |= {"tickvals": ticks, "ticktext": [f"{10**tick:.2g}" for tick in ticks]}
    return bar


def _flat(cells: Array) -> dict[str, float]:
    """A range for cells that are all alike, which plotly would paint in the middle of its scale."""
    real = cells[np.isfinite(cells)]
    return {"zmin": float(real[0]), "zmax": float(real[0]) + 1} if real.size and np.ptp(real) == 0 else {}


def _line(steps: Array, values: Array, name: str, colour: str, dash: str = "solid", **more: Any) -> go.Scatter:
    mode = "lines" if len(steps) > 1 else "markers"
    line = {"color": colour, "width": 1.6, "dash": dash}
    return go.Scatter(x=steps, y=values, name=name, mode=mode, line=line, legendgroup=name, **more)


def _mark(figure: go.Figure, alarms: Sequence[Alarm], limit: int = 12) -> None:
    for alarm in alarms[:limit]:
        figure.add_vline(x=alarm.step, line={"color": RED, "width": 1.5}, opacity=0.8)
        if alarm.onset != alarm.step:
            figure.add_vline(x=alarm.onset, line={"color": RED, "width": 1, "dash": "dot"}, opacity=0.8)


def _figure() -> go.Figure:
    figure = go.Figure()
    axis = {"gridcolor": "rgba(128,128,128,.18)", "zeroline": False, "automargin": True}
    figure.update_layout(
        template="none",
        font={"family": "system-ui, sans-serif", "size": 12, "color": "#7d8590"},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        margin={"l": 44, "r": 8, "t": 8, "b": 32},
        hovermode="closest",
        legend={"orientation": "h", "y": -0.15, "font": {"size": 11}},
        xaxis=axis,
        yaxis=axis | {"exponentformat": "power"},
    )
    return figure
