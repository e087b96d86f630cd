// What is asked: the choices with their keys, strength, aspects, flags and the reason; and the verdict they make.

import { byId, el, key, toast } from "./dom.js";
import { Marks, aspectKeys } from "./marks.js";
import { hint, nameOf, pill } from "./panes.js";
import { Ranking } from "./ranking.js";

const STRENGTHS = ["", "slightly better", "better", "much better"];
const SHORT = ["", " slightly", " better", " much"];
const LETTERS = { tie: "t", both_bad: "b", skip: "s" };

export class Answers {
  #keys = new Map();
  ranking = null;

  /** `choose(choice, {strength, ranks})` is called when an answer is given, `marking()` when keys begin or end to mark. */
  constructor({ shown, protocol, choose, drafted, marking }) {
    this.count = shown.candidates.length;
    this.protocol = protocol;
    this.choose = choose;
    this.row = byId("choices");
    this.details = byId("details");
    this.#drawChoices();
    this.#drawDetails(drafted);
    this.marks = new Marks({ details: this.details, stage: byId("stage"), count: this.count, changed: marking });
    this.setLive(false);
  }

  /** Do what a key means here; say whether it means anything. */
  press(name) {
    const act = this.#keys.get(name);
    if (act) act();
    return Boolean(act);
  }

  /** Lines for the legend of what is said beside the choice. */
  get besides() {
    return [
      ...(this.protocol.aspects.length ? [[["A"], "aspects"]] : []),
      ...(this.protocol.flags.length ? [[["G"], "flags"]] : []),
      ...(this.protocol.rationale === "off" ? [] : [[["R"], "reason"]]),
    ];
  }

  /** Lines for the legend: [keys, meaning]. */
  get legend() {
    if (this.ranking) {
      return [
        [["1", "…", String(this.count)], "next best"],
        [["="], "as good as the one before"],
        [["⌫"], "take back"],
        [["Enter"], "submit"],
        ...this.#others(),
      ];
    }
    if (this.protocol.strength)
      return [[["1", "…", "7"], "left much … right much"], [["←", "→"], "side alone"], ...this.#others()];
    return [[["←", "1"], "left"], [["→", "2"], "right"], ...this.#others()];
  }

  #others() {
    return this.#offered().map((choice) => [[LETTERS[choice].toUpperCase()], this.#label(choice).toLowerCase()]);
  }

  #offered() {
    const known = this.ranking ? ["both_bad", "skip"] : ["tie", "both_bad", "skip"];
    return known.filter((choice) => this.protocol.choices.includes(choice));
  }

