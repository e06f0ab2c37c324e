// try view: stored passages and typed words; with a server, exact latents of any text and steering

const MAX_WORDS = 60;
const LONGEST_TOKEN = 40;
const PREFERRING = 8;
/** Latents shown of a token, and of a whole text. */
const LISTED = 8;

/** A number of the address, or null. @param {Address} at */
function wholeParam(at, name, limit) {
  const text = at.params.get(name) || "";
  return /^\d{1,9}$/.test(text) && Number(text) < limit ? Number(text) : null;
}

/** @param {Address} at */
async function tryView(at) {
  const { sae } = at;
  const info = await liveInfo();
  const live = info?.saes[sae.key];
  const state = { p: at.params.get("p"), latent: wholeParam(at, "latent", sae.nLatents) };
  const keep = (changes) => {
    Object.assign(state, changes);
    const hash = tryAddress(sae, state);
    history.replaceState(null, "", hash);
    visited.set(hash, at.entry);
  };
  const passages = sae.nPassages ? await passageSection(at, state, keep) : [
    h("h2", {}, "Held-out passages"), h("p", { class: "banner" }, sae.hasText ? "The statistics of this SAE hold no passages." : "Activations were given without text, so there are no passages."),
  ];
  return [
    h("h1", { tabindex: -1 }, "Try it"),
    live?.live ? [
      h("p", { class: "note" }, `Live: ${live.model} at `, h("code", {}, live.hook_point), ". Texts are computed on the machine that serves this page."),
      h("section", {}, liveSection(sae, live, state, keep)),
      live.generates ? h("section", { id: "steer" }, steerSection(sae, live, info.limits, state.latent)) : h("p", { class: "banner" }, `${live.model} does not predict the next token, so there is nothing to steer.`),
    ] : null,
    h("section", {}, passages),
    live?.live ? null : [
      h("section", {}, sae.hasText ? wordSection(sae) : null),
      h("p", { class: "note" }, live ? `No live part for this SAE: ${live.why}.` : [
        "The latents of any text, and steering, need the model: ", h("code", {}, "sae-pipeline serve"), " with this report's folder shows this page with it."]),
    ],
  ];
}

/** Passages with the 8 strongest latents of every token, as stored. @param {Address} at */
async function passageSection(at, state, keep) {
  const { sae } = at;
  const { passages } = await once(`data/${sae.key}/try`, loadJSON);
  const first = wholeParam(at, "p", passages.length) ?? 0;
  const place = h("div", {});
  let turn = 0;
  const open = async (number) => {
    const mine = ++turn;
    menu.value = String(number);
    const [, , file, index] = passages[number];
    try {
      const { tokens, passages: stored } = await once(`data/${sae.key}/try/${file}`, loadJSON);
      if (mine === turn) place.replaceChildren(reader(sae, storedText(tokens, stored[index], state, keep)));
    } catch (error) {
      if (mine === turn) place.replaceChildren(h("p", { class: "banner", role: "alert" }, problemText(error)));
    }
  };
  const choose = (number) => {
    keep({ p: number });
    return open(number);
  };
  const menu = h("select", { onchange: () => choose(Number(menu.value)) }, passages.map(([doc, seq, , , preview], i) => h("option", { value: i }, `${doc} · ${seq}: ${preview}`)));
  const step = (by, text, title) => h("button", { type: "button", title, "aria-label": title, onclick: () => choose((Number(menu.value) + by + passages.length) % passages.length) }, text);
  await open(first);
  return [
    h("h2", {}, "Held-out passages ", h("span", { class: "note" }, `${passages.length} stored contexts; exact activations of the 8 strongest latents of every token`)),
    h("div", { class: "choose" }, h("label", {}, h("span", { class: "hidden" }, "Passage"), menu), step(-1, "◂", "previous passage"), step(1, "▸", "next passage")),
    place,
  ];
}

/** A stored passage as a text for the reader. */
function storedText(dictionary, passage, state, keep) {
  const tokens = passage.tokens.map((index) => dictionary[index]);
  const width = passage.latents.length / tokens.length;
  const top = tokens.map((_, i) => passage.latents.slice(i * width, (i + 1) * width)
    .map((id, j) => [id, passage.values[i * width + j]]).filter(([id]) => id >= 0));
  return {
    tokens, top, latent: state.latent, onpaint: (latent) => keep({ latent }),
    values: async (id) => top.map((rows) => rows.find(([other]) => other === id)?.[1] || 0),
    note: `Where a latent is not among a token's ${width} strongest, its activation is not stored and nothing is painted.`,
  };
}

/** Typed words and the latents that prefer their tokens: looked up, not computed. */
function wordSection(sae) {
  const found = h("div", {});
  const input = h("textarea", { rows: 2, spellcheck: "false", maxlength: 2000, "aria-label": "Words to look up" });
  const button = h("button", { type: "submit" }, "Look up");
  const look = async (event) => {
    event.preventDefault();
    button.setAttribute("aria-busy", "true");
    try {
      found.replaceChildren(...(await lookUp(sae, input.value)));
    } catch (error) {
      found.replaceChildren(h("p", { class: "banner", role: "alert" }, problemText(error)));
    } finally {
      button.removeAttribute("aria-busy");
    }
  };
  return [
    h("h2", {}, "Words ", h("span", { class: "note" }, "the latents that prefer their tokens in the corpus")),
    h("form", { class: "ask", onsubmit: look, onkeydown: submitOnEnter }, input, button),
    found,
  ];
}

