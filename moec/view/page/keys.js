// Keys, and the list of them.
const keys = (() => {
  "use strict";
  const room = dom.byId("help");
  const tabs = (at) => () => state.change({ tab: state.TABS[at] });
  const overlay = () =>
    state.change({
      overlay: overlays.NAMES[(overlays.NAMES.indexOf(state.now.overlay) + 1) % overlays.NAMES.length],
    });

  const KEYS = [
    [["ArrowRight", "j"], "→ j", "next pass", () => steps.move(1)],
    [["ArrowLeft", "k"], "← k", "pass before", () => steps.move(-1)],
    [["]"], "]", "next section", () => sections.move(1)],
    [["["], "[", "section before", () => sections.move(-1)],
    [["e"], "e", "unfold or fold all regions", all],
    [["u"], "u", "list unchanged sections too", () => state.change({ unchanged: !state.now.unchanged })],
    [["s"], "s", "draw sizes too", () => state.change({ sizes: !state.now.sizes })],
    [["o"], "o", "next overlay", overlay],
    [["+", "="], "+", "larger", () => camera.scaleBy(1.3)],
    [["-"], "-", "smaller", () => camera.scaleBy(1 / 1.3)],
    [["0"], "0", "fit", () => camera.fit(true)],
    [["1"], "1–5", "picture, text, program, ledger, plan", tabs(0)],
    [["2"], null, null, tabs(1)],
    [["3"], null, null, tabs(2)],
    [["4"], null, null, tabs(3)],
    [["5"], null, null, tabs(4)],
    [["/"], "/", "search", () => search.open()],
    [["d"], "d", "light or dark", () => page.toggleTheme()],
    [["?"], "?", "this list", help],
    [["Escape"], "Esc", "close", () => state.change({ selected: null })],
  ];
  const HANDS = [
    ["↑ ↓", "in a picture or a list: the next one"],
    ["Enter", "on an operator: details; on a region: unfold it"],
    ["Tab", "the other picture, the next control"],
    ["drag wheel", "move; with Ctrl the wheel scales"],
  ];

  function all() {
    const drawing = state.drawing();
    if (!drawing) return;
    const open = state.now.open.size ? new Set() : new Set(drawing.regions.keys());
    state.change({ open });
  }

  function help() {
    const rows = [...KEYS.filter(([, shown]) => shown).map(([, shown, what]) => [shown, what]), ...HANDS];
    dom.put(
      room,
      dom.el("h2", {}, "Keys"),
      dom.el(
        "dl",
        {},
        rows.map(([shown, what]) => [
          dom.el(
            "dt",
            {},
            shown.split(" ").map((key) => dom.el("kbd", {}, key)),
          ),
          dom.el("dd", {}, what),
        ]),
      ),
      signs(),
      dom.el("form", { method: "dialog" }, dom.el("button", { autofocus: true }, "Close")),
    );
    if (!room.open) room.showModal();
  }

  const signs = () => [
    dom.el("h2", {}, "Signs"),
    dom.el(
      "ul",
      { class: "signs" },
      words.STATUSES.map((status) =>
        dom.el(
          "li",
          { class: `status ${status}` },
          dom.el("b", {}, words.SIGNS[status]),
          words.MEANINGS[status],
        ),
      ),
    ),
  ];

  const typing = (target) => target.closest("input, select, textarea, dialog") !== null;

  function pressed(event) {
    if (event.ctrlKey || event.metaKey || event.altKey || typing(event.target)) return;
    const known = KEYS.find(([names]) => names.includes(event.key));
    if (!known) return;
    event.preventDefault();
    known[3]();
  }

  const start = () => document.addEventListener("keydown", pressed);

  return { start, help };
})();
