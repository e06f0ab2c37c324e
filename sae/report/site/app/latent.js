// latent view

const GROUPS = {
  top: "Strongest", q3: "75–100 %", q2: "50–75 %", q1: "25–50 %", q0: "0–25 %", random: "Random firings",
};
const STEPS = 6;
/** Latents that fired less often get no quartiles; all their firings are among the random ones. */
const FEW = 5;
const stepOf = (value, maximum) =>
  value > 0 && maximum > 0 ? Math.min(STEPS, Math.max(1, Math.ceil((STEPS * value) / maximum))) : 0;
let rowScale = false;

/** @param {Address} at */
async function latentView(at) {
  const { sae } = at;
  const { latent, chunk } = await loadLatent(sae, at.id);
  const dead = latent.n[0] === 0;
  const unit = sae.hasText ? "tokens" : "rows";
  const few = latent.n[0] < FEW;
  const misleads = latent.dense && sae.hasText;
  const order = few ? ["random"] : misleads ? ["random", "top", "q3", "q2", "q1", "q0"] : Object.keys(GROUPS);
  const readout = h("span", { class: "readout" }, dead ? "" : "hover, tap or focus a token for its value");
  const contexts = h("div", { class: "groups" });
  const paint = () => contexts.replaceChildren(...order.filter((name) => latent.groups[name])
    .map((name) => contextGroup(sae, latent, chunk, name, readout)));
  const scale = h("button", { type: "button", "aria-pressed": String(rowScale), onclick: () => {
    rowScale = !rowScale;
    scale.setAttribute("aria-pressed", String(rowScale));
    paint();
  } }, "scale each row");
  paint();
  const pager = h("span", { class: "pager" });
  results(sae, at.q, at.sort).then(({ ids }) => pager.replaceChildren(...pagerLinks(at, ids)), () => {});
  return [
    h("div", { class: "title-row" },
      h("h1", { tabindex: -1 }, `Latent ${at.id}`),
      at.q || at.sort ? h("a", { class: "note", href: address(sae, "latents", at) }, "back to the list") : null,
      pager),
    h("p", { class: "label-row" }, labelText(sae, latent)),
    dead && h("p", { class: "banner" }, `Never fired in ${count(sae.nRows)} ${unit} (95 % upper bound of its frequency ${latent.interval[1].toExponential(1)}).`),
    misleads && h("p", { class: "banner" }, `Dense: fires on ${percent(latent.frequency)} of all tokens. Strongest contexts mislead, so random firings come first.`),
    !dead && few && h("p", { class: "banner" }, `Fired on ${latent.n[0]} of ${count(sae.nRows)} ${unit}: every firing is below, and there are no quartiles.`),
    h("div", { class: dead ? "latent silent" : "latent" },
      !dead && h("div", {}, legend(latent, scale, readout), contexts),
      h("aside", { "aria-label": "Statistics" }, statistics(sae, latent))),
  ];
}

function pagerLinks(at, ids) {
  const index = ids.indexOf(at.id);
  const link = (id, text, title, key) => (id === undefined ? h("span", { "aria-disabled": "true" }, text)
    : h("a", { href: address(at.sae, `latent/${id}`, at), title, "data-key": key }, text));
  return [
    link(index >= 0 ? ids[index - 1] : ids[0], "◂", "previous in the current list ([)", "["),
    index >= 0 && h("span", { class: "note" }, `${count(index + 1)} of ${count(ids.length)}`),
    link(index >= 0 ? ids[index + 1] : ids[0], "▸", "next in the current list (])", "]"),
  ].filter(Boolean);
}

function labelText(sae, latent) {
  if (latent.label) {
    const [kind, name, share, of] = latent.label;
    return ["rule: ", `${kind} `, h("code", {}, show(name)), `, ${decimal(share)} ${of}`];
  }
  if (!sae.columns.includes("share")) return h("span", { class: "muted" }, "no rules were scored in this report");
  const tried = latent.rules.map((rule) => `${rule[0]} ${plain(rule[1])} ${decimal(rule[2])} ${rule[3]}`);
  return h("span", { class: "muted" }, tried.length ? `no rule passes; nearest: ${tried[0]}` : "no rule: too few held-out firings for a score");
}

function legend(latent, scale, readout) {
  const ramp = Array.from({ length: STEPS }, (_, i) => h("i", { class: `a${i + 1}` }));
  return h("div", { class: "key" }, h("span", { class: "ramp" }, "0 ", ramp, ` ${decimal(latent.max)}`), scale, readout);
}

