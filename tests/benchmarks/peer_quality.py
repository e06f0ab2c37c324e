"""Quality at equal tokens: our defaults beside each peer's best of three learning rates, on the same rows.

python -m tests.benchmarks.peer_quality ENVIRONMENTS [--tokens 524288] [--sets dictionary,hierarchy,mlp]
[--peers "NAME;..."] [--seeds 3] [--lr-scale 1] [--rows FOLDER] [--results FILE]

Peers warm up over 5 % and fall to zero over the last 20 % of the steps, as we do: their own defaults are meant for runs
of hundreds of thousands of steps. The set `mlp` is read from FOLDER/mlp.train.npy and mlp.heldout.npy, made by
`sae-pipeline extract` and `sae-pipeline store export default FOLDER/mlp.train.npy --format npy --split train` (and
heldout). What was measured is kept in FILE, a line each, and not measured again.
"""

import argparse
import statistics
from pathlib import Path

from sae.architectures import SAE
from tests.benchmarks.peer_sets import ActivationSet
from tests.benchmarks.peer_trainers import PEERS, Peer, train
from tests.benchmarks.quality import BATCH_ROWS, SETS, K, Kept, Quality, load_set, measure, qualities_of_ours

D_SAE = 2048
WARMUP, DECAY = 0.05, 0.2


def train_theirs(data: ActivationSet, environments: Path, peer: Peer, n_tokens: int, lr: float, seed: int) -> SAE:
    n_steps = n_tokens // BATCH_ROWS
    case = {
        "architecture": "topk",
        "d_in": data.train.shape[1],
        "d_sae": D_SAE,
        "k": K,
        "batch_rows": BATCH_ROWS,
        "n_steps": n_steps,
        "bf16": False,
        "lr": lr,
        "seed": seed,
        "warmup_steps": round(WARMUP * n_steps),
        "decay_steps": round(DECAY * n_steps),
        "ours": None,
    }
    return train(environments, peer, data.train.numpy(), case).sae(D_SAE, K)


def spread(qualities: list[Quality]) -> str:
    """Mean and range over seeds."""
    fvus = [quality.fvu for quality in qualities]
    return f"FVU {statistics.mean(fvus):.4f} ({min(fvus):.4f}-{max(fvus):.4f}, {len(fvus)} seeds)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("environments", type=Path)
    parser.add_argument("--tokens", type=int, default=524_288)
    parser.add_argument("--sets", default=",".join(SETS))
    parser.add_argument("--peers", default="all", help='names joined by ";"')
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--lr-scale", type=float, default=1.0, help="of the peers' rates: long runs want less")
    parser.add_argument("--rows", type=Path, default=Path(".bench/sets"))
    parser.add_argument("--results", type=Path, default=Path(".bench/quality.jsonl"))
    options = parser.parse_args()
    peers = [peer for peer in PEERS if options.peers == "all" or peer.name in options.peers.split(";")]
    kept = Kept(options.results)
    print(f"TopK k={K}, {D_SAE:,} latents, batches of {BATCH_ROWS:,} rows; FVU, dead share and L0 on held-out rows")
    for name in options.sets.split(","):
        data = load_set(name, options.tokens, options.rows)
        print(
            f"\n{name}: {options.tokens:,} tokens, {len(data.train):,} rows of {data.train.shape[1]}, "
            f"{len(data.heldout):,} held out",
            flush=True,
        )
        ours = list(qualities_of_ours(data, options.tokens, D_SAE, options.seeds, {}, kept))
        for seed, quality in enumerate(ours):
            print(f"  ours, seed {seed:<34} {quality}", flush=True)
        for peer in peers:
            by_lr = {}
            for lr in (options.lr_scale * lr for lr in peer.lrs):
                what = {"trainer": peer.name, "set": name, "tokens": options.tokens, "d_sae": D_SAE, "lr": lr}
                quality = kept.get(what)
                if quality is None:
                    sae = train_theirs(data, options.environments, peer, options.tokens, lr, seed=0)
                    quality = measure(sae, data)
                    kept.add(what, quality)
                by_lr[lr] = quality
                print(f"  {f'{peer.name}, lr {lr:g}':<45} {quality}", flush=True)
            lr = min(by_lr, key=lambda lr: by_lr[lr].fvu)
            if ours:
                ratio = statistics.mean(quality.fvu for quality in ours) / by_lr[lr].fvu
                print(f"  ours / {peer.name} at its best (lr {lr:g}): FVU {ratio:.3f}", flush=True)
        if ours:
            print(f"  ours: {spread(ours)}", flush=True)


if __name__ == "__main__":
    main()
