// Keys: one press, one act. Held keys, key combinations, typing and unfinished words of an input method do nothing.

const TYPING = "input:not([type=checkbox], [type=radio], [type=range], [type=button]), textarea, select, [contenteditable]";
const CHOOSING = "input[type=radio], input[type=range]";
const MOVING = /^(?:Arrow|Home|End|Page)/; // keys by which browsers choose in those

/** The name of the key pressed; digits by their place where a layout has other signs there. */
function nameOf(event) {
  const digit = /^(?:Digit|Numpad)(\d)$/.exec(event.code);
  if (digit && !event.shiftKey) return digit[1];
  return event.key.length === 1 ? event.key.toLowerCase() : event.key;
}

/**
 * Listen to keys.
 *
 * @param {(name: string, shift: boolean) => boolean} act does what a key means, and says whether it means anything
 * @param {() => boolean} isOn whether keys count at all
 */
export function listen(act, isOn) {
  const held = new Set();
  addEventListener("blur", () => held.clear());
  document.addEventListener("keyup", (event) => held.delete(event.code));
  document.addEventListener("keydown", (event) => {
    if (event.isComposing || event.keyCode === 229) return;
    const again = event.repeat || held.has(event.code);
    held.add(event.code);
    const combined = event.altKey || event.metaKey || (event.ctrlKey && event.key.toLowerCase() !== "z");
    if (combined || document.querySelector("dialog[open]")) return;
    if (event.target instanceof Element && event.target.closest(TYPING)) {
      if (event.key === "Escape") event.target.blur();
      return;
    }
    const control = event.target instanceof Element && event.target.closest("button, a, summary, label, input");
    const isPressed = event.key === " " || (event.key === "Enter" && !control?.matches(".chip, .sign, input, label"));
    if (control && isPressed) return;
    const isMarking = control && control.closest(".marking");
    if (control && control.matches(CHOOSING) && MOVING.test(event.key) && !event.shiftKey && !isMarking) return;
    if (control && control.matches("input") && event.key === "Escape" && !isMarking) return control.blur();
    const name = event.ctrlKey ? "undo" : nameOf(event);
    if (!isOn() && name !== "?") return;
    const panning = event.shiftKey && event.key.startsWith("Arrow");
    if (again && !panning) return event.preventDefault();
    if (act(name, event.shiftKey)) event.preventDefault();
  });
}
