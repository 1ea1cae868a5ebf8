// What the page asks of the server. Every failure becomes an Error whose message is a sentence for the user.

const NO_ANSWER = "The server does not answer. Is serve.py still running?";

async function request(path, options) {
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error(NO_ANSWER);
  }
  if (response.ok) return response;
  const answer = await response.json().catch(() => ({}));
  throw new Error(answer.error?.message ?? `The server answered with status ${response.status}.`);
}

function post(path, body, signal) {
  return request(path, {
    method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body), signal });
}

export async function getJSON(path) {
  return (await request(path)).json();
}

export async function postJSON(path, body) {
  return (await post(path, body)).json();
}

/** Post, and call onLine with the value of each line of JSON as it arrives. Ends early when `signal` is aborted. A line
 * {"error": {"message": ...}} is thrown. */
export async function postStream(path, body, onLine, signal) {
  const response = await post(path, body, signal);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    const lines = (rest + (value ?? "")).split("\n");
    rest = done ? "" : lines.pop();
    for (const line of lines.filter(Boolean)) {
      const parsed = JSON.parse(line);
      if (parsed.error) throw new Error(parsed.error.message);
      onLine(parsed);
    }
    if (done) return;
  }
}

/** Listen to server-sent events: `handlers` has a function for each name of an event, called with its JSON, and
 * `onState` is told whether the stream is open. Returns the function that closes it. */
export function listen(path, handlers, onState = () => {}) {
  const source = new EventSource(path);
  for (const [name, handle] of Object.entries(handlers)) {
    source.addEventListener(name, (event) => handle(JSON.parse(event.data)));
  }
  source.onopen = () => onState(true);
  source.onerror = () => onState(false);
  return () => source.close();
}