function contextGroup(sae, latent, chunk, name, readout) {
  const few = latent.n[0] < FEW;
  const found = few ? latent.groups[name].toSorted((a, b) => b.value - a.value) : latent.groups[name];
  const [q25, q50, q75] = latent.quartiles;
  const range = { q3: [q75, latent.max], q2: [q50, q75], q1: [q25, q50], q0: [0, q25] }[name];
  const note = range
    ? `${decimal(range[0])} to ${decimal(range[1])}: ${found.length} random of about ${count(Math.round(latent.n[0] / 4))} firings`
    : few ? "" : name === "top" ? `${found.length} of ${count(latent.n[0])} firings, at most one per document` : `${found.length} of ${count(latent.n[0])}, uniformly drawn`;
  return h("section", {}, h("h2", {}, few ? "All firings" : `${GROUPS[name]} `, h("span", { class: "note" }, note)),
    h("ul", { class: "contexts" }, found.map((context) => contextItem(sae, latent, chunk, context, readout))));
}

/** @param {Latent} latent @param {LatentChunk} chunk @param {Context} context */
function contextItem(sae, latent, chunk, context, readout) {
  const [split, doc, seq, pos] = context.at;
  const values = new Map();
  for (let i = 0; i < context.firing.length; i += 2) values.set(context.firing[i], context.firing[i + 1]);
  const maximum = rowScale ? Math.max(...values.values()) : latent.max;
  const peakText = plain(chunk.tokens[context.tokens[context.peak]].slice(1));
  const where = doc ? `${doc}, ${split}` : split;
  const describe = (i) => {
    const [id, ...segments] = chunk.tokens[context.tokens[i]];
    const value = values.get(i);
    const share = value ? ` (${percent(value / latent.max)} of max)` : "";
    const token = id >= 0 ? ` · token ${id}` : "";
    return `${plain(segments)}  ${value ? value : "silent"}${share}${token} · position ${pos - context.peak + i} of context ${seq} · ${where}`;
  };
  const spans = context.tokens.map((index, i) => {
    const step = stepOf(values.get(i), maximum);
    const kind = `t${step ? ` a${step}` : ""}${i === context.peak ? " peak" : ""}`;
    return h("span", { class: kind, title: describe(i), "data-i": i }, show(chunk.tokens[index].slice(1)));
  });
  let on = -1;
  const point = (i) => {
    spans[on]?.classList.remove("on");
    on = i;
    readout.textContent = describe(i);
  };
  const over = (event) => {
    const span = event.target.closest("[data-i]");
    if (span) point(Number(span.dataset.i));
  };
  const walk = (event) => {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!by) return;
    event.preventDefault();
    point(Math.max(0, Math.min(spans.length - 1, (on < 0 ? context.peak : on) + by)));
    spans[on].classList.add("on");
  };
  const line = h("p", {
    class: "context", tabindex: 0, onmouseover: over, onclick: over, onkeydown: walk,
    onfocus: () => point(on < 0 ? context.peak : on), onblur: () => spans[on]?.classList.remove("on"),
  }, h("span", { class: "hidden" }, `fires on ${peakText}, ${decimal(context.value)}: `), spans);
  return h("li", {}, h("span", { class: "v" }, decimal(context.value)),
    line, h("p", { class: "where", title: `${doc}, ${split}, context ${seq}, position ${pos}` },
      h("span", {}, sae.hasText ? doc : `row ${seq}`), sae.hasText && h("span", {}, `${split === "heldout" ? "held-out · " : ""}${seq}:${pos}`)));
}

