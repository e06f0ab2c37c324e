// list view

/** What a row can show; `width` is a track of its grid. `column`: a statistic of that name, sorted by a click. */
const COLUMNS = [
  { name: "id", title: "#", class: "id", width: "64px" },
  { name: "context", title: "strongest token in context", class: "context", width: "minmax(0, 1fr)" },
  { name: "rule", title: "rule", class: "rule", width: "minmax(0, 170px)", needs: "precision" },
  { name: "precision", title: "P", class: "num wide", width: "48px", column: true, format: short2, hint: "precision of the rule: share of the latent's firings" },
  { name: "recall", title: "R", class: "num wide", width: "52px", column: true, format: short2, hint: "recall of the rule: share of its rows on which the latent fires" },
  { name: "lift", title: "lift", class: "num wide", width: "56px", column: true, format: decimal, hint: "precision of the rule over its share among all rows" },
  { name: "share", title: "share", class: "num wide", width: "56px", column: true, format: decimal, hint: "share of the strongest tenth of firings that the best scored rule names" },
  { name: "frequency", title: "fires", class: "num freq", width: "76px", column: true, format: percent },
  { name: "n_fired", title: "firings", class: "num wide", width: "76px", column: true, format: count },
  { name: "max", title: "max", class: "num wide", width: "60px", column: true, format: decimal },
  { name: "mean", title: "mean", class: "num wide", width: "60px", column: true, format: decimal },
  { name: "spark", title: "by size", class: "wide", width: "72px", needs: "spark" },
];
const ALWAYS = ["id", "context"];
const AT_FIRST = ["rule", "precision", "recall", "frequency", "max", "spark"];
const PAGE_ROWS = 100;
/** On paper, of a list without pages. */
const PRINTED_ROWS = 200;
/** Whether the choice of columns stays open while it is made. */
let columnsOpen = false;
const narrow = matchMedia("(max-width: 820px)");
const paper = matchMedia("print");
/** What the list shows now; null in other views. @type {?{sae: SAEInfo, move: (by: number) => void, open: () => void, redraw: () => void}} */
let list = null;
paper.addEventListener("change", () => list?.redraw());

const offered = (sae) => COLUMNS.filter((one) => sae.columns.includes(one.column ? one.name : one.needs) || (!one.column && !one.needs));

/** @param {Address} at */
function shownColumns(at) {
  const wanted = at.cols ? at.cols.split(",") : AT_FIRST;
  return offered(at.sae).filter((one) => ALWAYS.includes(one.name) || wanted.includes(one.name));
}

