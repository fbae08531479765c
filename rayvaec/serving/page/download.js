// Files of what was drawn.

import { ask } from "./api.js";
import { table } from "./csv.js";

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

export function downloadCsv(draws) {
  save(new Blob([table(draws).join("\n"), "\n"], { type: "text/csv" }), `drawn-${draws.seed}.csv`);
}
