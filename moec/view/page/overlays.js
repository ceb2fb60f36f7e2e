// What else can be shown on the operators: amounts as shades, kinds as colours, and both in words.
const overlays = (() => {
  "use strict";
  const total = (amounts) => {
    const known = amounts.filter(words.isNumber);
    return known.length ? known.reduce((sum, each) => sum + each, 0) : null;
  };
  const together = (texts) => [...new Set(texts.filter(Boolean))].join(", ") || null;

  // `of(side, node)` is an amount or a text, null where there is none; `unit` tells an amount.
  const KNOWN = {
    none: { label: "nothing" },
    parameters: {
      label: "parameters",
      unit: "",
      of: (side) => total(side.weights.map((weight) => weight.parameters)),
    },
    flops: { label: "FLOPs", unit: "FLOP", of: (side) => side.flops },
    bytes: { label: "bytes", unit: "B", of: (side) => side.bytes },
    axis: { label: "placement axis", of: axesOf },
    collective: {
      label: "collective",
      of: (side) => side.collective && `${side.collective}${side.axis ? ` over ${side.axis}` : ""}`,
    },
    certificate: {
      label: "certificate error",
      of: (side, node) => (node.status === "kept" ? null : errorOf(state.step().check)),
    },
    fused: { label: "fused by", of: (side, node) => node.fused_by },
  };
  const NAMES = Object.keys(KNOWN);
  const COLOURS = 7;

  // A placement says "dim 2 over tensor"; the axes are what stands after "over".
  function axesOf(side) {
    const told = [side.placement, ...side.weights.map((weight) => weight.placement)].join("\n");
    return together([side.axis, ...[...told.matchAll(/over ([\w, ×+]+)/g)].map((found) => found[1].trim())]);
  }

  function errorOf(check) {
    if (!check) return "nothing claimed";
    if (!words.isNumber(check.error)) return `${check.contract}, ${check.verdict}`;
    return `${words.tiny(check.error)} ≤ ${words.tiny(check.tolerance)}`;
  }

  // Of one operator, or of a folded region: amounts are added up.
  function valueOf(nodes, side) {
    const overlay = KNOWN[state.now.overlay];
    if (!overlay.of) return null;
    const values = nodes.filter((node) => node[side]).map((node) => overlay.of(node[side], node) || null);
    return isAmount() ? total(values) : together(values);
  }

  const isAmount = () => KNOWN[state.now.overlay].unit !== undefined;
  const told = (value) =>
    value === null ? "" : isAmount() ? words.short(value, KNOWN[state.now.overlay].unit) : value;

  // Shades and colours are chosen among the values of one picture, both sides.
  function scale(values) {
    const known = values.filter((value) => value !== null);
    if (isAmount()) return { most: Math.max(0, ...known), kinds: [] };
    return { most: 0, kinds: [...new Set(known)].sort() };
  }

  const shade = (value, scaled) =>
    value > 0 && scaled.most > 0 ? 0.06 + 0.6 * Math.sqrt(value / scaled.most) : 0;
  const colour = (value, scaled) => scaled.kinds.indexOf(value) % COLOURS;

  function legend(scaled) {
    const overlay = KNOWN[state.now.overlay];
    if (!overlay.of) return null;
    if (!isAmount() && !scaled.kinds.length) return none(overlay);
    if (isAmount() && !scaled.most) return none(overlay);
    return dom.el(
      "div",
      { class: "legend", id: "overlay-legend" },
      isAmount() ? amounts(overlay, scaled) : kinds(scaled),
    );
  }

  const none = (overlay) =>
    dom.el("div", { class: "legend", id: "overlay-legend" }, `no ${overlay.label} here`);

  const swatch = (attributes) =>
    dom.svg(
      "svg",
      { class: "swatch", width: 14, height: 14, "aria-hidden": "true" },
      dom.svg("rect", { width: 14, height: 14, rx: 3, ...attributes }),
    );

  function amounts(overlay, scaled) {
    return [0.01, 0.25, 1].map((share) => {
      const value = scaled.most * share;
      return dom.el(
        "span",
        { class: "legend-entry" },
        swatch({ class: "heat", "fill-opacity": shade(value, scaled) }),
        `${share < 1 ? "" : "most: "}${told(value)}`,
      );
    });
  }

  const kinds = (scaled) =>
    scaled.kinds.map((kind) =>
      dom.el("span", { class: "legend-entry" }, swatch({ class: `tint tint-${colour(kind, scaled)}` }), kind),
    );

  return { KNOWN, NAMES, valueOf, told, scale, shade, colour, isAmount, legend };
})();
