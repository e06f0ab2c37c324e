// search: a query's parts -> the latents that match

const CACHED_RESULTS = 8;
const RECENT_RESULTS = [];
/** Shorter words are looked up as they are, not as the beginning of longer ones. */
const SHORTEST_PREFIX = 2;

/** A part of a query that this report cannot answer. */
class PartError extends Error {}

/** Lower-case texts by latent, from the labels: rule and model's words, token at the strongest firing, and all with their context. */
function searchTexts(sae) {
  return once(`texts:${sae.key}`, async () => {
    const rows = await allLabels(sae);
    const token = rows.map((row) => plain(row[2]).toLowerCase());
    const label = rows.map((row) => `${row[0] ? `${row[0][0]} ${plain(row[0][1])}` : ""}\n${plain(row[4] || [])}`.trim().toLowerCase());
    const all = rows.map((row, i) => `${label[i]}\n${plain(row[1])}${plain(row[2])}${plain(row[3])}`.toLowerCase());
    return { token, label, all };
  });
}

/** Entries of the index around a key: [term, first latent, differences…]; [term, -1] for terms of too many latents. */
async function indexEntries(sae, kind, from, to) {
  const edges = sae.index[kind];
  const first = Math.max(0, edges.filter((edge) => edge < from).length - 1);
  const last = Math.max(first, edges.filter((edge) => edge <= to).length - 1);
  const numbers = Array.from({ length: last - first + 1 }, (_, i) => first + i);
  const load = (shard) => once(`data/${sae.key}/index/${kind}/${shard}`, loadJSON);
  return edges.length ? (await Promise.all(numbers.map(load))).flat() : [];
}

/** As index.py orders terms. */
const indexKey = (term) => term.trim().toLowerCase();

/** The latents of some entries. @returns {Uint8Array} one flag per latent */
function latentsOf(sae, entries) {
  const found = new Uint8Array(sae.nLatents);
  for (const entry of entries) {
    for (let i = 1, id = 0; i < entry.length; i++) found[(id += entry[i])] = 1;
  }
  return found;
}

/** What a part says about a latent. @param {Part} part @returns {Promise<(id: number) => boolean>} */
async function testOf(sae, part) {
  if (part.column === "id") return part.test;
  if (part.column === "judged") {
    const judged = judgedLatents(sae);
    return (id) => judged.has(id);
  }
  if (part.column) {
    if (!sae.columns.includes(part.column)) throw new PartError(`this report has no ${part.column}`);
    const values = await column(sae, part.column);
    return (id) => part.test(values[id]);
  }
  if (part.near !== undefined) return nearTest(sae, part.near);
  if (part.split !== undefined) return splitTest(sae, part.split);
  if (part.kind) return indexTest(sae, part);
  const texts = (await searchTexts(sae))[part.field];
  return (id) => part.test(texts[id]);
}

async function nearTest(sae, id) {
  if (id >= sae.nLatents) throw new PartError(`there are latents 0 to ${sae.nLatents - 1}`);
  if (!isHere(sae, id)) throw new PartError(`latent ${id} is not in this file`);
  const near = new Set((await loadLatent(sae, id)).latent.neighbours.map(([other]) => other));
  return (other) => other === id || near.has(other);
}

async function splitTest(sae, id) {
  if (id >= sae.nLatents) throw new PartError(`there are latents 0 to ${sae.nLatents - 1}`);
  if (!comparedWith(sae).length) throw new PartError(inlined ? "this file has no splits" : "no splits were computed: they compare two SAEs of a report");
  const family = new Set(await splitIds(sae, id));
  return (other) => family.has(other);
}

/** @param {Part} part */
async function indexTest(sae, part) {
  const key = indexKey(part.needle);
  const texts = async (name) => {
    const values = (await searchTexts(sae))[name];
    const needle = part.needle.toLowerCase();
    return (id) => values[id].includes(needle);
  };
  if (sae.index.off) {
    if (part.kind === "words") return texts("all");
    if (part.kind === "tokens") return texts("token");
    throw new PartError(sae.index.off);
  }
  if (part.kind === "docs") {
    const entries = await indexEntries(sae, "docs", "", "\uffff");
    const flags = latentsOf(sae, entries.filter(([name]) => name.toLowerCase().includes(part.needle.toLowerCase())));
    return (id) => flags[id] === 1;
  }
  const begins = part.kind === "words" && key.length >= SHORTEST_PREFIX;
  const entries = await indexEntries(sae, part.kind, key, begins ? `${key}\uffff` : key);
  const matches = entries.filter(([term]) => (part.exact ? term === part.needle : begins ? term.startsWith(key) : indexKey(term) === key));
  if (matches.some((entry) => entry[1] < 0)) {
    part.note = "in the contexts of too many latents; searched in rules and top tokens";
    const [label, token] = [await texts("label"), await texts("token")];
    return (id) => label(id) || token(id);
  }
  const flags = latentsOf(sae, matches);
  return (id) => flags[id] === 1;
}

/**
 * Ids that match, in the order of `sort` (a column, `-` for descending; empty: the shuffled order of live latents);
 * `sort:` in the query comes before it.
 * @returns {Promise<{ids: Uint32Array, parts: Part[], sort: string}>}
 */
function results(sae, q, sort) {
  const key = `results:${sae.key}:${sort}:${q}${q.includes("is:judged") ? `:${judgedLatents(sae).size}` : ""}`;
  keepLast(RECENT_RESULTS, key, CACHED_RESULTS);
  return once(key, async () => {
    const parts = parseQuery(q);
    const tests = await Promise.all(parts.map((part) => (part.or || part.error || part.sort !== undefined ? null : testOf(sae, part).then(
      (test) => (part.negate ? (id) => !test(id) : test),
      (error) => {
        if (!(error instanceof PartError)) throw error;
        part.error = error.message;
        return null;
      }))));
    const wanted = parts.findLast((part) => part.sort !== undefined)?.sort ?? sort;
    const order = await sorted(sae, wanted);
    const groups = [[]];
    parts.forEach((part, i) => (part.or ? groups.push([]) : tests[i] && groups.at(-1).push(tests[i])));
    const filled = groups.length > 1 ? groups.filter((group) => group.length) : groups;
    const ids = q ? order.filter((id) => filled.some((group) => group.every((test) => test(id)))) : order;
    if (!ids.length) parts.forEach((part, i) => tests[i] && (part.keeps = order.filter(tests[i]).length));
    return { ids, parts, sort: wanted };
  });
}

/** All ids in order; not computed (NaN) comes last. @returns {Promise<Uint32Array>} */
function sorted(sae, sort) {
  const name = sort.replace(/^-/, "");
  if (name !== "id" && !sae.columns.includes(name)) return column(sae, "order");
  return once(`sorted:${sae.key}:${sort}`, async () => {
    const all = Uint32Array.from({ length: sae.nLatents }, (_, i) => i);
    const ids = sae.only ? Uint32Array.from(sae.only) : all.slice();
    const values = name === "id" ? all : await column(sae, name);
    const sign = sort[0] === "-" ? -1 : 1;
    return ids.sort((a, b) => {
      const x = values[a];
      const y = values[b];
      if (x === y) return a - b;
      if (x !== x) return y !== y ? a - b : 1;
      return y !== y ? -1 : sign * (x - y);
    });
  });
}
