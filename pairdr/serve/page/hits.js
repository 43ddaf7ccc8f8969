// Lists of hits: one, or two side by side.

import { callApi, element, find, findWords, formatNumber, makeQueue, markWords, showProblem } from "./common.js";

const relevance = new Map(); // what was said here of (query, passage): true, false, or null where it was taken back
let voteViews = []; // in two lists a passage stands twice
const enqueue = makeQueue();
const cuts = new ResizeObserver((changes) => changes.forEach(({ target }) => offerMore(target)));

/**
 * Show what models answered to a query.
 *
 * @param place where; what stood there goes.
 * @param answers answers of /search, each with `hits` and `roundTrip` in milliseconds: none, one, or the model's and
 *   that of the one it is compared with.
 * @param options `feedback`: whether hits can be judged. `addFilter`: called with FIELD=VALUE.
 */
export function showLists(place, query, answers, options) {
  cuts.disconnect();
  voteViews = [];
  const words = findWords(query);
  const [mine, other] = answers;
  const sections = answers.map((answer) => {
    const rows = answer.hits.map((hit, at) => {
      const move = other && findMove(hit.id, mine.hits, other.hits);
      return makeHit(hit, at + 1, { query, words, move, ...options });
    });
    const heading = element("h2", { textContent: answer.model });
    const list = element("ol", { className: "hits" }, ...rows);
    const frame = { className: "list", ariaLabel: `Results of ${answer.model}` };
    return element("section", frame, heading, makeFacts(answer), list);
  });
  document.body.classList.toggle("two", Boolean(other));
  place.replaceChildren(...sections);
  if (other) place.prepend(makeLegend(mine.model, other.model));
  refreshVotes();
  for (const passage of place.querySelectorAll(".passage")) cuts.observe(passage);
}

function makeFacts({ version, mode, reranked, milliseconds, roundTrip }) {
  const facts = [
    `version ${version}`,
    (mode === "bm25" ? "BM25" : mode) + (reranked ? ", reranked" : ""),
    `${formatTime(milliseconds)} on the server, ${formatTime(roundTrip)} round trip`,
  ];
  return element("p", { className: "soft facts" }, ...facts.map((fact) => element("span", { textContent: fact })));
}

function makeLegend(mine, other) {
  const text = `What changed from ${other} to ${mine}: up or down by so many places, new in the list, or gone from it.`;
  return element("p", { className: "soft legend", textContent: text });
}

const formatTime = (milliseconds) => `${milliseconds < 10 ? milliseconds.toFixed(1) : Math.round(milliseconds)} ms`;

/** Return [kind, words] of how a passage's place changed from the other list to mine; both lists say the same. */
function findMove(id, mine, other) {
  const here = mine.findIndex((hit) => hit.id === id);
  const there = other.findIndex((hit) => hit.id === id);
  if (there < 0) return ["up", "new"];
  if (here < 0) return ["down", "gone"];
  if (here === there) return ["same", "same place"];
  return here < there ? ["up", `up ${there - here}`] : ["down", `down ${here - there}`];
}

function makeHit(hit, rank, { query, words, move, feedback, addFilter }) {
  const head = element("div", { className: "head" }, element("span", { className: "rank", textContent: rank }));
  if (hit.title) head.append(element("h3", { dir: "auto" }, markWords(hit.title, words)));
  const place = element("span", { className: "place" });
  if (move) place.append(element("span", { className: `move ${move[0]}`, textContent: move[1] }));
  place.append(element("span", { className: "unseen", textContent: "score " }));
  place.append(element("span", { className: "score", title: "score", textContent: formatNumber(hit.score) }));
  head.append(place);

  const passage = element("p", { className: "passage", dir: "auto" }, markWords(hit.text, words));
  const more = element("button", { type: "button", className: "more quiet", textContent: "Show all", hidden: true });
  more.addEventListener("click", () => {
    more.textContent = passage.classList.toggle("whole") ? "Show less" : "Show all";
  });

  const foot = element("div", { className: "foot" }, element("code", { title: "id", textContent: hit.id }));
  foot.append(...Object.entries(hit.metadata).flatMap(([field, value]) => makeChips(field, value, addFilter)));
  if (feedback) foot.append(makeVotes(query, hit.id));
  return element("li", { className: "hit", tabIndex: -1 }, head, passage, more, foot);
}

function offerMore(passage) {
  const whole = passage.classList.contains("whole");
  passage.nextElementSibling.hidden = !whole && passage.scrollHeight <= passage.clientHeight + 1;
}

/** Return a field of the metadata; what a filter can ask for is a button that adds the filter. */
function makeChips(field, value, addFilter) {
  if (Array.isArray(value)) return value.flatMap((item) => makeChips(field, item, addFilter));
  const text = typeof value === "string" ? value : JSON.stringify(value);
  const condition = `${field}=${text}`;
  const parts = [element("span", { className: "soft", textContent: `${field} ` }), text];
  // The filters stand in lines, whose ends are trimmed, and the first = ends the field.
  const writable = field && !field.includes("=") && !/\n|^\s|\s$/.test(condition);
  if (!writable || (value !== null && typeof value === "object")) {
    return [element("span", { className: "chip" }, ...parts)];
  }
  const chip = element("button", { type: "button", className: "chip", title: "Search only among these" }, ...parts);
  chip.addEventListener("click", () => addFilter(condition));
  return [chip];
}

function makeVotes(query, id) {
  const about = JSON.stringify([query, id]);
  const buttons = [true, false].map((value) => {
    const button = element("button", { type: "button", className: value ? "vote" : "vote against" });
    button.title = button.ariaLabel = value ? "relevant" : "not relevant";
    button.append(find("thumb").content.cloneNode(true));
    // What a click means is known once those before it are written: a second one takes back what the first has said.
    button.addEventListener("click", () =>
      enqueue(() => vote(query, id, about, relevance.get(about) === value ? null : value)),
    );
    voteViews.push(() => button.setAttribute("aria-pressed", relevance.get(about) === value));
    return button;
  });
  const votes = element("span", { className: "votes" }, ...buttons);
  votes.setAttribute("role", "group");
  votes.ariaLabel = "Does it answer the question?";
  return votes;
}

const refreshVotes = () => voteViews.forEach((refresh) => refresh());

/** Write what is said of a hit, and return whether it is written. */
async function vote(query, id, about, relevant) {
  const before = relevance.get(about) ?? null;
  relevance.set(about, relevant);
  refreshVotes();
  try {
    await callApi("feedback", { body: { query, passage_id: id, relevant } });
    const said = { true: "relevant", false: "not relevant", null: "no judgement" };
    find("status").textContent = `Noted: ${said[relevant]}.`;
    return true;
  } catch (error) {
    relevance.set(about, before);
    refreshVotes();
    showProblem(error, () => enqueue(() => vote(query, id, about, relevant)));
    return false;
  }
}
