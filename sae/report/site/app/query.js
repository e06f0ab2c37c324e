// query: the grammar. What a query's parts mean is in search.js.

const NUMBERS = {
  __proto__: null,
  id: "id", freq: "frequency", frequency: "frequency", fires: "n_fired", n_fired: "n_fired", max: "max", mean: "mean",
  p: "precision", precision: "precision", r: "recall", recall: "recall", lift: "lift", share: "share",
};
const NUMBER_NAMES = "id, freq, fires, max, mean, p, r, lift, share";
/** Fires less often than this: rare. */
const RARE = 20;
const FLAGS = {
  __proto__: null,
  dead: ["n_fired", (v) => v === 0],
  live: ["n_fired", (v) => v > 0],
  rare: ["n_fired", (v) => v > 0 && v < RARE],
  dense: ["dense", (v) => v === 1],
  dup: ["duplicate", (v) => v === 1],
  rule: ["precision", (v) => !Number.isNaN(v)],
  judged: ["judged", (v) => v],
};
const COMPARE = {
  "<": (a, b) => a < b, ">": (a, b) => a > b, "<=": (a, b) => a <= b, ">=": (a, b) => a >= b, "=": (a, b) => a === b,
};
/** Fields by name: the texts of search.js, or a kind of the index. */
const FIELDS = { __proto__: null, label: "label", rule: "label", token: "tokens", logit: "logits", doc: "docs" };
const QUERY_PART = /\||-?(?:[a-z]+:)?"(?:[^"\\]|\\.)*"?|-?(?:[a-z]+:)?\/(?:[^/\\]|\\.)+\/i?|[^\s|]+/gi;

/**
 * Space is AND, `|` is OR, a leading `-` negates. Never throws: what is wrong is in `error`.
 *
 * A part is one of: `or`; `sort`; a `column` with a `test` of its value; a `field` with a `test` of its text; a `kind`
 * of the index with the `needle` to look up, `exact` where it was quoted; `near` or `split` with a latent.
 * @returns {Part[]}
 */
function parseQuery(text) {
  return [...text.matchAll(QUERY_PART)].map((match) => {
    const [word] = match;
    const at = { text: word, start: match.index, end: match.index + word.length };
    if (word === "|") return { ...at, or: true };
    const negate = word.length > 1 && word[0] === "-";
    return { ...at, negate, ...parsePart(negate ? word.slice(1) : word) };
  });
}

function parsePart(word) {
  const compared = /^([a-z_]+)(<=|>=|<|>|=)(.*)$/i.exec(word);
  if (compared) return parseNumber(compared[1].toLowerCase(), compared[2], compared[3]);
  if (/^\d+$/.test(word)) return { column: "id", test: (v) => v === Number(word) };
  const [, prefix, rest] = /^(?:([a-z]+):)?(.*)$/is.exec(word);
  const name = prefix?.toLowerCase();
  const regex = /^\/(.+)\/(i?)$/.exec(rest);
  if (regex && (!name || FIELDS[name] === "label")) {
    try {
      const pattern = new RegExp(regex[1], regex[2]);
      return { field: "label", test: (v) => pattern.test(v) };
    } catch {
      return { error: `${rest} is not a regular expression` };
    }
  }
  const exact = rest[0] === '"';
  const value = exact ? rest.replace(/^"|(?<!\\)"$/g, "").replace(/\\(.)/g, "$1") : rest;
  if (name === "is") return FLAGS[value] ? { column: FLAGS[value][0], test: FLAGS[value][1] } : { error: `is: takes ${Object.keys(FLAGS).join(", ")}` };
  if (name === "sort") return NUMBERS[value.replace(/^-/, "")] ? { sort: value.replace(/[a-z_]+/, (n) => NUMBERS[n]) } : { error: `sort: takes ${NUMBER_NAMES}, with - for the largest first` };
  if (["id", "near", "split"].includes(name)) {
    if (!/^\d+$/.test(value)) return { error: `${name}: takes the number of a latent` };
    return name === "id" ? { column: "id", test: (v) => v === Number(value) } : { [name]: Number(value) };
  }
  const field = FIELDS[name];
  if (field && !value) return { error: `${name}: takes a word, or a phrase in quotes` };
  if (field === "label") return { field, test: contains(value) };
  if (field) return { kind: field, needle: value, exact };
  if (name && /^[a-z]{2,}$/.test(name) && !exact && NUMBERS[name]) return { error: `${name} is a number: write ${name}>1` };
  const phrase = name ? word : value; // `http:` and `"a: b"` are texts
  return exact || !/^[\p{L}\p{N}_]+$/u.test(phrase) ? { field: "all", test: contains(phrase) } : { kind: "words", needle: phrase.toLowerCase() };
}

function contains(text) {
  const needle = text.toLowerCase();
  return (v) => v.includes(needle);
}

function parseNumber(name, sign, value) {
  const target = NUMBERS[name];
  if (!target) return { error: `no number is called ${name}; there are ${NUMBER_NAMES}` };
  const limit = /[^%]%$/.test(value) ? Number(value.slice(0, -1)) / 100 : value === "" ? NaN : Number(value);
  if (Number.isNaN(limit)) return { error: `${value || "nothing"} is not a number` };
  return { column: target, test: (v) => COMPARE[sign](v, limit) };
}

/** A query without one of its parts. @param {Part} part */
const without = (query, part) => `${query.slice(0, part.start)} ${query.slice(part.end)}`.replace(/\s+/g, " ").trim();
