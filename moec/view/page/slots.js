// Which items share a place: what was made from something that is gone now stands where that stood.
const slots = (() => {
  "use strict";

  // key → the key whose place it takes; what is not listed has a place of its own.
  function of(drawing, keys, covered) {
    const free = [...keys].filter((key) => !covered(key));
    const found = new Map();
    pair(found, free.filter((key) => key[0] === "n"), operatorsBefore(drawing)); // prettier-ignore
    pair(found, free.filter((key) => key[0] === "r"), regionsBefore(drawing)); // prettier-ignore
    return found;
  }

  // Each that is gone gives its place once, to the one that comes of it most.
  function pair(found, keys, candidates) {
    const taken = new Set();
    for (const key of keys) {
      const before = candidates(key).find((each) => keys.includes(each) && !taken.has(each));
      if (before === undefined) continue;
      taken.add(before);
      found.set(key, before);
    }
  }

  const operatorsBefore = (drawing) => (key) => {
    const node = drawing.nodes[Number(key.slice(1))];
    if (node.status !== "created") return [];
    return node.made_from.filter((at) => drawing.nodes[at].status === "removed").map((at) => `n${at}`);
  };

  // Regions that are gone and whose operators moved into this one, or were made into its own: most of them first.
  const regionsBefore = (drawing) => (key) => {
    const at = Number(key.slice(1));
    if (drawing.regions[at].status !== "created") return [];
    const counts = new Map();
    for (const member of timeline.membersOf(drawing)[at]) {
      const node = drawing.nodes[member];
      for (const source of [node, ...node.made_from.map((each) => drawing.nodes[each])]) {
        const region = source.before?.region ?? null;
        if (region === null || drawing.regions[region].status !== "removed") continue;
        counts.set(region, (counts.get(region) ?? 0) + 1);
      }
    }
    return [...counts].sort(([, a], [, b]) => b - a).map(([region]) => `r${region}`);
  };

  return { of };
})();
