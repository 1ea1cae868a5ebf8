// The Runs view: a list of all runs, and for the chosen ones their state, curves, samples and options. The server's
// events keep it up to date; the link holds which runs are chosen and how they are drawn.

import { getJSON, listen } from "./api.js";
import { darkTheme } from "./charts.js";
import { makeCharts, plain, strokeOf } from "./curves.js";
import { breakable, el } from "./dom.js";
import { duration, fixed, short, whole } from "./format.js";

const MAX_APPENDED = 1000; // reports added to a history before it is asked for anew, thinned
const RETRY_MS = 2000;
const X_AXES = { tokens: "tokens", step: "steps", elapsed_s: "time" };
const COLUMNS = ["step", "tokens", "elapsed_s", "train/loss", "lr", "grad_norm", "tokens_per_sec", "mfu", "memory_gb"];

export async function mount(element, params, setParams) {
  const view = new RunsView(element, params, setParams);
  await view.start();
  return () => view.close();
}

class RunsView {
  constructor(element, params, setParams) {
    this.setParams = setParams;
    this.lines = new Map(); // id -> the run's line in the list
    this.histories = new Map();
    this.slots = []; // ids by the number of their colour; null where it is free
    for (const id of (params.get("runs") ?? "").split(",").filter(Boolean)) this.slots.push(id);
    this.hasChoice = params.has("runs");
    this.options = {
      x: params.get("x") in X_AXES ? params.get("x") : "tokens", logX: params.has("logx"), logY: params.has("logy"),
      smooth: Math.min(0.99, Math.max(0, Number(params.get("smooth")) || 0)), isDark: darkTheme.matches };
    this.endStream = () => {};
    this.generation = 0; // of the connection: answers to an older one are dropped
    this.build(element);
  }

  // Elements

  build(element) {
    this.note = el("p", { class: "note", role: "status" });
    this.filter = el("input", { type: "search", placeholder: "Filter runs", "aria-label": "Filter runs",
      oninput: () => this.showList() });
    this.list = el("ul", { class: "run-list" });
    this.clear = el("button", { onclick: () => this.choose([]) }, "None");
    this.summary = el("div", { class: "card scroll summary" });
    this.grid = el("div", { class: "charts" });
    this.samples = el("section", { class: "card", "aria-label": "Samples" });
    this.table = el("details", { class: "card" });
    this.bar = this.controls();
    this.body = el("div", { class: "runs-body" }, this.note, this.summary, this.bar, this.grid, this.samples,
      this.table);
    element.append(el("div", { class: "runs-layout" },
      el("aside", { class: "card run-side" }, el("div", { class: "run-tools" }, this.filter, this.clear), this.list),
      this.body));
    this.rows = new Map();
    this.onTheme = () => { this.options.isDark = darkTheme.matches; this.showAll(); };
    this.onVisible = () => (document.hidden ? this.disconnect() : this.connect());
    darkTheme.addEventListener("change", this.onTheme);
    document.addEventListener("visibilitychange", this.onVisible);
  }

  controls() {
    const set = (name, value) => { this.options[name] = value; this.writeLink(); this.drawCharts(); };
    const radios = Object.entries(X_AXES).map(([value, title]) => el("label", {},
      el("input", { type: "radio", name: "x", value, checked: value === this.options.x, onchange: () => set("x", value) }),
      el("span", {}, title)));
    const box = (name, title) => el("label", {}, el("input", {
      type: "checkbox", checked: this.options[name], onchange: (event) => set(name, event.target.checked) }), title);
    const shown = el("output", {}, fixed(this.options.smooth, 2));
    const slider = el("input", { type: "range", min: 0, max: 0.99, step: 0.01, value: this.options.smooth,
      oninput: (event) => { shown.textContent = fixed(Number(event.target.value), 2); set("smooth", Number(event.target.value)); } });
    return el("div", { class: "controls" },
      el("fieldset", { class: "choice", "aria-label": "Horizontal axis" }, radios),
      box("logX", "log axis"), box("logY", "log loss"), el("label", {}, "smoothing", slider, shown));
  }

