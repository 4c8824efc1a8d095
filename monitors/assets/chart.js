"use strict";
// One figure on a canvas: lines over steps, and below them a strip with a row for each line, over the same steps.
//
// A view is {lines: [{label, x, y, color, width, dash}], rules: [{x, y}], bounds: [y], band: {x, low, high} or null,
// odd: [{step, what, label}], marks: [{step, onset, low, high}], rows: [{label, x, z, floor}], law, largest}.
// x are steps, rising; NaN is missing; a row's floor (a number, NaN: none) makes its cells shares of it.
const chart = (() => {
  const LEFT = 58, RIGHT = 10, TOP = 14, BODY = 168, BOTTOM = 22, GAP = 8, CELL = 2;
  const CIVIDIS = [[0, 34, 78], [18, 53, 112], [59, 73, 108], [87, 93, 109], [112, 113, 115], [138, 134, 120], [165, 156, 116],
    [195, 179, 105], [225, 204, 85], [254, 232, 56]];

  const ramp = (share) => {
    const at = Math.min(Math.max(share, 0), 1) * (CIVIDIS.length - 1), low = Math.min(Math.floor(at), CIVIDIS.length - 2);
    return `rgb(${CIVIDIS[low].map((c, i) => Math.round(c + (at - low) * (CIVIDIS[low + 1][i] - c))).join()})`;
  };
  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  const number = (value) => {
    if (!Number.isFinite(value)) return Number.isNaN(value) ? "none" : "not finite";
    const size = Math.abs(value);
    if (size !== 0 && (size < 1e-3 || size >= 1e6)) return value.toExponential(2).replace(/\.?0+e/, "e").replace("e+", "e");
    return String(Number(value.toPrecision(size >= 1000 ? 6 : 3)));
  };
  const steps = (value) => value >= 1e6 ? `${+(value / 1e6).toFixed(2)}M` : value >= 1e4 ? `${+(value / 1e3).toFixed(1)}k` : String(value);

  const nearest = (x, step) => {  // position of the sample nearest to a step
    let low = 0, high = x.length - 1;
    while (high - low > 1) { const middle = (low + high) >> 1; if (x[middle] <= step) low = middle; else high = middle; }
    return high > low && Math.abs(x[high] - step) < Math.abs(x[low] - step) ? high : low;
  };

  const ticks = (low, high, count) => {
    const rough = (high - low) / count, unit = 10 ** Math.floor(Math.log10(rough));
    const size = [1, 2, 5, 10].find((m) => m * unit >= rough) * unit, found = [];
    for (let at = Math.ceil(low / size) * size; at <= high + size * 1e-9; at += size) found.push(Math.abs(at) < size / 1e6 ? 0 : at);
    return found;
  };
  const logTicks = (low, high) => {
    const decades = Math.floor(Math.log10(high)) - Math.ceil(Math.log10(low)) + 1, found = [];
    const every = Math.max(1, Math.ceil(decades / 5)), within = decades < 2 ? [1, 2, 5] : [1];
    for (let d = Math.floor(Math.log10(low)); d <= Math.ceil(Math.log10(high)); d++)
      if (d % every === 0) for (const m of within) { const at = m * 10 ** d; if (at >= low && at <= high) found.push(at); }
    return found;
  };

  // The range of steps, the range of values, and whether the axis is logarithmic.
  const extent = (view) => {
    let first = Infinity, last = -Infinity, low = Infinity, high = -Infinity, least = Infinity;
    for (const { x } of [...view.lines, ...view.rows])
      if (x.length) { first = Math.min(first, x[0]); last = Math.max(last, x[x.length - 1]); }
    const take = (v) => {
      if (!Number.isFinite(v)) return;
      if (v < low) low = v;
      if (v > high) high = v;
      if (v > 0 && v < least) least = v;
    };
    for (const { y } of view.lines) y.forEach(take);
    const own = high - low;  // a band that is far wider than its series must not flatten it
    if (view.band) for (const v of [...view.band.low, ...view.band.high]) if (v > low - own && v < high + own) take(v);
    view.rules.forEach(({ y }) => y.forEach(take));
    view.bounds.forEach(take);
    if (low > high) [low, high, least] = [0, 1, 1];
    const log = view.law ? least < Infinity && low >= 0 : low > 0 && high / low > 30;
    if (log) [low, high] = [Math.max(least, high * 1e-9) / 1.3, high * 1.3];
    else { const pad = (high - low) * 0.06 || Math.abs(high) * 0.1 || 1; [low, high] = [low - pad, high + pad]; }
    return { first, last: last > first ? last : first + 1, low, high, log };
  };

  const height = (view) => TOP + BODY + (view.rows.length > 1 ? GAP + rowHeight(view) * view.rows.length : 0) + BOTTOM;
  const rowHeight = (view) => Math.min(14, Math.max(3, Math.floor(190 / view.rows.length)));

  const draw = (canvas, view, cursor) => {
    const scale = window.devicePixelRatio || 1, width = canvas.clientWidth, tall = height(view);
    canvas.style.height = `${tall}px`;
    canvas.width = Math.round(width * scale);
    canvas.height = Math.round(tall * scale);
    const g = canvas.getContext("2d"), e = extent(view), bottom = TOP + BODY, right = Math.max(width - RIGHT, LEFT + 20);
    const colors = { ink: css("--ink"), soft: css("--soft"), line: css("--line"), alarm: css("--alarm"), band: css("--band"), card: css("--card") };
    const X = (step) => LEFT + (step - e.first) / (e.last - e.first) * (right - LEFT);
    const Y = e.log ? (v) => bottom - Math.log(Math.max(v, e.low) / e.low) / Math.log(e.high / e.low) * BODY
      : (v) => bottom - (v - e.low) / (e.high - e.low) * BODY;
    const strip = view.rows.length > 1 ? bottom + GAP : bottom, cell = rowHeight(view);
    const floor = view.rows.length > 1 ? strip + cell * view.rows.length : bottom;
    canvas.geometry = { e, X, Y, LEFT, right, bottom, strip, cell, step: (px) => e.first + (px - LEFT) / (right - LEFT) * (e.last - e.first) };
    g.scale(scale, scale);
    g.font = "11px system-ui, sans-serif";
    g.textBaseline = "middle";

    const path = (x, y, color, size, dash) => {
      g.strokeStyle = g.fillStyle = color; g.lineWidth = size; g.setLineDash(dash || []); g.lineJoin = "bevel"; g.beginPath();
      let open = false;
      for (let i = 0; i < x.length; i++) {
        const there = Number.isFinite(y[i]);
        if (there && open) g.lineTo(X(x[i]), Y(y[i]));
        else if (there) {
          g.moveTo(X(x[i]), Y(y[i]));
          if (!Number.isFinite(y[i + 1])) g.rect(X(x[i]) - 1, Y(y[i]) - 1, 2, 2);  // a sample alone
        }
        open = there;
        if (i % 48 === 47 && open && size < 2) { g.stroke(); g.beginPath(); g.moveTo(X(x[i]), Y(y[i])); }  // long paths are painted slowly
      }
      g.stroke(); g.setLineDash([]);
    };

    g.strokeStyle = colors.line; g.fillStyle = colors.soft; g.lineWidth = 1; g.textAlign = "right";
    for (const tick of e.log ? logTicks(e.low, e.high) : ticks(e.low, e.high, 4)) {
      g.beginPath(); g.moveTo(LEFT, Y(tick)); g.lineTo(right, Y(tick)); g.stroke();
      g.fillText(number(tick), LEFT - 6, Y(tick));
    }
    g.textAlign = "center";
    for (const tick of ticks(e.first, e.last, width < 420 ? 3 : 5).filter(Number.isInteger)) {
      g.beginPath(); g.moveTo(X(tick), TOP); g.lineTo(X(tick), bottom); g.stroke();
      g.fillText(steps(tick), Math.min(Math.max(X(tick), LEFT + 8), right - 10), floor + BOTTOM / 2 + 1);
    }

    g.save();
    g.beginPath(); g.rect(LEFT - 2, TOP - 2, right - LEFT + 4, BODY + 4); g.clip();
    if (view.band) {
      const { x, low, high } = view.band;
      g.fillStyle = colors.band;
      for (let i = 0; i + 1 < x.length; i++) {
        if (!Number.isFinite(low[i] + high[i] + low[i + 1] + high[i + 1])) continue;
        g.beginPath(); g.moveTo(X(x[i]), Y(low[i])); g.lineTo(X(x[i]), Y(high[i]));
        g.lineTo(X(x[i + 1]) + 0.3, Y(high[i + 1])); g.lineTo(X(x[i + 1]) + 0.3, Y(low[i + 1])); g.fill();
      }
    }
    for (const mark of view.marks) {
      g.fillStyle = colors.alarm; g.globalAlpha = 0.13;
      if (mark.low < mark.high) g.fillRect(X(mark.low), TOP, Math.max(X(mark.high) - X(mark.low), 1), BODY);
      g.globalAlpha = 1;
    }
    for (const line of view.lines) path(line.x, line.y, line.color, line.width, line.dash);
    for (const { x, y } of view.rules) path(x, y, colors.ink, 1.4, [6, 4]);
    for (const bound of view.bounds) path([e.first, e.last], [bound, bound], colors.ink, 1.4, [6, 4]);
    g.restore();

    for (const mark of view.marks) {
      g.strokeStyle = g.fillStyle = colors.alarm; g.lineWidth = 1.6;
      g.beginPath(); g.moveTo(X(mark.step), TOP - 2); g.lineTo(X(mark.step), floor); g.stroke();
      g.beginPath(); g.moveTo(X(mark.step) - 5, TOP - 10); g.lineTo(X(mark.step) + 5, TOP - 10); g.lineTo(X(mark.step), TOP - 2); g.fill();
      if (mark.onset !== mark.step) {
        g.setLineDash([2, 3]); g.beginPath(); g.moveTo(X(mark.onset), TOP - 2); g.lineTo(X(mark.onset), floor); g.stroke(); g.setLineDash([]);
      }
    }
    for (const { step } of view.odd) {  // crosses on the upper edge: there is no height for what is not finite
      const at = X(step);
      g.strokeStyle = colors.alarm; g.lineWidth = 2; g.beginPath();
      g.moveTo(at - 3, TOP + 1); g.lineTo(at + 3, TOP + 7); g.moveTo(at + 3, TOP + 1); g.lineTo(at - 3, TOP + 7); g.stroke();
    }
    if (view.rows.length > 1) cells(g, view, e, { X, right, strip, cell, colors });

    if (cursor) {
      const { step, line } = cursor, one = view.lines[line], at = one ? nearest(one.x, step) : -1;
      g.strokeStyle = colors.ink; g.lineWidth = 1; g.globalAlpha = 0.5;
      g.beginPath(); g.moveTo(X(step), TOP); g.lineTo(X(step), floor); g.stroke(); g.globalAlpha = 1;
      if (at >= 0 && Number.isFinite(one.y[at])) {
        g.fillStyle = one.color; g.strokeStyle = colors.card; g.lineWidth = 2;
        g.beginPath(); g.arc(X(one.x[at]), Y(one.y[at]), 4.5, 0, 7); g.fill(); g.stroke();
      }
      if (view.rows.length > 1 && view.rows[line]) {
        g.strokeStyle = colors.ink; g.strokeRect(LEFT + 0.5, strip + line * cell + 0.5, right - LEFT - 1, cell - 1);
      }
    }
  };

  // What a row shows in each pixel column: the largest, or the mean, of the samples there; a sample lasts until the next one.
  const columns = (row, X, wide, largest) => {
    const total = new Float64Array(wide), count = new Float64Array(wide);
    const widths = Array.from(row.x).slice(1).map((step, i) => X(step) - X(row.x[i])).sort((a, b) => a - b);
    const usual = widths.length ? widths[widths.length >> 1] * 3 + 1 : 6;
    for (let i = 0; i < row.x.length; i++) {
      const value = row.z[i];
      if (Number.isNaN(value)) continue;
      const from = Math.max(Math.floor(X(row.x[i]) - LEFT), 0), next = i + 1 < row.x.length ? X(row.x[i + 1]) : X(row.x[i]) + usual / 3;
      const to = Math.min(Math.max(Math.ceil(Math.min(next, X(row.x[i]) + usual) - LEFT), from + 1), wide);
      for (let c = from; c < to; c++) {
        if (largest) total[c] = count[c] ? (Math.abs(value) > Math.abs(total[c]) ? value : total[c]) : value;
        else total[c] += value;
        count[c]++;
      }
    }
    return total.map((sum, c) => count[c] ? (largest ? sum : sum / count[c]) : NaN);
  };

  const cells = (g, view, e, { X, right, strip, cell, colors }) => {
    const wide = Math.floor(right - LEFT), rows = view.rows.map((row) => columns(row, X, wide, view.largest));
    const judged = view.rows.some((row) => row.floor > 0);
    const place = view.range = { low: Infinity, high: -Infinity };
    if (!judged) for (const row of rows) for (const v of row) if (Number.isFinite(v)) { place.low = Math.min(place.low, v); place.high = Math.max(place.high, v); }
    const spread = e.log ? Math.log(place.high / place.low) : place.high - place.low;
    const share = (v, floor) => judged ? 1 + Math.log10(Math.max(v / floor, 1e-3)) / 3
      : !(spread > 0) ? 0.5 : (e.log ? Math.log(Math.max(v, place.low) / place.low) : v - place.low) / spread;
    rows.forEach((row, r) => {
      const top = strip + r * cell, deep = cell > 5 ? cell - 1 : cell, floor = view.rows[r].floor;
      for (let c = 0; c < wide; c++) {
        const v = row[c];
        if (Number.isNaN(v) || (judged && !(floor > 0))) continue;
        const out = !Number.isFinite(v) || (judged && v > floor);
        g.fillStyle = out ? colors.alarm : ramp(share(v, floor));
        g.fillRect(LEFT + c, top, 1, deep);
        if (out && c % 6 < deep) { g.fillStyle = colors.card; g.fillRect(LEFT + c, top + deep - 1 - (c % 6), 1, CELL); }  // hatched
      }
    });
    g.fillStyle = colors.soft; g.textAlign = "right"; g.font = "10px system-ui, sans-serif";
    const every = Math.ceil(11 / cell);
    view.rows.forEach((row, r) => { if (r % every === 0) g.fillText(fit(g, row.label, LEFT - 8), LEFT - 6, strip + r * cell + cell / 2); });
  };

  const fit = (g, text, room) => {  // the end of a label tells more than its beginning
    let shown = text;
    while (shown.length > 2 && g.measureText(shown).width > room) shown = `…${shown.slice(2)}`;
    return shown;
  };

  // The step and the line under a point of the canvas.
  const under = (canvas, view, px, py) => {
    const geometry = canvas.geometry, step = geometry.step(px);
    if (view.rows.length > 1 && py >= geometry.strip) {
      const line = Math.min(Math.max(Math.floor((py - geometry.strip) / geometry.cell), 0), view.rows.length - 1);
      return { line, step: sample(view, line, step) };
    }
    let best = 0, distance = Infinity;
    view.lines.forEach(({ x, y }, i) => {
      if (!x.length) return;
      const off = Math.abs(geometry.Y(y[nearest(x, step)]) - py);
      if (off < distance) [best, distance] = [i, off];
    });
    return { line: best, step: sample(view, best, step) };
  };
  const sample = (view, line, step) => { const one = view.lines[line]; return one && one.x.length ? one.x[nearest(one.x, step)] : Math.round(step); };

  return { draw, under, nearest, number, ramp, css };
})();
