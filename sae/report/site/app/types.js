// Types, for readers and editors.

/**
 * @typedef {{key: string, name: string, nLatents: number, nRows: number, hasText: boolean, nPassages: number, perChunk: number,
 *   columns: string[], edges: number[], groups: string, misses: string, association: string, positionEdges: number[],
 *   positionRows: number[], logits: string, index: Index, only?: number[]}} SAEInfo
 * @typedef {string | [string, string]} Segment  text, or a chip: [label, title]
 * @typedef {[string, Segment[], number, number]} Label  kind, name, precision, recall
 * @typedef {[string, Segment[], number, string, number]} Rule  kind, name, share, of what, passes
 * @typedef {[any, number, number, number, number]} Counted  name or token, firings, precision, recall, lift
 * @typedef {{value: number, peak: number, at: [string, string, number, number], tokens: number[], firing: number[]}} Context
 * @typedef {{id: number, n: number[], frequency: number, interval: [number, number], mean: ?number, max: ?number,
 *   quartiles: (?number)[], histogram: number[], dense: boolean, duplicate: ?number,
 *   label: ?Label, model: ?[string, ?Segment[], string, ?number[], ?number[]], rules: Rule[],
 *   tokens: Counted[], previous: Counted[], syntax: Counted[], positions: number[],
 *   coactive: [number, number, number, number][], neighbours: [number, number][], neurons: [number, number][],
 *   up: any[], down: any[], groups: Object<string, Context[]>}} Latent
 * @typedef {{schema: number, start: number, tokens: any[][], bytes: Object<string, string>,
 *   latents: Latent[]}} LatentChunk
 * @typedef {{view: string, sae: SAEInfo, id: number, embed: boolean, rest: string[], params: URLSearchParams, q: string, sort: string, cols: string,
 *   page: string, w: string, scale: string, theme: string, known: boolean}} Address
 * @typedef {{text: string, start: number, end: number, negate?: boolean, or?: boolean, error?: string, note?: string,
 *   keeps?: number, sort?: string, column?: string, field?: string, test?: (value: any) => boolean, kind?: string,
 *   needle?: string, exact?: boolean, near?: number, split?: number}} Part
 * @typedef {{off?: string, words?: string[], tokens?: string[], logits?: string[], docs?: string[]}} Index  first key of every shard
 */
