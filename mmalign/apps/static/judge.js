// The judging page: shows an assignment, takes one verdict on it, shows the next.
//
// What is on screen is known by its assignment and revision, and a verdict bears both. The next one is made and decoded while
// this one is judged, so it is shown without waiting for the server; verdicts go out through the outbox, in order. Keys count
// only once everything was decoded, painted and on screen for a while.

import { Answers } from "./answers.js";
import { Api, Refused, SignedOut, Unreachable } from "./api.js";
import { enlarge, instructions, keyHelp } from "./dialogs.js";
import { announce, byId, el, key, painted, pause, toast, wantsStillness } from "./dom.js";
import { listen } from "./keys.js";
import { Outbox } from "./outbox.js";
import { allSeen, nameOf, prepare } from "./panes.js";
import { textTools, viewerTools } from "./tools.js";
import { Viewer } from "./viewer.js";

const LEAST_GUARD_MS = 250;
const VERSION = "judge-1";
const RENEW_MS = 120_000;

class Judge {
  phase = "loading"; // showing, guard, live, sending, feedback, finished
  prepared = null;
  ahead = null;
  answers = null;
  viewer = null;
  mode = "rendered";
  guidelineVersion = 0;
  #turn = 0;

  constructor(project) {
    this.project = project;
    this.api = new Api(project);
  }

  async start() {
    const session = await this.#patiently(() => this.api.session());
    this.outbox = new Outbox({
      name: `${this.project}:${session.annotator ?? ""}`,
      send: (action, body) => this.api.post(action, body),
      answered: (message, reply) => this.#answered(message, reply),
      refused: (message, fault) => this.#refused(message, fault),
      changed: () => this.#tellSaved(),
    });
    this.#tellSaved();
    await this.outbox.flush();
    await this.refresh();
    setInterval(() => document.visibilityState === "visible" && this.phase === "live" && this.api.post("renew", {}).catch(() => {}), RENEW_MS);
  }

  /** Ask anew what is to be judged. */
  async refresh() {
    const reply = await this.#patiently(() => this.api.next());
    this.protocol = reply.protocol;
    byId("project").textContent = reply.project.name;
    document.title = `${reply.project.name} · judging`;
    this.#adopt(reply);
  }

