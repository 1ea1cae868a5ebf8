// Elements are made here and nowhere else from text: a string becomes a text node, so text is never HTML.

/** el("a", { href: "#runs", class: "tab", onclick: f }, "Runs"): an element with attributes, listeners and children. */
export function el(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value != null) element.setAttribute(name, value);
  }
  element.append(...children.flat().filter((child) => child != null));
  return element;
}

/** A long name that may be broken behind its separators: nodes for el or append. */
export function breakable(name) {
  return name.split(/(?<=[/_.-])/).flatMap((part, i) => (i ? [el("wbr"), part] : [part]));
}

/** A message in the place of what could not be shown. */
export function errorNote(error) {
  return el("p", { class: "error", role: "alert" }, error.message);
}
