// The chat page: conversations that stay in this browser, over /v1/chat/completions.
//
// What the model, a tool or a person wrote reaches the page only through textContent, so that no
// text can become markup; links are made for http, https and mailto alone.

"use strict";

const byId = (id) => document.getElementById(id);
const copyOf = (template) => byId(template).content.firstElementChild.cloneNode(true);

/** An element with its children; strings become text. */
function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

// ---------------------------------------------------------------------------- Markdown

const MAX_NESTING = 6; // of quotes, lists and emphasis; deeper ones stay as they were written
const FENCE = /^ {0,3}(`{3,}|~{3,})[ \t]*([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})[ \t]+(.*?)[ \t#]*$/;
const RULE = /^ {0,3}([-*_])[ \t]*(?:\1[ \t]*){2,}$/;
const ITEM = /^( {0,3}|\t)([-*+]|\d{1,9}[.)])[ \t]+(.*)$/;
const TABLE_LINE = /^ {0,3}\|?[ \t]*:?-+:?[ \t]*(\|[ \t]*:?-+:?[ \t]*)*\|?[ \t]*$/;
const SAFE_LINK = /^(https?:\/\/|mailto:)/i;

/** Text as blocks: {kind, source, ...}. A block depends on its source alone. */
function blocksOf(text, depth = 0) {
  const lines = text.split("\n");
  const blocks = [];
  let at = 0;
  const take = (kind, end, rest) => {
    blocks.push({ kind, depth, source: lines.slice(at, end).join("\n"), ...rest });
    at = end;
  };
  while (at < lines.length) {
    const line = lines[at];
    if (!line.trim()) {
      at += 1;
      continue;
    }
    const fence = FENCE.exec(line);
    const heading = HEADING.exec(line);
    if (fence) {
      const mark = fence[1];
      let end = at + 1;
      while (end < lines.length && !isClosingFence(lines[end], mark)) end += 1;
      take("code", Math.min(end + 1, lines.length), {
        language: fence[2].trim().split(/\s/)[0],
        text: lines.slice(at + 1, end).join("\n"),
      });
    } else if (heading) {
      take("heading", at + 1, { level: heading[1].length, text: heading[2] });
    } else if (RULE.test(line)) {
      take("rule", at + 1);
    } else if (line.startsWith(">") && depth < MAX_NESTING) {
      const end = endOf(lines, at, (next) => next.startsWith(">"));
      const quoted = lines.slice(at, end).map((next) => next.replace(/^> ?/, ""));
      take("quote", end, { text: quoted.join("\n") });
    } else if (ITEM.test(line) && depth < MAX_NESTING) {
      takeList(lines, at, take);
    } else if (line.includes("|") && TABLE_LINE.test(lines[at + 1] ?? "")) {
      take("table", endOf(lines, at, (next) => next.includes("|")));
    } else {
      const end = endOf(lines, at, (next) => next.trim() && !beginsBlock(next));
      take("paragraph", end, { text: lines.slice(at, end).join("\n") });
    }
  }
  return blocks;
}

function isClosingFence(line, mark) {
  const text = line.trim();
  return text.length >= mark.length && text === mark[0].repeat(text.length);
}

function beginsBlock(line) {
  return FENCE.test(line) || HEADING.test(line) || line.startsWith(">") || ITEM.test(line);
}

/** The first line after `at` that does not belong to what begins there. */
function endOf(lines, at, belongs) {
  let end = at + 1;
  while (end < lines.length && belongs(lines[end])) end += 1;
  return end;
}

/** A list: items, each with the lines under it that are indented, or blank within it. */
function takeList(lines, at, take) {
  const isOrdered = /\d/.test(ITEM.exec(lines[at])[2]);
  const first = Number.parseInt(ITEM.exec(lines[at])[2], 10);
  const items = [];
  let end = at;
  while (end < lines.length) {
    const line = lines[end];
    const next = lines[end + 1] ?? "";
    const item = ITEM.exec(line);
    const goesOn = line.trim() ? /^\s/.test(line) : /^\s+\S/.test(next) || ITEM.test(next);
    if (item && /\d/.test(item[2]) === isOrdered) {
      items.push([item[3]]);
    } else if (goesOn) {
      items.at(-1).push(line.replace(/^(\t| {1,4})/, ""));
    } else {
      break;
    }
    end += 1;
  }
  take("list", end, { isOrdered, first, items: items.map((item) => item.join("\n")) });
}

function nodeOf(block) {
  switch (block.kind) {
    case "code":
      return codeBlock(block.text, block.language);
    case "heading":
      return element(block.level < 3 ? "h3" : "h4", {}, ...inline(block.text));
    case "rule":
      return element("hr");
    case "quote":
      return element("blockquote", {}, ...blocksOf(block.text, block.depth + 1).map(nodeOf));
    case "list":
      return listNode(block);
    case "table":
      return tableNode(block.source.split("\n"));
    default:
      return element("p", {}, ...inline(block.text));
  }
}

function listNode(block) {
  const attributes = block.isOrdered && block.first !== 1 ? { start: block.first } : {};
  const list = element(block.isOrdered ? "ol" : "ul", attributes);
  for (const item of block.items) {
    const parts = blocksOf(item, block.depth + 1);
    const isPlain = parts.length === 1 && parts[0].kind === "paragraph";
    const children = isPlain ? inline(parts[0].text) : parts.map(nodeOf);
    list.append(element("li", {}, ...children));
  }
  return list;
}

function tableNode([head, , ...rows]) {
  const cells = (line) => line.trim().replace(/^\||\|$/g, "").split(/(?<!\\)\|/);
  const row = (line, name) =>
    element("tr", {}, ...cells(line).map((cell) => element(name, {}, ...inline(cell.trim()))));
  const body = element("tbody", {}, ...rows.map((line) => row(line, "td")));
  const table = element("table", {}, element("thead", {}, row(head, "th")), body);
  return element("div", { class: "table" }, table);
}

function codeBlock(text, language) {
  const copy = element("button", { type: "button" }, "Copy");
  copy.addEventListener("click", () => copyText(text, copy));
  const header = element("header", {}, element("span", {}, language), copy);
  const pre = element("pre", { tabindex: "0" }, element("code", {}, text));
  return element("div", { class: "codeblock" }, header, pre);
}

const EMPHASIS = { "**": "strong", __: "strong", "*": "em", _: "em", "~~": "del" };

/** Text with code, emphasis and links, as nodes. Linear in the text's length. */
function inline(text, depth = 0) {
  const nodes = [];
  const unclosed = new Set(); // marks that nothing closes from here on
  let plain = "";
  let at = 0;
  const push = (node, end) => {
    if (plain) nodes.push(document.createTextNode(plain));
    plain = "";
    nodes.push(node);
    at = end;
  };
  while (at < text.length) {
    const found = depth < MAX_NESTING ? spanAt(text, at, unclosed) : null;
    if (!found) {
      plain += text[at];
      at += 1;
    } else if (found.kind === "text") {
      plain += found.text;
      at = found.end;
    } else if (found.kind === "code") {
      push(element("code", {}, found.text), found.end);
    } else if (found.kind === "break") {
      push(element("br"), found.end);
    } else if (found.kind === "link") {
      push(linkNode(found, depth), found.end);
    } else {
      push(element(found.kind, {}, ...inline(found.text, depth + 1)), found.end);
    }
  }
  if (plain) nodes.push(document.createTextNode(plain));
  return nodes;
}

function linkNode({ text, target }, depth) {
  const attributes = { href: target, target: "_blank", rel: "noopener noreferrer nofollow" };
  return element("a", attributes, ...(text === target ? [text] : inline(text, depth + 1)));
}

/** What begins at this place of a text: {kind, text, end}; null for an ordinary character. */
function spanAt(text, at, unclosed) {
  const character = text[at];
  if (character === "\\" && /[\\`*_{}[\]()#+\-.!~|>]/.test(text[at + 1] ?? "")) {
    return { kind: "text", text: text[at + 1], end: at + 2 };
  }
  if (character === "\n") return { kind: "break", end: at + 1 };
  if (character === "`") {
    const mark = /`+/y;
    mark.lastIndex = at;
    const ticks = mark.exec(text)[0];
    const close = closing(text, at + ticks.length, ticks, unclosed, false);
    if (close < 0) return { kind: "text", text: ticks, end: at + ticks.length };
    const end = close + ticks.length;
    return { kind: "code", text: text.slice(at + ticks.length, close).trim(), end };
  }
  if (character === "[") return bracketLink(text, at, unclosed);
  if (character === "h" && !/\w/.test(text[at - 1] ?? "")) {
    const bare = /https?:\/\/[^\s<>"'`]+/y;
    bare.lastIndex = at;
    const target = bare.exec(text)?.[0].replace(/[.,;:!?)\]*_]+$/, "");
    return target ? { kind: "link", text: target, target, end: at + target.length } : null;
  }
  for (const mark of [text.slice(at, at + 2), character]) {
    const kind = Object.hasOwn(EMPHASIS, mark) ? EMPHASIS[mark] : null;
    const start = at + mark.length;
    const isInWord = mark[0] === "_" && /\w/.test(text[at - 1] ?? "");
    if (!kind || isInWord || !/\S/.test(text[start] ?? "") || text[start] === mark[0]) continue;
    const close = closing(text, start + 1, mark, unclosed, true);
    if (close >= 0) return { kind, text: text.slice(start, close), end: close + mark.length };
  }
  return null;
}

