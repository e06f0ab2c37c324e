// toy view

async function toyView(at) {
  const toys = await once("data/toy", loadJSON);
  const known = toys[at.sae.key] ? at.sae : summary.saes.find((sae) => toys[sae.key]);
  const toy = toys[known.key];
  return [
    h("h1", { tabindex: -1 }, toy.title),
    known !== at.sae && h("p", { class: "note" }, `Those of ${known.name}; of ${at.sae.name} none are known.`),
    toy.notes.map((text) => h("p", { class: "note" }, text)),
    toy.concepts.length ? h("section", {}, h("h2", {}, "Named concepts"), dataTable(["concept", "rows", "found", "where"], toy.concepts.map((one) => [
      one.name, one.rows.join(", "), h("span", { class: one.found ? "pass" : "fail" }, one.found ? "found" : "not found"), one.where,
    ]))) : null,
    toy.heat ? heatTable(known, toy.heat) : null,
    toy.tables.map((table) => h("section", {}, h("h2", {}, table.title), table.note && h("p", { class: "note" }, table.note), dataTable(table.columns, table.rows, table.title))),
  ];
}

function dataTable(columns, rows, label = "Table") {
  const number = (value) => typeof value === "string" && /^[-+]?[.\d][\d.,e-]*( %)?$/.test(value);
  const numeric = columns.map((_, i) => i > 0 && rows.length > 0 && rows.every((row) => number(row[i]) || row[i] === "n/a" || row[i] === "") && rows.some((row) => number(row[i])));
  return h("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": label }, h("table", {},
    h("thead", {}, h("tr", {}, columns.map((name, i) => h("th", { scope: "col", class: numeric[i] && "num" }, name || h("span", { class: "hidden" }, "row"))))),
    h("tbody", {}, rows.map((row) => h("tr", {}, row.map((cell, i) => (i === 0 ? h("th", { scope: "row" }, cell || h("span", { class: "hidden" }, "as above")) : h("td", { class: numeric[i] && "num" }, cell))))))));
}

function heatTable(sae, heat) {
  const maxima = heat.latents.map((_, j) => Math.max(...heat.values.map((row) => row[j])));
  return h("section", {}, h("h2", {}, "Activation of every latent ", h("span", { class: "note" }, "colour: share of the latent's maximum")),
    h("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "Activations" }, h("table", { class: "heat" },
      h("thead", {}, h("tr", {}, h("th", { scope: "col" }, "row"), heat.latents.map((id) => h("th", { scope: "col" }, h("a", { href: address(sae, `latent/${id}`) }, id))))),
      h("tbody", {}, heat.values.map((row, i) => h("tr", {}, h("th", { scope: "row" }, heat.rows[i]),
        row.map((value, j) => {
          const tiny = value < maxima[j] / 1000;
          const step = tiny ? 0 : stepOf(value, maxima[j]);
          return h("td", { class: step ? `a${step}` : "muted", title: value }, value > 0 ? (tiny ? "≈ 0" : decimal(value)) : "0");
        })))))));
}
