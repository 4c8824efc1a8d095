"use strict";
// The page's figures, the choice of sites, links that jump to figures, colours, and, where it is served live, what changed.
(() => {
  const ALL = -1, FEW = 6, PAPER = 640, WHOLE = ["run/loss", "optim/lr"];
  const DASHES = [[], [], [], [7, 3], [7, 3], [2, 2]];
  let data, decoded, bySeries, metricOf, panels = [];

  const load = () => {
    data = JSON.parse(document.getElementById("data").textContent);
    decoded = new Map();
    metricOf = new Map(data.metrics.map((metric, i) => [metric.name, i]));
    bySeries = data.metrics.map(() => []);
    for (const series of data.series) bySeries[series.m].push(series);
  };

  const array = (index) => {
    if (decoded.has(index)) return decoded.get(index);
    const text = data.arrays[index], bytes = Uint8Array.from(atob(text.slice(1)), (c) => c.charCodeAt(0));
    let found;
    if (text[0] === "i") found = new Int32Array(bytes.buffer);
    else if (text[0] === "f") found = new Float32Array(bytes.buffer);
    else found = new Float32Array(Uint32Array.from(new Uint16Array(bytes.buffer), (half) => half << 16).buffer);
    decoded.set(index, found);
    return found;
  };

  const make = (tag, properties = {}, ...children) => {
    const element = Object.assign(document.createElement(tag), properties);
    element.append(...children);
    return element;
  };

  // Where labels differ in one place alone, that place.
  const shorten = (labels) => {
    const parts = labels.map((label) => label.split("."));
    if (labels.length < 2 || new Set(parts.map((part) => part.length)).size > 1) return labels;
    const varying = parts[0].map((_, i) => i).filter((i) => new Set(parts.map((part) => part[i])).size > 1);
    return varying.length === 1 ? parts.map((part) => part[varying[0]]) : labels;
  };

  const color = (i, count) => {
    if (count <= FEW) return chart.css(`--c${i}`);
    const dark = getComputedStyle(document.documentElement).colorScheme === "dark";
    return chart.ramp((dark ? 0.3 : 0.02) + 0.7 * i / (count - 1));
  };

  const headName = (metric, i) => Array.isArray(metric.heads) ? metric.heads[i] || `entry ${i}` : `${metric.heads} ${i}`;

  const floorOf = (series) => "floor" in series ? { x: array(series.x), y: array(series.floor) } : null;

  const curve = (series, label, i, count) =>
    ({ label, x: array(series.x), y: array(series.y), color: color(i, count), width: 1.5, dash: count <= FEW ? DASHES[i] : [],
      floor: floorOf(series) });

  const corners = (x, y) => {  // a line without the samples that its neighbours equal
    const kept = Array.from(x.keys()).filter((i) => i === 0 || i === x.length - 1 || y[i] !== y[i - 1] || y[i] !== y[i + 1]);
    return { x: kept.map((i) => x[i]), y: kept.map((i) => y[i]) };
  };

  const ofAll = (metric, all) => {
    const labels = all.map((series) => series.s < 0 ? "the run" : data.sites[series.s]), short = shorten(labels);
    const lines = all.map((series, i) => curve(series, labels[i], i, all.length));
    const floors = new Map(all.filter((series) => "floor" in series).map((series) => {
      const one = corners(array(series.x), array(series.floor));
      return [`${one.x} ${one.y}`, one];  // most sites have the same
    }));
    return {
      lines, rules: [...floors.values()], bounds: [...new Set(all.flatMap((series) => series.bounds || []))],
      band: all.length === 1 ? band(all[0]) : null,
      rows: all.map((series, i) => {
        const y = array(series.y), floor = "floor" in series ? array(series.floor) : null;
        return { label: short[i], x: array(series.x), z: floor ? y.map((v, at) => v / floor[at]) : y, floor: floor ? 1 : NaN };
      }),
      odd: all.flatMap((series, i) => series.odd.map(([step, what]) => ({ step, what, label: labels[i] }))),
    };
  };

  const ofOne = (metric, series, head) => {
    const own = curve(series, series.width > 1 ? `${metric.fold} of ${series.width}` : series.s < 0 ? "the run" : data.sites[series.s], 0, 1);
    const floor = "floor" in series ? array(series.floor) : null;
    const view = {
      lines: [own], rules: floor ? [corners(own.x, floor)] : [], bounds: series.bounds || [], band: band(series), rows: [],
      odd: series.odd.map(([step, what]) => ({ step, what, label: "" })),
    };
    if (!series.heads) return view;
    const x = array(series.heads.x), z = array(series.heads.z), count = series.width, length = x.length;
    const heads = Array.from({ length: count }, (_, i) => z.subarray(i * length, (i + 1) * length));
    const thin = { ...own, color: chart.css("--ink"), width: 1.2, dash: [1, 2] };
    view.lines = heads.map((y, i) => ({ label: headName(metric, i), x, y, color: color(i, count), width: i === head ? 2.6 : 1.3,
      dash: count <= FEW ? DASHES[i] : [], floor: own.floor }));
    view.rows = heads.map((y, i) => row(headName(metric, i).replace(/^.* /, ""), x, y, series.heads.pairs, metric, floor, own.x));
    if (metric.fold === "mean") view.lines.push(thin);
    return view;
  };

  const nearest = (x, step) => {  // position of the sample nearest to a step
    let low = 0, high = x.length - 1;
    while (high - low > 1) { const middle = (low + high) >> 1; if (x[middle] <= step) low = middle; else high = middle; }
    return high > low && Math.abs(x[high] - step) < Math.abs(x[low] - step) ? high : low;
  };

  const row = (label, x, y, pairs, metric, floor, at) => {
    const largest = metric.fold !== "mean";
    let z = y, steps = x;
    if (pairs) {  // the lowest and the highest of each stretch: one cell
      steps = x.filter((_, i) => i % 2 === 0);
      z = Float32Array.from(steps, (_, i) => {
        const [low, high] = [y[2 * i], y[2 * i + 1]];
        return !largest ? (low + high) / 2 : Math.abs(low) > Math.abs(high) ? low : high;
      });
    }
    return floor ? { label, x: steps, z: z.map((v, i) => v / floor[nearest(at, steps[i])]), floor: 1 } : { label, x: steps, z, floor: NaN };
  };

  const band = (series) => series.band ? { x: array(series.band[0]), low: array(series.band[1]), high: array(series.band[2]) } : null;

  const marks = (metric, site) => data.alarms.filter((alarm) =>
    WHOLE.includes(metric.name) || (site === ALL ? alarm.metric === metric.name : alarm.site === site || alarm.site < 0)).slice(0, 12);

  class Panel {
    constructor(figure, kept = {}) {
      this.figure = figure;
      this.metric = data.metrics[metricOf.get(figure.dataset.metric)];
      this.all = this.metric ? bySeries[metricOf.get(figure.dataset.metric)] : [];
      this.chosen = kept.site ?? Number(figure.dataset.site);
      this.plot = kept.plot;  // one that was drawn on the page before: where it is zoomed in, it stays so
      this.built = false;
    }

    get site() {
      return this.all.some((series) => series.s === this.chosen) ? this.chosen : this.all.length === 1 ? this.all[0].s : ALL;
    }

    build() {
      if (this.built) return;
      this.built = true;
      if (!this.all.length) { this.figure.append(make("p", { className: "soft", textContent: "Nothing of it was recorded." })); return; }
      const controls = make("div", { className: "controls" });
      if (this.all.length > 1) {
        this.select = make("select", {}, make("option", { value: ALL, textContent: `all ${this.all.length} sites` }),
          ...this.all.map((series) => make("option", { value: series.s, textContent: series.s < 0 ? "the run" : data.sites[series.s] })));
        this.select.addEventListener("change", () => this.choose(Number(this.select.value)));
        controls.append(make("label", {}, "Site ", this.select));
      }
      this.plot ??= make("div", { className: "plot" });
      this.plot.setAttribute("role", "img");
      this.readout = make("p", { className: "readout" });
      this.table = make("details", { className: "numbers" }, make("summary", { textContent: "Numbers" }));
      this.table.addEventListener("toggle", () => this.fill());
      this.figure.append(controls, this.plot, this.readout, this.table);
      this.choose(this.site);
    }

    choose(site) {
      this.chosen = site;
      if (!this.built) { this.build(); return; }
      if (this.select) this.select.value = this.site;
      this.draw();
      this.fill();
    }

    look() {  // what is to be drawn, with the colours as they are now
      const { metric, site } = this, one = this.all.find((series) => series.s === site);
      const head = (data.alarms.find((alarm) => alarm.site === site && alarm.metric === metric.name) || { head: -1 }).head;
      const view = one && (site !== ALL || this.all.length === 1) ? ofOne(metric, one, head) : ofAll(metric, this.all);
      return { ...view, marks: marks(metric, site), law: metric.law, largest: metric.fold !== "mean", site };
    }

    draw(width) {
      if (!this.readout) return;
      this.view = this.look();
      chart.draw(this.plot, this.view, width);
      const { metric, view } = this, [low, high] = chart.range(view.lines.flatMap(({ y }) => Array.from(y)));
      const where = this.site === ALL ? `${this.all.length} sites` : this.site < 0 ? "the run" : data.sites[this.site];
      this.plot.setAttribute("aria-label", `${metric.name}, ${where}: ${view.lines.length} lines, from ${chart.number(low)} to ${chart.number(high)}.`);
      this.readout.textContent = [this.last(), ...this.notes()].join(" ");
    }

    notes() {
      const { view, metric } = this, one = this.all.find((series) => series.s === this.site), found = [];
      if (this.site === ALL && this.all.some((series) => series.width > 1))
        found.push(`Each line: the ${metric.fold} of its ${Array.isArray(metric.heads) ? "parts" : `${metric.heads}s`}.`);
      if (view.odd.length) found.push(`✕ not finite at ${view.odd.length} step${view.odd.length > 1 ? "s" : ""}.`);
      if (view.rows.length > 1 && view.rules.length) found.push("Strip: dark 1/1000 of the floor to bright at it; orange and dotted above it.");
      else if (view.rows.length > 1 && view.range[0] < view.range[1])
        found.push(`Strip: dark ${chart.number(view.range[0])} to bright ${chart.number(view.range[1])}.`);
      if (one && one.width > 1 && !one.heads) found.push(`Its ${one.width} parts are too many for this page.`);
      return found;
    }

    worst() {  // the line to speak of: the one with an alarm, or a law's nearest to its floor
      const { metric, site } = this, alarm = data.alarms.find((one) => one.metric === metric.name && (site === ALL || one.site === site));
      if (alarm && site !== ALL) return alarm.head >= 0 && this.view.rows.length ? alarm.head : 0;
      if (alarm) return Math.max(this.all.findIndex((series) => series.s === alarm.site), 0);
      const last = this.view.rows.map(({ z, floor }) => floor > 0 ? z[z.length - 1] : 0);
      return last.length ? last.indexOf(Math.max(...last.map((v) => v || 0))) : 0;
    }

    last() {
      const { lines, odd } = this.view, one = lines[this.worst()], at = one ? one.x.length - 1 : -1;
      if (at < 0) return "No sample.";
      const strange = odd.find(({ step }) => step === one.x[at]), limit = one.floor && one.floor.y[nearest(one.floor.x, one.x[at])];
      const value = strange ? `${strange.what} ${strange.label}` : chart.number(one.y[at]);
      return `Last, at step ${one.x[at]}: ${value}${limit ? `, floor ${chart.number(limit)}` : ""} (${one.label}).`;
    }

    fill() {
      if (!this.table || !this.table.open || !this.view) return;
      const cells = (tag, texts) => make("tr", {}, ...texts.map((text) => make(tag, { textContent: text, className: "number" })));
      const rows = this.view.lines.map(({ label, y }) => {
        const [low, high] = chart.range(Array.from(y));
        return cells("td", [label, ...(low > high ? ["none", "none", "none"] : [y[y.length - 1], low, high].map(chart.number))]);
      });
      this.table.querySelector("table")?.remove();
      this.table.append(make("table", {}, make("thead", {}, cells("th", ["", "last", "smallest", "largest"])), make("tbody", {}, ...rows)));
    }
  }

  const waiting = [];  // figures that have come near, built one a frame so that the page never stands still
  const seen = new IntersectionObserver((entries) => {
    if (!waiting.length) requestAnimationFrame(next);
    for (const { target, isIntersecting } of entries) if (isIntersecting) { waiting.push(target); seen.unobserve(target); }
  }, { rootMargin: "400px" });
  const next = () => { waiting.shift()?.panel.build(); if (waiting.length) requestAnimationFrame(next); };

  const start = (kept = {}) => {
    load();
    panels = Array.from(document.querySelectorAll("figure.panel"), (figure) => {
      figure.panel = new Panel(figure, kept[figure.id]);
      seen.observe(figure);
      return figure.panel;
    });
  };
  const redraw = (width) => panels.forEach((panel) => panel.draw(width));

  // A link to a figure opens what it is folded into, and shows the site that the link is about.
  const reveal = (id, site) => {
    const target = id && document.getElementById(id);
    if (!target) return;
    for (let at = target.parentElement; at; at = at.parentElement) if (at.tagName === "DETAILS") at.open = true;
    if (target.panel && site !== undefined) target.panel.choose(Number(site));
    target.scrollIntoView();
    const inner = target.panel ? (target.panel.build(), target.panel.select || target) : target;
    if (inner) inner.focus({ preventScroll: true });
  };
  document.addEventListener("click", (event) => {
    const link = event.target.closest('a[href^="#"]');
    if (!link) return;
    event.preventDefault();
    history.replaceState(null, "", link.hash);
    reveal(link.hash.slice(1), link.dataset.site);
  });

  const theme = document.getElementById("theme"), paint = (name, width) => {
    if (name) document.documentElement.dataset.theme = name; else delete document.documentElement.dataset.theme;
    redraw(width);
  };
  const kept = () => { try { return localStorage.getItem("foreshock-theme") || ""; } catch { return ""; } };
  theme.value = kept();
  theme.addEventListener("change", () => {
    try { localStorage.setItem("foreshock-theme", theme.value); } catch { /* a page that may keep nothing */ }
    paint(theme.value);
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => redraw());
  addEventListener("beforeprint", () => { panels.slice(0, 12).forEach((panel) => panel.build()); paint("light", PAPER); });
  addEventListener("afterprint", () => paint(theme.value));

  paint(theme.value);
  start();
  reveal(decodeURIComponent(location.hash.slice(1)));

  // Served live: ask for the run's version, and take over a new page where the reader is.
  let version = document.body.dataset.version;
  const swap = (page) => {
    const fresh = new DOMParser().parseFromString(page, "text/html");
    const shown = (element) => element.getClientRects().length && element.getBoundingClientRect().top >= 0;
    const anchor = Array.from(document.querySelectorAll("#content [id]")).find(shown);
    const [place, top, focus] = [anchor?.id, anchor?.getBoundingClientRect().top, document.activeElement];
    const open = Array.from(document.querySelectorAll("details[id][open]"), ({ id }) => id);
    const built = panels.filter((panel) => panel.built);
    const kept = Object.fromEntries(panels.map((panel) => [panel.figure.id, { site: panel.chosen, plot: panel.plot }]));
    const numbers = built.filter((panel) => panel.table?.open).map((panel) => panel.figure.id);
    const held = focus?.closest("figure.panel")?.id, heldBy = focus?.tagName;
    seen.disconnect();
    document.title = fresh.title;
    for (const id of ["content", "data"]) document.getElementById(id).replaceWith(document.adoptNode(fresh.getElementById(id)));
    open.forEach((id) => { const details = document.getElementById(id); if (details) details.open = true; });
    start(kept);
    built.forEach(({ figure, plot }) => {
      const same = document.getElementById(figure.id)?.panel;
      if (same) same.build(); else if (plot) Plotly.purge(plot);
    });
    numbers.forEach((id) => { const panel = document.getElementById(id)?.panel; if (panel?.table) { panel.table.open = true; panel.fill(); } });
    if (held) document.getElementById(held)?.querySelector(heldBy)?.focus({ preventScroll: true });
    const now = place && document.getElementById(place);
    if (now) scrollBy({ top: now.getBoundingClientRect().top - top, behavior: "instant" });
  };
  const live = async () => {
    try {
      const told = await (await fetch("changes", { cache: "no-store" })).json();
      if (told.version !== version) {
        swap(await (await fetch("/", { cache: "no-store" })).text());
        version = told.version;
      }
    } catch { document.getElementById("facts").textContent = "The server has ended; this is the last that it told."; return; }
    setTimeout(live, 2000);
  };
  if (version) setTimeout(live, 2000);
})();
