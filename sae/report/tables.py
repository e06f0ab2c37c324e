"""The open tables beside the page, for DuckDB, Polars and pandas. The page does not read them."""

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from sae.report.examples import BATCH_ROWS
from sae.report.inputs import SAEInputs

README = """# Tables of this report

Open with DuckDB, Polars, pandas or pyarrow. Run the queries in this folder, for example `duckdb -c "..."`. Every table
has a column `sae`: the SAE's name in the page's addresses.

## latents.parquet: one row per SAE and latent

- Firing: `latent`, `n_fired` (tokens on which it fires; `n_fired_train`, `n_fired_heldout`), `frequency`, `mean_act`
  (over firings), `max_act`, `q25` `q50` `q75` of its firings, `histogram` (counts; the edges are the same for all
  latents), `positions` (firings by position in the context, in bins of 0, 1, 2-3, 4-7, ...).
- Flags: `dead`, `dense`, `duplicate_of` (the latent with the most similar decoder row where the two nearly coincide).
- The rule that labels it (null: none has a precision of .5): `rule_kind` (`token`, `previous token`, `syntax`,
  `position`), `rule_name`, `rule_bytes`, `rule_precision` (share of its firings that the rule names), `rule_recall`
  (share of what the rule names on which it fires), `rule_lift` (precision over the rule's share of all rows).
- What goes with its firings, most frequent first, lists of equal length: `tokens` (ids), `token_bytes`,
  `token_counts`, `token_precision`, `token_recall`, `token_lift`; the same for the token before it
  (`previous_tokens`, `previous_...`) and for syntax (`syntax`, `syntax_...`).
- Other latents: `coactive` (fire on the same rows; by lift, on the rows of rows.parquet) with `coactive_lift`,
  `coactive_share` (share of its firings on which the other fires), `coactive_count`; `neighbours` with
  `neighbour_cosines` (decoder).
- Directions: `neurons` (dimensions of the hook point) with `neuron_weights` (cosine with the decoder row);
  `logits_up`, `logits_down` (token ids) with `_values` and `_bytes`.
- A model's words, where one was asked: `model_name`, `model_explanation` or `model_error`; how well they tell where
  the latent fires: `model_detection`, `model_fuzzing` (balanced accuracy, chance is .5) with `_low`, `_high` (95 %) and
  `_n` (answers).
- Scored rules: `top_tenth_`, `mass_`, `top_20_` each with `kind`, `name`, `share` and `passes` (null: too few firings
  for a score).

## examples.parquet: one row per context

`latent`, `group` (`top`; `q3` ... `q0`: random firings of each quarter, strongest first; `random`: of all firings;
`miss`: the latent's most frequent token where it does not fire), `rank`, `value` (at the peak), `seq`, `pos`, `split`,
`doc`, `doc_name`, `peak` (index in the window), `token_ids`, `token_bytes`, `activations` (of this latent on every
token of the window).

## rows.parquet: a uniform sample of rows, the same rows for every SAE on a hook point

`segment`, `split`, `seq`, `pos`, `token`, `doc`, and the latents that fire: `latents`, `values`.

## passages.parquet: held-out contexts, one row each (not for activations given without text)

`segment`, `seq`, `doc_name`, `token_ids`, `token_bytes`; `latents` and `values` hold the 8 strongest latents of every
token, strongest first, -1 and 0 where fewer fire.

## Queries

The ten strongest latents that fire on fewer than one token in a thousand:

```sql
SELECT sae, latent, frequency, max_act, rule_kind, rule_name
FROM 'latents.parquet' WHERE NOT dead AND frequency < 1e-3 ORDER BY max_act DESC, latent LIMIT 10;
```

How many live latents each kind of rule labels, and how well:

```sql
SELECT sae, coalesce(rule_kind, 'no rule') AS rule, count(*) AS n, avg(rule_precision) AS p, avg(rule_recall) AS r
FROM 'latents.parquet' WHERE NOT dead GROUP BY ALL ORDER BY sae, n DESC, rule;
```

How many latents one token explains by the evaluation's score, by SAE:

```sql
SELECT sae, count(*) AS n_scored, avg(top_tenth_passes::INT) AS share
FROM 'latents.parquet' WHERE top_tenth_passes IS NOT NULL GROUP BY sae ORDER BY sae;
```

Tokens that many latents share (precision of at least .5):

```sql
SELECT sae, token, count(*) AS n_latents, list(latent ORDER BY latent)[:8] AS some
FROM (SELECT sae, latent, unnest(token_bytes) AS token, unnest(token_precision) AS p FROM 'latents.parquet')
WHERE p >= 0.5 GROUP BY sae, token ORDER BY n_latents DESC, token LIMIT 20;
```

Pairs of latents that fire together far more often than by chance:

```sql
SELECT sae, latent, other, round(lift, 1) AS lift, share, n
FROM (SELECT sae, latent, unnest(coactive) AS other, unnest(coactive_lift) AS lift, unnest(coactive_share) AS share,
        unnest(coactive_count) AS n FROM 'latents.parquet')
WHERE n >= 5 AND share > 0.5 ORDER BY lift DESC, latent LIMIT 20;
```

Near misses: how often a latent's favourite token is there and it is silent, and one such context:

```sql
SELECT l.sae, l.latent, l.rule_name, 1 - l.rule_recall AS silent_on, e.doc_name, e.token_bytes AS context
FROM 'latents.parquet' l JOIN 'examples.parquet' e USING (sae, latent)
WHERE e."group" = 'miss' AND e.rank = 0 AND l.rule_kind = 'token'
ORDER BY l.rule_precision DESC, l.latent LIMIT 10;
```

Random firings of the latent that fires most, and the token at the peak:

```sql
WITH busiest AS (SELECT sae, latent FROM 'latents.parquet' ORDER BY n_fired DESC, latent LIMIT 1)
SELECT latent, value, doc_name, token_bytes[peak + 1] AS token
FROM 'examples.parquet' JOIN busiest USING (sae, latent)
WHERE "group" = 'random' ORDER BY rank LIMIT 5;
```

Pairs of latents with nearly the same decoder row:

```sql
SELECT sae, latent, other, cosine
FROM (SELECT sae, latent, unnest(neighbours) AS other, unnest(neighbour_cosines) AS cosine FROM 'latents.parquet')
WHERE latent < other AND cosine > 0.9 ORDER BY cosine DESC, latent LIMIT 20;
```

How many latents fire on a row, in the sample:

```sql
SELECT sae, split, count(*) AS n_rows, avg(len(latents)) AS l0 FROM 'rows.parquet' GROUP BY ALL ORDER BY sae, split;
```

The strongest latent of every token of one held-out passage:

```sql
SELECT i, token_bytes[i] AS token, latents[8 * (i - 1) + 1] AS latent, "values"[8 * (i - 1) + 1] AS value
FROM (SELECT *, unnest(range(1, len(token_ids) + 1)) AS i
  FROM (SELECT * FROM 'passages.parquet' ORDER BY sae, segment, seq LIMIT 1))
ORDER BY i LIMIT 32;
```
"""


