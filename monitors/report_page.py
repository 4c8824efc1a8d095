"""The page of a report: its style and its template. Everything from a run passes through autoescape."""

from __future__ import annotations

STYLE = """
:root { color-scheme: light dark; --page:#f6f7f9; --card:#fff; --ink:#1b1f24; --soft:#5b6470; --line:#e2e5ea;
  --good:#1a7f45; --warn:#9a6700; --bad:#cf222e; --tint:#eef1f5; }
@media (prefers-color-scheme: dark) { :root { --page:#0f1216; --card:#181c22; --ink:#e6e9ee; --soft:#98a2b0;
  --line:#2a303a; --good:#3fb96b; --warn:#d9a520; --bad:#ff6b70; --tint:#212730; } }
* { box-sizing: border-box; }
body { margin:0; background:var(--page); color:var(--ink); font:15px/1.5 system-ui, sans-serif; }
main { max-width:1180px; margin:0 auto; padding:28px 16px 64px; }
h1 { font-size:1.5rem; margin:0 0 2px; overflow-wrap:anywhere; }
h2 { font-size:1.15rem; margin:36px 0 12px; }
h3 { font-size:.95rem; margin:0; font-weight:600; overflow-wrap:anywhere; }
p { margin:4px 0; }
.soft, .meaning { color:var(--soft); }
.meaning { font-size:.82rem; margin:2px 0 6px; }
.card { background:var(--card); border:1px solid var(--line); border-radius:10px; padding:14px 16px; min-width:0; }
.verdict { border-left:6px solid var(--good); margin:16px 0; }
.verdict b { font-size:1.15rem; }
.warning { border-left-color:var(--warn); } .critical { border-left-color:var(--bad); }
.tiles { display:grid; grid-template-columns:repeat(auto-fit, minmax(130px, 1fr)); gap:10px; }
.tiles b { display:block; font-size:1.25rem; font-variant-numeric:tabular-nums; overflow-wrap:anywhere; }
.grid { display:grid; grid-template-columns:repeat(auto-fill, minmax(min(100%, 430px), 1fr)); gap:12px; }
.alarm { border-left:5px solid var(--warn); margin-bottom:10px; overflow-wrap:anywhere; }
.more { margin-top:10px; }
.alarm.critical { border-left-color:var(--bad); }
.chip { display:inline-block; border-radius:99px; padding:0 9px; font-size:.75rem; font-weight:600; background:var(--tint);
  color:var(--warn); margin-right:6px; }
.critical .chip { color:var(--bad); }
ul { margin:4px 0; padding-left:20px; }
.scroll { overflow-x:auto; }
table { border-collapse:collapse; width:100%; font-size:.85rem; }
th, td { text-align:left; vertical-align:top; padding:6px 10px 6px 0; border-bottom:1px solid var(--line); }
th { color:var(--soft); font-weight:600; white-space:nowrap; }
td.number { font-variant-numeric:tabular-nums; text-align:right; }
td.name { overflow-wrap:anywhere; min-width:9em; }
summary { cursor:pointer; margin:8px 0; }
code { background:var(--tint); border-radius:4px; padding:1px 5px; }
.js-plotly-plot text { fill:var(--soft) !important; }
.js-plotly-plot .hovertext text { fill:#fff !important; }
footer { margin-top:40px; color:var(--soft); font-size:.82rem; }
"""

