// The shell: tabs by location.hash. `#runs?x=tokens` shows the view "runs" with the parameters x=tokens; a view writes
// what it shows back into the hash, so that a link holds it.
//
// A view is a module with mount(element, params, setParams), which returns a function that ends it.

import { el, errorNote } from "./dom.js";

const VIEWS = {
  runs: { title: "Runs", load: () => import("./runs.js") },
  write: { title: "Write", load: () => import("./write.js") },
  inside: { title: "Look inside", load: () => import("./inside.js") },
};

const nav = document.querySelector("nav");
const main = document.getElementById("main");
const tabs = Object.fromEntries(Object.entries(VIEWS).map(
  ([name, view]) => [name, el("a", { href: `#${name}`, class: "tab" }, view.title)]));
nav.append(...Object.values(tabs));

let end = () => {};
let visit = 0;

async function show() {
  const [name, query = ""] = location.hash.slice(1).split("?", 2);
  const current = name in VIEWS ? name : "runs";
  const thisVisit = ++visit;
  end();
  end = () => {};
  for (const [key, tab] of Object.entries(tabs)) {
    if (key === current) tab.setAttribute("aria-current", "page");
    else tab.removeAttribute("aria-current");
  }
  document.title = `${VIEWS[current].title} · flatGPT`;
  const section = el("section", { class: `view ${current}`, "aria-label": VIEWS[current].title });
  main.replaceChildren(section);

  // The tab remembers what its view shows, for when the user comes back to it.
  const setParams = (params) => {
    if (thisVisit !== visit) return;
    const hash = `#${current}${params.size ? `?${params}` : ""}`;
    history.replaceState(null, "", hash);
    tabs[current].setAttribute("href", hash);
  };
  try {
    const { mount } = await VIEWS[current].load();
    if (thisVisit !== visit) return;
    const ending = (await mount(section, new URLSearchParams(query), setParams)) ?? (() => {});
    if (thisVisit === visit) end = ending;
    else ending();
  } catch (error) {
    section.replaceChildren(errorNote(error));
  }
}

addEventListener("hashchange", show);
show();
