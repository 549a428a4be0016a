"use strict";

// Without this script everything is there and open; it sorts, filters and folds.
(() => {
  const root = document.documentElement;
  const theme = document.getElementById("theme");
  const dark = matchMedia("(prefers-color-scheme: dark)");

  function isDark() {
    return root.dataset.theme ? root.dataset.theme === "dark" : dark.matches;
  }

  function nameTheme() {
    theme.textContent = isDark() ? "Light" : "Dark";
    theme.setAttribute("aria-label", `Switch to ${isDark() ? "light" : "dark"} colours`);
  }

  theme.hidden = false;
  theme.addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    nameTheme();
  });
  dark.addEventListener("change", nameTheme);
  nameTheme();

  // On paper nothing can be unfolded.
  let unfolded = [];
  addEventListener("beforeprint", () => {
    unfolded = [...document.querySelectorAll("section > details:not([open])")];
    for (const each of unfolded) each.open = true;
  });
  addEventListener("afterprint", () => {
    for (const each of unfolded) each.open = false;
  });

  const table = document.getElementById("layers");
  if (!table) return;

  const layers = [...table.tBodies];
  const controls = document.getElementById("controls");
  const find = document.getElementById("find");
  const show = document.getElementById("show");
  const openAll = document.getElementById("open");
  const shown = document.getElementById("shown");

  // The name of a layer opens what there is to say about it.
  for (const layer of layers) {
    const more = layer.rows[1];
    const button = document.createElement("button");
    button.type = "button";
    button.className = "name";
    const name = layer.querySelector("span.name");
    button.append(...name.childNodes);
    button.setAttribute("aria-controls", more.id);
    button.addEventListener("click", () => setOpen(layer, more.hidden));
    name.replaceWith(button);
    setOpen(layer, false);
  }

  function setOpen(layer, open) {
    layer.rows[1].hidden = !open;
    layer.querySelector("button.name").setAttribute("aria-expanded", String(open));
  }

  openAll.addEventListener("click", () => {
    const open = openAll.getAttribute("aria-pressed") !== "true";
    openAll.setAttribute("aria-pressed", String(open));
    openAll.textContent = open ? "Close all" : "Open all";
    for (const layer of layers) setOpen(layer, open);
  });

  // A head sorts its column; what has no value comes last either way.
  for (const head of table.tHead.rows[0].cells) {
    const key = head.dataset.key;
    if (!key) continue;
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = head.textContent;
    head.replaceChildren(button);
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      for (const other of table.tHead.querySelectorAll("[aria-sort]")) {
        other.setAttribute("aria-sort", "none");
      }
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      sortBy(key, down ? -1 : 1);
    });
  }

  function sortBy(key, direction) {
    const attribute = "data-" + key.replaceAll("_", "-");
    const texts = key === "name" || key === "form";
    const value = (layer) => layer.getAttribute(attribute);
    layers.sort((one, other) => {
      const [a, b] = [value(one), value(other)];
      if (a === null || b === null) return (a === null) - (b === null);
      return direction * (texts ? a.localeCompare(b, "en", { numeric: true }) : a - b);
    });
    table.append(...layers);
  }

  function filter() {
    const words = find.value.trim().toLowerCase();
    const wanted = show.value;
    let count = 0;
    for (const layer of layers) {
      const { name, form, scheme, kept } = layer.dataset;
      const found = `${name} ${form}`.toLowerCase().includes(words);
      const chosen =
        wanted === "" || (wanted === "replaced" ? kept === "no" : wanted === "=" + scheme);
      layer.hidden = !(found && chosen);
      count += layer.hidden ? 0 : 1;
    }
    shown.textContent = `${count} of ${layers.length} layers`;
    document.getElementById("nothing").hidden = count > 0;
  }

  find.addEventListener("input", filter);
  show.addEventListener("change", filter);
  controls.addEventListener("submit", (event) => event.preventDefault());
  controls.hidden = false;
})();
