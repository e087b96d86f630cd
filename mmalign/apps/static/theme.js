// Before the first paint: the theme that was chosen here, if any; without one the system's.
(() => {
  try {
    const theme = localStorage.getItem("mmalign-theme");
    if (theme) document.documentElement.dataset.theme = theme;
  } catch {
    // storage is forbidden: the system's theme it is
  }
})();
