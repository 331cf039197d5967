"""What the paper's sentences are worth on a real policy: the one of a run after its cold start.

    python -m bench.claims --run runs/ours-seed0

Prints two tables, in Markdown. First, Eq. 2: the share of sampled tokens on which a positive
advantage *raises* the entropy (pi_y below p*). Second, Eq. 4: for each choice of y_i the cosines of
f_i over batches of prompts, and whether tau = 0.54 leaves the loss anything to do. Sampled
responses, rewards and advantages are those that training would see.
"""

import argparse
import dataclasses
from pathlib import Path

import torch
import yaml
from transformers.utils import logging as transformers_logging

import data
import grpo
import ntk_infonce
import train
from caption_reward import CaptionReward
from config import Config
from conflict import Conflict
from engine import pretrained
from rewards import reward
from rollouts import roll_out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--run", type=Path, required=True, help="run folder whose cold start has finished"
    )
    parser.add_argument(
        "--prompts", type=int, default=32, help="prompts per batch, as in Eq. 4 [default 32]"
    )
    parser.add_argument("--batches", type=int, default=8, help="batches [default 8]")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    transformers_logging.disable_progress_bar()
    known = {field.name for field in dataclasses.fields(Config)}
    settings = yaml.safe_load((args.run / "config.yaml").read_text())
    cfg = Config(**{name: value for name, value in settings.items() if name in known})
    world = Path(cfg.world)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if not (args.run / "sft" / "policy").exists():
        raise SystemExit(f"error: {args.run} has no finished cold start (sft/policy)")
    policy = pretrained.open_policy(str(args.run / "sft" / "policy"), cfg, device)
    judge = None
    if cfg.caption_reward:
        judge = CaptionReward(train.judge_of(cfg, device)[0])
    samples = data.load(cfg.data or world / "data")["train"]

    torch.manual_seed(args.seed)
    order = torch.randperm(len(samples)).tolist()[: args.prompts * args.batches]
    batches = [
        [samples[k] for k in order[i : i + args.prompts]]
        for i in range(0, len(order), args.prompts)
    ]
    cosines = {name: [] for name in ntk_infonce.FEATURES}
    flattens, entropies = [], []
    for batch in batches:
        for name in ntk_infonce.FEATURES:
            cfg.nce_feature = name
            torch.manual_seed(args.seed)  # the same responses for every choice
            part = roll_out(batch, policy, cfg, feature=name)
            [(part.rewards, _)] = reward([part], judge, cfg)
            part.adv = grpo.group_advantages(grpo.total_reward(part.rewards, cfg.reward_weights))
            with torch.no_grad():
                scores = policy(part.inputs, part.branches)
            cosines[name].append(Conflict([part], policy, cfg).cosine(0, scores))
            if name == "reference":
                weight, bias = policy.head()
                hidden = scores.hidden[:, : cfg.group_size].flatten(0, 1)[part.mask]
                pi = (hidden @ weight.T + bias).double().softmax(-1)
                pi_y = scores.logp[:, : cfg.group_size].flatten(0, 1)[part.mask].double().exp()
                flattens.append(pi_y < grpo.sharpening_threshold(pi))
                entropies.append(scores.entropy[:, : cfg.group_size].flatten(0, 1)[part.mask])

    flat, entropy = torch.cat(flattens).float(), torch.cat(entropies)
    print(
        f"{len(order)} prompts of {args.run}, {len(flat)} sampled tokens, mean entropy "
        f"{entropy.mean():.3f} nats\n"
    )
    print("| sampled tokens | n | A > 0 raises the entropy |\n|---|---|---|")
    for title, among in (
        ("all", entropy >= 0),
        ("entropy above 0.1 nats", entropy > 0.1),
        ("above 0.3", entropy > 0.3),
    ):
        print(f"| {title} | {among.sum()} | {flat[among].mean():.1%} |")
    print(
        "\n| y_i | cosine mean | sd | above 0.54 | active anchors | Eq. 4 "
        "|\n|---|---|---|---|---|---|"
    )
    for name, found in cosines.items():
        stats = [ntk_infonce.info_nce(cosine) for cosine in found]
        pairs = torch.cat([cosine[~torch.eye(len(cosine), dtype=torch.bool)] for cosine in found])
        active = sum(s["active"].item() for _, s in stats) / sum(map(len, found))
        loss = sum(loss.item() for loss, _ in stats) / len(stats)
        above = (pairs > 0.54).float().mean()
        print(
            f"| `{name}` | {pairs.mean():+.3f} | {pairs.std():.3f} | {above:.1%} | {active:.0%} | "
            f"{loss:.2f} |"
        )


if __name__ == "__main__":
    main()
