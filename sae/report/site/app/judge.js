// judge mode: how clear are random live latents, read without their labels

const VERDICTS = ["clear", "partly", "unclear"];
const JUDGE_FORMAT = 1;
const DRAWN = 30;
const storeKey = (sae) => `sae-judgements:${summary.report}:${sae.key}`;

/** Verdicts given in this browser on this report. @returns {Object<string, string>} by latent */
function readVerdicts(sae) {
  try {
    return JSON.parse(localStorage.getItem(storeKey(sae)) || "{}");
  } catch { // storage is off, or holds something else
    return {};
  }
}

/** @returns {boolean} whether the browser keeps it */
function saveVerdicts(sae, verdicts) {
  try {
    localStorage.setItem(storeKey(sae), JSON.stringify(verdicts));
    return true;
  } catch {
    return false;
  }
}

/** @returns {Set<number>} */
const judgedLatents = (sae) => new Set(Object.keys(readVerdicts(sae)).map(Number));

/** The same n of some ids for the same seed, in every browser (mulberry32; Fisher and Yates). */
function drawn(ids, n, seed) {
  const pool = ids.slice().sort();
  let state = seed >>> 0;
  const random = () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let t = Math.imul(state ^ (state >>> 15), state | 1);
    t ^= t + Math.imul(t ^ (t >>> 7), t | 61);
    return ((t ^ (t >>> 14)) >>> 0) / 4294967296;
  };
  const size = Math.min(n, pool.length);
  for (let i = 0; i < size; i++) {
    const j = i + Math.floor(random() * (pool.length - i));
    [pool[i], pool[j]] = [pool[j], pool[i]];
  }
  return pool.subarray(0, size);
}

/** 95 % interval of a share (Wilson 1927); for none, the one-sided upper bound. As numbers.py. */
function wilson(found, tried) {
  if (!tried) return [0, 1];
  if (!found) return [0, 1 - 0.05 ** (1 / tried)];
  const z = 1.959964;
  const p = found / tried;
  const centre = p + (z * z) / (2 * tried);
  const half = z * Math.sqrt((p * (1 - p)) / tried + (z * z) / (4 * tried * tried));
  const scale = 1 + (z * z) / tried;
  return [Math.max(0, (centre - half) / scale), Math.min(1, (centre + half) / scale)];
}

/** @param {Address} at */
async function judgeView(at) {
  const { sae } = at;
  const whole = (name, otherwise) => (/^\d{1,9}$/.test(at.params.get(name) || "") ? Number(at.params.get(name)) : otherwise);
  const [n, seed] = [Math.max(1, whole("n", DRAWN)), whole("seed", 0)];
  const ids = drawn(await liveLatents(sae), n, seed);
  const verdicts = readVerdicts(sae);
  const undecided = ids.findIndex((id) => !verdicts[id]);
  const i = Math.min(whole("i", undecided < 0 ? ids.length : undecided), ids.length);
  const to = (changes) => `${address(sae, "judge")}?${new URLSearchParams({ n, seed, ...changes })}`;
  const done = ids.filter((id) => verdicts[id]).length;
  return [
    h("div", { class: "title-row" }, h("h1", { tabindex: -1 }, "Judge latents"),
      h("span", { id: "judged", class: "num" }, `${done} of ${ids.length} judged`),
      h("progress", { max: ids.length, value: done, "aria-label": "judged" }),
      h("span", { class: "pager" },
        i > 0 ? h("a", { href: to({ i: i - 1 }), "data-key": "[", title: "previous ([)" }, "◂") : h("span", { "aria-disabled": "true" }, "◂"),
        i < ids.length ? h("a", { href: to({ i: i + 1 }), "data-key": "]", title: "next (])" }, "▸") : h("span", { "aria-disabled": "true" }, "▸"))),
    h("p", { class: "note" }, `${ids.length} random live latents of ${sae.name}, seed ${seed}. Do the contexts show one thing, and do the weak firings and the near misses fit it? Rule and statistics appear after the verdict. Verdicts stay in this browser until they are exported.`),
    h("div", { class: "latent" },
      i < ids.length ? await judgedContexts(at, ids[i], verdicts[ids[i]]) : h("p", {}, `That was the last of ${ids.length}.`),
      h("aside", { class: "judging" },
        i < ids.length && (await verdictSection(at, ids[i], i, ids.length, verdicts[ids[i]], to)),
        judgeResult(at, ids, verdicts, n, seed))),
  ];
}

