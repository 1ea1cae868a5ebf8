// The Write view: a prompt, and one or two columns that continue it, each with its model and settings. A token that is
// chosen shows what it was drawn from; another candidate takes its place, and the column writes on from there.

import { postStream } from "./api.js";
import { el, errorNote } from "./dom.js";
import { listModels, modelSelect, surpriseColor, surpriseLegend, visible } from "./models.js";

const KNOBS = [ // keys, defaults and meanings are sample.py's; `off` changes nothing
  { key: "temperature", value: 0.8, off: 1, step: 0.1, help: "below 1 more predictable, above 1 more random; 0: always the likeliest" },
  { key: "top_k", value: 200, off: 0, step: 1, help: "draw among this many likeliest tokens; 0: all" },
  { key: "top_p", value: 1, off: 1, step: 0.05, help: "draw among the likeliest that hold this much probability; 1: all" },
  { key: "min_p", value: 0, off: 0, step: 0.01, help: "draw among those at least this share as likely as the likeliest; 0: all" },
  { key: "repetition_penalty", value: 1, off: 1, step: 0.05, help: "above 1: tokens that were there before become less likely" },
];
const SHARED = [
  { key: "max_new_tokens", value: 200, step: 1, help: "tokens to write" },
  { key: "seed", value: 1337, step: 1, help: "the same seed writes the same text, here and with sample.py" },
];
const PERCENT = new Intl.NumberFormat("en", { style: "percent", minimumFractionDigits: 2, maximumFractionDigits: 2 });

export async function mount(element, params, setParams) {
  const view = new WriteView(element, params, setParams, await listModels());
  return () => view.stop();
}

class WriteView {
  constructor(element, params, setParams, models) {
    this.setParams = setParams;
    this.prompt = el("textarea", { rows: 3, spellcheck: "false", "aria-label": "Prompt",
      placeholder: "What to continue. Empty: the end-of-text token, or a newline.", oninput: () => this.writeLink() },
      params.get("prompt") ?? "");
    this.shared = new Knobs(SHARED, params, "", () => this.writeLink());
    this.columns = ["", "b."].map((prefix) => new Column(this, models, params, prefix));
    this.compare = el("input", { type: "checkbox", checked: params.has("compare"), onchange: () => this.arrange() });
    this.write = el("button", { class: "primary", onclick: () => this.start() }, "Write");
    this.end = el("button", { disabled: true, onclick: () => this.stop() }, "Stop");
    element.append(
      el("div", { class: "card writer" }, this.prompt, el("div", { class: "write-bar" }, this.write, this.end,
        el("label", {}, this.compare, "two columns"), this.shared.element,
        el("span", { class: "muted keys" }, "Ctrl+Enter writes, Esc stops"))),
      el("div", { class: "columns" }, this.columns.map((column) => column.element)));
    element.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) this.start();
      if (event.key === "Escape") this.stop();
    });
    this.arrange();
  }

  get shownColumns() {
    return this.compare.checked ? this.columns : this.columns.slice(0, 1);
  }

  arrange() {
    if (!this.compare.checked) this.columns[1].stop();
    this.columns[1].element.hidden = !this.compare.checked;
    this.writeLink();
  }

  start() {
    for (const column of this.shownColumns) column.run();
  }

  stop() {
    for (const column of this.columns) column.stop();
  }

  showState() {
    this.end.disabled = !this.columns.some((column) => column.isWriting);
  }

  writeLink() {
    const params = new URLSearchParams();
    if (this.prompt.value) params.set("prompt", this.prompt.value);
    if (this.compare.checked) params.set("compare", "1");
    this.shared.addTo(params);
    for (const column of this.shownColumns) column.addTo(params);
    this.setParams(params);
  }
}

