// compare view: two SAEs of the report

const PAIR_PAGE = 100;
const CONTEXTS_BESIDE = 5;
/** Latents of one side whose contexts a row shows. */
const MOST_BESIDE = 4;

/** The lists of the view: which rows, in words. `of` is the side whose latents are counted. */
const PAIR_LISTS = {
  matched: { title: ["one-to-one"], of: 0, code: ONE_TO_ONE, about: (pair) => `best matches of each other with a ${WAYS[pair.way]} from ${decimal(pair.matchedAbove, 2)} on, neither in a split nor in a merger` },
  split: { title: ["split 1 → n"], of: 0, code: PARENT, about: (pair) => `a latent of a that is the best match of several of b, each with a ${WAYS[pair.way]} from ${decimal(pair.nearAbove, 2)} on${containedText(pair)}` },
  merged: { title: ["merged n → 1"], of: 1, code: PARENT, about: (pair) => `several latents of a whose best match is the same latent of b, with a ${WAYS[pair.way]} from ${decimal(pair.nearAbove, 2)} on${containedText(pair)}` },
  "near-a": { title: ["near, in ", "a"], of: 0, code: NEAR_MATCH, about: (pair) => `a best match from ${decimal(pair.nearAbove, 2)} on, but neither one-to-one nor in a split or merger` },
  "near-b": { title: ["near, in ", "b"], of: 1, code: NEAR_MATCH, about: (pair) => `a best match from ${decimal(pair.nearAbove, 2)} on, but neither one-to-one nor in a split or merger` },
  "only-a": { title: ["only in ", "a"], of: 0, code: ONLY_HERE, about: (pair) => `no match in b with a ${WAYS[pair.way]} of ${decimal(pair.nearAbove, 2)}` },
  "only-b": { title: ["only in ", "b"], of: 1, code: ONLY_HERE, about: (pair) => `no match in a with a ${WAYS[pair.way]} of ${decimal(pair.nearAbove, 2)}` },
};
const containedText = (pair) => (pair.rows ? `, and firing on at least ${percent(pair.contained)} of the part's firings` : "");
const PAIR_SORTS = {
  score: (row) => row.score, phi: (row) => row.phi, a: (row) => row.frequency[0], b: (row) => row.frequency[1], parts: (row) => Math.max(row.ids[0].length, row.ids[1].length),
};

/** @param {Address} at */
async function compareView(at) {
  const [a, b] = chosenPair(at);
  const shown = at.rest[2] || "matched";
  if (!a || !b || !comparedWith(a).includes(b) || !PAIR_LISTS[shown]) return notFound(at);
  at.sae = a; // the header's switch and links follow
  if (current?.view === "compare" && chosenPair(current).every((sae, i) => sae === [a, b][i])) at.entry.page ??= scrollY; // another list of the same pair
  const [pair, ...frequency] = await Promise.all([loadPair(a, b), column(a, "frequency"), column(b, "frequency")]);
  return [
    h("div", { class: "list-head" }, h("h1", { tabindex: -1 }, "Compare"), pairChooser(a, b)),
    pairNotes(pair),
    pairNumbers(pair),
    h("section", { class: "plots" }, h("h2", { class: "hidden" }, "Distributions"),
      pair.way === "decoder" && scoreFigure(pair, "cosine", "Best match by decoder cosine", "random dictionaries of the same shapes"),
      pair.rows > 0 && scoreFigure(pair, "phi", "Best match by firing together", "the same firings on shuffled rows"),
      frequencyFigure(pair, frequency)),
    pairTabs(pair, shown),
    await pairList(at, pair, frequency, shown),
  ];
}

const sideMark = (name) => h("span", { class: `side-${name}` }, name);

/** @param {Address} at @returns {(SAEInfo|undefined)[]} */
function chosenPair(at) {
  const named = (key) => summary.saes.find((sae) => sae.key === key);
  if (at.rest.length > 1) return [named(at.rest[0]), named(at.rest[1])];
  const a = at.rest.length ? named(at.rest[0]) : at.sae;
  const partners = a ? comparedWith(a) : [];
  return partners.length || at.rest.length ? [a, partners[0]] : summary.compare.pairs[0].map(named);
}

