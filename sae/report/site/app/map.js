// map view: decoder directions in two dimensions, on a canvas

const MOST_POINTS = 4000;
const CELL = 7;
/** Pixels around a point that count as on it. */
const REACH = 11;
const NEAREST = 8;
const TABLE_ROWS = 200;
const MAX_ZOOM = 400;
/** Kinds of rules as marks that differ in shape, not in colour alone. */
const KIND_MARKS = [["token", "circle"], ["after", "triangle"], ["syntax", "square"], ["position", "diamond"], ["no rule", "dot"]];
const MAP_COLOURS = { frequency: "how often it fires", max: "largest activation", kind: "kind of rule" };

/** @param {Address} at */
async function mapView(at) {
  const { sae } = at;
  if (!sae.hasMap) return [h("h1", { tabindex: -1 }, "Map"), h("p", {}, `${sae.name} has no map: it has too few latents, or its statistics list no neighbours. `, h("a", { href: address(sae, "latents") }, "Its latents as a list"), ".")];
  const [about, x, y, frequency, max, labels, found] = await Promise.all([
    once(`data/${sae.key}/map`, loadJSON), column(sae, "map_x"), column(sae, "map_y"), column(sae, "frequency"), column(sae, "max"), allLabels(sae), results(sae, at.q, "")]);
  const live = found.ids.filter((id) => frequency[id] > 0);
  const matched = Boolean(at.q);
  const everything = matched ? (await column(sae, "order")).filter((id) => frequency[id] > 0) : live;
  const kind = (id) => (labels[id][0] ? Math.max(0, KIND_MARKS.findIndex(([name]) => name === labels[id][0][0])) : KIND_MARKS.length - 1);
  const scales = { frequency: logSteps(frequency, everything, (v) => percent(v, 2)), max: logSteps(max, everything, (v) => decimal(v, 2)) };
  const saved = at.entry.map || {};
  let colour = saved.colour || "frequency";
  /** What stands under "Nearest to the centre". @type {number[]} */
  let listed = [];
  const world = { about, x, y, everything, points: live, matched };
  const info = h("div", { class: "map-info" });
  const near = h("ol", { class: "map-near" });
  const key = h("p", { class: "legend" });
  const table = h("div");
  const status = h("span", { class: "note" });

  const look = (id) => (colour === "kind" ? { mark: KIND_MARKS[kind(id)][1], step: 0 } : { mark: "circle", step: scales[colour].step(id) });
  const describe = (id) => [h("p", {}, h("a", { href: address(sae, `latent/${id}`, at) }, `Latent ${id}`), h("span", { class: "note" }, ` fires ${percent(frequency[id])} · max ${decimal(max[id])}`)),
    h("p", { class: "rule" }, ruleName(labels[id][0])), h("p", { class: "context" }, show(labels[id][1], 400), h("span", { class: "t a6 peak" }, show(labels[id][2], 40)), show(labels[id][3], 400))];
  const point = (id) => info.replaceChildren(...(id < 0 ? [h("p", { class: "note" }, "Point at a latent for its rule and its strongest context; click to open it.")] : describe(id)).flat(3));
  const tell = (view) => {
    at.entry.map = { ...view.place(), colour };
    status.textContent = `${matched ? `${count(live.length)} ${live.length === 1 ? "match" : "matches"}` : `${count(live.length)} live latents`}; ${count(view.inside())} here${view.inside() > view.drawn().length ? `, ${count(view.drawn().length)} drawn as points, a random sample` : ""}`;
    const nearest = view.nearest(NEAREST);
    // What stays is not made again: a link would be gone between the pointer's down and up, or lose the focus.
    if (nearest.join() !== listed.join()) near.replaceChildren(...nearest.map((id) => h("li", {}, h("a", { href: address(sae, `latent/${id}`, at) }, id), " ", h("span", { class: "rule" }, ruleName(labels[id][0])), " ", h("code", {}, show(labels[id][2], 24)))));
    listed = nearest;
    if (fold.open) fill();
  };
  const fill = () => {
    const ids = Array.from(plot.drawn().slice(0, TABLE_ROWS));
    table.replaceChildren(h("p", { class: "note" }, ids.length < plot.inside() ? `${count(ids.length)} of the ${count(plot.inside())} latents here; zoom in for others.` : `All ${count(ids.length)} latents here.`),
      dataTable(["latent", "rule", "fires", "max", "x", "y"], ids.map((id) => [h("a", { href: address(sae, `latent/${id}`, at) }, id), h("span", {}, ruleName(labels[id][0])), percent(frequency[id]), decimal(max[id]), decimal(x[id] / about.grid), decimal(y[id] / about.grid)]), "Latents on the map"));
  };
  const fold = h("details", { class: "map-table", ontoggle: () => fold.open && fill() }, h("summary", {}, "as a table"), table);
  const plot = mapCanvas(world, look, { point, tell, open: (id) => (location.hash = address(sae, `latent/${id}`, at)) });
  const paintKey = () => key.replaceChildren(...(colour === "kind" ? KIND_MARKS.map(([name, mark]) => h("span", { class: "map-key" }, markIcon(mark), name)) : [`${MAP_COLOURS[colour]}: `, ...scales[colour].legend.map((text, i) => h("span", { class: `swatch a${i + 1}` }, text))]));
  const choose = h("select", { id: "map-colour", onchange: () => {
    colour = choose.value;
    paintKey();
    plot.redraw();
  } }, Object.entries(MAP_COLOURS).map(([name, text]) => h("option", { value: name, selected: name === colour }, text)));
  const button = (text, title, act) => h("button", { type: "button", class: "small", title, "aria-label": title, onclick: act }, text);
  point(-1);
  paintKey();
  at.restore = () => plot.start(saved);
  return [
    h("div", { class: "list-head" }, h("h1", { tabindex: -1 }, "Map"), status, matched && h("span", {}, h("a", { href: address(sae, "latents", { q: at.q }) }, "as a list"), " · ", h("a", { href: address(sae, "map") }, "clear search"))),
    h("div", { class: "map-view" },
      h("div", {}, h("div", { class: "map-tools" }, h("label", {}, "colour ", choose), h("span", { class: "map-zoom" }, button("+", "zoom in (+)", () => plot.zoom(1.6)), button("−", "zoom out (-)", () => plot.zoom(1 / 1.6)), button("whole", "the whole map (0)", () => plot.start({})))),
        plot.canvas, key),
      h("aside", { "aria-label": "Latents on the map" }, info, h("section", {}, h("h2", {}, "Nearest to the centre"), near))),
    h("p", { class: "note" }, `Method: ${about.method}. Of each latent's ${about.neighbours} nearest by cosine, ${percent(about.kept)} are among its ${about.neighbours} nearest here (${percent(about.keptByComponents)} in two principal components alone), measured on ${count(about.measured)} latents. What lies close together is often similar; distances and empty space between groups mean nothing.`, everything.length > MOST_POINTS && ` Grey: latents per cell; at most ${count(MOST_POINTS)} of those in sight are points.`),
    fold,
  ];
}

