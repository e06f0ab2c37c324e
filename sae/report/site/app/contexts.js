// contexts: the tokens around a firing, coloured by the activation of one latent

const GROUPS = {
  top: "Strongest", q3: "75–100 %", q2: "50–75 %", q1: "25–50 %", q0: "0–25 %", random: "Random firings", miss: "Near misses",
};
const STEPS = 6;
/** Latents that fired less often get no quartiles; all their firings are among the random ones. */
const FEW = 5;
/** Widths of a context in tokens, beside all that is stored; a share of them lies before the peak. */
const WIDTHS = [16, 32];
const BEFORE_PEAK = 0.75;
/** On paper, where a latent fits on one page: contexts of a group, and tokens of a context. */
const PRINTED = { top: 8, q3: 3, q2: 3, q1: 3, q0: 3, random: 3, miss: 3 };
const PRINTED_TOKENS = WIDTHS[0];
const stepOf = (value, maximum) =>
  value > 0 && maximum > 0 ? Math.min(STEPS, Math.max(1, Math.ceil((STEPS * value) / maximum))) : 0;

/** Which tokens of a window are shown. @param {Context} context @param {string} width  of the address @returns {[number, number]} */
function visibleTokens(context, width) {
  const size = Number(width) || Infinity;
  const from = Math.max(0, context.peak - Math.floor(size * BEFORE_PEAK));
  return size === Infinity ? [0, context.tokens.length] : [from, Math.min(context.tokens.length, from + size)];
}

/** Scale and width of all contexts on the page, and what is known about the token pointed at. */
function legend(latent, readout, controls) {
  const ramp = Array.from({ length: STEPS }, (_, i) => h("i", { class: `a${i + 1}` }));
  return h("div", { class: "key" }, h("span", { class: "ramp" }, "0 ", ramp, ` ${decimal(latent.max)}`), controls, readout);
}

/** Buttons that change how contexts are drawn; `paint` draws them again. @param {Address} at */
function contextControls(at, view, latent, paint) {
  const change = (changes) => {
    restate(at, view, changes);
    paint();
    sync();
  };
  const longest = Math.max(0, ...Object.values(latent.groups).flat().map((context) => context.tokens.length));
  const sizes = [...WIDTHS.filter((size) => size < longest).map(String), ""];
  const scale = h("button", { type: "button", title: "colour by the share of the row's maximum, not the latent's", onclick: () => change({ scale: at.scale ? "" : "row" }) }, "scale each row");
  const widths = sizes.map((size) => h("button", { type: "button", "data-w": size, title: "tokens shown (w)", onclick: () => change({ w: size }) }, size || "all"));
  const sync = () => {
    scale.setAttribute("aria-pressed", String(Boolean(at.scale)));
    for (const one of widths) one.setAttribute("aria-pressed", String(one.dataset.w === (sizes.includes(at.w) ? at.w : "")));
  };
  sync();
  return [scale, sizes.length > 1 && h("span", { class: "widths", role: "group", "aria-label": "tokens shown" }, "width ", widths)];
}

/** One group of contexts with how many firings it stands for. @param {Address} at @param {Latent} latent */
function contextGroup(at, latent, chunk, name, readout) {
  const few = latent.n[0] < FEW && name === "random";
  const found = few ? latent.groups[name].toSorted((a, b) => b.value - a.value) : latent.groups[name];
  const left = found.length - PRINTED[name];
  const items = found.map((context) => contextItem(at.sae, latent, chunk, context, readout, at));
  for (const item of items.slice(PRINTED[name])) item.classList.add("off-paper");
  return h("section", { "data-group": name }, h("h2", {}, few ? "All firings" : [...groupTitle(latent, chunk, name), " "], h("span", { class: "note", title: name === "miss" ? at.sae.misses : at.sae.groups }, few ? "" : groupNote(latent, name, found.length))),
    h("ul", { class: "contexts" }, items), left > 0 && h("p", { class: "note on-paper" }, `${left} more in the report`));
}

function groupTitle(latent, chunk, name) {
  if (name !== "miss" || !latent.tokens.length) return [GROUPS[name]];
  return ["Near misses: ", h("code", {}, show(tokenSegments(chunk, latent.tokens[0][0]), 40)), ", silent"];
}

function groupNote(latent, name, n) {
  const [q25, q50, q75] = latent.quartiles;
  const range = { q3: [q75, latent.max], q2: [q50, q75], q1: [q25, q50], q0: [0, q25] }[name];
  if (range) return `${decimal(range[0])} to ${decimal(range[1])}: ${n} random of about ${count(Math.round(latent.n[0] / 4))} firings`;
  if (name === "miss") return `${n} random rows with its most frequent token on which it does not fire`;
  return name === "top" ? `${n} of ${count(latent.n[0])} firings, at most one per document` : `${n} of ${count(latent.n[0])}, uniformly drawn`;
}

/** @param {LatentChunk} chunk @returns {Segment[]} */
const tokenSegments = (chunk, index) => chunk.tokens[index].slice(1);

/** The bytes of a token. @param {LatentChunk} chunk @returns {Uint8Array} */
function tokenBytes(chunk, index) {
  const hex = chunk.bytes[index];
  if (hex === undefined) return new TextEncoder().encode(plain(tokenSegments(chunk, index)));
  return Uint8Array.from(hex.match(/../g) || [], (pair) => parseInt(pair, 16));
}

