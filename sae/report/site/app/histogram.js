// histogram of one latent's activations

/** @param {Latent} latent @param {HTMLElement} readout  says by `point` events which activation is pointed at */
function histogramSection(sae, latent, readout) {
  let log = false;
  let drawn = null;
  const holder = h("div");
  const paint = () => {
    drawn = histogram(sae.edges, latent, log);
    holder.replaceChildren(drawn.svg);
  };
  const toggle = h("button", { type: "button", class: "small", "aria-pressed": "false", onclick: () => {
    log = !log;
    toggle.setAttribute("aria-pressed", String(log));
    paint();
  } }, "log counts");
  paint();
  readout.addEventListener("point", (event) => drawn.mark(event.detail));
  return h("section", {}, h("h2", {}, "Firings by activation"), holder, h("p", { class: "note" }, `activation, logarithmic${latent.quartiles[1] == null ? "" : "; ticks: quartiles"}  `, toggle));
}

/** Bars of equal width on a logarithmic axis: the edges of the bins grow geometrically. */
function histogram(edges, latent, log) {
  const [width, height, left, bottom] = [340, 130, 40, 20];
  const counts = latent.histogram;
  const first = counts.findIndex((n) => n > 0);
  const last = counts.findLastIndex((n) => n > 0) + 1;
  const [low, high] = [Math.log(edges[first]), Math.log(edges[last])];
  const most = Math.max(...counts);
  const x = (value) => left + ((width - left - 6) * (Math.min(high, Math.max(low, Math.log(value))) - low)) / (high - low);
  const y = (n) => height - bottom - (height - bottom - 14) * (log ? Math.log1p(n) / Math.log1p(most) : n / most);
  const bars = counts.slice(first, last).map((n, i) => {
    const [from, to] = [x(edges[first + i]), x(edges[first + i + 1])];
    return n > 0 && s("rect", { class: "bar", x: from, width: Math.max(1, to - from - 1), y: y(n), height: height - bottom - y(n) },
      s("title", {}, `${count(n)} firings, ${decimal(edges[first + i])} to ${decimal(edges[first + i + 1])}`));
  });
  const rug = latent.quartiles.map((q) => q > 0 && s("line", { class: "rug", x1: x(q), x2: x(q), y1: height - bottom + 1, y2: height - bottom + 7 },
    s("title", {}, `quartile ${decimal(q)}`)));
  const pointed = s("line", { class: "pointed", y1: 8, y2: height - bottom, visibility: "hidden" });
  const text = (tx, ty, anchor, value) => s("text", { x: tx, y: ty, "text-anchor": anchor }, value);
  const svg = s("svg", { class: "histogram", viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `Histogram of ${count(latent.n[0])} firings by activation, up to ${decimal(latent.max)}` },
    s("line", { x1: left, x2: width - 6, y1: height - bottom, y2: height - bottom }), bars, rug, pointed,
    text(left, height - 4, "start", decimal(edges[first])), text((left + width) / 2, height - 4, "middle", decimal(Math.exp((low + high) / 2))),
    text(width - 6, height - 4, "end", decimal(edges[last])), text(left - 5, 20, "end", count(most)), text(left - 5, height - bottom, "end", "0"));
  const mark = (value) => {
    pointed.setAttribute("visibility", value > 0 ? "visible" : "hidden");
    if (value > 0) for (const end of ["x1", "x2"]) pointed.setAttribute(end, x(value));
  };
  return { svg, mark };
}
