// The candidates of one assignment as panes, made while the one before is still judged: detached, decoded, ready to be put in.

import { el, key } from "./dom.js";
import { flagKey } from "./marks.js";
import { conversation, folded, words } from "./texts.js";
import { picture } from "./viewer.js";

export const nameOf = (place, count) => (count === 2 ? ["Left", "Right"][place] : String(place + 1));

/**
 * Build what an assignment shows.
 *
 * @returns {{shown, prompt: Node[], panes: {figure, frame, node}[], isViewed: boolean, ready: Promise<number[]>}} `ready` gives
 *   the places whose media cannot be decoded
 */
export function prepare(shown, flags, mode) {
  const prompt = promptOf(shown.prompt, shown.prefix);
  const panes = shown.candidates.map((candidate, place) => paneOf(shown, candidate, place, flags, mode));
  const ready = Promise.all(
    panes
      .map(async (pane, place) => ((await decoded(pane.loads)) ? null : place))
      .concat(decoded(prompt.loads).then((ok) => (ok ? null : -1))),
  ).then((places) => places.filter((place) => place !== null));
  return { shown, prompt: prompt.nodes, panes, isViewed: panes.every((pane) => pane.node), ready };
}

/** The same assignment, its media by addresses that the browser has not tried yet. */
export function afresh(shown) {
  const attempt = performance.now().toFixed(0);
  const renewed = (value) => {
    if (Array.isArray(value)) return value.map(renewed);
    if (value === null || typeof value !== "object") return value;
    const copy = Object.fromEntries(Object.entries(value).map(([name, one]) => [name, renewed(one)]));
    return "src" in copy ? { ...copy, attempt } : copy;
  };
  return renewed(shown);
}

async function decoded(loads) {
  const found = await Promise.allSettled(loads);
  return found.every((one) => one.status === "fulfilled");
}

function promptOf(prompt, prefix) {
  const loads = [];
  const nodes = conversation(prompt.turns, { alt: "Picture of the prompt", loads });
  if (prompt.tools.length) {
    const tools = prompt.tools.map((tool) => el("pre", { className: "schema", attrs: { tabindex: 0 } }, tool.schema));
    nodes.push(folded(`Tools: ${prompt.tools.map((tool) => tool.name).join(", ")}`, ...tools));
  }
  if (prefix)
    nodes.push(el("div", { className: "turn assistant" }, el("div", { className: "role" }, "All go on from"), words(prefix)));
  return { nodes, loads };
}

function paneOf(shown, candidate, place, flags, mode) {
  const name = nameOf(place, shown.candidates.length);
  const pane = { loads: [], node: null, frame: null, reading: null };
  const own = candidate.prompt ? promptOf(candidate.prompt, null) : { nodes: [], loads: [] };
  pane.loads.push(...own.loads);
  const content = [];
  if (own.nodes.length) content.push(el("div", { className: "own-prompt" }, own.nodes));
  if (candidate.media.length) {
    const { node, ready } = picture(candidate.media[0], `${name} picture`);
    pane.loads.push(ready);
    pane.node = node;
    pane.frame = el("div", { className: "frame" }, node);
    content.push(pane.frame);
    if (candidate.media.length > 1) content.push(film(candidate.media, pane, name));
  }
  pane.write = (newMode, isMarked) => {
    if (!candidate.turns.length) return;
    const turns = conversation(candidate.turns, {
      mode: newMode,
      changes: isMarked ? shown.changes[newMode][place] : [],
      alt: `Picture of ${name}`,
      loads: pane.loads,
    });
    pane.reading.replaceChildren(...turns);
  };
  if (candidate.turns.length) {
    pane.reading = el("div", {
      className: pane.node ? "reading caption" : "reading",
      attrs: { tabindex: 0, role: "region", "aria-label": `${name} text` },
    });
    pane.write(mode, false);
    content.push(pane.reading);
  }
  const marks = flags.map((flag, number) =>
    pill("flag", flag, {
      "data-flag": flag,
      "data-place": place,
      "data-key": flagKey(place * flags.length + number),
      "aria-label": `${name}: ${flag}`,
    }),
  );
  pane.figure = el(
    "figure",
    { className: "pane", attrs: { "data-place": place } },
    el("figcaption", {}, el("span", { className: "name" }, name), marks.length && !place ? hint("G") : null, marks),
    ...content,
  );
  return pane;
}

/** The key that something is reached by; the keys are told to screen readers in the help. */
export const hint = (name) => el("span", { className: "hint", attrs: { "aria-hidden": "true" } }, key(name), " ");

/** A checkbox or radio that looks like a pill; its own key is seen while keys mark. A pointer leaves no focus on it. */
export function pill(className, text, attrs, type = "checkbox") {
  const input = el("input", { type, attrs });
  input.addEventListener("click", ({ pointerType }) => pointerType && input.blur());
  return el("label", { className: `pill ${className}` }, input, el("span", {}, attrs["data-key"] && hint(attrs["data-key"]), text));
}

/** The frames of a video that came as pictures: a slider that puts one after the other into the pane. */
function film(media, pane, name) {
  const frames = media.map((one, number) => (number ? picture(one, `${name} picture`) : null));
  pane.loads.push(...frames.slice(1).map((frame) => frame.ready));
  const slider = el("input", {
    type: "range",
    min: 0,
    max: media.length - 1,
    value: 0,
    className: "film",
    attrs: { "aria-label": `${name}: frame` },
  });
  slider.addEventListener("input", () => {
    for (const other of document.querySelectorAll(".film")) {
      other.value = slider.value;
      other.dispatchEvent(new Event("film"));
    }
  });
  slider.addEventListener("film", () => {
    pane.node.src = media[Math.min(Number(slider.value), media.length - 1)].src;
  });
  return slider;
}
