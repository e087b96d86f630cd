// Before the first paint: the theme that was chosen here, if any; without one the system's. And the button that chooses.
(() => {
  const root = document.documentElement;
  const names = { light: "Light", dark: "Dark" };
  try {
    const theme = localStorage.getItem("mmalign-theme");
    if (theme in names) root.dataset.theme = theme;
  } catch {
    // storage is forbidden: the system's theme it is
  }
  document.addEventListener("DOMContentLoaded", () => {
    const button = document.getElementById("theme");
    if (!button) return;
    const tell = () => {
      const name = names[root.dataset.theme] ?? "Auto";
      button.firstElementChild.textContent = name;
      button.setAttribute("aria-label", `Theme: ${name}`);
    };
    button.addEventListener("click", () => {
      const next = { undefined: "light", light: "dark", dark: "" }[root.dataset.theme];
      if (next) root.dataset.theme = next;
      else delete root.dataset.theme;
      try {
        localStorage.setItem("mmalign-theme", next);
      } catch {
        // storage is forbidden: the choice lasts as long as the page
      }
      tell();
    });
    tell();
  });
})();
