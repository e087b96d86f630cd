// Aspects and flags by keys. A asks for one aspect after the other, G shows a key on every flag; while they do, keys mean these
// and no verdict. It ends after the last aspect, by Esc, and when the focus goes elsewhere.

import { announce } from "./dom.js";

const FLAG_KEYS = "1234567890abcdefhjklmnopqrstvwxyz"; // all but G, which ends, and I and U, which people know for others

/** The key of the flag with a number, counted over all candidates; none beyond the last key. */
export const flagKey = (number) => FLAG_KEYS[number] ?? null;

/** The keys of an aspect's options, in the order of the page: the same as those of the verdict. */
export const aspectKeys = (count) => (count === 2 ? ["1", "T", "2"] : [...[...Array(count).keys()].map((n) => String(n + 1)), "T"]);

const SAME = { ArrowLeft: "1", ArrowRight: "2", 3: "T" }; // of a pair, as for the verdict

export class Marks {
  #groups = [];
  #at = 0;
  #kind = null;

  /** `changed()` is called when the keys' meaning does. */
  constructor({ details, stage, count, changed }) {
    this.details = details;
    this.stage = stage;
    this.count = count;
    this.changed = changed;
  }

  get isOn() {
    return this.#kind !== null;
  }

  /** Lines for the legend while it is on. */
  get legend() {
    const end = [["Esc"], "done"];
    if (this.#kind === "g") return [[["1", "…"], "the flag with that key"], end];
    const sides = this.count === 2 ? [[["1"], "left"], [["2"], "right"]] : [[["1", "…", String(this.count)], "best"]];
    return [[[], `${this.#name}:`], ...sides, [["T"], "tie"], [["A"], "next aspect"], [["⌫"], "the one before"], end];
  }

  /** Begin with aspects ("a") or flags ("g"); say whether there are any. */
  begin(kind) {
    this.#groups = kind === "a" ? [...this.details.querySelectorAll("fieldset")] : [this.stage];
    if (!this.#groups.some((group) => group.querySelector("[data-key]"))) return false;
    [this.#kind, this.#at] = [kind, 0];
    this.#go(0);
    return true;
  }

  /** Do what a key means; say whether it may do nothing else. */
  press(name) {
    if (name === "Escape" || name === "Enter" || (name === "g" && this.#kind === "g")) this.end();
    else if (name === "a" && this.#kind === "a") this.#go(this.#at + 1);
    else if (name === "Backspace") this.#go(Math.max(this.#at - 1, 0));
    else if (!this.#mark(name)) return name.length === 1;
    return true;
  }

  end() {
    const group = this.#group;
    this.#kind = null;
    this.#dress(group, false);
    if (group.contains(document.activeElement)) document.activeElement.blur();
    this.changed();
  }

  get #group() {
    return this.#groups[this.#at];
  }

  get #name() {
    return this.#group.dataset.aspect;
  }

  #mark(name) {
    const wanted = ((this.#kind === "a" && this.count === 2 && SAME[name]) || name).toUpperCase();
    const input = [...this.#group.querySelectorAll("[data-key]")].find((one) => one.dataset.key.toUpperCase() === wanted);
    if (!input) return false;
    if (input.type === "radio" && input.checked) {
      input.checked = false;
      input.dispatchEvent(new Event("change", { bubbles: true }));
    } else input.click();
    announce(`${input.getAttribute("aria-label") ?? this.#name}: ${this.#told(input)}`);
    if (this.#kind === "a") this.#go(this.#at + 1);
    return true;
  }

  #told(input) {
    if (input.type === "checkbox") return input.checked ? "marked" : "not marked";
    return input.checked ? input.value : "nothing";
  }

  #go(place) {
    this.#dress(this.#group, false);
    if (place >= this.#groups.length) {
      this.#at = this.#groups.length - 1;
      return this.end();
    }
    this.#at = place;
    const first = this.#group.querySelector("input[type=radio]:checked") ?? this.#group.querySelector("[data-key]");
    first.focus({ preventScroll: true });
    this.#dress(this.#group, true);
    this.changed();
  }

  #dress(group, isOn) {
    group.classList.toggle("marking", isOn);
    if (isOn) group.addEventListener("focusout", this.#left);
    else group.removeEventListener("focusout", this.#left);
  }

  #left = (event) => {
    if (this.isOn && !this.#group.contains(event.relatedTarget)) this.end();
  };
}