function pairChooser(a, b) {
  const choice = (label, all, chosen, go) => h("label", { class: "pick" }, sideMark(label),
    h("select", { id: `compare-${label}`, onchange: (event) => (location.hash = go(all.find((sae) => sae.key === event.target.value))) },
      all.map((sae) => h("option", { value: sae.key, selected: sae === chosen }, sae.name))));
  const able = summary.saes.filter((sae) => comparedWith(sae).length);
  return h("span", { class: "picks" },
    choice("a", able, a, (next) => pairAddress(next, comparedWith(next).includes(b) ? b : comparedWith(next)[0])),
    choice("b", comparedWith(a), b, (next) => pairAddress(a, next)),
    h("a", { href: pairAddress(b, a), class: "swap" }, "swap"));
}

/** @param {Pair} pair */
function pairNotes(pair) {
  const note = (...parts) => h("p", { class: "note" }, parts);
  return h("div", { class: "pair-notes" }, [
    pair.sameRecipe && h("p", { class: "banner" }, "Same recipe, other seed: MMCS below is the MMCS between seeds, what the recipe finds again whatever its random start."),
    pair.way === "decoder" ? note("Both were trained on the same activations, so their decoder directions can be compared", pair.rows ? `; firing is compared on ${count(pair.rows)} sampled rows that both statistics share.` : ". Their statistics share no sampled rows, so firing is not compared.")
      : note(`Their decoders live in different spaces, so directions cannot be compared: matches are by firing together on ${count(pair.rows)} sampled rows that both share.`),
    summary.compare.leftOut > 0 && note(`${count(summary.compare.leftOut)} other pairs of this report were not compared: with this many latents only SAEs of neighbouring widths are.`),
  ]);
}

/** @param {Pair} pair */
function pairNumbers(pair) {
  const both = (value, chance) => pair.sides.map((side) => h("td", { class: "num" }, value(side), chance && h("span", { class: "note" }, ` chance ${chance(side)}`)));
  const row = (name, what, value, chance) => h("tr", {}, h("th", { scope: "row" }, name, what && h("span", { class: "note" }, what)), both(value, chance));
  const share = (way, i) => [(side) => percent(side[way].above[i][1]), (side) => percent(side[way].above[i][2])];
  const limits = pair.sides[0][pair.way === "decoder" ? "cosine" : "phi"].above.map(([limit]) => limit);
  const rows = [row("live latents", "only they are compared", (side) => `${count(side.live)} of ${count(side.sae.nLatents)}`)];
  if (pair.way === "decoder") {
    rows.push(row("MMCS", "mean of each latent's largest cosine with the other decoder", (side) => decimal(side.cosine.mean), (side) => decimal(side.cosine.chanceMean)));
    limits.forEach((limit, i) => rows.push(row(`share with a match above ${decimal(limit, 1)}`, "", ...share("cosine", i))));
  }
  if (pair.rows) {
    rows.push(row("mean best φ", `correlation of firing; latents with ${pair.minFirings} firings on the shared rows`, (side) => decimal(side.phi.mean), (side) => decimal(side.phi.chanceMean)));
    limits.forEach((limit, i) => rows.push(row(`share with φ above ${decimal(limit, 1)}`, "", ...share("phi", i))));
  }
  rows.push(row("mutual best matches", "each the other's best", (side) => `${count(side.mutual)} (${percent(side.mutual / side.live)})`));
  if (pair.way === "decoder" && pair.rows) rows.push(row("the same by both", "best by cosine is best by firing", (side) => `${count(side.agree)} (${percent(side.agree / side.live)})`));
  const same = sameNumber(pair);
  if (same > pair.sides[0].mutual / 20) rows.push(row("the same number in both", "of mutual best matches; SAEs of one seed start from the same random directions", (side) => `${count(same)} (${percent(same / side.mutual)})`));
  return h("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "Numbers of the comparison" }, h("table", { class: "pair-numbers" },
    h("thead", {}, h("tr", {}, h("th", { scope: "col" }, h("span", { class: "hidden" }, "number")), ["a", "b"].map((name, i) => h("th", { scope: "col", class: "num" }, sideMark(name), ` ${pair.sides[i].sae.name} → ${pair.sides[1 - i].sae.name}`)))),
    h("tbody", {}, rows)));
}

