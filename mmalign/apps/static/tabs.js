// On a narrow screen panes are swiped through: tabs say which one is seen, and which has not been yet.

import { byId, el, isNarrow, wantsStillness } from "./dom.js";
import { nameOf } from "./panes.js";

const MOSTLY = 0.51;

/** Draw the tabs of these panes; returns a function that ends their watch. */
export function drawTabs(panes) {
  document.querySelector(".tabs")?.remove();
  const tabs = panes.map((pane, place) => {
    const tab = el(
      "button",
      { type: "button", className: "unseen", attrs: { "aria-pressed": "false" } },
      nameOf(place, panes.length),
    );
    const behavior = wantsStillness() ? "auto" : "smooth";
    tab.addEventListener("click", () => pane.figure.scrollIntoView({ inline: "center", block: "nearest", behavior }));
    return tab;
  });
  byId("stage").before(el("div", { className: "tabs", attrs: { role: "group", "aria-label": "Show" } }, tabs));
  return watch(panes, (pane, isSeen) => {
    const tab = tabs[panes.indexOf(pane)];
    tab.setAttribute("aria-pressed", String(isSeen));
    if (isSeen) tab.classList.remove("unseen");
  });
}

/** Resolve when every pane has been on screen for more than its half: at once where all stand side by side. */
export function allSeen(panes, noted) {
  if (!isNarrow() || panes.length < 2) return Promise.resolve();
  const waiting = new Set(panes);
  return new Promise((resolve) => {
    const end = watch(panes, (pane, isSeen) => {
      if (isSeen) waiting.delete(pane);
      if (waiting.size) return noted();
      end();
      resolve();
    });
  });
}

function watch(panes, told) {
  const observer = new IntersectionObserver(
    (entries) => {
      for (const entry of entries) told(panes[Number(entry.target.dataset.place)], entry.intersectionRatio >= MOSTLY);
    },
    { root: byId("stage"), threshold: [MOSTLY] },
  );
  for (const pane of panes) observer.observe(pane.figure);
  return () => observer.disconnect();
}
