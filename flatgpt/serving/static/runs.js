// The Runs view: a list of all runs, and for the chosen ones their state, curves, samples and options. The server's
// events keep it up to date; the link holds which runs are chosen and how they are drawn.

import { getJSON, listen } from "./api.js";
import { darkTheme } from "./charts.js";
import { makeCharts, plain } from "./curves.js";
import { el } from "./dom.js";
import { fixed } from "./format.js";
import { ListRow, optionsTable, sampleColumn, summaryTable } from "./run_parts.js";

const MAX_APPENDED = 1000; // reports added to a history before it is asked for anew, thinned
const RETRY_MS = 2000;
const X_AXES = { tokens: "tokens", step: "steps", elapsed_s: "time" };

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
      el("input", { type: "radio", name: "x", value, checked: value === this.options.x,
        onchange: () => set("x", value) }),
      el("span", {}, title)));
    const box = (name, title) => el("label", {}, el("input", {
      type: "checkbox", checked: this.options[name], onchange: (event) => set(name, event.target.checked) }), title);
    const shown = el("output", {}, fixed(this.options.smooth, 2));
    const slider = el("input", { type: "range", min: 0, max: 0.99, step: 0.01, value: this.options.smooth,
      oninput: () => {
        shown.textContent = fixed(Number(slider.value), 2);
        set("smooth", Number(slider.value));
      } });
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
      news: (news) => this.append(news),
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

  append(news) {
    const history = this.histories.get(news.id);
    if (!history) return;
    for (const [key, values] of Object.entries(history.columns)) {
      const source = key.replace(/^(low|high)\//, ""); // a single report is its own lowest and highest
      values.push(...news.columns[source]);
    }
    for (const part of ["evaluations", "events", "samples"]) history[part].push(...news[part]);
    history.appended += news.columns.step.length;
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
    const shown = [...this.list.children];
    if (shown.length !== elements.length || shown.some((row, i) => row !== elements[i])) { // else the focus would go
      this.list.replaceChildren(...elements);
    }
    this.clear.disabled = !this.chosen.length;
    if (!this.lines.size) {
      this.list.replaceChildren(el("li", { class: "muted" },
        `There is no run under ${this.folders.join(", ")} yet. One appears here when train.py starts it.`));
    }
  }

  chosenRuns() {
    return this.slots.flatMap((id, index) => {
      const [line, history] = [this.lines.get(id), this.histories.get(id)];
      return line && history ? [{ id, index, line, name: plain(line.name), history }] : [];
    });
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
    const columns = runs.map((run) => sampleColumn(
      run, this.picked.get(run.id), this.options.isDark, (step) => this.picked.set(run.id, step)));
    this.samples.replaceChildren(el("h2", {}, "Samples"), el("div", { class: "samples" }, columns));
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
