// query

const NUMBERS = {
  freq: "frequency", frequency: "frequency", fires: "n_fired", n_fired: "n_fired",
  max: "max", mean: "mean", share: "share", p: "share", id: "id",
};
const FLAGS = {
  dead: ["n_fired", (v) => v === 0],
  live: ["n_fired", (v) => v > 0],
  dense: ["dense", (v) => v === 1],
  rule: ["rule", (v) => v === 1],
};
const COMPARE = {
  "<": (a, b) => a < b, ">": (a, b) => a > b, "<=": (a, b) => a <= b, ">=": (a, b) => a >= b, "=": (a, b) => a === b,
};

/**
 * Space is AND, `|` is OR, a leading `-` negates. Never throws: what is wrong is in `error`.
 * @returns {{text: string, negate?: boolean, or?: boolean, error?: string, column?: string, field?: string,
 *   test?: (value: any, id: number) => boolean}[]}
 */
function parseQuery(text) {
  const words = text.match(/\||-?(?:\w+:)?"[^"]*"?|-?\/(?:[^/\\]|\\.)+\/i?|[^\s|]+/g) || [];
  return words.map((word) => {
    if (word === "|") return { text: word, or: true };
    const negate = word.length > 1 && word[0] === "-";
    return { text: word, negate, ...parseTerm(negate ? word.slice(1) : word) };
  });
}

function parseTerm(word) {
  const compared = /^([a-z_]+)(<=|>=|<|>|=)(.*)$/i.exec(word);
  if (compared) {
    const [, name, sign, value] = compared;
    const target = NUMBERS[name.toLowerCase()];
    const limit = value === "" ? NaN : Number(value);
    if (!target) return { error: `no number is called ${name}; try freq, fires, max, mean, share, id` };
    if (Number.isNaN(limit)) return { error: `${value || "nothing"} is not a number` };
    return { column: target, test: (v) => COMPARE[sign](v, limit) };
  }
  if (/^\d+$/.test(word)) return { column: "id", test: (v) => v === Number(word) };
  const regex = /^\/(.+)\/(i?)$/.exec(word);
  if (regex) {
    try {
      const pattern = new RegExp(regex[1], regex[2]);
      return { field: "label", test: (v) => pattern.test(v) };
    } catch {
      return { error: "not a regular expression" };
    }
  }
  const [, name, rest] = /^(?:([a-z]+):)?(.*)$/is.exec(word);
  const value = rest.replace(/^"|"$/g, "").toLowerCase();
  if (name === "is") {
    const flag = FLAGS[value];
    return flag ? { column: flag[0], test: flag[1] } : { error: `is: takes ${Object.keys(FLAGS).join(", ")}` };
  }
  if (name === "id") {
    return /^\d+$/.test(value) ? { column: "id", test: (v) => v === Number(value) } : { error: "id: takes a number" };
  }
  const field = { label: "label", rule: "label", token: "token" }[name];
  const needle = field ? value : word.replace(/^"|"$/g, "").toLowerCase();
  return { field: field || "all", test: (v) => v.includes(needle) };
}

/**
 * Ids that match, in the order of `sort` (a column, `-` for descending; empty: the shuffled order of live latents).
 * @returns {Promise<{ids: Uint32Array, terms: any[]}>}
 */
function results(sae, q, sort) {
  const key = `results:${sae.key}:${sort}:${q}`;
  keepLast(recentResults, key, CACHED_RESULTS);
  return once(key, async () => {
    const terms = parseQuery(q);
    for (const term of terms) {
      if (term.column && term.column !== "id" && !sae.columns.includes(term.column)) {
        term.error = `this report has no ${term.column}`;
        term.column = undefined;
      }
    }
    const usable = terms.filter((term) => !term.error);
    const texts = usable.some((term) => term.field) ? await searchTexts(sae) : null;
    const tests = await Promise.all(usable.map(async (term) => {
      if (term.or) return null;
      const values = term.field ? texts[term.field] : term.column === "id" ? null : await column(sae, term.column);
      return (id) => Boolean(term.test(values ? values[id] : id)) !== Boolean(term.negate);
    }));
    const groups = tests.reduce((all, test) => (test ? all[all.length - 1].push(test) : all.push([]), all), [[]]);
    const filled = groups.length > 1 ? groups.filter((group) => group.length) : groups;
    const order = await sorted(sae, sort);
    const ids = order.filter((id) => filled.some((group) => group.every((test) => test(id))));
    if (!ids.length) usable.forEach((term, i) => (term.keeps = tests[i] ? order.filter(tests[i]).length : undefined));
    return { ids, terms };
  });
}

/** All ids in order; not computed (NaN) comes last. @returns {Promise<Uint32Array>} */
function sorted(sae, sort) {
  const name = sort.replace(/^-/, "");
  if (name !== "id" && !sae.columns.includes(name)) return column(sae, "order");
  return once(`sorted:${sae.key}:${sort}`, async () => {
    const ids = Uint32Array.from({ length: sae.nLatents }, (_, i) => i);
    const values = name === "id" ? ids.slice() : await column(sae, name);
    const sign = sort[0] === "-" ? -1 : 1;
    return ids.sort((a, b) => {
      const [x, y] = [values[a], values[b]];
      if (x === y) return a - b;
      if (Number.isNaN(x)) return Number.isNaN(y) ? a - b : 1;
      return Number.isNaN(y) ? -1 : sign * (x - y);
    });
  });
}
