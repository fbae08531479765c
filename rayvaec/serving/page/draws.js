// Numbers of drawn cells: those that the training data's summary holds as well.

/** Cells that were drawn, in compressed sparse rows. */
export class Draws {
  constructor(request, answer, genes) {
    this.labels = request.labels;
    this.ids = request.cell_ids;
    this.seed = answer.seed;
    this.genes = genes;
    ({ indptr: this.indptr, indices: this.indices, counts: this.counts } = answer.draws);
    this.column = new Map(genes.map((gene, i) => [gene, i]));
    this.perLabel = new Map();
  }

  get length() {
    return this.labels.length;
  }

  library(cell) {
    let total = 0;
    for (let i = this.indptr[cell]; i < this.indptr[cell + 1]; i += 1) total += this.counts[i];
    return total;
  }

  /** Mean and share of zeros of every gene, and every cell's total, of one label's cells. */
  of(label) {
    if (!this.perLabel.has(label)) this.perLabel.set(label, this.#summary(label));
    return this.perLabel.get(label);
  }

  #summary(label) {
    const cells = [...this.labels.keys()].filter((cell) => this.labels[cell] === label);
    const mean = new Float64Array(this.genes.length);
    const zeros = new Float64Array(this.genes.length).fill(1);
    for (const cell of cells) {
      for (let i = this.indptr[cell]; i < this.indptr[cell + 1]; i += 1) {
        mean[this.indices[i]] += this.counts[i] / cells.length;
        zeros[this.indices[i]] -= 1 / cells.length;
      }
    }
    return { cells, mean, zeros: zeros.map((x) => Math.max(x, 0)), libraries: cells.map((cell) => this.library(cell)) };
  }

  /** Count a label's cells by how many counts of a gene they have. */
  histogram(label, gene, edges) {
    const column = this.column.get(gene);
    const { cells } = this.of(label);
    const bins = edges.map(() => 0);
    for (const cell of cells) bins[edges.findLastIndex((edge) => edge <= this.#count(cell, column))] += 1;
    return bins;
  }

  #count(cell, column) {
    let [low, high] = [this.indptr[cell], this.indptr[cell + 1]];
    while (low < high) {
      const middle = (low + high) >> 1;
      if (this.indices[middle] < column) low = middle + 1;
      else high = middle;
    }
    return low < this.indptr[cell + 1] && this.indices[low] === column ? this.counts[low] : 0;
  }
}

/** The value below which a share of cells lies, from quantiles at even distances. */
export function quantile(quantiles, share) {
  const at = share * (quantiles.length - 1);
  const below = Math.min(Math.floor(at), quantiles.length - 2);
  return quantiles[below] + (at - below) * (quantiles[below + 1] - quantiles[below]);
}

/** The share of cells below a value, from quantiles at even distances. */
export function shareBelow(quantiles, value) {
  const above = quantiles.findIndex((x) => x > value);
  if (above === 0) return 0;
  if (above === -1) return 1;
  const [low, high] = [quantiles[above - 1], quantiles[above]];
  return (above - 1 + (value - low) / (high - low)) / (quantiles.length - 1);
}

export function correlation(a, b) {
  const mean = (x) => x.reduce((sum, value) => sum + value, 0) / x.length;
  const [ma, mb] = [mean(a), mean(b)];
  let [ab, aa, bb] = [0, 0, 0];
  for (let i = 0; i < a.length; i += 1) {
    ab += (a[i] - ma) * (b[i] - mb);
    aa += (a[i] - ma) ** 2;
    bb += (b[i] - mb) ** 2;
  }
  return ab / Math.sqrt(aa * bb);
}

/** The genes whose means lie farthest apart, on the scale on which Poisson counts vary alike. */
export function farthest(a, b, n) {
  const apart = Array.from(a, (x, i) => Math.abs(Math.sqrt(x) - Math.sqrt(b[i])));
  return [...apart.keys()].sort((i, j) => apart[j] - apart[i]).slice(0, n);
}