/** Ctrl or Cmd and Enter send a form from its text area. */
function submitOnEnter(event) {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) event.currentTarget.requestSubmit();
}

async function lookUp(sae, text) {
  if (sae.index.off) return [h("p", { class: "banner" }, `Tokens cannot be looked up: ${sae.index.off}.`)];
  const words = [...new Set(text.match(/\S+/g) || [])];
  if (!words.length) return [h("p", { class: "note" }, "Type some words.")];
  const pieces = (await Promise.all(words.slice(0, MAX_WORDS).map((word) => matchTokens(sae, word)))).flat();
  const [max, rows] = [await column(sae, "max"), await allLabels(sae)];
  const seen = new Set();
  const fresh = pieces.filter(({ text: piece }) => !seen.has(piece) && seen.add(piece));
  return [
    h("p", { class: "banner" }, "Token statistics, no model was run: the words are cut into tokens that latents of this SAE prefer, and context plays no part."),
    words.length > MAX_WORDS && h("p", { class: "note" }, `Only the first ${MAX_WORDS} of ${words.length} words.`),
    h("dl", { class: "words" }, fresh.map(({ text: piece, ids }) => h("div", {}, h("dt", {}, h("code", {}, piece)), h("dd", {}, ids.length ? preferring(sae, piece, ids, max, rows)
      : h("span", { class: "muted" }, "no latent prefers a token like this"))))),
  ].filter(Boolean);
}

/** A word as the longest tokens that some latent prefers. @returns {Promise<{text: string, ids: number[]}[]>} */
async function matchTokens(sae, word) {
  const found = [];
  for (let rest = word; rest;) {
    let size = Math.min(rest.length, LONGEST_TOKEN);
    let ids = [];
    for (; size > 0; size--) {
      ids = await preferringIds(sae, indexKey(rest.slice(0, size)));
      if (ids.length) break;
    }
    if (ids.length) found.push({ text: rest.slice(0, size), ids });
    else if (found.at(-1)?.ids.length === 0) found.at(-1).text += [...rest][0];
    else found.push({ text: [...rest][0], ids });
    rest = rest.slice(ids.length ? size : [...rest][0].length);
  }
  return found;
}

/** Latents that prefer a token of this key, with or without a space before it. */
async function preferringIds(sae, key) {
  if (!key) return [];
  const entries = await indexEntries(sae, "tokens", key, key);
  const ids = new Set();
  for (const entry of entries) {
    if (indexKey(entry[0]) !== key) continue;
    for (let i = 1, id = 0; i < entry.length; i++) ids.add((id += entry[i]));
  }
  return [...ids];
}

/** Those whose rule names the token come first, most precise ones before others. */
function preferring(sae, piece, ids, max, labels) {
  const score = (id) => {
    const label = labels[id][0];
    return label && label[0] === "token" && indexKey(flat(label[1])) === indexKey(piece) ? 1 + label[2] * label[3] : max[id] / 1e9;
  };
  const sorted = ids.toSorted((a, b) => score(b) - score(a));
  return [
    sorted.slice(0, PREFERRING).map((id) => h("span", { class: "found" }, h("a", { href: address(sae, `latent/${id}`) }, id), " ", h("span", { class: "rule" }, ruleName(labels[id][0])))),
    h("a", { class: "note", href: address(sae, "latents", { q: `token:${quoted(piece).slice(1, -1) === piece && !/[\s|"]/.test(piece) ? piece : quoted(piece)}` }) }, ids.length > PREFERRING ? `all ${count(ids.length)}` : "as a list"),
  ];
}

/** Any text, encoded by the server. */
function liveSection(sae, live, state, keep) {
  const input = h("textarea", { rows: 3, spellcheck: "false", "aria-label": "Text" });
  const button = h("button", { type: "submit" }, "Encode");
  const { line, run } = liveCall(button, "encoding…");
  const place = h("div", {});
  const encode = async (event) => {
    event.preventDefault();
    const text = input.value;
    const found = await run("latents", { text, sae: sae.key, top: LISTED });
    if (found) place.replaceChildren(reader(sae, liveText(sae, text, found, state, keep)));
  };
  return [
    h("h2", {}, "Your text ", h("span", { class: "note" }, `up to ${live.max_tokens} tokens`)),
    h("form", { class: "ask", onsubmit: encode, onkeydown: submitOnEnter }, input, button),
    line, place,
  ];
}

/** An answer of the API as a text for the reader. */
function liveText(sae, text, found, state, keep) {
  return {
    tokens: found.tokens.map((token) => [token.id, ...token.shown]),
    top: found.tokens.map((token) => token.top),
    seen: found.tokens.map((token) => token.seen),
    totals: found.latents.slice(0, LISTED),
    latent: state.latent,
    onpaint: (latent) => keep({ latent }),
    values: async (latent) => (await callLive("latent", { text, sae: sae.key, latent }, new AbortController().signal, () => {})).values,
    note: "Computed just now; exact for every latent.",
  };
}
