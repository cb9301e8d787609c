// Draws FIGURES, in the page's own colours; again when the reader changes between light and dark.
const dark = matchMedia("(prefers-color-scheme: dark)");
const narrow = matchMedia("(max-width: 600px)");
const coarse = matchMedia("(pointer: coarse)").matches;  // a finger scrolls the page, it does not zoom

function template() {
  const style = getComputedStyle(document.documentElement);
  const colour = name => style.getPropertyValue(name).trim();
  const axis = { gridcolor: colour("--grid"), linecolor: colour("--rule"), zerolinecolor: colour("--rule"),
                 title: { font: { size: 13 }, standoff: 8 } };
  return { layout: {
    font: { color: colour("--ink"), size: 12.5, family: getComputedStyle(document.body).fontFamily },
    paper_bgcolor: "transparent", plot_bgcolor: "transparent", dragmode: coarse ? false : "zoom",
    xaxis: { ...axis, automargin: true }, yaxis: { ...axis, automargin: true },
    legend: { orientation: "h", x: 0, xanchor: "left", y: -0.22, yanchor: "top" },
    margin: { l: 56, r: 16, t: 16, b: 48 }, hoverlabel: { font: { size: 12.5 } },
  } };
}

// Labels beside points need width; without it, a legend says the same.
function unlabelled(figure) {
  const data = figure.data.map(trace => trace.mode === "markers+text" ? { ...trace, mode: "markers" } : trace);
  return { ...figure, data, layout: { ...figure.layout, showlegend: true } };
}

function draw() {
  FIGURES.forEach((figure, i) => {
    const labelled = figure.data.some(trace => trace.mode === "markers+text");
    const { data, layout } = narrow.matches && labelled ? unlabelled(figure) : figure;
    Plotly.react("figure-" + i, data, { ...layout, template: template() },
                 { responsive: true, displaylogo: false, displayModeBar: false });
  });
}

draw();
dark.addEventListener("change", draw);
narrow.addEventListener("change", draw);
