// The audit view: labels that look wrong, to be marked one by one.

import { callApi, clearProblem, count, element, find, findWords } from "./common.js";
import { formatNumber, isTyping, loadSettings, makeQueue, markWords, showProblem } from "./common.js";

const PAGE = 100; // findings of one request
const KINDS = {
  near_copy: "near copy of a positive",
  negative_above_positive: "negative above the positive",
  contradicted: "pseudo positive contradicted",
  unretrieved_positive: "positive not found",
};
const MARKS = { accept: "a", relabel: "r", drop: "d", "": "u" };
const NOT_RELEVANT = {
  accept: "Right, it is not relevant: judged so, and no later audit asks again.",
  relabel: "It does answer the question: it becomes a positive, with a training row.",
  drop: "Use it neither way: it is no negative any more.",
};
const MEANINGS = {
  negative: NOT_RELEVANT,
  unlabelled: NOT_RELEVANT,
  positive: {
    accept: "Right, it answers the question: nothing changes.",
    relabel: "It does not answer it: judged as not relevant.",
    drop: "Use it neither way: the label goes.",
  },
  pseudo: {
    accept: "Right, it answers the question: nothing changes.",
    relabel: "It does not answer it: its training row goes.",
    drop: "Use it neither way: its training row goes.",
  },
};
const filter = find("filter");
let findings = [];
let shown = []; // those that fitted the filter when it was set: a row that is marked stays, and can be gone back to
let current;
const enqueue = makeQueue();

async function start() {
  clearProblem();
  try {
    const settings = await loadSettings();
    find("review-link").hidden = false;
    find("off").hidden = settings.audit;
    if (settings.audit) await load();
  } catch (error) {
    showProblem(error, start);
  }
}

async function load() {
  findings = [];
  let page;
  do {
    page = await callApi(`audit?start=${findings.length}&count=${PAGE}`);
    findings.push(...page.findings);
  } while (page.findings.length && findings.length < page.total);
  const link = new URLSearchParams(location.search);
  const kinds = Object.keys(KINDS).filter((kind) => findings.some((finding) => finding.kind === kind));
  const chosen = kinds.includes(link.get("kind")) ? link.get("kind") : "";
  const switches = ["", ...kinds].map((kind) => {
    const radio = element("input", { type: "radio", name: "kind", value: kind, checked: kind === chosen });
    return element("label", {}, radio, element("span", { textContent: KINDS[kind] ?? "all kinds" }));
  });
  find("kinds").replaceChildren(find("kinds").querySelector("legend"), ...switches);
  filter.unmarked.checked = link.get("unmarked") === "true";
  find("audit").hidden = false;
  fillList();
}

const fits = (finding) => !filter.kind.value || finding.kind === filter.kind.value;

/** List what fits the filter, and go to the first that has no mark. */
function fillList() {
  shown = findings.filter((finding) => fits(finding) && !(filter.unmarked.checked && finding.mark));
  find("rows").replaceChildren(...shown.map(makeRow));
  show(shown.find((finding) => !finding.mark) ?? shown[0]);
}

function makeRow(finding) {
  const row = element("button", { type: "button", className: "row" });
  row.addEventListener("click", () => show(finding));
  row.append(
    element("span", { className: "number", textContent: finding.rank ?? "" }),
    element("span", { className: "text", dir: "auto", textContent: finding.query }),
    element("span", { className: "tag" }),
    element("span", { className: "kind soft", textContent: KINDS[finding.kind] }),
  );
  return element("li", {}, row);
}

/** Show a finding; none where there is none. */
function show(finding) {
  current = finding;
  const at = shown.indexOf(finding);
  showProgress();
  find("finding").hidden = !finding;
  [...find("rows").children].forEach(({ firstChild: row }, place) => {
    row.ariaCurrent = place === at;
    const tag = row.querySelector(".tag");
    tag.textContent = shown[place].mark;
    tag.hidden = !shown[place].mark;
  });
  if (!finding) return;
  const row = find("rows").children[at];
  find("rows").scrollTop = row.offsetTop - find("rows").clientHeight / 2; // scrollIntoView would scroll the page, too
  const words = findWords(finding.query);
  find("position").textContent = `${at + 1} of ${shown.length}`;
  find("kind").textContent = KINDS[finding.kind];
  find("query").textContent = finding.query;
  find("suggestion").textContent = finding.suggestion;
  find("passage-label").textContent = `This passage: ${finding.label}`;
  find("passage").replaceChildren(markWords(finding.passage, words));
  find("passage-id").textContent = finding.passage_id;
  find("other-side").hidden = !finding.other_id;
  const ofPositive = ["near_copy", "negative_above_positive"].includes(finding.kind);
  find("other-label").textContent = ofPositive ? "Compared with: the positive" : "Compared with: what is ranked first";
  find("other").replaceChildren(markWords(finding.other, words));
  find("other-id").textContent = finding.other_id;
  showNumbers(finding);
  showMarks(finding);
  find("previous").disabled = at === 0;
  find("next").disabled = at === shown.length - 1;
}

