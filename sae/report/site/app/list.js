// list view

const COLUMNS = [
  { name: "id", title: "#", class: "id" },
  { name: "context", title: "strongest token in context", class: "context" },
  { name: "rule", title: "rule", class: "rule", rules: true },
  { name: "share", title: "share", class: "num wide", sort: true, format: decimal, rules: true },
  { name: "frequency", title: "fires", class: "num freq", sort: true, format: percent },
  { name: "n_fired", title: "firings", class: "num wide", sort: true, format: count },
  { name: "max", title: "max", class: "num wide", sort: true, format: decimal },
  { name: "mean", title: "mean", class: "num wide", sort: true, format: decimal },
  { name: "spark", title: "by size", class: "wide" },
];
const narrow = matchMedia("(max-width: 820px)");
/** What the list shows now; null in other views. @type {?{sae: SAEInfo, move: (by: number) => void, open: () => void}} */
let list = null;

/** @param {Address} at */
async function listView(at) {
  const { sae } = at;
  const { ids, terms } = await results(sae, at.q, at.sort);
  const hasRules = sae.columns.includes("share");
  const shown = COLUMNS.filter((one) => hasRules || !one.rules);
  /** @type {Object<string, ArrayLike<number>>} */
  const data = {};
  const shards = new Map();
  const failed = h("p", { class: "banner", hidden: true, role: "alert" });
  const report = (error) => {
    failed.hidden = false;
    failed.textContent = problemText(error);
  };
  const body = h("div", { class: "rows", role: "rowgroup" });
  const grid = h("div", {
    class: "grid", role: "grid", "aria-rowcount": ids.length + 1, "aria-label": `Latents of ${sae.name}`,
  }, h("div", { role: "rowgroup" }, headerRow(at, shown)), body);
  /** @type {Map<number, HTMLElement>} */
  const drawn = new Map();
  let active = 0;

  const height = () => (narrow.matches ? 64 : 40);

  function draw(fresh = false) {
    const first = Math.max(0, Math.floor(grid.scrollTop / height()) - 6);
    const last = Math.min(ids.length, first + Math.ceil(grid.clientHeight / height()) + 12);
    for (const [index, row] of drawn) {
      if (fresh || index < first || index >= last) {
        if (row.contains(document.activeElement) && !fresh) continue;
        row.remove();
        drawn.delete(index);
      }
    }
    for (let index = first; index < last; index++) {
      if (drawn.has(index)) continue;
      const row = listRow(at, shown, data, shards, ids[index]);
      row.style.top = `${index * height()}px`;
      row.setAttribute("aria-rowindex", index + 2);
      row.tabIndex = index === active ? 0 : -1;
      row.addEventListener("focus", () => (active = index));
      drawn.set(index, row);
      body.append(row);
      needShard(Math.floor(ids[index] / summary.labelShard));
    }
  }

  function redraw() {
    const had = drawn.get(active)?.contains(document.activeElement);
    body.style.height = `${ids.length * height()}px`;
    draw(true);
    if (had) drawn.get(active)?.focus();
  }

  function needShard(shard) {
    if (shards.has(shard)) return;
    shards.set(shard, null);
    labelShard(sae, shard).then((rows) => (shards.set(shard, rows), redraw()), report);
  }

  function move(by) {
    if (!ids.length) return;
    const next = Math.max(0, Math.min(ids.length - 1, active + (drawn.get(active)?.contains(document.activeElement) ? by : 0)));
    const top = next * height();
    if (top < grid.scrollTop) grid.scrollTop = top;
    else if (top + height() > grid.scrollTop + grid.clientHeight - 36)
      grid.scrollTop = top + height() - grid.clientHeight + 36;
    drawn.get(active)?.setAttribute("tabindex", "-1");
    active = next;
    draw();
    const row = drawn.get(active);
    row?.setAttribute("tabindex", "0");
    row?.focus({ preventScroll: true });
  }

  let waiting = 0;
  grid.addEventListener("scroll", () => {
    at.entry.scroll = grid.scrollTop;
    waiting ||= requestAnimationFrame(() => ((waiting = 0), draw()));
  });
  new ResizeObserver(redraw).observe(grid);
  list = { sae, move, open: () => (location.hash = address(sae, `latent/${ids[active]}`, at)) };
  body.style.height = `${ids.length * height()}px`;
  const scroll = at.entry.scroll || 0;
  at.restore = () => (grid.scrollTop = scroll);
  for (const one of shown) {
    if (!one.format && one.name !== "spark") continue;
    column(sae, one.name).then((values) => ((data[one.name] = values), redraw()), report);
  }
  return [
    h("div", { class: "list-head" },
      h("h1", { tabindex: -1 }, "Latents"),
      h("span", { id: "n-results", class: "num" }, ids.length === sae.nLatents
        ? count(ids.length) : `${count(ids.length)} of ${count(sae.nLatents)}`),
      at.q && h("a", { href: address(sae, "latents", { sort: at.sort }) }, "clear search"),
      h("span", { class: "note" }, at.sort
        ? ["sorted by ", at.sort.replace(/^-/, ""), " · ", h("a", { href: address(sae, "latents", { q: at.q }) }, "random order")]
        : `live latents in random order, seed ${summary.seed}`)),
    queryParts(terms, ids.length),
    failed,
    ids.length ? grid : h("div", { class: "grid" }, noMatches(sae, terms)),
  ];
}