/** Where a mark closes; -1 if it does not. Emphasis never closes after white space. */
function closing(text, from, mark, unclosed, isEmphasis) {
  if (unclosed.has(mark)) return -1;
  for (let at = text.indexOf(mark, from); at >= 0; at = text.indexOf(mark, at + 1)) {
    const isWhole = text[at - 1] !== mark[0] && text[at + mark.length] !== mark[0];
    if (isWhole && !(isEmphasis && /\s/.test(text[at - 1]))) return at;
  }
  unclosed.add(mark);
  return -1;
}

/** [text](target); an image is a link too, as this page loads nothing from elsewhere. */
function bracketLink(text, at, unclosed) {
  if (unclosed.has("](")) return null;
  const middle = text.indexOf("](", at);
  const end = middle < 0 ? -1 : text.indexOf(")", middle);
  if (end < 0) {
    unclosed.add("](");
    return null;
  }
  const label = text.slice(at + 1, middle);
  const target = text.slice(middle + 2, end).trim().split(/\s/)[0];
  if (/[[\]]/.test(label) || !SAFE_LINK.test(target)) return null;
  return { kind: "link", text: label || target, target, end: end + 1 };
}

/** Show text as Markdown; only blocks that changed since the last call are made again. */
function showMarkdown(container, text) {
  const shown = container.blockSources ?? [];
  const blocks = blocksOf(text);
  let same = 0;
  while (same < blocks.length && blocks[same].source === shown[same]) same += 1;
  while (container.children.length > same) container.lastElementChild.remove();
  container.append(...blocks.slice(same).map(nodeOf));
  container.blockSources = blocks.map((block) => block.source);
}

