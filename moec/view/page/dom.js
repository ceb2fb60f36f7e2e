// Elements. What comes of a program gets into the page here alone, and only as text or as an attribute's value.
const dom = (() => {
  "use strict";
  const SVG = "http://www.w3.org/2000/svg";

  // Attributes that are null, undefined or false are left out; `onclick` and its like are listeners.
  function filled(node, attributes, children) {
    for (const [name, value] of Object.entries(attributes ?? {})) {
      if (value === null || value === undefined || value === false) continue;
      if (typeof value === "function") node.addEventListener(name.slice(2), value);
      else node.setAttribute(name, value === true ? "" : String(value));
    }
    const kept = children
      .flat(Infinity)
      .filter((child) => child !== null && child !== undefined && child !== false);
    node.append(...kept.map((child) => (child instanceof Node ? child : String(child))));
    return node;
  }

  const el = (tag, attributes, ...children) => filled(document.createElement(tag), attributes, children);
  const svg = (tag, attributes, ...children) =>
    filled(document.createElementNS(SVG, tag), attributes, children);
  const byId = (id) => document.getElementById(id);

  // The children of `node` become these; the focus stays where it was, by the `data-key` of what had it.
  function put(node, ...children) {
    const focused = node.contains(document.activeElement) ? document.activeElement.dataset.key : undefined;
    node.replaceChildren();
    filled(node, {}, children);
    if (focused === undefined) return;
    const again = [...node.querySelectorAll("[data-key]")].find((each) => each.dataset.key === focused);
    if (again) again.focus({ preventScroll: true });
  }

  // Up, down, Home and End move the focus among `items`, of which one alone is reached by Tab.
  function rove(items, event) {
    const moves = { ArrowDown: 1, ArrowUp: -1, Home: -Infinity, End: Infinity };
    const at = items.indexOf(document.activeElement);
    if (!(event.key in moves) || at < 0) return false;
    const next = Math.max(0, Math.min(items.length - 1, at + moves[event.key]));
    items[at].setAttribute("tabindex", "-1");
    items[next].setAttribute("tabindex", "0");
    items[next].focus();
    event.preventDefault();
    return true;
  }

  return { el, svg, byId, put, rove };
})();
