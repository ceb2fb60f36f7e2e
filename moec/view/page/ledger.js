// Every matrix product of the user's model, and what became of it: a table to sort and to filter.
const ledger = (() => {
  "use strict";
  const room = dom.byId("ledger");
  const COLUMNS = ["weight", "shape", "role", "status", "by", "reason", "source"];
  const wanted = { text: "", status: "", by: "weight", down: false };
  const status = dom.el("select", {
    id: "ledger-status",
    onchange: (event) => want({ status: event.target.value }),
  });
  const filter = dom.el("input", {
    type: "search",
    id: "ledger-filter",
    placeholder: "weight, reason, line…",
    oninput: (event) => want({ text: event.target.value }),
  });
  const table = dom.el("div", { class: "table", tabindex: "0", role: "region", "aria-label": "Ledger" });
  const count = dom.el("p", { class: "sum", role: "status" });

  const spelled = (row, column) => (column === "shape" ? row.shape.join(" × ") : row[column]);
  const amount = (row) => row.shape.reduce((product, size) => product * size, 1);

  function want(changes) {
    Object.assign(wanted, changes);
    fill();
  }

  function draw() {
    const rows = timeline.data.ledger;
    if (!rows.length) return dom.put(room, dom.el("p", { class: "nothing" }, "The ledger is empty."));
    const statuses = [...new Set(rows.map((row) => row.status))].sort();
    dom.put(
      status,
      dom.el("option", { value: "" }, "every status"),
      statuses.map((each) => dom.el("option", { value: each }, each)),
    );
    status.value = wanted.status;
    dom.put(
      room,
      dom.el(
        "div",
        { class: "tools" },
        dom.el("label", { class: "choice" }, "filter", filter),
        dom.el("label", { class: "choice" }, "status", status),
        count,
      ),
      table,
      notes(),
    );
    return fill();
  }

  function fill() {
    const needle = wanted.text.toLowerCase();
    const fits = (row) =>
      (!wanted.status || row.status === wanted.status) &&
      COLUMNS.some((column) => spelled(row, column).toLowerCase().includes(needle));
    const rows = timeline.data.ledger.filter(fits).sort(compare);
    count.textContent = `${words.exact(rows.length)} of ${words.plural(timeline.data.ledger.length, "product")}`;
    dom.put(
      table,
      dom.el(
        "table",
        {},
        dom.el("thead", {}, dom.el("tr", {}, COLUMNS.map(header))),
        dom.el("tbody", {}, rows.map(line)),
      ),
    );
  }

  // Layers 2 before 10, shapes by their size.
  const collator = new Intl.Collator("en", { numeric: true });
  function compare(a, b) {
    const order =
      wanted.by === "shape"
        ? amount(a) - amount(b)
        : collator.compare(spelled(a, wanted.by), spelled(b, wanted.by));
    return wanted.down ? -order : order;
  }

  function header(column) {
    const sorted = wanted.by === column;
    const sign = sorted ? (wanted.down ? " ↓" : " ↑") : "";
    return dom.el(
      "th",
      { scope: "col", "aria-sort": sorted ? (wanted.down ? "descending" : "ascending") : "none" },
      dom.el(
        "button",
        {
          type: "button",
          "data-key": `sort ${column}`,
          onclick: () => want({ by: column, down: sorted && !wanted.down }),
        },
        column === "source" ? "line" : column,
        sign,
      ),
    );
  }

  const line = (row) =>
    dom.el(
      "tr",
      { class: `row-${row.status}` },
      COLUMNS.map((column) => dom.el("td", { class: column }, spelled(row, column))),
    );

  const notes = () =>
    timeline.data.notes.length > 0 &&
    dom.el(
      "ul",
      { class: "notes" },
      timeline.data.notes.map((note) => dom.el("li", {}, note)),
    );

  // Prints all rows.
  const clear = () => want({ text: (filter.value = ""), status: (status.value = "") });

  return { draw, clear };
})();