MACROS = """{% macro card(a) -%}
<div class="card alarm {{ a.alarm.severity }}">
  <span class="chip">{{ a.alarm.severity }}</span><b>{{ a.alarm.mechanism }}</b>
  <span class="soft">at {{ a.where }}, step {{ a.alarm.step }}
  {%- if a.alarm.onset != a.alarm.step %}, {{ a.alarm.since }}{% endif %}</span>
  <p>{{ a.alarm.message }}</p>
  <p class="soft"><code>{{ a.alarm.metric }}</code> was {{ "%.4g"|format(a.alarm.value) }},
    expected {{ a.alarm.expected }}</p>
  {% if a.evidence %}<ul class="soft">{% for text in a.evidence %}<li>{{ text }}</li>{% endfor %}</ul>{% endif %}
  {% if a.advice %}<p><b>What to do:</b> {{ a.advice }}</p>{% endif %}
</div>
{%- endmacro %}
{% macro grid(panels) -%}
<div class="grid">{% for panel in panels %}
  <div class="card"><h3>{{ panel.title }}</h3><p class="meaning">{{ panel.meaning }}</p>{{ panel.html }}</div>
{% endfor %}</div>
{%- endmacro %}
"""

PAGE = (
    MACROS
    + """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>foreshock: {{ name }}</title><style>{{ style }}</style><script>{{ plotly }}</script></head><body><main>
<h1>{{ name }}</h1><div class="soft">foreshock report</div>
<div class="card verdict {{ verdict.level }}"><b>{{ verdict.title }}</b>
  {% for text in verdict.lines %}<p>{{ text }}</p>{% endfor %}</div>
<div class="tiles">{% for label, value in tiles %}
  <div class="card"><span class="soft">{{ label }}</span><b>{{ value }}</b></div>{% endfor %}</div>

{% if alarms %}<h2>Alarms</h2>
{% for a in alarms[:shown] %}{{ card(a) }}{% endfor %}
{% if alarms|length > shown %}<details><summary>{{ alarms|length - shown }} more</summary>
{% for a in alarms[shown:] %}{{ card(a) }}{% endfor %}</details>{% endif %}{% endif %}

{% if loss %}<h2>Loss</h2>
<div class="card"><p class="meaning">Solid red: an alarm was heard. Dotted red: where it began.</p>{{ loss }}</div>{% endif %}

{% if heatmaps %}<h2>Where and when</h2>
<p class="soft">Each row is a site, in the order of the model; steps run to the right.</p>{{ grid(heatmaps) }}{% endif %}

{% for family, panels in families %}
<h2>{{ family|capitalize }}</h2>
<p class="soft">One line per site, from blue at the first to red at the last; dotted is the largest head or expert,
  solid the mean.</p>
{{ grid(panels) }}{% endfor %}

<h2>Coverage</h2>
{% if statuses %}<div class="card scroll"><table>
<thead><tr><th>site</th><th>kind</th><th>form</th>
  <th>shape</th><th>weights</th><th>evaluations</th><th>sampled</th><th>laws that hold</th>
  <th>notes</th></tr></thead>
<tbody>{% for s in statuses %}<tr>
  <td class="name">{{ s.name }}</td><td>{{ s.kind }}</td><td>{{ s.form }}</td>
  <td>{{ s.shape }}</td><td class="name">{{ s.weights }}</td>
  <td class="number">{{ s.evaluations }}</td><td class="number">{{ s.sampled }}</td>
  <td>{{ s.holding }}{% for law, reason in s.failing %}<br><span class="soft">not {{ law }}: {{ reason }}</span>{% endfor %}</td>
  <td>{% for note in s.notes %}{{ note }}<br>{% endfor %}</td></tr>{% endfor %}
</tbody></table></div>
{% else %}<p class="soft">No site was found. Is the model compiled with the foreshock backend, and has it run a step?</p>{% endif %}
{% for title, texts in coverage_lines %}
<div class="card more"><h3>{{ title }}</h3><ul>{% for text in texts %}<li>{{ text }}</li>{% endfor %}</ul></div>{% endfor %}

{% for title, rows in tables %}<h2>{{ title }}</h2><div class="card scroll"><table><tbody>
{% for key, value in rows %}<tr><th>{{ key }}</th><td class="name">{{ value }}</td></tr>{% endfor %}
</tbody></table></div>{% endfor %}
<footer>Written by foreshock from {{ path }}. This page needs no network.</footer>
</main></body></html>
"""
)
