// plots

/**
 * A plot comes alive when it is touched: Vega draws the same spec in place of the picture, with tooltips, and a click
 * on a bar or cell lists its latents. If anything of that fails, the picture stays.
 */
async function enliven(figure) {
  const [specs] = await Promise.all([once("data/plots", loadJSON), once(summary.vega, loadAsset)]);
  const spec = specs[figure.dataset.plot];
  const picture = $("svg.plot", figure);
  const live = h("div", { class: "plot", role: "img", "aria-label": picture.getAttribute("aria-label"), style: picture.getAttribute("style") });
  const options = { ast: true, renderer: "svg", actions: false, defaultStyle: false, tooltip: { disableDefaultStyle: true } };
  const { view } = await window.vegaEmbed(live, spec, options);
  picture.replaceWith(live);
  figure.classList.add("live");
  const { filter, hint } = spec.usermeta ?? {};
  if (hint) $(".note", figure).append(` ${hint}`);
  if (!filter) return;
  $(".note", figure).append(" Click for the latents.");
  view.addEventListener("click", (event, item) => {
    if (!item?.datum) return;
    const power = (field) => (10 ** item.datum[field]).toPrecision(4);
    const q = Object.entries(filter).map(([name, [low, high]]) => `${name}>=${power(low)} ${name}<${power(high)}`).join(" ");
    const key = figure.closest("[data-sae]").dataset.sae;
    location.hash = address(summary.saes.find((one) => one.key === key), "latents", { q });
  });
}

function watchPlots() {
  if (!summary.vega) return;
  const touched = (event) => {
    const figure = event.target.closest?.("[data-plot]:not([data-touched])");
    if (!figure) return;
    figure.dataset.touched = "";
    enliven(figure).catch(() => delete figure.dataset.touched);
  };
  for (const type of ["pointerover", "focusin"]) $("#overview").addEventListener(type, touched);
}
