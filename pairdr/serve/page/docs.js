// Shows the API as /openapi.json describes it.

import { callApi, clearProblem, element, find, loadSettings, showProblem } from "./common.js";

let api;
let keys;

async function start() {
  clearProblem();
  try {
    ({ keys } = await loadSettings());
    api = await callApi("openapi.json");
  } catch (error) {
    showProblem(error, start);
    return;
  }
  const calls = Object.entries(api.paths).flatMap(([path, methods]) =>
    Object.entries(methods).map(([method, call]) => makeCall(method.toUpperCase(), path, call)),
  );
  find("paths").replaceChildren(...calls);
  const schemas = Object.entries(api.components?.schemas ?? {});
  find("schemas").hidden = !schemas.length;
  find("schemas").append(...schemas.map(([name, schema]) => makeSchema(name, schema)));
}

function makeCall(method, path, call) {
  const title = element("h2", {}, element("code", { textContent: `${method} ${path}` }));
  const about = (call.description ?? call.summary ?? "").split(/\n{2,}/);
  const section = element("section", { className: "call" }, title);
  section.append(...about.map((text) => element("p", { textContent: text })));
  const parameters = call.parameters ?? [];
  if (parameters.length) {
    const fields = parameters.map(({ name, required, schema, description }) => [name, required, schema, description]);
    section.append(makeTable("Parameters", fields));
  }
  const body = bodyOf(call.requestBody);
  if (body) section.append(makeTable("Body", fieldsOf(body)));
  section.append(element("pre", { textContent: writeCurl(method, path, parameters, body) }));
  const answers = new Map();
  for (const [status, answer] of Object.entries(call.responses ?? {})) {
    const form = writeAnswer(answer);
    answers.set(form, [...(answers.get(form) ?? []), status]);
  }
  const lines = [...answers].map(([form, statuses]) => `${statuses.join(", ")}: ${form}`);
  section.append(element("p", { className: "soft", textContent: `Answers: ${lines.join("; ")}.` }));
  return section;
}

function makeSchema(name, schema) {
  const details = element("details", {}, element("summary", {}, element("code", { textContent: name })));
  if (schema.description) details.append(element("p", { textContent: schema.description }));
  const { properties } = schema;
  details.append(properties ? makeTable("Fields", fieldsOf(schema)) : element("p", { textContent: writeType(schema) }));
  return details;
}

/** Return a table of [name, whether it is required, schema, description]. */
function makeTable(title, fields) {
  const names = [title, "type", "meaning"].map((text) => element("th", { scope: "col", textContent: text }));
  const rows = fields.map(([name, required, schema, description]) => {
    const label = element("td", {}, element("code", { textContent: name }), required ? " *" : "");
    const cells = [writeType(schema), description ?? ""].map((text) => element("td", { textContent: text }));
    return element("tr", {}, label, ...cells);
  });
  const table = element("table", {}, element("thead", {}, element("tr", {}, ...names)), element("tbody", {}, ...rows));
  return element("div", { className: "scroll" }, table);
}

const bodyOf = (holder) => Object.values(holder?.content ?? {})[0]?.schema;

/** Return what is answered: the name of its form, or what is said of it. */
function writeAnswer(answer) {
  const schema = bodyOf(answer);
  return schema && Object.keys(schema).length ? writeType(schema) : (answer.description ?? "");
}

const resolve = (schema) => (schema?.$ref ? api.components.schemas[schema.$ref.split("/").pop()] : schema) ?? {};

function fieldsOf(schema) {
  const { properties = {}, required = [] } = resolve(schema);
  const describe = (field) => field.description ?? resolve(field).description;
  return Object.entries(properties).map(([name, field]) => [name, required.includes(name), field, describe(field)]);
}

/** Return a schema in words: its type, its limits, its default. */
function writeType(schema = {}) {
  if (schema.$ref) return schema.$ref.split("/").pop();
  const choices = schema.anyOf ?? schema.oneOf;
  let text = schema.type ?? "anything";
  if (choices) text = choices.filter(({ type }) => type !== "null").map(writeType).join(" or ");
  if (schema.enum) text = schema.enum.map((value) => JSON.stringify(value)).join(" or ");
  if ("const" in schema) text = JSON.stringify(schema.const);
  if (schema.type === "array") text = `list of ${writeType(schema.items)}`;
  const low = schema.minimum ?? schema.minLength ?? schema.minItems;
  const high = schema.maximum ?? schema.maxLength ?? schema.maxItems;
  const unit = "maxLength" in schema || "minLength" in schema ? " characters" : "";
  if (low !== undefined && high !== undefined) text += `, ${low} to ${high}${unit}`;
  else if (low !== undefined) text += `, at least ${low}${unit}`;
  else if (high !== undefined) text += `, at most ${high}${unit}`;
  if (schema.default != null) text += `, default ${JSON.stringify(schema.default)}`;
  return text;
}

/** Return a value that fits a schema: of an object the fields that are required, or else the first. */
function makeExample(schema) {
  const form = resolve(schema);
  const given = form.example ?? form.examples?.[0] ?? form.default ?? form.const ?? form.enum?.[0];
  if (given != null) return given;
  const choices = form.anyOf ?? form.oneOf;
  if (choices) return makeExample(choices[0]);
  if (form.type === "array") return [makeExample(form.items)];
  if (form.type === "integer" || form.type === "number") return form.minimum ?? 1;
  if (form.type === "boolean") return true;
  if (form.type === "string") return "...";
  const { properties = {}, required = [] } = form;
  const wanted = required.length ? required : Object.keys(properties).slice(0, 1);
  return Object.fromEntries(wanted.map((name) => [name, makeExample(properties[name])]));
}

/** Return a line for a shell. */
function writeCurl(method, path, parameters, body) {
  const url = new URL(path.replace(/^\//, ""), new URL("./", location.href));
  for (const { name, required, schema, in: place } of parameters) {
    if (!required || place !== "query") continue;
    for (const value of [makeExample(schema)].flat()) url.searchParams.append(name, value);
  }
  const quote = (text) => `'${text.replaceAll("'", "'\\''")}'`;
  const parts = ["curl"];
  if (method !== "GET" && !(method === "POST" && body)) parts.push("-X", method);
  if (keys) parts.push("-H", '"Authorization: Bearer $KEY"');
  if (body) parts.push("-H", quote("Content-Type: application/json"), "-d", quote(JSON.stringify(makeExample(body))));
  return [...parts, quote(url.href)].join(" ");
}

start();
