// Comma-separated values that spreadsheets take for text.

/** Programs for spreadsheets run what begins like a formula: an apostrophe makes it text. */
const FORMULA = /^\s*[=+\-@\uFF1D\uFF0B\uFF0D\uFF20]|^[\t\r\n]/;

export function field(text) {
  const plain = FORMULA.test(text) ? `'${text}` : text;
  return /[",\n\r]/.test(plain) ? `"${plain.replaceAll('"', '""')}"` : plain;
}

/** One line a cell: name, label, then the counts of every gene. */
export function table(draws) {
  const lines = [["cell", "label", ...draws.genes].map(field).join(",")];
  for (let cell = 0; cell < draws.length; cell += 1) {
    const row = new Array(draws.genes.length).fill(0);
    for (let i = draws.indptr[cell]; i < draws.indptr[cell + 1]; i += 1) row[draws.indices[i]] = draws.counts[i];
    lines.push([field(draws.ids[cell]), field(draws.labels[cell]), row.join(",")].join(","));
  }
  return lines;
}