function showProgress() {
  const fitting = findings.filter(fits);
  const marked = fitting.filter((finding) => finding.mark).length;
  find("bar").max = fitting.length || 1;
  find("bar").value = marked;
  find("marked").textContent = `${marked} of ${count(fitting.length, "finding")} marked`;
  find("done").hidden = !fitting.length || marked < fitting.length;
}

function showNumbers(finding) {
  const rows = [
    ["teacher's score", finding.teacher_score, finding.other_teacher_score],
    ["final model's rank", finding.model_rank, finding.other_model_rank],
    ["final model's score", finding.model_score],
    ["student's rank", finding.student_rank],
    ["BM25's rank", finding.bm25_rank],
    ["common five-word grams", finding.jaccard],
  ].filter(([, ...values]) => values.some((value) => value != null));
  const lines = rows.map(([name, ...values]) => {
    const line = element("tr", {}, element("td", { textContent: name }));
    for (const at of [0, 1]) {
      const number = values[at] == null ? "" : formatNumber(values[at]);
      line.append(element("td", { className: "number", textContent: number }));
    }
    return line;
  });
  find("numbers").replaceChildren(...lines);
  find("numbers").closest("table").hidden = !rows.length;
}

function showMarks(finding) {
  for (const { button, meaning, mark } of marks) {
    button.ariaPressed = finding.mark === mark;
    meaning.textContent = MEANINGS[finding.label][mark] ?? "Not decided: the label stays.";
  }
}

const marks = Object.entries(MARKS).map(([mark, key]) => {
  const meaning = element("p", { id: `meaning-${key}` });
  const name = mark ? mark[0].toUpperCase() + mark.slice(1) : "No mark";
  const button = element("button", { type: "button" }, `${name} `, element("kbd", { textContent: key }));
  button.setAttribute("aria-describedby", meaning.id);
  button.addEventListener("click", () => markCurrent(mark));
  find("marks").append(element("div", {}, button, meaning));
  return { button, meaning, mark };
});

/** Mark what is shown once marks before this one are written: keys may come faster. */
function markCurrent(mark) {
  enqueue(() => save(current, mark));
}

/** Write a mark to the audit, go to the next finding without one, and return whether it is written. */
async function save(finding, mark) {
  clearProblem();
  try {
    const { query_id, passage_id } = finding;
    await callApi("audit", { body: { query_id, passage_id, mark } });
    finding.mark = mark;
    const at = shown.indexOf(finding);
    const unmarked = [...shown.slice(at + 1), ...shown.slice(0, at)].find((other) => !other.mark);
    show(mark && unmarked && current === finding ? unmarked : current);
    find("status").textContent = mark ? `Marked: ${mark}.` : "The mark is taken away.";
    return true;
  } catch (error) {
    showProblem(error, () => enqueue(() => save(finding, mark)));
    return false;
  }
}

function step(by) {
  const next = shown[shown.indexOf(current) + by];
  if (next) show(next);
}

find("previous").addEventListener("click", () => step(-1));
find("next").addEventListener("click", () => step(1));
filter.addEventListener("change", () => {
  const link = new URLSearchParams();
  if (filter.kind.value) link.set("kind", filter.kind.value);
  if (filter.unmarked.checked) link.set("unmarked", "true");
  history.replaceState(null, "", `${location.pathname}${link.size ? `?${link}` : ""}`);
  fillList();
});
filter.addEventListener("submit", (event) => event.preventDefault());

document.addEventListener("keydown", (event) => {
  const { key, target } = event;
  if (event.ctrlKey || event.metaKey || event.altKey || isTyping(target) || !current) return;
  if (target.type === "radio" && key.startsWith("Arrow")) return;
  const inList = find("rows").contains(target);
  const mark = Object.keys(MARKS).find((name) => MARKS[name] === key);
  const pressing = key === "Enter" && find("marks").contains(target);
  // A key that is held would mark what nobody has seen.
  if (event.repeat && (mark !== undefined || pressing)) return event.preventDefault();
  if (mark !== undefined) markCurrent(mark);
  else if (key === "n" || key === "ArrowRight" || (inList && key === "ArrowDown")) step(1);
  else if (key === "p" || key === "ArrowLeft" || (inList && key === "ArrowUp")) step(-1);
  else return;
  event.preventDefault();
});

start();
