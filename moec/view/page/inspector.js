// Everything that is known of the chosen operator or region.
const inspector = (() => {
  "use strict";
  const room = dom.byId("inspector");
  const named = (text) => words.inLayer(text ?? "", state.now.layer);

  function draw() {
    const { selected } = state.now;
    const drawing = state.drawing();
    room.hidden = !selected || !drawing;
    if (room.hidden) return dom.put(room);
    const at = Number(selected.slice(1));
    return dom.put(
      room,
      dom.el(
        "button",
        {
          type: "button",
          class: "close",
          "aria-label": "Close",
          title: "(Esc)",
          onclick: () => state.change({ selected: null }),
        },
        "×",
      ),
      selected[0] === "n" ? node(drawing, at) : region(drawing, at),
    );
  }

  const part = (title, ...contents) => dom.el("section", {}, dom.el("h3", {}, title), contents);
  const status = (value) =>
    dom.el("p", { class: `status ${value}` }, dom.el("b", {}, words.SIGNS[value]), words.MEANINGS[value]);
  const code = (text) => dom.el("pre", { class: "code" }, named(text));

  function facts(rows) {
    const known = rows.filter(([, value]) => value !== "" && value !== null && value !== undefined);
    return (
      known.length > 0 &&
      dom.el(
        "dl",
        {},
        known.map(([name, value]) => [dom.el("dt", {}, name), dom.el("dd", {}, named(String(value)))]),
      )
    );
  }

  function node(drawing, at) {
    const it = drawing.nodes[at];
    const last = it.after ?? it.before;
    return [
      dom.el("h2", {}, shapes.operator(last), dom.el("small", {}, named(last.name))),
      status(it.status),
      codes(it),
      origin(last),
      madeBy(it),
      planOf(drawing, it),
      part("Facts", both(it, drawing)),
      weights(last),
      madeFrom(drawing, it),
    ];
  }

  // One line where both sides say the same.
  function codes({ before, after }) {
    if (before && after && before.code === after.code) return part("In the program", code(after.code));
    return [before && part("Before", code(before.code)), after && part("After", code(after.code))];
  }

  // The user's own model.
  function origin({ path, source }) {
    const line = timeline.data.sources[source];
    if (!path && !source) return null;
    return part(
      "In your model",
      facts([
        ["module", path],
        ["line", source],
      ]),
      line !== undefined && dom.el("pre", { class: "code" }, line),
    );
  }

  // What changed it: this pass. What is kept was made by an earlier one.
  function madeBy(it) {
    const step = state.step();
    if (it.status === "kept" || !step.doc)
      return it.fused_by ? part("Fused by", dom.el("p", {}, it.fused_by)) : null;
    return part(
      `By ${step.name}`,
      dom.el("pre", { class: "doc" }, step.doc),
      it.fused_by && facts([["fused by", it.fused_by]]),
    );
  }

  function planOf(drawing, it) {
    const regions = [it.after?.region, it.before?.region].filter((at) => at !== null && at !== undefined);
    return planLines([...new Set(regions.flatMap((at) => drawing.regions[at].plan))]);
  }

  function planLines(lines) {
    if (!lines.length) return null;
    return part(
      "Asked for by the plan",
      dom.el(
        "pre",
        { class: "code" },
        lines.map((at) => `${String(at + 1).padStart(3)}  ${timeline.data.plan_lines[at]}\n`),
      ),
    );
  }

  // Where the sides differ, both: "before → after".
  function both({ before, after }, drawing) {
    const spelled = (side, read) => (side ? String(read(side) ?? "") : null);
    const told = (read) => {
      const [was, is] = [spelled(before, read), spelled(after, read)];
      if (was === null || is === null || was === is) return is ?? was;
      return `${was || "none"} → ${is || "none"}`;
    };
    return facts([
      ["operator", told((side) => side.operator)],
      ["value", told((side) => side.value)],
      ["region", told((side) => (side.region === null ? "" : drawing.regions[side.region].name))],
      ["placement", told((side) => side.placement)],
      ["collective", told((side) => side.collective)],
      ["axis", told((side) => side.axis)],
      ["FLOPs", told((side) => words.short(side.flops))],
      ["expression", told((side) => side.flops_text)],
      ["bytes", told((side) => words.short(side.bytes, "B"))],
      ["counted at", before?.flops || after?.flops ? sizes() : ""],
    ]);
  }

  const sizes = () =>
    Object.entries(timeline.data.sizes)
      .map(([letter, size]) => `${letter}=${words.exact(size)}`)
      .join(", ");

  function weights(side) {
    if (!side.weights.length) return null;
    return part(
      "Weights",
      side.weights.map((weight) =>
        dom.el(
          "div",
          { class: "weight" },
          dom.el("b", {}, named(weight.name)),
          dom.el(
            "span",
            {},
            `${weight.dtype} [${weight.shape.join(", ")}] · ${words.exact(weight.parameters)}`,
          ),
          weight.origin && dom.el("span", {}, `← ${named(weight.origin)}`),
          weight.placement && dom.el("span", {}, named(weight.placement)),
        ),
      ),
    );
  }

  function madeFrom(drawing, it) {
    if (!it.made_from.length) return null;
    const link = (at) => {
      const source = drawing.nodes[at].before ?? drawing.nodes[at].after;
      return dom.el(
        "li",
        {},
        dom.el(
          "button",
          { type: "button", class: "link", onclick: () => choose(at) },
          `${shapes.operator(source)} ${named(source.name)}`,
        ),
      );
    };
    return part("Made from", dom.el("ul", {}, it.made_from.map(link)));
  }

  // Unfolded, where it stands in a region.
  function choose(at) {
    const seen = state.drawing().nodes[at];
    const regions = [seen.before?.region, seen.after?.region].filter(
      (region) => region !== null && region !== undefined,
    );
    state.change({ selected: `n${at}`, open: new Set([...state.now.open, ...regions]) });
    choosing.show();
  }

  function region(drawing, at) {
    const it = drawing.regions[at];
    const members = timeline.membersOf(drawing)[at];
    const counts = timeline.countsOf(members.map((each) => drawing.nodes[each]));
    const line = timeline.data.sources[it.source];
    return [
      dom.el("h2", {}, named(it.name), dom.el("small", {}, `region · ${it.kind}`)),
      status(it.status),
      part(
        "Facts",
        facts([
          ["operators", members.length],
          ["changes", words.changes(counts)],
          ["parameters", words.exact(parametersOf(drawing, members))],
        ]),
      ),
      (it.path || it.source) &&
        part(
          "In your model",
          facts([
            ["module", it.path],
            ["line", it.source],
          ]),
          line !== undefined && dom.el("pre", { class: "code" }, line),
        ),
      Object.keys(it.settings).length > 0 && part("Settings", facts(Object.entries(it.settings))),
      planLines(it.plan),
      part(
        "Operators",
        dom.el(
          "ul",
          {},
          members.map((each) =>
            dom.el(
              "li",
              {},
              dom.el(
                "button",
                { type: "button", class: "link", onclick: () => choose(each) },
                titleOf(drawing.nodes[each]),
              ),
            ),
          ),
        ),
      ),
    ];
  }

  const titleOf = (node) => {
    const side = node.after ?? node.before;
    return `${node.status === "kept" ? "" : `${words.SIGNS[node.status]} `}${shapes.operator(side)} ${named(side.name)}`;
  };

  // Of the side that is there now; a weight that two operators read counts once.
  function parametersOf(drawing, members) {
    const found = new Map();
    for (const at of members)
      for (const weight of drawing.nodes[at].after?.weights ?? []) found.set(weight.name, weight.parameters);
    return [...found.values()].reduce((sum, each) => sum + each, 0);
  }

  return { draw, choose };
})();
