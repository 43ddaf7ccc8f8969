// The search page: the form, and the URL, in which all stands that defines a search.

import { callApi, clearProblem, count, element, find, isTyping, loadSettings, showProblem } from "./common.js";
import { showLists } from "./hits.js";

const LOADING_AFTER = 150; // milliseconds: faster answers come without a loading state, which would flicker
const DEFAULT_K = 10;
const MODES = ["dense", "bm25", "hybrid"];
const form = find("search");
const results = find("results");
let settings;
let underway = new AbortController();

async function start() {
  try {
    settings = await loadSettings();
  } catch (error) {
    showProblem(error, start);
    return;
  }
  const names = settings.models.map((model) => model.id);
  form.model.replaceChildren(...names.map((name) => new Option(name, name)));
  form.against.replaceChildren(new Option("nothing", ""), ...names.map((name) => new Option(name, name)));
  find("model-field").hidden = find("against-field").hidden = names.length < 2;
  form.k.max = settings.limits.k;
  form.q.maxLength = settings.limits.characters;
  find("options").hidden = false;
  openLink();
  if (!form.q.value) form.q.focus();
}

/** Show the search that the URL names. */
function openLink() {
  const wanted = readLink();
  fillForm(wanted);
  find("filters").open = wanted.filters.length > 0;
  const shown = readForm();
  const absent = ["k", "mode", "model", "against", "rerank"].filter((name) => shown[name] !== wanted[name]);
  find("notice").hidden = absent.length === 0;
  find("notice").textContent = `Not to be had here: ${absent.map((name) => `${name}=${wanted[name]}`).join(", ")}.`;
  search();
}

function readLink() {
  const link = new URLSearchParams(location.search);
  const k = link.get("k") ?? String(DEFAULT_K);
  return {
    q: link.get("q") ?? "",
    k: /^\d+$/.test(k) ? Number(k) : k,
    mode: link.get("mode") ?? "auto",
    model: link.get("model") ?? settings.models[0].id,
    against: link.get("against") ?? "",
    rerank: link.get("rerank") === "true",
    fold: link.get("fold") === "true",
    filters: link.getAll("filter"),
  };
}

/** Return the URL of a search, without what is usual. */
function writeLink({ q, k, mode, model, against, rerank, fold, filters }) {
  const link = new URLSearchParams();
  if (q) link.set("q", q);
  if (k !== DEFAULT_K) link.set("k", k);
  if (mode !== "auto") link.set("mode", mode);
  if (model !== settings.models[0].id) link.set("model", model);
  if (against) link.set("against", against);
  if (rerank) link.set("rerank", "true");
  if (fold) link.set("fold", "true");
  for (const filter of filters) link.append("filter", filter);
  return `${location.pathname}${link.size ? `?${link}` : ""}`;
}

/** Set the form to a search, as far as this server offers it. */
function fillForm({ q, k, mode, model, against, rerank, fold, filters }) {
  const names = settings.models.map((known) => known.id);
  form.q.value = q;
  form.k.value = Math.min(Math.max(k || DEFAULT_K, 1), settings.limits.k);
  form.mode.value = MODES.includes(mode) ? mode : "auto";
  form.model.value = names.includes(model) ? model : names[0];
  form.against.value = names.includes(against) ? against : "";
  form.rerank.checked = rerank;
  form.fold.checked = fold;
  form.filter.value = filters.join("\n");
  fitChoices();
}

function readForm() {
  return {
    q: form.q.value.trim(),
    k: form.k.valueAsNumber,
    mode: form.mode.value,
    model: form.model.value,
    against: form.against.value,
    rerank: form.rerank.checked,
    fold: form.fold.checked,
    filters: form.filter.value.split("\n").map((line) => line.trim()).filter(Boolean),
  };
}

/** Offer what all chosen models can do. */
function fitChoices() {
  for (const option of form.against.options) option.disabled = option.value === form.model.value;
  if (form.against.value === form.model.value) form.against.value = "";
  const chosen = settings.models.filter(({ id }) => [form.model.value, form.against.value].includes(id));
  for (const mode of MODES) {
    const radio = form.querySelector(`[name=mode][value=${mode}]`);
    radio.parentNode.hidden = !chosen.every(({ modes }) => modes.includes(mode));
    if (radio.parentNode.hidden && radio.checked) form.mode.value = "auto";
  }
  const reranker = chosen.every((model) => model.reranker);
  find("rerank-field").hidden = !reranker;
  if (!reranker) form.rerank.checked = false;
}