/** Mutual best matches with one id: many of them mean a common start, not that the same was found twice. @param {Pair} pair */
function sameNumber(pair) {
  const [a, b] = pair.sides;
  return a.match.reduce((n, other, id) => n + (other === id && b.match[id] === id), 0);
}

function plotFigure(title, note, svg, columns, rows) {
  return h("figure", { class: "plot-figure" }, h("figcaption", {}, h("h3", {}, title)), svg, h("p", { class: "note" }, note),
    h("details", { ontoggle: (event) => { // rows are made when asked for
      if (event.target.open && event.target.children.length === 1) event.target.append(dataTable(columns, rows(), `${title}, data`));
    } }, h("summary", {}, "as a table")));
}

/** Shares of both sides' latents by their best score; bars are a, the line is b, grey is chance. @param {Pair} pair */
function scoreFigure(pair, way, title, chance) {
  const [width, height, left, bottom, top] = [340, 170, 34, 30, 8];
  const { edges } = pair;
  const share = (side, name) => side[way][name].map((n) => n / Math.max(1, side[way].n));
  const [a, b] = pair.sides.map((side) => share(side, "histogram"));
  const grey = share(pair.sides[0], "chance");
  const most = Math.max(...a, ...b, 1e-9);
  const x = (value) => left + (width - left - 6) * value;
  const y = (value) => height - bottom - (height - bottom - top) * Math.min(1, value / most);
  const steps = (values) => values.map((v, i) => `${i ? "L" : "M"}${x(edges[i])} ${y(v)}H${x(edges[i + 1])}`).join("");
  const text = (tx, ty, anchor, value) => s("text", { x: tx, y: ty, "text-anchor": anchor }, value);
  const svg = s("svg", { class: "histogram pair-plot", viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `${title}: mean ${pair.sides.map((side) => `${decimal(side[way].mean)} from ${side.sae.name}`).join(", ")}; by chance ${decimal(pair.sides[0][way].chanceMean)}` },
    s("path", { class: "chance", d: `${steps(grey)}V${y(0)}H${x(0)}Z` }),
    a.map((v, i) => v > 0 && s("rect", { class: "bar", x: x(edges[i]) + 0.5, width: x(edges[i + 1]) - x(edges[i]) - 1, y: y(v), height: height - bottom - y(v) }, s("title", {}, `${decimal(edges[i], 3)} to ${decimal(edges[i + 1], 3)}: ${count(pair.sides[0][way].histogram[i])} of a, ${count(pair.sides[1][way].histogram[i])} of b`))),
    s("path", { class: "chance-line", d: steps(grey) }), s("path", { class: "b", d: steps(b) }),
    s("line", { x1: left, x2: width - 6, y1: height - bottom, y2: height - bottom }),
    [0, 0.25, 0.5, 0.75, 1].map((tick) => text(x(tick), height - bottom + 14, "middle", tick ? decimal(tick, 2).replace(/\.?0+$/, "") : "0")),
    text(left - 4, y(most) + 8, "end", percent(most).replace(/\.\d+ /, " ")), text(left - 4, y(0), "end", "0"),
    text((left + width) / 2, height - 2, "middle", way === "cosine" ? "cosine with the best match" : "correlation φ with the best match"));
  const legend = ["share of latents: ", sideMark("a"), " bars, ", sideMark("b"), ` line; grey: ${chance}, cut off at the top`];
  return plotFigure(title, legend, svg, ["best match", "latents of a", "latents of b", "chance, a", "chance, b"], () => a.map((_, i) => [
    `${decimal(edges[i], 3)} to ${decimal(edges[i + 1], 3)}`, count(pair.sides[0][way].histogram[i]), count(pair.sides[1][way].histogram[i]), decimal(pair.sides[0][way].chance[i]), decimal(pair.sides[1][way].chance[i])]));
}

