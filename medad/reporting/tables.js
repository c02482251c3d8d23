"use strict";
// Tables with the class "sort" sort by a click or Enter on a heading, and long ones have a filter.
const LONG = 12;
const number = (text) => {
  const found = text.replace(/,/g, "").replace("\u2212", "-").match(/^[+-]?\d+(\.\d+)?(e[+-]?\d+)?/i);
  return found ? parseFloat(found[0]) : null;
};
const value = (row, column) => row.cells[column].dataset.value ?? row.cells[column].textContent.trim();

function sortBy(table, column, heading) {
  const descending = heading.getAttribute("aria-sort") === "ascending";
  table.querySelectorAll("th[aria-sort]").forEach((each) => each.removeAttribute("aria-sort"));
  heading.setAttribute("aria-sort", descending ? "descending" : "ascending");
  const body = table.tBodies[0];
  const rows = [...body.rows].filter((row) => !row.classList.contains("all"));
  const keys = new Map(rows.map((row) => [row, value(row, column)]));
  const numeric = rows.filter((row) => number(keys.get(row)) !== null).length > rows.length / 2;
  rows.sort((a, b) => {
    const [x, y] = [keys.get(a), keys.get(b)];
    if (!numeric) return x.localeCompare(y, "en", { numeric: true }) * (descending ? -1 : 1);
    const [p, q] = [number(x), number(y)];
    if (p === null || q === null) return (p === null) - (q === null);
    return (p - q) * (descending ? -1 : 1);
  });
  body.append(...rows);
}

function addFilter(table) {
  const rows = [...table.tBodies[0].rows].filter((row) => !row.classList.contains("all"));
  if (rows.length < LONG) return;
  const label = document.createElement("label");
  label.className = "filter";
  const input = Object.assign(document.createElement("input"), { type: "search" });
  const count = Object.assign(document.createElement("span"), { role: "status" });
  label.append("Show rows with", input, count);
  input.addEventListener("input", () => {
    const words = input.value.toLowerCase().split(/\s+/);
    let shown = 0;
    for (const row of rows) {
      const text = row.textContent.toLowerCase();
      row.hidden = !words.every((word) => text.includes(word));
      shown += !row.hidden;
    }
    count.textContent = `${shown} of ${rows.length}`;
  });
  table.closest(".scroll").before(label);
}

for (const table of document.querySelectorAll("table.sort")) {
  const headings = [...table.tHead.rows].at(-1).cells;
  [...headings].forEach((heading, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...heading.childNodes);
    heading.append(button);
    button.addEventListener("click", () => sortBy(table, column, heading));
  });
  addFilter(table);
}

// what scrolls sideways can be scrolled by the keyboard
function letKeysScroll() {
  for (const each of document.querySelectorAll(".scroll")) {
    if (each.scrollWidth > each.clientWidth) each.tabIndex = 0;
    else each.removeAttribute("tabindex");
  }
}
letKeysScroll();
addEventListener("resize", letKeysScroll);
