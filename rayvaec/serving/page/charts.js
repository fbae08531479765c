// Figures in SVG. Colours come from the style sheet; every figure says in words what it shows.

const SVG = "http://www.w3.org/2000/svg";
const [WIDTH, HEIGHT, LEFT, BOTTOM, TOP] = [280, 180, 42, 34, 8];
const LETTER = 6.4; // about the width of a letter

/** Make an element with attributes and children. */
export function element(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name in node && typeof value !== "string") node[name] = value;
    else node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
}

function shape(tag, attributes = {}, text = "") {
  const node = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.textContent = text;
  return node;
}

export const number = (value) =>
  value.toLocaleString("en", value >= 100 || value === 0 ? { maximumFractionDigits: 0 } : { maximumSignificantDigits: 2 });
export const percent = (value) => `${Number((100 * value).toFixed(value < 0.1 ? 1 : 0))} %`;

function frame(words, height = HEIGHT) {
  const svg = shape("svg", { viewBox: `0 0 ${WIDTH} ${height}`, role: "img", "aria-label": words });
  svg.append(shape("path", { class: "axis", d: `M${LEFT} ${height - BOTTOM + 0.5}H${WIDTH}` }));
  return svg;
}

/** The middle of a name below the axis: one that would stand out to the right ends at the edge. */
const middle = (x, text) => Math.min(x, WIDTH - (text.length * LETTER) / 2);

function xTick(svg, x, text, height = HEIGHT) {
  svg.append(shape("text", { x: middle(x, text), y: height - BOTTOM + 15, "text-anchor": "middle" }, text));
}

function yTick(svg, y, text) {
  svg.append(shape("path", { class: "axis", d: `M${LEFT} ${y}H${WIDTH}` }));
  svg.append(shape("text", { x: LEFT - 6, y: y + 4, "text-anchor": "end" }, text));
}

function xName(svg, text, height = HEIGHT) {
  svg.append(shape("text", { x: (LEFT + WIDTH) / 2, y: height - 2, "text-anchor": "middle" }, text));
}

/** Shares of two groups, bin by bin: the training data's bars stand behind those drawn. */
function bars(svg, training, drawn, most) {
  const y = (share) => HEIGHT - BOTTOM - (share / most) * (HEIGHT - BOTTOM - TOP);
  for (const share of [most, most / 2]) yTick(svg, y(share), percent(share));
  const n = (training ?? drawn).length;
  const step = (WIDTH - LEFT) / n;
  const bar = (name, share, x, width) => {
    if (share > 0) svg.append(shape("rect", { class: name, x, y: y(share), width, height: HEIGHT - BOTTOM - y(share), rx: 1 }));
  };
  for (let i = 0; i < n; i += 1) {
    const x = LEFT + i * step;
    if (training) bar("training", training[i], x + step * 0.04, step * 0.92);
    if (drawn) bar("drawn", drawn[i], x + step * (training ? 0.27 : 0.1), step * (training ? 0.46 : 0.8));
  }
  return step;
}

function round(most) {
  const nice = [0.02, 0.04, 0.06, 0.08, 0.1, 0.12, 0.16, 0.2, 0.24, 0.3, 0.4, 0.5, 0.6, 0.8, 1];
  return nice.find((value) => value >= most) ?? 1;
}

const shares = (counts) => {
  const total = counts.reduce((sum, count) => sum + count, 0);
  return counts.map((count) => count / Math.max(total, 1));
};

/** How many cells have how many counts of a gene. */
export function geneHistogram({ edges, drawn, training, words }) {
  const both = [training, drawn].map((counts) => counts && shares(counts));
  const [before, after] = both;
  const last = Math.max(3, edges.findLastIndex((_, i) => before?.[i] > 0 || after?.[i] > 0) + 1);
  const cut = both.map((x) => x?.slice(0, last));
  const svg = frame(words);
  const step = bars(svg, ...cut, round(Math.max(...cut.flatMap((x) => x ?? []))));
  const names = edges.slice(0, last).map((edge, i) => {
    const next = edges[i + 1];
    if (next === undefined) return `${edge}+`;
    return next - edge > 1 ? `${edge}–${next - 1}` : `${edge}`;
  });
  const every = Math.ceil((Math.max(...names.map((name) => name.length)) * 7 + 6) / step);
  names.forEach((name, i) => i % every === 0 && xTick(svg, LEFT + (i + 0.5) * step, name));
  xName(svg, "counts a cell");
  return svg;
}

