// Search: steps, sections, regions, operators, weights, modules and lines; it goes to where they stand.
const search = (() => {
  "use strict";
  const room = dom.byId("search");
  const MOST = 40;
  const input = dom.el("input", {
    type: "text",
    inputmode: "search",
    id: "search-input",
    role: "combobox",
    "aria-expanded": "true",
    "aria-controls": "found",
    "aria-label": "Search",
    placeholder: "pass, operator, region, weight, module, line…",
    autocomplete: "off",
    spellcheck: "false",
    oninput: () => fill(),
    onkeydown: pressed,
  });
  const list = dom.el("ul", { id: "found", role: "listbox" });
  const none = dom.el("p", { class: "nothing", role: "status" });
  let found = [];
  let chosen = 0;

  function open() {
    if (!room.childElementCount) {
      dom.put(room, input, list, none);
      room.addEventListener("click", (event) => event.target === room && room.close());
    }
    if (!room.open) room.showModal();
    input.select();
    fill();
  }

  // The step that is looked at comes first, then the others; a drawing that several steps share is read once.
  function* everything() {
    const all = timeline.data.steps;
    for (const [at, step] of all.entries())
      yield { kind: "pass", text: step.name, layers: [], go: { step: at } };
    const order = [state.now.step, ...all.keys()];
    const seen = new Set();
    for (const at of order) {
      for (const [which, section] of all[at].sections.entries()) {
        const id = `${section.drawing} ${section.layers}`;
        if (seen.has(id)) continue;
        seen.add(id);
        yield* inSection(at, which, section);
      }
    }
  }

  function* inSection(step, at, section) {
    const drawing = timeline.drawingOf(section);
    const go = { step, section: at };
    const { layers } = section;
    yield { kind: "section", text: section.title, layers: [], go };
    for (const [index, region] of drawing.regions.entries()) {
      const here = { ...go, selected: `r${index}` };
      yield { kind: "region", text: region.name, layers, go: here };
      if (region.path) yield { kind: "module", text: region.path, layers, go: here };
    }
    for (const [index, node] of drawing.nodes.entries())
      yield* ofNode(node, { ...go, selected: `n${index}` }, layers);
  }

  function* ofNode(node, go, layers) {
    const side = node.after ?? node.before;
    const regions = [node.before?.region, node.after?.region].filter(
      (region) => region !== null && region !== undefined,
    );
    const here = { ...go, open: new Set(regions) };
    for (const weight of side.weights)
      yield { kind: "weight", text: weight.name, more: weight.origin, layers, go: here };
    yield { kind: "operator", text: labels.operator(side), more: side.code, layers, go: here };
    if (side.path) yield { kind: "module", text: side.path, more: side.source, layers, go: here };
  }

  // The layer for which a text with an open number fits: one that is named in what was typed, else the first.
  function fitting(text, layers, needle) {
    if (!text.includes(words.LAYER))
      return text.toLowerCase().includes(needle) ? { text, layer: null } : null;
    const asked = (needle.match(/\d+/g) ?? []).map(Number).filter((layer) => layers.includes(layer));
    for (const layer of [...asked, layers[0]]) {
      const filled = words.inLayer(text, layer);
      if (filled.toLowerCase().includes(needle)) return { text: filled, layer };
    }
    return null;
  }

  function find(needle) {
    const hits = new Map();
    for (const entry of everything()) {
      const hit =
        fitting(entry.text, entry.layers, needle) ??
        (entry.more ? fitting(`${entry.text} · ${entry.more}`, entry.layers, needle) : null);
      if (!hit || hits.has(`${entry.kind} ${hit.text}`)) continue;
      hits.set(`${entry.kind} ${hit.text}`, { ...entry, ...hit });
      if (hits.size > 20 * MOST) break;
    }
    const rank = (hit) =>
      hit.text.toLowerCase() === needle ? 0 : hit.text.toLowerCase().startsWith(needle) ? 1 : 2;
    return [...hits.values()].sort((a, b) => rank(a) - rank(b)).slice(0, MOST);
  }

  function fill() {
    const needle = input.value.trim().toLowerCase();
    found = needle ? find(needle) : [];
    chosen = 0;
    none.textContent = needle && !found.length ? `Nothing is called “${input.value.trim()}”.` : "";
    show();
  }

  function show() {
    dom.put(
      list,
      found.map((hit, at) =>
        dom.el(
          "li",
          {
            role: "option",
            id: `found-${at}`,
            "aria-selected": String(at === chosen),
            onclick: () => go(hit),
          },
          dom.el("span", { class: "kind" }, hit.kind),
          dom.el("span", { class: "what" }, words.clipped(hit.text, 110)),
          dom.el("span", { class: "where" }, where(hit)),
        ),
      ),
    );
    input.setAttribute("aria-activedescendant", found.length ? `found-${chosen}` : "");
    list.querySelector('[aria-selected="true"]')?.scrollIntoView({ block: "nearest" });
  }

  const where = (hit) =>
    hit.kind === "pass" ? "" : words.clipped(timeline.data.steps[hit.go.step].name, 28);

  function pressed(event) {
    const moves = { ArrowDown: 1, ArrowUp: -1 };
    if (event.key in moves && found.length) {
      chosen = (chosen + moves[event.key] + found.length) % found.length;
      event.preventDefault();
      show();
    }
    if (event.key === "Enter" && found[chosen]) {
      event.preventDefault();
      go(found[chosen]);
    }
  }

  function go(hit) {
    room.close();
    const layer = hit.layer ?? state.now.layer;
    state.change({ tab: "picture", selected: null, ...hit.go, layer }, { record: true });
    choosing.show();
  }

  return { open };
})();
