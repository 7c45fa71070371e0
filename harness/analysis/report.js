"use strict";
// Sorts a table by the column whose header is pressed; pressed again, the other way round. Numbers go by data-value,
// which has every digit, and text by its words and numbers; what is absent stays last. Without it nothing is lost.
const words = new Intl.Collator("en", { numeric: true });

function keyOf(row, column) {
  const { dataset, textContent } = row.cells[column];
  if (dataset.value === undefined) return textContent;
  return dataset.value === "" ? null : Number(dataset.value);
}

function compare(a, b) {
  if (typeof a === "string" && typeof b === "string") return words.compare(a, b);
  if (typeof a !== typeof b) return typeof a === "string" ? 1 : -1; // "over 1,000", among numbers
  return (a > b) - (a < b);
}

function sort(table, column, order) {
  const body = table.tBodies[0];
  const rows = Array.from(body.rows, (row) => ({ row, key: keyOf(row, column) }));
  rows.sort((a, b) => (a.key === null) - (b.key === null) || order * compare(a.key, b.key));
  body.append(...rows.map(({ row }) => row));
}

for (const table of document.querySelectorAll("table.sortable")) {
  const headers = Array.from(table.tHead.rows[0].cells);
  headers.forEach((header, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...header.childNodes);
    header.append(button);
    button.addEventListener("click", () => {
      const descending = header.getAttribute("aria-sort") === "ascending";
      for (const other of headers) other.removeAttribute("aria-sort");
      header.setAttribute("aria-sort", descending ? "descending" : "ascending");
      sort(table, column, descending ? -1 : 1);
    });
  });
}
