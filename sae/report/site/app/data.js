// data of one SAE

/** @type {{schema: number, report: string, title: string, seed: number, views: string[], labelShard: number, saes: SAEInfo[]}} */
let summary;
/** Latent chunks in order of last use. @type {string[]} */
const recentChunks = [];

const column = (sae, name) => once(`data/${sae.key}/col/${name}`, loadColumn);

/** Rule and strongest context of the latents of one shard. @returns {Promise<any[][]>} */
const labelShard = (sae, shard) => once(`data/${sae.key}/labels/${shard}`, loadJSON);

/** The same of all latents. */
async function allLabels(sae) {
  const shards = Math.ceil(sae.nLatents / summary.labelShard);
  return (await Promise.all(Array.from({ length: shards }, (_, i) => labelShard(sae, i)))).flat();
}

/** @returns {Promise<{latent: Latent, chunk: LatentChunk}>} */
async function loadLatent(sae, id) {
  const key = `data/${sae.key}/latents/${Math.floor(id / sae.perChunk)}`;
  keepLast(recentChunks, key, CACHED_CHUNKS);
  const chunk = await once(key, loadJSON);
  return { latent: chunk.latents[id - chunk.start], chunk };
}

/** Whether the page has a latent: a report has all, a file of a few (`only`) has those. */
const isHere = (sae, id) => !sae.only || sae.only.includes(id);

const holds = (sae) => `This file holds ${count(sae.only.length)} of the ${count(sae.nLatents)} latents of ${sae.name}`;

/** Live latents in the shuffled order of the report. @returns {Promise<Uint32Array>} */
async function liveLatents(sae) {
  const [order, fired] = await Promise.all([column(sae, "order"), column(sae, "n_fired")]);
  return order.filter((id) => fired[id] > 0);
}
