"use strict";

const at = (id) => document.getElementById(id);
const MEBI = 2 ** 20;
let model = null;
let messages = [];
let source = null; // of this conversation: "", "text", or the id of a context file
let running = null;

function headers() {
  const key = at("key").value;
  return { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
}

async function reason(answer) {
  try {
    return (await answer.json()).error.message;
  } catch {
    return `the server answered ${answer.status}`;
  }
}

async function begin() {
  const health = await (await fetch("health")).json();
  at("access").hidden = !health.key_required;
  if (health.key_required && !at("key").value) return;
  const answer = await fetch("v1/models", { headers: headers() });
  if (!answer.ok) return say("assistant", await reason(answer)).classList.add("wrong");
  model = (await answer.json()).data[0];
  const settings = model.rocketkv;
  const budget = settings.max_error === null ? `${settings.token_budget} tokens a step` : `error ${settings.max_error}`;
  at("model").textContent = `${model.id}, ${settings.method}, ${budget}`;
  const contexts = await (await fetch("v1/contexts", { headers: headers() })).json();
  for (const context of contexts.data) {
    const known = [...at("source").options].some((option) => option.value === `file ${context.id}`);
    if (!known) at("source").add(new Option(`${context.id} (context file)`, `file ${context.id}`));
  }
}

function say(role, text) {
  const item = document.createElement("li");
  item.className = role;
  const paragraph = item.appendChild(document.createElement("p"));
  paragraph.textContent = text;
  at("talk").append(item);
  item.scrollIntoView({ block: "end" });
  return item;
}

function percent(share) {
  return `${(100 * share).toFixed(share < 0.1 ? 1 : 0)} %`;
}

function show(usage) {
  const own = usage.rocketkv;
  if (own.full_cache_bytes) {
    at("saved").textContent = percent(own.saved_bytes / own.full_cache_bytes);
    const [now, full] = [own.cache_bytes, own.full_cache_bytes].map((bytes) => (bytes / MEBI).toFixed(1));
    at("bytes").textContent = `${now} MiB of ${full} MiB`;
  }
  at("reused").textContent = percent(own.prefix_tokens / usage.prompt_tokens);
  at("tokens").textContent = `${own.prefix_tokens} of ${usage.prompt_tokens} tokens`;
  at("missed").textContent = own.missed_mass === null ? "–" : percent(own.missed_mass);
  at("first").textContent = own.first_token_seconds === null ? "–" : `${own.first_token_seconds.toFixed(2)} s`;
  if (own.seconds > own.first_token_seconds && usage.completion_tokens > 1) {
    const rate = (usage.completion_tokens - 1) / (own.seconds - own.first_token_seconds);
    at("rate").textContent = `then ${rate.toFixed(1)} tokens/s`;
  }
}

function footer(usage) {
  const own = usage.rocketkv;
  return `read ${own.read_tokens} tokens, reused ${own.prefix_tokens}; first token after ` +
    `${own.first_token_seconds.toFixed(2)} s; ${usage.completion_tokens} tokens in ${own.seconds.toFixed(2)} s`;
}

// Yields the documents of an answer's events.
async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data !== "[DONE]") yield JSON.parse(data);
    }
  }
}

function request(question) {
  const content = [{ type: "text", text: question }];
  if (messages.length === 0 && source === "text") {
    content[0].text = `\n\n${question}`;
    content.unshift({ type: "text", text: at("text").value });
  }
  const asked = [...messages, { role: "user", content }];
  const body = {
    model: model.id,
    messages: asked,
    temperature: 0,
    max_tokens: Math.min(512, model.rocketkv.output_tokens),
    stream: true,
    stream_options: { include_usage: true, continuous_usage_stats: true },
    ...(source.startsWith("file ") ? { context: source.slice(5) } : {}),
  };
  return [asked, body];
}

function fix(isFixed) {
  for (const id of ["source", "text", "file"]) at(id).disabled = isFixed;
  at("fixed").hidden = !isFixed;
}

async function ask(question) {
  if (model === null) await begin();
  if (model === null) return;
  if (messages.length === 0) {
    source = at("source").value;
    if (source === "text" && !at("text").value.trim()) source = "";
    fix(true);
    at("document").open = false;
  }
  const [asked, body] = request(question);
  say("user", question);
  const item = say("assistant", "");
  item.classList.add("waiting");
  const text = item.firstChild;
  running = new AbortController();
  at("send").disabled = true;
  at("stop").hidden = false;
  try {
    const answer = await fetch("v1/chat/completions", {
      method: "POST",
      headers: headers(),
      body: JSON.stringify(body),
      signal: running.signal,
    });
    if (!answer.ok) throw new Error(await reason(answer));
    for await (const event of events(answer)) {
      if (event.error) throw new Error(event.error.message);
      const piece = event.choices[0]?.delta.content;
      if (piece) {
        item.classList.remove("waiting");
        text.textContent += piece;
        item.scrollIntoView({ block: "end" });
      }
      if (event.usage) {
        show(event.usage);
        if (event.choices.length === 0) item.append(Object.assign(document.createElement("small"), { textContent: footer(event.usage) }));
      }
    }
    messages = [...asked, { role: "assistant", content: text.textContent }];
  } catch (error) {
    const stopped = error.name === "AbortError";
    if (stopped && text.textContent) messages = [...asked, { role: "assistant", content: text.textContent }];
    else if (messages.length === 0) fix(false);
    if (!stopped) {
      item.classList.add("wrong");
      text.textContent += error.message;
    }
  } finally {
    item.classList.remove("waiting");
    running = null;
    at("send").disabled = false;
    at("stop").hidden = true;
  }
}

at("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const question = at("question").value.trim();
  if (!question || running) return;
  at("question").value = "";
  ask(question);
});
at("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    at("ask").requestSubmit();
  }
});
at("stop").addEventListener("click", () => running?.abort());
at("new").addEventListener("click", () => {
  running?.abort();
  messages = [];
  at("talk").replaceChildren();
  fix(false);
  at("document").open = true;
});
at("source").addEventListener("change", () => {
  at("own").hidden = at("source").value !== "text";
});
at("file").addEventListener("change", async () => {
  const [file] = at("file").files;
  if (file) at("text").value = await file.text();
});
at("access").addEventListener("submit", (event) => event.preventDefault());
at("key").addEventListener("change", () => {
  at("talk").replaceChildren();
  begin();
});
begin();
