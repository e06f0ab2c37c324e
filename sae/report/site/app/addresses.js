// addresses

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
  const view = parts[0] || "overview";
  const id = view === "latent" && /^\d+$/.test(parts[1] || "") ? Number(parts[1]) : -1;
  known = known && (view === "overview" || summary.views.includes(view));
  known = known && (view !== "latent" || (id >= 0 && id < sae.nLatents));
  return { view, sae, id, rest: parts.slice(1), params, q: params.get("q") || "", sort: params.get("sort") || "", known };
}

function address(sae, view, { q = "", sort = "" } = {}) {
  const params = new URLSearchParams();
  if (q) params.set("q", q);
  if (sort) params.set("sort", sort);
  const base = summary.saes.length > 1 || view !== "overview" ? `#/s/${sae.key}` : "#/";
  return base + (view === "overview" ? "" : `/${view}`) + (params.size ? `?${params}` : "");
}
