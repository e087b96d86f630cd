// What must reach the server: one message after the other, each until it is answered, through lost networks and restarts.
//
// A message is kept in memory and in the browser's localStorage until its reply is here: it outlives the tab, and whatever page
// of the same person comes next sends it. A vote bears the assignment and the revision that were on screen, so that sending it
// twice, from two tabs even, stores it once.

import { Refused, SignedOut, Unreachable } from "./api.js";
import { namesOf, pause, recall, remember } from "./dom.js";

const FIRST_WAIT_MS = 250;
const LONGEST_WAIT_MS = 4000;

/** A name for this tab's own messages; a tab that is loaded again takes over what it left, as it does of others. */
const ownName = () => `${Date.now()}-${Math.random().toString(36).slice(2)}`;

export class Outbox {
  #waiting = [];
  #sending = null;
  #wake = null;

  /** `name` tells apart projects and people; `send(action, body)` posts; `answered(message, reply)` may throw nothing. */
  constructor({ name, send, answered, refused, changed }) {
    this.prefix = `mmalign-outbox:${name}:`;
    this.storageKey = this.prefix + ownName();
    this.send = send;
    this.answered = answered;
    this.refused = refused;
    this.changed = changed;
    this.failing = null;
    this.#inherit();
    addEventListener("online", () => this.retry());
  }

  /** Take over what other tabs left, and what this one had before it was loaded again; a tab that lives sends its own too. */
  #inherit() {
    const left = namesOf("localStorage", this.prefix);
    this.#waiting = left.flatMap((name) => JSON.parse(recall("localStorage", name) ?? "[]"));
    for (const message of this.#waiting) message.resent = true;
    if (this.#waiting.length) remember("localStorage", this.storageKey, JSON.stringify(this.#waiting));
    for (const name of left) if (name !== this.storageKey) remember("localStorage", name, null);
  }

  /** How many votes the server has not confirmed. */
  get numVotes() {
    return this.#waiting.filter((message) => message.action === "vote").length;
  }

  get isEmpty() {
    return this.#waiting.length === 0;
  }

  add(action, body) {
    this.#waiting.push({ action, body, resent: false });
    this.#keep();
    return this.flush();
  }

  /** Send all that waits; resolves when nothing does. */
  flush() {
    this.#sending ??= this.#drain().finally(() => {
      this.#sending = null;
    });
    return this.#sending;
  }

  /** Try at once what waits for its next attempt. */
  retry() {
    this.#wake?.();
    return this.flush();
  }

  async #drain() {
    let wait = FIRST_WAIT_MS;
    while (this.#waiting.length) {
      const [message] = this.#waiting;
      try {
        const reply = await this.send(message.action, message.body);
        if (reply.status === "refused" && reply.wait_ms && !message.patient) {
          message.patient = true; // the server's clock saw the pair later than ours did
          await pause(reply.wait_ms + 20);
          continue;
        }
        this.#settle(null);
        this.answered(message, reply);
      } catch (fault) {
        if (fault instanceof Refused) {
          this.#settle(null);
          this.refused(message, fault);
        } else {
          message.resent = true;
          await this.#stumble(fault, wait);
          wait = Math.min(wait * 2, LONGEST_WAIT_MS);
          continue;
        }
      }
      wait = FIRST_WAIT_MS;
    }
  }

  #settle(fault) {
    this.failing = fault;
    this.#waiting.shift();
    this.#keep();
  }

  async #stumble(fault, wait) {
    if (!(fault instanceof Unreachable || fault instanceof SignedOut)) throw fault;
    this.failing = fault instanceof SignedOut ? "signed out" : "unreachable";
    this.changed();
    await Promise.race([
      pause(wait),
      new Promise((resolve) => {
        this.#wake = resolve;
      }),
    ]);
    this.#wake = null;
  }

  #keep() {
    remember("localStorage", this.storageKey, this.#waiting.length ? JSON.stringify(this.#waiting) : null);
    this.changed();
  }
}
