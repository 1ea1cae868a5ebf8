// The models that can be chosen, as both views of models show them.

import { getJSON } from "./api.js";
import { el } from "./dom.js";

export async function listModels() {
  const { models } = await getJSON("api/models");
  if (!models.length) {
    throw new Error("There is no model yet: a run's first checkpoint appears here, and serve.py --models names others.");
  }
  return models;
}

/** A select of models, grouped by run; `chosen` is an id, which need not be there any more. */
export function modelSelect(models, chosen, label, onchange) {
  const groups = new Map();
  for (const model of models) groups.set(model.run, [...(groups.get(model.run) ?? []), model]);
  const options = [...groups].map(([run, members]) => el("optgroup", { label: run || "named at the start" },
    members.map((model) => el("option", { value: model.id }, titleOf(model)))));
  const select = el("select", { "aria-label": label, onchange }, options);
  select.value = models.some((model) => model.id === chosen) ? chosen : defaultModel(models).id;
  return select;
}

function titleOf({ id, run, step, is_best: isBest }) {
  return run ? `${run.split("/").pop()} · step ${step.toLocaleString("en")}${isBest ? " · best" : ""}` : id;
}

function defaultModel(models) {
  return models.find((model) => model.is_best) ?? models[0];
}

/** What sample.py calls a token, without its quotes and with its blanks to be seen. */
export function visible(name) {
  return name.replace(/^b?(['"])(.*)\1$/s, "$2").replaceAll(" ", "␣");
}

/** The background of a token by how surprised the model was, in nats. */
export function surpriseColor(surprise) {
  if (surprise == null) return "transparent";
  return `color-mix(in srgb, var(--surprise) ${Math.round(Math.min(1, surprise / 8) * 75)}%, transparent)`;
}

/** What the colours of tokens mean. */
export function surpriseLegend() {
  return el("p", { class: "legend muted" }, "surprise, −ln p: ",
    [0, 1, 2, 4, 8].map((nats) => el("span", { style: `background: ${surpriseColor(nats)}` }, `${nats}`)), " nats");
}