  #label(choice) {
    return { left: "Left", right: "Right", tie: "Tie", both_bad: this.count === 2 ? "Both bad" : "All bad", skip: "Skip" }[
      choice
    ];
  }

  setLive(isLive) {
    this.row.classList.toggle("arming", !isLive);
    for (const button of this.row.querySelectorAll(".choice")) {
      const unready = button.dataset.choice === "ranks" && !this.ranking.isWhole;
      button.setAttribute("aria-disabled", String(!isLive || unready));
    }
    this.isLive = isLive;
  }

  #drawChoices() {
    this.row.classList.toggle("pair", this.count === 2);
    if (this.count > 2) return this.#drawRanking();
    const middle = this.#offered();
    const [left, right] = ["left", "right"].map((side) => this.#side(side));
    if (!this.protocol.strength) {
      const numbers = middle.map((choice, place) => this.#button(choice, [String(place + 3), LETTERS[choice]]));
      return this.row.replaceChildren(left, ...numbers, right);
    }
    const scale = el(
      "div",
      { className: "scale", attrs: { role: "group", "aria-label": "How much better" } },
      [-3, -2, -1, 0, 1, 2, 3].map((s) => this.#strength(s)),
    );
    const rest = middle
      .filter((choice) => choice !== "tie")
      .map((choice, place) => this.#button(choice, [String(place + 8), LETTERS[choice]]));
    this.#keys.set("ArrowLeft", () => this.#give("left"));
    this.#keys.set("ArrowRight", () => this.#give("right"));
    this.row.replaceChildren(scale, ...rest);
  }

  #side(side) {
    const [arrow, number] = { left: ["ArrowLeft", "1"], right: ["ArrowRight", "2"] }[side];
    const sign = key(side === "left" ? "←" : "→");
    const button = this.#button(side, [arrow, number], side === "left" ? [sign, "Left"] : ["Right", sign]);
    button.classList.add("side");
    return button;
  }

  #button(choice, names, content = [this.#label(choice), key(names.at(-1).toUpperCase())]) {
    for (const name of names) this.#keys.set(name, () => this.#give(choice));
    const button = el("button", { type: "button", className: "choice", attrs: { "data-choice": choice } }, ...content);
    button.addEventListener("click", () => this.#give(choice));
    return button;
  }

  #strength(strength) {
    const side = strength < 0 ? "left" : "right";
    const choice = strength ? side : "tie";
    if (choice === "tie" && !this.protocol.choices.includes("tie")) return null;
    const digit = String(strength + 4);
    const act = () => this.#give(choice, strength);
    this.#keys.set(digit, act);
    if (!strength) this.#keys.set("t", act);
    const size = Math.abs(strength);
    const name = nameOf(Number(strength > 0), 2);
    const label = strength ? `${name} is ${STRENGTHS[size]}` : "Equally good";
    const text = strength ? [name, el("small", {}, SHORT[size])] : "Equal";
    const button = el(
      "button",
      { type: "button", className: "choice", attrs: { "data-choice": choice, "data-strength": strength, "aria-label": label } },
      el("span", {}, text),
      key(digit),
    );
    button.addEventListener("click", act);
    return button;
  }

  #drawRanking() {
    this.ranking = new Ranking(this.count, () => this.ranking && this.setLive(this.isLive));
    const submit = this.#button("ranks", ["Enter"], ["Submit", key("Enter")]);
    submit.classList.add("side", "submit");
    for (let place = 0; place < this.count; place += 1) this.#keys.set(String(place + 1), () => this.ranking.press(place));
    this.#keys.set("Backspace", () => this.ranking.back());
    this.#keys.set("=", () => this.ranking.toggleEqual());
    this.row.replaceChildren(
      this.ranking.node,
      ...this.#offered().map((choice) => this.#button(choice, [LETTERS[choice]])),
      submit,
    );
  }

  #drawDetails(drafted) {
    const names = [...Array(this.count).keys()].map((place) => nameOf(place, this.count));
    const groups = this.protocol.aspects.map((aspect, number) => {
      const options = [
        ...names.slice(0, this.count === 2 ? 1 : this.count),
        "Tie",
        ...names.slice(this.count === 2 ? 1 : this.count),
      ];
      const keys = aspectKeys(this.count);
      const radios = options.map((name, place) =>
        pill("", name, { name: `aspect-${number}`, value: name.toLowerCase(), "data-key": keys[place] }, "radio"),
      );
      for (const radio of radios) radio.firstChild.addEventListener("change", drafted);
      return el("fieldset", { attrs: { "data-aspect": aspect } }, el("legend", {}, number ? null : hint("A"), aspect), radios);
    });
    const reason = this.protocol.rationale === "off" ? null : this.#reason(drafted);
    this.details.replaceChildren(...groups, ...(reason ? [reason] : []));
  }

  #reason(drafted) {
    const wanted = this.protocol.rationale === "required";
    this.text = el("textarea", {
      id: "rationale",
      rows: 1,
      maxLength: 4000,
      placeholder: wanted ? "Why? (wanted)" : "Why? (optional)",
      attrs: { "aria-required": String(wanted) },
    });
    this.text.addEventListener("input", drafted);
    return el("label", { className: "rationale" }, el("span", { className: "soft" }, "Reason ", key("R")), this.text);
  }

  #give(choice, strength = null) {
    if (!this.isLive) return;
    if (choice === "ranks" && !this.ranking.isWhole) return toast("Rank all of them first.");
    if (this.protocol.rationale === "required" && choice !== "skip" && !this.text.value.trim()) {
      this.text.focus();
      return toast("Give a reason first.");
    }
    this.choose({ choice, strength, ranks: choice === "ranks" ? this.ranking.ranks : null, ...this.extras });
  }

  /** What is said beside the choice. */
  get extras() {
    const aspects = {};
    for (const group of this.details.querySelectorAll("fieldset")) {
      const checked = group.querySelector("input:checked");
      if (checked) aspects[group.dataset.aspect] = checked.value;
    }
    const flags = {};
    for (const box of document.querySelectorAll("#stage [data-flag]:checked")) {
      (flags[box.dataset.flag] ??= []).push(Number(box.dataset.place));
    }
    return { aspects, flags, rationale: this.text?.value.trim() ?? "" };
  }

  set extras({ aspects = {}, flags = {}, rationale = "" }) {
    for (const input of this.details.querySelectorAll("fieldset input")) {
      input.checked = aspects[input.closest("fieldset").dataset.aspect] === input.value;
    }
    for (const box of document.querySelectorAll("#stage [data-flag]")) {
      box.checked = flags[box.dataset.flag]?.includes(Number(box.dataset.place)) ?? false;
    }
    if (this.text) this.text.value = rationale;
  }

  /** Mark the choice that stands while it is revised. */
  mark({ choice, strength, ranks }) {
    if (ranks) this.ranking.ranks = ranks;
    for (const button of this.row.querySelectorAll(".choice")) {
      const own = button.dataset.strength === undefined || String(strength) === button.dataset.strength;
      if (button.dataset.choice !== "ranks")
        button.setAttribute("aria-pressed", String(button.dataset.choice === choice && own));
    }
  }

  /** A verdict in words. */
  describe({ choice, strength, ranks }) {
    if (ranks) {
      const order = ranks.map((_, place) => place).sort((a, b) => ranks[a] - ranks[b]);
      return order.map((place, n) => (n ? (ranks[place] === ranks[order[n - 1]] ? " = " : " › ") : "") + (place + 1)).join("");
    }
    return strength ? `${this.#label(choice)}, ${STRENGTHS[Math.abs(strength)]}` : this.#label(choice);
  }

  /** Begin with aspects ("a") or flags ("g"), or write the reason ("r"); say whether that is asked for. */
  say(what) {
    if (what !== "r") return this.marks.begin(what);
    this.text?.focus();
    return Boolean(this.text);
  }
}