// ---------------------------------------------------------------------------- Storage

/** Conversations in IndexedDB; in memory where the browser offers none. */
class Conversations {
  #memory = new Map();
  #database = null;

  async open() {
    try {
      const request = indexedDB.open("hybridk2", 1);
      request.onupgradeneeded = () => {
        request.result.createObjectStore("conversations", { keyPath: "id" });
      };
      this.#database = await settled(request);
      const kept = this.#database.transaction("conversations").objectStore("conversations");
      for (const each of await settled(kept.getAll())) this.#memory.set(each.id, each);
    } catch (error) {
      console.warn("Conversations are not kept: ", error);
    }
  }

  get isKept() {
    return this.#database !== null;
  }

  get all() {
    return [...this.#memory.values()].sort((a, b) => b.updated - a.updated);
  }

  async save(conversation) {
    this.#memory.set(conversation.id, conversation);
    await this.#change((kept) => kept.put(conversation));
  }

  async delete(id) {
    this.#memory.delete(id);
    await this.#change((kept) => kept.delete(id));
  }

  async #change(change) {
    if (!this.#database) return;
    const transaction = this.#database.transaction("conversations", "readwrite");
    try {
      await settled(change(transaction.objectStore("conversations")));
    } catch (error) {
      notify(`This browser could not keep the conversation: ${error.message}`);
    }
  }
}

function settled(request) {
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

function newConversation() {
  const bytes = crypto.getRandomValues(new Uint8Array(12));
  const id = Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
  return { id, title: "New conversation", updated: Date.now(), messages: [] };
}

const SETTINGS_KEY = "hybridk2.settings";
const settings = { system: "", temperature: "", max_tokens: "", tools: "", theme: "" };

function loadSettings() {
  try {
    Object.assign(settings, JSON.parse(localStorage.getItem(SETTINGS_KEY) ?? "{}"));
  } catch (error) {
    console.warn("The settings cannot be read: ", error);
  }
}

function saveSettings(changed) {
  Object.assign(settings, changed);
  localStorage.setItem(SETTINGS_KEY, JSON.stringify(settings));
}

// ---------------------------------------------------------------------------- The server

const KEY = "hybridk2.key";
const model = { id: "", contextTokens: 0 };

/** What the server said instead of an answer. */
class Refusal extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

/** Fetch from the server, with its key if it wants one. Throws a Refusal for any other answer. */
async function ask(path, options = {}) {
  const key = sessionStorage.getItem(KEY);
  const headers = { "Content-Type": "application/json" };
  if (key) headers.Authorization = `Bearer ${key}`;
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refusal(0, "The server cannot be reached.");
  }
  if (response.ok) return response;
  if (response.status === 401 && (await askForKey())) return ask(path, options);
  const body = await response.json().catch(() => null);
  throw new Refusal(response.status, body?.error?.message ?? `HTTP ${response.status}`);
}

let connecting = null;

/** Resolves when it is known which model answers. */
function connected() {
  connecting ??= connect().catch((error) => {
    connecting = null;
    throw error;
  });
  return connecting;
}

/** Ask which model answers; while it loads, say so and ask again. */
async function connect() {
  for (;;) {
    try {
      const models = await (await ask("v1/models")).json();
      const [served] = models.data;
      model.id = served.id;
      model.contextTokens = served.context_length ?? 0;
      byId("model").textContent = served.id;
      notify(conversations.isKept ? "" : "This browser keeps no conversations of this page.");
      return;
    } catch (error) {
      notify((await loadingText()) ?? error.message);
      if (error.status === 401) throw error;
      await new Promise((resolve) => setTimeout(resolve, 1000));
    }
  }
}

/** How far the loading of the model is; null when it is not being loaded. */
async function loadingText() {
  const health = await fetch("health").then((answer) => answer.json(), () => null);
  if (health?.status !== "loading") return null;
  const { done_bytes: done, total_bytes: total, seconds_left: left } = health.loading ?? {};
  if (!total) return "The model is being loaded.";
  const share = `${Math.floor((100 * done) / total)} % of ${(total / 1e9).toFixed(1)} GB`;
  return `The model is being loaded: ${share}${left ? `, ${Math.ceil(left)} s left` : ""}`;
}

/** The frames of an event stream: {data} or {comment}. */
async function* framesOf(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const frames = (text + value).split("\n\n");
    text = frames.pop();
    for (const frame of frames) {
      if (frame.startsWith(":")) yield { comment: frame.slice(1).trim() };
      else if (frame.startsWith("data: ")) yield { data: frame.slice("data: ".length) };
    }
  }
}

