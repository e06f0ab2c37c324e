// shell

/** Views by the first word of their address, beside the overview, which is in the page. @type {Object<string, (at: Address) => Promise<any[]>>} */
const VIEWS = {
  latents: listView,
  latent: latentView,
  judge: judgeView,
  toy: toyView,
  map: later((at) => mapView(at)),
  compare: later((at) => compareView(at)),
  try: later((at) => tryView(at)),
};

/** A view of the second script, which is loaded before it. */
function later(view) {
  return (at) => once(summary.later, loadAsset).then(() => view(at));
}

const HELP = [
  ["/", "search"], ["j k", "next, previous row of the list"], ["Enter", "open the row"], ["[ ]", "previous, next latent of the current list"],
  ["r", "a random live latent"], ["c", "copy the link"], ["1 2 3", "judge: clear, partly, unclear"], ["t", "theme"], ["w", "width of the contexts"], ["← →", "walk the tokens of a focused context"], ["Enter", "on such a token: the latents that prefer it"], ["Esc", "back to the list"],
];
const QUERIES = [
  ["self", "a word of the rule, the top token or a strongest context"], ['"is not"', "a phrase, in the strongest context"], ["/^token x/i", "a regular expression on the rule"],
  ["label:import", "in the rule"], ['token:None token:" is"', "latents that prefer the token; in quotes: exactly this one"], ["logit:None", "latents that raise the token most"], ["doc:parser", "in a strongest context's document"],
  ["freq>1e-4 max<20 p>.9 r>.5 fires>100", `numbers: ${NUMBER_NAMES}`], ["is:dead", `kinds: ${Object.keys(FLAGS).join(", ")}; rare: fires 1 to ${RARE - 1} times`],
  ["near:1043", "its nearest decoder rows"], ["id:17 or 17", "one latent"], ["sort:-freq", "largest first"], ["-is:dense  a | b", "not; or"],
];
let current = null;
let drawing = 0;
/** What is remembered of every visited address: scroll positions. @type {Map<string, {scroll?: number, page?: number}>} */
const visited = new Map();

const problemText = (error) => (error instanceof ChunkError
  ? `${error.file} ${error.problem}${inlined ? "" : ". Copy this file again from the report's folder; the rest of the page works"}.`
  : `This view failed: ${error.message}`);

