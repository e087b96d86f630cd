// The list of projects, and one's own account. Names are written as text, never as HTML.

const byId = (id) => document.getElementById(id);
let csrf = "";

function el(name, properties, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

async function ask(url, options = {}) {
  const reply = await fetch(url, options);
  if (reply.status === 401) {
    location.replace("/login?next=/");
    return new Promise(() => {});
  }
  const body = await reply.json();
  if (!reply.ok) throw new Error(typeof body.detail === "string" ? body.detail : `status ${reply.status}`);
  return body;
}

function post(url, body) {
  return ask(url, { method: "POST", headers: { "Content-Type": "application/json", "X-CSRF-Token": csrf }, body: JSON.stringify(body) });
}

function card({ id, name, kind, open, progress }) {
  const title = open ? el("a", { href: `/judge/${id}` }, name) : el("span", {}, name);
  const share = Math.round(progress.share * 100);
  const told = `${kind === "image" ? "Images" : "Texts"} · you judged ${progress.judged} of ${progress.total} · ${share} % of all votes are in`;
  const bar = el("progress", { max: Math.max(progress.total, 1), value: progress.judged });
  bar.setAttribute("aria-label", `Your progress in ${name}`);
  return el("li", { className: "card" }, el("h2", {}, title), bar, el("p", { className: "soft" }, open ? told : `${told} · closed`));
}

async function start() {
  const session = await ask("/api/session");
  csrf = session.csrf;
  byId("who").textContent = session.accounts ? session.name : "";
  byId("admin").hidden = session.role === "annotator";
  byId("leave").hidden = byId("change").hidden = !session.accounts;
  const { projects } = await ask("/api/projects");
  byId("projects").replaceChildren(...projects.map(card));
  byId("told").textContent = projects.length ? "" : "There is nothing to judge yet.";
}

async function changePassword(event) {
  event.preventDefault();
  try {
    csrf = (await post("/api/password", { old: byId("old").value, new: byId("new").value })).csrf;
    byId("dialog").close();
    byId("told").textContent = "The password is changed; other browsers are signed out.";
  } catch (fault) {
    byId("fault").textContent = fault.message;
  }
}

byId("leave").addEventListener("click", async () => {
  await post("/api/logout", {});
  location.replace("/login");
});
byId("change").addEventListener("click", () => {
  byId("form").reset();
  byId("fault").textContent = "";
  byId("dialog").showModal();
});
byId("cancel").addEventListener("click", () => byId("dialog").close());
byId("form").addEventListener("submit", changePassword);
start().catch((fault) => {
  byId("told").textContent = `The projects cannot be shown: ${fault.message}.`;
});
