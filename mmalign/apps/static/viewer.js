// Pictures side by side under one view: zoom and pan move all of them; blink and difference lay a pair on top of each other.
//
// A picture is laid out in CSS pixels by width, height, left and top (no transform), so that at 1:1 one of its pixels is one
// pixel of the screen, also where the screen has several per CSS pixel.

import { el, wantsStillness } from "./dom.js";

const STEPS = [0.125, 0.25, 0.5, 1, 2, 3, 4, 6, 8, 12, 16];
const BLINK_MS = 600;
const PAN_STEP = 0.18; // of the visible part
const GAINS = [1, 8];

/**
 * One picture, animation or video as an element; `ready` resolves when it can be painted at once. Browsers remember an address
 * that failed: `media.attempt` makes another one of it.
 */
export function picture(media, alt) {
  const src = media.attempt ? `${media.src}?attempt=${media.attempt}` : media.src;
  if (media.kind === "video") {
    const video = el("video", { muted: true, loop: true, playsInline: true, preload: "auto", src });
    video.setAttribute("aria-label", alt);
    const ready = new Promise((resolve, reject) => {
      video.addEventListener("loadeddata", resolve, { once: true });
      video.addEventListener("error", () => reject(new Error("no video")), { once: true });
    });
    video.load();
    return { node: video, ready };
  }
  const image = el("img", { alt, draggable: false, decoding: "sync", src });
  return { node: image, ready: image.decode() };
}

export class Viewer {
  #zoom = "fit"; // or pixels of the screen for one of the picture
  #centre = [0.5, 0.5];
  #overlay = null; // "blink" | "difference"
  #front = 0;
  #timer = 0;
  #pointers = new Map();

