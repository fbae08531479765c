// Requests to the endpoint. Addresses are relative: the page also works below a proxy's prefix.

const KEY = "rayvaec-token";
let token = stored();

/** A refusal of the endpoint, or no answer: what is wrong, and what to do about it. */
export class Problem extends Error {
  constructor(status, name, detail, fix, id = "") {
    super(detail);
    Object.assign(this, { status, name, detail, fix, id });
  }
}

function stored() {
  try {
    return sessionStorage.getItem(KEY) ?? "";
  } catch {
    return ""; // a browser that keeps nothing: the token lives as long as the page
  }
}

export function keepToken(value) {
  token = value;
  try {
    sessionStorage.setItem(KEY, value);
  } catch {
    // as above
  }
}

export function dropToken() {
  token = "";
  try {
    sessionStorage.removeItem(KEY);
  } catch {
    // as above
  }
}

export const hasToken = () => token !== "";

/** Ask the endpoint; return its answer, or throw the Problem that it names. */
export async function ask(path, { body, accept = "application/json", signal } = {}) {
  const headers = { Accept: accept };
  if (token) headers.Authorization = `Bearer ${token}`;
  if (body) headers["Content-Type"] = "application/json";
  let answer;
  try {
    answer = await fetch(path, {
      method: body ? "POST" : "GET",
      body: body && JSON.stringify(body),
      headers,
      signal,
      cache: "no-store",
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Problem(0, "unreachable", "The endpoint does not answer", "See whether it still runs, and try again");
  }
  if (answer.ok) return answer;
  const said = await answer.json().catch(() => ({}));
  throw new Problem(
    answer.status,
    said.error ?? "failed",
    said.detail ?? `The endpoint answered with status ${answer.status}`,
    said.fix ?? (answer.status === 503 ? "It is starting or stopping: try again in a moment" : "Try again"),
    said.request_id,
  );
}

export const askJson = async (path, options) => (await ask(path, options)).json();
