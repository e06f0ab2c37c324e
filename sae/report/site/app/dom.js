// DOM

const $ = (selector, root = document) => root.querySelector(selector);

/** Whether this is one latent in a frame of another page: no header, and what leads elsewhere opens a tab of its own. */
const embedded = () => document.documentElement.dataset.embed !== undefined;

/**
 * An element. Props: `class`, `on<event>`, anything else is an attribute; false, null and undefined are left out.
 * @returns {HTMLElement}
 */
function h(tag, props, ...children) {
  return fill(document.createElement(tag), tag === "a" && embedded() ? { ...props, target: "_blank", rel: "noopener" } : props, children);
}

/** The same for SVG. */
function s(tag, props, ...children) {
  return fill(document.createElementNS("http://www.w3.org/2000/svg", tag), props, children);
}

function fill(element, props, children) {
  for (const [name, value] of Object.entries(props || {})) {
    if (value === false || value == null) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : String(value));
  }
  element.append(...children.flat(3).filter((child) => child != null && child !== false));
  return element;
}

/** Segments as nodes; long text is cut, its length stated, and expanded on click. @param {Segment[]} segments */
function show(segments, limit = 80) {
  let left = limit;
  const nodes = [];
  const size = segments.reduce((sum, part) => sum + (typeof part === "string" ? part.length : 1), 0);
  for (const part of segments) {
    if (left <= 0) break;
    if (typeof part === "string") nodes.push(size > limit ? [...part].slice(0, left).join("") : part);
    else nodes.push(h("span", { class: "chip", title: part[1] }, part[0]));
    left -= typeof part === "string" ? part.length : 1;
  }
  if (size > limit) {
    const more = h("button", { class: "cut", type: "button", title: "show all of it" }, `… ${size} characters`);
    more.addEventListener("click", (event) => {
      event.stopPropagation();
      more.parentElement.replaceChildren(...show(segments, Infinity));
    });
    nodes.push(more);
  }
  return nodes;
}

/** @param {Segment[]} segments */
const plain = (segments) => segments.map((part) => (typeof part === "string" ? part : part[0])).join("");

/** One line of text in which chips with names stand in ⟨ ⟩, as display.py writes it. @param {Segment[]} segments */
const flat = (segments) => segments.map((part) => (typeof part === "string" ? part : /^\p{L}/u.test(part[0]) ? `⟨${part[0]}⟩` : part[0])).join("");