  /** Try until the server is there; say so meanwhile. */
  async #patiently(ask) {
    for (let wait = 250; ; wait = Math.min(wait * 2, 4000)) {
      try {
        const reply = await ask();
        toast("");
        return reply;
      } catch (fault) {
        if (fault instanceof SignedOut) this.#askToSignIn();
        else if (fault instanceof Unreachable) toast("No connection to the server; trying again.", { stays: true });
        else throw fault;
        await pause(wait);
      }
    }
  }

  #askToSignIn() {
    const link = el("a", { href: `/login?next=${encodeURIComponent(location.pathname)}` }, "Sign in again");
    this.#banner(["You have been signed out. What you judged is kept in this tab. ", link]);
  }

  /** Go by a reply of the server: what is current, what comes after it. */
  async #adopt({ current, ahead, progress }) {
    if (progress) this.#tellProgress(progress);
    const now = this.prepared?.shown;
    const isSame = (one) => one && now && one.assignment === now.assignment && one.revision === now.revision;
    const waits = ["loading", "sending", "finished"].includes(this.phase);
    if (!waits && isSame(current)) return this.#prefetch(ahead);
    if (!waits && isSame(ahead)) return this.#prefetch(current);
    if (current) await this.show(this.#prepared(current));
    else this.#finish();
    this.#prefetch(ahead);
  }

  #prepared(shown) {
    const known = this.ahead?.shown;
    if (known?.assignment === shown.assignment && known.revision === shown.revision) return this.ahead;
    return prepare(shown, this.protocol.flags, this.mode);
  }

  #prefetch(shown) {
    this.ahead = shown ? this.#prepared(shown) : null;
  }

  /** Put an assignment on screen; it can be judged once all of it was seen. */
  async show(prepared) {
    const turn = ++this.#turn;
    this.phase = "showing";
    this.prepared = prepared;
    if (prepared === this.ahead) this.ahead = null;
    await this.#guide(prepared.shown.guideline_version);
    if (turn !== this.#turn) return;
    this.#draw(prepared);
    let broken = await prepared.ready;
    broken = broken.length ? broken : await this.#decodeAgain(prepared);
    if (turn !== this.#turn) return;
    this.viewer?.refresh();
    if (broken.length) return this.#tellBroken(broken);
    await painted();
    await allSeen(byId("stage"), prepared.panes, (left) => left && announce("Swipe to see the others."));
    if (turn !== this.#turn) return;
    this.shownAt = performance.now();
    this.phase = "guard";
    this.outbox.add("displayed", { assignment: prepared.shown.assignment });
    document.body.dataset.shown = prepared.shown.assignment;
    await pause(Math.max(LEAST_GUARD_MS, this.protocol.min_dwell_ms + 20));
    if (turn !== this.#turn) return;
    this.phase = "live";
    this.answers.setLive(true);
  }

  /** Decoded pictures may have been dropped while they waited: decode those on screen once more. */
  async #decodeAgain({ panes }) {
    const found = await Promise.allSettled(panes.map(({ node }) => node?.decode?.()));
    for (const { node } of panes) if (node?.play && !wantsStillness()) node.play().catch(() => {});
    return found.flatMap((one, place) => (one.status === "rejected" ? [place] : []));
  }

  #draw(prepared) {
    const { shown, panes } = prepared;
    this.viewer?.close();
    this.viewer = null;
    const stage = byId("stage");
    const columns = { 4: 2, 5: 3, 6: 3 }[panes.length] ?? panes.length;
    stage.className = "stage";
    stage.style.setProperty("--columns", columns);
    stage.replaceChildren(...panes.map((pane) => pane.figure));
    stage.scrollLeft = 0;
    byId("prompt").replaceChildren(...prepared.prompt);
    byId("prompt").hidden = prepared.prompt.length === 0;
    byId("prompt").scrollTop = shown.prompt.turns.length > 1 ? byId("prompt").scrollHeight : 0;
    this.#tabs(panes);
    this.answers = new Answers({ shown, protocol: this.protocol, choose: (verdict) => this.#vote(verdict), drafted: () => this.#keepDraft() });
    stage.onchange = () => this.#keepDraft();
    if (prepared.isViewed) {
      let update = () => {};
      this.viewer = new Viewer(stage, panes, () => update());
      update = viewerTools(this.viewer, panes.length === 2);
      update();
    } else {
      this.#write(this.mode);
    }
    this.#restore(shown);
    this.#drawLegend();
  }

  /** On a narrow screen: which pane is seen, and which has not been yet. */
  #tabs(panes) {
    document.querySelector(".tabs")?.remove();
    const tabs = panes.map((pane, place) => {
      const tab = el("button", { type: "button", className: "unseen", attrs: { "aria-pressed": "false" } }, nameOf(place, panes.length));
      tab.addEventListener("click", () => pane.figure.scrollIntoView({ inline: "center", block: "nearest", behavior: wantsStillness() ? "auto" : "smooth" }));
      return tab;
    });
    byId("stage").before(el("div", { className: "tabs", attrs: { role: "group", "aria-label": "Show" } }, tabs));
    this.watcher?.disconnect();
    this.watcher = new IntersectionObserver((entries) => {
      for (const { target, intersectionRatio } of entries) {
        const tab = tabs[target.dataset.place];
        tab.setAttribute("aria-pressed", String(intersectionRatio > 0.5));
        if (intersectionRatio > 0.5) tab.classList.remove("unseen");
      }
    }, { root: byId("stage"), threshold: [0.51] });
    for (const pane of panes) this.watcher.observe(pane.figure);
  }

  /** Write texts in another way. */
  #write(mode) {
    const { shown, panes } = this.prepared;
    this.mode = mode;
    const kept = mode === "differences" && !shown.changes ? "rendered" : mode;
    for (const pane of panes) pane.write(kept);
    textTools(kept, Boolean(shown.changes), (one) => this.#write(one));
  }

  get #draftKey() {
    return `mmalign-draft:${this.prepared.shown.assignment}:${this.prepared.shown.revision}`;
  }

  #keepDraft() {
    try {
      sessionStorage.setItem(this.#draftKey, JSON.stringify(this.answers.extras));
    } catch {
      // storage is full or forbidden: the draft lives as long as the page
    }
  }

  #restore({ earlier }) {
    const draft = sessionStorage.getItem(this.#draftKey);
    this.#banner([]);
    if (earlier) {
      this.answers.mark(earlier);
      this.answers.extras = earlier;
      const keep = el("button", { type: "button" }, "Keep it ", key("Esc"));
      keep.addEventListener("click", () => this.keep());
      this.#banner([`You judged this before: ${this.answers.describe(earlier)}. Judge it again, or leave it so.`, keep]);
      announce(`Revising. You judged this before: ${this.answers.describe(earlier)}.`);
    } else {
      const number = this.judged === undefined ? "" : ` ${this.judged + 1}`;
      announce(`Item${number}.${this.prepared.shown.calibration ? " Practice: the answer is told afterwards." : ""}`);
      if (this.prepared.shown.calibration) this.#banner(["Practice: you are told the expected answer after yours."]);
    }
    if (draft) this.answers.extras = JSON.parse(draft);
  }

  #vote(verdict) {
    if (this.phase !== "live") return;
    const { assignment, revision, calibration } = this.prepared.shown;
    this.phase = "sending";
    this.answers.setLive(false);
    sessionStorage.removeItem(this.#draftKey);
    announce(`${this.answers.describe(verdict)}.`);
    performance.mark("vote");
    const body = { assignment, revision, ...verdict, dwell_ms: Math.round(performance.now() - this.shownAt), app_version: VERSION };
    this.outbox.add("vote", body);
    if (this.ahead && !calibration) this.show(this.ahead);
  }

  #answered(message, reply) {
    if (message.action !== "vote") return;
    if (reply.progress) this.#tellProgress(reply.progress);
    if (reply.status === "refused") {
      toast(`Not counted: ${reply.message}.`, { stays: true });
      if (!this.outbox.numVotes) this.#resync();
      return;
    }
    if (reply.status === "duplicate" && !message.resent) toast("This had been judged already; the earlier judgement stands.");
    const isHere = message.body.assignment === this.prepared?.shown.assignment && this.phase === "sending";
    if (reply.feedback && isHere) return this.#tellFeedback(reply);
    if (!this.outbox.numVotes) this.#adopt(reply);
  }

  #refused(message, fault) {
    if (message.action !== "vote") return;
    toast(`Not counted: ${fault.message}.`, { stays: true });
    this.#resync();
  }

  #resync() {
    this.phase = "loading";
    this.ahead = null;
    this.refresh();
  }

  #tellFeedback(reply) {
    this.phase = "feedback";
    const { right, expected, explanation } = reply.feedback;
    const told = `${right ? "As expected" : "Expected"}: ${this.answers.describe(expected)}.${explanation ? ` ${explanation}` : ""}`;
    this.answers.mark(expected);
    const go = el("button", { type: "button", className: "main" }, "Go on ", key("Enter"));
    this.goOn = () => {
      this.phase = "sending";
      this.#adopt(reply);
    };
    go.addEventListener("click", this.goOn, { once: true });
    this.#banner([told, go], right ? "right" : "wrong");
    announce(told);
  }

  async undo() {
    if (!["live", "guard", "finished", "showing"].includes(this.phase)) return;
    if (this.outbox.failing) return toast("Undo needs the server; it cannot be reached now.");
    await this.outbox.flush();
    this.#reply(await this.#asked("undo"), "There is nothing to undo.");
  }

  /** Leave as it was what was opened again. */
  async keep() {
    if (!this.prepared?.shown.earlier || !["live", "guard"].includes(this.phase)) return;
    this.#reply(await this.#asked("keep"), "");
  }

  async #asked(action) {
    try {
      return await this.api.post(action, {});
    } catch (fault) {
      toast(fault instanceof Refused ? `${fault.message}.` : "The server cannot be reached now; please try again.");
      return null;
    }
  }

  #reply(reply, otherwise) {
    if (!reply) return;
    const now = this.prepared?.shown;
    const isSame = reply.current?.assignment === now?.assignment && reply.current?.revision === now?.revision;
    if (isSame && otherwise) toast(otherwise);
    if (!isSame || this.phase === "finished") {
      this.phase = "loading";
      this.#adopt(reply);
    }
  }

  #finish() {
    this.#turn += 1;
    this.phase = "finished";
    this.prepared = null;
    delete document.body.dataset.shown;
    this.viewer?.close();
    this.viewer = null;
    document.querySelector(".tabs")?.remove();
    byId("prompt").hidden = true;
    for (const id of ["view", "details", "choices", "legend"]) byId(id).replaceChildren();
    const again = el("button", { type: "button", className: "main" }, "Look again");
    again.addEventListener("click", () => this.refresh());
    const told = el("div", { className: "finished" }, el("h2", {}, "Nothing left to judge"), el("p", { className: "soft" }, "Thank you. There may be more when others add items or give some back."), again);
    byId("stage").className = "stage";
    byId("stage").replaceChildren(told);
    this.#banner([]);
    announce("Nothing left to judge.");
  }

  #tellBroken(places) {
    for (const place of places) {
      const { figure, frame } = this.prepared.panes[place] ?? {};
      const retry = el("button", { type: "button" }, "Load again");
      retry.addEventListener("click", () => this.show(prepare(this.prepared.shown, this.protocol.flags, this.mode)));
      (frame ?? figure ?? byId("prompt")).replaceChildren(el("div", { className: "broken" }, "This picture could not be loaded.", retry));
    }
    announce("A picture could not be loaded.");
  }

  /** Show instructions that are new to this browser, before anything is judged by them. */
  async #guide(version) {
    if (version === this.guidelineVersion) return;
    const guideline = await this.#patiently(() => this.api.guideline());
    this.guidelineVersion = version;
    const name = `mmalign-guideline:${this.project}`;
    if (!guideline.text.trim() || localStorage.getItem(name) === String(guideline.version)) return;
    await instructions(guideline, { isNew: true });
    localStorage.setItem(name, String(guideline.version));
    this.api.post("guideline", { version: guideline.version }).catch(() => {});
  }

  async openInstructions() {
    instructions(await this.#patiently(() => this.api.guideline()));
  }

  #banner(content, kind = "") {
    const banner = byId("banner");
    banner.className = `banner ${kind}`;
    banner.replaceChildren(...content);
    banner.hidden = content.length === 0;
  }

  #tellProgress({ judged, total }) {
    this.judged = judged;
    byId("bar").max = Math.max(total ?? judged, 1);
    byId("bar").value = judged;
    byId("bar").hidden = !total;
    byId("count").textContent = total ? `${judged} of ${total}` : `${judged} judged`;
  }

  #tellSaved() {
    const { numVotes, failing } = this.outbox ?? {};
    const place = byId("saved");
    const told = `${numVotes} judgement${numVotes === 1 ? "" : "s"} kept here`;
    place.classList.toggle("failing", Boolean(failing && numVotes));
    place.textContent = failing && numVotes ? `No connection · ${told}` : numVotes ? "Saving …" : "";
    if (failing === "signed out") this.#askToSignIn();
  }

  get viewKeys() {
    if (this.viewer) {
      const pair = [[["X"], "blink"], [["D"], "difference"]];
      return [[["Z"], "fit or 1:1"], [["+", "−"], "zoom"], [["⇧", "arrows"], "move"], ...(this.prepared.panes.length === 2 ? pair : [])];
    }
    return [[["P"], "plain text"], ...(this.prepared?.shown.changes ? [[["D"], "differences"]] : [])];
  }

  #drawLegend() {
    const lines = [...this.answers.legend, ...this.viewKeys, [["U"], "undo"]];
    byId("legend").replaceChildren(...lines.map(([names, meaning]) => el("span", {}, ...names.flatMap((name) => [key(name), " "]), meaning)));
  }

  openKeys() {
    const focus = [[["R"], "write a reason (Esc leaves it)"], [["A"], "aspects"], [["G"], "flags"]];
    const page = [[["U"], "undo, or Ctrl Z"], [["Esc"], "keep what is being revised"], [["I"], "instructions"], [["?"], "keys"]];
    const judging = this.answers ? [["Judge", this.answers.legend], ["View", this.viewKeys]] : [];
    keyHelp([...judging, ["Details", focus], ["Page", page]], this.hasKeys, (isOn) => localStorage.setItem("mmalign-keys", isOn ? "on" : "off"));
  }

  get hasKeys() {
    return localStorage.getItem("mmalign-keys") !== "off";
  }

  /** Do what a key means; say whether it means anything. */
  press(name, shift) {
    if (this.phase === "feedback" && (name === "Enter" || name === " ")) return this.goOn() ?? true;
    if (name === "Escape") return this.keep() ?? true;
    if (shift && name.startsWith("Arrow")) return this.#pan(name);
    const page = { u: () => this.undo(), undo: () => this.undo(), i: () => this.openInstructions(), "?": () => this.openKeys() }[name];
    if (page) return page() ?? true;
    if (!this.prepared) return false;
    if (["a", "g", "r"].includes(name)) return this.answers.focus(name);
    return this.answers.press(name) || (this.viewer ? this.#pressViewer(name) : this.#pressTexts(name));
  }

  #pan(name) {
    const [dx, dy] = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[name];
    this.viewer?.pan(dx, dy);
    return Boolean(this.viewer);
  }

  #pressViewer(name) {
    const { viewer } = this;
    const acts = { z: () => viewer.toggleZoom(), "+": () => viewer.step(1), "=": () => viewer.step(1), "-": () => viewer.step(-1), x: () => viewer.toggle("blink"), d: () => viewer.toggle("difference"), " ": () => viewer.flip() };
    acts[name]?.();
    return name in acts;
  }

  #pressTexts(name) {
    const mode = { p: "plain", d: "differences" }[name];
    if (mode) this.#write(this.mode === mode ? "rendered" : mode);
    return Boolean(mode);
  }

  /** The page is left: what is held may go to others; coming back gives the same again. */
  leave() {
    if (this.prepared) this.api.post("release", {}, { keepalive: true }).catch(() => {});
  }
}