function requestBody(conversation) {
  // A reply that failed before its first word is shown, and means nothing to the model.
  const isSaid = ({ role, content, tool_calls: calls }) =>
    role !== "assistant" || content || calls.length;
  const messages = conversation.messages.filter(isSaid).map(({ role, content, ...rest }) => {
    const sent = { role, content };
    for (const name of ["reasoning_content", "tool_calls", "tool_call_id", "name"]) {
      if (rest[name]?.length) sent[name] = rest[name];
    }
    return sent;
  });
  if (settings.system.trim()) messages.unshift({ role: "system", content: settings.system });
  const body = { model: model.id, messages, stream: true, stream_options: { include_usage: true } };
  if (settings.temperature !== "") body.temperature = Number(settings.temperature);
  if (settings.max_tokens !== "") body.max_completion_tokens = Number(settings.max_tokens);
  if (settings.tools.trim()) body.tools = JSON.parse(settings.tools);
  return body;
}

/** One reply as it comes. It goes on when the person looks at another conversation. */
class Reply {
  constructor(conversation) {
    this.conversation = conversation;
    this.message = { role: "assistant", content: "", reasoning_content: "", tool_calls: [] };
    this.waiting = "waiting";
    this.began = 0;
    this.thinkingSince = 0;
    this.firstAt = 0;
    this.usage = null;
    this.abort = new AbortController();
  }

  /** Read the whole reply, calling `changed` whenever there is something new to show. */
  async read(changed) {
    const { signal } = this.abort;
    const aborted = new Promise((_, reject) => {
      signal.addEventListener("abort", () => reject(signal.reason));
    });
    await Promise.race([connected(), aborted]);
    this.began = performance.now();
    const body = JSON.stringify(requestBody(this.conversation));
    const options = { method: "POST", body, signal };
    const response = await ask("v1/chat/completions", options);
    this.conversation.messages.push(this.message);
    for await (const { data, comment } of framesOf(response)) {
      if (comment !== undefined) this.waiting = comment;
      else if (data !== "[DONE]") this.#take(JSON.parse(data));
      changed();
    }
    if (!this.message.finish) throw new Refusal(0, "The connection ended before the reply did.");
  }

