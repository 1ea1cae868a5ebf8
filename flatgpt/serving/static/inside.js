// The Look inside view: the tokens of a prompt as the tokenizer cuts them, where each of them looks in any layer and
// head, and the tokens whose embeddings are nearest. One token is chosen; all three show it.

import { postJSON } from "./api.js";
import { el, errorNote } from "./dom.js";
import { listModels, modelSelect, surpriseColor, surpriseLegend, visible } from "./models.js";

const WAIT_MS = 300; // after the last key, before the prompt is sent
const EXAMPLE = "The quick brown fox jumps over the lazy dog.";

export async function mount(element, params, setParams) {
  const view = new InsideView(element, params, setParams, await listModels());
  await view.look();
  return () => view.close();
}

class InsideView {
  constructor(element, params, setParams, models) {
    this.setParams = setParams;
    this.visit = 0; // answers to an older question are dropped
    this.chosen = Number(params.get("token")) || 0;
    this.prompt = el("textarea", { rows: 3, spellcheck: "false", "aria-label": "Prompt", oninput: () => this.lookSoon() },
      params.get("prompt") ?? EXAMPLE);
    this.model = modelSelect(models, params.get("model"), "Model", () => this.look());
    this.layer = this.numberSelect("layer", params);
    this.head = this.numberSelect("head", params);
    this.error = el("div", { role: "status" });
    this.count = el("small", {});
    this.tokens = el("ol", { class: "tokens", start: 0, "aria-label": "Tokens", onclick: (event) => this.clicked(event),
      onkeydown: (event) => this.moveByKey(event) });
    this.canvas = el("canvas", { class: "attention", role: "img", onmousemove: (event) => this.explain(event),
      onclick: (event) => this.choose(this.placeIn(event).row), onmouseleave: () => this.explainRow() });
    this.caption = el("p", { class: "muted caption" });
    this.looks = el("ol", { class: "tokens looks", start: 0, "aria-hidden": "true" });
    this.neighbors = el("table", { class: "neighbors" });
    this.attention = el("div", { class: "card" }, el("h2", {}, "Attention"), el("div", { class: "write-bar" },
      el("label", {}, "layer", this.layer), el("label", {}, "head", this.head)), this.caption, this.looks,
      el("div", { class: "map" }, this.canvas));
    element.append(
      el("div", { class: "card writer" }, this.prompt, el("div", { class: "write-bar" }, this.model, this.count), this.error),
      el("div", { class: "card" }, el("h2", {}, "Tokens"), this.tokens, surpriseLegend()),
      el("div", { class: "inside-grid" }, this.attention,
        el("div", { class: "card" }, el("h2", {}, "Nearest embeddings"), this.neighbors)));
    this.resized = new ResizeObserver(() => this.draw());
    this.resized.observe(this.attention);
    this.theme = matchMedia("(prefers-color-scheme: dark)");
    this.onTheme = () => this.draw();
    this.theme.addEventListener("change", this.onTheme);
  }

  close() {
    clearTimeout(this.timer);
    this.visit += 1;
    this.resized.disconnect();
    this.theme.removeEventListener("change", this.onTheme);
  }

  numberSelect(name, params) {
    const select = el("select", { "aria-label": name, onchange: () => this.lookAtHead() });
    select.wanted = Number(params.get(name)) || 0;
    return select;
  }

  fill(select, count) {
    const wanted = Math.min(Number(select.value || select.wanted), count - 1);
    select.replaceChildren(...Array.from({ length: count }, (_, i) => el("option", { value: i }, `${i}`)));
    select.value = wanted;
  }

  writeLink() {
    const params = new URLSearchParams({ model: this.model.value, prompt: this.prompt.value, token: this.chosen });
    if (this.layer.value) params.set("layer", this.layer.value);
    if (this.head.value) params.set("head", this.head.value);
    this.setParams(params);
  }

  // Questions to the server

