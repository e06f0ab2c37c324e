// data of one SAE

/** @type {{schema: number, title: string, seed: number, views: string[], labelShard: number, saes: SAEInfo[]}} */
let summary;
/** Latent chunks and results of queries, in order of last use. @type {string[]} */
const recentChunks = [];
const recentResults = [];

const column = (sae, name) => once(`data/${sae.key}/col/${name}`, loadColumn);

/** Rule and strongest context of the latents of one shard. @returns {Promise<any[][]>} */
const labelShard = (sae, shard) => once(`data/${sae.key}/labels/${shard}`, loadJSON);

/** @returns {Promise<{latent: Latent, chunk: LatentChunk}>} */
async function loadLatent(sae, id) {
  const key = `data/${sae.key}/latents/${Math.floor(id / sae.perChunk)}`;
  keepLast(recentChunks, key, CACHED_CHUNKS);
  const chunk = await once(key, loadJSON);
  return { latent: chunk.latents[id - chunk.start], chunk };
}

/** Lower-case texts to search: rule, peak token, and both with the context. */
function searchTexts(sae) {
  return once(`texts:${sae.key}`, async () => {
    const shards = Math.ceil(sae.nLatents / summary.labelShard);
    const rows = (await Promise.all(Array.from({ length: shards }, (_, i) => labelShard(sae, i)))).flat();
    const token = rows.map((row) => plain(row[2]).toLowerCase());
    const label = rows.map((row) => (row[0] ? `${row[0][0]} ${plain(row[0][1])}`.toLowerCase() : ""));
    const all = rows.map((row, i) => `${label[i]}\n${plain(row[1])}${plain(row[2])}${plain(row[3])}`.toLowerCase());
    return { token, label, all };
  });
}