/** Six steps of a positive statistic, with even shares of the latents' logarithms between the 2nd and 98th hundredth. */
function logSteps(values, ids, format) {
  const sorted = Float64Array.from(ids, (id) => values[id]).filter((v) => v > 0).sort();
  const [low, high] = [0.02, 0.98].map((q) => Math.log(sorted[Math.floor(q * (sorted.length - 1))] || 1));
  const edge = (i) => Math.exp(low + ((high - low) * i) / STEPS);
  return {
    step: (id) => Math.max(1, Math.min(STEPS, Math.ceil((STEPS * (Math.log(values[id]) - low)) / (high - low || 1)))),
    legend: Array.from({ length: STEPS }, (_, i) => (i === 0 ? `up to ${format(edge(1))}` : i === STEPS - 1 ? `from ${format(edge(i))}` : `to ${format(edge(i + 1))}`)),
  };
}

/** A shape about (0, 0) as path commands. */
function markPath(mark, r) {
  if (mark === "triangle") return `M0 ${-1.2 * r}L${1.1 * r} ${0.8 * r}H${-1.1 * r}Z`;
  if (mark === "square") return `M${-0.9 * r} ${-0.9 * r}H${0.9 * r}V${0.9 * r}H${-0.9 * r}Z`;
  if (mark === "diamond") return `M0 ${-1.3 * r}L${1.3 * r} 0L0 ${1.3 * r}L${-1.3 * r} 0Z`;
  const size = mark === "dot" ? r / 2 : r;
  return `M${-size} 0A${size} ${size} 0 1 1 ${size} 0A${size} ${size} 0 1 1 ${-size} 0Z`;
}

const markIcon = (mark) => s("svg", { class: `mark mark-${mark}`, viewBox: "-8 -8 16 16", "aria-hidden": "true" }, s("path", { d: markPath(mark, 5) }));