/** A text as it stands in the corpus: what is drawn as a chip is itself again. @param {LatentChunk} chunk */
function bytesText(chunk, indices) {
  const pieces = indices.map((index) => tokenBytes(chunk, index));
  const bytes = new Uint8Array(pieces.reduce((sum, piece) => sum + piece.length, 0));
  let at = 0;
  for (const piece of pieces) {
    bytes.set(piece, at);
    at += piece.length;
  }
  return new TextDecoder().decode(bytes);
}

const hexOf = (bytes) => Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join(" ");

/**
 * One context. Pointing at a token, or walking to it with the arrows, says in `readout` what is known about it and
 * sends it a `point` event with the activation; a click or Enter lists the latents that prefer the token.
 * @param {Latent} latent @param {LatentChunk} chunk @param {Context} context @param {{w?: string, scale?: string}} state
 */
function contextItem(sae, latent, chunk, context, readout, state = {}) {
  const [split, doc, seq, pos] = context.at;
  const [from, to] = visibleTokens(context, state.w);
  const [first, last] = visibleTokens(context, String(PRINTED_TOKENS));
  const values = new Map();
  for (let i = 0; i < context.firing.length; i += 2) values.set(context.firing[i], context.firing[i + 1]);
  const maximum = state.scale ? Math.max(...values.values()) : latent.max;
  const describe = (i) => {
    const index = context.tokens[i];
    const [id] = chunk.tokens[index];
    const value = values.get(i);
    const share = value ? ` (${percent(value / latent.max)} of max)` : "";
    const token = id >= 0 ? ` · token ${id} · bytes ${hexOf(tokenBytes(chunk, index).slice(0, 16))}` : "";
    return `${plain(tokenSegments(chunk, index))}  ${value ? value : "silent"}${share}${token} · position ${pos - context.peak + i} of context ${seq} · ${doc ? `${doc}, ${split}` : split}`;
  };
  const spans = new Map();
  for (let i = from; i < to; i++) {
    const step = stepOf(values.get(i), maximum);
    const kind = `t${step ? ` a${step}` : ""}${i === context.peak ? " peak" : ""}${i < first || i >= last ? " off-paper" : ""}`;
    // Other tokens are described when they are pointed at: a thousand descriptions take longer than a page may.
    spans.set(i, h("span", { class: kind, title: i === context.peak && describe(i), "data-i": i }, show(tokenSegments(chunk, context.tokens[i]))));
  }
  let on = -1;
  const point = (i) => {
    spans.get(on)?.classList.remove("on");
    on = i;
    readout.textContent = spans.get(i).title = describe(i);
    readout.dispatchEvent(new CustomEvent("point", { detail: values.get(i) || 0 }));
  };
  const over = (event) => {
    const span = event.target.closest("[data-i]");
    if (span) point(Number(span.dataset.i));
    return span;
  };
  const prefer = () => chunk.tokens[context.tokens[on]][0] >= 0 && goTo(tokenAddress(sae, tokenSegments(chunk, context.tokens[on])));
  const press = (event) => {
    const again = on; // a tap on a touch screen reads the token first
    if (!over(event) || String(getSelection())) return;
    if (event.pointerType !== "touch" || again === on) prefer();
  };
  const walk = (event) => {
    if (event.target !== line) return;
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (event.key === "Enter" && on >= 0) prefer();
    if (!by) return;
    event.preventDefault();
    point(Math.max(from, Math.min(to - 1, (on < 0 ? context.peak : on) + by)));
    spans.get(on).classList.add("on");
  };
  const cut = (here, onPaper) => (here || onPaper) && h("span", { class: here ? "muted" : "muted on-paper" }, "…");
  const does = context.value > 0 ? "fires on" : "is silent on";
  const line = h("p", {
    class: "context", tabindex: 0, onmouseover: over, onclick: press, onkeydown: walk,
    onfocus: () => point(on < 0 ? context.peak : on), onblur: () => spans.get(on)?.classList.remove("on"),
  }, h("span", { class: "hidden" }, `${does} ${plain(tokenSegments(chunk, context.tokens[context.peak]))}, ${decimal(context.value)}: `), cut(from > 0, first > 0), [...spans.values()], cut(to < context.tokens.length, last < context.tokens.length));
  const shown = context.tokens.slice(from, to);
  const withValues = () => shown.map((index, i) => bytesText(chunk, [index]) + (values.has(from + i) ? `‹${decimal(values.get(from + i))}›` : "")).join("");
  return h("li", { class: context.value > 0 ? "" : "miss" }, h("span", { class: "v" }, decimal(context.value)),
    line, h("div", { class: "where", title: `${doc}, ${split}, context ${seq}, position ${pos}` },
      h("span", {}, sae.hasText ? doc : `row ${seq}`), sae.hasText && h("span", {}, `${split === "heldout" ? "held-out · " : ""}${seq}:${pos}`),
      sae.hasText && h("span", { class: "copy" }, copyButton("copy", () => bytesText(chunk, shown)), copyButton("with values", withValues))));
}

/** A button that copies a text. @param {() => string} text */
function copyButton(label, text) {
  const button = h("button", { type: "button", class: "small", onclick: () => copyText(text()).then((done) => {
    button.textContent = done ? "copied" : "not allowed";
    setTimeout(() => (button.textContent = label), 1200);
  }) }, label);
  return button;
}

/** @returns {Promise<boolean>} whether the browser let it */
async function copyText(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    return false;
  }
}