/** Numbers with a name and what they do. In a link only those that are not the default. */
class Knobs {
  constructor(knobs, params, prefix, onchange) {
    this.knobs = knobs;
    this.prefix = prefix;
    this.inputs = knobs.map(({ key, value, step }) => el("input", { type: "number", step, min: 0, oninput: onchange,
      value: params.get(prefix + key) ?? value, "aria-label": key, "aria-describedby": `about-${prefix}${key}` }));
    this.element = el("div", { class: "knobs" }, knobs.map(({ key, help }, i) => el("label", { class: "knob" },
      el("span", { class: "mono" }, key), this.inputs[i], el("small", { id: `about-${prefix}${key}` }, help))));
  }

  /** Raises Error for what is no number. */
  get values() {
    return Object.fromEntries(this.knobs.map(({ key }, i) => {
      if (this.inputs[i].value === "") throw new Error(`${key} must be a number.`);
      return [key, Number(this.inputs[i].value)];
    }));
  }

  /** Those that change something, in words. */
  get summary() {
    const parts = this.knobs.map(({ key, off }, i) => Number(this.inputs[i].value) !== off && `${key} ${this.inputs[i].value}`);
    return parts.filter(Boolean).join(" · ") || "the model's own probabilities";
  }

  addTo(params) {
    this.knobs.forEach(({ key, value }, i) => {
      if (this.inputs[i].value !== String(value)) params.set(this.prefix + key, this.inputs[i].value);
    });
  }
}

class Column {
  constructor(view, models, params, prefix) {
    this.view = view;
    this.prefix = prefix;
    this.tokens = []; // the lines of the server, each with the element that shows it
    this.select = modelSelect(models, params.get(`${prefix}model`), "Model", () => view.writeLink());
    this.knobs = new Knobs(KNOBS, params, prefix, () => view.writeLink());
    this.summary = el("summary", {});
    this.promptText = el("span", { class: "prompt" });
    this.written = el("span", {});
    this.tail = el("span", {});
    this.output = el("div", { class: "text output", role: "group", "aria-label": "Text", "aria-busy": "false",
      onclick: (event) => this.choose(this.indexOf(event.target)), onkeydown: (event) => this.moveByKey(event) },
      this.promptText, this.written, this.tail);
    this.status = el("p", { class: "muted status", role: "status" });
    this.details = el("div", { class: "details", hidden: true });
    this.element = el("div", { class: "card column" },
      el("div", { class: "column-head" }, this.select, el("details", { class: "settings", open: innerWidth > 700 },
        this.summary, this.knobs.element)),
      this.output, el("div", { class: "under" }, this.status, surpriseLegend()), this.details);
  }

  get isWriting() {
    return this.controller != null;
  }

  addTo(params) {
    this.summary.textContent = this.knobs.summary;
    params.set(`${this.prefix}model`, this.select.value);
    this.knobs.addTo(params);
  }

  stop() {
    this.controller?.abort();
  }

  /** Write behind the prompt; or on from tokens that are kept, behind the prompt that they were written for. */
  async run(kept = []) {
    this.stop();
    if (!kept.length) this.source = { model: this.select.value, prompt: this.view.prompt.value };
    const controller = new AbortController();
    this.begin(controller, kept);
    const began = performance.now();
    let ending = "";
    try {
      const body = { ...this.source, written: kept.map((token) => token.id), ...this.view.shared.values,
        ...this.knobs.values };
      await postStream("api/generate", body, (line) => this.take(line, kept), controller.signal);
    } catch (error) {
      if (error.name === "AbortError") ending = "stopped";
      else if (this.controller === controller) this.status.replaceChildren(errorNote(error));
    }
    if (this.controller !== controller) return; // another run has taken its place
    this.controller = null;
    this.output.setAttribute("aria-busy", "false");
    this.view.showState();
    if (!this.status.querySelector(".error")) this.summarize(performance.now() - began, ending);
  }

  begin(controller, kept) {
    this.controller = controller;
    this.tokens = [];
    this.fresh = 0; // tokens that this run has drawn
    this.written.replaceChildren();
    this.tail.textContent = "";
    this.promptText.textContent = this.source.prompt;
    this.status.textContent = "waiting for its turn …";
    this.output.setAttribute("aria-busy", "true");
    this.view.showState();
    if (!kept.length) this.details.hidden = true;
  }

