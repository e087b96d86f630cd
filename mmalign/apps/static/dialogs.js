// The dialog: instructions, keys, an enlarged picture. While it is open no key judges.

import { byId, el, key } from "./dom.js";
import { reachable, words } from "./texts.js";

/** Open the dialog; resolves when it is closed. */
export function openDialog(title, content, { closing = "Close", isMain = false, isWide = false } = {}) {
  const dialog = byId("dialog");
  if (dialog.open) dialog.close();
  const close = el("button", { type: "button", className: isMain ? "main" : "quiet" }, closing);
  close.addEventListener("click", () => dialog.close());
  dialog.replaceChildren(
    el("div", { className: "dialog-head" }, el("h2", { id: "dialog-title" }, title), close),
    el("div", { className: isWide ? "dialog-body wide" : "dialog-body", attrs: { tabindex: 0 } }, content),
  );
  dialog.showModal();
  reachable(dialog);
  close.focus();
  return new Promise((resolve) => dialog.addEventListener("close", resolve, { once: true }));
}

/** The instructions; new ones are to be read before judging goes on. */
export function instructions(guideline, { isNew = false } = {}) {
  const text = guideline.text.trim()
    ? words(guideline)
    : el("p", { className: "soft" }, "There are no instructions for this project yet.");
  const version = el("p", { className: "soft" }, `Version ${guideline.version}`);
  return openDialog("Instructions", [text, version], isNew ? { closing: "Start judging", isMain: true } : {});
}

/** All keys; single keys can be switched off, for those whose speech or switch input would press them. */
export function keyHelp(sections, isOn, setOn) {
  const lists = sections.flatMap(([title, lines]) => [
    el("h3", {}, title),
    el(
      "dl",
      {},
      lines.flatMap(([names, meaning]) => [
        el(
          "dt",
          {},
          names.flatMap((name, n) => (n ? [" ", key(name)] : [key(name)])),
        ),
        el("dd", {}, meaning),
      ]),
    ),
  ]);
  const box = el("input", { type: "checkbox", checked: isOn });
  box.addEventListener("change", () => setOn(box.checked));
  return openDialog("Keys", [
    ...lists,
    el("h3", {}, "Setting"),
    el("label", {}, box, " Single keys judge (buttons always do)"),
  ]);
}

export function enlarge(node) {
  const copy = node.cloneNode(true);
  copy.removeAttribute("style");
  return openDialog(copy.alt || "Picture", copy, { isWide: true });
}