  #take(chunk) {
    if (chunk.error) throw new Refusal(0, chunk.error.message);
    if (chunk.usage) this.usage = chunk.usage;
    const choice = chunk.choices?.[0];
    if (!choice) return;
    const { content, reasoning_content: thought, tool_calls: calls } = choice.delta ?? {};
    if ((content || thought || calls) && !this.firstAt) this.firstAt = performance.now();
    if (thought) {
      this.thinkingSince ||= performance.now();
      this.message.reasoning_content += thought;
    }
    if (content || calls || choice.finish_reason) this.endThought();
    if (content) this.message.content += content;
    for (const call of calls ?? []) this.#takeCall(call);
    if (choice.finish_reason) this.message.finish = choice.finish_reason;
  }

  #takeCall({ index, id, function: { name, arguments: more } = {} }) {
    const calls = this.message.tool_calls;
    calls[index] ??= { id, type: "function", function: { name, arguments: "" } };
    calls[index].function.arguments += more ?? "";
  }

  get isThinking() {
    return this.thinkingSince > 0;
  }

  get thoughtSeconds() {
    return Math.round((performance.now() - this.thinkingSince) / 1000);
  }

  endThought() {
    if (!this.isThinking) return;
    this.message.thoughtSeconds = this.thoughtSeconds;
    this.thinkingSince = 0;
  }

  /** prefill · decode · context · reused, as in the terminal chat. */
  get speed() {
    const { usage, firstAt, began } = this;
    if (!usage || !firstAt) return "";
    const cached = usage.prompt_tokens_details?.cached_tokens ?? 0;
    const rate = (tokens, milliseconds) => ((1000 * tokens) / milliseconds).toFixed(1);
    const parts = [`prefill ${rate(usage.prompt_tokens - cached, firstAt - began)} tok/s`];
    const seconds = performance.now() - firstAt;
    if (usage.completion_tokens > 1) {
      parts.push(`decode ${rate(usage.completion_tokens - 1, seconds)} tok/s`);
    }
    const limit = model.contextTokens ? ` of ${model.contextTokens.toLocaleString("en")}` : "";
    parts.push(`context ${usage.total_tokens.toLocaleString("en")}${limit}`);
    if (cached) parts.push(`reused ${cached.toLocaleString("en")} tokens`);
    return parts.join(" · ");
  }
}

// ---------------------------------------------------------------------------- What is shown

const conversations = new Conversations();
const replies = new Map(); // by the id of their conversation
let current = newConversation();
let editedIndex = null;
let drawing = false;

const log = byId("log");
const input = byId("input");

function notify(text = "") {
  byId("notice").textContent = text;
  byId("notice").hidden = !text;
}

function showConversation(conversation) {
  current = conversation;
  editedIndex = null;
  notify();
  byId("speed").textContent = conversation.speed ?? "";
  byId("messages").replaceChildren();
  document.body.classList.remove("menu");
  byId("menu").setAttribute("aria-expanded", "false");
  drawMessages();
  drawList();
  log.scrollTop = log.scrollHeight;
  input.focus();
}

function drawList() {
  const list = byId("conversations");
  const rows = new Map([...list.children].map((row) => [row.conversation, row]));
  const wanted = conversations.all.map((each) => rows.get(each) ?? rowOf(each));
  for (const row of wanted) {
    const isCurrent = row.conversation === current;
    row.classList.toggle("current", isCurrent);
    const open = row.firstElementChild;
    open.setAttribute("aria-current", String(isCurrent));
    open.textContent = open.title = row.conversation.title;
  }
  // A row that stays where it is stays the same element, or a click on it would come to nothing.
  const isChanged = wanted.some((row, place) => row !== list.children[place]);
  if (isChanged || wanted.length !== list.children.length) list.replaceChildren(...wanted);
  byId("title").textContent = current.messages.length ? current.title : "";
  document.title = current.messages.length ? `${current.title} · HybridK2` : "HybridK2";
}

function rowOf(conversation) {
  const open = element("button", { class: "open" });
  const remove = element("button", { class: "icon", title: "Delete" });
  remove.append(iconOf("delete"));
  open.addEventListener("click", () => showConversation(conversation));
  remove.addEventListener("click", () => deleteConversation(conversation));
  const row = element("div", {}, open, remove);
  row.conversation = conversation;
  return row;
}

