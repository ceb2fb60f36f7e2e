// Which item of the pictures is chosen, by pointer and by keys.
const choosing = (() => {
  "use strict";
  let panes = []; // { svg, view }

  const keyOf = (target) => target.closest(".item")?.dataset.key.split(" ")[1];
  const itemsIn = (svg) => [...svg.querySelectorAll(".item")];

  function turnTo(shown) {
    panes = shown;
    for (const { svg } of panes) {
      svg.addEventListener("click", clicked);
      svg.addEventListener("keydown", pressed);
      svg.addEventListener("focusin", focused);
    }
  }

  // An operator is told about; a region unfolds or folds, too.
  function clicked(event) {
    const key = keyOf(event.target);
    if (!key) return state.change({ selected: null });
    const open = new Set(state.now.open);
    const region = Number(key.slice(1));
    if (key[0] === "r" && !open.delete(region)) open.add(region);
    return state.change(key[0] === "r" ? { selected: key, open } : { selected: key });
  }

  function pressed(event) {
    if (dom.rove(asRead(event.currentTarget), event)) return;
    if (event.key !== "Enter" && event.key !== " ") return;
    event.preventDefault();
    clicked(event);
  }

  // From the top, and from the left.
  function asRead(svg) {
    const place = new Map(itemsIn(svg).map((item) => [item, item.getBoundingClientRect()]));
    const order = (a, b) => place.get(a).y - place.get(b).y || place.get(a).x - place.get(b).x;
    return [...place.keys()].sort(order);
  }

  function focused(event) {
    const item = event.target.closest(".item");
    if (item?.matches(":focus-visible")) camera.bring(item);
  }

  // The chosen one, its wires, and what it was made from; and one item of each pane that Tab reaches.
  function mark() {
    const { selected } = state.now;
    const node = selected?.[0] === "n" ? state.drawing()?.nodes[Number(selected.slice(1))] : null;
    const sources = new Set((node?.made_from ?? []).map((at) => `n${at}`));
    for (const { svg } of panes) {
      for (const item of itemsIn(svg)) {
        item.classList.toggle("selected", keyOf(item) === selected);
        item.classList.toggle("source", sources.has(keyOf(item)));
      }
      for (const wire of svg.querySelectorAll(".wire")) {
        wire.classList.toggle("lit", selected !== null && wire.dataset.ends.split(" ").includes(selected));
      }
      reachable(svg);
    }
  }

  function reachable(svg) {
    const items = itemsIn(svg);
    const chosen = items.find((item) => keyOf(item) === state.now.selected) ?? asRead(svg)[0];
    for (const item of items) item.setAttribute("tabindex", item === chosen ? "0" : "-1");
  }

  // Brings what was chosen into sight.
  function show() {
    const found = panes.flatMap(({ svg }) => itemsIn(svg)).find((item) => keyOf(item) === state.now.selected);
    if (found) camera.bring(found);
  }

  return { turnTo, mark, show };
})();
