// Files of what was drawn.

import { ask } from "./api.js";

const H5AD = "application/x-hdf5";

function save(content, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(content);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}

/** The endpoint draws the same cells again, since draws follow from seed and names, as h5ad. */
export async function downloadH5ad(path, request) {
  const answer = await ask(`${path}/generate`, { body: request, accept: H5AD });
  save(await answer.blob(), `drawn-${request.seed}.h5ad`);
}

const quoted = (text) => (/[",\n\r]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text);

/** One line a cell: name, label, then the counts of every gene. */
export function downloadCsv(draws) {
  const lines = [["cell", "label", ...draws.genes].map(quoted).join(",")];
  for (let cell = 0; cell < draws.length; cell += 1) {
    const row = new Array(draws.genes.length).fill(0);
    for (let i = draws.indptr[cell]; i < draws.indptr[cell + 1]; i += 1) row[draws.indices[i]] = draws.counts[i];
    lines.push([quoted(draws.ids[cell]), quoted(draws.labels[cell]), row.join(",")].join(","));
  }
  save(new Blob([lines.join("\n"), "\n"], { type: "text/csv" }), `drawn-${draws.seed}.csv`);
}
