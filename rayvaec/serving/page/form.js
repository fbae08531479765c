// The form: what can be asked of a model, and the request that it makes.

import { element, number } from "./charts.js";
import { quantile } from "./draws.js";

const by = (id) => document.getElementById(id);
const MOST_FILTERED = 20;
const FIRST_LABELS = 3;
const FIRST_GENES = 6;
const MOST_GENES = 24;

export class Form {
  /** `changed` is called when labels or genes are chosen. */
  constructor(changed) {
    this.changed = changed;
    this.genes = [];
    this.model = { labels: [], genes: [], batches: [] };
    by("label-filter").addEventListener("input", () => this.#filterLabels());
    by("gene").addEventListener("input", () => this.#suggest());
    by("gene").addEventListener("keydown", (event) => {
      if (event.key !== "Enter") return;
      event.preventDefault();
      this.#takeGene();
    });
    by("add-gene").addEventListener("click", () => this.#takeGene());
    by("labels").addEventListener("change", () => {
      this.#count();
      this.changed();
    });
    by("n-cells").addEventListener("input", () => this.#count());
    by("library").addEventListener("focus", () => (by("library-same").checked = true));
  }

  /** Offer what a model has; `summary` is that of its training data, if there is one. */
  offer(model, summary) {
    this.model = model;
    this.summary = summary;
    this.known = new Set(model.genes);
    const common = [...model.labels.keys()].sort((a, b) => this.#cells(b) - this.#cells(a) || a - b);
    const chosen = new Set(common.slice(0, FIRST_LABELS));
    by("labels").replaceChildren(...model.labels.map((label, i) => this.#choice(label, i, chosen.has(i))));
    by("label-filter").hidden = model.labels.length <= 12;
    by("batch-field").hidden = model.batches.length === 0;
    by("batch").replaceChildren(
      element("option", { value: "" }, "all, in turn"),
      ...model.batches.map((batch) => element("option", { value: batch }, batch)),
    );
    by("library-data").disabled = !summary;
    by(summary ? "library-data" : "library-same").checked = true;
    if (summary) {
      const typical = summary.labels[common[0]]?.library;
      if (typical) by("library").value = Math.max(Math.round(quantile(typical, 0.5)), 1);
    }
    this.genes = (summary?.telling_genes ?? model.genes).slice(0, FIRST_GENES);
    this.#showGenes();
    this.#suggest();
    this.#count();
  }

  #cells(code) {
    return this.summary?.labels[code].n_cells ?? 0;
  }

  #choice(label, code, checked) {
    const box = element("input", { type: "checkbox", value: label, checked });
    const share = this.summary ? this.#cells(code) / this.summary.n_cells : undefined;
    const told = share === undefined ? [] : [element("span", { class: "quiet", title: "of the training data" }, `${(100 * share).toFixed(share < 0.1 ? 1 : 0)} %`)];
    return element("label", { class: "choice" }, box, element("span", {}, label), ...told);
  }

  #filterLabels() {
    const wanted = by("label-filter").value.trim().toLowerCase();
    for (const choice of by("labels").children) {
      choice.hidden = !choice.querySelector("input").value.toLowerCase().includes(wanted);
    }
  }

  get labels() {
    return [...by("labels").querySelectorAll("input:checked")].map((box) => box.value);
  }

  /** Most cells that one request may draw: its answer is JSON. */
  get #mostCells() {
    const { limits, genes } = this.model;
    return Math.max(Math.min(limits.max_cells, Math.floor(limits.max_json_cost / genes.length)), 1);
  }

  #count() {
    const labels = this.labels.length;
    const total = labels * Number(by("n-cells").value || 0);
    by("labels-chosen").textContent = `${labels} of ${this.model.labels.length}`;
    by("n-cells-hint").textContent = `${number(total)} in all, of at most ${number(this.#mostCells)} at a time.`;
    by("n-cells").max = Math.max(Math.floor(this.#mostCells / Math.max(labels, 1)), 1);
    by("labels").querySelector("input")?.setCustomValidity(labels ? "" : "Choose a label");
  }

  #suggest() {
    const wanted = by("gene").value.trim().toLowerCase();
    const found = [];
    for (const gene of this.model.genes) {
      if (gene.toLowerCase().includes(wanted) && found.push(gene) === MOST_FILTERED) break;
    }
    by("gene-names").replaceChildren(...found.map((gene) => element("option", { value: gene })));
  }

  #takeGene() {
    const wanted = by("gene").value.trim();
    if (!wanted) return;
    const gene = this.known.has(wanted)
      ? wanted
      : this.model.genes.find((name) => name.toLowerCase() === wanted.toLowerCase());
    if (gene === undefined) {
      by("gene-hint").textContent = `The model has no gene ${wanted}.`;
      return;
    }
    by("gene").value = "";
    this.#suggest();
    this.addGene(gene);
  }

  addGene(gene) {
    if (this.genes.includes(gene)) {
      by("gene-hint").textContent = `${gene} is there already.`;
      return;
    }
    this.genes = [gene, ...this.genes].slice(0, MOST_GENES);
    by("gene-hint").textContent = `${gene} added.`;
    this.#showGenes();
    this.changed();
  }

  #showGenes() {
    const chips = this.genes.map((gene, i) => {
      const button = element("button", { type: "button", "aria-label": `Remove ${gene}` }, gene);
      button.addEventListener("click", () => {
        this.genes = this.genes.filter((other) => other !== gene);
        this.#showGenes();
        (by("genes").querySelectorAll("button")[i] ?? by("gene")).focus();
        this.changed();
      });
      return element("li", {}, button);
    });
    by("genes").replaceChildren(...chips);
  }

  /** The request that the form stands for. */
  request() {
    const n = Number(by("n-cells").value);
    const given = by("seed").value;
    const batch = by("batch").value;
    const request = { labels: [], library: [], cell_ids: [], seed: given === "" ? newSeed() : Number(given) };
    if (this.model.batches.length) request.batches = [];
    for (const label of this.labels) {
      for (let i = 0; i < n; i += 1) {
        request.labels.push(label);
        request.library.push(this.#library(label, (i + 0.5) / n));
        request.cell_ids.push(`${label} ${i + 1}`);
        request.batches?.push(batch || this.model.batches[i % this.model.batches.length]);
      }
    }
    return request;
  }

  /** A cell's library size: the given one, or that below which a share of training cells lies. */
  #library(label, share) {
    const same = Number(by("library").value);
    if (!by("library-data").checked) return same;
    const told = this.summary.labels[this.model.labels.indexOf(label)].library;
    return told ? Math.max(Math.round(quantile(told, share)), 1) : same;
  }
}

const newSeed = () => crypto.getRandomValues(new Uint32Array(1))[0];
