// The row of view buttons above the candidates: zoom, blink and difference of pictures, or how texts are written.

import { byId, el, key } from "./dom.js";
import { MODES } from "./texts.js";

const MODE_NAMES = { rendered: "Rendered", plain: "Plain" };

function tool(text, name, act, attrs = {}) {
  const button = el("button", { type: "button", attrs }, el("span", {}, text), name ? key(name) : null);
  button.addEventListener("click", act);
  return button;
}

/** Buttons for pictures; returns a function that brings them up to date. */
export function viewerTools(viewer, isPair) {
  const zoom = tool("", "Z", () => viewer.toggleZoom(), { "aria-label": "Zoom: fit or one to one" });
  zoom.firstChild.className = "zoom";
  const blink = isPair && tool("Blink", "X", () => viewer.toggle("blink"), { "aria-pressed": "false" });
  const difference = isPair && tool("Difference", "D", () => viewer.toggle("difference"), { "aria-pressed": "false" });
  const note = el("span", { className: "soft", attrs: { "aria-live": "off" } });
  byId("view").replaceChildren(
    ...[
      zoom,
      tool("−", null, () => viewer.step(-1), { "aria-label": "Zoom out" }),
      tool("+", null, () => viewer.step(1), { "aria-label": "Zoom in" }),
      blink,
      difference,
      note,
    ].filter(Boolean),
  );
  return () => {
    zoom.firstChild.textContent = viewer.zoomText;
    if (!isPair) return;
    blink.setAttribute("aria-pressed", String(viewer.overlay === "blink"));
    difference.setAttribute("aria-pressed", String(viewer.overlay === "difference"));
    const seen = {
      blink: `${viewer.front ? "Right" : "Left"} is shown; Space shows the other`,
      difference: viewer.gain > 1 ? `${viewer.gain} times as bright` : "black is equal",
    };
    note.textContent = seen[viewer.overlay] ?? "";
  };
}

/** Buttons for texts; `choose(mode, isMarked)` is called on a press. */
export function textTools({ mode, isMarked, hasChanges }, choose) {
  const press = (name, letter, act, isOn) => tool(name, letter, act, { "aria-pressed": String(isOn) });
  byId("view").replaceChildren(
    ...MODES.map((one) => press(MODE_NAMES[one], one === "plain" ? "P" : null, () => choose(one), one === mode)),
    ...(hasChanges ? [press("Differences", "D", () => choose(mode, !isMarked), isMarked)] : []),
  );
}
