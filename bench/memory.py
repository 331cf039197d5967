"""What each preset of configs/ needs, as engine/memory.py computes it: memory by part, floors of
time.

    python -m bench.memory configs/*.yaml               # one process
    python -m bench.memory configs/*.yaml --shards 8    # each of eight under FSDP2

Seconds per update on one GPU of each kind, were it at 40 % of its bf16 rate in scoring and the
update, and in decoding at the bandwidth of its memory, or at LAUNCH seconds a kernel, whichever is
more.
"""

import argparse
from pathlib import Path

from config import parse_config
from engine.memory import listed, needs, prompt_tokens, published, shape_of

CARDS = {
    "RTX 4090, 24 GB": (165e12, 1.01e12),
    "H100, 80 GB": (989e12, 3.35e12),
}  # dense bf16 operations, bytes a second
LAUNCH = 7e-6  # a guess: Python and torch need so long to start one


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("presets", nargs="+", type=Path)
    parser.add_argument(
        "--shards",
        type=int,
        default=1,
        help="processes that share the policy under FSDP2 [default 1]",
    )
    args = parser.parse_args()
    print(
        "Computed, not measured. "
        f"{'One process' if args.shards == 1 else f'Each of {args.shards} processes'}.\n"
    )
    columns = " | ".join(f"{card}: update, decoding, s" for card in CARDS)
    print(f"| preset | media | training, GB | of it | generation, GB | {columns} |")
    print("|---|---|---|---|---|" + "---|" * len(CARDS))
    for file in args.presets:
        cfg = parse_config(["--config", str(file)])
        shape = shape_of(published(cfg.model))
        for media in ("pictures", "clips"):
            prompt = prompt_tokens(cfg, media == "clips")
            need = needs(cfg, shape, prompt, args.shards, args.shards > 1)
            times = " | ".join(
                f"{need['flops'] / (0.4 * f):.0f}, "
                f"{max(need['read'] / b, need['launches'] * LAUNCH):.0f}"
                for f, b in CARDS.values()
            )
            print(
                f"| `{file}` | {media} | {need['training'] / 1e9:.0f} | "
                f"{listed(need['parts'])} | {need['generation'] / 1e9:.0f} | {times} |"
            )


if __name__ == "__main__":
    main()
