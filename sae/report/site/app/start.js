// The first thing that runs.

try {
  const theme = localStorage.getItem("sae-report-theme");
  if (theme === "dark" || theme === "light") document.documentElement.dataset.theme = theme;
} catch { /* storage is off */ }
if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", start);
else start();

/** Ids of the latents that a query finds in the SAE on the page. */
const find = async (q) => Array.from((await results(current.sae, q, "")).ids);

return { put, loadColumn, loadJSON, parseQuery, find };
