// What is text: the step's difference, the program as it is now, the plan.
const texts = (() => {
  "use strict";
  const KINDS = [
    ["@@", "place"],
    ["+++", "place"],
    ["---", "place"],
    ["+", "created"],
    ["-", "removed"],
    ["#", "comment"],
  ];
  const room = { text: dom.byId("text"), program: dom.byId("program"), plan: dom.byId("plan") };

  const kindOf = (line) => KINDS.find(([sign]) => line.startsWith(sign))?.[1] ?? "kept";

  function drawDifference() {
    const step = state.step();
    if (!step.diff)
      return dom.put(
        room.text,
        dom.el("p", { class: "nothing" }, `The text is the same before and after ${step.name}.`),
      );
    const lines = step.diff
      .split("\n")
      .map((line) => dom.el("span", { class: `line ${kindOf(line)}` }, `${line}\n`));
    return dom.put(
      room.text,
      dom.el(
        "pre",
        { class: "listing", tabindex: "0", "aria-label": `What ${step.name} changed in the text` },
        lines,
      ),
    );
  }

  function drawProgram() {
    const { text } = timeline.data;
    const lines = text
      .split("\n")
      .map((line, at) => dom.el("span", { class: "line", "data-line": at + 1 }, spelled(line), "\n"));
    return dom.put(
      room.program,
      dom.el("pre", { class: "listing numbered", tabindex: "0", "aria-label": "The program" }, lines),
    );
  }

  // Comments and shapes stand back; what is defined stands out.
  function spelled(line) {
    const at = line.search(/(^|\s)# ?/);
    const [code, comment] = at < 0 ? [line, ""] : [line.slice(0, at), line.slice(at)];
    const defined = /^(\s*def )(\w+)(.*)$/.exec(code);
    const words = defined ? [defined[1], dom.el("b", {}, defined[2]), defined[3]] : [code];
    return [words, comment && dom.el("i", {}, comment)];
  }

  function drawPlan() {
    const lines = timeline.data.plan_lines;
    if (!lines.length)
      return dom.put(room.plan, dom.el("p", { class: "nothing" }, "Compiled without a plan."));
    const chosen = chosenLines();
    return dom.put(
      room.plan,
      dom.el(
        "pre",
        { class: "listing numbered", tabindex: "0", "aria-label": "The plan" },
        lines.map((line, at) =>
          dom.el(
            "span",
            { class: `line${chosen.has(at) ? " chosen" : ""}`, "data-line": at + 1 },
            `${line}\n`,
          ),
        ),
      ),
    );
  }

  // Lines that asked for the region that is chosen, or that what is chosen stands in.
  function chosenLines() {
    const { selected } = state.now;
    const drawing = state.drawing();
    if (!selected || !drawing) return new Set();
    const at = Number(selected.slice(1));
    if (selected[0] === "r") return new Set(drawing.regions[at].plan);
    const regions = [drawing.nodes[at].before?.region, drawing.nodes[at].after?.region];
    return new Set(regions.flatMap((region) => drawing.regions[region]?.plan ?? []));
  }

  return { drawDifference, drawProgram, drawPlan };
})();
