// The order of three to six candidates, best first: by digits, by dragging, by buttons. Neighbours may be equal.

import { announce, el } from "./dom.js";

export class Ranking {
  #order = []; // places of candidates from 0, best first
  #equal = new Set(); // places in the order whose candidate is as good as the one before

  constructor(count, changed) {
    this.count = count;
    this.changed = changed;
    this.row = el("ol", { className: "order", attrs: { "aria-label": "Order, best first" } });
    this.rest = el("div", { className: "unranked", attrs: { role: "group", "aria-label": "Not ranked yet" } });
    this.node = el(
      "div",
      { className: "ranking" },
      el("span", { className: "soft edge" }, "Best"),
      this.row,
      el("span", { className: "soft edge" }, "Worst"),
      this.rest,
    );
    this.#draw();
  }

  get isWhole() {
    return this.#order.length === this.count;
  }

  /** One rank a candidate in the order of the screen, 1 is best; null until all are ranked. */
  get ranks() {
    if (!this.isWhole) return null;
    const ranks = new Array(this.count);
    let rank = 0;
    this.#order.forEach((candidate, place) => {
      if (!this.#equal.has(place)) rank = place + 1;
      ranks[candidate] = rank;
    });
    return ranks;
  }

  set ranks(ranks) {
    this.#order = ranks.map((_, candidate) => candidate).sort((a, b) => ranks[a] - ranks[b]);
    this.#equal = new Set(
      [...this.#order.keys()].filter((place) => place && ranks[this.#order[place]] === ranks[this.#order[place - 1]]),
    );
    this.#draw();
  }

  /** Rank a candidate next; one that is ranked already goes back among the others. */
  press(candidate) {
    if (candidate >= this.count) return false;
    const place = this.#order.indexOf(candidate);
    if (place >= 0) this.#remove(place);
    else this.#order.push(candidate);
    this.#draw();
    announce(place >= 0 ? `${candidate + 1} is not ranked.` : `${candidate + 1} is number ${this.#order.length}.`);
    return true;
  }

  /** Take back the last one ranked. */
  back() {
    if (!this.#order.length) return false;
    this.#remove(this.#order.length - 1);
    this.#draw();
    return true;
  }

  /** Make the last one ranked equal to the one before, or worse again. */
  toggleEqual(place = this.#order.length - 1) {
    if (place < 1) return false;
    if (!this.#equal.delete(place)) this.#equal.add(place);
    this.#draw();
    announce(
      `${this.#order[place] + 1} is ${this.#equal.has(place) ? "as good as" : "worse than"} ${this.#order[place - 1] + 1}.`,
    );
    return true;
  }

  #remove(place) {
    this.#order.splice(place, 1);
    this.#equal = new Set(
      [...this.#equal]
        .filter((p) => p !== place)
        .map((p) => (p > place ? p - 1 : p))
        .filter((p) => p > 0),
    );
  }

  /** Put a candidate at a place of the order; what was equal there no longer is. */
  #place(candidate, target) {
    const from = this.#order.indexOf(candidate);
    if (from === target) return;
    if (from >= 0) this.#remove(from);
    const place = Math.min(target, this.#order.length);
    this.#order.splice(place, 0, candidate);
    this.#equal = new Set([...this.#equal].filter((p) => p !== place).map((p) => (p > place ? p + 1 : p)));
    this.#draw(candidate);
  }

  #draw(focused = null) {
    const chips = this.#order.flatMap((candidate, place) => [
      place ? el("li", { className: "between" }, this.#sign(place)) : null,
      el("li", {}, this.#chip(candidate, place)),
    ]);
    this.row.replaceChildren(...chips.filter(Boolean));
    const others = [...Array(this.count).keys()].filter((candidate) => !this.#order.includes(candidate));
    this.rest.replaceChildren(...others.map((candidate) => this.#chip(candidate, -1)));
    this.rest.hidden = others.length === 0;
    if (focused !== null) this.row.querySelector(`[data-candidate="${focused}"]`)?.focus();
    this.changed();
  }

  #sign(place) {
    const equal = this.#equal.has(place);
    const sign = el(
      "button",
      {
        type: "button",
        className: "sign",
        attrs: {
          "aria-pressed": String(equal),
          "aria-label": `${this.#order[place] + 1} is as good as ${this.#order[place - 1] + 1}`,
        },
      },
      equal ? "=" : "›",
    );
    sign.addEventListener("click", () => this.toggleEqual(place));
    return sign;
  }

  #chip(candidate, place) {
    const where = place < 0 ? "not ranked" : `number ${place + 1}`;
    const chip = el(
      "button",
      {
        type: "button",
        className: "chip",
        attrs: { "data-candidate": candidate, "aria-label": `Candidate ${candidate + 1}, ${where}` },
      },
      String(candidate + 1),
    );
    chip.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (!step || place < 0 || place + step < 0) return;
      event.preventDefault();
      event.stopPropagation();
      this.#place(candidate, place + step);
    });
    this.#makeDraggable(chip, candidate);
    return chip;
  }

  #makeDraggable(chip, candidate) {
    let start = null;
    let moved = false;
    chip.addEventListener("pointerdown", (event) => {
      [start, moved] = [event, false];
      chip.setPointerCapture(event.pointerId);
    });
    chip.addEventListener("pointermove", (event) => {
      if (!start) return;
      const [dx, dy] = [event.clientX - start.clientX, event.clientY - start.clientY];
      moved ||= Math.hypot(dx, dy) > 6;
      chip.classList.toggle("dragged", moved);
      if (moved) chip.style.translate = `${dx}px ${dy}px`;
    });
    const stop = (dropped) => (event) => {
      start = null;
      chip.classList.remove("dragged");
      chip.style.translate = "";
      if (moved && dropped) this.#drop(candidate, event.clientX);
    };
    chip.addEventListener("pointerup", stop(true));
    chip.addEventListener("pointercancel", stop(false));
    chip.addEventListener("click", (event) => {
      if (!moved || event.detail === 0) this.press(candidate);
      moved = false;
    });
  }

  #drop(candidate, x) {
    const others = [...this.row.querySelectorAll(".chip")].filter((chip) => chip.dataset.candidate !== String(candidate));
    const place = others.filter((chip) => {
      const box = chip.getBoundingClientRect();
      return box.left + box.width / 2 < x;
    }).length;
    this.#place(candidate, place);
  }
}
