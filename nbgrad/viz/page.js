// Sorts the table of claims by the column whose header is pressed; pressed again, the other way.
for (const table of document.querySelectorAll("table.claims")) {
  const headers = [...table.tHead.rows[0].cells];
  const key = (row, i) => row.cells[i].dataset.key ?? row.cells[i].textContent.trim();
  headers.forEach((header, i) => header.querySelector("button").addEventListener("click", () => {
    const down = header.getAttribute("aria-sort") === "ascending";
    headers.forEach(other => other.setAttribute("aria-sort", "none"));
    header.setAttribute("aria-sort", down ? "descending" : "ascending");
    const rows = [...table.tBodies[0].rows];
    rows.sort((a, b) => (down ? -1 : 1) *
      key(a, i).localeCompare(key(b, i), "en", { numeric: true, sensitivity: "base" }));
    table.tBodies[0].append(...rows);
  }));
}
