// The curves of runs, one chart for each number, all runs in it. runs.js says which runs, and on which axes.

import { baseLayout, CONFIG, loadPlotly } from "./charts.js";
import { el } from "./dom.js";
import { significant, whole } from "./format.js";

// Okabe and Ito's colours, which people who see fewer of them can tell apart; then the same in dashes, and in dots.
const LIGHT = ["#0072B2", "#D55E00", "#009E73", "#B6508F", "#B87C00", "#3B9BD9", "#444444"];
const DARK = ["#4FA8E0", "#F08A4B", "#2FC79A", "#DB96BF", "#E6B33C", "#8CCBF2", "#D5D5D5"];
const DASHES = ["solid", "dash", "dot"];

const CHARTS = [
  { key: "train/loss", title: "Loss", unit: "nats a token", isLoss: true },
  { key: "lr", title: "Learning rate", fromZero: true },
  { key: "grad_norm", title: "Gradient norm", unit: "before clipping" },
  { key: "tokens_per_sec", title: "Throughput", unit: "tokens a second", fromZero: true },
  { key: "mfu", title: "MFU", unit: "% of the device's peak", factor: 100, fromZero: true },
  { key: "memory_gb", title: "Peak memory", unit: "GB", fromZero: true },
];
const EVENT_SYMBOLS = { "skipped step": "x", rollback: "triangle-left", restart: "line-ns-open", branch: "diamond-open", stop: "square" };
const X_TITLES = { tokens: "tokens", step: "steps", elapsed_s: "time" };
const TIMES = [[2 * 86400, 86400, "days"], [2 * 3600, 3600, "hours"], [180, 60, "minutes"], [0, 1, "seconds"]];

/** How the run of that number is drawn. */
export function strokeOf(index, isDark) {
  const colours = isDark ? DARK : LIGHT;
  return { color: colours[index % colours.length], dash: DASHES[Math.floor(index / colours.length) % DASHES.length] };
}

/** Values with an exponential moving average over them; the weight of what was before is between 0 and 1. */
export function smoothed(values, weight) {
  let mean = 0;
  let total = 0;
  return values.map((value) => {
    if (value == null) return null;
    mean = weight * mean + (1 - weight) * value;
    total = weight * total + (1 - weight);
    return mean / total;
  });
}

/** A grid of charts in `element`. draw(runs, options) shows runs [{ name, index, history }] with options { x, logX,
 * logY, smooth }; close() frees what the charts hold. A chart of scores is made when a run has them. */
export async function makeCharts(element) {
  const Plotly = await loadPlotly();
  const cards = new Map();
  CHARTS.forEach(addCard);

  function addCard(chart) {
    const plot = el("div", { class: "plot" });
    const heading = el("h3", {}, chart.title, chart.unit ? el("small", {}, ` ${chart.unit}`) : null);
    const card = el("figure", { class: `card chart${chart.isLoss ? " main-chart" : ""}`, "data-key": chart.key },
      el("figcaption", {}, heading), plot);
    element.append(card);
    cards.set(chart.key, { chart, card, plot });
  }

  function draw(runs, options) {
    const [, size, unit] = timeUnit(runs, options.x);
    const title = options.x === "elapsed_s" ? `time, ${unit}` : X_TITLES[options.x];
    for (const { key, task, metric } of runs.flatMap((run) => run.history.scores)) {
      if (!cards.has(`score/${key}`)) {
        addCard({ key: `score/${key}`, title: task, unit: `${metric} ± s.e.`, score: key });
      }
    }
    for (const { chart, card, plot } of cards.values()) {
      const traces = runs.flatMap((run) => (chart.score
        ? scoreTraces(chart, run, options) : tracesOf(chart, run, { ...options, size })));
      card.hidden = !traces.some((trace) => trace.y.some((value) => value != null));
      const xTitle = chart.score && options.x === "elapsed_s" ? X_TITLES.tokens : title;
      if (!card.hidden) Plotly.react(plot, traces, layoutOf(chart, options, xTitle), CONFIG);
    }
  }
  return { draw, close: () => cards.forEach(({ plot }) => Plotly.purge(plot)) };
}

function timeUnit(runs, x) {
  if (x !== "elapsed_s") return [0, 1, ""];
  const longest = Math.max(0, ...runs.map((run) => run.history.columns.elapsed_s.at(-1) ?? 0));
  return TIMES.find(([from]) => longest >= from);
}

