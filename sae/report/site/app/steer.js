// steering: text generated with and without interventions on latents

const MODES = {
  clamp: "clamp to", scale: "scale by", ablate: "ablate",
};
/** Of a new clamp, in maxima of the latent; of a new scale, in its own activations. */
const STRENGTH = { clamp: 1, scale: 2, ablate: 0 };

/** @param {Object<string, number>} limits @param {?number} latent  to begin with */
function steerSection(sae, live, limits, latent) {
  const rows = [];
  const list = h("div", { class: "interventions" });
  const add = (id) => {
    const row = interventionRow(sae, live, id, () => {
      rows.splice(rows.indexOf(row), 1);
      row.element.remove();
      more.disabled = false;
      if (!rows.length) add(null);
      more.focus();
    });
    rows.push(row);
    list.append(row.element);
    more.disabled = rows.length >= limits.interventions;
    return row;
  };
  const more = h("button", { type: "button", onclick: () => add(null).element.querySelector("input").focus() }, "another latent");
  const field = (label, props) => h("label", {}, `${label} `, h("input", { type: "number", required: true, ...props }));
  const prompt = h("textarea", { rows: 2, spellcheck: "false", "aria-label": "Prompt" });
  const tokens = field("tokens", { name: "n", min: 1, max: Math.min(limits.new_tokens, live.max_tokens), value: 24, step: 1 });
  const temperature = field("temperature", { name: "t", min: 0, max: 10, value: 0, step: "any", title: "0: always the likeliest token" });
  const seed = field("seed", { name: "s", min: 0, max: Number.MAX_SAFE_INTEGER, value: 0, step: 1, title: "both texts draw with the same random numbers" });
  const button = h("button", { type: "submit", class: "strong" }, "Generate");
  const { line, run } = liveCall(button, "generating…");
  const place = h("div", { class: "outcome" });
  const number = (label) => Number($("input", label).value);
  const generate = async (event) => {
    event.preventDefault();
    const found = await run("generate", {
      prompt: prompt.value, sae: sae.key, n_tokens: number(tokens), temperature: number(temperature), seed: number(seed),
      interventions: rows.map((row) => row.read()),
    });
    if (found) place.replaceChildren(...outcome(found));
  };
  add(latent);
  return [
    h("h2", {}, "Steer ", h("span", { class: "note" }, "the same prompt with and without changed latents")),
    h("form", { class: "steer", onsubmit: generate, onkeydown: submitOnEnter },
      list, h("p", {}, more), prompt, h("div", { class: "settings" }, tokens, temperature, seed, button)),
    h("p", { class: "note formula" }, "x′ = x + Σ (f′ᵢ − fᵢ) W_dec[i] at every position of the hook point but special tokens: what the SAE does not reconstruct of x stays. Clamp sets f′ everywhere, also where the latent is silent; a scale acts only where it fires."),
    line, place,
  ];
}

/** One latent and what is done to it. */
function interventionRow(sae, live, id, remove) {
  let maximum = NaN;
  const latent = h("input", { type: "number", min: 0, max: live.n_latents - 1, step: 1, required: true, value: id, "aria-label": "latent" });
  const mode = h("select", { "aria-label": "what is done" }, Object.entries(MODES).map(([name, text]) => h("option", { value: name }, text)));
  const slider = h("input", { type: "range", min: -2, max: 6, step: 0.1, value: STRENGTH.clamp, "aria-label": "strength" });
  const times = h("input", { type: "number", step: "any", required: true, value: STRENGTH.clamp, "aria-label": "strength as a number" });
  const unit = h("span", { class: "note" });
  const rule = h("span", { class: "rule note" });
  const strength = h("span", { class: "strength" }, slider, times, unit);
  const value = () => Number(times.value) * (mode.value === "clamp" ? maximum : 1);
  const sync = () => {
    strength.hidden = mode.value === "ablate";
    slider.disabled = times.disabled = strength.hidden;
    unit.textContent = mode.value === "scale" ? "× its own activation" : Number.isFinite(maximum) ? `× its maximum ${decimal(maximum)} = ${decimal(value())}` : "× its maximum";
  };
  const describe = async () => {
    const chosen = Number(latent.value);
    maximum = NaN;
    rule.replaceChildren();
    if (latent.value !== "" && latent.checkValidity()) {
      const [max, name] = await Promise.all([column(sae, "max"), nameLatent(sae, chosen)]).catch(() => [[], []]);
      if (Number(latent.value) !== chosen) return;
      // A latent that never fired has no maximum: its clamp is in plain activation.
      maximum = max[chosen] > 0 ? max[chosen] : 1;
      rule.replaceChildren(h("a", { href: address(sae, `latent/${chosen}`) }, "page"), " ", ...name);
    }
    sync();
  };
  latent.addEventListener("input", describe);
  mode.addEventListener("change", () => {
    slider.value = times.value = STRENGTH[mode.value];
    sync();
  });
  slider.addEventListener("input", () => {
    times.value = slider.value;
    sync();
  });
  times.addEventListener("input", () => {
    slider.value = times.value;
    sync();
  });
  describe();
  const element = h("div", { class: "intervention", role: "group", "aria-label": "intervention" },
    h("label", {}, "latent ", latent), mode, strength, rule, h("button", { type: "button", title: "remove", "aria-label": "remove this intervention", onclick: remove }, "×"));
  return { element, read: () => ({ latent: Number(latent.value), mode: mode.value, ...(mode.value === "ablate" ? {} : { value: value() }) }) };
}

/** Both texts with what differs marked. */
function outcome(found) {
  const n = found.plain.tokens.length;
  const differing = found.steered.tokens.filter((token) => token.differs).length;
  const verdict = found.same
    ? `No difference: both texts are the same ${n} tokens. A token's probability changed by at most ${decimal(found.largest_change)}.`
    : `The texts differ from token ${found.first_difference + 1} on: ${differing} of ${found.steered.tokens.length} tokens. Largest change of a token's probability: ${decimal(found.largest_change)}.`;
  const readout = h("p", { class: "note readout" }, "hover, or focus a text and walk with ← →, for a token's probabilities");
  return [
    h("p", { class: "verdict", role: "status" }, verdict),
    h("div", { class: "two" }, sideOf("Original", found.prompt, found.plain, "steered", readout), sideOf("Steered", found.prompt, found.steered, "original", readout)),
    readout,
  ];
}

const STOPPED = { length: "", context: "the context is full", end: "the model ended the text" };

function sideOf(title, prompt, side, other, readout) {
  const tokens = [...prompt, ...side.tokens];
  const spans = tokens.map((token, i) => h("span", { class: `t${i < prompt.length ? " given" : ""}${token.differs ? " differs" : ""}`, "data-i": i }, show(token.shown)));
  const point = (i) => {
    const token = tokens[i];
    readout.replaceChildren(h("code", {}, show(token.shown, 40)), i < prompt.length ? " of the prompt"
      : ` probability ${decimal(token.probability)} here, ${decimal(token.other)} in the ${other} model after the same text`);
  };
  return h("section", {}, h("h3", {}, title, h("span", { class: "note" }, ` ${STOPPED[side.stopped]}`)),
    walkable(spans, { point, label: `${title}: ${side.tokens.length} tokens after the prompt`, start: prompt.length }));
}