  /** `panes`: [{frame, node}], left first; `changed` is called when the view does. */
  constructor(stage, panes, changed) {
    this.stage = stage;
    this.panes = panes;
    this.changed = changed;
    this.gain = GAINS[0];
    for (const pane of panes) this.#hear(pane);
    this.observer = new ResizeObserver(() => this.#layOut());
    for (const pane of panes) this.observer.observe(pane.frame);
    this.#layOut();
  }

  get overlay() {
    return this.#overlay;
  }

  get front() {
    return this.#front;
  }

  /** What the view is, in words. */
  get zoomText() {
    return this.#zoom === "fit" ? "Fit" : `${Math.round(this.#zoom * 100)} %`;
  }

  get isFit() {
    return this.#zoom === "fit";
  }

  /** Lay out anew, as when a picture has its size only now. */
  refresh() {
    this.#layOut();
  }

  close() {
    clearInterval(this.#timer);
    this.observer.disconnect();
  }

  toggleZoom(point = [0.5, 0.5]) {
    this.#centre = point;
    this.#set(this.#zoom === "fit" ? 1 : "fit");
  }

  fit() {
    this.#set("fit");
  }

  actual() {
    this.#set(1);
  }

  step(direction) {
    const now = this.#scale(this.panes[0]);
    const next = direction > 0 ? STEPS.find((s) => s > now * 1.01) : STEPS.findLast((s) => s < now * 0.99);
    if (next) this.#set(next);
  }

  /** Move by shares of what is visible. */
  pan(dx, dy) {
    const { frame } = this.panes[0];
    const [width, height] = this.#size(this.panes[0]);
    this.#centre = [
      this.#centre[0] + (dx * PAN_STEP * frame.clientWidth) / width,
      this.#centre[1] + (dy * PAN_STEP * frame.clientHeight) / height,
    ];
    this.#layOut();
  }

  /** Lay the pair on top of each other, or side by side again. Difference has two strengths. */
  toggle(overlay) {
    if (this.panes.length !== 2) return;
    const stronger = overlay === "difference" && this.#overlay === overlay && this.gain !== GAINS.at(-1);
    this.gain = stronger ? GAINS.at(-1) : GAINS[0];
    this.#overlay = this.#overlay === overlay && !stronger ? null : overlay;
    this.#front = 0;
    clearInterval(this.#timer);
    if (this.#overlay === "blink" && !wantsStillness()) this.#timer = setInterval(() => this.#flip(), BLINK_MS);
    this.#layOut();
  }

  /** Show the other one of a blinking pair, from now on by hand. */
  flip() {
    if (this.#overlay !== "blink") return false;
    clearInterval(this.#timer);
    this.#flip();
    return true;
  }

  #flip() {
    this.#front = 1 - this.#front;
    this.#dress();
  }

  #set(zoom) {
    this.#zoom = zoom;
    if (zoom === "fit") this.#centre = [0.5, 0.5];
    this.#layOut();
  }

  #natural({ node }) {
    return [node.naturalWidth || node.videoWidth || 1, node.naturalHeight || node.videoHeight || 1];
  }

  #scale(pane) {
    if (this.#zoom !== "fit") return this.#zoom;
    const [width, height] = this.#natural(pane);
    return Math.min(pane.frame.clientWidth / width, pane.frame.clientHeight / height) * devicePixelRatio;
  }

  #size(pane) {
    return this.#natural(pane).map((pixels) => (pixels * this.#scale(pane)) / devicePixelRatio);
  }

  #layOut() {
    const grid = Number.isInteger(devicePixelRatio) ? 1 : devicePixelRatio; // places of whole pixels, of the page and the screen
    const boxes = this.panes.map((pane) => [pane, this.#size(pane), [pane.frame.clientWidth, pane.frame.clientHeight]]);
    for (const axis of [0, 1]) {
      const half = Math.min(0.5, ...boxes.map(([, size, box]) => box[axis] / size[axis] / 2));
      this.#centre[axis] = Math.min(Math.max(this.#centre[axis], half), 1 - half);
    }
    for (const [{ frame, node }, size, box] of boxes) {
      const { left: x, top: y } = frame.getBoundingClientRect();
      const origin = [x, y];
      const [left, top] = [0, 1].map((axis) => {
        const free = box[axis] - size[axis];
        const place = free >= 0 ? free / 2 : Math.min(0, Math.max(free, box[axis] / 2 - this.#centre[axis] * size[axis]));
        return Math.round((origin[axis] + place) * grid) / grid - origin[axis];
      });
      Object.assign(node.style, { width: `${size[0]}px`, height: `${size[1]}px`, left: `${left}px`, top: `${top}px` });
    }
    this.#dress();
  }

  #dress() {
    const { classList } = this.stage;
    classList.toggle("overlaid", this.#overlay !== null);
    classList.toggle("blink", this.#overlay === "blink");
    classList.toggle("difference", this.#overlay === "difference");
    classList.toggle("strong", this.gain > 1);
    classList.toggle("zoomed", this.#zoom !== "fit");
    classList.toggle("pixels", this.#zoom !== "fit" ? this.#zoom >= 2 : this.#natural(this.panes[0])[0] <= 128);
    this.panes.forEach((pane, place) => pane.frame.classList.toggle("front", place === this.#front));
    this.changed();
  }

  #hear(pane) {
    const { frame } = pane;
    frame.addEventListener(
      "wheel",
      (event) => {
        event.preventDefault();
        this.#about(pane, event, this.#scale(pane) * Math.exp(-event.deltaY * 0.0022));
      },
      { passive: false },
    );
    frame.addEventListener("dblclick", (event) => this.toggleZoom(this.#pointOf(pane, event)));
    frame.addEventListener("pointerdown", (event) => {
      if (event.button !== 0 || event.target.closest("button")) return;
      if (!this.isFit || event.pointerType === "mouse") frame.setPointerCapture(event.pointerId);
      this.#pointers.set(event.pointerId, event);
    });
    frame.addEventListener("pointermove", (event) => this.#drag(pane, event));
    for (const name of ["pointerup", "pointercancel", "lostpointercapture"]) {
      frame.addEventListener(name, (event) => this.#pointers.delete(event.pointerId));
    }
  }

  #drag(pane, event) {
    const before = this.#pointers.get(event.pointerId);
    if (!before) return;
    const [width, height] = this.#size(pane);
    if (this.#pointers.size === 2) {
      const other = [...this.#pointers.values()].find((pointer) => pointer.pointerId !== event.pointerId);
      const apart = (p) => Math.hypot(p.clientX - other.clientX, p.clientY - other.clientY);
      this.#about(pane, event, (this.#scale(pane) * apart(event)) / Math.max(apart(before), 1));
    } else if (!this.isFit) {
      this.#centre = [
        this.#centre[0] - (event.clientX - before.clientX) / width,
        this.#centre[1] - (event.clientY - before.clientY) / height,
      ];
      this.#layOut();
    }
    this.#pointers.set(event.pointerId, event);
  }

  /** Where in the picture the pointer is, from 0 to 1. */
  #pointOf({ node }, event) {
    const box = node.getBoundingClientRect();
    return [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height];
  }

  /** Zoom so that the point below the pointer stays where it is; no smaller than fitting. */
  #about(pane, event, scale) {
    const point = this.#pointOf(pane, event);
    const box = pane.frame.getBoundingClientRect();
    const [width, height] = this.#natural(pane);
    const fitting = Math.min(box.width / width, box.height / height) * devicePixelRatio;
    if (scale <= fitting) return this.#set("fit");
    const zoom = Math.min(scale, STEPS.at(-1));
    const [x, y] = [event.clientX - box.left - box.width / 2, event.clientY - box.top - box.height / 2];
    this.#centre = [point[0] - (x * devicePixelRatio) / (width * zoom), point[1] - (y * devicePixelRatio) / (height * zoom)];
    this.#set(zoom);
  }
}