  lookSoon() {
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.look(), WAIT_MS);
  }

  /** Ask, and show the answer unless another question came since; a failure is shown in its place. */
  async ask(path, body, show) {
    const visit = this.visit;
    try {
      const answer = await postJSON(path, { model: this.model.value, ...body });
      if (visit === this.visit) show(answer);
    } catch (error) {
      if (visit === this.visit) this.error.replaceChildren(errorNote(error));
    }
  }

  async look() {
    this.visit += 1;
    this.found = this.weights = null;
    await this.ask("api/tokens", { prompt: this.prompt.value }, (found) => {
      this.found = found;
      this.error.replaceChildren();
      this.fill(this.layer, found.layers);
      this.fill(this.head, found.heads);
      this.attention.hidden = !found.layers;
      this.count.textContent = `${found.tokens.length} tokens of a vocabulary of ${found.vocab_size.toLocaleString("en")}`;
      this.tokens.replaceChildren(...found.tokens.map((token) => this.chip(token, surpriseColor(token.surprise), true)));
      this.looks.replaceChildren(...found.tokens.map((token) => this.chip(token, "transparent", false)));
      this.choose(Math.min(this.chosen, found.tokens.length - 1), false);
    });
    if (this.found?.layers) await this.lookAtHead();
  }

  async lookAtHead() {
    this.writeLink();
    const body = { prompt: this.prompt.value, layer: Number(this.layer.value), head: Number(this.head.value) };
    await this.ask("api/attention", body, ({ weights }) => {
      this.weights = weights;
      this.draw();
    });
  }

  chip({ id, name, surprise }, color, isButton) {
    const said = surprise == null ? "the first token" : `surprise ${surprise.toFixed(2)} nats`;
    return el("li", {}, el(isButton ? "button" : "span", { class: "chip", title: `${name}, id ${id}, ${said}`, tabindex: -1,
      style: `background: ${color}` }, el("span", { class: "mono" }, visible(name)), el("small", {}, `${id}`)));
  }

  // The chosen token

  clicked(event) {
    const item = event.target.closest("li");
    if (item) this.choose([...this.tokens.children].indexOf(item));
  }

  moveByKey(event) {
    const last = this.tokens.children.length - 1;
    const places = { ArrowRight: this.chosen + 1, ArrowLeft: this.chosen - 1, Home: 0, End: last };
    if (!(event.key in places)) return;
    event.preventDefault();
    this.choose(Math.min(last, Math.max(0, places[event.key])));
  }

  choose(place, focuses = true) {
    const token = this.found?.tokens[place];
    if (!token) return;
    this.chosen = place;
    for (const [i, { firstChild: button }] of [...this.tokens.children].entries()) {
      button.tabIndex = i === place ? 0 : -1;
      button.setAttribute("aria-pressed", i === place);
    }
    if (focuses) this.tokens.children[place].firstChild.focus();
    this.writeLink();
    this.draw();
    this.ask("api/neighbors", { token: token.id }, (found) => {
      if (this.found.tokens[this.chosen].id === token.id) this.showNeighbors(found);
    });
  }

  showNeighbors({ name, neighbors }) {
    const row = ({ id, name: other, cosine }) => el("tr", {
      style: `background: linear-gradient(to right, var(--accent-soft) ${100 * Math.max(0, cosine)}%, transparent 0)` },
      el("td", { class: "mono" }, visible(other)), el("td", { class: "number muted" }, `${id}`),
      el("td", { class: "number" }, cosine.toFixed(3)));
    this.neighbors.replaceChildren(
      el("thead", {}, el("tr", {}, el("th", { scope: "col" }, "nearest to ", el("span", { class: "mono" }, visible(name))),
        el("th", { scope: "col", class: "number" }, "id"), el("th", { scope: "col", class: "number" }, "cosine"))),
      el("tbody", {}, neighbors.map(row)));
  }

  // Attention: row t has what position t looks at, darker for more

  draw() {
    const count = this.weights?.length;
    if (!count || this.attention.hidden) return;
    const cell = Math.max(1, Math.floor(Math.min(this.canvas.parentElement.clientWidth, 640) / count * devicePixelRatio));
    this.canvas.width = this.canvas.height = cell * count;
    this.canvas.style.width = `${cell * count / devicePixelRatio}px`;
    const context = this.canvas.getContext("2d");
    const styles = getComputedStyle(this.canvas);
    context.fillStyle = styles.getPropertyValue("--accent");
    this.weights.forEach((row, t) => row.forEach((weight, s) => {
      context.globalAlpha = Math.sqrt(weight); // so that small ones are seen
      context.fillRect(s * cell, t * cell, cell, cell);
    }));
    context.globalAlpha = 1;
    context.strokeStyle = styles.getPropertyValue("--fg");
    context.strokeRect(0.5, this.chosen * cell + 0.5, (this.chosen + 1) * cell - 1, Math.max(1, cell - 1));
    this.canvas.setAttribute("aria-label", `Attention of layer ${this.layer.value}, head ${this.head.value}: ${count} by ${count}`);
    this.explainRow();
  }

  placeIn(event) {
    const box = this.canvas.getBoundingClientRect();
    const place = (offset) => Math.floor(offset / box.width * (this.weights?.length ?? 0));
    return { row: place(event.clientY - box.top), column: place(event.clientX - box.left) };
  }

  explain(event) {
    const { row, column } = this.placeIn(event);
    const weight = this.weights?.[row]?.[column];
    if (weight == null) return this.explainRow();
    const [from, to] = [row, column].map((place) => visible(this.found.tokens[place].name));
    this.caption.textContent = `${from} (${row}) looks at ${to} (${column}): ${weight.toFixed(4)}`;
  }

  /** The chosen token's row, as colours of the tokens. */
  explainRow() {
    const row = this.weights?.[this.chosen];
    if (!row) return;
    this.caption.textContent = `Where ${visible(this.found.tokens[this.chosen].name)} (${this.chosen}) looks:`;
    for (const [s, { firstChild: chip }] of [...this.looks.children].entries()) {
      chip.style.background = `color-mix(in srgb, var(--accent) ${Math.round(75 * Math.sqrt(row[s] ?? 0))}%, transparent)`;
      chip.classList.toggle("later", s > this.chosen);
      chip.title = row[s] == null ? "comes later" : row[s].toFixed(4);
    }
  }
}
