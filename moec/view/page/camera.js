// How the pictures are moved and scaled: all panes alike.
const camera = (() => {
  "use strict";
  const SCALES = [0.12, 3];
  const [READABLE, LARGEST] = [0.62, 1.1]; // nothing is made smaller to be seen whole, or larger to fill a pane
  const [MARGIN, EDGE] = [16, 24];
  let panes = []; // { svg, view }
  let bounds = { x: 0, y: 0, width: 1, height: 1 };
  let changed = []; // boxes that are to be seen where not all of it can be
  let at = d3.zoomIdentity;
  let byHand = false; // until it is, the picture is fitted into whatever room there is

  const calm = () => matchMedia("(prefers-reduced-motion: reduce)").matches;

  // A wheel moves; with Ctrl, or by pinching, it scales.
  const zoom = d3
    .zoom()
    .scaleExtent(SCALES)
    .filter((event) => !event.button && (event.type !== "wheel" || event.ctrlKey || event.metaKey))
    .on("zoom", (event) => {
      byHand ||= Boolean(event.sourceEvent);
      put(event.transform);
    });

  function wheeled(event) {
    if (event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    byHand = true;
    move(-event.deltaX, -event.deltaY);
  }

  // Look at these panes, whose contents lie within `around`; `boxes` is where something changed.
  function turnTo(shown, around, boxes) {
    [panes, bounds, changed] = [shown, around, boxes];
    for (const { svg } of panes) {
      d3.select(svg).call(zoom).on("dblclick.zoom", null);
      svg.addEventListener("wheel", wheeled, { passive: false });
    }
  }

  function put(transform) {
    at = transform;
    for (const { svg, view } of panes) {
      svg.__zoom = transform;
      view.setAttribute("transform", transform.toString());
    }
  }

  const go = (transform) => panes.length && zoom.transform(d3.select(panes[0].svg), transform);
  const move = (dx, dy) => go(d3.zoomIdentity.translate(at.x + dx, at.y + dy).scale(at.k));

  // What was at one place of the picture is at another now, and stays where it is on the screen.
  function follow(was, is) {
    if (!was || !is) return fit();
    byHand = true;
    go(at);
    return move((was.x - is.x) * at.k, (was.y - is.y) * at.k);
  }

  const stay = () => (byHand ? go(at) : fit());

  // All of it where that can be read; else what changed, or its beginning.
  function fitted() {
    const { width, height } = panes[0].svg.getBoundingClientRect();
    const whole = Math.min(width / (bounds.width + 2 * MARGIN), height / (bounds.height + 2 * MARGIN));
    const k = Math.min(Math.max(whole, READABLE), LARGEST);
    const x = along(width / k, "x", "width");
    const y = along(height / k, "y", "height");
    return d3.zoomIdentity.translate(x * k, y * k).scale(k);
  }

  // How far the picture is moved along one axis, of which `room` is seen: to the middle of all, or of what changed,
  // or to where that begins; across, to where most of it is.
  function along(room, start, size) {
    const [low, high] = [bounds[start], bounds[start] + bounds[size]];
    if (bounds[size] <= room - 2 * MARGIN) return (room - low - high) / 2;
    const boxes = changed.length ? changed : [bounds];
    const [first, last] = [
      Math.min(...boxes.map((box) => box[start])),
      Math.max(...boxes.map((box) => box[start] + box[size])),
    ];
    const centres = boxes.map((box) => box[start] + box[size] / 2);
    const mean = centres.reduce((sum, each) => sum + each, 0) / centres.length;
    const fits = last - first <= room - 2 * MARGIN;
    const wanted = fits ? (room - first - last) / 2 : size === "width" ? room / 2 - mean : MARGIN - first;
    return Math.max(room - MARGIN - high, Math.min(MARGIN - low, wanted));
  }

  function fit(smoothly = false) {
    if (!panes.length) return;
    byHand = false;
    if (smoothly && !calm()) {
      d3.select(panes[0].svg).transition().duration(180).call(zoom.transform, fitted());
    } else go(fitted());
  }

  function scaleBy(factor) {
    if (!panes.length) return;
    byHand = true;
    zoom.scaleBy(d3.select(panes[0].svg), factor);
  }

  // Moves as little as brings an item into sight.
  function bring(item) {
    const [box, frame] = [item.getBoundingClientRect(), item.ownerSVGElement.getBoundingClientRect()];
    const away = (from, to, low, high) => (from < low ? low - from : to > high ? high - to : 0);
    const dx = away(box.left, box.right, frame.left + EDGE, frame.right - EDGE);
    const dy = away(box.top, box.bottom, frame.top + EDGE, frame.bottom - EDGE);
    if (dx || dy) move(dx, dy);
  }

  // For paper: all of it, whatever is looked at.
  function whole(on) {
    const { x, y, width, height } = bounds;
    const box = [x - MARGIN, y - MARGIN, width + 2 * MARGIN, height + 2 * MARGIN].join(" ");
    for (const { svg, view } of panes) {
      if (on) svg.setAttribute("viewBox", box);
      else svg.removeAttribute("viewBox");
      view.setAttribute("transform", (on ? d3.zoomIdentity : at).toString());
    }
  }

  // The details narrow the panes, and so does the window.
  function watch(room, otherwise) {
    new ResizeObserver(() => (byHand ? otherwise() : fit())).observe(room);
  }

  return { turnTo, follow, stay, fit, scaleBy, bring, whole, watch };
})();
