// statistics of one latent, beside its contexts

const PEERS = 10;

/** @param {Address} at @param {Latent} latent @param {LatentChunk} chunk */
function statistics(at, latent, chunk, readout) {
  const { sae } = at;
  const dead = latent.n[0] === 0;
  const tokenName = (index) => h("a", { href: tokenAddress(sae, tokenSegments(chunk, index)), title: "latents that prefer this token" }, h("code", {}, show(tokenSegments(chunk, index), 24)));
  return [
    firingSection(sae, latent),
    !dead && histogramSection(sae, latent, readout),
    latent.rules.length ? section("Scored rules", "on held-out firings", h("dl", { class: "pairs" }, latent.rules.map((rule) =>
      pair([`${rule[0]} `, h("code", {}, show(rule[1], 40))], `${decimal(rule[2])} ${rule[3]}${rule[4] ? "" : " (fails)"}`)))) : null,
    logitSection(sae, latent),
    countedSection("Tokens", sae.association, latent.tokens, tokenName),
    countedSection("Previous tokens", sae.association, latent.previous, tokenName),
    countedSection("Syntax", sae.association, latent.syntax, (name) => show(name, 24)),
    latent.positions.length && !dead ? positionSection(sae, latent) : null,
    peerSection(at, "Fires together with", "share of its firings on which the other fires, and lift", latent.coactive.map(([id, lift, share, n]) =>
      ({ id, figures: [percent(share), `× ${decimal(lift)}`], title: `together on ${count(n)} sampled rows` }))),
    peerSection(at, "Neighbours", "decoder cosine", latent.neighbours.map(([id, cosine]) => ({ id, figures: [decimal(cosine, 2)] }))),
    latent.neurons.length ? section("Neurons", "dimensions of the hook point by cosine with the decoder row", h("p", { class: "tags" }, latent.neurons.map(([dimension, weight]) =>
      h("span", {}, `${dimension} `, h("b", {}, signed(weight)))))) : null,
  ];
}

const pair = (name, value) => h("div", {}, h("dt", {}, name), h("dd", {}, value));
const section = (title, note, ...body) => h("section", {}, h("h2", {}, `${title} `, h("span", { class: "note" }, note)), body);
const signed = (value) => `${value < 0 ? "−" : "+"}${decimal(Math.abs(value), 2)}`;

function firingSection(sae, latent) {
  const dead = latent.n[0] === 0;
  const [low, high] = latent.interval;
  return h("section", {}, h("h2", {}, "Firing"), h("dl", { class: "pairs" },
    pair("fires on", percent(latent.frequency)),
    !dead && pair("95 % interval", `${percent(low)} to ${percent(high)}`),
    pair("firings", `${count(latent.n[0])} of ${count(sae.nRows)}`),
    pair("training, held-out", `${count(latent.n[1])}, ${count(latent.n[2])}`),
    !dead && pair("mean, max", `${decimal(latent.mean)}, ${decimal(latent.max)}`),
    !dead && latent.quartiles[1] != null && pair("quartiles", latent.quartiles.map((q) => decimal(q)).join(", "))));
}

function logitSection(sae, latent) {
  if (!latent.up.length && !latent.down.length) return sae.hasText && section("Logits", `n/a: ${sae.logits}`);
  return h("section", {}, h("h2", {}, "Logits"), h("p", { class: "note" }, sae.logits),
    h("div", { class: "sides" }, effects(latent.up, "up"), effects(latent.down, "down")));
}

function effects(rows, side) {
  const most = Math.max(...rows.map((row) => Math.abs(row[1])), 1e-9);
  return h("ol", { class: `effects ${side}`, "aria-label": side === "up" ? "raised most" : "lowered most" }, rows.map(([id, value, segments]) =>
    h("li", { style: `--w:${((100 * Math.abs(value)) / most).toFixed(0)}%`, title: `token ${id}` },
      h("span", {}, show(segments, 24)), h("span", { class: "v" }, decimal(value, 2)))));
}

/** What goes with the firings: share of the firings, share of the thing, and how much more than by chance. */
function countedSection(title, note, rows, nameOf) {
  if (!rows.length) return null;
  const head = [["P", "precision: share of the latent's firings"], ["R", "recall: share of its rows on which the latent fires"], ["lift", "precision over its share among all rows"]];
  return h("section", { "data-counted": title.toLowerCase() }, h("h2", {}, title), h("table", { class: "counted", "aria-label": title, title: note },
    h("thead", {}, h("tr", {}, h("th", { scope: "col" }, h("span", { class: "hidden" }, title)), head.map(([name, what]) => h("th", { scope: "col", class: "num", title: what }, name)))),
    h("tbody", {}, rows.map(([name, n, precision, recall, lift]) => h("tr", { title: `${count(n)} firings` },
      h("th", { scope: "row" }, nameOf(name)), [precision, recall].map((v) => h("td", { class: "num" }, decimal(v, 2))), h("td", { class: "num" }, decimal(lift, 2)))))));
}

/** Share of the rows at each position on which the latent fires. */
function positionSection(sae, latent) {
  const [width, height, base] = [340, 72, 54];
  const edges = sae.positionEdges;
  const shares = latent.positions.map((n, i) => (sae.positionRows[i] ? n / sae.positionRows[i] : 0));
  const most = Math.max(...shares, 1e-12);
  const step = width / shares.length;
  const label = (i) => (edges[i + 1] - edges[i] > 1 ? `${edges[i]}–${edges[i + 1] - 1}` : `${edges[i]}`);
  return section("Positions", `share of tokens, up to ${percent(most)}`, s("svg", { class: "histogram", viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `Share of tokens on which it fires, by position in the context: ${shares.map((v, i) => `${label(i)}: ${percent(v)}`).join(", ")}` },
    s("line", { x1: 0, x2: width, y1: base, y2: base }),
    shares.map((share, i) => s("rect", { class: "bar", x: i * step + 1, width: step - 2, y: base - (base - 4) * (share / most), height: (base - 4) * (share / most) }, s("title", {}, `positions ${label(i)}: ${count(latent.positions[i])} firings, ${percent(share)}`))),
    shares.map((_, i) => s("text", { x: (i + 0.5) * step, y: height - 4, "text-anchor": "middle" }, label(i)))));
}

/** Other latents, each with its rule as soon as that is loaded. */
function peerSection(at, title, note, peers) {
  if (!peers.length) return null;
  return section(title, note, h("ol", { class: "peers" }, peers.slice(0, PEERS).map(({ id, figures, title: hint }) => {
    const rule = h("span", { class: "rule" });
    labelShard(at.sae, Math.floor(id / summary.labelShard)).then((rows) => rule.append(...[ruleName(rows[id % summary.labelShard][0])].flat()), () => {});
    return h("li", { title: hint }, h("a", { href: latentAddress(at.sae, id, contextState(at)) }, id), rule, figures.map((figure) => h("span", { class: "v" }, figure)));
  })));
}