async function route() {
  const turn = ++drawing;
  if (current) current.entry.page = scrollY;
  if (embedded() || location.hash.includes("embed")) dress();
  const at = parseAddress(location.hash);
  at.entry = visited.get(location.hash) || {};
  visited.set(location.hash, at.entry);
  list = null;
  let nodes = null;
  try {
    if (!at.known) nodes = notFound(at);
    else if (at.view !== "overview") nodes = await VIEWS[at.view](at);
  } catch (error) {
    nodes = [h("h1", { tabindex: -1 }, "Not readable"), h("p", { class: "banner", role: "alert" }, problemText(error))];
  }
  if (turn !== drawing) return;
  const same = current && current.view === at.view && at.view === "latents";
  const focused = focusedControl();
  current = at;
  $("#overview").hidden = nodes !== null;
  $("#view").replaceChildren(...(nodes || []).flat(3).filter(Boolean));
  for (const section of document.querySelectorAll("#overview .sae")) section.hidden = section.dataset.sae !== at.sae.key;
  for (const link of document.querySelectorAll("nav [data-view]")) {
    link.href = address(at.sae, link.dataset.view);
    const here = link.dataset.view === at.view || (at.view === "latent" && link.dataset.view === "latents");
    if (here) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  if ($("#sae-switch")) $("#sae-switch").value = at.sae.key;
  if (document.activeElement !== $("#query")) $("#query").value = at.q;
  const heading = $("#view h1") || $("#overview h1");
  document.title = at.view === "overview" ? summary.title : `${heading.textContent} · ${summary.title}`;
  at.restore?.();
  if (at.known && at.view === "overview") showRandom(at);
  if (same) {
    if (document.activeElement === document.body) ($(`#view ${focused}`) || heading).focus({ preventScroll: true });
    return;
  }
  scrollTo(0, at.entry.page || 0);
  if (turn > 1 && !at.embed) {
    if (document.activeElement !== $("#query")) heading.focus({ preventScroll: true });
    $("#announce").textContent = heading.textContent;
  }
}

/** What has the focus, as a selector of the same control when the view is drawn again. */
function focusedControl() {
  const { id, dataset } = document.activeElement;
  return id ? `#${CSS.escape(id)}` : dataset.sort ? `[data-sort="${CSS.escape(dataset.sort)}"]` : "h1";
}

function notFound(at) {
  const last = at.sae.nLatents - 1;
  const nearest = at.view === "latent" ? h("a", { href: address(at.sae, `latent/${Math.max(0, Math.min(last, at.id))}`) }, `latent ${Math.max(0, Math.min(last, at.id))}`)
    : h("a", { href: address(at.sae, "latents") }, "the list of latents");
  return [h("h1", { tabindex: -1 }, "Not in this report"),
    h("p", {}, `Nothing has the address ${location.hash}. `, at.view === "latent" ? `${at.sae.name} has latents 0 to ${count(last)}. ` : "", "Nearest: ", nearest, ".")];
}

/**
 * Before anything is drawn: an embedded latent without the header, in the theme that its address names, else in that of
 * the page around it; any other view in the theme that was chosen here last.
 */
function dress() {
  const root = document.documentElement;
  const embed = /^#\/?(?:s\/[^/?]*\/)?embed(?:[/?]|$)/.test(location.hash);
  root.toggleAttribute("data-embed", embed);
  let theme = embed ? new URLSearchParams(location.hash.split("?")[1]).get("theme") : null;
  try {
    if (!embed) theme = localStorage.getItem("sae-report-theme");
  } catch { /* storage is off */ }
  if (theme === "dark" || theme === "light") root.dataset.theme = theme;
  else delete root.dataset.theme;
}

function setTheme(next) {
  document.documentElement.dataset.theme = next;
  try {
    localStorage.setItem("sae-report-theme", next);
  } catch { /* storage is off: the choice lasts until the page is closed */ }
}

function switchTheme() {
  const dark = document.documentElement.dataset.theme
    ? document.documentElement.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  setTheme(dark ? "light" : "dark");
}

const LETTERS_OFF = "sae-report-letters-off";

/** Whether keys of one character do what the help says: who speaks to the computer, or types by accident, turns them off. */
function lettersOff() {
  try {
    return Boolean(localStorage.getItem(LETTERS_OFF));
  } catch {
    return false;
  }
}

function setLetters(on) {
  try {
    if (on) localStorage.removeItem(LETTERS_OFF);
    else localStorage.setItem(LETTERS_OFF, "1");
  } catch { /* storage is off: they stay on */ }
}

function showHelp() {
  const rows = (pairs) => h("dl", {}, pairs.map(([keys, text]) => [h("dt", {}, h("code", {}, keys)), h("dd", {}, text)]));
  const dialog = h("dialog", { "aria-label": "Help", onclose: () => dialog.remove() },
    h("h2", {}, "Keys"), rows(HELP),
    h("p", {}, h("label", {}, h("input", { type: "checkbox", id: "letters", checked: !lettersOff(), onchange: (event) => setLetters(event.target.checked) }), " keys of one character are on")),
    h("h2", {}, "Queries"), rows(QUERIES),
    h("form", { method: "dialog" }, h("button", {}, "Close")));
  document.body.append(dialog);
  dialog.showModal();
}

async function randomLatent() {
  const { sae } = current;
  const live = await liveLatents(sae);
  if (live.length) location.hash = latentAddress(sae, live[Math.floor(Math.random() * live.length)], contextState(current));
}

/** The next width of the contexts, by its button. */
function nextWidth() {
  const buttons = [...document.querySelectorAll(".widths button")];
  const pressed = buttons.findIndex((button) => button.getAttribute("aria-pressed") === "true");
  buttons[(pressed + 1) % buttons.length]?.click();
}

function search(text) {
  const { sae } = current;
  const kept = current.view === "latents" ? { sort: current.sort, cols: current.cols, page: current.page && "1" } : {};
  const stays = current.view === "map";
  const target = address(sae, stays ? "map" : "latents", { ...kept, q: text.trim() });
  if (target === location.hash) return;
  if (stays || current.view === "latents") replaceAddress(target);
  else if (text.trim()) location.hash = target;
}

/** Go to an address without a step to come back to; `focus`: what has the focus then. */
async function replaceAddress(target, focus = "") {
  history.replaceState(null, "", target);
  await route();
  if (focus) $(focus)?.focus();
}

function onKey(event) {
  const typing = event.target.closest("input, select, textarea, dialog");
  if (event.key === "Escape" && event.target === $("#query")) event.target.blur();
  if (typing || event.ctrlKey || event.metaKey || event.altKey || !current || current.embed) return;
  if (event.key.length === 1 && lettersOff()) return;
  const pager = $(`#view [data-key="${CSS.escape(event.key)}"]`);
  const actions = {
    "/": () => $("#query").select(),
    "?": showHelp,
    t: switchTheme,
    r: randomLatent,
    c: () => copyText(pageLink()).then((done) => ($("#announce").textContent = done ? "link copied" : "the browser does not let this page copy")),
    j: () => list?.move(1),
    k: () => list?.move(-1),
    w: nextWidth,
    Escape: () => current.view === "latent" && (location.hash = address(current.sae, "latents", current)),
  };
  if (pager) pager.click();
  else if (list && event.target.closest(".rows .row") && ["ArrowDown", "ArrowUp", "Enter"].includes(event.key)) {
    if (event.key === "Enter") list.open();
    else list.move(event.key === "ArrowDown" ? 1 : -1);
  } else if (actions[event.key]) actions[event.key]();
  else return;
  event.preventDefault();
}

function start() {
  summary = JSON.parse($("#summary").textContent);
  inlined = JSON.parse($("#inlined")?.textContent || "null");
  if (typeof DecompressionStream === "undefined") {
    document.documentElement.removeAttribute("data-embed");
    $("#main").prepend(h("p", { class: "banner" }, "This browser is too old for the latent views (they need DecompressionStream); the overview below is complete."));
    return;
  }
  for (const hidden of document.querySelectorAll(".top [hidden]")) hidden.hidden = false;
  let typing = 0;
  $("#query").addEventListener("input", (event) => {
    clearTimeout(typing);
    typing = setTimeout(search, 150, event.target.value);
  });
  $("#search").addEventListener("submit", (event) => {
    event.preventDefault();
    clearTimeout(typing);
    search($("#query").value);
    if (current.view === "latents") list?.move(0);
    else if (current.view !== "map" && $("#query").value.trim()) $("#query").blur(); // the heading of the results gets the focus
  });
  $("#theme").addEventListener("click", switchTheme);
  $("#help").addEventListener("click", showHelp);
  $("#sae-switch")?.addEventListener("change", (event) => {
    const sae = summary.saes.find((one) => one.key === event.target.value);
    location.hash = address(sae, current.view === "latent" ? "latents" : current.view, current);
  });
  for (const link of document.querySelectorAll(".skip, a[href='#lineage']")) {
    link.addEventListener("click", (event) => {
      event.preventDefault(); // the hash is the address of a view
      $(link.getAttribute("href")).focus();
    });
  }
  document.addEventListener("keydown", onKey);
  addEventListener("hashchange", route);
  watchPlots();
  new ResizeObserver(() => document.documentElement.style.setProperty("--top", `${narrow.matches ? 0 : $(".top").offsetHeight}px`)).observe($(".top")); // what sticks, sticks below it
  history.scrollRestoration = "manual";
  route();
}
