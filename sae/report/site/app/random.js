// the random latents of the overview, and more of them

/** What the page came with, by section. @type {Map<Element, Element[]>} */
const firstDrawn = new Map();

/**
 * Show the `draw`-th handful of the shuffled order in the overview of an SAE; 0 is what the page came with.
 * The next handful is a click away, and the number stands in the address.
 * @param {Address} at
 */
async function showRandom(at) {
  const section = $(`#overview [data-sae="${CSS.escape(at.sae.key)}"] section[aria-label="Random latents"]`);
  if (!section) return;
  if (at.sae.only) return; // of those drawn, a few are here
  const items = $("ul.random", section);
  if (!firstDrawn.has(section)) firstDrawn.set(section, [...items.children]);
  const first = firstDrawn.get(section);
  const draw = /^\d{1,6}$/.test(at.params.get("draw") || "") ? Number(at.params.get("draw")) : 0;
  if (!$(".another", section)) $("h2", section).append(" ", h("button", { type: "button", class: "small another" }));
  const next = $(".another", section);
  next.textContent = `another ${first.length}`;
  next.onclick = () => {
    const params = new URLSearchParams({ draw: draw + 1 });
    history.replaceState(null, "", `${address(at.sae, "overview")}?${params}`);
    visited.set(location.hash, at.entry);
    showRandom({ ...at, params });
  };
  try {
    items.replaceChildren(...(draw ? await randomItems(at.sae, draw, first.length) : first));
  } catch (error) {
    items.replaceChildren(h("li", { class: "banner", role: "alert" }, problemText(error)));
  }
}

async function randomItems(sae, draw, size) {
  const [live, frequency, maximum] = await Promise.all([liveLatents(sae), column(sae, "frequency"), column(sae, "max")]);
  const ids = Array.from({ length: Math.min(size, live.length) }, (_, i) => live[(draw * size + i) % live.length]);
  return Promise.all(ids.map(async (id) => {
    const row = (await labelShard(sae, Math.floor(id / summary.labelShard)))[id % summary.labelShard];
    return h("li", {}, h("div", { class: "head" }, h("a", { href: latentAddress(sae, id) }, id), h("span", { class: "rule" }, rowLabel(row)),
      h("span", { class: "facts" }, `fires ${percent(frequency[id])} · max ${decimal(maximum[id])}`)),
    h("p", { class: "context" }, show(row[1], 400), h("span", { class: "t a6 peak" }, show(row[2], 80)), show(row[3], 400)));
  }));
}
