// The two pictures, before and after.
const picture = (() => {
  "use strict";
  const NOWHERE = { x: 0, y: 0, width: 1, height: 1 };
  let drawn = null; // { seen, placed, scaled }
  const panes = dom.el("div", { class: "panes" });

  // `other`: another drawing than before; `unfolded`: the same, with other regions unfolded.
  function draw({ other, unfolded }) {
    const drawing = state.drawing();
    if (!drawing || !drawing.nodes.length) return empty();
    const before = drawn;
    const seen = visible.of(drawing, state.now);
    const placed = layout.of(drawing, seen, labels.sizeOf, labels.statusOf);
    drawn = { seen, placed, scaled: scaleOf(drawing, seen) };
    const shown = seen.shown.map((side) => pane(side));
    dom.put(panes, shown.map(({ figure }) => figure), buttons()); // prettier-ignore
    panes.classList.toggle("single", shown.length === 1);
    choosing.turnTo(shown);
    camera.turnTo(shown, placed.bounds, placed.changed);
    if (other || !before) return camera.fit();
    return unfolded ? camera.follow(placeOf(before), placeOf(drawn)) : camera.stay();
  }

  function empty() {
    drawn = null;
    choosing.turnTo([]);
    camera.turnTo([], NOWHERE, []);
    dom.put(
      panes,
      dom.el("p", { class: "nothing" }, state.step().diff ? textAlone() : "This step left no graph."),
    );
  }

  // Saved programs have the texts of their passes, and one graph.
  function textAlone() {
    const onclick = () => state.change({ tab: "text" }, { record: true });
    return [
      "Of this step only the text was kept: ",
      dom.el("button", { type: "button", class: "link", onclick }, "what it changed"),
      ".",
    ];
  }

  // Of the region that was unfolded or folded, which stays under the pointer.
  function placeOf({ placed }) {
    const key = state.now.selected ?? "";
    const places = visible.SIDES.map((side) => placed[side].opened.get(key) ?? placed[side].boxes.get(key));
    return key[0] === "r" ? places.find(Boolean) : null;
  }

  const nodesOf = (drawing, seen, key, side) => seen[side].items.get(key).map((at) => drawing.nodes[at]);

  function scaleOf(drawing, seen) {
    const keys = visible.SIDES.flatMap((side) => [...seen[side].items.keys()].map((key) => [key, side]));
    return overlays.scale(
      keys.map(([key, side]) => overlays.valueOf(nodesOf(drawing, seen, key, side), side)),
    );
  }

  function pane(side) {
    const title = side === "before" ? state.step().before : state.step().after;
    const same = drawn.seen.before.items.size ? "before and after" : "as it is";
    const what = drawn.seen.changed ? side : same;
    const view = dom.svg("g", { class: "view" }, contents(side));
    const told = {
      class: "pane-picture",
      role: "group",
      "aria-label": `${what}: ${title}`,
      "data-side": side,
    };
    const svg = dom.svg("svg", told, arrows(side), view);
    const caption = dom.el("figcaption", {}, dom.el("b", {}, what), title);
    return { svg, view, figure: dom.el("figure", { class: `pane ${side}` }, caption, svg) };
  }

  function contents(side) {
    const { seen, placed, scaled } = drawn;
    const { boxes, opened } = placed[side];
    const frames = [...opened].map(([key, box]) => shapes.frame(key, side, box));
    const items = [...boxes].map(([key, box]) => {
      const value = overlays.valueOf(nodesOf(state.drawing(), seen, key, side), side);
      return shapes.box(key, side, box, value, scaled);
    });
    return [frames, seen[side].edges.map((edge) => wire(side, edge)), items];
  }

  function wire(side, [from, to, status]) {
    const { boxes } = drawn.placed[side];
    const points = drawn.placed.pointsOf(from, to);
    const line = shapes.edge(boxes.get(from), boxes.get(to), points, status, side);
    line.dataset.ends = `${from} ${to}`;
    return line;
  }

  function arrows(side) {
    const size = { viewBox: "0 0 8 8", refX: 7, refY: 4, markerWidth: 7, markerHeight: 7 };
    const told = { ...size, markerUnits: "userSpaceOnUse", orient: "auto" };
    const arrow = (status) =>
      dom.svg(
        "marker",
        { id: `arrow-${side}-${status}`, class: `arrow ${status}`, ...told },
        dom.svg("path", { d: "M0,0.5L8,4L0,7.5Z" }),
      );
    return dom.svg("defs", {}, ["kept", "created", "removed"].map(arrow));
  }

  function buttons() {
    const button = (sign, what, key, onclick) =>
      dom.el("button", { type: "button", title: `${what} (${key})`, "aria-label": what, onclick }, sign);
    return dom.el(
      "div",
      { class: "zoom", role: "group", "aria-label": "Scale" },
      button("−", "smaller", "-", () => camera.scaleBy(1 / 1.3)),
      button("⤢", "fit", "0", () => camera.fit(true)),
      button("+", "larger", "+", () => camera.scaleBy(1.3)),
    );
  }

  const legend = () => (drawn ? overlays.legend(drawn.scaled) : null);

  camera.watch(panes, choosing.show);

  return { panes, draw, legend };
})();
