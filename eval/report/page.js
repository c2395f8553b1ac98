// Draws the plots, hides methods in them, and sorts tables.
const font = {
  family: 'system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif', size: 12, color: "#59636e"
};
const axis = {gridcolor: "#e4e8ec", zeroline: false, fixedrange: true, ticks: "", automargin: true, nticks: 6};

// A line for each method through its budgets, larger marks for larger budgets, a ring around those of the Pareto front;
// a dashed line at the full cache's score. Over positions: a line for each budget, the full cache's too, and small marks.
function trace({name, color, symbol, x, y, text, front, up, down}, over) {
  const full = name === "m0" && !over;
  return {
    type: "scatter", mode: full ? "markers" : "lines+markers", name, x, y, hovertext: text, hoverinfo: "text",
    cliponaxis: false, line: {color, width: 1.75},
    marker: {
      color, symbol: full ? "circle-open" : symbol, size: x.map((_, place) => over ? 5 : Math.min(7 + 1.5 * place, 13)), opacity: 1,
      line: {width: front.map(best => full || best ? 2 : 0), color: front.map(best => best ? "#4b545d" : color)}
    },
    error_y: {
      type: "data", symmetric: false, array: up, arrayminus: down, color, thickness: 1, width: 2, visible: !full
    }
  };
}
function steps(front) {
  return {
    type: "scatter", mode: "lines", name: "front", x: front.map(point => point[0]), y: front.map(point => point[1]),
    hoverinfo: "skip", line: {shape: "hv", dash: "dot", width: 1.5, color: "#808890"}
  };
}
function layout({x, y, lines, ticks, over}) {
  const full = lines.filter(line => line.name === "m0" && !over);
  const shapes = full.flatMap(({y, color}) => [...new Set(y)].map(y => ({
    type: "line", xref: "x domain", x0: 0, x1: 1, y0: y, y1: y, layer: "below", line: {color, width: 1.25, dash: "dash"}
  })));
  const xaxis = {...axis, title: {text: x, standoff: 10}};
  if (ticks) {
    const logs = lines.flatMap(line => line.x).map(Math.log10), low = Math.min(...logs), high = Math.max(...logs);
    const margin = 0.05 * (high - low) + 0.01;
    Object.assign(xaxis, {
      type: "log", range: [low - margin, high + margin], tickangle: 0,
      tickvals: ticks.map(tick => tick[0]), ticktext: ticks.map(tick => tick[1])
    });
  }
  return {
    xaxis, yaxis: {...axis, title: {text: y, standoff: 8}, rangemode: over ? "tozero" : "normal"}, shapes, font, margin: {l: 46, r: 14, t: 10, b: 46},
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", showlegend: false, dragmode: false,
    hovermode: "closest", hoverlabel: {font: {...font, color: "#ffffff"}, bordercolor: "rgba(0,0,0,0)"}
  };
}

const plots = JSON.parse(document.getElementById("plots").textContent);
unpack().then(() => {
  for (const plot of plots) {
    Plotly.newPlot(plot.id, [...plot.lines.map(line => trace(line, plot.over)), steps(plot.front)], layout(plot), {
      responsive: true, displaylogo: false, modeBarButtons: [["toImage"]],
      toImageButtonOptions: {filename: plot.id, scale: 2}
    });
  }
}, () => {
  for (const plot of plots) document.getElementById(plot.id).textContent = "This browser cannot unpack the plots.";
});
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

// Cells without a figure stay last; a click on the first column restores the first order.
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
