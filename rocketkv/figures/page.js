// Shades the text, and draws the figures.
const parsed = name => JSON.parse(document.getElementById(name).textContent);

const {tokens, views} = parsed("tokens"), select = document.getElementById("view"), box = document.getElementById("text");
for (const [place, view] of views.entries()) {
  let group = select.lastElementChild;
  if (group?.label !== view.group) {
    group = document.createElement("optgroup");
    group.label = view.group;
    select.append(group);
  }
  group.append(new Option(view.name, place));
}
function shade() {
  const {runs} = views[select.value], spans = [];
  for (let i = 0, start = 0; i < runs.length; i += 2) {
    const span = document.createElement("span"), end = start + runs[i + 1];
    if (runs[i]) span.className = `l${runs[i]}`;
    span.textContent = tokens.slice(start, end).join("");
    spans.push(span);
    start = end;
  }
  box.replaceChildren(...spans);
}
select.addEventListener("change", shade);
shade();

unpack().then(() => {
  const font = {
    family: 'system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif', size: 12, color: "#7a8590"
  };
  const clear = "rgba(0,0,0,0)", dragmode = matchMedia("(pointer: coarse)").matches ? false : "zoom";
  for (const [name, {data, layout}] of Object.entries(parsed("figures"))) {
    for (const axis of Object.keys(layout).filter(key => /^[xy]axis/.test(key))) layout[axis].gridcolor = "rgba(128,128,128,0.2)";
    Plotly.newPlot(name, data, {
      ...layout, font, dragmode, paper_bgcolor: clear, plot_bgcolor: clear,
      hoverlabel: {font: {...font, color: "#ffffff"}, bgcolor: "#3a4550", bordercolor: clear, align: "left"}
    }, {displayModeBar: false, responsive: true});
  }
});
