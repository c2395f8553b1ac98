"""The look and the behaviour of a report's page: its style sheet and its script."""

CSS = """
:root {
  --paper: #ffffff; --panel: #f6f8fa; --ink: #1c2126; --soft: #59636e; --line: #dfe4e9; --accent: #0072b2;
  --warn: #b54708; --warn-panel: #fff6ed; --low: #e07b2e; --high: #0072b2; color-scheme: light;
}
@media screen and (prefers-color-scheme: dark) {
  :root {
    --paper: #14171a; --panel: #1c2025; --ink: #e4e8ec; --soft: #9aa5b1; --line: #2e353c; --accent: #6db3e8;
    --warn: #f3a55f; --warn-panel: #2b2118; --low: #b85c12; --high: #1f7fbd; color-scheme: dark;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; text-size-adjust: 100%; }
body {
  margin: 0 auto; max-width: 1200px; padding: 56px 32px 96px; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
}
h1, h2, h3, h4 { line-height: 1.2; margin: 0; font-weight: 650; letter-spacing: -0.012em; overflow-wrap: anywhere; }
h2, h3 { display: flex; flex-wrap: wrap; align-items: center; gap: 5px 11px; }
h1 { font-size: 34px; letter-spacing: -0.022em; }
h2 { font-size: 25px; }
h3 { font-size: 18px; margin-top: 48px; }
p { margin: 12px 0 0; max-width: 72ch; overflow-wrap: anywhere; }
a { color: var(--accent); text-decoration-thickness: 1px; text-underline-offset: 3px; }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; border-radius: 3px; }
.lead { color: var(--soft); font-size: 18px; margin-top: 10px; }
.facts {
  display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 250px), 1fr)); gap: 22px 36px;
  margin: 36px 0 0;
}
.facts dt, .origin th { color: var(--soft); font-size: 13px; font-weight: 500; }
.facts dd { margin: 3px 0 0; overflow-wrap: anywhere; }
.note { color: var(--soft); font-size: 14px; max-width: 84ch; }
.facts + .note { margin-top: 30px; }
.warning {
  border-left: 3px solid var(--warn); background: var(--warn-panel); padding: 12px 16px; border-radius: 0 6px 6px 0;
}
.warning strong { color: var(--warn); }
nav { margin-top: 36px; padding: 14px 0; border-block: 1px solid var(--line); font-size: 15px; }
nav ul { list-style: none; margin: 0; padding: 0; display: flex; flex-wrap: wrap; gap: 6px 26px; }
section { margin-top: 80px; }
.mode {
  padding: 3px 10px; border: 1px solid var(--line); border-radius: 99px;
  color: var(--soft); font-size: 13px; font-weight: 500; letter-spacing: 0;
}
h3 .mode { font-size: 12px; padding: 2px 9px; }
.swatch { width: 12px; height: 12px; flex: none; vertical-align: -1px; margin-right: 8px; overflow: visible; }
.legend { display: flex; flex-wrap: wrap; gap: 8px; margin: 18px 0 0; padding: 0; list-style: none; font-size: 14px; }
.legend button {
  font: inherit; color: inherit; background: none; border: 1px solid var(--line);
  border-radius: 99px; padding: 4px 13px;
  cursor: pointer; white-space: nowrap; max-width: 100%; overflow: hidden; text-overflow: ellipsis;
}
.legend button:hover { border-color: var(--soft); }
.legend button[aria-pressed="false"] { opacity: 0.4; text-decoration: line-through; }
.plots {
  display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 330px), 1fr)); gap: 32px 26px;
  margin-top: 22px;
}
.plots figure { margin: 0; min-width: 0; max-width: 560px; }
.plots figcaption { font-size: 14px; font-weight: 600; margin-bottom: 4px; overflow-wrap: anywhere; }
.plot { height: 310px; width: 100%; }
.plot text { fill: var(--soft) !important; }
.plot .hoverlayer text { fill: #ffffff !important; }
.plot .gridlayer path { stroke: var(--line) !important; }
.scroll {
  overflow-x: auto; margin-top: 18px; border-block: 1px solid var(--line); -webkit-overflow-scrolling: touch;
}
table { border-collapse: collapse; width: 100%; font-size: 14px; font-variant-numeric: tabular-nums; }
caption { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); white-space: nowrap; }
thead th {
  color: var(--soft); font-size: 13px; font-weight: 500; text-align: right; vertical-align: bottom; padding: 0;
}
thead button {
  font: inherit; color: inherit; background: none; border: 0; margin: 0; padding: 10px 12px; width: 100%;
  text-align: inherit;
  cursor: pointer; overflow-wrap: break-word; min-width: 84px;
}
thead button:hover, th[aria-sort="ascending"], th[aria-sort="descending"] { color: var(--ink); }
th[aria-sort="ascending"] button::after { content: " \\2191"; }
th[aria-sort="descending"] button::after { content: " \\2193"; }
td {
  padding: 6px 12px 5px; text-align: right; white-space: nowrap; vertical-align: top;
  border-top: 1px solid var(--line);
}
td b { font-weight: 600; font-size: 15px; }
td small { display: block; font-size: 12px; line-height: 1.35; color: var(--soft); }
td small.differs { color: var(--ink); }
td small span { color: var(--soft); }
td.none { color: var(--soft); }
td.mean { background: var(--panel); }
th[scope="row"], thead th:first-child {
  position: sticky; left: 0; z-index: 1; background: var(--paper); text-align: left;
}
th[scope="row"] {
  font-weight: 500; padding: 6px 18px 5px 0; white-space: nowrap; vertical-align: top;
  border-top: 1px solid var(--line);
}
thead th:first-child button { padding-left: 0; }
th[scope="row"] .arm {
  display: inline-block; max-width: 34ch; vertical-align: top; overflow: hidden; text-overflow: ellipsis;
}
th[scope="row"] .swatch { vertical-align: top; margin-top: 5px; }
tbody:not(.sorted) tr:not(.first) > * { border-top-color: transparent; }
.notes {
  margin: 14px 0 0; padding-left: 18px; color: var(--soft); font-size: 14px; max-width: 80ch;
  overflow-wrap: anywhere;
}
.maps { display: flex; flex-wrap: wrap; gap: 34px 44px; margin-top: 24px; }
.method { min-width: 0; max-width: 100%; }
.method > h4 { font-size: 15px; font-weight: 600; letter-spacing: 0; }
.method > div { display: flex; flex-wrap: wrap; gap: 18px 22px; margin-top: 10px; }
.map table { width: auto; font-size: 12px; border-collapse: separate; border-spacing: 2px; }
.map figcaption { color: var(--soft); font-size: 13px; margin-bottom: 4px; }
.map { margin: 0; max-width: 100%; overflow-x: auto; }
.map thead th { font-size: 12px; text-align: center; padding: 0 2px 2px; position: static; }
.map th[scope="row"] {
  border: 0; color: var(--soft); padding: 0 6px 0 0; text-align: right; font-weight: 400; vertical-align: middle;
}
.map td {
  border: 0; padding: 0; width: 54px; height: 30px; text-align: center; vertical-align: middle; border-radius: 3px;
  background: color-mix(in oklab, var(--high) var(--h, 0%), color-mix(in oklab, var(--low) var(--l, 0%), var(--panel)));
}
.scale { display: flex; align-items: center; gap: 10px; margin-top: 18px; font-size: 13px; color: var(--soft); }
.scale i {
  width: 180px; height: 12px; border-radius: 3px;
  background: linear-gradient(to right in oklab, color-mix(in oklab, var(--low) 65%, var(--panel)), var(--panel),
    color-mix(in oklab, var(--high) 65%, var(--panel)));
}
.origin th[scope="row"] {
  position: static; padding: 6px 24px 6px 0; width: 220px; white-space: normal; overflow-wrap: anywhere;
}
.origin td { text-align: left; white-space: normal; overflow-wrap: anywhere; padding: 5px 0; }
.origin td div + div { margin-top: 4px; }
.origin { margin-top: 18px; border-bottom: 1px solid var(--line); }
@media screen and (max-width: 640px) {
  body { padding: 32px 16px 64px; }
  h1 { font-size: 27px; }
  h2 { font-size: 22px; }
  section { margin-top: 60px; }
  .facts { gap: 16px; margin-top: 26px; }
  .plot { height: 280px; }
  th[scope="row"] .arm { white-space: normal; max-width: 15ch; }
  th[scope="row"] { padding-right: 8px; }
  .origin th[scope="row"] { width: 112px; padding-right: 14px; }
}
@page { size: A4; margin: 13mm; }
@page wide { size: A4 landscape; }
@media print {
  body { padding: 0; max-width: none; font-size: 10pt; }
  nav, .legend button[aria-pressed="false"] { display: none; }
  .legend button { border-color: transparent; padding-left: 0; }
  section { margin-top: 32pt; }
  h1 { font-size: 22pt; }
  h2 { font-size: 16pt; }
  h3 { font-size: 12pt; margin-top: 22pt; }
  h2, h3, h4, .legend { break-after: avoid; }
  figure, tr, .method > h4 { break-inside: avoid; }
  .scroll + .note, tbody tr:first-child { break-before: avoid; }
  tr.first { break-after: avoid; }
  .wide { page: wide; }
  .scroll { overflow: visible; }
  .facts { grid-template-columns: repeat(3, 1fr); gap: 8pt 18pt; margin-top: 16pt; }
  .facts + .note { margin-top: 12pt; }
  .lead { font-size: 11pt; margin-top: 4pt; }
  .plots { grid-template-columns: 1fr 1fr; gap: 10pt 14pt; margin-top: 12pt; }
  .plot { height: 225px; }
  .plot .modebar { display: none; }
  table { font-size: 8.5pt; }
  td b { font-size: 9pt; }
  td small { font-size: 7pt; line-height: 1.2; white-space: normal; }
  td small span { white-space: nowrap; }
  td { padding: 2pt 4pt 1.5pt; }
  thead { display: table-header-group; break-inside: avoid; }
  thead th:first-child { position: static; }
  thead th { font-size: 8pt; padding: 3pt 4pt; overflow-wrap: break-word; }
  thead button { display: contents; }  /* a head with a button in it is not repeated on each page */
  th[aria-sort] button::after { content: "" !important; }
  th[scope="row"] { padding: 2pt 6pt 1.5pt 0; position: static; }
  th[scope="row"] .arm { white-space: normal; }
  th[scope="row"] .swatch { margin-top: 1pt; }
  .map td { print-color-adjust: exact; -webkit-print-color-adjust: exact; width: 40px; height: 22px; }
  .swatch, .scale i, td.mean, .warning { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  .maps { gap: 16pt 24pt; }
}
"""

