// The first thing that runs.

try {
  const theme = localStorage.getItem("sae-report-theme");
  if (theme === "dark" || theme === "light") document.documentElement.dataset.theme = theme;
} catch { /* storage is off */ }
if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", start);
else start();

return { put, loadColumn, loadJSON, parseQuery };
