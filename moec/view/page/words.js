// How numbers, layers and verdicts are spelled.
const words = (() => {
  "use strict";
  const STATUSES = ["created", "removed", "moved", "rewired", "marked", "kept"];
  // Each has a sign besides its colour and the style of its line.
  const SIGNS = { created: "+", removed: "−", moved: "→", rewired: "~", marked: "•", kept: "=" };
  const MEANINGS = {
    created: "created: not there before",
    removed: "removed: not there after",
    moved: "moved into another region",
    rewired: "rewired: reads or is told something else",
    marked: "marked: the same operator, placed or shaped otherwise",
    kept: "kept as it was",
  };
  const VERDICTS = {
    proved: { sign: "✓", means: "proved: compared before and after" },
    measured: { sign: "≈", means: "measured: the difference is stated" },
    stated: { sign: "○", means: "stated, not checked" },
  };

  const verdict = (check) =>
    (check && VERDICTS[check.verdict]) || { sign: "·", means: "nothing was claimed" };

  const isNumber = (value) => typeof value === "number" && Number.isFinite(value);

  // 1234567 → "1.23 M"; three figures are enough to compare by.
  function short(value, unit = "") {
    if (!isNumber(value)) return "";
    const scales = [
      [1e15, "P"],
      [1e12, "T"],
      [1e9, "G"],
      [1e6, "M"],
      [1e3, "k"],
    ];
    const [scale, letter] = scales.find(([size]) => Math.abs(value) >= size) ?? [1, ""];
    const figures = scale === 1 ? String(+value.toPrecision(3)) : (value / scale).toPrecision(3);
    return `${figures} ${letter}${unit}`.trim();
  }

  const exact = (value) => (isNumber(value) ? value.toLocaleString("en-US") : "");

  function seconds(value) {
    if (!isNumber(value)) return "";
    if (value < 0.0005) return "";
    return value < 1 ? `${Math.round(value * 1000)} ms` : `${value.toPrecision(3)} s`;
  }

  const tiny = (value) => (value === 0 ? "0" : value.toExponential(1));

  // [0, 1, 2, 5] → "0–2, 5"; [1, 3, 5, 7, 9] → "1, 3 … 9"
  function ranges(numbers) {
    const left = [...new Set(numbers)].sort((a, b) => a - b);
    const told = [];
    while (left.length) {
      const run = left.splice(0, Math.max(steady(left, 1), steady(left, 2)));
      const [first, second, last] = [run[0], run[1], run.at(-1)];
      if (run.length === 1) told.push(first);
      else told.push(second === first + 1 ? `${first}–${last}` : `${first}, ${second} … ${last}`);
    }
    return told.join(", ");
  }

  // How many of them, from the first, go on by a stride; fewer than three are told one by one.
  function steady(numbers, stride) {
    let count = 1;
    while (count < numbers.length && numbers[count] - numbers[count - 1] === stride) count += 1;
    return count > 2 ? count : 1;
  }

  const LAYER = "{layer}";
  // The number of the layer that is looked at, where the strings of alike blocks leave it open.
  const inLayer = (text, layer) =>
    layer === null || layer === undefined ? text : text.replaceAll(LAYER, layer);

  const plural = (count, noun) => `${exact(count)} ${noun}${count === 1 ? "" : "s"}`;

  // "+12 −3 →4": what happened, without what did not.
  function changes(counts) {
    return STATUSES.filter((status) => status !== "kept" && counts[status])
      .map((status) => SIGNS[status] + exact(counts[status]))
      .join(" ");
  }

  const clipped = (text, length) => (text.length > length ? `${text.slice(0, length - 1)}…` : text);

  return {
    STATUSES,
    SIGNS,
    MEANINGS,
    LAYER,
    verdict,
    short,
    exact,
    seconds,
    tiny,
    ranges,
    inLayer,
    plural,
    changes,
    clipped,
    isNumber,
  };
})();
