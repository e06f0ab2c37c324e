// The first thing that runs.

dress();
if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", start);
else start();

/** What data files call, and what tests ask. `find`: ids of the latents that a query finds in the SAE on the page. */
const SAE = { put, loadColumn, loadJSON, parseQuery, find: async (q) => Array.from((await results(current.sae, q, "")).ids) };
