// a model's words about a latent, marked as such wherever they stand

/** Explanation and scores of the latent page; null where no model was asked. @param {Latent} latent */
function modelLabel(latent) {
  if (!latent.model) return null;
  const [model, words, problem, detection, fuzzing] = latent.model;
  const who = h("span", { class: "badge", title: `the words of the model ${model}, made from the strongest contexts and some of every quarter` }, `model ${model}`);
  if (!words) return h("p", { class: "label-row muted", "data-model": "" }, who, ` gave no explanation: ${problem}`);
  return h("p", { class: "label-row", "data-model": "" }, who, " ", h("q", {}, show(words, 300)),
    modelScore("detection", detection, "told from its words, on contexts that it was not shown, whether the latent fires"),
    modelScore("fuzzing", fuzzing, "told from its words whether the tokens that are marked are those on which it fires"),
    problem && h("span", { class: "muted" }, ` not all was scored: ${problem}`));
}

function modelScore(name, score, what) {
  if (!score) return h("span", { class: "muted" }, `, ${name} n/a`);
  const [value, low, high, n] = score;
  const title = `${what}: balanced accuracy of ${n} answers with its 95 % interval; .5 is chance`;
  return h("span", { title }, `, ${name} ${decimal(value, 2)} [${decimal(low, 2)}, ${decimal(high, 2)}]`);
}

/** What the list says of a latent: its rule, else the model's words. @param {any[]} row of a label shard */
function rowLabel(row) {
  return row[0] || !row[4] ? ruleName(row[0]) : [h("span", { class: "muted" }, "model: "), show(row[4], 80)];
}
