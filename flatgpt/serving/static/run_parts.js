// What the Runs view shows of the chosen runs besides curves: rows of the list, the summary, samples, options.

import { strokeOf } from "./curves.js";
import { breakable, el } from "./dom.js";
import { duration, fixed, short, whole } from "./format.js";

function stroke(index, isDark) {
  const { color, dash } = strokeOf(index, isDark);
  const mark = el("span", { class: `stroke ${dash}`, "aria-hidden": "true" });
  mark.style.color = color;
  return mark;
}

function label(run, isDark) {
  return el("span", { class: "run-label" }, stroke(run.index, isDark), el("span", {}, breakable(run.line.name)));
}

function progress(line) {
  return el("progress", { max: line.max_iters || 1, value: Math.min(line.step, line.max_iters || 1),
    "aria-label": "progress" });
}

function stateOf(line) {
  return el("span", { class: `state ${line.state}` }, line.state);
}

export class ListRow {
  constructor(id, onToggle) {
    this.box = el("input", { type: "checkbox", onchange: (event) => onToggle(event.target.checked) });
    this.name = el("span", { class: "run-name" });
    this.mark = el("span");
    this.rest = el("div", { class: "run-rest" });
    this.element = el("li", { "data-run": id }, el("label", {}, this.box, this.mark, this.name), this.rest);
  }

  show(line, index, isDark) {
    this.box.checked = index >= 0;
    this.name.replaceChildren(...breakable(line.name));
    this.element.title = line.path;
    this.element.dataset.state = line.state;
    this.mark.replaceChildren(...(index >= 0 ? [stroke(index, isDark)] : []));
    const loss = line["val/loss"] ?? line["train/loss"];
    const steps = line.max_iters ? `${short(line.step)} of ${short(line.max_iters)}` : short(line.step);
    this.rest.replaceChildren(stateOf(line), el("span", {}, steps), progress(line),
      el("span", { title: "validation loss" }, loss == null ? "" : fixed(loss, 3)));
  }
}

function tableHead(cells) {
  return el("thead", {}, el("tr", {}, cells.map((cell) => el("th", { scope: "col" }, cell))));
}

export function summaryTable(runs, isDark) {
  const best = ({ history }) => history.evaluations.reduce((found, record) => {
    const loss = record["val/sampled_loss"] ?? record["val/loss"];
    return loss != null && (!found || loss < found.loss) ? { loss, step: record.step } : found;
  }, null);
  const count = ({ history }, kind) => history.events.filter((event) => event.kind === kind).length || null;
  const columns = {
    state: ({ line }) => stateOf(line),
    step: ({ line }) => [el("div", {}, whole(line.step),
      line.max_iters ? el("small", {}, ` of ${whole(line.max_iters)}`) : null), progress(line)],
    "time left": ({ line }) => (line.time_left_s == null ? null : duration(line.time_left_s)),
    "train loss": ({ line }) => fixed(line["train/loss"], 4),
    "val loss": ({ line }) => fixed(line["val/loss"], 4),
    "best val": (run) => {
      const at = best(run);
      return at && [fixed(at.loss, 4), el("small", {}, ` step ${whole(at.step)}`)];
    },
    tokens: ({ line }) => short(line.tokens),
    "tokens/s": ({ line }) => whole(line.tokens_per_sec),
    MFU: ({ line }) => (line.mfu == null ? null : `${fixed(100 * line.mfu, 1)} %`),
    memory: ({ line }) => (line.memory_gb == null ? null : `${fixed(line.memory_gb, 2)} GB`),
    time: ({ line }) => duration(line.elapsed_s),
    skipped: ({ line }) => line.skipped || null,
    rollbacks: ({ line }) => line.rollbacks || null,
    restarts: (run) => count(run, "restart"),
  };
  const cells = Object.entries(columns).map(([title, cell]) => [title, runs.map(cell)])
    .filter(([, column]) => column.some((value) => value != null && value !== "–"));
  return el("table", {},
    tableHead(["run", ...cells.map(([title]) => title)]),
    el("tbody", {}, runs.map((run, i) => el("tr", {}, el("th", { scope: "row" }, label(run, isDark)),
      cells.map(([title, column]) => el("td", { "data-title": title }, column[i] ?? "–"))))));
}

export function sampleColumn(run, step, isDark, onPick) {
  const { samples } = run.history;
  const texts = el("div");
  const show = (picked) => {
    const record = samples.find((sample) => sample.step === picked) ?? samples.at(-1);
    texts.replaceChildren(...record.samples.map((text, i) => {
      const prompt = record.prompts?.[i] ?? "";
      return el("p", { class: "text sample" }, prompt ? el("b", {}, prompt) : null, text.slice(prompt.length));
    }));
  };
  const pick = el("select", { "aria-label": `Samples of ${run.line.name} after`, onchange: (event) => {
    const picked = event.target.value === "newest" ? undefined : Number(event.target.value);
    onPick(picked);
    show(picked);
  } }, el("option", { value: "newest" }, `newest: step ${whole(samples.at(-1).step)}`), samples.map((sample) => el(
    "option", { value: sample.step, selected: sample.step === step }, `step ${whole(sample.step)}`)));
  show(step);
  return el("div", { class: "sample-column" }, el("h3", {}, label(run, isDark)), pick, texts);
}

export function optionsTable(runs, isDark) {
  const keys = [...new Set(runs.flatMap((run) => Object.keys(run.history.options)))];
  const rows = keys.map((key) => {
    const values = runs.map((run) => (key in run.history.options ? String(run.history.options[key]) : "–"));
    return { key, values, differs: new Set(values).size > 1 };
  });
  const body = el("tbody");
  const toRow = ({ key, values, differs }) => el("tr", { class: differs ? "differs" : null },
    el("th", { scope: "row" }, key), values.map((value) => el("td", { class: "mono" }, value)));
  const fill = (onlyDiffering) => body.replaceChildren(
    ...rows.filter((row) => row.differs || !onlyDiffering).map(toRow));
  const several = runs.length > 1;
  fill(several);
  const numDiffering = rows.filter((row) => row.differs).length;
  return [
    el("summary", {}, el("h2", {}, "Options"),
      several ? el("small", {}, ` ${numDiffering} of ${keys.length} differ`) : null),
    several ? el("label", {}, el("input", { type: "checkbox", checked: true,
      onchange: (event) => fill(event.target.checked) }), "only what differs") : null,
    el("div", { class: "scroll" }, el("table", { class: "options" },
      tableHead(["option", ...runs.map((run) => label(run, isDark))]), body)),
  ].filter(Boolean);
}