/** How many cells have which total: drawn ones as they are, training cells from their quantiles. */
export function libraryHistogram({ drawn, quantiles, shareBelow, words }) {
  const values = [...(quantiles ?? []), ...(drawn ?? [])].map((value) => Math.max(value, 1));
  let [low, high] = [Math.log(Math.min(...values)), Math.log(Math.max(...values) + 1)];
  if (high - low < 0.2) [low, high] = [low - 0.1, high + 0.1];
  const n = 20;
  const edges = Array.from({ length: n + 1 }, (_, i) => Math.exp(low + ((high - low) * i) / n));
  const counts = drawn && edges.slice(1).map(() => 0);
  for (const value of drawn ?? []) {
    counts[Math.min(Math.floor((n * (Math.log(Math.max(value, 1)) - low)) / (high - low)), n - 1)] += 1;
  }
  const training =
    quantiles && edges.slice(1).map((edge, i) => shareBelow(quantiles, edge) - shareBelow(quantiles, edges[i]));
  const after = counts && shares(counts);
  const svg = frame(words);
  bars(svg, training, after, round(Math.max(...(training ?? []), ...(after ?? []))));
  const place = (value) => LEFT + ((Math.log(value) - low) / (high - low)) * (WIDTH - LEFT);
  for (const value of logTicks(edges[0], edges[n], place)) xTick(svg, place(value), number(value));
  xName(svg, "total counts a cell");
  return svg;
}

const TENTHS = Array.from({ length: 90 }, (_, i) => 1 + i / 10);
const STEPS = [TENTHS, [1, 1.5, 2, 3, 4, 5, 6, 8], [1, 2, 3, 5], [1, 2, 5], [1, 3], [1]];

/** As many round values as have room for their names at the positions that `place` tells. */
function logTicks(low, high, place) {
  const ticks = (steps) => {
    const found = [];
    for (let power = 10 ** Math.floor(Math.log10(low)); power <= high; power *= 10) {
      found.push(...steps.map((step) => step * power).filter((value) => value >= low && value <= high));
    }
    return found;
  };
  const clear = (found) => apart(found.map((value) => [value, number(value)]), place);
  return STEPS.map(ticks).find(clear) ?? ticks([1]).filter((_, i) => i % 3 === 0);
}

/** Whether the names of ticks below an axis stand clear of each other. */
function apart(ticks, place) {
  const at = ticks.map(([value, name]) => middle(place(value), name));
  const room = (i) => ((ticks[i][1].length + ticks[i + 1][1].length) / 2) * LETTER + 8;
  return at.slice(1).every((x, i) => x - at[i] >= room(i));
}

/** Zero and powers of ten: every one above zero's name, or every second or third of them. */
function powerTicks(low, high, place) {
  const zero = [0, "0"];
  const powers = [];
  for (let power = Math.ceil(low); power <= high; power += 1) {
    const tick = [10 ** power, number(10 ** power)];
    if (apart([zero, tick], place)) powers.push(tick);
  }
  const every = [1, 2, 3].map((step) => [zero, ...powers.filter((_, i) => i % step === 0)]);
  return every.find((ticks) => apart(ticks, place)) ?? every[2];
}

/** Every gene: the training data's value across, the drawn one up; what agrees is on the line. */
export function scatter({ training, drawn, log, name, words }) {
  const size = WIDTH - LEFT;
  const height = size + BOTTOM + TOP;
  const svg = frame(words, height);
  let place = (value) => value;
  const x = (value) => LEFT + 5 + place(value) * (size - 10);
  const y = (value) => TOP + size - 5 - place(value) * (size - 10);
  let ticks = [0, 0.25, 0.5, 0.75, 1].map((value) => [value, percent(value)]);
  if (log) {
    const all = [...training, ...drawn].filter((value) => value > 0);
    const [least, most] = [Math.min(...all, 0.1), Math.max(...all, 1)];
    const [low, high] = [Math.log10(least / 2), Math.log10(most * 1.3)];
    place = (value) => (Math.log10(Math.max(value, least / 2)) - low) / (high - low);
    ticks = powerTicks(low, high, x);
  }
  for (const [value, text] of ticks) {
    yTick(svg, y(value), text);
    xTick(svg, x(value), text, height);
  }
  svg.append(shape("path", { class: "same", d: `M${LEFT} ${TOP + size}L${WIDTH} ${TOP}` }));
  let dots = "";
  for (let i = 0; i < drawn.length; i += 1) dots += `M${x(training[i]).toFixed(1)} ${y(drawn[i]).toFixed(1)}h0`;
  svg.append(shape("path", { class: "dots", d: dots }));
  xName(svg, `${name}, training data`, height);
  const up = { transform: `translate(${LEFT + 8} ${TOP + 22})`, "text-anchor": "start" };
  svg.append(shape("text", up, `${name}, drawn`));
  return svg;
}