function iconOf(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const use = document.createElementNS("http://www.w3.org/2000/svg", "use");
  use.setAttribute("href", `#icon-${name}`);
  svg.append(use);
  return svg;
}

/** Draw soon, once, however often it is asked. */
function draw() {
  if (drawing) return;
  drawing = true;
  requestAnimationFrame(() => {
    drawing = false;
    drawMessages();
  });
}

function drawMessages() {
  const isAtEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 80;
  const list = byId("messages");
  const shown = current.messages.map((message, index) => ({ message, index }));
  const visible = shown.filter(({ message }) => message.role !== "tool");
  const reply = replies.get(current.id);
  const isWaiting = reply && !current.messages.includes(reply.message);
  if (isWaiting) visible.push({ message: reply.message, index: current.messages.length });
  while (list.children.length > visible.length) list.lastElementChild.remove();
  visible.forEach(({ message, index }, place) => {
    let node = list.children[place];
    if (node?.message !== message) {
      const make = message.role === "user" ? userNode : assistantNode;
      const made = make(message, index);
      made.message = message;
      if (node) node.replaceWith(made);
      else list.append(made);
      node = made;
    }
    if (message.role === "assistant") drawAssistant(node, message, index, reply);
  });
  byId("welcome").hidden = visible.length > 0;
  byId("send").hidden = Boolean(reply);
  byId("stop").hidden = !reply;
  if (isAtEnd) log.scrollTop = log.scrollHeight;
  showDown();
}

function userNode(message, index) {
  const node = copyOf("user-template");
  const text = node.querySelector(".text");
  text.textContent = message.content;
  text.dir = "auto";
  onCopy(node, () => message.content);
  node.querySelector(".edit").addEventListener("click", () => edit(index));
  return node;
}

function assistantNode(message, index) {
  const node = copyOf("assistant-template");
  node.querySelector(".text").dir = "auto";
  node.querySelector(".reasoning").dir = "auto";
  node.querySelector("summary").addEventListener("click", () => {
    node.isThoughtChosen = true;
  });
  onCopy(node, () => message.content);
  node.querySelector(".retry").addEventListener("click", () => retry(index));
  return node;
}

function drawAssistant(node, message, index, reply) {
  const isStreaming = reply?.message === message;
  const isThinking = isStreaming && reply.isThinking;
  node.classList.toggle("streaming", isStreaming);
  drawThought(node, message, isThinking, reply);
  showMarkdown(node.querySelector(".text"), message.content);
  drawCalls(node.querySelector(".calls"), message, index, isStreaming);
  const isEmpty = !message.content && !message.reasoning_content && !message.tool_calls.length;
  const waiting = node.querySelector(".waiting");
  waiting.hidden = !(isStreaming && isEmpty);
  waiting.textContent = isStreaming ? reply.waiting : "";
  const mistake = node.querySelector(".mistake");
  mistake.textContent = message.mistake ?? (message.finish === "length" ? CUT_OFF : "");
  mistake.hidden = isStreaming || !mistake.textContent;
  node.querySelector(".copy").hidden = !message.content;
}

const CUT_OFF = "The reply met the bound on its tokens.";

function drawThought(node, message, isThinking, reply) {
  const thought = node.querySelector(".thought");
  thought.hidden = !message.reasoning_content;
  thought.classList.toggle("open", isThinking);
  if (!node.isThoughtChosen) thought.open = isThinking;
  const seconds = message.thoughtSeconds ?? 0;
  thought.querySelector("summary").textContent = isThinking
    ? `Thinking, ${reply.thoughtSeconds} s`
    : `Thought for ${seconds < 1 ? "less than a second" : `${seconds} s`}`;
  const reasoning = node.querySelector(".reasoning");
  if (reasoning.textContent.length !== message.reasoning_content.length) {
    const isAtEnd = reasoning.scrollHeight - reasoning.scrollTop - reasoning.clientHeight < 30;
    reasoning.textContent = message.reasoning_content;
    if (isAtEnd) reasoning.scrollTop = reasoning.scrollHeight;
  }
}

