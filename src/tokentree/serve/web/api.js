/** Requests to the server that this page came from. */

const NAME = "tokentree-key";

export const readKey = () => sessionStorage.getItem(NAME) ?? "";
export const keepKey = (key) => sessionStorage.setItem(NAME, key);

/** What the server told instead of an answer. `status` is 0 for errors inside a stream. */
export class ApiError extends Error {
  constructor(status, { message, code, param }) {
    super(message);
    Object.assign(this, { status, code, param });
  }
}

/** A letter for each byte of UTF-8, as headers hold bytes. */
const asBytes = (text) => String.fromCharCode(...new TextEncoder().encode(text));

async function request(path, options = {}) {
  const headers = { "Content-Type": "application/json" };
  if (readKey()) headers.Authorization = `Bearer ${asBytes(readKey())}`;
  const reply = await fetch(path, { ...options, headers });
  if (!reply.ok) {
    const body = await reply.json().catch(() => ({}));
    throw new ApiError(reply.status, body.error ?? { message: `the server answered with the status ${reply.status}` });
  }
  return reply;
}

export const getJson = async (path) => (await request(path)).json();

/** The events of a streamed answer, each as JSON. */
export async function* events(path, body, signal) {
  const reply = await request(path, { method: "POST", body: JSON.stringify(body), signal });
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) throw new ApiError(0, { message: "the stream broke off before its end" });
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data: ")) continue;
      const said = line.slice("data: ".length).trimEnd();
      if (said === "[DONE]") return;
      const event = JSON.parse(said);
      if (event.error) throw new ApiError(0, event.error);
      yield event;
    }
  }
}