  take(line, kept) {
    if (line.prompt) {
      this.status.textContent = "writing …";
    } else if (line.end != null) {
      this.tail.textContent = line.end;
    } else {
      if (line.candidates) this.fresh += 1;
      const token = { ...kept[this.tokens.length], ...line }; // a kept one has its candidates from before
      token.element = this.show(token, this.tokens.length === kept.length - 1);
      this.tokens.push(token);
      if (this.tokens.length === kept.length) this.choose(kept.length - 1, true);
    }
  }

  show(token, isReplaced) {
    const kinds = ["token", token.text.includes("\n") && "newline", token.text === "" && "part", isReplaced && "replaced"];
    const span = el("span", { class: kinds.filter(Boolean).join(" "), role: "button", tabindex: this.tokens.length ? -1 : 0,
      title: `${token.name}: ${token.surprise.toFixed(2)} nats`, style: `background: ${surpriseColor(token.surprise)}` },
      token.text);
    this.written.append(span);
    return span;
  }

  summarize(milliseconds, ending) {
    const drawn = this.tokens.slice(this.tokens.length - this.fresh);
    const mean = drawn.reduce((sum, token) => sum + token.surprise, 0) / (drawn.length || 1);
    this.status.textContent = [`${drawn.length} tokens`, `${(1000 * drawn.length / milliseconds).toFixed(0)} a second`,
      `mean surprise ${mean.toFixed(2)} nats`, ending].filter(Boolean).join(", ");
  }

  // A chosen token

  indexOf(target) {
    return this.tokens.findIndex((token) => token.element === target);
  }

  moveByKey(event) {
    const now = this.indexOf(event.target);
    const last = this.tokens.length - 1;
    const places = { ArrowRight: now + 1, ArrowLeft: now - 1, Home: 0, End: last, Enter: now, " ": now };
    const place = places[event.key];
    if (now < 0 || place == null || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    this.choose(Math.min(last, Math.max(0, place)));
  }

  choose(index, keepsFocus = false) {
    const token = this.tokens[index];
    if (!token?.candidates) return;
    for (const other of this.tokens) {
      other.element.tabIndex = other === token ? 0 : -1;
      other.element.setAttribute("aria-pressed", other === token);
    }
    if (!keepsFocus) token.element.focus();
    this.details.hidden = false;
    this.details.replaceChildren(this.table(token, index));
  }

  table(token, index) {
    const { stages, rows, others } = token.candidates;
    const cells = (probs) => probs.map((prob) => el("td", { class: "number" }, prob ? PERCENT.format(prob) : "–"));
    const row = (candidate) => {
      const isDrawn = candidate.id === token.id;
      const button = el("button", { class: "mono candidate", "aria-pressed": String(isDrawn),
        title: isDrawn ? "this one was taken" : "write on from this one", onclick: () => this.replace(index, candidate) },
        visible(candidate.name));
      const bar = `background: linear-gradient(to right, var(--accent-soft) ${100 * candidate.probs.at(-1)}%, transparent 0)`;
      return el("tr", { class: isDrawn ? "drawn" : "", style: bar }, el("th", { scope: "row" }, button), cells(candidate.probs));
    };
    return el("div", { class: "scroll" }, el("h3", {}, `Token ${index + 1}: ${visible(token.name)} (id ${token.id}), `,
      `surprise ${token.surprise.toFixed(2)} nats. Choose another one to write on from there.`),
      el("table", { class: "candidates" },
        el("thead", {}, el("tr", {}, el("th", { scope: "col" }, "candidate"),
          stages.map((name) => el("th", { scope: "col", class: "number mono" }, name)))),
        el("tbody", {}, rows.map(row), el("tr", {}, el("th", { scope: "row", class: "muted" }, "others"), cells(others)))));
  }

  replace(index, candidate) {
    const { id, name, probs } = candidate;
    const replaced = { ...this.tokens[index], id, name, surprise: -Math.log(Math.max(probs[0], 1e-45)) };
    this.run([...this.tokens.slice(0, index), replaced]);
  }
}