function layoutOf(chart, options, xTitle) {
  const layout = baseLayout();
  Object.assign(layout.xaxis, {
    type: options.logX ? "log" : "linear", title: { text: xTitle, standoff: 6, font: { size: 12 } } });
  Object.assign(layout.yaxis, {
    type: chart.isLoss && options.logY ? "log" : "linear", rangemode: chart.fromZero ? "tozero" : "normal" });
  const events = { overlaying: "y", range: [0, 1], visible: false, fixedrange: true };
  const uirevision = `${options.x} ${options.logX} ${options.logY}`; // while it stays the same, so does the zoom
  return { ...layout, hovermode: "x unified", yaxis2: events, uirevision };
}

function tracesOf(chart, { name, index, history }, { x, size, smooth, isDark }) {
  const { columns } = history;
  const { color, dash } = strokeOf(index, isDark);
  const factor = chart.factor ?? 1;
  const scaled = (values) => (factor === 1 ? values : values.map((value) => value == null ? null : value * factor));
  const places = size === 1 ? columns[x] : columns[x].map((place) => place / size);
  const values = scaled(columns[chart.key]);
  const line = { color, dash, width: 1.5 };
  const base = { type: "scatter", mode: "lines", x: places, line, name, hovertemplate: "%{y:.5g}" };
  const traces = [];
  if (columns[`low/${chart.key}`]) {
    const edge = { ...base, line: { width: 0 }, hoverinfo: "skip", hovertemplate: null };
    traces.push({ ...edge, y: scaled(columns[`low/${chart.key}`]) },
      { ...edge, y: scaled(columns[`high/${chart.key}`]), fill: "tonexty", fillcolor: `${color}22` });
  }
  if (smooth > 0) {
    const faint = { opacity: 0.25, line: { ...line, width: 1 }, hoverinfo: "skip", hovertemplate: null };
    traces.push({ ...base, y: values, ...faint }, { ...base, y: smoothed(values, smooth) });
  } else {
    const mode = values.length < 3 ? "lines+markers" : "lines"; // a single point makes no line
    traces.push({ ...base, y: values, mode, opacity: chart.isLoss ? 0.6 : 1 });
  }
  if (!chart.isLoss) return traces;
  return [...traces, ...validationTraces(history, name, x, size, line), eventTrace(history, name, x, size, color)];
}

/** Scores have no time in the run: over the time axis they are drawn over tokens. */
function scoreTraces(chart, { name, index, history }, { x, isDark }) {
  const points = history.scores.find((score) => score.key === chart.score)?.points ?? [];
  const { color, dash } = strokeOf(index, isDark);
  return [{
    type: "scatter", mode: "lines+markers", name, line: { color, dash, width: 2 }, marker: { size: 6, color },
    x: points.map((point) => point[x === "step" ? "step" : "tokens"]), y: points.map((point) => point.value),
    error_y: { type: "data", array: points.map((point) => point.stderr ?? 0), color, thickness: 1, width: 3 },
    hovertemplate: "%{text}", text: points.map((point) => plain(scoreText(point))),
  }];
}

function scoreText({ step, value, stderr }) {
  return `${significant(value)}${stderr == null ? "" : ` ± ${significant(stderr)}`} at step ${whole(step)}`;
}

function validationTraces(history, name, x, size, line) {
  const place = (record) => (record[x] == null ? null : record[x] / size);
  const { evaluations } = history;
  const whole = evaluations.filter((record) => record["val/sampled_loss"] != null);
  const base = { type: "scatter", hovertemplate: "%{y:.5g}" };
  return [
    { ...base, mode: "lines+markers", line: { ...line, width: 2 }, marker: { size: 5, color: line.color },
      name: `${name}, validation`, x: evaluations.map(place),
      y: evaluations.map((record) => record["val/sampled_loss"] ?? record["val/loss"]) },
    { ...base, mode: "markers", marker: { size: 9, symbol: "diamond", color: line.color },
      name: `${name}, whole validation split`, x: whole.map(place), y: whole.map((record) => record["val/loss"]) },
  ];
}

function eventTrace({ events }, name, x, size, color) {
  return {
    type: "scatter", mode: "markers", yaxis: "y2", name: `${name}, events`,
    x: events.map((event) => event[x] == null ? null : event[x] / size),
    y: events.map(() => 0.03), hovertemplate: "%{text}<extra></extra>",
    text: events.map(({ kind, step, why }) => plain(`${kind} at step ${whole(step)}${why ? `: ${why}` : ""}`)),
    marker: { symbol: events.map((event) => EVENT_SYMBOLS[event.kind]), color, size: 9, line: { width: 2, color } },
  };
}

/** Plotly reads some HTML in its texts: without < and & it is text. */
export function plain(text) {
  return text.replace(/&/g, "&amp;").replace(/</g, "&lt;");
}

