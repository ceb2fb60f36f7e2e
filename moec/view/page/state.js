// What is looked at. It stands in the address too, behind the `#`, so that a link shows the same.
const state = (() => {
  "use strict";
  const TABS = ["picture", "text", "program", "ledger", "plan"];
  const now = {
    step: 0, // index of the step
    section: 0, // index in the step's sections
    layer: null, // the member of the section that is looked at; null outside of blocks
    selected: null, // "n12" a node, "r3" a region, null nothing
    open: new Set(), // regions of the drawing that are unfolded
    unchanged: false, // whether sections that stayed as they were are listed
    sizes: false, // whether sizes (`S`, `B*S`) are drawn, which are no tensors
    overlay: "none",
    tab: "picture",
  };
  const listeners = [];
  const step = () => timeline.data.steps[now.step];
  const section = () => step().sections[now.section] ?? null;
  const drawing = () => (section() ? timeline.drawingOf(section()) : null);

  // The number that stands for `{layer}` on a side: a pass may have numbered the layers anew.
  function layer(side = "after") {
    const { layers, before } = section() ?? { layers: [], before: [] };
    return side === "before" && before.length ? before[layers.indexOf(now.layer)] : now.layer;
  }

  // `listener(changed)` is called after every change, with the names of what changed.
  const onChange = (listener) => listeners.push(listener);

  function change(changes, { record = false } = {}) {
    const settled = settle({ ...now, ...changes }, changes);
    const changed = new Set(Object.keys(settled).filter((key) => settled[key] !== now[key]));
    Object.assign(now, settled);
    if (!changed.size) return;
    write(record);
    for (const listener of listeners) listener(changed);
  }

  // Another step has other sections, another section other regions and layers.
  function settle(next, changes) {
    const steps = timeline.data.steps;
    next.step = Math.max(0, Math.min(steps.length - 1, next.step));
    const sections = steps[next.step].sections;
    if (next.step !== now.step && !("section" in changes)) next.section = alike(next, sections);
    if (!(next.section in sections)) next.section = 0;
    const layers = sections[next.section]?.layers ?? [];
    if (!layers.includes(next.layer)) next.layer = layers[0] ?? null;
    if (next.step !== now.step || next.section !== now.section) {
      if (!("open" in changes)) next.open = new Set();
      if (!("selected" in changes)) next.selected = null;
    }
    if (isOfSize(next.selected, sections[next.section])) next.sizes = true;
    return next;
  }

  // Whether what is selected is a size, which is not drawn unless asked for.
  const isOfSize = (selected, chosen) =>
    selected?.[0] === "n" && visible.isSize(timeline.drawingOf(chosen).nodes[Number(selected.slice(1))]);

  // The section of another step that one goes on looking at: that of the same layer, if it changed there.
  function alike(next, sections) {
    const same = sections.findIndex(
      (each) => each.changed && next.layer !== null && each.layers.includes(next.layer),
    );
    return same >= 0 ? same : timeline.firstSection(timeline.data.steps[next.step]);
  }

  function toggle(region, opened = !now.open.has(region)) {
    const open = new Set(now.open);
    if (opened) open.add(region);
    else open.delete(region);
    change({ open });
  }

  // In the address.

  function write(record) {
    const told = new URLSearchParams({ step: timeline.ids[now.step], section: now.section });
    if (now.layer !== null) told.set("layer", now.layer);
    if (now.open.size) told.set("open", [...now.open].join(" "));
    if (now.selected) told.set("select", now.selected);
    if (now.sizes) told.set("sizes", "");
    if (now.overlay !== "none") told.set("overlay", now.overlay);
    if (now.tab !== "picture") told.set("tab", now.tab);
    const hash = `#${told}`;
    if (hash === location.hash) return;
    if (record) location.hash = hash;
    else location.replace(hash);
  }

  function read() {
    const told = new URLSearchParams(location.hash.slice(1));
    const at = timeline.ids.indexOf(told.get("step"));
    const next = { step: at >= 0 ? at : timeline.firstStep() };
    const chosen = timeline.data.steps[next.step];
    next.section = told.has("section") ? Number(told.get("section")) : timeline.firstSection(chosen);
    next.layer = told.has("layer") ? Number(told.get("layer")) : null;
    const seen = chosen.sections[next.section] && timeline.drawingOf(chosen.sections[next.section]);
    next.open = new Set(
      (told.get("open") ?? "")
        .split(" ")
        .filter(Boolean)
        .map(Number)
        .filter((each) => each in (seen?.regions ?? [])),
    );
    next.selected = known(told.get("select"), seen);
    next.sizes = told.has("sizes");
    next.overlay = overlays.NAMES.includes(told.get("overlay")) ? told.get("overlay") : "none";
    next.tab = TABS.includes(told.get("tab")) ? told.get("tab") : "picture";
    return next;
  }

  // A link may be older than the page.
  function known(selected, seen) {
    const parts = /^([nr])(\d+)$/.exec(selected ?? "");
    if (!parts || !seen) return null;
    return Number(parts[2]) in (parts[1] === "n" ? seen.nodes : seen.regions) ? selected : null;
  }

  function start() {
    Object.assign(now, settle({ ...now, ...read() }, read()));
    for (const listener of listeners) listener(new Set(Object.keys(now)));
    window.addEventListener("hashchange", () => {
      const next = read();
      const same = [...next.open].sort().join() === [...now.open].sort().join();
      change(same ? { ...next, open: now.open } : next);
    });
  }

  return { now, TABS, step, section, drawing, layer, onChange, change, toggle, start };
})();