/** Frequencies of mutual best matches, both logarithmic, binned by quarters of a decade. @param {Pair} pair */
function frequencyFigure(pair, [inA, inB]) {
  const [width, height, left, bottom] = [340, 240, 58, 34];
  const [{ match, sae: a }, { match: back, sae: b }] = pair.sides;
  const cells = new Map();
  let [low, n] = [0, 0];
  match.forEach((other, id) => {
    if (other === NO_MATCH || back[other] !== id || !(inA[id] > 0) || !(inB[other] > 0)) return;
    const [i, j] = [inA[id], inB[other]].map((value) => Math.floor(4 * Math.log10(value)));
    cells.set(`${i},${j}`, (cells.get(`${i},${j}`) || 0) + 1);
    low = Math.min(low, i, j);
    n++;
  });
  const most = Math.max(...cells.values(), 1);
  low = Math.min(low, -4);
  const x = (i) => left + ((width - left - 6) * (i - low)) / -low;
  const y = (j) => height - bottom - ((height - bottom - 6) * (j - low)) / -low;
  const parsed = [...cells].map(([key, value]) => [...key.split(",").map(Number), value]).sort((p, q) => p[0] - q[0] || p[1] - q[1]);
  const tickText = (tick) => `${Number((100 * 10 ** (tick / 4)).toPrecision(1))} %`;
  const ticks = Array.from({ length: Math.floor(-low / 4) + 1 }, (_, i) => -4 * i);
  const text = (tx, ty, anchor, value, more) => s("text", { x: tx, y: ty, "text-anchor": anchor, ...more }, value);
  const svg = s("svg", { class: "histogram pair-plot", viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `Firing frequency of ${count(n)} mutual best matches in both SAEs, both logarithmic; on the diagonal they are equal` },
    s("line", { class: "equal", x1: x(low), y1: y(low), x2: x(0), y2: y(0) }),
    parsed.map(([i, j, value]) => s("rect", { class: `step-${stepOf(Math.log1p(value), Math.log1p(most))}`, x: x(i), y: y(j + 1), width: x(i + 1) - x(i) - 0.7, height: y(j) - y(j + 1) - 0.7 }, s("title", {}, `${count(value)} pairs: a ${percent(10 ** (i / 4), 2)} to ${percent(10 ** ((i + 1) / 4), 2)}, b ${percent(10 ** (j / 4), 2)} to ${percent(10 ** ((j + 1) / 4), 2)}`))),
    s("line", { x1: left, x2: width - 6, y1: height - bottom, y2: height - bottom }), s("line", { x1: left, x2: left, y1: 6, y2: height - bottom }),
    ticks.map((tick) => [text(x(tick), height - bottom + 14, tick ? "middle" : "end", tickText(tick)), text(left - 4, y(tick) + (tick ? 4 : 9), "end", tickText(tick))]),
    text((left + width) / 2, height - 3, "middle", `fires in a, ${a.name}`), text(0, 0, "middle", `fires in b, ${b.name}`, { transform: `translate(10 ${(height - bottom) / 2}) rotate(-90)` }));
  return plotFigure("Frequency of mutual best matches", `${count(n)} pairs; darker cells hold more, up to ${count(most)}; on the line both fire equally often`, svg,
    ["log₁₀ frequency in a", "log₁₀ frequency in b", "pairs"], () => parsed.map(([i, j, value]) => [`${decimal(i / 4)} to ${decimal((i + 1) / 4)}`, `${decimal(j / 4)} to ${decimal((j + 1) / 4)}`, count(value)]));
}

/** @param {Pair} pair */
function pairTabs(pair, shown) {
  const [a, b] = pair.sides;
  const title = (name) => PAIR_LISTS[name].title.map((word) => (word.length === 1 ? sideMark(word) : word));
  const size = (name) => {
    const parts = (side) => count(side.classes.part);
    if (name === "split") return `${count(a.classes.parent)} → ${parts(b)}`;
    if (name === "merged") return `${parts(a)} → ${count(b.classes.parent)}`;
    const list = PAIR_LISTS[name];
    return count(pair.sides[list.of].classes[{ [ONE_TO_ONE]: "matched", [NEAR_MATCH]: "near", [ONLY_HERE]: "only" }[list.code]]);
  };
  const dead = pair.sides.map((side) => side.classes.dead);
  return h("section", { "aria-label": "What became of the latents" }, h("h2", {}, "What became of the latents"),
    h("nav", { class: "pair-tabs", "aria-label": "Classes" }, Object.keys(PAIR_LISTS).map((name) =>
      h("a", { href: pairAddress(a.sae, b.sae, name), "aria-current": name === shown && "true", "data-list": name }, h("b", {}, size(name)), h("span", {}, title(name))))),
    h("p", { class: "note" }, title(shown), `: ${PAIR_LISTS[shown].about(pair)}.`, dead.some(Boolean) ? ` Never fired, not compared: ${count(dead[0])} of a, ${count(dead[1])} of b.` : ""));
}

