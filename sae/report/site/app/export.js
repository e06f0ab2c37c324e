// the latents of a list as a file

/** Save all of `ids`, in order, with the columns shown. @param {"csv" | "json"} kind */
async function saveLatents(sae, ids, shown, kind) {
  const names = shown.filter((one) => one.column).map((one) => one.name);
  const [labels, ...values] = await Promise.all([allLabels(sae), ...names.map((name) => column(sae, name))]);
  const rows = Array.from(ids, (id) => {
    const [rule, before, peak, after] = labels[id];
    const numbers = names.map((name, i) => [name, Number.isNaN(values[i][id]) ? null : values[i][id]]);
    return {
      latent: id, rule_kind: rule ? rule[0] : null, rule_name: rule ? flat(rule[1]) : null, ...Object.fromEntries(numbers),
      before: flat(before), token: flat(peak), after: flat(after),
    };
  });
  const text = kind === "json" ? `${JSON.stringify(rows, null, 1)}\n` : csv(rows);
  saveFile(`latents-${sae.key}.${kind}`, text, kind === "json" ? "application/json" : "text/csv");
}

function csv(rows) {
  const names = Object.keys(rows[0] || { latent: 0 });
  return [names.join(","), ...rows.map((row) => names.map((name) => csvCell(row[name])).join(","))].join("\r\n") + "\r\n";
}

/** Text is quoted; what a spreadsheet would take for a formula gets an apostrophe before it. */
function csvCell(value) {
  if (value === null) return "";
  if (typeof value === "number") return String(value);
  return `"${(/^[\s]*[=+\-@]/.test(value) ? `'${value}` : value).replaceAll('"', '""')}"`;
}

function saveFile(name, text, type) {
  const url = URL.createObjectURL(new Blob([text], { type }));
  const link = h("a", { href: url, download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}
