// How items and edges are drawn.
const shapes = (() => {
  "use strict";
  const { HEIGHT, INSET } = labels;
  const TALL = 1.5 * HEIGHT; // a box as high as this lies over others, and has its text in the middle

  // A box with its sign; a folded region has a second sheet behind it.
  function box(key, side, { x, y, width, height }, value, scaled) {
    const status = labels.statusOf(key);
    const kind = labels.isRegion(key) ? "region" : labels.isEnd(key, side) ? "operator end" : "operator";
    const size = { width, height, rx: 8 };
    return dom.svg(
      "g",
      {
        class: `item ${kind} ${status}`,
        transform: `translate(${x},${y})`,
        ...labels.attributes(key, side, false),
      },
      labels.isRegion(key) && dom.svg("rect", { class: "sheet", x: 4, y: 4, ...size }),
      dom.svg("rect", { class: "body", ...size }),
      value !== null && dom.svg("rect", { ...painted(value, scaled), ...size }),
      dom.svg("rect", { class: "edge", ...size }),
      status !== "kept" && sign(status),
      text(key, side, { width, height }, value),
    );
  }

  function text(key, side, { width, height }, value) {
    const [first, right, second] = labels.shortened(key, side);
    const told = value === null ? second : labels.fitting(overlays.told(value), width);
    const tall = height > TALL;
    const at = tall ? { x: width / 2, "text-anchor": "middle" } : { x: INSET };
    const fold = labels.isRegion(key) ? "▸ " : "";
    return dom.svg(
      "g",
      { transform: `translate(0,${tall ? (height - HEIGHT) / 2 : 0})` },
      dom.svg("text", { class: "first", y: 18, ...at }, fold + first),
      right && dom.svg("text", { class: "right", x: width - INSET, y: 18, "text-anchor": "end" }, right),
      dom.svg("text", { class: value === null ? "second" : "second told", y: 35, ...at }, told),
    );
  }

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
  function frame(key, side, { x, y, width, height }) {
    const [name] = labels.shortened(key, side);
    const status = labels.statusOf(key);
    return dom.svg(
      "g",
      { class: `frame ${status}`, transform: `translate(${x},${y})` },
      dom.svg("rect", { class: "edge", width, height, rx: 10 }),
      dom.svg(
        "g",
        { class: "item handle", ...labels.attributes(key, side, true) },
        dom.svg("rect", { class: "grip", width, height: 24, rx: 10 }),
        dom.svg("text", { class: "first", x: INSET, y: 17 }, `▾ ${name}`),
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
      const ends = [at(last.x, last.y + bend), at(point.x, point.y - bend), at(point.x, point.y)];
      last = point;
      return `C${ends.join(" ")}`;
    });
    return `M${at(start.x, start.y)}${parts.join("")}`;
  }

  const at = (x, y) => `${x.toFixed(1)},${y.toFixed(1)}`;

  return { box, frame, edge };
})();