/** The contexts of a latent; until there is a verdict, without what names it. @param {Address} at */
async function judgedContexts(at, id, verdict) {
  const { latent, chunk } = await loadLatent(at.sae, id);
  const readout = h("span", { class: "readout" }, "hover, tap or focus a token for its value");
  const groups = Object.keys(GROUPS).filter((name) => latent.groups[name] && !(latent.n[0] < FEW && name !== "random"));
  return h("div", {}, legend(latent, readout),
    h("div", { class: "groups" }, groups.map((name) => contextGroup(at, verdict ? latent : { ...latent, tokens: [] }, chunk, name, readout))));
}

/** @param {Address} at */
async function verdictSection(at, id, i, n, verdict, to) {
  const { latent } = await loadLatent(at.sae, id);
  const problem = h("p", { class: "note", role: "alert" });
  const say = (choice) => {
    const kept = saveVerdicts(at.sae, { ...readVerdicts(at.sae), [id]: choice });
    if (kept) replaceAddress(to({ i }), '.verdicts [data-key="]"]');
    else problem.textContent = "This browser keeps nothing for this page, so verdicts would be lost.";
  };
  return h("section", {}, h("h2", {}, `Latent ${i + 1} of ${n}`),
    h("div", { class: "verdicts" }, VERDICTS.map((choice, k) => h("button", { type: "button", "data-key": k + 1, title: `key ${k + 1}`, "aria-pressed": String(verdict === choice), onclick: () => say(choice) }, `${k + 1} ${choice}`)),
      verdict && h("a", { href: to({ i: i + 1 }), "data-key": "]" }, i + 1 < n ? "next ▸" : "result ▸")),
    problem,
    verdict && h("p", { id: "revealed" }, h("a", { href: latentAddress(at.sae, id, {}) }, `latent ${id}`), ", ", labelText(at.sae, latent), `; fires on ${percent(latent.frequency)}`));
}

/** Counts with intervals; export, import, another draw. @param {Address} at */
function judgeResult(at, ids, verdicts, n, seed) {
  const { sae } = at;
  const given = Array.from(ids).filter((id) => verdicts[id]);
  const told = h("span", { id: "imported", class: "note", role: "status" });
  const save = () => saveFile(`judgements-${sae.key}-${seed}.json`, JSON.stringify({
    format: JUDGE_FORMAT, report: summary.report, title: summary.title, sae: sae.key, units: "latents", n, seed,
    verdicts: given.map((latent) => ({ latent, verdict: verdicts[latent] })),
  }, null, 1) + "\n", "application/json");
  const load = async (event) => {
    const problem = importVerdicts(sae, await event.target.files[0].text().catch(() => ""));
    if (problem) told.textContent = problem;
    else route();
  };
  const rows = VERDICTS.map((verdict) => {
    const found = given.filter((id) => verdicts[id] === verdict).length;
    const [low, high] = wilson(found, given.length);
    return [verdict, String(found), given.length ? percent(found / given.length) : "n/a", given.length ? `${percent(low)} to ${percent(high)}` : ""];
  });
  const number = (name, value) => h("label", {}, `${name} `, h("input", { type: "number", name, min: name === "n" ? 1 : 0, value }));
  return h("section", { id: "judge-result" }, h("h2", {}, "So far"), dataTable(["verdict", "latents", "share", "95 % interval"], rows),
    h("div", { class: "verdicts" },
      h("button", { type: "button", onclick: save, disabled: !given.length }, "export"),
      h("label", { class: "file" }, "import ", h("input", { type: "file", accept: ".json,application/json", onchange: load })), told),
    h("form", { class: "verdicts", onsubmit: (event) => {
      event.preventDefault();
      location.hash = `${address(sae, "judge")}?${new URLSearchParams(new FormData(event.target))}`;
    } }, number("n", n), number("seed", seed), h("button", {}, "another draw")));
}

/** Add verdicts of a file to those of this browser. @returns {string} what is wrong with it, else nothing */
function importVerdicts(sae, text) {
  let file = null;
  try {
    file = JSON.parse(text);
  } catch {
    return "This is not JSON.";
  }
  if (file?.format !== JUDGE_FORMAT || !Array.isArray(file.verdicts)) return `This is no file of judgements, format ${JUDGE_FORMAT}.`;
  if (file.report !== summary.report || file.sae !== sae.key || file.units !== "latents") return `This file is about ${file.units} of ${file.sae} in ${file.report}; this is ${sae.key} in ${summary.report}.`;
  const usable = file.verdicts.every((one) => Number.isInteger(one?.latent) && one.latent >= 0 && one.latent < sae.nLatents && VERDICTS.includes(one.verdict));
  if (!usable) return `A verdict is one of ${VERDICTS.join(", ")} on a latent of this SAE.`;
  const added = Object.fromEntries(file.verdicts.map((one) => [one.latent, one.verdict]));
  return saveVerdicts(sae, { ...readVerdicts(sae), ...added }) ? "" : "This browser keeps nothing for this page.";
}