/** Rows of a list: the latents of both sides, their score and how often they fire. @param {Pair} pair */
function pairRows(pair, frequency, shown) {
  const { of, code } = PAIR_LISTS[shown];
  const mine = pair.sides[of];
  const other = pair.sides[1 - of];
  const parts = code === PARENT ? linkedTo(other) : null;
  const rows = [];
  mine.class.forEach((kind, id) => {
    if (kind !== code) return;
    const others = parts ? parts.get(id).toSorted((x, y) => other.score[y] - other.score[x]) : mine.match[id] === NO_MATCH ? [] : [mine.match[id]];
    const ids = of ? [others, [id]] : [[id], others];
    const [side, one] = parts ? [1 - of, others[0]] : [of, id];
    const mean = (i) => ids[i].reduce((sum, each) => sum + frequency[i][each], 0) / (ids[i].length || NaN);
    rows.push({ id, ids, scoreOf: parts ? (each) => other.score[each] : null, score: pair.sides[side].score[one], phi: phiOfMatch(pair, side, one), frequency: [mean(0), mean(1)] });
  });
  return rows;
}

/** The rows of one class, a hundred at a time. @param {Address} at @param {Pair} pair */
async function pairList(at, pair, frequency, shown) {
  const [a, b] = pair.sides.map((side) => side.sae);
  const { of } = PAIR_LISTS[shown];
  const rows = pairRows(pair, frequency, shown);
  const key = PAIR_SORTS[at.sort.replace(/^-/, "")];
  if (key) {
    const sign = at.sort[0] === "-" ? -1 : 1;
    rows.sort((p, q) => (Number.isNaN(key(p)) ? 1 : Number.isNaN(key(q)) ? -1 : sign * (key(p) - key(q)) || p.id - q.id));
  } else {
    const rank = new Uint32Array((of ? b : a).nLatents);
    (await column(of ? b : a, "order")).forEach((id, i) => (rank[id] = i));
    rows.sort((p, q) => rank[p.id] - rank[q.id]);
  }
  const pages = Math.max(1, Math.ceil(rows.length / PAIR_PAGE));
  const page = Math.max(1, Math.min(pages, Number(at.page) || 1));
  const link = (number, text) => (number < 1 || number > pages ? h("span", { "aria-disabled": "true" }, text) : h("a", { href: pairAddress(a, b, shown, { sort: at.sort, page: String(number) }) }, text));
  const head = (name, title, kind) => {
    const mine = at.sort.replace(/^-/, "") === name;
    const next = mine ? (at.sort[0] === "-" ? name : "") : `-${name}`;
    return h("th", { scope: "col", class: kind, "aria-sort": mine ? (at.sort[0] === "-" ? "descending" : "ascending") : "none" },
      h("a", { href: pairAddress(a, b, shown, { sort: next }), "data-sort": name }, title, mine ? (at.sort[0] === "-" ? " ↓" : " ↑") : ""));
  };
  if (!rows.length) return h("p", { class: "empty" }, "No latent is in this class.");
  return [
    h("p", { class: "note" }, at.sort ? ["sorted; ", h("a", { href: pairAddress(a, b, shown) }, "random order")] : `in random order, seed ${summary.seed}`),
    h("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "Latents of this class" }, h("table", { class: "pair-list" },
      h("thead", {}, h("tr", {}, h("th", { scope: "col" }, h("span", { class: "hidden" }, "contexts")),
        h("th", { scope: "col" }, sideMark("a"), ` ${a.name}`), h("th", { scope: "col" }, sideMark("b"), ` ${b.name}`),
        ["split", "merged"].includes(shown) && head("parts", "parts", "num"), head("score", pair.way === "decoder" ? "cosine" : "φ", "num"), pair.way === "decoder" && pair.rows > 0 && head("phi", "φ", "num"),
        head("a", "fires in a", "num wide"), head("b", "in b", "num wide"))),
      h("tbody", {}, rows.slice((page - 1) * PAIR_PAGE, page * PAIR_PAGE).map((row) => pairRow(at, pair, row, shown))))),
    pages > 1 && h("nav", { class: "pager pages", "aria-label": "Pages" }, link(page - 1, "◂ previous"), h("span", { class: "note" }, `page ${count(page)} of ${count(pages)}, ${count(rows.length)} rows`), link(page + 1, "next ▸")),
  ];
}