function setTheme() {
  const root = document.documentElement;
  const next = { undefined: "light", light: "dark", dark: "" }[root.dataset.theme];
  if (next) root.dataset.theme = next;
  else delete root.dataset.theme;
  localStorage.setItem("mmalign-theme", next);
  nameTheme();
}

function nameTheme() {
  byId("theme").firstChild.textContent = { light: "Light", dark: "Dark" }[document.documentElement.dataset.theme] ?? "Auto";
  byId("theme").setAttribute("aria-label", `Theme: ${byId("theme").textContent}`);
}

const judge = new Judge(location.pathname.split("/").filter(Boolean).at(-1));
listen((name, shift) => judge.press(name, shift), () => judge.hasKeys);
byId("undo").addEventListener("click", () => judge.undo());
byId("instructions").addEventListener("click", () => judge.openInstructions());
byId("keys").addEventListener("click", () => judge.openKeys());
byId("theme").addEventListener("click", setTheme);
nameTheme();
document.addEventListener("click", (event) => {
  const button = event.target.closest?.("[data-enlarge]");
  if (button) enlarge(button.firstChild);
});
addEventListener("pagehide", () => judge.leave());
addEventListener("pageshow", (event) => event.persisted && location.reload());
addEventListener("beforeunload", (event) => judge.outbox?.failing && judge.outbox.numVotes && event.preventDefault());
judge.start().catch((fault) => toast(`This page cannot go on: ${fault.message}.`, { stays: true }));
