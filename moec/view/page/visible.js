// What is seen of a drawing on each side when some of its regions are folded: items, and edges between them.
const visible = (() => {
  "use strict";
  const SIDES = ["before", "after"];

  // A size (`S`, `B*S`) is no tensor. It is read all over a block, and stands in the code of what reads it.
  const isSize = (node) =>
    Boolean(node) &&
    SIDES.map((side) => node[side])
      .filter(Boolean)
      .every(({ value, operator }) => !value.includes("[") && (value !== "" || !operator.includes(".")));

  // The item that stands for node `at` on a side: itself, or the folded region it is in; null if it is not there.
  function itemOf(drawing, at, side, { open, sizes }) {
    const seen = drawing.nodes[at][side];
    if (!seen || (!sizes && isSize(drawing.nodes[at]))) return null;
    return seen.region === null || open.has(seen.region) ? `n${at}` : `r${seen.region}`;
  }

  // { items: key → indices of its nodes, edges: [from, to, status], opened: regions that are drawn around items }
  function ofSide(drawing, side, how) {
    const { open } = how;
    const items = new Map();
    const opened = new Map();
    drawing.nodes.forEach((node, at) => {
      const key = itemOf(drawing, at, side, how);
      if (key === null) return;
      if (!items.has(key)) items.set(key, []);
      items.get(key).push(at);
      const region = node[side].region;
      if (region !== null && open.has(region)) {
        if (!opened.has(region)) opened.set(region, []);
        opened.get(region).push(at);
      }
    });
    return { items, opened, edges: edgesOf(drawing, side, how) };
  }

  // Several edges between the same items are one; it is kept where any of them is.
  function edgesOf(drawing, side, how) {
    const own = side === "before" ? 1 : 2;
    const found = new Map();
    for (const [from, to, where] of drawing.edges) {
      if (where !== 0 && where !== own) continue;
      const ends = [itemOf(drawing, from, side, how), itemOf(drawing, to, side, how)];
      if (ends[0] === null || ends[1] === null || ends[0] === ends[1]) continue;
      const key = ends.join(" ");
      const status = where === 0 ? "kept" : side === "before" ? "removed" : "created";
      if (!found.has(key) || status === "kept") found.set(key, [...ends, status]);
    }
    return [...found.values()];
  }

  // Both sides; one alone where the other is empty or the same. Where there are sizes alone, they are seen.
  function of(drawing, { open, sizes }) {
    const how = { open, sizes: sizes || drawing.nodes.every(isSize) };
    const sides = SIDES.map((side) => ofSide(drawing, side, how));
    const changed =
      drawing.nodes.some((node) => node.status !== "kept") ||
      drawing.regions.some((region) => region.status !== "kept");
    const shown = SIDES.filter((side, at) => sides[at].items.size && (changed || side === "after"));
    return { before: sides[0], after: sides[1], shown, changed };
  }

  return { SIDES, isSize, of };
})();
