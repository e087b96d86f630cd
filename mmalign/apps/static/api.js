// The server's routes. Faults are of three kinds: unreachable (try again), signed out (sign in, then try again), refused (final).

const PATIENCE_MS = 20000;

export class Unreachable extends Error {}
export class SignedOut extends Error {}
export class Refused extends Error {}

const PASSING = new Set([408, 425, 429, 500, 502, 503, 504]);

export class Api {
  constructor(project) {
    this.base = `/api/projects/${encodeURIComponent(project)}`;
    this.csrf = "";
  }

  /** Fetch the token that changing requests carry, and who is signed in. */
  async session() {
    const session = await this.#ask("/api/session", {});
    this.csrf = session.csrf;
    return session;
  }

  next() {
    return this.#ask(`${this.base}/next`, {});
  }

  guideline() {
    return this.#ask(`${this.base}/guideline`, {});
  }

  /** POST JSON; a token that has aged is fetched anew, once. `isLast`: the page is left, and the browser sends it all the same. */
  async post(action, body, { isLast = false } = {}) {
    const send = () =>
      this.#ask(`${this.base}/${action}`, {
        method: "POST",
        keepalive: isLast,
        headers: { "Content-Type": "application/json", "X-CSRF-Token": this.csrf },
        body: JSON.stringify(body),
      });
    try {
      return await send();
    } catch (fault) {
      if (!(fault instanceof Refused) || fault.status !== 403 || isLast) throw fault;
      await this.session();
      return send();
    }
  }

  async #ask(url, options) {
    let response;
    let body;
    try {
      response = await fetch(url, {
        credentials: "same-origin",
        redirect: "error",
        signal: AbortSignal.timeout(PATIENCE_MS),
        ...options,
      });
      body = await response.json();
    } catch (fault) {
      if (response?.status === 401) throw new SignedOut();
      throw new Unreachable(String(fault));
    }
    if (response.ok) return body;
    if (response.status === 401) throw new SignedOut();
    if (PASSING.has(response.status)) throw new Unreachable(`status ${response.status}`);
    const refusal = new Refused(typeof body.detail === "string" ? body.detail : `status ${response.status}`);
    refusal.status = response.status;
    throw refusal;
  }
}
