// The data of the page, and what is told of it: ids of steps, sections, layers, members of regions.
const timeline = (() => {
  "use strict";
  const data = JSON.parse(dom.byId("data").textContent);
  const FORMAT = 1;
  if (data.format !== FORMAT)
    throw new Error(`a timeline of format ${data.format}, and this page reads ${FORMAT}`);

  // Each side is said once, and nodes have its place.
  for (const node of data.drawings.flatMap((drawing) => drawing.nodes))
    for (const side of ["before", "after"]) node[side] = node[side] === null ? null : data.sides[node[side]];

  // An operator that is kept may lie otherwise on the ranks, or have another shape: it is `marked`.
  const laid = (side) =>
    [side.value, side.placement, ...side.weights.map((weight) => weight.placement)].join("\n");
  for (const node of data.drawings.flatMap((drawing) => drawing.nodes)) {
    if (node.status === "kept" && node.before && node.after && laid(node.before) !== laid(node.after))
      node.status = "marked";
  }
  for (const step of data.steps) {
    const marked = step.sections.reduce((sum, section) => sum + countMarked(section), 0);
    if (marked) step.counts = { ...step.counts, marked, kept: (step.counts.kept ?? 0) - marked };
  }

  function countMarked(section) {
    const times = Math.max(1, section.layers.length);
    return times * data.drawings[section.drawing].nodes.filter((node) => node.status === "marked").length;
  }

  // Names of steps may repeat: the second `drop_noops` is `drop_noops~2` in a link.
  const seen = new Map();
  const ids = data.steps.map((step) => {
    const times = (seen.get(step.name) ?? 0) + 1;
    seen.set(step.name, times);
    return times === 1 ? step.name : `${step.name}~${times}`;
  });

  const drawingOf = (section) => data.drawings[section.drawing];

  // The picture of a step that is looked at first: one that changed, with most members.
  function firstSection(step) {
    const weighed = step.sections.map((section, at) => [section.changed, section.layers.length, -at]);
    const best = weighed.reduce((a, b) => (compare(a, b) >= 0 ? a : b), [false, -1, 0]);
    return -best[2];
  }

  function compare(a, b) {
    for (let at = 0; at < a.length; at += 1) if (a[at] !== b[at]) return Number(a[at]) - Number(b[at]);
    return 0;
  }

  const makes = (step, kind) =>
    step.kind === "pass" &&
    step.sections.some((section) =>
      drawingOf(section).regions.some((region) => region.kind === kind && region.status === "created"),
    );

  // What one opens the page for: the pass that made expert layers, or else found attention, or else created most;
  // else the last step of which there is a picture.
  function firstStep() {
    for (const kind of ["moe", "attention"]) {
      const made = data.steps.findIndex((step) => makes(step, kind));
      if (made >= 0) return made;
    }
    const created = (step) => (step.kind === "pass" ? (step.counts.created ?? 0) : 0);
    const most = Math.max(...data.steps.map(created));
    if (most > 0) return data.steps.findIndex((step) => created(step) === most);
    return Math.max(
      0,
      data.steps.findLastIndex((step) => step.sections.length > 0),
    );
  }

  // Per region: indices of the nodes that stand in it, on either side.
  const members = new Map();
  function membersOf(drawing) {
    if (!members.has(drawing)) {
      const found = drawing.regions.map(() => []);
      drawing.nodes.forEach((node, at) => {
        for (const region of new Set([node.before?.region, node.after?.region])) {
          if (region !== null && region !== undefined) found[region].push(at);
        }
      });
      members.set(drawing, found);
    }
    return members.get(drawing);
  }

  function countsOf(nodes) {
    const counts = {};
    for (const node of nodes) counts[node.status] = (counts[node.status] ?? 0) + 1;
    return counts;
  }

  // By layer: the index of its section in this step.
  function layersOf(step) {
    const found = new Map();
    step.sections.forEach((section, at) => section.layers.forEach((layer) => found.set(layer, at)));
    return new Map([...found].sort(([a], [b]) => a - b));
  }

  return { data, ids, drawingOf, firstSection, firstStep, membersOf, countsOf, layersOf };
})();
