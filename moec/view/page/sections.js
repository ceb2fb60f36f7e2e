// Which blocks are looked at: those that are alike together, one of them by its number.
const sections = (() => {
  "use strict";
  const bar = dom.el("div", { class: "sections" });

  function draw() {
    dom.put(bar, strip(), dom.el("div", { class: "section-row" }, list(), sizes(), member(), overlay()));
  }

  // "12 layers: ×10 alike; 2 differ: 3, 7", and a cell for each layer, lettered by its kind.
  function strip() {
    const layers = timeline.layersOf(state.step());
    if (layers.size < 2) return null;
    const kinds = [...new Set(layers.values())];
    const cells = [...layers].map(([layer, at]) =>
      dom.el(
        "button",
        {
          type: "button",
          tabindex: "-1",
          class: `cell${state.step().sections[at].changed ? " changed" : ""}`,
          "aria-pressed": String(at === state.now.section && layer === state.now.layer),
          "data-same": at === state.now.section,
          title: `layer ${layer}: ${state.step().sections[at].title}`,
          onclick: () => state.change({ section: at, layer }),
        },
        kinds.length > 1 ? letter(kinds.indexOf(at)) : "",
      ),
    );
    return dom.el(
      "div",
      { class: "strip" },
      dom.el("div", { class: "cells", role: "group", "aria-label": "Layers" }, cells),
      dom.el("p", { class: "sum" }, sum(layers, kinds)),
    );
  }

  const letter = (at) => String.fromCharCode(65 + (at % 26));

  function sum(layers, kinds) {
    const all = words.plural(layers.size, "layer");
    const members = kinds.map((at) => state.step().sections[at].layers);
    if (kinds.length === 1) return `${all}, all alike`;
    const [most, ...rest] = members.sort((a, b) => b.length - a.length);
    const others = rest.flat();
    if (most.length > others.length)
      return `${all}: ×${most.length} alike; ${others.length} differ: ${words.ranges(others)}`;
    return `${all}: ${kinds.length} kinds, ×${members.map((each) => each.length).join(", ×")}`;
  }

  const isListed = (section, at) => section.changed || state.now.unchanged || at === state.now.section;

  function list() {
    const all = state.step().sections;
    const hidden = all.filter((section, at) => !isListed(section, at)).length;
    const more = hidden || state.now.unchanged;
    return dom.el(
      "div",
      { class: "section-list", role: "group", "aria-label": "Sections" },
      all.map((section, at) => isListed(section, at) && button(section, at)),
      more &&
        dom.el(
          "button",
          {
            type: "button",
            class: "quiet",
            "data-key": "unchanged",
            "aria-expanded": String(state.now.unchanged),
            title: "(u)",
            onclick: () => state.change({ unchanged: !state.now.unchanged }),
          },
          state.now.unchanged ? "hide unchanged" : `${hidden} unchanged`,
        ),
    );
  }

  // How many sizes are not drawn.
  function sizes() {
    const count = state.drawing()?.nodes.filter(visible.isSize).length;
    if (!count || count === state.drawing().nodes.length) return null;
    return dom.el(
      "button",
      {
        type: "button",
        class: "quiet",
        "data-key": "sizes",
        "aria-expanded": String(state.now.sizes),
        title: "values that are no tensors, as S (s)",
        onclick: () => state.change({ sizes: !state.now.sizes }),
      },
      state.now.sizes ? "hide sizes" : words.plural(count, "size"),
    );
  }

  function button(section, at) {
    const counts = timeline.countsOf(timeline.drawingOf(section).nodes);
    return dom.el(
      "button",
      {
        type: "button",
        class: `section${section.changed ? "" : " idle"}`,
        "data-key": `section ${at}`,
        "aria-pressed": String(at === state.now.section),
        onclick: () => state.change({ section: at }, { record: true }),
      },
      dom.el("span", { class: "title" }, words.clipped(section.title, 34)),
      section.layers.length > 1 && dom.el("span", { class: "times" }, `×${section.layers.length} alike`),
      dom.el("span", { class: "changes" }, words.changes(counts) || "unchanged"),
    );
  }

  function member() {
    const { layers } = state.section() ?? { layers: [] };
    if (layers.length < 2) return null;
    return choice(
      "layer",
      "layer",
      layers.map((layer) => [layer, layer]),
      state.now.layer,
      (value) => state.change({ layer: Number(value) }),
    );
  }

  const overlay = () =>
    choice(
      "overlay",
      "show",
      overlays.NAMES.map((name) => [name, overlays.KNOWN[name].label]),
      state.now.overlay,
      (value) => state.change({ overlay: value }),
    );

  const choice = (key, label, options, chosen, choose) =>
    dom.el(
      "label",
      { class: "choice" },
      label,
      dom.el(
        "select",
        { "data-key": key, id: `choose-${key}`, onchange: (event) => choose(event.target.value) },
        options.map(([value, text]) => dom.el("option", { value, selected: value === chosen }, text)),
      ),
    );

  // To the next one that is listed.
  function move(by) {
    const listed = state
      .step()
      .sections.map((section, at) => at)
      .filter((at) => isListed(state.step().sections[at], at));
    const next = listed[listed.indexOf(state.now.section) + by];
    if (next !== undefined) state.change({ section: next });
  }

  return { bar, draw, move };
})();
