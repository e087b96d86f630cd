// The judging page: shows an assignment, takes one verdict on it, shows the next.
//
// What is on screen is known by its assignment and revision, and a verdict bears both. The next one is made and decoded while
// this one is judged, so it is shown without waiting for the server; verdicts go out through the outbox, in order. Keys count
// only once everything was decoded, painted and on screen for a while.

import { Answers } from "./answers.js";
import { Api, Refused, SignedOut, Unreachable } from "./api.js";
import { drawLegend, hasKeys, openKeys, press } from "./commands.js";
import { enlarge, instructions } from "./dialogs.js";
import { announce, byId, el, key, meanwhile, painted, pause, recall, remember, toast, wantsStillness } from "./dom.js";
import { listen } from "./keys.js";
import { askToSignIn, banner, tellBroken, tellFinished, tellProgress, tellSaved } from "./notices.js";
import { Outbox } from "./outbox.js";
import { afresh, prepare } from "./panes.js";
import { allSeen, drawTabs } from "./tabs.js";
import { reachable } from "./texts.js";
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
  mode = "rendered"; // or plain
  isMarked = false; // where two texts differ
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
      changed: () => this.outbox && tellSaved(this.outbox),
    });
    tellSaved(this.outbox);
    await this.outbox.flush();
    await this.refresh();
    setInterval(
      () => document.visibilityState === "visible" && this.phase === "live" && this.api.post("renew", {}).catch(() => {}),
      RENEW_MS,
    );
  }

  /** Ask anew what is to be judged. */
  async refresh() {
    const reply = await this.#patiently(() => this.api.next());
    this.protocol = reply.protocol;
    byId("project").textContent = reply.project.name;
    document.title = `${reply.project.name} · judging`;
    this.#adopt(reply);
  }

  /** The tab is looked at again: another one may have judged this, or given it back. */
  lookUp() {
    if (document.visibilityState === "visible" && this.phase === "live" && this.outbox.isEmpty) this.refresh();
  }

  /** Try until the server is there; say so meanwhile. */
  async #patiently(ask) {
    let end = () => {};
    for (let wait = 250; ; wait = Math.min(wait * 2, 4000)) {
      try {
        const reply = await ask();
        end();
        return reply;
      } catch (fault) {
        end();
        if (fault instanceof SignedOut) askToSignIn();
        else if (fault instanceof Unreachable) end = meanwhile("No connection to the server; trying again.");
        else throw fault;
        await pause(wait);
      }
    }
  }

  /** Go by a reply of the server: what is current, what comes after it. */
  async #adopt({ current, ahead, progress, project }) {
    if (progress) this.#count(progress);
    const now = this.prepared?.shown;
    const isSame = (one) => one && now && one.assignment === now.assignment && one.revision === now.revision;
    const waits = ["loading", "sending", "finished"].includes(this.phase);
    if (!waits && isSame(current)) return this.#prefetch(ahead);
    if (!waits && isSame(ahead)) return this.#prefetch(current);
    if (!current) return this.#finish(project?.open !== false);
    const prepared = this.#prepared(current);
    this.show(prepared);
    await prepared.ready; // the network first brings what is to be seen first
    if (this.prepared === prepared) this.#prefetch(ahead);
  }

  #count(progress) {
    this.judged = progress.judged;
    tellProgress(progress);
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
    if (broken.length) {
      return tellBroken(broken, prepared.panes, () =>
        this.show(prepare(afresh(prepared.shown), this.protocol.flags, this.mode)),
      );
    }
    await painted();
    await allSeen(prepared.panes, () => announce("Swipe to see the others."));
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
    this.unwatch?.();
    this.unwatch = drawTabs(panes);
    if (this.answers?.marks.isOn) this.answers.marks.end();
    this.answers = new Answers({
      shown,
      protocol: this.protocol,
      choose: (verdict) => this.#vote(verdict),
      drafted: () => this.#keepDraft(),
      marking: () => drawLegend(this),
    });
    stage.onchange = () => this.#keepDraft();
    if (prepared.isViewed) {
      let update = () => {};
      this.viewer = new Viewer(stage, panes, () => update());
      update = viewerTools(this.viewer, panes.length === 2);
      update();
    } else {
      this.write(this.mode);
    }
    this.#restore(shown);
    reachable(byId("prompt"));
    drawLegend(this);
  }

  /** Write texts in another way: rendered or plain, where they differ marked or not. */
  write(mode, isMarked = this.isMarked) {
    const { shown, panes } = this.prepared;
    [this.mode, this.isMarked] = [mode, isMarked];
    for (const pane of panes) pane.write(mode, isMarked && Boolean(shown.changes));
    textTools({ mode, isMarked, hasChanges: Boolean(shown.changes) }, (...one) => this.write(...one));
    for (const pane of panes) reachable(pane.figure);
  }

  get #draftKey() {
    return `mmalign-draft:${this.prepared.shown.assignment}:${this.prepared.shown.revision}`;
  }

  #keepDraft() {
    remember("sessionStorage", this.#draftKey, JSON.stringify(this.answers.extras));
  }

  #restore({ earlier }) {
    const draft = recall("sessionStorage", this.#draftKey);
    banner([]);
    if (earlier) {
      this.answers.mark(earlier);
      this.answers.extras = earlier;
      const keep = el("button", { type: "button" }, "Keep it ", key("Esc"));
      keep.addEventListener("click", () => this.keep());
      banner([`You judged this before: ${this.answers.describe(earlier)}. Judge it again, or leave it so.`, keep]);
      announce(`Revising. You judged this before: ${this.answers.describe(earlier)}.`);
    } else {
      const number = this.judged === undefined ? "" : ` ${this.judged + 1}`;
      announce(`Item${number}.${this.prepared.shown.calibration ? " Practice: the answer is told afterwards." : ""}`);
      if (this.prepared.shown.calibration) banner(["Practice: you are told the expected answer after yours."]);
    }
    if (draft) this.answers.extras = JSON.parse(draft);
  }

  #vote(verdict) {
    if (this.phase !== "live") return;
    const { assignment, revision, calibration } = this.prepared.shown;
    this.phase = "sending";
    if (revision === 1) this.judged += 1;
    this.answers.setLive(false);
    remember("sessionStorage", this.#draftKey, null);
    announce(`${this.answers.describe(verdict)}.`);
    performance.mark("vote");
    const body = {
      assignment,
      revision,
      ...verdict,
      dwell_ms: Math.round(performance.now() - this.shownAt),
      app_version: VERSION,
    };
    this.outbox.add("vote", body);
    if (this.ahead && !calibration) this.show(this.ahead);
  }

  #answered(message, reply) {
    if (message.action !== "vote") return;
    if (reply.progress) this.#count(reply.progress);
    if (reply.status === "refused") {
      toast(`Not counted: ${reply.message}.`, { stays: true });
      if (!this.outbox.numVotes) this.#resync();
      return;
    }
    if (reply.status === "duplicate" && !message.resent) toast("This had been judged already; the earlier judgement stands.");
    const isHere = message.body.assignment === this.prepared?.shown.assignment && this.phase === "sending";
    if (reply.feedback && isHere) return this.#tellFeedback(reply);
    if (this.protocol && !this.outbox.numVotes) this.#adopt(reply);
  }

  #refused(message, fault) {
    if (message.action !== "vote") return;
    toast(`Not counted: ${fault.message}.`, { stays: true });
    this.#resync();
  }

  /** Begin anew with what the server says; what was about to be shown is not. */
  #resync() {
    this.#turn += 1;
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
    banner([told, go], right ? "right" : "wrong");
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

  #finish(isOpen) {
    this.#turn += 1;
    this.phase = "finished";
    this.prepared = null;
    this.viewer?.close();
    this.viewer = null;
    delete document.body.dataset.shown;
    tellFinished(isOpen, () => this.refresh());
  }

  /** Show instructions that are new to this browser, before anything is judged by them. */
  async #guide(version) {
    if (version === this.guidelineVersion) return;
    const guideline = await this.#patiently(() => this.api.guideline());
    this.guidelineVersion = version;
    const name = `mmalign-guideline:${this.project}`;
    if (!guideline.text.trim() || recall("localStorage", name) === String(guideline.version)) return;
    await instructions(guideline, { isNew: true });
    remember("localStorage", name, String(guideline.version));
    this.api.post("guideline", { version: guideline.version }).catch(() => {});
  }

  async openInstructions() {
    instructions(await this.#patiently(() => this.api.guideline()));
  }

  /** The page is left: what is held may go to others; coming back gives the same again. */
  leave() {
    if (this.prepared) this.api.post("release", {}, { isLast: true }).catch(() => {});
  }
}

const judge = new Judge(location.pathname.split("/").filter(Boolean).at(-1));
listen((name, shift) => press(judge, name, shift), hasKeys);
byId("undo").addEventListener("click", () => judge.undo());
byId("instructions").addEventListener("click", () => judge.openInstructions());
byId("keys").addEventListener("click", () => openKeys(judge));
document.addEventListener("click", (event) => {
  const button = event.target.closest?.("[data-enlarge]");
  if (button) enlarge(button.firstChild);
});
addEventListener("pagehide", () => judge.leave());
addEventListener("pageshow", (event) => event.persisted && location.reload());
document.addEventListener("visibilitychange", () => judge.lookUp());
addEventListener("beforeunload", (event) => judge.outbox?.failing && judge.outbox.numVotes && event.preventDefault());
judge.start().catch((fault) => toast(`This page cannot go on: ${fault.message}.`, { stays: true }));