# Sorting keeps cells without a figure last; a click on the first column brings the first order back.
JS = """
const plots = JSON.parse(document.getElementById("plots").textContent);
for (const {id, data, layout} of plots) {
  Plotly.newPlot(id, data, layout, {
    responsive: true, displaylogo: false, modeBarButtons: [["toImage"]], toImageButtonOptions: {filename: id, scale: 2}
  });
}
function draw(width) {
  for (const {id} of plots) {
    const box = document.getElementById(id);
    Plotly.relayout(box, width ? {width, height: 225} : {width: null, height: null, autosize: true});
  }
}
addEventListener("beforeprint", () => draw(325));
addEventListener("afterprint", () => draw());

for (const button of document.querySelectorAll(".legend button")) {
  button.addEventListener("click", () => {
    const visible = button.getAttribute("aria-pressed") === "false";
    button.setAttribute("aria-pressed", visible);
    for (const box of button.closest("section").querySelectorAll(".plot")) {
      const traces = [...box.data.keys()].filter(trace => box.data[trace].name === button.dataset.trace);
      if (traces.length) Plotly.restyle(box, {visible}, traces);
    }
  });
}

for (const head of document.querySelectorAll("th[aria-sort]")) {
  head.querySelector("button").addEventListener("click", () => {
    const body = head.closest("table").tBodies[0], column = head.cellIndex;
    const rising = head.getAttribute("aria-sort") === (column ? "descending" : "none") || column === 0;
    for (const other of head.parentElement.children) other.setAttribute("aria-sort", "none");
    head.setAttribute("aria-sort", rising ? "ascending" : "descending");
    const value = row => parseFloat(row.cells[column].dataset.value);
    const place = row => parseInt(row.cells[0].dataset.value);
    const compare = (a, b) =>
      isNaN(value(a)) - isNaN(value(b)) || (rising ? 1 : -1) * (value(a) - value(b)) || place(a) - place(b);
    body.append(...[...body.rows].sort(compare));
    body.classList.toggle("sorted", column > 0);
  });
}
"""
