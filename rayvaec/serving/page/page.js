// Puts the page together: models, the form, draws, and what is shown of them.

import { Problem, askJson, dropToken, hasToken, keepToken } from "./api.js";
import { element, number } from "./charts.js";
import { downloadCsv, downloadH5ad } from "./download.js";
import { Draws } from "./draws.js";
import { Form } from "./form.js";
import { showFigures } from "./results.js";

const by = (id) => document.getElementById(id);
const form = new Form(() => void guarded(show));
let path = "";
let model;
let summary;
let draws;
let request;
let shown;
let working;
let turn = 0;

/** Do something; what the endpoint refuses is shown, and a token asked for where it needs one. */
async function guarded(work) {
  try {
    by("problem").replaceChildren();
    await work();
  } catch (error) {
    if (error.name === "AbortError") return;
    if (!(error instanceof Problem)) {
      showProblem("The page failed", `${error.message}`, "Reload it; if that does not help, report this");
      throw error;
    }
    if (error.status === 401) askForToken(error);
    else showProblem(error.detail, error.fix, error.id && `request ${error.id}`);
  }
}

function showProblem(detail, fix, id) {
  const words = element("p", { class: "problem" }, element("strong", {}, detail), element("br"), fix);
  if (id) words.append(" ", element("small", {}, `(${id})`));
  by("problem").replaceChildren(words);
  by("problem").scrollIntoView({ block: "nearest" });
}

function askForToken(error) {
  if (hasToken()) showProblem(error.detail, error.fix, "");
  dropToken();
  by("form").hidden = true;
  by("token-form").hidden = false;
  by("token").focus();
}

async function start() {
  const { models } = await askJson("v1/models");
  by("token-form").hidden = true;
  by("model").replaceChildren(...models.map(({ name }) => element("option", { value: name }, name)));
  by("model-field").hidden = models.length < 2;
  await choose(models.find(({ name }) => name === by("model").value) ?? models[0]);
}

async function choose({ name }) {
  path = `v1/models/${encodeURIComponent(name)}`;
  [model, summary] = await Promise.all([askJson(`${path}/model`), summaryOf([])]);
  draws = request = shown = undefined;
  by("facts").textContent =
    `${name}: ${number(model.genes.length)} genes, ${number(model.labels.length)} labels, ` +
    `${model.config.generative} form, hash ${model.model_hash.slice(0, 12)}`;
  by("no-summary").hidden = Boolean(summary);
  by("no-summary").textContent =
    "This model has no summary of its training data, so draws stand alone. Models that rayvaec train finished have one.";
  form.offer(model, summary);
  by("form").hidden = false;
  by("downloads").hidden = true;
  by("status").textContent = summary ? "Nothing drawn yet. This is the training data:" : "Nothing drawn yet.";
  await show();
}

/** The summary of the training data, with some genes, and one label's every gene; or nothing. */
async function summaryOf(genes, profile) {
  const query = new URLSearchParams(genes.map((gene) => ["gene", gene]));
  if (profile !== undefined) query.set("profile", profile);
  try {
    return await askJson(`${path}/summary?${query}`);
  } catch (error) {
    if (error.name === "no_summary") return undefined;
    throw error;
  }
}

/** Show what was drawn of one label; before anything is, the training data. */
async function show() {
  const mine = ++turn;
  const labels = draws ? [...new Set(draws.labels)] : form.labels;
  if (!labels.includes(shown)) shown = labels[0];
  const told = summary && shown !== undefined ? await summaryOf(form.genes, shown) : undefined;
  if (mine !== turn) return; // something else was asked for meanwhile
  by("key").hidden = !(draws && summary);
  showTabs(labels);
  showFigures(by("figures"), {
    draws,
    summary: told,
    profile: told?.profile,
    label: shown,
    labels,
    genes: form.genes,
    addGene: (gene) => form.addGene(gene),
  });
}

function showTabs(labels) {
  by("tabs").hidden = labels.length < 2;
  const focused = by("tabs").contains(document.activeElement);
  const tabs = labels.map((label) => {
    const radio = element("input", { type: "radio", name: "tab", value: label, checked: label === shown });
    radio.addEventListener("change", () => {
      shown = label;
      void guarded(show);
    });
    return element("label", {}, radio, element("span", {}, label));
  });
  by("tabs").replaceChildren(...tabs);
  if (focused) by("tabs").querySelector(":checked")?.focus();
}

async function draw() {
  working = new AbortController();
  const { signal } = working;
  const asked = form.request();
  const began = performance.now();
  by("draw").textContent = "Stop";
  by("status").className = "working";
  by("status").textContent = `Drawing ${number(asked.labels.length)} cells`;
  try {
    const answer = await askJson(`${path}/generate`, { body: asked, signal });
    [request, draws] = [asked, new Draws(asked, answer, model.genes)];
    const seconds = (performance.now() - began) / 1000;
    by("status").textContent =
      `${number(draws.length)} cells drawn in ${seconds < 0.1 ? "less than 0.1" : seconds.toFixed(1)} s with seed ${asked.seed}`;
    by("downloads").hidden = false;
    await show();
    if (by("results").getBoundingClientRect().top > innerHeight / 2) by("results").scrollIntoView();
  } catch (error) {
    by("status").textContent = signal.aborted ? "Stopped" : draws ? "The cells below were drawn before" : "Nothing drawn yet";
    throw error;
  } finally {
    working = undefined;
    by("status").className = "";
    by("draw").textContent = "Draw cells";
  }
}

async function whileDisabled(button, work) {
  button.disabled = true;
  try {
    await guarded(work);
  } finally {
    button.disabled = false;
  }
}

by("form").addEventListener("submit", (event) => {
  event.preventDefault();
  if (working) working.abort();
  else void guarded(draw);
});
by("token-form").addEventListener("submit", (event) => {
  event.preventDefault();
  keepToken(by("token").value.trim());
  by("token").value = "";
  void guarded(start);
});
by("model").addEventListener("change", () => void guarded(() => choose({ name: by("model").value })));
by("download-csv").addEventListener("click", () => downloadCsv(draws));
by("download-h5ad").addEventListener("click", (event) => {
  void whileDisabled(event.currentTarget, () => downloadH5ad(path, request));
});

void guarded(start);
