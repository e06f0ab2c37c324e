"""What can be wrong with a config or its inputs, and what is said of it."""

import os

import numpy as np

from tests.flows.bad_input import (
    Change,
    arguments,
    config_of_model,
    given_file,
    many,
    model,
    put,
    raw,
    root,
    slow_tokenizer,
    source,
    tensors,
    text,
    weights_of,
)

TOML = """
[activations]
kind = "given"
[activations.sets.mine]
kind = "inline"
values = [[0, 1], [1, 0], [1, 1]]
[[saes]]
batch_rows = 3
lr = 1
[saes.sae]
architecture = "topk"
d_sae = 4
k = 1
"""

LONG = "word " * 400
DOCUMENTS = {f"{i:02}.txt": LONG for i in range(12)}
ROWS = [[float(i), 1.0, float(i * i)] for i in range(6)]
PLAIN = np.array(ROWS, np.float32)

CASES: dict[str, tuple[Change, str]] = {
    # The config file
    "unknown key": (put("corups", {}), r"corups: no such setting\. Did you mean 'corpus'\?"),
    "unknown key in a section": (put("corpus.contxt_tokens", 9), r"corpus\.contxt_tokens: .*'context_tokens'"),
    "unknown key in a list": (put("saes.0.batch_row", 9), r"saes\.0\.batch_row: .*'batch_rows'"),
    "unknown key in a list's union": (
        put("saes.0.sae.d_size", 9),
        r"saes\.0\.sae\.d_size: no such setting.*'d_sae'\?$",
    ),
    "unknown key in a corpus segment": (put("corpus.segments.0.url", "x"), r"corpus\.segments\.0\.url: .*'urls'"),
    "a key of another architecture": (
        put("saes.0.sae.l1_coefficient", 1),
        r"sae\.l1_coefficient: no such setting\. (Did you mean '(?!l1)|Known: arch)",
    ),
    "unknown key in a given set": (source({"kind": "inline", "values": ROWS, "label": []}), r"sets\.mine\.label: .*"),
    "unknown kind of corpus": (
        put("corpus.segments.0.kind", "csv"),
        r"corpus\.segments\.0\.kind: 'csv' is none of .*'jsonl'",
    ),
    "unknown architecture": (
        put("saes.0.sae.architecture", "topkk"),
        r"saes\.0\.sae\.architecture: 'topkk' is none of 'batch_topk', 'standard', 'topk'$",
    ),
    "missing key": (put("saes.0.sae", {"architecture": "topk", "k": 3}), r"saes\.0\.sae\.d_sae: Field required"),
    "a word for a number": (put("saes.0.batch_rows", "many"), r'saes\.0\.batch_rows: .*valid integer.*\(got "many"\)'),
    "half a token": (put("activations.n_tokens", 0.5), r"activations\.n_tokens: .*integer.*\(got 0\.5\)"),
    "a list for a section": (put("corpus", []), r"corpus: Input should be a valid dictionary"),
    "a number for a title": (put("report.title", 7), r"report\.title: .*valid string \(got 7\)"),
    "a negative number": (put("execution.max_workers", -1), r"execution\.max_workers: .*greater than 0 \(got -1\)"),
    "learning rate zero": (put("saes.0.lr", 0), r"saes\.0\.lr: .*greater than 0 \(got 0\)"),
    "negative learning rate": (put("saes.0.lr", -1e-3), r"saes\.0\.lr: .*greater than 0 \(got -0\.001\)"),
    "infinite learning rate": (put("saes.0.lr", "inf"), r"saes\.0\.lr: .*finite number \(got \"inf\"\)|lr: inf is not"),
    "momentum of one": (put("saes.0.adam_betas", [0.9, 1.0]), r"saes\.0\.adam_betas\.1: .*less than 1 \(got 1\.0\)"),
    "three momenta": (put("saes.0.adam_betas", [0.9, 0.99, 0.999]), r"saes\.0\.adam_betas: .*at most 2"),
    "seed of more than 64 bits": (put("seed", 2**64), r"seed: 1\.8\d+e\+19 does not fit 64 bits"),
    "warm-up longer than the run": (put("saes.0.warmup_fraction", 1.5), r"warmup_fraction: .*less than or equal to 1"),
    "everything held out": (put("corpus.heldout_fraction", 1.0), r"corpus\.heldout_fraction: .*less than 1"),
    "row groups that no page can hold": (put("activations.row_group_bytes", 2**40), r"row_group_bytes: .*less than or"),
    "more retries than Prefect takes": (put("execution.retries", 1000), r"execution\.retries: .*equal to 50"),
    "no SAE": (put("saes", []), r"saes: .*at least 1"),
    "no hook point": (put("activations.hook_points", []), r"activations\.hook_points: .*at least 1"),
    "the same SAE twice": (
        lambda box: box.put("saes", box.config["saes"] * 2),
        r"saes\.1: the same as saes\.0\. Remove one",
    ),
    "the same hook point twice": (
        put("activations.hook_points", ["gpt_neox.layers.0"] * 2),
        r"activations\.hook_points\.1: 'gpt_neox\.layers\.0' is there twice",
    ),
    "the same segment twice": (
        lambda box: box.put("corpus.segments", box.config["corpus"]["segments"] * 2),
        r"corpus\.segments\.1: the same documents as corpus\.segments\.0",
    ),
    "k larger than d_sae": (put("saes.0.sae.k", 65), r"saes\.0\.sae: k = 65 is larger than d_sae = 64"),
    "k_aux larger than d_sae": (put("saes.0.sae.k_aux", 1000), r"saes\.0\.sae: k_aux = 1000 is larger than .*64"),
    "a title of a book's length": (put("report.title", "x" * 301), r"report\.title: up to 300 printable characters"),
    "a title of two lines": (put("report.title", "one\ntwo"), r"report\.title: up to 300 printable .*on one line"),
    "a NUL character": (put("subject", {"kind": "huggingface", "name": "a\0b"}), r"subject\.name: holds a NUL"),
    "half a surrogate pair": (put("report.title", "\ud800"), r"report\.title: "),
    "no activations": (lambda box: box.config.pop("activations"), r"activations: Field required"),
    "a model without a corpus": (lambda box: box.config.pop("corpus"), r"need `subject` and `corpus`"),
    "a file that is not JSON": (raw("{'seed': 1}"), r"config\.json: not valid json: .*line 1 column 2"),
    "a file that is not TOML": (raw("seed: 1", ".toml"), r"config\.toml: not valid toml: .*line 1"),
    "an empty file": (raw(""), r"config\.json: not valid json"),
    "a file that is not UTF-8": (raw(b'{"report": {"title": "\xe9"}}'), r"config\.json: not UTF-8 \(byte 22 is 0xe9\)"),
    "JSON nested without end": (raw("[" * 100_000), r"config\.json: nested too deeply"),
    "a list instead of sections": (raw("[1]"), r"config\.json: a config is a table of sections, not a list"),
    "a key twice in JSON": (raw('{"seed": 1, "seed": 2}'), r"config\.json: .*the key 'seed' is there twice"),
    "a key twice in TOML": (raw("seed = 1\nseed = 2", ".toml"), r"config\.toml: not valid toml: .*overwrite"),
    "a date for a seed": (raw("seed = 1979-05-27", ".toml"), r"config\.toml: (activations|seed): "),
    "NaN in JSON": (raw('{"seed": NaN}'), r"config\.json: not valid json: NaN is no number in JSON"),
    "infinity in TOML": (
        lambda box: raw(TOML.replace("lr = 1", "lr = inf"), ".toml")(box),
        r"saes\.0\.lr: (.*finite number|inf is not a finite number)",
    ),
    "a file of another kind": (raw("seed: 1", ".yaml"), r"neither a recipe nor a \.toml or \.json file"),
    # The command line
    "an unknown recipe": (
        lambda box: setattr(box, "source", "defualt"),
        r"'defualt' is neither a recipe nor a \.toml or \.json file\. Did you mean 'default'\? Recipes: default, arch",
    ),
    "a missing config file": (lambda box: setattr(box, "source", "/nowhere/a.toml"), r"/nowhere/a\.toml: no such file"),
    "a folder for a config file": (
        lambda box: (box.folder / "x.json").mkdir() or setattr(box, "source", f"{box.folder}/x.json"),
        r"x\.json: cannot be read: .*directory",
    ),
    "a setting without a value": (arguments("--set", "seed"), r"--set 'seed': write path\.to\.field=value"),
    "a setting inside a value": (arguments("--set", "seed.x=1"), r"--set 'seed\.x=1': 'x' is inside a plain value"),
    "a setting of no item": (arguments("--set", "saes.7.lr=1"), r"'7' is not one of the indices 0 to 0"),
    "a setting of a name in a list": (arguments("--set", "saes.first.lr=1"), r"'first' is not one of the indices"),
    "a stage of another flow": (arguments("--only", "sae", command="extract"), r"--only sae: the extract flow has"),
    "a refresh of another flow": (arguments("--refresh", "tokens", command="report"), r"--refresh tokens: the report"),
    # The root
    "a root below a file": (root("FOLDER/a-file/root"), r"root '.*a-file/root' cannot be (written|used)"),
    "a root that is a file": (root("FOLDER/a-file"), r"root '.*a-file' cannot be (written|used)"),
    "a root nobody can write": (root("/proc/sae-root"), r"root '/proc/sae-root' cannot be (written|used)"),
    "a root without exclusive create": (root("gs://bucket/place"), r"gs://.*exclusive create"),
    "a root of an unknown protocol": (root("nope://place"), r"nope://"),
    # The corpus
    "a missing file": (
        put("corpus.segments.0.urls", ["/nowhere/a.txt"]),
        r"/nowhere/a\.txt: no such file\. Check corpus",
    ),
    "a folder in place of a file": (text(DOCUMENTS, "text"), r"text: is a folder\. Name the files in it"),
    "a pattern without a match": (text(DOCUMENTS, "text/*.md"), r"\*\.md: no file matches this pattern\. Check corpus"),
    "a corpus of an unknown protocol": (put("corpus.segments.0.urls", ["nope://x"]), r"nope://x: .*(nope|not known)"),
    "only empty files": (text({"a.txt": "", "b.txt": " \n"}), r"no document to read; 2 were skipped.*a\.txt: empty"),
    "only files that are not UTF-8": (
        text({"a.txt": b"caf\xe9", "b.txt": b"\xff\xfe"}),
        r"no usable document; the first problem: a\.txt: not UTF-8 \(byte 3 is 0xe9\)",
    ),
    "a line that is not JSON": (text({"a.jsonl": '{"text": "a"}\n{'}, kind="jsonl"), r"a\.jsonl, line 2: not JSON"),
    "a line without the text": (text({"a.jsonl": '{"body": "a"}'}, kind="jsonl"), r"line 1: no key 'text'.*'body'"),
    "text named as Parquet": (text({"a.parquet": LONG}, kind="parquet"), r"a\.parquet: not a Parquet file"),
    "text named as gzip": (text({"a.txt.gz": LONG}), r"a\.txt\.gz: .*gzip"),
    "a data set nobody has": (
        put("corpus.segments", [{"kind": "huggingface", "name": "no/such", "n_documents": 5}]),
        r"data set 'no/such': HF_HUB_OFFLINE is set, and a stream comes from the hub",
    ),
    "too little text for a context": (
        text({"a.txt": "short", "b.txt": "also"}, corpus__heldout_fraction=0),
        r"corpus\.segments\.0: at most \d+ training tokens in 2 of 2 documents, less than one context of 16",
    ),
    "too little text for the vocabulary": (
        put("subject.vocab_size", 10**9),
        r"subject\.vocab_size: 1000000000 tokens cannot come from \d+ bytes",
    ),
    "nothing held out": (
        text({"a.txt": LONG}, corpus__heldout_fraction=0.001),
        r"corpus\.heldout_fraction: 0\.001 holds nothing out: none of the 1 documents is .*set it to 0",
    ),
    "contexts longer than the text": (
        put("corpus.context_tokens", 10**9),
        r"corpus\.segments\.0: .*less than one context of 1000000000",
    ),
    "padding that cannot fit": (
        many(put("corpus.packing", False), put("corpus.context_tokens", 10**12)),
        r"padded to 1000000000000 tokens, needs at least \d+ TB of memory",
    ),
    # Sizes
    "a batch larger than what is asked for": (
        put("saes.0.batch_rows", 5000),
        r"saes\.0\.batch_rows: 5000 is more than activations\.n_tokens = 4000",
    ),
    "a batch larger than the corpus": (
        many(put("activations.n_tokens", None), put("saes.0.batch_rows", 10**7)),
        r"saes\.0\.batch_rows: 10000000, but the corpus has at most \d+ training tokens",
    ),
    "a batch larger than the given rows": (
        source(PLAIN, batch_rows=7),
        r"saes\.0\.batch_rows: 7, but the set 'mine' has 6 training rows",
    ),
    "an SAE larger than memory": (
        put("saes.0.sae.d_sae", 10**11),
        r"saes\.0 \(d_sae = 100000000000, d_in = 32\): training needs at least \d+ TB of memory, .*Lower d_sae",
    ),
    "a subject larger than memory": (
        put("subject.d_model", 2**24),
        r"subject: a model of [\d,]+ parameters .*needs at least [\d.]+ PB of memory",
    ),
    "a subject of a thousand layers": (put("subject.n_layers", 1000), r"subject\.n_layers: 1000 is more than 200"),
    "heads that do not divide the width": (put("subject.n_heads", 3), r"subject: d_model = 16 is not a multiple of"),
    # Hook points
    "a wrong hook point": (
        put("activations.hook_points", ["gpt_neox.layers.0.mpl.act"]),
        r"hook point 'gpt_neox\.layers\.0\.mpl\.act': .*Did you mean 'gpt_neox\.layers\.0\.mlp\.act'\?",
    ),
    "a layer that is not there": (
        put("activations.hook_points", ["gpt_neox.layers.7"]),
        r"no module 'gpt_neox\.layers\.7'",
    ),
    "a hook point of no side": (put("activations.hook_points", ["gpt_neox.layers.0:middle"]), r"hook point .*':input'"),
    "the language-model head": (
        model(activations__hook_points=["lm_head"]),
        r"hook point 'lm_head': is not a module inside the base model",
    ),
    "a module that yields no activations": (
        put("activations.hook_points", ["gpt_neox.rotary_emb"]),
        r"hook point 'gpt_neox\.rotary_emb': yields .*expected \[batch, T, width\]",
    ),
    "an SAE on another hook point": (
        put("saes.0.hook_point", "gpt_neox.layers.0"),
        r"saes\.0\.hook_point: 'gpt_neox\.layers\.0' is not extracted \(did you mean 'gpt_neox\.layers\.0\.mlp\.act'",
    ),
    # Models
    "a model folder that is not there": (
        put("subject", {"kind": "huggingface", "name": "/nowhere/model"}),
        r"/nowhere/model: no such folder\. Check subject\.name",
    ),
    "a model nobody has": (
        put("subject", {"kind": "huggingface", "name": "no/such"}),
        r"no/such: not in the local Hugging Face cache.*name a local folder",
    ),
    "a name that is none": (
        put("subject", {"kind": "huggingface", "name": "a b c"}),
        r"'a b c' is neither a folder nor",
    ),
    "a folder without a config": (
        model(lambda folder: (folder / "config.json").unlink()),
        r"model: no model there \(no",
    ),
    "a config that is not JSON": (model(lambda f: (f / "config.json").write_text("{")), r"model: cannot be loaded: "),
    "a config of an unknown model": (model(config_of_model(model_type="gpt9")), r"model: cannot be loaded: .*gpt9"),
    "a config that makes no model": (model(config_of_model(n_head=5)), r"model: .*"),
    "pickled weights": (model(weights_of("pickled")), r"no weights in safetensors there\. .*convert them"),
    "truncated weights": (model(weights_of("truncated")), r"model\.safetensors: not a readable safetensors file"),
    "a shard that is not there": (model(weights_of("sharded")), r"model-1-of-2\.safetensors is missing \(1 of the 2"),
    "a revision of a folder": (model(subject__revision="main"), r"a local folder has no revisions"),
    "an encoder-decoder model": (
        model(config_of_model(model_type="t5", is_encoder_decoder=True)),
        r"t5 is an encoder-decoder model; activations can be read from causal models",
    ),
    "a model without a tokenizer": (
        model(lambda f: [(f / name).unlink() for name in ("tokenizer.json", "tokenizer_config.json")]),
        r"model: no tokenizer there: its vocabulary has 1 tokens\. Save the tokenizer beside the model",
    ),
    "a damaged tokenizer": (model(lambda f: (f / "tokenizer.json").write_text("{}")), r"model: cannot be loaded: "),
    "a tokenizer of another model": (
        model(config_of_model(vocab_size=20)),
        r"model: its tokenizer has 300 tokens, its model embeddings for 20\. They do not belong together",
    ),
    "a slow tokenizer where syntax is labelled": (
        model(slow_tokenizer, corpus__segments=[{"kind": "stdlib", "max_documents": 40}]),
        r"CTRLTokenizer cannot tell where in the text its tokens lie.*fast tokenizer",
    ),
    "contexts longer than the model takes": (
        model(corpus__context_tokens=65),
        r"takes contexts of up to 64 tokens, corpus\.context_tokens is 65\. Lower it",
    ),
    "a wrong hook point of a model": (
        model(activations__hook_points=["transformer.h.0.mlp.atc"]),
        r"GPT2LMHeadModel has no module .*Did you mean 'transformer\.h\.0\.mlp\.act'\?",
    ),
    # Given activations
    "a missing array": (
        source({"kind": "file", "url": "/nowhere/a.npy"}),
        r"/nowhere/a\.npy: no such file\. Check act",
    ),
    "an array of another kind": (given_file("a.csv", b"1,2"), r"a\.csv: a \.csv file; expected one of \.npy, \.safet"),
    "an array file that is none": (given_file("a.npy", b"hello"), r"a\.npy: not a plain \.npy array"),
    "a truncated array": (
        many(source(PLAIN), lambda box: os.truncate(box.folder / "given.npy", 140)),
        r"given\.npy: not a plain \.npy array",
    ),
    "one dimension": (source(PLAIN[0]), r"given\.npy: shape \[3\], expected \[rows, d_in\]"),
    "three dimensions": (source(PLAIN[None]), r"given\.npy: shape \[1, 6, 3\], expected \[rows, d_in\]"),
    "no rows": (source(PLAIN[:0]), r"given\.npy: shape \[0, 3\], expected \[rows, d_in\] with at least one of each"),
    "pickled objects": (source(np.array([{}, []], object)), r"given\.npy: not a plain \.npy array"),
    "words": (source(np.array([["a", "b"]])), r"given\.npy: values of type <U1, expected numbers"),
    "NaN": (source(np.where(PLAIN == 16, np.nan, PLAIN)), r"given\.npy: row 4 holds NaN or infinite values \(1 of 6"),
    "infinity": (source(np.where(PLAIN == 4, np.inf, PLAIN)), r"given\.npy: row 2 holds NaN or infinite values"),
    "NaN in the config": (source([[1.0, "nan"], [2.0, 3.0]]), r"values\.0\.1: (nan is not a|.*) ?finite number"),
    "constant activations": (source(np.ones((6, 3))), r"given\.npy: all 6 rows are equal\. There is nothing to learn"),
    "constant training rows": (
        source([[1.0, 2.0]] * 5 + [[3.0, 4.0]], heldout=0.2),
        r"activations\.sets\.mine: its 5 training rows are equal",
    ),
    "values too large for the type": (
        source(PLAIN.astype(np.float64) * 1e38),
        r"row 5 holds 2\.5e\+39, float32 goes up",
    ),
    "rows of other lengths": (source([[1.0], [1.0, 2.0]]), r"sets\.mine: rows have different lengths: \[1, 2\]"),
    "one row": (source([[1.0, 2.0]]), r"sets\.mine\.values: .*at least 2"),
    "labels for other rows": (
        source({"kind": "inline", "values": ROWS, "labels": ["one"]}),
        r"sets\.mine: 1 labels for 6 rows",
    ),
    "no rows left to train on": (
        source([[1.0, 2.0], [2.0, 1.0]], heldout=0.9),
        r"2 rows leave none for the train split",
    ),
    "no rows left to evaluate on": (source(ROWS, heldout=0.01), r"6 rows leave none for the heldout split"),
    "another tensor's name": (tensors(other=PLAIN), r"given\.safetensors: no tensor 'act'; it has 'other'"),
    "a safetensors file that is none": (given_file("a.safetensors", b"{}"), r"a\.safetensors: not a safetensors file"),
    "a concept of a row that is not there": (
        many(source(ROWS), put("evaluation", {"concepts": [{"name": "x", "rows": [0, 6]}]})),
        r"evaluation\.concepts\.0\.rows: no row 6, there are 6",
    ),
    "given activations with a corpus": (
        many(source(ROWS), put("corpus", {})),
        r"given activations come without a model: leave out `subject` and `corpus`",
    ),
}
"""What is changed in a valid config, and the error that it makes."""
