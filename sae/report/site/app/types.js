// Types, for readers and editors.

/**
 * @typedef {{key: string, name: string, nLatents: number, nRows: number, hasText: boolean, perChunk: number,
 *   columns: string[], edges: number[], groups: string, logits: string}} SAEInfo
 * @typedef {string | [string, string]} Segment  text, or a chip: [label, title]
 * @typedef {[string, Segment[], number, string, number]} Rule  kind, name, share, of what, passes
 * @typedef {{value: number, peak: number, at: [string, string, number, number], tokens: number[], firing: number[]}} Context
 * @typedef {{id: number, n: number[], frequency: number, interval: [number, number], mean: ?number, max: ?number,
 *   quartiles: (?number)[], histogram: number[], dense: boolean, label: ?Rule, rules: Rule[],
 *   neighbours: [number, number][], up: any[], down: any[], groups: Object<string, Context[]>}} Latent
 * @typedef {{schema: number, start: number, tokens: any[][], latents: Latent[]}} LatentChunk
 * @typedef {{view: string, sae: SAEInfo, id: number, rest: string[], params: URLSearchParams, q: string, sort: string, known: boolean}} Address
 */