  // What is chosen

  get chosen() {
    return this.slots.filter(Boolean);
  }

  choose(ids) {
    this.slots = this.slots.map((id) => (ids.includes(id) ? id : null));
    for (const id of ids.filter((id) => !this.slots.includes(id))) {
      const free = this.slots.indexOf(null);
      if (free >= 0) this.slots[free] = id;
      else this.slots.push(id);
    }
    while (this.slots.length && !this.slots.at(-1)) this.slots.pop();
    this.writeLink();
    this.connect();
  }

  writeLink() {
    this.hasChoice = true;
    const { x, logX, logY, smooth } = this.options;
    const params = new URLSearchParams({ runs: this.chosen.join(",") });
    if (x !== "tokens") params.set("x", x);
    if (logX) params.set("logx", 1);
    if (logY) params.set("logy", 1);
    if (smooth) params.set("smooth", smooth);
    this.setParams(params);
  }

  // The connection: histories first, then the stream of what is new

  async start() {
    const { runs, folders } = await getJSON("api/runs");
    this.folders = folders;
    this.takeLines(runs);
    const known = this.chosen.filter((id) => this.lines.has(id));
    if (known.length < this.chosen.length) this.slots = known;
    if (!this.hasChoice) this.slots = this.newest();
    this.charts = await makeCharts(this.grid);
    await this.connect();
  }

  /** What is shown before anything was chosen. */
  newest() {
    return [...this.lines.values()].sort(byTime).slice(0, 1).map((line) => line.id);
  }

  disconnect() {
    this.generation += 1;
    clearTimeout(this.timer);
    this.endStream();
    this.endStream = () => {};
  }

  async connect() {
    this.disconnect();
    const generation = this.generation;
    const later = (delay) => { this.timer = setTimeout(() => this.connect(), delay); };
    try {
      const loaded = await Promise.all(this.chosen.map((id) => this.load(id)));
      if (generation !== this.generation) return;
      this.histories = new Map(loaded.filter(Boolean).map((history) => [history.id, history]));
      this.say(this.chosen.length ? "" : "Choose runs in the list to see their curves, samples and options.");
    } catch (error) {
      if (generation !== this.generation) return;
      this.say(error.message, true);
      later(RETRY_MS);
      return;
    }
    this.showAll();
    const following = [...this.histories.values()];
    const unread = following.filter((history) => history.read < 1);
    if (unread.length) {
      const part = Math.min(...unread.map((history) => history.read));
      this.say(`Reading a long run: ${Math.floor(100 * part)} %. Until then the curves show a sample of it.`);
      later(0);
    }
    const positions = following.filter((history) => history.read === 1).map(({ id, position }) => `${id}@${position}`);
    this.endStream = listen(`api/events?runs=${positions.join(",")}`, {
      runs: (lines) => {
        this.takeLines(lines);
        if (!this.hasChoice && !this.chosen.length) this.choose(this.newest());
        this.showList();
        this.showSummary();
      },
      gone: (ids) => this.forget(ids),
      records: ({ id, records }) => this.append(id, records),
      reload: () => this.connect(),
    }, (isOpen) => {
      if (isOpen || generation !== this.generation) return;
      this.disconnect(); // the browser would ask from the old positions again
      this.say("The server does not answer. Is serve.py still running?", true);
      later(RETRY_MS);
    });
  }

  async load(id) {
    if (!this.lines.has(id)) return null;
    try {
      return { ...await getJSON(`api/runs/${id}`), appended: 0 };
    } catch (error) {
      if (/no such run/.test(error.message)) return null;
      throw error;
    }
  }

  takeLines(lines) {
    for (const line of lines) this.lines.set(line.id, line);
  }

  forget(ids) {
    for (const id of ids) {
      this.lines.delete(id);
      this.histories.delete(id);
    }
    this.choose(this.chosen.filter((id) => this.lines.has(id)));
  }