/** @param {Address} at */
async function listView(at) {
  const { sae } = at;
  const found = await results(sae, at.q, at.sort);
  const pages = Math.max(1, Math.ceil(found.ids.length / PAGE_ROWS));
  const page = at.page ? Math.max(1, Math.min(pages, Number(at.page) || 1)) : 0;
  const offset = page ? (page - 1) * PAGE_ROWS : 0;
  const ids = page ? found.ids.subarray(offset, offset + PAGE_ROWS) : found.ids;
  const shown = shownColumns(at);
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
    class: page ? "grid paged" : "grid", role: "grid", "aria-rowcount": found.ids.length + 1, "aria-label": `Latents of ${sae.name}`,
    style: `--cols: ${shown.map((one) => one.width).join(" ")}`,
  }, h("div", { role: "rowgroup" }, headerRow(at, found.sort, shown)), body);
  /** @type {Map<number, HTMLElement>} */
  const drawn = new Map();
  let active = 0;

  const height = () => (narrow.matches ? 64 : 40);

  function draw(fresh = false) {
    const first = page || paper.matches ? 0 : Math.max(0, Math.floor(grid.scrollTop / height()) - 6);
    const last = page ? ids.length : Math.min(ids.length, paper.matches ? PRINTED_ROWS : first + Math.ceil(grid.clientHeight / height()) + 12);
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
      row.setAttribute("aria-rowindex", offset + index + 2);
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
    row?.focus({ preventScroll: !page });
  }

  let waiting = 0;
  grid.addEventListener("scroll", () => {
    at.entry.scroll = grid.scrollTop;
    waiting ||= requestAnimationFrame(() => ((waiting = 0), draw()));
  });
  new ResizeObserver(redraw).observe(grid);
  list = { sae, move, redraw, open: () => (location.hash = latentAddress(sae, ids[active], at)) };
  body.style.height = `${ids.length * height()}px`;
  const scroll = at.entry.scroll || 0;
  at.restore = () => (grid.scrollTop = scroll);
  for (const one of shown) {
    if (one.column || one.name === "spark") column(sae, one.name).then((values) => ((data[one.name] = values), redraw()), report);
  }
  return [
    h("div", { class: "list-head" },
      h("h1", { tabindex: -1 }, "Latents"),
      h("span", { id: "n-results", class: "num" }, found.ids.length === sae.nLatents
        ? count(found.ids.length) : `${count(found.ids.length)} of ${count(sae.nLatents)}`),
      h("span", { class: "note" }, found.sort
        ? ["sorted by ", COLUMNS.find((one) => one.name === found.sort.replace(/^-/, "")).title, " · ", h("a", { href: sortAddress(at, "") }, "random order")]
        : `live latents in random order, seed ${summary.seed}`),
      listTools(at, found, shown, page, report)),
    sae.only && h("p", { class: "note", id: "holds" }, `${holds(sae)}.`),
    sae.index.off && h("p", { class: "note", id: "no-index" }, `Search looks at rules, top tokens and their contexts only: ${sae.index.off}.`),
    queryParts(at, found.parts),
    failed,
    !page && ids.length > PRINTED_ROWS && h("p", { class: "note on-paper" }, `The first ${PRINTED_ROWS} of ${count(ids.length)}, as printed.`),
    ids.length ? grid : h("div", { class: "grid" }, noMatches(sae, found.parts)),
    page ? pageLinks(at, page, pages) : null,
  ];
}

/** The list in another order; an order that the query asked for goes. @param {Address} at */
function sortAddress(at, sort) {
  let { q } = at;
  for (const part of parseQuery(q).reverse()) if (part.sort !== undefined) q = without(q, part);
  return address(at.sae, "latents", { ...at, q, sort, page: at.page && "1" });
}

/** Columns, paging, a random one, a link, files. @param {Address} at */
function listTools(at, found, shown, page, report) {
  const { sae } = at;
  const names = new Set(shown.map((one) => one.name));
  const choose = (event) => {
    names[event.target.checked ? "add" : "delete"](event.target.value);
    const cols = offered(sae).filter((one) => names.has(one.name) && !ALWAYS.includes(one.name)).map((one) => one.name).join(",");
    replaceAddress(address(sae, "latents", { ...at, cols: cols === AT_FIRST.join(",") ? "" : cols || "none" }), "#columns summary");
  };
  const save = (kind) => saveLatents(sae, found.ids, shown, kind).catch(report);
  return h("div", { class: "list-tools" },
    h("details", { id: "columns", open: columnsOpen, ontoggle: (event) => (columnsOpen = event.target.open) }, h("summary", {}, "columns"), h("div", { class: "menu" },
      offered(sae).filter((one) => !ALWAYS.includes(one.name)).map((one) => h("label", {}, h("input", { type: "checkbox", value: one.name, checked: names.has(one.name), onchange: choose }), one.hint ? `${one.title}: ${one.hint}` : one.title)))),
    h("button", { type: "button", class: "small", id: "paging", "aria-pressed": String(page > 0), onclick: () => replaceAddress(address(sae, "latents", { ...at, page: page ? "" : "1" }), "#paging") }, `pages of ${PAGE_ROWS}`),
    h("button", { type: "button", class: "small", title: "a random live latent (r)", onclick: randomLatent }, "random"),
    summary.views.includes("judge") && h("a", { class: "small", href: address(sae, "judge"), title: "say of 30 random latents how clear they are, without seeing their rules" }, "judge"),
    copyButton("copy link", pageLink),
    h("button", { type: "button", class: "small", title: "all matches with the columns shown", onclick: () => save("csv") }, "CSV"),
    h("button", { type: "button", class: "small", title: "all matches with the columns shown", onclick: () => save("json") }, "JSON"));
}

