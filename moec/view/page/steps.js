// The timeline: stages, and the passes in their order.
const steps = (() => {
  "use strict";
  const room = dom.byId("steps");
  const GROUPS = [
    ["Stages", (step) => step.kind === "stage"],
    ["Passes", (step) => step.kind !== "stage"],
  ];
  // As they are listed: the arrow keys go this way.
  const order = GROUPS.flatMap(([, holds]) =>
    timeline.data.steps.map((step, at) => (holds(step) ? at : -1)).filter((at) => at >= 0),
  );

  function draw() {
    dom.put(
      room,
      GROUPS.map(([title, holds]) =>
        group(
          title,
          order.filter((at) => holds(timeline.data.steps[at])),
        ),
      ),
    );
    room.querySelector("[aria-current]")?.scrollIntoView({ block: "nearest" });
  }

  const group = (title, indices) =>
    indices.length > 0 && [
      dom.el("h2", {}, title),
      dom.el(
        "ol",
        { onkeydown: (event) => dom.rove([...room.querySelectorAll("button")], event) },
        indices.map(entry),
      ),
    ];

  function entry(at) {
    const step = timeline.data.steps[at];
    const current = at === state.now.step;
    const verdict = words.verdict(step.check);
    const changes = words.changes(step.counts) || (step.diff && "text changed");
    return dom.el(
      "li",
      {},
      dom.el(
        "button",
        {
          type: "button",
          class: `step${changes ? "" : " idle"}`,
          "data-key": timeline.ids[at],
          tabindex: current ? "0" : "-1",
          "aria-current": current ? "step" : null,
          title: verdict.means,
          onclick: () => state.change({ step: at }, { record: true }),
        },
        dom.el(
          "span",
          { class: "verdict", "aria-label": verdict.means },
          step.kind === "pass" ? verdict.sign : "",
        ),
        dom.el("span", { class: "name" }, step.name),
        dom.el("span", { class: "seconds" }, words.seconds(step.seconds)),
        dom.el(
          "span",
          { class: "changes" },
          state.now.overlay === "certificate" ? errorOf(step.check) : changes || "nothing changed",
        ),
      ),
    );
  }

  function errorOf(check) {
    if (!check) return "nothing claimed";
    return words.isNumber(check.error)
      ? `${check.verdict} ${words.tiny(check.error)} ≤ ${words.tiny(check.tolerance)}`
      : check.verdict;
  }

  function move(by) {
    const next = order[order.indexOf(state.now.step) + by];
    if (next !== undefined) state.change({ step: next }, { record: true });
  }

  const go = (end) => state.change({ step: order.at(end) }, { record: true });

  return { draw, move, go };
})();
