// judge mode

/** Latents of an SAE that were judged in this browser. @returns {Set<number>} */
function judgedLatents(sae) {
  return new Set();
}
