// What keys mean on the judging page, and where that is written: legend and help.

import { keyHelp } from "./dialogs.js";
import { byId, el, key, recall, remember } from "./dom.js";

const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
const DETAILS = [
  [["R"], "write a reason (Esc leaves it)"],
  [["A"], "aspects, one after the other, each by 1, 2 … or T; Backspace goes back, the same key takes it away"],
  [["G"], "flags, each by the key that it then shows"],
  [["Esc"], "ends aspects and flags; so does Tab"],
];
const PAGE = [
  [["U"], "undo, or Ctrl Z"],
  [["Esc"], "keep what is being revised"],
  [["I"], "instructions"],
  [["?"], "keys"],
];
const PICTURES = [
  [["Z"], "fit or 1:1"],
  [["+", "−"], "zoom"],
  [["⇧", "arrows"], "move"],
];
const PAIR = [
  [["X"], "blink"],
  [["D"], "difference"],
];

/** Whether single keys judge. */
export const hasKeys = () => recall("localStorage", "mmalign-keys") !== "off";

function viewKeys({ viewer, prepared }) {
  if (viewer) return prepared.panes.length === 2 ? [...PICTURES, ...PAIR] : PICTURES;
  return [[["P"], "plain text"], ...(prepared?.shown.changes ? [[["D"], "differences"]] : [])];
}

export function drawLegend(judge) {
  const { answers } = judge;
  const usual = () => [...answers.legend, ...answers.besides, ...viewKeys(judge), [["U"], "undo"]];
  const lines = answers.marks.isOn ? answers.marks.legend : usual();
  byId("legend").replaceChildren(
    ...lines.map(([names, meaning]) => el("span", {}, ...names.flatMap((name) => [key(name), " "]), meaning)),
  );
}

export function openKeys(judge) {
  const here = judge.prepared ? { Judge: judge.answers.legend, View: viewKeys(judge) } : {};
  const sections = Object.entries({ ...here, Details: DETAILS, Page: PAGE });
  keyHelp(sections, hasKeys(), (isOn) => remember("localStorage", "mmalign-keys", isOn ? "on" : "off"));
}

/** Do what a key means; say whether it means anything. */
export function press(judge, name, shift) {
  const { viewer, answers } = judge;
  if (judge.phase === "feedback" && (name === "Enter" || name === " ")) return done(judge.goOn());
  if (shift && name in ARROWS) return Boolean(viewer) && done(viewer.pan(...ARROWS[name]));
  if (judge.prepared && answers?.marks.isOn) return answers.marks.press(name);
  const page = {
    u: () => judge.undo(),
    undo: () => judge.undo(),
    Escape: () => judge.keep(),
    i: () => judge.openInstructions(),
    "?": () => openKeys(judge),
  };
  if (name in page) return done(page[name]());
  if (!judge.prepared || !answers) return false;
  if (["a", "g", "r"].includes(name)) return answers.say(name);
  return answers.press(name) || (viewer ? pressViewer(viewer, name) : pressTexts(judge, name));
}

const done = () => true;

function pressViewer(viewer, name) {
  const acts = {
    z: () => viewer.toggleZoom(),
    "+": () => viewer.step(1),
    "=": () => viewer.step(1),
    "-": () => viewer.step(-1),
    x: () => viewer.toggle("blink"),
    d: () => viewer.toggle("difference"),
    " ": () => viewer.flip(),
  };
  acts[name]?.();
  return name in acts;
}

function pressTexts(judge, name) {
  if (name === "p") return done(judge.write(judge.mode === "plain" ? "rendered" : "plain"));
  return name === "d" && Boolean(judge.prepared.shown.changes) && done(judge.write(judge.mode, !judge.isMarked));
}
