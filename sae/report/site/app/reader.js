// reader: a text whose tokens can be walked, with the latents of one token beside it

/**
 * Tokens as one line that the pointer and the arrow keys walk.
 * @param {HTMLElement[]} spans  one per token, with data-i
 * @param {{point: (i: number) => void, press?: (i: number) => void, label: string, start?: number}} does
 */
function walkable(spans, { point, press = () => {}, label, start = 0 }) {
  let on = -1;
  const go = (i) => {
    spans[on]?.classList.remove("on");
    on = i;
    point(i);
  };
  const under = (event) => Number(event.target.closest("[data-i]")?.dataset.i ?? -1);
  const keys = { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity };
  const onkeydown = (event) => {
    if (event.target !== line) return;
    if (event.key === "Enter" && on >= 0) press(on);
    const by = keys[event.key];
    if (by === undefined) return;
    event.preventDefault();
    go(Math.max(0, Math.min(spans.length - 1, (on < 0 ? start : on) + by)));
    spans[on].classList.add("on");
    spans[on].scrollIntoView({ block: "nearest" });
  };
  const line = h("p", {
    class: "context reading", tabindex: 0, role: "group", "aria-label": label, onkeydown,
    onmouseover: (event) => under(event) >= 0 && go(under(event)),
    onclick: (event) => under(event) >= 0 && !String(getSelection()) && (go(under(event)), press(on)),
    onfocus: () => { go(on < 0 ? start : on); spans[on]?.classList.add("on"); },
    onblur: () => spans[on]?.classList.remove("on"),
  }, spans);
  return line;
}

/** What a latent is called: its rule or a model's words, else the token of its strongest firing. */
async function nameLatent(sae, id) {
  const row = (await labelShard(sae, Math.floor(id / summary.labelShard)))[id % summary.labelShard];
  return row[0] || row[4] || !row[2].length ? [rowLabel(row)].flat() : ["strongest on ", h("code", {}, show(row[2], 24))];
}

/**
 * A text painted by one latent, and the strongest latents of the token pointed at.
 * @param {{tokens: any[][], top: [number, number][][], seen?: boolean[], values: (id: number) => Promise<number[]>,
 *   note: string, totals?: any[], latent?: number, onpaint?: (id: ?number) => void}} text  tokens: [id, ...segments]
 */
function reader(sae, text) {
  let painted = null;
  let pinned = -1;
  let asked = 0;
  const key = h("div", { class: "key" });
  const panel = h("section", { class: "on-token" });
  const said = h("p", { class: "hidden", role: "status" });
  const spans = text.tokens.map(([, ...segments], i) => h("span", { class: "t", "data-i": i }, show(segments)));
  const readable = Math.max(0, text.top.findIndex((rows) => rows.length));

  const paint = async (id) => {
    const turn = ++asked;
    painted = id;
    let values = [];
    let maximum = NaN;
    try {
      if (id !== null) [values, maximum] = [await text.values(id), (await column(sae, "max"))[id]];
    } catch (error) {
      if (turn === asked) key.replaceChildren(h("span", { class: "state failed", role: "alert" }, problemText(error)));
      return;
    }
    if (turn !== asked) return;
    spans.forEach((span, i) => {
      const step = stepOf(values[i], maximum);
      span.className = `t${step ? ` a${step}` : ""}${i === pinned ? " pinned" : ""}`;
      span.title = id === null ? "" : `${plain(text.tokens[i].slice(1))}  latent ${id}: ${values[i] ? decimal(values[i]) : "silent"}`;
    });
    const fires = values.filter((value) => value > 0).length;
    key.replaceChildren(...(id === null ? [h("span", { class: "muted" }, "Choose a latent to paint the text with it.")] : [
      h("span", { class: "ramp" }, h("a", { href: address(sae, `latent/${id}`) }, `latent ${id}`), " 0 ", Array.from({ length: STEPS }, (_, i) => h("i", { class: `a${i + 1}` })), ` ${decimal(maximum)}`),
      h("button", { type: "button", onclick: () => paint(null) }, "clear"),
      h("span", { class: "readout" }, `fires on ${fires} of ${spans.length} tokens`)]));
    for (const button of root.querySelectorAll("[data-latent]")) button.setAttribute("aria-pressed", String(Number(button.dataset.latent) === id));
    text.onpaint?.(id);
  };

  const listed = (rows, most) => h("ol", { class: "firing" }, rows.map(([id, value, note]) => {
    const label = h("span", { class: "rule" });
    nameLatent(sae, id).then((nodes) => label.append(...nodes), () => {});
    return h("li", { style: `--w:${((100 * value) / most).toFixed(0)}%` },
      h("button", { type: "button", "data-latent": id, "aria-pressed": String(id === painted), title: "paint the text with this latent", onclick: () => paint(painted === id ? null : id) }, h("b", {}, id), h("span", { class: "v" }, decimal(value))),
      label, note && h("span", { class: "note" }, note), h("a", { href: address(sae, `latent/${id}`), title: `page of latent ${id}`, "aria-label": `page of latent ${id}` }, "›"));
  }));

  const tell = (i) => {
    const name = text.tokens[i].slice(1);
    const rows = text.top[i];
    panel.replaceChildren(h("h2", {}, "On ", h("code", {}, show(name, 40)), h("span", { class: "note" }, ` position ${i}${i === pinned ? ", pinned" : ""}`)), rows.length ? listed(rows, rows[0][1])
      : h("p", { class: "note" }, text.seen && !text.seen[i] ? "The SAE was not trained on the activations of this token, so nothing is shown." : "No latent is stored for this token."));
    said.textContent = `${plain(name)}: ${rows.slice(0, 3).map(([id, value]) => `latent ${id} ${decimal(value)}`).join(", ") || "no latent"}`;
  };
  const point = (i) => pinned < 0 && tell(i);
  const press = (i) => {
    spans[pinned]?.classList.remove("pinned");
    pinned = pinned === i ? -1 : i;
    spans[pinned]?.classList.add("pinned");
    tell(i);
  };
  const line = walkable(spans, { point, press, label: `Text of ${spans.length} tokens; arrow keys walk them, Enter pins one`, start: readable });
  const root = h("div", { class: "reader" }, h("div", {}, key, line, h("p", { class: "note" }, "Hover a token, or focus the text and walk with ← →; click or Enter pins it. ", text.note), said,
    text.totals?.length ? h("section", {}, h("h2", {}, "On the whole text ", h("span", { class: "note" }, "activations summed over its tokens")),
      listed(text.totals.map((one) => [one.latent, one.total, `${one.n_tokens} tokens`]), text.totals[0].total)) : null),
  h("aside", { "aria-label": "Latents of a token" }, panel));
  if (spans.length) point(readable);
  paint(text.latent ?? null);
  return root;
}
