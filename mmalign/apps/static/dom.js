// Elements from text: whatever comes from data enters the page as a text node, or through `sanitised`.

/** An element with properties, attributes (under `attrs`) and children; strings become text nodes, null is left out. */
export function el(tag, { attrs = {}, ...props } = {}, ...children) {
  const node = Object.assign(document.createElement(tag), props);
  for (const [name, value] of Object.entries(attrs)) {
    if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return node;
}

/** A div holding HTML that the server has sanitised: the one place where HTML is taken as such. */
export function sanitised(html, className) {
  const node = el("div", { className });
  node.innerHTML = html;
  return node;
}

export const byId = (id) => document.getElementById(id);

/** A key as it is printed on the page. */
export const key = (name) => (name === "…" ? "…" : el("kbd", {}, name));

/** Tell screen readers, in their own time. */
export function announce(text) {
  const place = byId("live");
  place.textContent = "";
  requestAnimationFrame(() => {
    place.textContent = text;
  });
}

let toastTimer = 0;
let staying = ""; // what the toast says until something else is told

/** A line at the foot of the page, also told to screen readers. */
export function toast(text, { stays = false } = {}) {
  const place = byId("toast");
  place.textContent = text;
  place.hidden = !text;
  staying = stays ? text : "";
  clearTimeout(toastTimer);
  if (text && !stays) toastTimer = setTimeout(() => toast(""), 6000);
  if (text) announce(text);
}

/** Tell something for as long as it lasts; the function returned ends it, and brings back what stayed before. */
export function meanwhile(text) {
  const before = staying;
  toast(text, { stays: true });
  return () => {
    if (staying === text) toast(before, { stays: true });
  };
}

/** Two frames: after the first one the browser has laid out, after the second it has painted. Never in a hidden tab. */
export function painted() {
  return new Promise((resolve) => requestAnimationFrame(() => requestAnimationFrame(resolve)));
}

export const pause = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

export const isNarrow = () => matchMedia("(max-width: 760px)").matches;

export const wantsStillness = () => matchMedia("(prefers-reduced-motion: reduce)").matches;

/** What `localStorage` or `sessionStorage` (by its name) holds; nothing where it is forbidden. */
export function recall(storage, name) {
  try {
    return window[storage].getItem(name);
  } catch {
    return null;
  }
}

/** The names in a storage that begin so, in order; none where it is forbidden. */
export function namesOf(storage, prefix) {
  try {
    return Object.keys(window[storage])
      .filter((name) => name.startsWith(prefix))
      .sort();
  } catch {
    return [];
  }
}

/** Keep a text in a storage, by its name; null forgets it. Where that is forbidden or full, it lasts as long as the page. */
export function remember(storage, name, text) {
  try {
    if (text === null) window[storage].removeItem(name);
    else window[storage].setItem(name, text);
  } catch {
    return false;
  }
  return true;
}
