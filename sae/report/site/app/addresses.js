// addresses

/**
 * What an address says beside the view: query, order, columns and page of the list; width and scale of contexts; the
 * theme of an embedded latent.
 */
const STATE = ["q", "sort", "cols", "page", "w", "scale", "theme"];

/** @returns {Address} */
function parseAddress(hash) {
  const [path, search = ""] = hash.replace(/^#\/?/, "").split("?");
  const params = new URLSearchParams(search);
  let parts = path.split("/").filter(Boolean);
  let sae = summary.saes[0];
  let known = true;
  if (parts[0] === "s") {
    sae = summary.saes.find((one) => one.key === parts[1]);
    known = Boolean(sae);
    sae = sae || summary.saes[0];
    parts = parts.slice(2);
  }
  const embed = parts[0] === "embed";
  if (embed) parts = parts.slice(1);
  const view = parts[0] || "overview";
  const id = view === "latent" && /^\d+$/.test(parts[1] || "") ? Number(parts[1]) : -1;
  known = known && (embed ? view === "latent" : view === "overview" || summary.views.includes(view));
  known = known && (view !== "latent" || (id >= 0 && id < sae.nLatents));
  const state = Object.fromEntries(STATE.map((name) => [name, params.get(name) || ""]));
  return { view, sae, id, embed, rest: parts.slice(1), params, ...state, known };
}

/** @param {Object<string, string>} state  what to keep, by the names of STATE; an Address will do */
function address(sae, view, state = {}) {
  const params = new URLSearchParams();
  for (const name of STATE) if (state[name]) params.set(name, state[name]);
  const base = summary.saes.length > 1 || view !== "overview" ? `#/s/${sae.key}` : "#/";
  return base + (view === "overview" ? "" : `/${view}`) + (params.size ? `?${params}` : "");
}

const latentAddress = (sae, id, state) => address(sae, `latent/${id}`, state);

/** How contexts are drawn, without the list they were reached from. */
const contextState = (at) => ({ w: at.w, scale: at.scale });

/** @param {{latent?: ?number, p?: number}} state */
function tryAddress(sae, state) {
  const params = new URLSearchParams();
  for (const [name, value] of Object.entries(state)) if (value != null && value !== "") params.set(name, value);
  return address(sae, "try") + (params.size ? `?${params}` : "");
}

/** The latents that prefer a token, as a list. @param {Segment[]} segments */
const tokenAddress = (sae, segments) => address(sae, "latents", { q: `token:${quoted(flat(segments))}` });

const quoted = (text) => `"${text.replace(/["\\]/g, "\\$&")}"`;

/** Go to another view; from an embedded latent, in a tab of its own. */
function goTo(target) {
  if (embedded()) open(target, "_blank", "noopener");
  else location.hash = target;
}

/** Change the address of what is shown without showing it again. @param {Address} at */
function restate(at, view, changes) {
  Object.assign(at, changes);
  const hash = address(at.sae, at.embed ? `embed/${view}` : view, at);
  history.replaceState(null, "", hash);
  visited.set(hash, at.entry);
}

/** What stands for this view elsewhere: where a folder lies on a disk is nobody else's business. */
const pageLink = () => (location.protocol === "file:" ? `index.html${location.hash}` : location.href);
