// The parts of what is told about an operator or a region.
const details = (() => {
  "use strict";
  const part = (title, ...contents) => dom.el("section", {}, dom.el("h3", {}, title), contents);
  const code = (text) => dom.el("pre", { class: "code" }, text);

  const status = (value) =>
    dom.el("p", { class: `status ${value}` }, dom.el("b", {}, words.SIGNS[value]), words.MEANINGS[value]);

  // Rows [name, value]; what is not known is left out.
  function facts(rows) {
    const known = rows.filter(([, value]) => value !== "" && value !== null && value !== undefined);
    if (!known.length) return null;
    const row = ([name, value]) => [dom.el("dt", {}, name), dom.el("dd", {}, value)];
    return dom.el("dl", {}, known.map(row)); // prettier-ignore
  }

  // The user's own module and line.
  function origin(path, source) {
    if (!path && !source) return null;
    const line = timeline.data.sources[source];
    const where = [["module", path], ["line", source]]; // prettier-ignore
    return part("In your model", facts(where), line !== undefined && code(line.trim()));
  }

  // What changed it is this pass; what is kept was made by an earlier one.
  function madeBy(it) {
    const { name, doc } = state.step();
    if (it.status === "kept" || !doc) return null;
    return part(`By ${name}`, dom.el("pre", { class: "doc" }, doc));
  }

  function plan(lines) {
    if (!lines.length) return null;
    const numbered = lines.map((at) => `${String(at + 1).padStart(3)}  ${timeline.data.plan_lines[at]}`);
    return part("Asked for by the plan", code(numbered.join("\n")));
  }

  function weights(listed, side) {
    if (!listed.length) return null;
    const named = (text) => labels.named(text, side);
    const row = (weight) =>
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
      );
    return part("Weights", listed.map(row));
  }

  // `entries` are [words, what a click does].
  function links(title, entries) {
    if (!entries.length) return null;
    const link = ([text, onclick]) =>
      dom.el("li", {}, dom.el("button", { type: "button", class: "link", onclick }, text));
    return part(title, dom.el("ul", {}, entries.map(link)));
  }

  return { part, code, status, facts, origin, madeBy, plan, weights, links };
})();
