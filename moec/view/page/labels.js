// What is written on an item, how wide that is, and what is read out.
const labels = (() => {
  "use strict";
  const [WIDEST, NAME] = [30, 16]; // characters of a line, and of the name at its right end
  const [CHARACTER, BOLD] = [6.7, 7.4]; // widths of one, in the fonts of `.item text`
  const [HEIGHT, INSET] = [44, 12];

  const indexOf = (key) => Number(key.slice(1));
  const isRegion = (key) => key[0] === "r";
  const nodeAt = (key) => state.drawing().nodes[indexOf(key)];
  const regionAt = (key) => state.drawing().regions[indexOf(key)];
  const statusOf = (key) => (isRegion(key) ? regionAt(key) : nodeAt(key)).status;
  // The side that tells what it is now: what is gone is told as it was.
  const lastOf = (it) => (it.after ? "after" : "before");
  const isEnd = (key, side = isRegion(key) ? null : lastOf(nodeAt(key))) =>
    !isRegion(key) && ["input", "output"].includes(nodeAt(key)[side].operator);

  const named = (text, side) => words.inLayer(text ?? "", state.layer(side));
  const operator = (side) => side.operator.replace(/^aten\./, "");

  // [first line, its right end, second line]
  const linesOf = (key, side = isRegion(key) ? "after" : lastOf(nodeAt(key))) =>
    isRegion(key) ? ofRegion(key, side) : ofOperator(nodeAt(key), side);

  function ofOperator(node, side) {
    const [what, name] = [operator(node[side]), named(node[side].name, side)];
    return [what, name === what ? "" : name, node[side].value];
  }

  function ofRegion(key, side) {
    const drawing = state.drawing();
    const members = timeline.membersOf(drawing)[indexOf(key)].map((at) => drawing.nodes[at]);
    const there = members.filter((node) => node[side]);
    const counted = [words.plural(there.length, "operator"), words.changes(timeline.countsOf(there))];
    return [named(regionAt(key).name, side), "", counted.filter(Boolean).join(" · ")];
  }

  function shortened(key, side) {
    const [first, right, second] = linesOf(key, side);
    return [words.clipped(first, WIDEST), words.clipped(right, NAME), words.clipped(second, WIDEST)];
  }

  function widthOf(key, side) {
    const [first, right, second] = shortened(key, side);
    return Math.max(
      BOLD * first.length + (right ? CHARACTER * right.length + 18 : 0),
      CHARACTER * second.length,
    );
  }

  // As wide on both sides.
  function sizeOf(key) {
    const sides = visible.SIDES.filter((side) => isRegion(key) || nodeAt(key)[side]);
    const width = Math.max(96, ...sides.map((side) => widthOf(key, side))) + 2 * INSET + 14;
    return { width: Math.round(width), height: HEIGHT };
  }

  // As much of a text as a box of this width shows.
  const fitting = (text, width) => words.clipped(text, Math.floor((width - 2 * INSET) / CHARACTER) + 1);

  // One item of a pane is reached by Tab; `choosing` says which.
  function attributes(key, side, open) {
    const what = [isRegion(key) && "region", ...linesOf(key, side), statusOf(key)].filter(Boolean).join(", ");
    const expanded = isRegion(key) ? String(open) : null;
    return {
      "data-key": `${side} ${key}`,
      role: "button",
      tabindex: "-1",
      "aria-label": what,
      "aria-expanded": expanded,
    };
  }

  return {
    HEIGHT,
    INSET,
    isRegion,
    lastOf,
    linesOf,
    isEnd,
    statusOf,
    named,
    operator,
    shortened,
    sizeOf,
    fitting,
    attributes,
  };
})();
