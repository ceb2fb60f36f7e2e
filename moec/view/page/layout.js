// Where items stand. Both sides are laid out as one graph, so that what is kept stands at the same place on both.
const layout = (() => {
  "use strict";
  const GAP = { nodesep: 26, ranksep: 30, marginx: 16, marginy: 16 };
  const HEADER = 30; // a region's name, above what stands in it
  const PAD = 12;

  // { boxes: side → key → {x, y, width, height}, opened: side → region → box, points: "from to" → […], bounds }
  function of(drawing, seen, sizeOf) {
    const keys = new Set(visible.SIDES.flatMap((side) => [...seen[side].items.keys()]));
    const homes = homesOf(drawing, keys);
    const graph = graphOf(keys, homes, seen, sizeOf);
    dagre.layout(graph);
    const own = new Map(
      graph
        .nodes()
        .filter((key) => !key.startsWith("c"))
        .map((key) => [key, boxOf(graph.node(key))]),
    );
    const points = new Map(graph.edges().map((edge) => [`${edge.v} ${edge.w}`, graph.edge(edge).points]));
    const boxes = {};
    const opened = {};
    for (const side of visible.SIDES) {
      const hull = (region) => around(homes.get(region).map((key) => own.get(key)));
      boxes[side] = new Map(
        [...seen[side].items.keys()].map((key) => [key, own.get(key) ?? hull(Number(key.slice(1)))]),
      );
      opened[side] = new Map(
        [...seen[side].opened].map(([region, nodes]) => [
          region,
          around(nodes.map((at) => own.get(`n${at}`))),
        ]),
      );
    }
    const bends = [...points.values()].flat().map(({ x, y }) => ({ x, y, width: 0, height: 0 }));
    const everything = [
      ...own.values(),
      ...bends,
      ...visible.SIDES.flatMap((side) => [...boxes[side].values(), ...opened[side].values()]),
    ];
    return { boxes, opened, points, bounds: boundsOf(everything) };
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

  function graphOf(keys, homes, seen, sizeOf) {
    const graph = new dagre.graphlib.Graph({ compound: true }).setGraph(GAP).setDefaultEdgeLabel(() => ({}));
    const covered = (key) => key[0] === "r" && homes.has(Number(key.slice(1)));
    for (const key of keys) if (!covered(key)) graph.setNode(key, sizeOf(key));
    for (const [region, members] of homes) {
      graph.setNode(`c${region}`, {});
      for (const key of members) graph.setParent(key, `c${region}`);
    }
    // A box that lies over others is entered at the first of them and left at the last.
    const end = (key, last) => (covered(key) ? homes.get(Number(key.slice(1))).at(last ? -1 : 0) : key);
    for (const side of visible.SIDES) {
      for (const [from, to] of seen[side].edges) {
        const [a, b] = [end(from, true), end(to, false)];
        if (a !== b) graph.setEdge(a, b, { weight: side === "after" ? 2 : 1 });
      }
    }
    return graph;
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
