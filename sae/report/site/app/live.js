// live: what `sae-pipeline serve` answers beside the report

const BUSY_TRIES = 4;

/** An answer of the API that is not a result. */
class RefusedError extends Error {
  constructor({ what, where, do: hint }, status) {
    super(`${what} (${where}). ${hint}.`);
    this.status = status;
  }
}

/**
 * What the server can do; null where the page lies on a disk, in a bucket or on another server. The header is asked for
 * first, with a request that succeeds anywhere.
 * @returns {Promise<?{live: boolean, saes: Object<string, LiveSAE>, limits: Object<string, number>}>}
 */
function liveInfo() {
  if (inlined || !/^https?:$/.test(location.protocol)) return Promise.resolve(null);
  return once("live", async () => {
    const page = await fetch(location.pathname, { method: "HEAD" });
    return page.headers.get("SAE-Live") === "api" ? (await fetch("api/info")).json() : null;
  }).catch(() => null);
}

/** One call of the API, tried again while the server is busy. @param {AbortSignal} signal @param {(text: string) => void} say */
async function callLive(name, fields, signal, say) {
  for (let tries = 1; ; tries++) {
    const answer = await fetch(`api/${name}`, {
      method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(fields), signal,
    }).catch((error) => {
      throw signal.aborted ? error : new Error("The server does not answer. Start `sae-pipeline serve` again.");
    });
    const found = await answer.json().catch(() => ({ error: { what: `status ${answer.status}`, where: "server", do: "Try again" } }));
    if (answer.ok) return found;
    const wait = Number(answer.headers.get("Retry-After"));
    if (answer.status !== 503 || !wait || tries === BUSY_TRIES) throw new RefusedError(found.error, answer.status);
    say(`${found.error.what}; trying again in ${wait} s`);
    await new Promise((resolve) => setTimeout(resolve, 1000 * wait));
  }
}

/** A line about a call: working, refused, done. @returns {{line: HTMLElement, run: (name: string, fields: any) => Promise<any>}} */
function liveCall(button, working) {
  const line = h("p", { class: "state note", role: "status" });
  let last = null;
  const run = async (name, fields) => {
    last?.abort();
    const mine = (last = new AbortController());
    button.setAttribute("aria-busy", "true");
    line.classList.remove("failed");
    line.textContent = working;
    try {
      const found = await callLive(name, fields, mine.signal, (text) => (line.textContent = text));
      line.textContent = "";
      return found;
    } catch (error) {
      if (mine.signal.aborted) return null;
      line.classList.add("failed");
      line.textContent = error.message;
      return null;
    } finally {
      if (mine === last) button.removeAttribute("aria-busy");
    }
  };
  return { line, run };
}

/** On the page of a latent: a link to the steering panel, only where there is a server. @param {Address} at */
function steerLink(at) {
  const place = h("span", {});
  liveInfo().then((info) => info?.saes[at.sae.key]?.generates && place.append(h("a", { href: tryAddress(at.sae, { latent: at.id }) }, "steer this latent")));
  return place;
}