/** @param {Latent} latent */
function statistics(sae, latent) {
  const dead = latent.n[0] === 0;
  const pair = (name, value) => h("div", {}, h("dt", {}, name), h("dd", {}, value));
  const [low, high] = latent.interval;
  return [
    h("section", {}, h("h2", {}, "Firing"), h("dl", { class: "pairs" },
      pair("fires on", percent(latent.frequency)),
      !dead && pair("95 % interval", `${percent(low)} to ${percent(high)}`),
      pair("firings", `${count(latent.n[0])} of ${count(sae.nRows)}`),
      pair("training, held-out", `${count(latent.n[1])}, ${count(latent.n[2])}`),
      !dead && pair("mean, max", `${decimal(latent.mean)}, ${decimal(latent.max)}`),
      !dead && latent.quartiles[1] != null && pair("quartiles", latent.quartiles.map((q) => decimal(q)).join(", ")))),
    !dead && histogramSection(sae, latent),
    latent.rules.length ? h("section", {}, h("h2", {}, "Rules"), h("dl", { class: "pairs" }, latent.rules.map((rule) =>
      pair([`${rule[0]} `, h("code", {}, show(rule[1], 40))], `${decimal(rule[2])} ${rule[3]}${rule[4] ? "" : " (fails)"}`)))) : null,
    latent.up.length || latent.down.length ? h("section", {}, h("h2", {}, "Logits"), h("p", { class: "note" }, sae.logits),
      h("div", { class: "sides" }, effects(latent.up, "up"), effects(latent.down, "down")))
      : sae.hasText && h("section", {}, h("h2", {}, "Logits"), h("p", { class: "note" }, `n/a: ${sae.logits}`)),
    latent.neighbours.length ? h("section", {}, h("h2", {}, "Neighbours ", h("span", { class: "note" }, "decoder cosine")),
      h("p", { class: "tags" }, latent.neighbours.map(([id, cosine]) =>
        h("a", { href: address(sae, `latent/${id}`) }, `${id} `, h("span", {}, decimal(cosine, 2)))))) : null,
  ];
}

function effects(rows, side) {
  const most = Math.max(...rows.map((row) => Math.abs(row[1])), 1e-9);
  return h("ol", { class: `effects ${side}`, "aria-label": side === "up" ? "raised most" : "lowered most" }, rows.map(([id, value, segments]) =>
    h("li", { style: `--w:${((100 * Math.abs(value)) / most).toFixed(0)}%`, title: `token ${id}` },
      h("span", {}, show(segments, 24)), h("span", { class: "v" }, decimal(value, 2)))));
}

function histogramSection(sae, latent) {
  let log = false;
  const holder = h("div");
  const paint = () => holder.replaceChildren(histogram(sae.edges, latent, log));
  const toggle = h("button", { type: "button", "aria-pressed": "false", onclick: () => {
    log = !log;
    toggle.setAttribute("aria-pressed", String(log));
    paint();
  } }, "log counts");
  paint();
  return h("section", {}, h("h2", {}, "Firings by activation"), holder, h("p", { class: "note" }, `activation, logarithmic${latent.quartiles[1] == null ? "" : "; ticks: quartiles"}  `, toggle));
}

/** Bars of equal width on a logarithmic axis: the edges of the bins grow geometrically. */
function histogram(edges, latent, log) {
  const [width, height, left, bottom] = [340, 130, 40, 20];
  const counts = latent.histogram;
  const first = counts.findIndex((n) => n > 0);
  const last = counts.findLastIndex((n) => n > 0) + 1;
  const [low, high] = [Math.log(edges[first]), Math.log(edges[last])];
  const most = Math.max(...counts);
  const x = (value) => left + ((width - left - 6) * (Math.log(value) - low)) / (high - low);
  const y = (n) => height - bottom - (height - bottom - 14) * (log ? Math.log1p(n) / Math.log1p(most) : n / most);
  const bars = counts.slice(first, last).map((n, i) => {
    const [from, to] = [x(edges[first + i]), x(edges[first + i + 1])];
    return n > 0 && s("rect", { class: "bar", x: from, width: Math.max(1, to - from - 1), y: y(n), height: height - bottom - y(n) },
      s("title", {}, `${count(n)} firings, ${decimal(edges[first + i])} to ${decimal(edges[first + i + 1])}`));
  });
  const rug = latent.quartiles.map((q) => q > 0 && s("line", { class: "rug", x1: x(q), x2: x(q), y1: height - bottom + 1, y2: height - bottom + 7 },
    s("title", {}, `quartile ${decimal(q)}`)));
  const text = (tx, ty, anchor, value) => s("text", { x: tx, y: ty, "text-anchor": anchor }, value);
  return s("svg", { class: "histogram", viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `Histogram of ${count(latent.n[0])} firings by activation, up to ${decimal(latent.max)}` },
    s("line", { x1: left, x2: width - 6, y1: height - bottom, y2: height - bottom }), bars, rug,
    text(left, height - 4, "start", decimal(edges[first])), text((left + width) / 2, height - 4, "middle", decimal(Math.exp((low + high) / 2))),
    text(width - 6, height - 4, "end", decimal(edges[last])), text(left - 5, 20, "end", count(most)), text(left - 5, height - bottom, "end", "0"));
}
