// Texts, conversations and pictures in them: rendered or as they were written, and the words marked in which two differ.

import { el, sanitised } from "./dom.js";
import { picture } from "./viewer.js";

export const MODES = ["rendered", "plain"];

const ROLES = { system: "System", user: "User", assistant: "Assistant", tool: "Tool" };

/**
 * All that is said in a prompt or an answer.
 *
 * @param {object[]} turns [{role, name, parts: [{text, html} | {media}], calls: [{name, arguments}], thoughts: {text, html}}]
 * @param {{mode?: string, changes?: number[][], alt?: string, loads?: Promise[]}} options `changes` are ranges of characters to
 *   be marked, of the texts of all parts in that mode, joined by one character; `loads` collects what must be decoded before all
 *   can be seen
 */
export function conversation(turns, { mode = "rendered", changes = [], alt = "Picture", loads = [] } = {}) {
  let start = 0;
  return turns.map((turn) => {
    const body = turn.parts.map((part) => {
      if (part.media) {
        const { node, ready } = picture(part.media, alt);
        loads.push(ready);
        return el(
          "button",
          { type: "button", className: "inline-picture", attrs: { "aria-label": `${alt}: enlarge`, "data-enlarge": true } },
          node,
        );
      }
      const node = words(part, mode);
      const here = start;
      start += [...node.textContent].length + 1;
      if (changes.length) mark(node, here, changes);
      return node;
    });
    const thoughts = turn.thoughts && folded("Thoughts", words(turn.thoughts, mode));
    const calls = (turn.calls ?? []).map((call) =>
      el(
        "div",
        { className: "call" },
        el("span", { className: "soft" }, "calls "),
        el("code", {}, `${call.name}(${call.arguments})`),
      ),
    );
    const label = turn.role ? (ROLES[turn.role] ?? turn.role) + (turn.name ? ` · ${turn.name}` : "") : null;
    const known = turn.role in ROLES ? turn.role : "other";
    return el(
      "div",
      { className: label ? `turn ${known}` : "turn" },
      label ? el("div", { className: "role" }, label) : null,
      thoughts,
      body,
      calls,
    );
  });
}

/** A text, rendered where that is asked for and it could be. */
export function words({ text, html }, mode = "rendered") {
  if (mode === "rendered" && html !== null) return sanitised(html, "prose");
  return el("div", { className: "written" }, text);
}

/** Let what is wider than its column be scrolled by keys: only that is a stop of the Tab key. */
export function reachable(root) {
  for (const node of root.querySelectorAll(".prose .formula, .prose table, .prose pre")) {
    const isCut = node.scrollWidth > node.clientWidth || node.scrollHeight > node.clientHeight;
    if (isCut) node.tabIndex = 0;
    else node.removeAttribute("tabindex");
  }
}

/** Something that opens when it is asked for. */
export function folded(title, ...content) {
  return el("details", { className: "folded" }, el("summary", {}, title), ...content);
}

/** Mark ranges of characters (of all texts; this one starts at `offset`) in an element; a formula is marked as a whole. */
function mark(root, offset, ranges) {
  const walker = document.createTreeWalker(root, NodeFilter.SHOW_TEXT);
  const nodes = [];
  while (walker.nextNode()) nodes.push(walker.currentNode);
  let place = offset;
  for (const node of nodes) {
    const here = place;
    place += [...node.data].length;
    const found = pieces(node.data, here, ranges);
    if (found.length === 1) continue;
    const formula = node.parentElement.closest("math");
    if (formula) formula.classList.add("changed");
    else if (node.data.trim()) node.replaceWith(...found);
  }
}

/** A text in pieces, with those in <mark> that lie in ranges of characters (of all texts; this one starts at `offset`). */
function pieces(text, offset, ranges) {
  const characters = [...text];
  const found = [];
  let place = 0;
  for (const [first, last] of ranges) {
    const start = Math.max(first - offset, place);
    const end = Math.min(last - offset, characters.length);
    if (end <= start) continue;
    found.push(characters.slice(place, start).join(""), el("mark", {}, characters.slice(start, end).join("")));
    place = end;
  }
  return [...found, characters.slice(place).join("")];
}