function drawCalls(container, message, index, isStreaming) {
  while (container.children.length > message.tool_calls.length) container.lastElementChild.remove();
  message.tool_calls.forEach((call, place) => {
    let form = container.children[place];
    if (!form) {
      form = copyOf("call-template");
      form.querySelector("b").textContent = call.function.name;
      form.addEventListener("submit", (event) => {
        event.preventDefault();
        giveResult(message, call, form.querySelector("textarea").value);
      });
      container.append(form);
    }
    form.querySelector("pre").textContent = prettyJson(call.function.arguments);
    const result = resultsAfter(index).get(call.id);
    const isAnswered = result !== undefined;
    const field = form.querySelector("textarea");
    if (isAnswered) field.value = result.content;
    field.readOnly = isAnswered;
    form.classList.toggle("answered", isAnswered);
    form.querySelector("button").disabled = isStreaming;
  });
}

/** The results that stand after an assistant message, by the id of their call. */
function resultsAfter(index) {
  const results = new Map();
  for (const message of current.messages.slice(index + 1)) {
    if (message.role !== "tool") break;
    results.set(message.tool_call_id, message);
  }
  return results;
}

function prettyJson(text) {
  try {
    return JSON.stringify(JSON.parse(text), null, 2);
  } catch {
    return text; // not whole yet
  }
}

function onCopy(node, text) {
  const button = node.querySelector(".copy");
  button.addEventListener("click", () => copyText(text(), button));
}

async function copyText(text, button) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    // Browsers offer the clipboard to https and localhost only; this is the way from elsewhere.
    const field = element("textarea");
    field.value = text;
    button.after(field);
    field.select();
    document.execCommand("copy");
    field.remove();
  }
  const before = [...button.childNodes];
  button.replaceChildren(iconOf("check"));
  button.disabled = true;
  setTimeout(() => {
    button.replaceChildren(...before);
    button.disabled = false;
  }, 1200);
}

function showDown() {
  byId("down").hidden = log.scrollHeight - log.scrollTop - log.clientHeight < 160;
}

// ---------------------------------------------------------------------------- What one does

function send(text) {
  if (!text.trim() || replies.has(current.id)) return;
  if (editedIndex !== null) current.messages.length = editedIndex;
  editedIndex = null;
  const unanswered = callsWithoutResult();
  if (unanswered.length) {
    notify("Give the result of the tool call first.");
    return;
  }
  if (!current.messages.length) current.title = text.trim().split("\n")[0].slice(0, 60);
  current.messages.push({ role: "user", content: text });
  input.value = "";
  fitInput();
  answer(current);
}

function callsWithoutResult() {
  const index = current.messages.findLastIndex((message) => message.role === "assistant");
  const results = resultsAfter(index);
  return (current.messages[index]?.tool_calls ?? []).filter((call) => !results.has(call.id));
}

/** Let the model go on with a conversation. */
async function answer(conversation) {
  if (model.id) notify(); // else it says how far the loading is
  byId("speed").textContent = "";
  const reply = new Reply(conversation);
  replies.set(conversation.id, reply);
  drawMessages();
  log.scrollTop = log.scrollHeight;
  await keep(conversation);
  const clock = setInterval(draw, 1000); // the seconds of a thought
  try {
    await reply.read(draw);
  } catch (error) {
    failed(reply, error);
  } finally {
    clearInterval(clock);
    reply.endThought();
    replies.delete(conversation.id);
    conversation.speed = reply.speed;
    await keep(conversation);
    if (conversation === current) byId("speed").textContent = reply.speed;
    draw();
  }
}

function failed(reply, error) {
  const { conversation, message } = reply;
  if (error.name === "AbortError") {
    message.mistake = "Stopped.";
  } else {
    const isSaid = error instanceof Refusal;
    message.mistake = isSaid ? error.message : `The connection broke off: ${error.message}.`;
  }
  // Calls that are not whole must not be answered.
  message.tool_calls = [];
  if (!conversation.messages.includes(message)) conversation.messages.push(message);
}

async function keep(conversation) {
  conversation.updated = Date.now();
  await conversations.save(conversation);
  drawList();
  draw();
}

function retry(index) {
  if (replies.has(current.id)) return;
  current.messages.length = index;
  answer(current);
}

function edit(index) {
  editedIndex = index;
  input.value = current.messages[index].content;
  fitInput();
  input.focus();
  notify("Editing: what follows will be asked anew. Esc leaves it as it is.");
}

function giveResult(message, call, text) {
  if (replies.has(current.id) || current.messages.at(-1).role === "user") return;
  const { name } = call.function;
  current.messages.push({ role: "tool", tool_call_id: call.id, name, content: text });
  if (callsWithoutResult().length) keep(current);
  else answer(current);
}

