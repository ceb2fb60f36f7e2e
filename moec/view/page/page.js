// The page: its head, the heading of a step, the tabs, and who draws when what changes.
const page = (() => {
  "use strict";
  const THEME = "moec-theme";
  const TITLES = { picture: "Picture", text: "Text", program: "Program", ledger: "Ledger", plan: "Plan" };
  const toolbar = dom.el("div", { class: "toolbar" });
  const legend = dom.el("div", { class: "legends" });

  function head() {
    const { name, stage, facts } = timeline.data;
    const told = Object.entries(facts)
      .filter(([, value]) => value !== name && value !== stage)
      .map(([key, value]) =>
        dom.el("div", { class: "fact" }, dom.el("dt", {}, key), dom.el("dd", {}, value)),
      );
    dom.put(
      dom.byId("top"),
      dom.el(
        "h1",
        {},
        dom.el("span", { class: "brand" }, "moec"),
        dom.el("span", { class: "model" }, name),
        dom.el("span", { class: "stage" }, stage),
      ),
      dom.el("dl", { class: "facts" }, told),
      dom.el(
        "div",
        { class: "actions" },
        dom.el(
          "button",
          { type: "button", class: "find", onclick: () => search.open() },
          "Search",
          dom.el("kbd", {}, "/"),
        ),
        dom.el(
          "button",
          { type: "button", "aria-label": "light or dark", title: "light or dark (d)", onclick: toggleTheme },
          "◐",
        ),
        dom.el(
          "button",
          { type: "button", "aria-label": "keys", title: "keys (?)", onclick: () => keys.help() },
          "?",
        ),
      ),
    );
  }

  function heading() {
    const step = state.step();
    const { check } = step;
    const [summary, ...rest] = step.doc.trim().split("\n");
    dom.put(
      dom.byId("heading"),
      dom.el(
        "div",
        { class: "title" },
        dom.el(
          "h2",
          {},
          step.name,
          dom.el("small", {}, step.kind === "capture" ? step.after : `${step.before} → ${step.after}`),
        ),
        dom.el(
          "p",
          { class: "counts" },
          words.STATUSES.filter((status) => step.counts[status]).map((status) =>
            dom.el(
              "span",
              { class: `status ${status}` },
              dom.el("b", {}, words.SIGNS[status]),
              `${words.exact(step.counts[status])} ${status}`,
            ),
          ),
        ),
      ),
      step.doc.trim().includes("\n")
        ? dom.el(
            "details",
            {},
            dom.el("summary", {}, summary),
            dom.el("pre", { class: "doc" }, rest.join("\n").trim()),
          )
        : summary && dom.el("p", { class: "summary" }, summary),
      check && proof(check),
    );
  }

  function proof(check) {
    const { sign, means } = words.verdict(check);
    const error = words.isNumber(check.error)
      ? `${words.tiny(check.error)} ≤ ${words.tiny(check.tolerance)}`
      : "";
    return dom.el(
      "p",
      { class: "proof", title: means },
      dom.el("b", {}, `${sign} ${check.verdict}`),
      [check.contract, error, check.what, check.note].filter(Boolean).join(" · "),
    );
  }

  function tabs() {
    dom.put(
      dom.byId("tabs"),
      state.TABS.map((tab, at) =>
        dom.el(
          "button",
          {
            type: "button",
            role: "tab",
            id: `tab-${tab}`,
            "data-key": tab,
            "aria-controls": tab,
            "aria-selected": String(tab === state.now.tab),
            title: `(${at + 1})`,
            onclick: () => state.change({ tab }, { record: true }),
          },
          TITLES[tab],
        ),
      ),
    );
    for (const tab of state.TABS) dom.byId(tab).hidden = tab !== state.now.tab;
  }

  // Who draws what: `needs` are the parts of the state that it shows, `tab` the one it stands in.
  const VIEWS = [
    { needs: ["step", "overlay"], draw: steps.draw },
    { needs: ["step"], draw: heading },
    { needs: ["tab"], draw: tabs },
    { needs: ["step", "section", "layer", "unchanged", "sizes", "overlay"], tab: "picture", draw: sections.draw },
    { needs: ["step", "section", "layer", "open", "sizes", "overlay"], tab: "picture", draw: drawPicture },
    { needs: ["selected", "step", "section", "layer", "open", "sizes", "overlay"], draw: choosing.mark },
    { needs: ["selected", "step", "section", "layer"], draw: inspector.draw },
    { needs: ["step"], tab: "text", draw: texts.drawDifference },
    { needs: ["once"], tab: "program", draw: texts.drawProgram },
    { needs: ["once"], tab: "ledger", draw: ledger.draw },
    { needs: ["selected", "step", "section"], tab: "plan", draw: texts.drawPlan },
  ];
  const stale = new Set(VIEWS);

  // A tab that is not seen is drawn when it is.
  function redraw(changed) {
    for (const view of VIEWS) if (view.needs.some((need) => changed.has(need))) stale.add(view);
    for (const view of VIEWS) if (!view.tab || view.tab === state.now.tab) drawOnce(view, changed);
  }

  function drawOnce(view, changed) {
    if (stale.delete(view)) view.draw(changed);
  }

  // For paper, on which all tabs stand.
  const drawAll = () => VIEWS.forEach((view) => drawOnce(view, new Set(["tab"])));

  function drawPicture(changed) {
    const other = changed.has("step") || changed.has("section") || changed.has("sizes") || changed.has("tab");
    picture.draw({ other, unfolded: changed.has("open") });
    dom.put(legend, picture.legend());
  }

  function theme(chosen) {
    if (chosen) document.documentElement.dataset.theme = chosen;
  }

  function toggleTheme() {
    const dark =
      document.documentElement.dataset.theme ??
      (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
    theme(dark === "dark" ? "light" : "dark");
    remember(document.documentElement.dataset.theme);
  }

  // A page may be shown where nothing can be kept; then the choice lasts as long as the page.
  function remember(chosen) {
    try {
      localStorage.setItem(THEME, chosen);
    } catch (error) {
      if (!(error instanceof DOMException)) throw error;
    }
  }

  function remembered() {
    try {
      return localStorage.getItem(THEME);
    } catch (error) {
      if (!(error instanceof DOMException)) throw error;
      return null;
    }
  }

  function start() {
    theme(remembered());
    head();
    dom.put(toolbar, sections.bar, legend);
    dom.put(dom.byId("picture"), toolbar, picture.panes);
    state.onChange(redraw);
    state.start();
    keys.start();
    printing.start();
    document.documentElement.dataset.ready = "true";
  }

  return { start, drawAll, toggleTheme };
})();

page.start();