function headerRow(at, shown) {
  return h("div", { class: `row header${shown.length < COLUMNS.length ? " no-share" : ""}`, role: "row", "aria-rowindex": 1 },
    shown.map((one) => {
      const name = at.sort.replace(/^-/, "");
      const mine = name === one.name && (one.sort || one.name === "id");
      const cell = { role: "columnheader", class: one.class.replace("wide", "").replace("context", ""), "aria-sort": false };
      const title = one.name === "context" && !at.sae.hasText ? "strongest row" : one.title;
      if (!one.sort && one.name !== "id") return h("span", { ...cell, class: "note" }, title);
      cell["aria-sort"] = mine ? (at.sort[0] === "-" ? "descending" : "ascending") : "none";
      const next = mine && at.sort[0] === "-" ? one.name : mine ? "" : one.name === "id" ? "id" : `-${one.name}`;
      const go = () => (location.hash = address(at.sae, "latents", { q: at.q, sort: next }));
      const arrow = mine ? (at.sort[0] === "-" ? " ↓" : " ↑") : "";
      return h("span", cell, h("button", { type: "button", "data-sort": one.name, onclick: go }, one.title + arrow));
    }));
}

function listRow(at, shown, data, shards, id) {
  const row = shards.get(Math.floor(id / summary.labelShard))?.[id % summary.labelShard];
  const href = address(at.sae, `latent/${id}`, at);
  const cells = shown.map((one) => {
    const cell = (...children) => h("span", { role: "gridcell", class: one.class }, ...children);
    if (one.name === "id") return cell(h("a", { href, tabindex: -1 }, id));
    if (one.name === "context") return cell(row ? snippet(row) : "");
    if (one.name === "rule") return cell(row ? ruleName(row[0]) : "");
    if (one.name === "spark") return cell(data.spark ? spark(data.spark, id) : "");
    const value = data[one.name]?.[id];
    return cell(value === undefined ? "" : Number.isNaN(value) ? "–" : one.format(value));
  });
  return h("div", {
    class: `row${shown.length < COLUMNS.length ? " no-share" : ""}`, role: "row", "data-id": id,
    onclick: (event) => event.target.closest("a") || (location.hash = href),
  }, cells);
}

function snippet(row) {
  const [, before, peak, after] = row;
  if (!peak.length) return h("span", { class: "muted" }, "never fired");
  if (!before.length && !after.length) return h("span", { class: "t a6 peak" }, show(peak, 80));
  return [
    h("span", { class: "before" }, h("bdi", { dir: "ltr" }, show(before, 400))),
    h("span", { class: "t a6 peak" }, show(peak, 40)),
    h("span", { class: "after" }, h("bdi", { dir: "ltr" }, show(after, 400))),
  ];
}

/** @param {?Rule} rule */
function ruleName(rule) {
  if (!rule) return h("span", { class: "muted" }, "no rule passes");
  return [`${rule[0]} `, h("code", {}, show(rule[1], 40))];
}

function spark(values, id) {
  const width = 16;
  let path = "";
  for (let i = 0; i < width; i++) {
    const value = (values[id * width + i] / 255) * 20;
    if (value) path += `M${i * 4.5} 20v${-value.toFixed(1)}h3.5V20z`;
  }
  return s("svg", { class: "spark", viewBox: "0 0 72 20", "aria-hidden": "true" }, s("path", { d: path }));
}

function queryParts(terms, nFound) {
  if (!terms.some((term) => term.error) && nFound) return null;
  return h("p", { class: "parts", role: "status" }, terms.filter((term) => !term.or).map((term) => [
    h("span", { class: `part${term.error ? " bad" : ""}` }, term.text),
    h("span", { class: "muted" }, term.error ? `${term.error}; left out` : term.keeps === undefined ? "" : `keeps ${count(term.keeps)}`),
  ]));
}

function noMatches(sae, terms) {
  return h("p", { class: "empty" }, "No latent matches all of this. ",
    terms.some((term) => term.field) && !sae.hasText ? "There is no text here: activations were given. " : "",
    h("a", { href: address(sae, "latents") }, "Show all latents"));
}