async function deleteConversation(conversation) {
  if (!confirm(`Delete “${conversation.title}”?`)) return;
  replies.get(conversation.id)?.abort.abort();
  await conversations.delete(conversation.id);
  if (conversation.id === current.id) showConversation(newConversation());
  else drawList();
}

function escape() {
  if (editedIndex !== null) {
    editedIndex = null;
    input.value = "";
    fitInput();
    notify();
  } else {
    replies.get(current.id)?.abort.abort();
  }
}

function fitInput() {
  input.style.height = "auto";
  input.style.height = `${input.scrollHeight}px`;
}

// ---------------------------------------------------------------------------- Dialogs and start

let askingForKey = null;

/** Whether a person gave a key; asked once, however many requests want one. */
function askForKey() {
  askingForKey ??= new Promise((resolve) => {
    const dialog = byId("key-dialog");
    const field = dialog.querySelector("input");
    dialog.returnValue = "";
    dialog.onclose = () => {
      const key = dialog.returnValue === "save" ? field.value.trim() : "";
      if (key) sessionStorage.setItem(KEY, key);
      field.value = "";
      askingForKey = null;
      resolve(Boolean(key));
    };
    dialog.showModal();
  });
  return askingForKey;
}

function openSettings() {
  const dialog = byId("settings-dialog");
  const form = dialog.querySelector("form");
  for (const name of ["system", "temperature", "max_tokens", "tools"]) {
    form.elements[name].value = settings[name];
  }
  form.querySelector(".mistake").textContent = "";
  dialog.showModal();
}

function closeSettings(event) {
  const form = event.target;
  if (event.submitter?.value !== "save") return;
  const changed = {};
  for (const name of ["system", "temperature", "max_tokens", "tools"]) {
    changed[name] = form.elements[name].value;
  }
  try {
    const tools = changed.tools.trim() ? JSON.parse(changed.tools) : [];
    if (!Array.isArray(tools)) throw new Error("expected a list");
  } catch (error) {
    event.preventDefault();
    form.querySelector(".mistake").textContent = `The tools are no JSON list: ${error.message}`;
    return;
  }
  saveSettings(changed);
}

function changeTheme() {
  const isDark = matchMedia("(prefers-color-scheme: dark)").matches;
  const shown = settings.theme || (isDark ? "dark" : "light");
  saveSettings({ theme: shown === "dark" ? "light" : "dark" });
  document.documentElement.dataset.theme = settings.theme;
}

function toggleMenu() {
  const isOpen = document.body.classList.toggle("menu");
  byId("menu").setAttribute("aria-expanded", String(isOpen));
}

function listen() {
  byId("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    send(input.value);
  });
  input.addEventListener("input", fitInput);
  input.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      send(input.value);
    } else if (event.key === "ArrowUp" && !input.value && !replies.has(current.id)) {
      const last = current.messages.findLastIndex((message) => message.role === "user");
      if (last < 0) return;
      event.preventDefault(); // the caret stays at the end
      edit(last);
    }
  });
  document.addEventListener("keydown", (event) => {
    if (document.querySelector("dialog[open]")) return;
    if (event.key === "Escape") escape();
    if (event.key.toLowerCase() === "o" && event.shiftKey && (event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      showConversation(newConversation());
    }
  });
  byId("examples").addEventListener("click", (event) => {
    if (event.target.matches("button")) send(event.target.textContent);
  });
  byId("stop").addEventListener("click", () => replies.get(current.id)?.abort.abort());
  byId("new").addEventListener("click", () => showConversation(newConversation()));
  byId("menu").addEventListener("click", toggleMenu);
  byId("shade").addEventListener("click", toggleMenu);
  byId("theme").addEventListener("click", changeTheme);
  byId("settings").addEventListener("click", openSettings);
  byId("settings-dialog").addEventListener("submit", closeSettings);
  byId("down").addEventListener("click", () => {
    log.scrollTo({ top: log.scrollHeight, behavior: "smooth" });
  });
  log.addEventListener("scroll", showDown, { passive: true });
  addEventListener("pagehide", () => {
    for (const { conversation } of replies.values()) conversations.save(conversation);
  });
}

loadSettings();
if (settings.theme) document.documentElement.dataset.theme = settings.theme;
listen();
await conversations.open();
drawList();
drawMessages();
connected().catch(() => {}); // it has said what is wrong