  append(id, records) {
    const history = this.histories.get(id);
    if (!history) return;
    for (const record of records) appendRecord(history, record);
    if (history.appended > MAX_APPENDED) this.connect();
    else this.showAll();
  }

  // What is shown

  say(text, isError = false) {
    this.note.textContent = text;
    this.note.classList.toggle("error", isError);
    this.note.hidden = !text;
  }

  showAll() {
    this.showList();
    this.showSummary();
    this.drawCharts();
    this.showSamples();
    this.showOptions();
  }

  showList() {
    const wanted = this.filter.value.toLowerCase();
    const lines = [...this.lines.values()].filter((line) => line.name.toLowerCase().includes(wanted)).sort(byTime);
    for (const [id, row] of this.rows) {
      if (!this.lines.has(id)) { row.element.remove(); this.rows.delete(id); }
    }
    for (const line of lines) {
      if (!this.rows.has(line.id)) this.rows.set(line.id, new ListRow(line.id, (isOn) => this.choose(
        isOn ? [...this.chosen, line.id] : this.chosen.filter((id) => id !== line.id))));
      this.rows.get(line.id).show(line, this.slots.indexOf(line.id), this.options.isDark);
    }
    const elements = lines.map((line) => this.rows.get(line.id).element);
    const isSame = elements.length === this.list.children.length && elements.every((row, i) => row === this.list.children[i]);
    if (!isSame) this.list.replaceChildren(...elements);
    this.clear.disabled = !this.chosen.length;
    if (!this.lines.size) {
      this.list.replaceChildren(el("li", { class: "muted" },
        `There is no run under ${this.folders.join(", ")} yet. One appears here when train.py starts it.`));
    }
  }

  chosenRuns() {
    return this.slots.flatMap((id, index) => (this.histories.has(id) && this.lines.has(id)
      ? [{ id, index, line: this.lines.get(id), name: plain(this.lines.get(id).name), history: this.histories.get(id) }] : []));
  }

  drawCharts() {
    this.charts?.draw(this.chosenRuns(), this.options);
  }

  showSummary() {
    const runs = this.chosenRuns();
    this.summary.hidden = this.bar.hidden = !runs.length;
    this.summary.replaceChildren(summaryTable(runs, this.options.isDark));
  }

  showSamples() {
    const runs = this.chosenRuns().filter((run) => run.history.samples.length);
    this.samples.hidden = !runs.length;
    this.picked ??= new Map(); // id -> the step whose samples are shown; without one, the newest
    if (this.samples.contains(document.activeElement)) return; // a list that is open would close
    this.samples.replaceChildren(el("h2", {}, "Samples"), el("div", { class: "samples" }, runs.map((run) => sampleColumn(
      run, this.picked.get(run.id), this.options.isDark, (step) => this.picked.set(run.id, step)))));
  }

  showOptions() {
    const runs = this.chosenRuns();
    const shown = runs.map((run) => run.id).join();
    if (this.optionsShown === shown + this.options.isDark) return;
    this.optionsShown = shown + this.options.isDark;
    this.table.hidden = !runs.length;
    this.table.open = this.table.open || runs.length > 1;
    this.table.replaceChildren(...optionsTable(runs, this.options.isDark));
  }

  close() {
    this.disconnect();
    darkTheme.removeEventListener("change", this.onTheme);
    document.removeEventListener("visibilitychange", this.onVisible);
    this.charts?.close();
  }
}

function byTime(a, b) {
  return (b.state === "running") - (a.state === "running") || (a.state === "running"
    ? a.name.localeCompare(b.name) : b.changed_at - a.changed_at || a.name.localeCompare(b.name));
}

