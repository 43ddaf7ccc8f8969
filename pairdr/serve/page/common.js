// What the pages share. Texts of the data reach the page as text nodes alone, never as markup.

const KEY = "pairdr-key";
const LATER = [429, 500, 502, 503, 504]; // the same request may well be answered another time
const KINDLY = {
  queue_full: "The server is busy. Try again in a moment.",
  missing_key: "This server asks for a key.",
};
const STOP_WORDS = new Set(
  `a about all also am an and any are as at be because been being but by can could did do does doing for from had has
  have having he her his how i if in into is it its me my no nor not of on or our she should so some such than that the
  their them then there these they this those to us was we were what when where which while who whom whose why will
  with would you your`.split(/\s+/),
);

export const find = (id) => document.getElementById(id);

/** Make an element. Children that are strings become text nodes. */
export function element(tag, properties = {}, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
}

export class ApiError extends Error {
  constructor(message, { status = 0, code = "" } = {}) {
    super(message);
    this.status = status;
    this.code = code;
  }
}

/** Return what the API answers: to a POST of `body` where there is one, else to a GET. */
export async function callApi(path, { body, signal } = {}) {
  const headers = { Accept: "application/json" };
  const key = sessionStorage.getItem(KEY);
  if (key) headers.Authorization = `Bearer ${key}`;
  if (body) headers["Content-Type"] = "application/json";
  let response;
  try {
    const method = body ? "POST" : "GET";
    response = await fetch(path, { method, headers, body: body && JSON.stringify(body), signal });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The server cannot be reached.");
  }
  let answer;
  try {
    answer = await response.json();
  } catch (error) {
    if (error.name === "AbortError") throw error;
  }
  if (response.ok && answer !== undefined) return answer;
  const { message = `The server answered with status ${response.status}.`, code } = answer?.error ?? {};
  throw new ApiError(message, { status: response.status, code });
}

/** Return /settings, and show of the page's frame what goes with them. */
export async function loadSettings() {
  const settings = await callApi("settings");
  find("review-link").hidden = !settings.audit;
  return settings;
}

/** Show an error, and what can be done: give a key, try again. */
export function showProblem(error, retry) {
  if (!(error instanceof ApiError)) console.error(error);
  const parts = [element("p", { textContent: KINDLY[error.code] ?? error.message })];
  if (["missing_key", "wrong_key"].includes(error.code)) parts.push(makeKeyForm(retry));
  else if (retry && (!error.status || LATER.includes(error.status))) {
    const button = element("button", { type: "button", textContent: "Try again" });
    button.addEventListener("click", () => {
      clearProblem();
      retry();
    });
    parts.push(button);
  }
  find("problem").replaceChildren(...parts);
  find("problem").querySelector("input")?.focus();
}

export function clearProblem() {
  find("problem").replaceChildren();
}

function makeKeyForm(retry) {
  const input = element("input", { type: "password", id: "key", autocomplete: "off", required: true });
  input.pattern = "\\s*[!-~]+\\s*"; // no header could carry others
  const label = element("label", { htmlFor: "key", textContent: "Key" });
  const form = element("form", { className: "key-form" }, label, input, element("button", { textContent: "Use it" }));
  const hint = "It is kept until this tab is closed, and sent to this server alone.";
  form.append(element("p", { className: "soft", textContent: hint }));
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    sessionStorage.setItem(KEY, input.value.trim());
    showForget();
    clearProblem();
    retry?.();
  });
  return form;
}

function showForget() {
  find("forget-key").hidden = !sessionStorage.getItem(KEY);
}

find("forget-key").addEventListener("click", () => {
  sessionStorage.removeItem(KEY);
  location.reload();
});
showForget();

/** Return the words of a question that are worth highlighting. */
export function findWords(query) {
  const words = [...query.matchAll(/[\p{L}\p{M}\p{N}]+/gu)].map(([word]) => fold(word));
  return new Set(words.filter((word) => [...word].length > 1 && !STOP_WORDS.has(word)));
}

/** Return a text with the given words in <mark>. */
export function markWords(text, words) {
  const made = document.createDocumentFragment();
  let done = 0;
  for (const match of words.size ? text.matchAll(/[\p{L}\p{M}\p{N}]+/gu) : []) {
    if (!words.has(fold(match[0]))) continue;
    const end = match.index + match[0].length;
    made.append(text.slice(done, match.index), element("mark", { textContent: match[0] }));
    done = end;
  }
  made.append(text.slice(done));
  return made;
}

function fold(word) {
  return word.normalize("NFC").toLowerCase();
}

/** Return what does tasks in their order. Once one fails, which its answer says, those that wait for it are dropped. */
export function makeQueue() {
  let last = Promise.resolve();
  let failures = 0;
  return (task) => {
    const known = failures;
    last = last.then(async () => {
      if (known === failures && !(await task())) failures += 1;
    });
  };
}

/** Say whether a key that is pressed there is meant for the element itself. */
export function isTyping(target) {
  return target.matches("input:not([type=radio], [type=checkbox]), select, textarea");
}

export function formatNumber(value) {
  return Number.isInteger(value) ? String(value) : value.toPrecision(4);
}

/** Return "1 result", "2 results". */
export function count(number, noun) {
  return `${number.toLocaleString("en")} ${noun}${number === 1 ? "" : "s"}`;
}
