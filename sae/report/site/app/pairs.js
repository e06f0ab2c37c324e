// pairs of SAEs: which latent of one is which of another (matching.py says how it was found)

/**
 * One SAE of a pair: its numbers and, per latent, its match in the other and what it is.
 * @typedef {{sae: SAEInfo, live: number, classes: Object<string, number>, mutual: number, agree?: number, cosine?: Scores, phi?: Scores,
 *   match: Uint32Array, class: Uint8Array, linked: Uint8Array, score: Float32Array, fired?: Uint32Array, together?: Uint32Array}} PairSide
 * @typedef {{n: number, mean: ?number, chanceMean: ?number, above: [number, ?number, ?number][], histogram: number[], chance: number[]}} Scores
 * @typedef {{way: string, rows: number, minFirings: number, matchedAbove: number, nearAbove: number, contained: number, edges: number[],
 *   sameRecipe: boolean, sides: [PairSide, PairSide]}} Pair
 */

const NO_MATCH = 0xffffffff;
const DEAD_LATENT = 0, ONLY_HERE = 1, NEAR_MATCH = 2, ONE_TO_ONE = 3, PARENT = 4, PART = 5;
const WAYS = { decoder: "decoder cosine", firing: "correlation of firing" };

/** The SAEs of the report that this one is compared with. @param {SAEInfo} sae @returns {SAEInfo[]} */
const comparedWith = (sae) => summary.saes.filter((other) => other !== sae && summary.compare.pairs.some((pair) => pair.includes(sae.key) && pair.includes(other.key)));

/** A pair as seen from a, whichever way round it was written. @returns {Promise<Pair>} */
async function loadPair(a, b) {
  const forward = summary.compare.pairs.some(([x, y]) => x === a.key && y === b.key);
  const key = `data/compare/${forward ? `${a.key}--${b.key}` : `${b.key}--${a.key}`}`;
  const about = await once(key, loadJSON);
  const sides = await Promise.all([a, b].map(async (sae, i) => {
    const side = forward ? i : 1 - i;
    const names = ["match", "class", "linked", about.way === "decoder" ? "cosine" : "phi", ...(about.rows ? ["fired", "together"] : [])];
    const [match, kind, linked, score, fired, together] = await Promise.all(names.map((name) => once(`${key}/${side}-${name}`, loadColumn)));
    return { sae, ...about.sides[side], match, class: kind, linked, score, fired, together };
  }));
  return { ...about, sides };
}

/** For each latent of one side the latents of the other that are linked to it. @param {PairSide} other @returns {Map<number, number[]>} */
function linkedTo(other) {
  const found = new Map();
  other.match.forEach((id, part) => {
    if (!other.linked[part]) return;
    if (found.has(id)) found.get(id).push(part);
    else found.set(id, [part]);
  });
  return found;
}

/** Correlation of firing of a latent with its match on the shared rows. @param {Pair} pair */
function phiOfMatch(pair, side, id) {
  const mine = pair.sides[side];
  const match = mine.match[id];
  if (!mine.fired || match === NO_MATCH) return NaN;
  const [n, x, y] = [pair.rows, mine.fired[id], pair.sides[1 - side].fired[match]];
  return (n * mine.together[id] - x * y) / Math.sqrt(x * (n - x) * y * (n - y));
}

/** Latents of this SAE that are parts of the same latent of another SAE as `id`, with `id` itself. @returns {Promise<number[]>} */
async function splitIds(sae, id) {
  const found = new Set([id]);
  for (const other of comparedWith(sae)) {
    const { match, linked, class: kind } = (await loadPair(sae, other)).sides[0];
    if (kind[id] === PART) match.forEach((whole, part) => whole === match[id] && linked[part] && found.add(part));
  }
  return [...found];
}

/** What became of a latent in the other SAEs of the report; filled in when the comparisons are loaded. @param {Latent} latent */
function splitsSection(sae, latent) {
  const others = comparedWith(sae);
  if (!others.length) return null;
  return h("section", { class: "elsewhere" }, h("h2", {}, "In other SAEs ", h("span", { class: "note" }, "best match by decoder cosine, or by firing (φ)")), h("dl", {}, others.map((other) => {
    const what = h("dd", {}, "…");
    loadPair(sae, other).then((pair) => what.replaceChildren(...relation(pair, latent.id).flat(3)), (error) => (what.textContent = problemText(error)));
    return [h("dt", {}, h("a", { href: pairAddress(sae, other), title: "compare the two SAEs" }, other.name)), what];
  })));
}

/** @param {Pair} pair */
function relation(pair, id) {
  const [mine, other] = pair.sides;
  const link = (side, one, score) => [h("a", { href: address(side.sae, `latent/${one}`) }, one), Number.isFinite(score) ? ` (${decimal(score, 2)})` : ""];
  const listed = (side, ids, scoreOf) => ids.slice(0, 8).map((one, i) => [i ? ", " : "", link(side, one, scoreOf(one))]).concat(ids.length > 8 ? ` and ${ids.length - 8} more` : "");
  const match = mine.match[id];
  const score = mine.score[id];
  const phi = pair.way === "decoder" ? phiOfMatch(pair, 0, id) : NaN;
  const firing = Number.isFinite(phi) ? `, φ ${decimal(phi, 2)}` : "";
  switch (mine.class[id]) {
    case DEAD_LATENT: return ["not compared: it never fired"];
    case ONE_TO_ONE: return ["one-to-one with ", link(other, match, score), firing];
    case PARENT: return ["splits into ", listed(other, linkedTo(other).get(id), (one) => other.score[one])];
    case PART: {
      const siblings = linkedTo(mine).get(match).filter((one) => one !== id);
      return ["is part of ", link(other, match, score), ", with ", listed(mine, siblings, (one) => mine.score[one])];
    }
    case NEAR_MATCH: return ["nearest ", link(other, match, score), firing, ": no one-to-one match, no split"];
    default: return match === NO_MATCH ? ["has no counterpart"] : ["has no counterpart; nearest ", link(other, match, score)];
  }
}

const pairAddress = (a, b, shown = "", state = {}) => address(a, `compare/${a.key}/${b.key}${shown && `/${shown}`}`, state);
