// latent view

/** @param {Address} at */
async function latentView(at) {
  const { sae } = at;
  if (!isHere(sae, at.id)) return notInFile(at);
  const { latent, chunk } = await loadLatent(sae, at.id);
  const dead = latent.n[0] === 0;
  const readout = h("span", { class: "readout" }, dead ? "" : "hover, tap or focus a token for its value");
  return [
    h("div", { class: "title-row" },
      h("h1", { tabindex: -1 }, `Latent ${at.id}`),
      h("span", { class: "badge" }, dead ? "dead" : latent.dense ? "dense" : latent.n[0] < RARE ? "rare" : "live"),
      at.embed ? wholeReport(at) : latentTools(at)),
    h("p", { class: "label-row" }, labelText(sae, latent)),
    modelLabel(latent),
    banners(at, latent),
    h("div", { class: dead ? "latent silent" : "latent" },
      !dead && contextColumn(at, `latent/${at.id}`, latent, chunk, readout),
      h("aside", { "aria-label": "Statistics" }, statistics(at, latent, chunk, readout), splitsSection(sae, latent))),
  ];
}

/** A latent that was left out of a file of a few. @param {Address} at */
function notInFile(at) {
  return [h("h1", { tabindex: -1 }, `Latent ${at.id} is not in this file`),
    h("p", {}, `${holds(at.sae)}; this one is in the whole report, ${summary.report}. `, h("a", { href: address(at.sae, "latents") }, "The latents of this file"))];
}

/** What leads from here to other views. @param {Address} at */
function latentTools(at) {
  const pager = h("span", { class: "pager" });
  results(at.sae, at.q, at.sort).then(({ ids }) => pager.replaceChildren(...pagerLinks(at, ids)), () => {});
  return [copyButton("copy link", pageLink), steerLink(at),
    at.q || at.sort ? h("a", { class: "note", href: address(at.sae, "latents", at) }, "back to the list") : null, pager];
}

/** Which report an embedded latent is of, as a link to its page there. @param {Address} at */
function wholeReport(at) {
  return h("a", { class: "note whole", href: latentAddress(at.sae, at.id, contextState(at)) }, `${at.sae.name}, ${summary.title} ↗`);
}

/** All groups of contexts under their legend, drawn again when width or scale change. @param {Address} at */
function contextColumn(at, view, latent, chunk, readout) {
  const misleads = latent.dense && at.sae.hasText;
  const all = latent.n[0] < FEW ? ["random", "miss"] : misleads ? ["random", "top", "q3", "q2", "q1", "q0", "miss"] : Object.keys(GROUPS);
  const order = all.filter((name) => latent.groups[name]);
  const contexts = h("div", { class: "groups" });
  const paint = () => contexts.replaceChildren(...order.map((name) => contextGroup(at, latent, chunk, name, readout)));
  paint();
  return h("div", {}, legend(latent, readout, contextControls(at, view, latent, paint)), contexts);
}

function pagerLinks(at, ids) {
  const index = ids.indexOf(at.id);
  const link = (id, text, title, key) => (id === undefined ? h("span", { "aria-disabled": "true" }, text)
    : h("a", { href: latentAddress(at.sae, id, at), title, "data-key": key }, text));
  return [
    link(index >= 0 ? ids[index - 1] : ids[0], "◂", "previous in the current list ([)", "["),
    index >= 0 && h("span", { class: "note" }, `${count(index + 1)} of ${count(ids.length)}`),
    link(index >= 0 ? ids[index + 1] : ids[0], "▸", "next in the current list (])", "]"),
  ].filter(Boolean);
}

function labelText(sae, latent) {
  if (latent.label) {
    const [kind, name, precision, recall] = latent.label;
    return ["rule: ", `${kind} `, h("code", {}, show(name)), `, P ${decimal(precision, 2)} R ${decimal(recall, 2)}`];
  }
  if (!sae.hasText) return h("span", { class: "muted" }, "no rule: activations were given without text");
  return h("span", { class: "muted" }, latent.n[0] ? "no rule reached P .5" : "no rule: it never fired");
}

/** What a reader must know before looking at contexts. @param {Address} at @param {Latent} latent */
function banners(at, latent) {
  const { sae } = at;
  const unit = sae.hasText ? "tokens" : "rows";
  const banner = (...parts) => h("p", { class: "banner" }, parts);
  const [n] = latent.n;
  const twin = latent.neighbours.find(([id]) => id === latent.duplicate);
  return [
    n === 0 && banner(`Never fired in ${count(sae.nRows)} ${unit} (95 % upper bound of its frequency ${latent.interval[1].toExponential(1)}).`),
    latent.dense && sae.hasText && banner(`Dense: fires on ${percent(latent.frequency)} of all tokens. Strongest contexts mislead, so random firings come first.`),
    n > 0 && n < FEW && banner(`Fired on ${n} of ${count(sae.nRows)} ${unit}: every firing is below, and there are no quartiles.`),
    latent.duplicate != null && banner("Nearly a duplicate of ", h("a", { href: latentAddress(sae, latent.duplicate, contextState(at)) }, `latent ${latent.duplicate}`), twin ? `: their decoder rows have a cosine of ${decimal(twin[1])}.` : ": their decoder rows point the same way."),
  ];
}