/** Add a line of metrics.jsonl to a history, as the server's curves.py does. */
export function appendRecord(history, record) {
  const { columns } = history;
  const tokens = record.tokens ?? record.step * history.tokens_per_step;
  const place = { step: record.step, tokens, elapsed_s: record.elapsed_s ?? null };
  if ("train/loss" in record) {
    history.tokens_per_step ||= tokens / record.step;
    history.appended += 1;
    for (const key of COLUMNS) {
      columns[key].push(record[key] ?? null);
      for (const edge of ["low", "high"]) columns[`${edge}/${key}`]?.push(record[key] ?? null);
    }
  }
  if ("val/loss" in record) history.evaluations.push({ ...record, ...place });
  if ("samples" in record) history.samples.push({ ...place, samples: record.samples });
  for (const [key, kind] of Object.entries({
    fault: "skipped step", rollbacks: "rollback", resumed: "restart", stopped: "stop" })) {
    if (key in record) history.events.push({ ...place, kind, why: record.fault ?? record.stopped ?? "" });
  }
}

// Pieces

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

class ListRow {
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

function summaryTable(runs, isDark) {
  const best = ({ history }) => history.evaluations.reduce((found, record) => {
    const loss = record["val/sampled_loss"] ?? record["val/loss"];
    return loss != null && (!found || loss < found.loss) ? { loss, step: record.step } : found;
  }, null);
  const count = ({ history }, kind) => history.events.filter((event) => event.kind === kind).length || null;
  const columns = {
    state: ({ line }) => stateOf(line),
    step: ({ line }) => [el("div", {}, whole(line.step), line.max_iters ? el("small", {}, ` of ${whole(line.max_iters)}`) : null),
      progress(line)],
    "time left": ({ line }) => (line.time_left_s == null ? null : duration(line.time_left_s)),
    "train loss": ({ line }) => fixed(line["train/loss"], 4),
    "val loss": ({ line }) => fixed(line["val/loss"], 4),
    "best val": (run) => { const at = best(run); return at && [fixed(at.loss, 4), el("small", {}, ` step ${whole(at.step)}`)]; },
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
    el("thead", {}, el("tr", {}, el("th", { scope: "col" }, "run"), cells.map(([title]) => el("th", { scope: "col" }, title)))),
    el("tbody", {}, runs.map((run, i) => el("tr", {}, el("th", { scope: "row" }, label(run, isDark)),
      cells.map(([title, column]) => el("td", { "data-title": title }, column[i] ?? "–"))))));
}

function sampleColumn(run, step, isDark, onPick) {
  const { samples } = run.history;
  const texts = el("div");
  const show = (picked) => {
    const record = samples.find((sample) => sample.step === picked) ?? samples.at(-1);
    texts.replaceChildren(...record.samples.map((text) => el("p", { class: "text sample" }, text)));
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

function optionsTable(runs, isDark) {
  const keys = [...new Set(runs.flatMap((run) => Object.keys(run.history.options)))];
  const rows = keys.map((key) => {
    const values = runs.map((run) => (key in run.history.options ? String(run.history.options[key]) : "–"));
    return { key, values, differs: new Set(values).size > 1 };
  });
  const body = el("tbody");
  const fill = (onlyDiffering) => body.replaceChildren(...rows.filter((row) => row.differs || !onlyDiffering).map((row) => el(
    "tr", { class: row.differs ? "differs" : null }, el("th", { scope: "row" }, row.key),
    row.values.map((value) => el("td", { class: "mono" }, value)))));
  const several = runs.length > 1;
  fill(several);
  const numDiffering = rows.filter((row) => row.differs).length;
  return [
    el("summary", {}, el("h2", {}, "Options"), several ? el("small", {}, ` ${numDiffering} of ${keys.length} differ`) : null),
    several ? el("label", {}, el("input", { type: "checkbox", checked: true,
      onchange: (event) => fill(event.target.checked) }), "only what differs") : null,
    el("div", { class: "scroll" }, el("table", { class: "options" }, el("thead", {}, el("tr", {}, el("th", { scope: "col" }, "option"),
      runs.map((run) => el("th", { scope: "col" }, label(run, isDark))))), body)),
  ].filter(Boolean);
}