/**
 * The canvas: some latents as points, the others in grey. Wheel, drag, arrows, + - 0.
 * @param {{about: {grid: number}, x: Uint32Array, y: Uint32Array, everything: Uint32Array, points: Uint32Array, matched: boolean}} world
 *   `points` in order of preference: the first MOST_POINTS that lie inside are drawn
 * @param {(id: number) => {mark: string, step: number}} look
 * @param {{point: (id: number) => void, tell: (view: any) => void, open: (id: number) => void}} told
 */
function mapCanvas(world, look, told) {
  const { x, y, everything, points, matched } = world;
  const { grid } = world.about;
  const canvas = h("canvas", { class: "map", tabindex: 0, role: "application", "aria-label": "Map of decoder directions. Arrows move, plus and minus zoom, 0 shows the whole map. The latents nearest the centre are listed after it." });
  const place = { x: grid / 2, y: grid / 2, zoom: 1 };
  let [width, height, drawn, inside, on, frame] = [0, 0, new Uint32Array(), 0, -1, 0];
  const unit = () => (place.zoom * 0.94 * Math.min(width, height)) / grid;
  const toX = (id) => width / 2 + (x[id] - place.x) * unit();
  const toY = (id) => height / 2 - (y[id] - place.y) * unit();

  const isInside = (id) => toX(id) >= 0 && toY(id) >= 0 && toX(id) < width && toY(id) < height;

  function paint() {
    frame = 0;
    if (!canvas.isConnected || !width) return;
    const style = getComputedStyle(canvas);
    const colour = (name) => style.getPropertyValue(name).trim();
    const pen = canvas.getContext("2d");
    const ratio = devicePixelRatio || 1;
    canvas.width = Math.round(width * ratio);
    canvas.height = Math.round(height * ratio);
    pen.setTransform(ratio, 0, 0, ratio, 0, 0);
    paintOthers(pen, colour("--text"));
    choosePoints();
    const radius = drawn.length > 1500 && place.zoom < 3 ? 2.5 : 4;
    const paths = new Map();
    const shape = (mark) => paths.get(mark) || paths.set(mark, new Path2D(markPath(mark, radius))).get(mark);
    const kinds = { circle: "--mark", triangle: "--link", square: "--text", diamond: "--muted", dot: "--muted" };
    pen.lineWidth = 0.8;
    for (let i = drawn.length - 1; i >= 0; i--) {
      const { mark, step } = look(drawn[i]);
      pen.setTransform(ratio, 0, 0, ratio, toX(drawn[i]) * ratio, toY(drawn[i]) * ratio);
      pen.fillStyle = colour(step ? `--a${step}` : kinds[mark]);
      pen.fill(shape(mark));
      if (!step) continue;
      pen.strokeStyle = colour("--rule");
      pen.stroke(shape(mark));
    }
    if (on >= 0) {
      pen.setTransform(ratio, 0, 0, ratio, toX(on) * ratio, toY(on) * ratio);
      pen.lineWidth = 2;
      pen.strokeStyle = colour("--text");
      pen.stroke(new Path2D(markPath("circle", radius + 3)));
    }
  }

  /** What is not drawn as a point: few latents as dots, many as their number per cell. */
  function paintOthers(pen, ink) {
    const others = everything.filter(isInside);
    pen.fillStyle = ink;
    if (others.length <= MOST_POINTS) {
      if (!matched) return;
      pen.globalAlpha = 0.3;
      for (const id of others) pen.fillRect(toX(id) - 1, toY(id) - 1, 2, 2);
    } else {
      const columns = Math.ceil(width / CELL);
      const cells = new Uint32Array(columns * Math.ceil(height / CELL));
      for (const id of others) cells[Math.floor(toY(id) / CELL) * columns + Math.floor(toX(id) / CELL)]++;
      const most = Math.log1p(cells.reduce((a, b) => Math.max(a, b)));
      cells.forEach((n, i) => {
        if (!n) return;
        pen.globalAlpha = 0.05 + (0.3 * Math.log1p(n)) / most;
        pen.fillRect((i % columns) * CELL, Math.floor(i / columns) * CELL, CELL, CELL);
      });
    }
    pen.globalAlpha = 1;
  }

  function choosePoints() {
    const within = points.filter(isInside);
    inside = within.length;
    drawn = within.subarray(0, MOST_POINTS);
  }

  const redraw = () => (frame ||= requestAnimationFrame(paint));
  let waiting = 0;
  const view = {
    canvas, redraw, place: () => ({ ...place }), drawn: () => drawn, inside: () => inside,
    start(saved) {
      Object.assign(place, { x: grid / 2, y: grid / 2, zoom: 1 }, saved.zoom ? { x: saved.x, y: saved.y, zoom: saved.zoom } : {});
      resize();
    },
    zoom: (by) => zoomAt(by, width / 2, height / 2),
    nearest(n) {
      const far = (id) => (x[id] - place.x) ** 2 + (y[id] - place.y) ** 2;
      return Array.from(points).sort((a, b) => far(a) - far(b) || a - b).slice(0, n);
    },
  };

  function moved() {
    for (const axis of ["x", "y"]) place[axis] = Math.max(0, Math.min(grid, place[axis]));
    redraw();
    clearTimeout(waiting);
    waiting = setTimeout(() => canvas.isConnected && (choosePoints(), told.tell(view)), 120);
  }

  function zoomAt(by, px, py) {
    const before = unit();
    place.zoom = Math.max(1, Math.min(MAX_ZOOM, place.zoom * by));
    const shift = 1 / before - 1 / unit();
    place.x += (px - width / 2) * shift;
    place.y -= (py - height / 2) * shift;
    if (place.zoom === 1) Object.assign(place, { x: grid / 2, y: grid / 2 });
    moved();
  }

  function resize() {
    width = canvas.clientWidth;
    height = canvas.clientHeight;
    moved();
  }

  function hit(event) {
    let [best, found] = [REACH * REACH, -1];
    for (const id of drawn) {
      const far = (toX(id) - event.offsetX) ** 2 + (toY(id) - event.offsetY) ** 2;
      if (far < best) [best, found] = [far, id];
    }
    return found;
  }

  function point(id) {
    if (id === on) return;
    on = id;
    canvas.style.cursor = id >= 0 ? "pointer" : "";
    if (id >= 0) told.point(id);
    redraw();
  }

  /** Fingers and buttons that are down. @type {Map<number, {x: number, y: number}>} */
  const down = new Map();
  let [travelled, spread] = [0, 0];
  const apart = () => {
    const [p, q] = [...down.values()];
    return q ? Math.hypot(p.x - q.x, p.y - q.y) : 0;
  };
  canvas.addEventListener("pointerdown", (event) => {
    down.set(event.pointerId, { x: event.offsetX, y: event.offsetY });
    canvas.setPointerCapture(event.pointerId);
    [travelled, spread] = [0, apart()];
  });
  canvas.addEventListener("pointermove", (event) => {
    const last = down.get(event.pointerId);
    if (!last) return point(hit(event));
    const [dx, dy] = [event.offsetX - last.x, event.offsetY - last.y];
    down.set(event.pointerId, { x: event.offsetX, y: event.offsetY });
    travelled += Math.abs(dx) + Math.abs(dy);
    place.x -= dx / unit() / down.size;
    place.y += dy / unit() / down.size;
    if (down.size === 2 && spread) {
      const [p, q] = [...down.values()];
      const now = apart();
      zoomAt(now / spread, (p.x + q.x) / 2, (p.y + q.y) / 2);
      spread = now;
    }
    return moved();
  });
  canvas.addEventListener("pointerup", (event) => {
    down.delete(event.pointerId);
    if (travelled > 4) return;
    const found = hit(event);
    if (found >= 0 && (event.pointerType !== "touch" || found === on)) told.open(found); // a first tap reads, a second opens
    else point(found);
  });
  canvas.addEventListener("pointercancel", (event) => down.delete(event.pointerId));
  canvas.addEventListener("pointerleave", () => down.size || point(-1));
  canvas.addEventListener("wheel", (event) => {
    if (event.deltaY > 0 && place.zoom === 1) return; // nothing to zoom out of: the page scrolls
    event.preventDefault();
    zoomAt(Math.exp(-event.deltaY / 400), event.offsetX, event.offsetY);
  });
  canvas.addEventListener("keydown", (event) => {
    const step = 60 / unit();
    const move = { ArrowLeft: [-step, 0], ArrowRight: [step, 0], ArrowUp: [0, step], ArrowDown: [0, -step] }[event.key];
    const by = { "+": 1.6, "=": 1.6, "-": 1 / 1.6 }[event.key];
    if (move) {
      place.x += move[0];
      place.y += move[1];
      moved();
    } else if (by) view.zoom(by);
    else if (event.key === "0") view.start({});
    else return;
    event.preventDefault();
    event.stopPropagation();
  });
  new ResizeObserver(resize).observe(canvas);
  const themes = new MutationObserver(() => (canvas.isConnected ? redraw() : themes.disconnect()));
  themes.observe(document.documentElement, { attributeFilter: ["data-theme"] });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  return view;
}
