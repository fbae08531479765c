// What was drawn, beside the training data.

import { element, geneHistogram, libraryHistogram, number, percent, scatter } from "./charts.js";
import { correlation, farthest, quantile, shareBelow } from "./draws.js";

/** Fill the page's figures for one label; `addGene` is called with a gene that shall be looked at. */
export function showFigures(place, { draws, summary, profile, label, labels, genes, addGene }) {
  const about = draws?.of(label);
  const known = summary?.labels.find((entry) => entry.label === label);
  const training = known?.n_cells ? known : undefined;
  const parts = [];
  if (about || training) parts.push(overview({ about, training, profile, label, draws, addGene }));
  const shown = genes.filter((gene) => draws || summary?.genes.some((entry) => entry.gene === gene));
  if (shown.length && (about || training)) {
    parts.push(geneByGene({ shown, draws, about, summary, training, label, labels }));
    parts.push(acrossLabels({ shown, draws, summary, labels }));
  }
  place.replaceChildren(...parts);
}

function part(title, words, ...content) {
  return element("section", { class: "part" }, element("h2", {}, title), ...(words ? [element("p", {}, words)] : []), ...content);
}

function figure(title, words, drawing) {
  return element("figure", {}, element("figcaption", {}, element("h3", {}, title), words), drawing);
}

function overview({ about, training, profile, label, draws, addGene }) {
  const cells = [
    ...(about ? [`${number(about.cells.length)} cells drawn`] : []),
    ...(training ? [`${number(training.n_cells)} sampled from the training data`] : []),
  ].join(", ");
  const figures = [];
  if (about && profile) figures.push(...everyGene(about, profile, label));
  figures.push(libraries(about, training, label));
  const content = [element("div", { class: "figures" }, ...figures)];
  if (about && profile) {
    const names = farthest(about.mean, profile.mean, 5).map((i) => draws.genes[i]);
    const buttons = names.map((gene) => {
      const button = element("button", { type: "button", "aria-label": `Look at ${gene}` }, gene);
      button.addEventListener("click", () => addGene(gene));
      return element("li", {}, button);
    });
    content.push(element("p", {}, "Farthest from the training data, to look at more closely:"));
    content.push(element("ul", { class: "row farthest" }, ...buttons));
  }
  return part(label, cells, ...content);
}

function everyGene(about, profile, label) {
  const least = 1 / about.cells.length;
  const logs = [about.mean, profile.mean].map((means) => Array.from(means, (mean) => Math.log(mean + least)));
  const r = correlation(...logs);
  const agreement = Number.isFinite(r) ? `correlation of the logarithms ${r.toFixed(3)}` : "";
  return [
    figure(
      "Mean of every gene",
      agreement,
      scatter({
        training: profile.mean,
        drawn: about.mean,
        log: true,
        name: "mean",
        words: `Mean counts of every gene in ${label}, drawn against training data; ${agreement}`,
      }),
    ),
    figure(
      "Cells without the gene",
      "share of cells with zero counts",
      scatter({
        training: profile.zero_fraction,
        drawn: about.zeros,
        log: false,
        name: "zeros",
        words: `Share of cells without each gene in ${label}, drawn against training data`,
      }),
    ),
  ];
}

const middle = (values) => {
  const sorted = [...values].sort((a, b) => a - b);
  return quantile(sorted.length > 1 ? sorted : [sorted[0], sorted[0]], 0.5);
};

function libraries(about, training, label) {
  const medians = [
    ...(about ? [`${number(middle(about.libraries))} drawn`] : []),
    ...(training ? [`${number(quantile(training.library, 0.5))} in the training data`] : []),
  ];
  const words = `median ${medians.join(", ")}`;
  return figure(
    "Library size",
    words,
    libraryHistogram({
      drawn: about?.libraries,
      quantiles: training?.library,
      shareBelow,
      words: `Library sizes in ${label}: ${words}`,
    }),
  );
}

/** Mean and share of zeros of a gene, as words: those drawn, then the training data's. */
function compared(drawn, training, show) {
  const told = [...(drawn === undefined ? [] : [show(drawn)]), ...(training === undefined ? [] : [show(training)])];
  return told.join(" / ");
}

function geneByGene({ shown, draws, about, summary, training, label, labels }) {
  const code = summary?.labels.findIndex((entry) => entry.label === label);
  const edges = summary?.count_edges ?? [0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 128, 256, 512];
  const figures = shown.map((gene) => {
    const known = training && summary.genes.find((entry) => entry.gene === gene);
    const column = draws?.column.get(gene);
    const means = compared(about?.mean[column], known?.mean[code], number);
    const zeros = compared(about?.zeros[column], known?.zero_fraction[code], percent);
    return figure(
      gene,
      `mean ${means}, zeros ${zeros}`,
      geneHistogram({
        edges,
        drawn: about && draws.histogram(label, gene, edges),
        training: known?.histogram[code],
        words: `${gene} in ${label}: mean ${means}, cells without ${zeros}`,
      }),
    );
  });
  const words = about && training ? "Shares of cells, by how many counts of the gene they have. Numbers: drawn / training data." : "";
  return part("Gene by gene", words, element("div", { class: "figures" }, ...figures));
}

function acrossLabels({ shown, draws, summary, labels }) {
  const head = element("tr", {}, element("th", { scope: "col" }, "Gene"));
  for (const label of labels) head.append(element("th", { scope: "col" }, label));
  const rows = shown.map((gene) => {
    const known = summary?.genes.find((entry) => entry.gene === gene);
    const row = element("tr", {}, element("th", { scope: "row" }, gene));
    for (const label of labels) {
      const code = summary?.labels.findIndex((entry) => entry.label === label);
      const told = summary?.labels[code]?.n_cells ? known?.mean[code] : undefined;
      const cell = element("td");
      if (draws) cell.append(number(draws.of(label).mean[draws.column.get(gene)]));
      if (told !== undefined) cell.append(" ", element("span", { class: "quiet" }, number(told)));
      row.append(cell);
    }
    return row;
  });
  const caption = draws && summary ? "Drawn, and in grey the training data" : draws ? "Drawn" : "Training data";
  const table = element(
    "table",
    {},
    element("caption", {}, caption),
    element("thead", {}, head),
    element("tbody", {}, ...rows),
  );
  const scroll = element("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Mean counts by label" }, table);
  return part("Mean counts by label", "", scroll);
}