function pageLinks(at, page, pages) {
  const link = (number, text) => (number < 1 || number > pages ? h("span", { "aria-disabled": "true" }, text) : h("a", { href: address(at.sae, "latents", { ...at, page: String(number) }) }, text));
  return h("nav", { class: "pager pages", "aria-label": "Pages" }, link(page - 1, "◂ previous"), h("span", { class: "note" }, `page ${count(page)} of ${count(pages)}`), link(page + 1, "next ▸"));
}

function headerRow(at, sort, shown) {
  return h("div", { class: "row header", role: "row", "aria-rowindex": 1 },
    shown.map((one) => {
      const mine = sort.replace(/^-/, "") === one.name;
      const cell = { role: "columnheader", class: one.class.replace("wide", "").replace("context", ""), title: one.hint, "aria-sort": false };
      const title = one.name === "context" && !at.sae.hasText ? "strongest row" : one.title;
      if (!one.column && one.name !== "id") return h("span", { ...cell, class: "note" }, title);
      cell["aria-sort"] = mine ? (sort[0] === "-" ? "descending" : "ascending") : "none";
      const next = mine && sort[0] === "-" ? one.name : mine ? "" : one.name === "id" ? "id" : `-${one.name}`;
      const arrow = mine ? (sort[0] === "-" ? " ↓" : " ↑") : "";
      return h("span", cell, h("button", { type: "button", "data-sort": one.name, onclick: () => (location.hash = sortAddress(at, next)) }, one.title + arrow));
    }));
}

function listRow(at, shown, data, shards, id) {
  const row = shards.get(Math.floor(id / summary.labelShard))?.[id % summary.labelShard];
  const href = latentAddress(at.sae, id, at);
  const cells = shown.map((one) => {
    const cell = (...children) => h("span", { role: "gridcell", class: one.class }, ...children);
    if (one.name === "id") return cell(h("a", { href, tabindex: -1 }, id));
    if (one.name === "context") return cell(row ? snippet(row) : "");
    if (one.name === "rule") return cell(row ? rowLabel(row) : "");
    if (one.name === "spark") return cell(data.spark ? spark(data.spark, id) : "");
    const value = data[one.name]?.[id];
    return cell(value === undefined ? "" : Number.isNaN(value) ? "–" : one.format(value));
  });
  return h("div", {
    class: "row", role: "row", "data-id": id,
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

/** @param {?Label} rule */
function ruleName(rule) {
  if (!rule) return h("span", { class: "muted" }, "no rule");
  return [`${rule[0]} `, h("code", {}, show(rule[1], 40))];
}

/** A small histogram: bars of up to 40 half pixels (pages.py). */
function spark(values, id) {
  const width = 16;
  let path = "";
  for (let i = 0; i < width; i++) {
    const value = values[id * width + i] / 2;
    if (value) path += `M${i * 4.5} 20v${-value.toFixed(1)}h3.5V20z`;
  }
  return s("svg", { class: "spark", viewBox: "0 0 72 20", "aria-hidden": "true" }, s("path", { d: path }));
}

/** The parts of the query, each with a button that takes it out. @param {Address} at @param {Part[]} parts */
function queryParts(at, parts) {
  if (!parts.length) return null;
  return h("p", { class: "parts", role: "status" }, parts.map((part) => {
    if (part.or) return h("span", { class: "muted" }, "or");
    const told = part.error ? `${part.error}; left out` : part.note || (part.keeps === undefined ? "" : `keeps ${count(part.keeps)}`);
    return [
      h("span", { class: "part" }, h("span", { class: part.error ? "bad" : "" }, part.text),
        h("a", { href: address(at.sae, "latents", { ...at, q: without(at.q, part) }), title: "take this out", "aria-label": `take out ${part.text}` }, "×")),
      told && h("span", { class: "muted" }, told),
    ];
  }));
}

function noMatches(sae, parts) {
  if (!parts.length) return h("p", { class: "empty" }, "None is here.");
  return h("p", { class: "empty" }, "No latent matches all of this. ",
    parts.some((part) => part.field || part.kind) && !sae.hasText ? "There is no text here: activations were given. " : "",
    h("a", { href: address(sae, "latents") }, "Show all latents"));
}
