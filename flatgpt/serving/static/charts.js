// Charts by plotly.js, which the server hands out from its installed package and which is loaded when first needed.

let loading = null;

/** window.Plotly. */
export function loadPlotly() {
  loading ??= new Promise((resolve, reject) => {
    const script = document.createElement("script");
    script.src = "plotly.min.js";
    script.onload = () => resolve(window.Plotly);
    script.onerror = () => reject(new Error("The chart library did not load. Is serve.py still running?"));
    document.head.append(script);
  });
  return loading;
}

/** A colour of the page, as style.css has it for the light or dark theme: colour("accent"). */
export function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
}

export const darkTheme = matchMedia("(prefers-color-scheme: dark)");

/** What every chart's layout begins with, in the colours of the theme. */
export function baseLayout() {
  const axis = { gridcolor: colour("line"), linecolor: colour("line"), zeroline: false, automargin: true };
  const spike = {
    showspikes: true, spikemode: "across", spikethickness: 1, spikedash: "solid", spikecolor: colour("muted") };
  return {
    paper_bgcolor: colour("card"), plot_bgcolor: colour("card"), showlegend: false,
    font: { family: "inherit", size: 12, color: colour("muted") },
    margin: { l: 48, r: 12, t: 8, b: 36 },
    modebar: { bgcolor: "transparent", color: colour("muted"), activecolor: colour("accent") },
    hoverlabel: { bgcolor: colour("card"), bordercolor: colour("line"), font: { color: colour("fg") } },
    xaxis: { ...axis, ...spike }, yaxis: { ...axis },
  };
}

export const CONFIG = {
  displaylogo: false, responsive: true, displayModeBar: "hover",
  modeBarButtons: [["toImage", "zoom2d", "pan2d", "zoomIn2d", "zoomOut2d", "resetScale2d"]],
};
