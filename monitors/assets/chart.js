"use strict";
// A view as a figure of Plotly's: lines over steps, and below them a strip with a row for each line, over the same steps.
//
// A view is {lines: [{label, x, y, color, width, dash}], rules: [{x, y}], bounds: [y], band: {x, low, high} or null,
// odd: [{step, what, label}], marks: [{step, onset, low, high}], rows: [{label, x, z, floor}], law, largest, site}.
// x are steps, rising; NaN is missing; a row's floor (a number, NaN: none) makes its cells shares of it.
const chart = (() => {
  const CIVIDIS = ["#00224e", "#123570", "#3b496c", "#575d6d", "#707173", "#8a8678", "#a59c74", "#c3b369", "#e1cc55", "#fee838"];
  const FEW = 7, BODY = 200, COLUMNS = 240;
  const scale = CIVIDIS.map((color, i) => [i / (CIVIDIS.length - 1), color]);
  const ramp = (share) => CIVIDIS[Math.round(Math.min(Math.max(share, 0), 1) * (CIVIDIS.length - 1))];
  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const plain = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");  // Plotly reads markup
  const end = (text, most) => plain(text.length > most ? `…${text.slice(1 - most)}` : text);  // an end tells more than a beginning
  const number = (value) => Number.isNaN(value) ? "none" : !Number.isFinite(value) ? "not finite" : Math.abs(value) >= 1e6 || (value && Math.abs(value) < 1e-3)
    ? value.toExponential(2).replace(/\.?0+e/, "e").replace("e+", "e") : String(+value.toPrecision(Math.abs(value) >= 1000 ? 6 : 3));
  const range = (values) => values.reduce(([low, high], v) => Number.isFinite(v) ? [Math.min(low, v), Math.max(high, v)] : [low, high],
    [Infinity, -Infinity]);

  // The range of values, and whether the axis is logarithmic. A band that is far wider than its series must not flatten it.
  const extent = (view) => {
    const ys = view.lines.flatMap(({ y }) => Array.from(y)), [least, most] = range(ys), own = most - least;
    const beside = view.band ? [...view.band.low, ...view.band.high].filter((v) => v > least - own && v < most + own) : [];
    const all = [...ys, ...beside, ...view.rules.flatMap(({ y }) => Array.from(y)), ...view.bounds].filter(Number.isFinite);
    const [low, high] = all.length ? range(all) : [0, 1], [small] = range(all.filter((v) => v > 0));
    const log = view.law ? low >= 0 && small < Infinity : low > 0 && high / low > 30, pad = (high - low) * 0.06 || Math.abs(high) * 0.1 || 1;
    return log ? { log, range: [Math.log10(Math.max(small, high * 1e-9) / 1.3), Math.log10(high * 1.3)] } : { log, range: [low - pad, high + pad] };
  };

  // Rows of a strip: the largest, or the last, of the samples in each column; a sample lasts until the next one of its row.
  const cells = ({ rows, largest }, first, last) => {
    const longest = Math.max(...rows.map(({ x }) => x.length)), wide = Math.min(COLUMNS, longest > COLUMNS ? longest >> 1 : longest);
    const size = (last - first || 1) / Math.max(wide - 1, 1), column = (step) => Math.round((step - first) / size);
    return { x: Array.from({ length: wide + 1 }, (_, i) => first + (i - 0.5) * size), z: rows.map(({ x, z }) => {
      const row = new Array(wide).fill(null), usual = Math.ceil((column(x[x.length - 1]) - column(x[0])) / Math.max(x.length - 1, 1)) * 3;
      z.forEach((value, i) => {
        if (Number.isNaN(value)) return;
        const from = column(x[i]), to = i + 1 < x.length ? Math.max(Math.min(column(x[i + 1]), from + usual), from + 1) : from + 1;
        for (let c = from; c < to; c++) if (row[c] === null || !largest || Math.abs(value) > Math.abs(row[c])) row[c] = value;
      });
      return row;
    }) };
  };

  const strip = (view, log, color) => {
    const [first, last] = range(view.rows.flatMap(({ x }) => [x[0], x[x.length - 1]])), { x, z } = cells(view, first, last);
    const judged = view.rows.some(({ floor }) => floor > 0), size = (v) => v === null ? null : judged || log ? Math.log10(Math.max(v, 1e-30)) : v;
    const shown = z.map((row) => row.map((v) => v !== null && !Number.isFinite(v) ? Infinity : size(v))), [low, high] = range(shown.flat().filter((v) => v !== null));
    view.range = judged ? null : [low, high].map((v) => log ? 10 ** v : v);
    const top = judged ? 0 : high, bottom = judged ? -3 : low, over = (top - bottom) * 2e-3 || 1e-9;  // above the floor, or not finite: its own colour
    const names = view.rows.map(({ label }) => plain(label)), gap = [null, null];  // dotted as well, for those who see no orange
    const dotted = shown.flatMap((row, r) => [...row.flatMap((v, c) => v !== null && v > top ? [[x[c], names[r]], [x[c + 1], names[r]]] : [gap]), gap]);
    return [{ type: "heatmap", x, y: names, yaxis: "y2", showscale: false, zmin: bottom, zmax: top + over,
      z: shown.map((row) => row.map((v) => v === Infinity ? top + over : v)), customdata: z.map((row) => row.map((v) => v === null ? "" : number(v))),
      colorscale: [...scale.map(([at, c]) => [at * 0.9985, c]), [0.999, color.alarm], [1, color.alarm]], hoverongaps: false,
      hovertemplate: `%{y}, about step %{x:.0f}: %{customdata}${judged ? " of its floor" : ""}<extra></extra>` },
    { x: dotted.map(([at]) => at), y: dotted.map(([, name]) => name), yaxis: "y2", mode: "lines", hoverinfo: "skip", showlegend: false,
      line: { color: color.card, width: 2, dash: "2px,6px" } }];
  };

  const draw = (div, view, width) => {
    const color = Object.fromEntries(["ink", "soft", "line", "alarm", "band", "card"].map((name) => [name, css(`--${name}`)]));
    const { log, range: yrange } = extent(view), few = view.lines.length <= FEW, decades = yrange[1] - yrange[0], rows = view.rows.length > 1 ? view.rows.length : 0;
    const hover = "%{meta}, step %{x:d}: %{customdata:.4~g}<extra></extra>", top = log ? 10 ** yrange[1] : yrange[1], dash = "6px,4px";
    const drawn = ({ x, y }) => ({ x, y: log ? y.map((v) => v <= 0 ? 10 ** yrange[0] : v) : y, customdata: y });  // zero has no logarithm: the lower edge
    const line = (one, i) => ({ ...drawn(one), meta: plain(one.label), name: end(one.label, 40), hovertemplate: hover,
      mode: one.y.some((v, at) => Number.isFinite(v) && !Number.isFinite(one.y[at - 1]) && !Number.isFinite(one.y[at + 1])) ? "lines+markers" : "lines",
      marker: { size: 3 }, line: { color: one.color, width: one.width, dash: one.dash.map((px) => `${px}px`).join() || "solid" },
      showlegend: view.lines.length > 1 && (few || i === 0 || i === view.lines.length - 1) });
    const edge = (y, fill) => ({ x: view.band.x, y, mode: "lines", line: { width: 0 }, hoverinfo: "skip", name: "expected", showlegend: Boolean(fill),
      ...(fill && { fill: "tonexty", fillcolor: color.band }) });
    const traces = [...(view.band ? [edge(view.band.low), edge(view.band.high, true)] : []), ...view.lines.map(line),
      ...view.rules.map((rule, i) => ({ ...drawn(rule), mode: "lines", name: "floor", meta: "floor", hovertemplate: hover, showlegend: i === 0,
        line: { color: color.ink, width: 1.4, dash } })),
      ...(view.odd.length ? [{ x: view.odd.map(({ step }) => step), y: view.odd.map(() => top), mode: "markers", cliponaxis: false, name: "not finite",
        marker: { symbol: "x-thin", size: 8, line: { color: color.alarm, width: 2 } }, showlegend: true,
        text: view.odd.map(({ what, label }) => plain(`${what} ${label}`)), hovertemplate: "%{text}, step %{x:d}<extra></extra>" }] : []),
      ...(rows ? strip(view, log, color) : [])];
    const upright = (x, i, name, style) => ({ type: "line", x0: x, x1: x, y0: 0, y1: 1, yref: "paper", name, showlegend: i === 0, line: { color: color.alarm, ...style } });
    const shapes = [...view.bounds.map((y, i) => ({ type: "line", xref: "paper", x0: 0, x1: 1, y0: y, y1: y, name: "bound", showlegend: i === 0,
      line: { color: color.ink, width: 1.4, dash } })), ...view.marks.flatMap((mark, i) => [
      { type: "rect", x0: mark.low, x1: mark.high, y0: 0, y1: 1, yref: "paper", layer: "below", opacity: 0.13, fillcolor: color.alarm, line: { width: 0 } },
      upright(mark.step, i, "alarm heard", { width: 1.6 }), ...(mark.onset === mark.step ? [] : [upright(mark.onset, i, "began", { width: 1.6, dash: "dot" })])])];
    const cell = Math.min(14, Math.max(4, 190 / rows)), tall = rows ? 10 + rows * cell : 0, every = Math.ceil(11 / cell);
    const axis = { gridcolor: color.line, zeroline: false, linecolor: color.line, exponentformat: "power", tickfont: { color: color.soft } };
    const layout = { height: BODY + tall + 96, width, uirevision: `site ${view.site}`, hovermode: "closest", dragmode: matchMedia("(pointer: coarse)").matches ? false : "zoom",
      margin: { l: 54, r: 12, t: 12, b: 28 }, paper_bgcolor: "transparent", plot_bgcolor: "transparent", shapes,
      font: { family: "system-ui, sans-serif", size: 11, color: color.ink }, hoverlabel: { bgcolor: color.card, font: { color: color.ink } },
      legend: { orientation: "h", y: -28 / (BODY + tall), yanchor: "top", x: 0, font: { color: color.soft } },
      xaxis: { ...axis, anchor: rows ? "y2" : "y", tickformat: "~s" },
      yaxis: { ...axis, type: log ? "log" : "linear", range: yrange, domain: [tall / (BODY + tall), 1], ...(log && decades > 0.7 && { dtick: decades > 2 ? Math.ceil(decades / 5) : "D2" }) },
      ...(rows && { yaxis2: { type: "category", domain: [0, (tall - 10) / (BODY + tall)], autorange: "reversed", fixedrange: true, showgrid: false, tickfont: { size: 10, color: color.soft },
        tickvals: view.rows.map((_, i) => i).filter((i) => i % every === 0), ticktext: view.rows.map(({ label }) => end(label, 9)).filter((_, i) => i % every === 0) } }) };
    return Plotly.react(div, traces, layout, { displayModeBar: false, responsive: true });
  };

  return { draw, number, ramp, css, range };
})();
