// How an item looks: its lines of text, its size, its box, and the line of an edge.
const shapes = (() => {
  "use strict";
  const WIDEST = 30; // characters
  const [CHARACTER, BOLD] = [6.7, 7.4]; // widths of one, in the fonts of `.item text`
  const [HEIGHT, INSET] = [44, 12];

  const nodeAt = (key) => state.drawing().nodes[Number(key.slice(1))];
  const regionAt = (key) => state.drawing().regions[Number(key.slice(1))];
  const named = (text) => words.inLayer(text, state.now.layer);
  const operator = (side) => side.operator.replace(/^aten\./, "");

  // [first line, its right end, second line]
  function linesOf(key, side) {
    if (key[0] === "n") {
      const seen = nodeAt(key)[side];
      const name = named(seen.name);
      return [operator(seen), name === operator(seen) ? "" : name, seen.value];
    }
    const region = regionAt(key);
    const nodes = timeline
      .membersOf(state.drawing())
      [Number(key.slice(1))].map((at) => state.drawing().nodes[at]);
    const there = nodes.filter((node) => node[side]);
    const changes = words.changes(timeline.countsOf(there));
    return [
      named(region.name),
      "",
      `${words.plural(there.length, "operator")}${changes ? ` · ${changes}` : ""}`,
    ];
  }

  function sizeOf(key) {
    const present = visible.SIDES.filter((side) => key[0] === "r" || nodeAt(key)[side]);
    const widths = present.map((side) => {
      const [first, right, second] = linesOf(key, side).map((text) => words.clipped(text, WIDEST));
      return Math.max(
        BOLD * first.length + CHARACTER * right.length + (right ? 18 : 0),
        CHARACTER * second.length,
      );
    });
    return { width: Math.round(Math.max(96, ...widths) + 2 * INSET + 14), height: HEIGHT };
  }

  const statusOf = (key) => (key[0] === "n" ? nodeAt(key).status : regionAt(key).status);

  // A box with its sign; a folded region has a second sheet behind it.
  function box(key, side, { x, y, width, height }, value, scaled) {
    const status = statusOf(key);
    const [first, right, second] = linesOf(key, side);
    const last = value === null ? second : overlays.told(value);
    const centre = height > HEIGHT * 1.5 ? (height - HEIGHT) / 2 : 0;
    return dom.svg(
      "g",
      {
        class: `item ${key[0] === "n" ? "operator" : "region"} ${status} ${ends(key, side)}`,
        transform: `translate(${x},${y})`,
        ...focusable(key, side, false),
      },
      key[0] === "r" && dom.svg("rect", { class: "sheet", x: 4, y: 4, width, height, rx: 8 }),
      dom.svg("rect", { class: "body", width, height, rx: 8 }),
      value !== null && dom.svg("rect", { ...painted(value, scaled), width, height, rx: 8 }),
      dom.svg("rect", { class: "edge", width, height, rx: 8 }),
      status !== "kept" && sign(status),
      dom.svg(
        "g",
        { transform: `translate(0,${centre})` },
        dom.svg(
          "text",
          { class: "first", x: INSET, y: 18 },
          `${key[0] === "r" ? "▸ " : ""}${words.clipped(first, WIDEST)}`,
        ),
        right &&
          dom.svg(
            "text",
            { class: "right", x: width - INSET, y: 18, "text-anchor": "end" },
            words.clipped(right, WIDEST),
          ),
        dom.svg(
          "text",
          { class: value === null ? "second" : "second told", x: INSET, y: 35 },
          words.clipped(last, Math.floor((width - 2 * INSET) / CHARACTER) + 1),
        ),
      ),
    );
  }

  // One item of a pane is reached by Tab; `picture` chooses which.
  function focusable(key, side, open) {
    const what = linesOf(key, side).filter(Boolean).join(", ");
    const label = `${key[0] === "r" ? "region " : ""}${what}, ${statusOf(key)}`;
    return {
      "data-key": `${side} ${key}`,
      role: "button",
      tabindex: "-1",
      "aria-label": label,
      "aria-expanded": key[0] === "r" ? String(open) : null,
    };
  }

  const ends = (key, side) =>
    key[0] === "n" && ["input", "output"].includes(nodeAt(key)[side].operator) ? "end" : "";

  const painted = (value, scaled) =>
    overlays.isAmount()
      ? { class: "heat", "fill-opacity": overlays.shade(value, scaled) }
      : { class: `tint tint-${overlays.colour(value, scaled)}` };

  // On the upper left corner.
  const sign = (status) =>
    dom.svg(
      "g",
      { class: "sign", transform: "translate(1,1)" },
      dom.svg("circle", { r: 8.5 }),
      dom.svg("text", { y: 4.5, "text-anchor": "middle" }, words.SIGNS[status]),
    );

  // An unfolded region, around its operators; its name folds it.
  function frame(region, side, { x, y, width, height }) {
    const { name, status } = state.drawing().regions[region];
    return dom.svg(
      "g",
      { class: `frame ${status}`, transform: `translate(${x},${y})` },
      dom.svg("rect", { class: "edge", width, height, rx: 10 }),
      dom.svg(
        "g",
        { class: "item handle", ...focusable(`r${region}`, side, true) },
        dom.svg("rect", { class: "grip", width, height: 24, rx: 10 }),
        dom.svg("text", { class: "first", x: INSET, y: 17 }, `▾ ${named(name)}`),
      ),
      status !== "kept" && sign(status),
    );
  }

  // From the lower edge of one box to the upper edge of another, by the points of the layout where it has some.
  function edge(from, to, points, status, side) {
    const start = { x: from.x + from.width / 2, y: from.y + from.height };
    const end = { x: to.x + to.width / 2, y: to.y - 1 };
    const between = end.y > start.y ? (points ?? []).slice(1, -1) : [];
    return dom.svg("path", {
      class: `wire ${status}`,
      d: curve([start, ...between, end]),
      "marker-end": `url(#arrow-${side}-${status})`,
    });
  }

  // Upright at every point; where it must go back up, it swings out below and above.
  function curve([start, ...rest]) {
    let last = start;
    const parts = rest.map((point) => {
      const bend = Math.max((point.y - last.y) / 2, 12);
      const part = `C${place(last.x, last.y + bend)} ${place(point.x, point.y - bend)} ${place(point.x, point.y)}`;
      last = point;
      return part;
    });
    return `M${place(start.x, start.y)}${parts.join("")}`;
  }

  const place = (x, y) => `${x.toFixed(1)},${y.toFixed(1)}`;

  return { sizeOf, linesOf, statusOf, box, frame, edge, named, operator };
})();
