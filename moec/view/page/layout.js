// Where items stand. Both sides are laid out as one graph, so that what is kept stands at the same place on both.
const layout = (() => {
  "use strict";
  const GAP = { nodesep: 26, ranksep: 30, marginx: 16, marginy: 16 };
  const HEADER = 30; // a region's name, above what stands in it
  const PAD = 12;
  const WEIGHTS = { kept: 4, created: 2, removed: 1 }; // how straight a wire is: what was kept before what is gone

  // { before, after: { boxes: key → {x, y, width, height}, opened: key of a region → box },
  //   pointsOf(from, to), bounds: of everything, changed: boxes of what was not kept }
  function of(drawing, seen, sizeOf, statusOf) {
    const keys = new Set(visible.SIDES.flatMap((side) => [...seen[side].items.keys()]));
    const homes = homesOf(drawing, keys);
    const covered = (key) => key[0] === "r" && homes.has(Number(key.slice(1)));
    const shared = slots.of(drawing, keys, covered);
    const slot = (key) => shared.get(key) ?? key;
    const graph = graphOf(keys, homes, seen, covered, slot, sizeOf);
    dagre.layout(graph);
    const laid = [...keys].filter((key) => !covered(key));
    const own = new Map(laid.map((key) => [key, boxOf(graph.node(slot(key)))]));
    const [before, after] = visible.SIDES.map((side) => placed(seen[side], own, homes));
    const all = [before, after].flatMap(({ boxes, opened }) => [...boxes, ...opened]);
    const bends = graph.edges().flatMap((edge) => graph.edge(edge).points);
    const changed = all.filter(([key]) => statusOf(key) !== "kept").map(([, box]) => box);
    const corners = bends.map(({ x, y }) => ({ x, y, width: 0, height: 0 }));
    const bounds = boundsOf([...all.map(([, box]) => box), ...corners]);
    const pointsOf = (from, to) => graph.edge(slot(from), slot(to))?.points;
    return { before, after, pointsOf, bounds, changed };
  }

  // On one side: items that the layout has no place for lie over those that it has.
  function placed({ items, opened }, own, homes) {
    const over = (key) => around(homes.get(Number(key.slice(1))).map((each) => own.get(each)));
    const frame = (nodes) => around(nodes.map((at) => own.get(`n${at}`)));
    return {
      boxes: new Map([...items.keys()].map((key) => [key, own.get(key) ?? over(key)])),
      opened: new Map([...opened].map(([region, nodes]) => [`r${region}`, frame(nodes)])),
    };
  }

  // By region: the operators that are seen and belong to it, after the pass or before. Where a region is folded on
  // one side and its operators are seen on the other, the folded box lies over the places of these.
  function homesOf(drawing, keys) {
    const homes = new Map();
    for (const key of keys) {
      if (key[0] !== "n") continue;
      const node = drawing.nodes[Number(key.slice(1))];
      const region = node.after?.region ?? node.before?.region ?? null;
      if (region === null) continue;
      if (!homes.has(region)) homes.set(region, []);
      homes.get(region).push(key);
    }
    return homes;
  }

  function graphOf(keys, homes, seen, covered, slot, sizeOf) {
    const graph = new dagre.graphlib.Graph({ compound: true }).setGraph(GAP).setDefaultEdgeLabel(() => ({}));
    for (const key of keys) {
      if (covered(key)) continue;
      const known = graph.node(slot(key)) ?? { width: 0, height: 0 };
      const { width, height } = sizeOf(key);
      graph.setNode(slot(key), {
        width: Math.max(width, known.width),
        height: Math.max(height, known.height),
      });
    }
    for (const [region, members] of homes) {
      graph.setNode(`c${region}`, {});
      for (const key of members) graph.setParent(slot(key), `c${region}`);
    }
    for (const side of visible.SIDES) connect(graph, seen[side].edges, homes, covered, slot);
    for (const edge of graph.edges()) if (isSize(edge.v)) graph.edge(edge).weight = 0;
    return graph;
  }

  // A size that enters the block (`S`) is read in many places; it pulls none of them to itself.
  const isSize = (key) => labels.isEnd(key) && !labels.linesOf(key)[2].includes("[");

  // A box that lies over others is entered at the first of them and left at the last.
  function connect(graph, edges, homes, covered, slot) {
    const end = (key, last) => slot(covered(key) ? homes.get(Number(key.slice(1))).at(last ? -1 : 0) : key);
    for (const [from, to, status] of edges) {
      const [a, b] = [end(from, true), end(to, false)];
      if (a !== b) graph.setEdge(a, b, { weight: WEIGHTS[status] });
    }
  }

  const boxOf = ({ x, y, width, height }) => ({ x: x - width / 2, y: y - height / 2, width, height });

  function boundsOf(boxes) {
    if (!boxes.length) return { x: 0, y: 0, width: 1, height: 1 };
    const [x, y] = [Math.min(...boxes.map((box) => box.x)), Math.min(...boxes.map((box) => box.y))];
    const right = Math.max(...boxes.map((box) => box.x + box.width));
    const bottom = Math.max(...boxes.map((box) => box.y + box.height));
    return { x, y, width: right - x, height: bottom - y };
  }

  function around(boxes) {
    const { x, y, width, height } = boundsOf(boxes);
    return { x: x - PAD, y: y - HEADER, width: width + 2 * PAD, height: height + HEADER + PAD };
  }

  return { of };
})();
