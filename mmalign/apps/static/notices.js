// What the page tells about itself: banner, progress, what is saved, what is missing, that nothing is left.

import { announce, byId, el } from "./dom.js";

export function banner(content, kind = "") {
  const place = byId("banner");
  place.className = `banner ${kind}`;
  place.replaceChildren(...content);
  place.hidden = content.length === 0;
}

export function tellProgress({ judged, total }) {
  byId("bar").max = Math.max(total ?? judged, 1);
  byId("bar").value = judged;
  byId("bar").hidden = !total;
  byId("count").textContent = total ? `${judged} of ${total}` : `${judged} judged`;
}

/** What has not reached the server yet, and why. */
export function tellSaved({ numVotes, failing }) {
  const place = byId("saved");
  const kept = `${numVotes} judgement${numVotes === 1 ? "" : "s"} kept here`;
  place.classList.toggle("failing", Boolean(failing && numVotes));
  place.textContent = failing && numVotes ? `No connection · ${kept}` : numVotes ? "Saving …" : "";
  if (failing === "signed out") askToSignIn();
}

export function askToSignIn() {
  const link = el("a", { href: `/login?next=${encodeURIComponent(location.pathname)}` }, "Sign in again");
  banner(["You have been signed out. What you judged is kept in this browser. ", link]);
}

/** In place of what cannot be decoded; `retry` loads it once more. */
export function tellBroken(places, panes, retry) {
  for (const place of places) {
    const again = el("button", { type: "button" }, "Load again");
    again.addEventListener("click", retry);
    const target = panes[place]?.frame ?? panes[place]?.reading ?? byId("prompt");
    target.replaceChildren(el("div", { className: "broken" }, "A picture could not be loaded.", again));
  }
  announce("A picture could not be loaded.");
}

/** The page without anything to judge: all is judged, or the project is closed. */
export function tellFinished(isOpen, lookAgain) {
  document.querySelector(".tabs")?.remove();
  byId("prompt").hidden = true;
  for (const id of ["view", "details", "choices", "legend"]) byId(id).replaceChildren();
  const again = el("button", { type: "button", className: "main" }, "Look again");
  again.addEventListener("click", lookAgain);
  const title = isOpen ? "Nothing left to judge" : "This project is closed";
  const words = isOpen
    ? "Thank you. There may be more when items are added, or given back by others."
    : "Nothing is handed out until it is opened again. What you judged is kept.";
  const others = el("a", { className: "button", href: "/" }, "All projects");
  byId("stage").className = "stage";
  byId("stage").replaceChildren(
    el("div", { className: "finished" }, el("h2", {}, title), el("p", { className: "soft" }, words), again, " ", others),
  );
  again.focus();
  banner([]);
  announce(`${title}.`);
}