function pairRow(at, pair, row, shown) {
  const side = (i) => h("td", { class: "members" }, row.ids[i].map((id) => latentName(pair.sides[i].sae, id, row.scoreOf && row.ids[i].length > 1 ? decimal(row.scoreOf(id), 2) : "")));
  const several = ["split", "merged"].includes(shown);
  let detail = null;
  const toggle = h("button", { type: "button", class: "small", "aria-expanded": "false", title: "contexts of both sides", onclick: () => {
    const open = !detail?.isConnected;
    toggle.setAttribute("aria-expanded", String(open));
    toggle.textContent = open ? "▾" : "▸";
    if (!open) return detail.remove();
    detail ||= h("tr", { class: "beside-row" }, h("td", { colspan: line.children.length }, besides(at, pair, row)));
    return line.after(detail);
  } }, "▸");
  toggle.setAttribute("aria-label", `contexts of ${row.ids[0].join(", ") || "nothing"} and ${row.ids[1].join(", ") || "nothing"}`);
  const line = h("tr", { "data-id": row.id }, h("td", {}, toggle), side(0), side(1), several && h("td", { class: "num" }, Math.max(row.ids[0].length, row.ids[1].length)),
    h("td", { class: "num" }, decimal(row.score)), pair.way === "decoder" && pair.rows > 0 && h("td", { class: "num" }, decimal(row.phi)),
    h("td", { class: "num wide" }, percent(row.frequency[0])), h("td", { class: "num wide" }, percent(row.frequency[1])));
  return line;
}

/** A latent by its id and, as soon as that is loaded, its rule, or the token of its strongest firing. */
function latentName(sae, id, figure) {
  const rule = h("span", { class: "rule" });
  const name = ([label, , peak]) => (label || !peak.length ? ruleName(label) : h("span", { class: "muted" }, "no rule; peak ", h("code", {}, show(peak, 24))));
  labelShard(sae, Math.floor(id / summary.labelShard)).then((rows) => rule.append(...[name(rows[id % summary.labelShard])].flat(3)), () => {});
  return h("span", { class: "member" }, h("a", { href: address(sae, `latent/${id}`) }, id), figure && h("span", { class: "muted" }, ` ${figure}`), " ", rule);
}

/** Contexts of the latents of both sides, next to each other. @param {Address} at @param {Pair} pair */
function besides(at, pair, row) {
  const readout = h("p", { class: "note readout" }, "hover, tap or focus a token for its value");
  const columns = pair.sides.map(({ sae }, i) => h("div", {}, row.ids[i].slice(0, MOST_BESIDE).map((id) => {
    const holder = h("div", { class: "one-latent" }, h("h3", {}, sideMark("ab"[i]), " ", latentName(sae, id)));
    loadLatent(sae, id).then(({ latent, chunk }) => holder.append(...contextsOf({ ...contextState(at), sae }, latent, chunk, readout)), (error) => holder.append(problemText(error)));
    return holder;
  }), row.ids[i].length > MOST_BESIDE && h("p", { class: "note" }, `and ${row.ids[i].length - MOST_BESIDE} more`), !row.ids[i].length && h("p", { class: "note" }, "nothing")));
  return [h("div", { class: "beside" }, columns), readout];
}

/** A few of the strongest contexts and a few random firings. */
function contextsOf(state, latent, chunk, readout) {
  const few = Object.fromEntries(Object.entries(latent.groups).map(([name, found]) => [name, found.slice(0, CONTEXTS_BESIDE)]));
  const names = ["top", "random"].filter((name) => few[name]);
  return names.length ? names.map((name) => contextGroup(state, { ...latent, groups: few }, chunk, name, readout)) : [h("p", { class: "note" }, "no context stored")];
}
