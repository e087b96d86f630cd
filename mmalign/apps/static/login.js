// Signing in; who is signed in already goes on to where they wanted.

const byId = (id) => document.getElementById(id);

/** Where to go afterwards: a path of this server, whatever the address says. */
function wanted() {
  const path = new URLSearchParams(location.search).get("next") ?? "/";
  const there = new URL(path, location.origin);
  return path.startsWith("/") && there.origin === location.origin ? there.pathname + there.search : "/";
}

async function signIn(event) {
  event.preventDefault();
  byId("go").disabled = true;
  byId("told").textContent = "";
  try {
    const reply = await fetch("/api/login", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({ name: byId("name").value, password: byId("password").value }),
    });
    if (reply.ok) return location.replace(wanted());
    const { detail } = await reply.json();
    byId("told").textContent = typeof detail === "string" ? `${detail[0].toUpperCase()}${detail.slice(1)}.` : "That did not work.";
    byId("password").value = "";
    byId("password").focus();
  } catch {
    byId("told").textContent = "The server cannot be reached.";
  }
  byId("go").disabled = false;
}

byId("form").addEventListener("submit", signIn);
const session = await fetch("/api/session").catch(() => null);
if (session?.ok) {
  const { role } = await session.json();
  const mayGo = !wanted().startsWith("/admin") || role !== "annotator";
  if (mayGo) location.replace(wanted());
  else byId("told").textContent = "You are signed in, but this page is for reviewers and administrators.";
}
byId("name").focus();