/** Search for what the form says; a search that is still under way is given up. */
async function search() {
  const wanted = readForm();
  underway.abort();
  const mine = (underway = new AbortController());
  clearProblem();
  document.title = wanted.q ? `${wanted.q} – pairdr` : "pairdr";
  find("copy-link").hidden = !wanted.q;
  const loading = setTimeout(() => showLoading(true), wanted.q ? LOADING_AFTER : 0);
  try {
    const models = wanted.against ? [wanted.model, wanted.against] : [wanted.model];
    const answers = wanted.q ? await Promise.all(models.map((model) => ask(wanted, model, mine.signal))) : [];
    if (mine.signal.aborted) return;
    show(wanted, answers);
  } catch (error) {
    if (mine.signal.aborted) return;
    mine.abort(); // of two requests one may still be under way
    results.replaceChildren();
    find("status").textContent = "";
    showProblem(error, search);
  } finally {
    clearTimeout(loading);
    if (mine === underway) showLoading(false);
  }
}

async function ask({ q, k, mode, rerank, fold, filters }, model, signal) {
  const begun = performance.now();
  const answer = await callApi("search", { body: { query: q, k, mode, rerank, fold, filters, model }, signal });
  return { ...answer, hits: answer.results[0].hits, roundTrip: performance.now() - begun };
}

function showLoading(loading) {
  results.setAttribute("aria-busy", loading);
  if (loading) find("status").textContent = "Searching …";
}

function show({ q, k, filters }, answers) {
  showLists(results, q, answers, { feedback: settings.feedback, addFilter });
  const [hits, others] = answers.map((answer) => answer.hits);
  if (!hits) {
    find("status").textContent = "";
    const { passages } = settings.models[0];
    const invitation = `Ask something of ${count(passages, "passage")}.`;
    results.append(element("p", { className: "absent", textContent: invitation }));
  } else if (!hits.length && !others?.length) {
    const advice = filters.length ? "Fewer filters may find more." : "Other words may find something.";
    find("status").textContent = "Nothing found.";
    results.replaceChildren(element("p", { className: "absent", textContent: `Nothing found. ${advice}` }));
  } else if (!others) {
    find("status").textContent = count(hits.length, "result");
  } else {
    const shared = hits.filter(({ id }) => others.some((other) => other.id === id)).length;
    find("status").textContent = `${shared} of the first ${k} in both lists`;
  }
}

function addFilter(condition) {
  const filters = new Set([...readForm().filters, condition]);
  form.filter.value = [...filters].join("\n");
  find("filters").open = true;
  searchAnew();
}

/** Search for what the form says now, as a new step of the browser's history. */
function searchAnew() {
  fitChoices();
  if (!form.reportValidity()) return;
  find("notice").hidden = true;
  const link = writeLink(readForm());
  if (link !== location.pathname + location.search) history.pushState(null, "", link);
  search();
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  searchAnew();
});
form.addEventListener("change", (event) => {
  if (event.target !== form.q) searchAnew();
});
addEventListener("popstate", openLink);

find("copy-link").addEventListener("click", async () => {
  try {
    await navigator.clipboard.writeText(location.href);
    find("status").textContent = "The link is copied.";
  } catch {
    // Over plain HTTP from another machine browsers offer no clipboard.
    find("status").textContent = "The browser does not let this page copy: take the link from the address bar.";
  }
});

find("show-keys").addEventListener("click", () => find("keys").showModal());

/** Move the focus by some hits in the list it is in, from the box to the first, and back. */
function moveFocus(by) {
  const current = document.activeElement.closest(".hit");
  const list = current?.parentNode ?? results.querySelector(".hits");
  const hits = [...(list?.children ?? [])];
  const at = hits.indexOf(current) + by;
  if (at < 0) form.q.focus();
  else hits[Math.min(at, hits.length - 1)]?.focus();
}

/** Move the focus to the hit at the same place of the other list. */
function moveAcross(by) {
  const current = document.activeElement.closest(".hit");
  const lists = [...results.querySelectorAll(".hits")];
  const list = lists[lists.indexOf(current.parentNode) + by];
  const at = [...current.parentNode.children].indexOf(current);
  list?.children[Math.min(at, list.children.length - 1)]?.focus();
}

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.isComposing || find("keys").open) return;
  const { key, target } = event;
  const inHit = target.closest(".hit") !== null;
  const inBox = target === form.q;
  if (isTyping(target) && !(inBox && key === "ArrowDown")) return;
  if (key === "/") form.q.select();
  else if (key === "?") find("keys").showModal();
  else if (key === "j" || (key === "ArrowDown" && (inHit || inBox))) moveFocus(1);
  else if (key === "k" || (key === "ArrowUp" && inHit)) moveFocus(-1);
  else if (inHit && key === "ArrowLeft") moveAcross(-1);
  else if (inHit && key === "ArrowRight") moveAcross(1);
  else return;
  event.preventDefault();
});

start();