def write_tables(folder: Path, saes: list[SAEInputs]) -> None:
    """Write the tables of all SAEs as one, with a column `sae`, and the README."""
    folder.mkdir(parents=True, exist_ok=True)
    latents = pa.concat_tables((_named(inputs.latents, inputs.key) for inputs in saes), promote_options="default")
    pq.write_table(latents, folder / "latents.parquet", compression="zstd")
    for name in ("examples", "rows", "passages"):
        files = {inputs.key: path for inputs in saes if (path := getattr(inputs, name)) is not None}
        if files:
            _join(folder / f"{name}.parquet", files)
    (folder / "README.md").write_text(README)


def _join(target: Path, files: dict[str, Path]) -> None:
    """Write the files of all SAEs into one, a batch of rows at a time."""
    schema = pa.schema([pa.field("sae", pa.string()), *pq.read_schema(next(iter(files.values())))])
    with pq.ParquetWriter(target, schema.remove_metadata(), compression="zstd") as writer:
        for key, path in files.items():
            for table in _batches(path):
                writer.write_table(_named(table, key).cast(writer.schema))


def _batches(path: Path) -> Iterator[pa.Table]:
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(BATCH_ROWS):
            yield pa.Table.from_batches([batch])


def _named(table: pa.Table, key: str) -> pa.Table:
    """Put the SAE's key in front; file metadata is dropped, because inputs may carry different ones."""
    names = pa.array([key] * table.num_rows, type=pa.string())
    return table.add_column(0, "sae", names).replace_schema_metadata(None)
