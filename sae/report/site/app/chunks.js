// chunks

const CACHED_CHUNKS = 12;
const DTYPES = { u1: Uint8Array, u4: Uint32Array, f4: Float32Array, f8: Float64Array };
/** @type {Map<string, string>} key -> base64, between a script's run and its load event */
const delivered = new Map();
/** @type {Map<string, Promise<any>>} */
const kept = new Map();
/** Where a few latents are mailed as one file: all data of it, by key; null in a folder. @type {?Object<string, string>} */
let inlined = null;

/** A data file that is missing, cut off, or written for another version of this page. */
class ChunkError extends Error {
  constructor(key, problem) {
    super(`${key}.js ${problem}`);
    this.file = `${key}.js`;
    this.problem = problem;
  }
}

/** Called by every data file. */
function put(key, base64) {
  delivered.set(key, base64);
}

function runScript(key) {
  return new Promise((resolve, reject) => {
    if (inlined) return Object.hasOwn(inlined, key) ? resolve(inlined[key]) : reject(new ChunkError(key, "is not in this file"));
    const script = h("script", { src: `${key}.js` });
    script.onload = () => {
      script.remove();
      const text = delivered.get(key);
      delivered.delete(key);
      if (text === undefined) reject(new ChunkError(key, "is damaged: it holds no data"));
      else resolve(text);
    };
    script.onerror = () => {
      script.remove();
      reject(new ChunkError(key, "is missing"));
    };
    document.head.append(script);
  });
}

/** A script of assets/ by its name. */
function loadAsset(name) {
  const script = h("script", { src: `assets/${name}` });
  return new Promise((resolve, reject) => {
    script.onload = resolve;
    script.onerror = () => reject(new ChunkError(`assets/${name.replace(/\.js$/, "")}`, "is missing"));
    document.head.append(script);
  }).finally(() => script.remove());
}

function fromBase64(text) {
  if (Uint8Array.fromBase64) return Uint8Array.fromBase64(text);
  const binary = atob(text);
  const bytes = new Uint8Array(binary.length);
  for (let i = 0; i < binary.length; i++) bytes[i] = binary.charCodeAt(i);
  return bytes;
}

async function inflate(key, text) {
  try {
    const stream = new Blob([fromBase64(text)]).stream().pipeThrough(new DecompressionStream("deflate-raw"));
    return await new Response(stream).arrayBuffer();
  } catch {
    throw new ChunkError(key, "is damaged: its content cannot be unpacked");
  }
}

async function loadBytes(key) {
  const text = await runScript(key).catch(() => runScript(key));
  return inflate(key, text);
}

async function loadJSON(key) {
  const value = JSON.parse(new TextDecoder().decode(await loadBytes(key)));
  if (value.schema !== undefined && value.schema !== summary.schema)
    throw new ChunkError(key, `has schema ${value.schema}, this page reads ${summary.schema}`);
  return value;
}

/** A column: its values, and how many each row has. */
async function loadColumn(key) {
  const buffer = await loadBytes(key);
  const head = new DataView(buffer, 0, 12);
  const Type = DTYPES[String.fromCharCode(head.getUint8(0), head.getUint8(1))];
  const n = head.getUint32(4, true) * head.getUint32(8, true);
  if (!Type || buffer.byteLength !== 12 + n * Type.BYTES_PER_ELEMENT) throw new ChunkError(key, "is damaged");
  const source = new Uint8Array(buffer, 12);
  const size = Type.BYTES_PER_ELEMENT;
  const bytes = new Uint8Array(n * size);
  for (let plane = 0; plane < size; plane++)
    for (let i = 0, from = plane * n; i < n; i++) bytes[i * size + plane] = source[from + i];
  return new Type(bytes.buffer); // little-endian, like every machine a browser runs on
}

/** Load once; a failure is not kept, so that a later visit tries again. */
function once(key, load) {
  if (!kept.has(key)) {
    const promise = load(key);
    kept.set(key, promise);
    promise.catch(() => kept.delete(key));
  }
  return kept.get(key);
}

/** Forget what was used longest ago. @param {string[]} recent */
function keepLast(recent, key, limit) {
  const at = recent.indexOf(key);
  if (at >= 0) recent.splice(at, 1);
  recent.push(key);
  while (recent.length > limit) kept.delete(recent.shift());
}
