// Everything that is known of the chosen operator or region.
const inspector = (() => {
  "use strict";
  const room = dom.byId("inspector");
  const { part, code, facts } = details;
  const { lastOf } = labels;

  function draw() {
    const { selected } = state.now;
    const drawing = state.drawing();
    room.hidden = !selected || !drawing;
    if (room.hidden) return dom.put(room);
    const at = Number(selected.slice(1));
    const onclick = () => state.change({ selected: null });
    const close = { type: "button", class: "close", "aria-label": "Close", title: "(Esc)", onclick };
    const told = selected[0] === "n" ? operator(drawing, at) : region(drawing, at);
    return dom.put(room, dom.el("button", close, "×"), told);
  }

  function operator(drawing, at) {
    const it = drawing.nodes[at];
    const side = lastOf(it);
    const named = (text) => labels.named(text, side);
    const regions = regionsOf(it).map((each) => drawing.regions[each]);
    return [
      dom.el("h2", {}, labels.operator(it[side]), dom.el("small", {}, named(it[side].name))),
      details.status(it.status),
      codes(it),
      details.origin(named(it[side].path), it[side].source),
      details.plan([...new Set(regions.flatMap((each) => each.plan))]),
      part("Facts", compared(it, drawing)),
      details.weights(it[side].weights, side),
      details.links("Made from", linksTo(drawing, it.made_from)),
      details.madeBy(it),
    ];
  }

  const regionsOf = (it) =>
    [...new Set([it.before?.region, it.after?.region])].filter((at) => at !== null && at !== undefined);

  // One line where both sides say the same.
  function codes({ before, after }) {
    const [was, is] = [
      before && labels.named(before.code, "before"),
      after && labels.named(after.code, "after"),
    ];
    if (was === is) return part("In the program", code(is));
    return [was && part("Before", code(was)), is && part("After", code(is))];
  }

  // Where the sides differ, both: "before → after".
  function compared({ before, after, fused_by: fusedBy }, drawing) {
    const spelled = (side, what, read) => (side ? labels.named(String(read(side) ?? ""), what) : null);
    const told = (read) => {
      const [was, is] = [spelled(before, "before", read), spelled(after, "after", read)];
      if (was === null || is === null || was === is) return is ?? was;
      return `${was || "none"} → ${is || "none"}`;
    };
    const counted = [before, after].some(
      (side) => words.isNumber(side?.flops) || words.isNumber(side?.bytes),
    );
    return facts([
      ["operator", told((side) => side.operator)],
      ["value", told((side) => side.value)],
      ["region", told((side) => (side.region === null ? "" : drawing.regions[side.region].name))],
      ["fused by", fusedBy],
      ["placement", told((side) => side.placement)],
      ["collective", told((side) => side.collective)],
      ["axis", told((side) => side.axis)],
      ["FLOPs", told((side) => words.short(side.flops))],
      ["expression", told((side) => side.flops_text)],
      ["bytes", told((side) => words.short(side.bytes, "B"))],
      ["counted at", counted ? sizes() : ""],
    ]);
  }

  function sizes() {
    const told = Object.entries(timeline.data.sizes).map(
      ([letter, size]) => `${letter}=${words.exact(size)}`,
    );
    return told.join(", ");
  }

  function linksTo(drawing, nodes) {
    return nodes.map((at) => {
      const it = drawing.nodes[at];
      const side = lastOf(it);
      const sign = it.status === "kept" ? "" : `${words.SIGNS[it.status]} `;
      return [`${sign}${labels.operator(it[side])} ${labels.named(it[side].name, side)}`, () => choose(at)];
    });
  }

  // Its region is unfolded, where it stands in one.
  function choose(at) {
    const regions = regionsOf(state.drawing().nodes[at]);
    state.change({ selected: `n${at}`, open: new Set([...state.now.open, ...regions]) });
    choosing.show();
  }

  function region(drawing, at) {
    const it = drawing.regions[at];
    const members = timeline.membersOf(drawing)[at];
    const nodes = members.map((each) => drawing.nodes[each]);
    const side = it.status === "removed" ? "before" : "after";
    const named = (text) => labels.named(text, side);
    const counts = words.changes(timeline.countsOf(nodes));
    return [
      dom.el("h2", {}, named(it.name), dom.el("small", {}, `region · ${it.kind}`)),
      details.status(it.status),
      it.signature && part("Takes and gives", code(named(it.signature))),
      it.code && part("In the program", code(named(it.code))),
      details.origin(named(it.path), it.source),
      details.plan(it.plan),
      part(
        "Facts",
        facts([
          ["operators", members.length],
          ["changes", counts],
          ["parameters", parametersOf(nodes, side)],
        ]),
      ),
      Object.keys(it.settings).length > 0 && part("Settings", facts(Object.entries(it.settings))),
      details.madeBy(it),
      details.links("Operators", linksTo(drawing, members)),
    ];
  }

  // A weight that two operators read counts once.
  function parametersOf(nodes, side) {
    const listed = nodes.flatMap((node) => node[side]?.weights ?? []);
    const once = new Map(listed.map((weight) => [weight.name, weight.parameters]));
    return words.exact([...once.values()].reduce((sum, each) => sum + each, 0));
  }

  return { draw, choose };
})();
