"""The paper's equations on numbers small enough for a pocket calculator.

python -m examples.equations                # worked examples of Eq. 1, Eq. 2 and Eq. 4
python -m examples.equations --plot DIR     # the entropy law, and where Eq. 4 drives the cosines
"""

import argparse
from pathlib import Path

import matplotlib
import torch
import torch.nn.functional as F
from torch import Tensor

import grpo
import ntk_infonce

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402, behind the choice of a backend that needs no screen


def eq_1_and_2() -> None:
    """Eq. 1 and Eq. 2 on numbers small enough for a pocket calculator."""
    rewards = torch.tensor([[2.1, 1.1, 0.1, 0.1]], dtype=torch.float64)
    print(
        "A = (r - mean) / (std + 1e-4) of r = 2.1, 1.1, 0.1, 0.1 (mean 0.85, unbiased std 0.957):"
    )
    print("   ", "  ".join(f"{a:+.3f}" for a in grpo.group_advantages(rewards)[0].tolist()))

    pi = torch.tensor([0.6, 0.2, 0.1, 0.05, 0.03, 0.01, 0.006, 0.004], dtype=torch.float64)
    s, entropy = grpo._minus_entropy_slope(pi)
    star = grpo.sharpening_threshold(pi).item()
    print(
        f"\npi of eight tokens: H = {entropy:.4f} nats, 1 / perplexity = {(-entropy).exp():.4f}, "
        f"p* = {star:.4f}"
    )
    print("one on-policy update of each token with A = +1 and rate 0.5, in logit space:\n")
    print("  pi_y   dL/dz_y (Eq. 2)  as printed   dH, first order   dH, exact   entropy")
    every = torch.arange(8)
    gradient = grpo.logit_gradient(
        pi.log().expand(8, 8), every, torch.ones(8, dtype=pi.dtype), pi.log()
    )
    moved = (pi.log() - 0.5 * gradient).softmax(-1)
    exact = -(moved * moved.log()).sum(-1) - entropy
    law = grpo.entropy_change(pi.expand(8, 8), every, torch.tensor(0.5, dtype=pi.dtype))
    for y, p in enumerate(pi.tolist()):
        side = "sharpens" if p > star else "flattens"
        print(
            f"{p:6.3f}   {gradient[y, y]:13.3f}   {-p * (1 - p):10.4f}   {law[y]:15.4f}   "
            f"{exact[y]:9.4f}   {side}"
        )
    print(
        "\nA = +1 sharpens above p* only, and A = -1 does the reverse. The paper's sentence is the "
        "part above p*."
    )


def eq_4() -> None:
    """Eq. 4 on three samples of one token each, for a pocket calculator."""
    hidden = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 1.0]], dtype=torch.float64)
    logits, targets, segment = hidden.new_zeros(3, 2), torch.tensor([0, 0, 1]), torch.arange(3)
    print("V = 2, pi = (1/2, 1/2): r = (1/2, -1/2) for y = 0 and (-1/2, 1/2) for y = 1; f = r h^T")
    print(
        "h = (1, 0), (1, 1), (0, 1);  y = 0, 0, 1\n\ncos(f_i, f_j) = cos(r_i, r_j) cos(h_i, h_j):"
    )
    cosine = ntk_infonce.gradient_cosine(hidden, logits, targets, segment, 3).requires_grad_()
    for row in cosine.tolist():
        print("   ", "  ".join(f"{s:+.3f}" for s in row))
    loss, stats = ntk_infonce.info_nce(cosine)
    loss.backward()
    print(
        "\nEq. 4 at tau = 0.54: anchor 1 has the positive 0 and the negative 0.707, log(1 + "
        "e^0.707) = 1.108;"
    )
    print(
        "anchor 2 has -0.707 and 0.707, log(1 + e^1.414) = 1.632; anchor 3 has no negative and is "
        "left out."
    )
    print(
        f"loss = {loss.item():.3f}, active anchors {int(stats['active'])}, positive pairs "
        f"{stats['positive']:.0%}"
    )
    print(
        "\ndL/ds, each row sums to 0: what is dissimilar is pulled up, what is similar pushed down:"
    )
    for row in cosine.grad.tolist():
        print("   ", "  ".join(f"{s:+.3f}" for s in row))
    answers = torch.cartesian_prod(torch.arange(2), torch.arange(2))
    inner = [
        (ntk_infonce._residual(logits[:2], y).prod(0).sum() * (hidden[0] @ hidden[1])).item()
        for y in answers
    ]
    print(
        "\nwere y_1 and y_2 sampled from pi, <f_1, f_2> would be one of",
        ", ".join(f"{k:+.2f}" for k in inner),
    )
    print(
        f"with equal probability: {sum(inner) / 4:.2f} on average, whatever the prompts are. "
        "On-policy, Eq. 4 is blind."
    )


def plot_entropy_law(file: Path) -> None:
    """dH against pi_y for both signs of A: one token of probability pi_y, the others 5 : 3 : 2 : 1
    of the rest."""
    p = torch.linspace(0.002, 0.998, 499, dtype=torch.float64)
    rest = torch.tensor([5, 3, 2, 1], dtype=p.dtype) / 11
    probs = torch.cat([p[:, None], (1 - p)[:, None] * rest], 1)
    first = torch.zeros(len(p), dtype=torch.long)
    crossing = p[p > grpo.sharpening_threshold(probs)][0].item()
    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    for sign, name in ((1.0, "A > 0"), (-1.0, "A < 0")):
        axis.plot(p, grpo.entropy_change(probs, first, torch.full_like(p, sign)), label=name)
    axis.axhline(0, color="grey", linewidth=0.8)
    axis.axvline(crossing, color="grey", linestyle="--", label=f"pi_y = p* = {crossing:.3f}")
    axis.set(xlabel="pi_y of the sampled token", ylabel="dH per unit of logit step (nats)")
    axis.set_title("A > 0 sharpens, A < 0 flattens: to the right of p* only")
    axis.legend()
    figure.savefig(file, dpi=150)
    print(f"wrote {file}")


def descend(vectors: Tensor, steps: int, lr: float = 0.5, tau: float = 0.54) -> Tensor:
    """The cosines of free vectors that follow the gradient of Eq. 4.
    [n, d] -> [steps + 1, n, n]"""
    vectors, path = vectors.clone().requires_grad_(), []
    for _ in range(steps + 1):
        unit = F.normalize(vectors)
        cosine = unit @ unit.T
        path.append(cosine.detach())
        [gradient] = torch.autograd.grad(ntk_infonce.info_nce(cosine, tau)[0], vectors)
        vectors = (vectors - lr * gradient).detach().requires_grad_()
    return torch.stack(path)


def plot_trajectories(file: Path) -> None:
    """Trajectories of all pairs' cosines under Eq. 4, from several starts."""
    torch.manual_seed(0)
    noise, common, n = torch.randn(16, 64), torch.ones(64), 16
    starts = {
        "orthogonal": torch.eye(n, 64),
        "two clusters": noise + 1.3 * torch.randn(2, 64)[torch.arange(n) % 2],
        "mostly below tau": noise + (0.2 + 1.6 * torch.rand(n, 1)) * common,
        "mostly above tau": noise + (0.6 + 1.2 * torch.rand(n, 1)) * common,
        "alike": noise + 3.5 * common,
    }
    figure, axes = plt.subplots(
        1, len(starts), figsize=(14, 3.4), sharey=True, layout="constrained"
    )
    off = ~torch.eye(n, dtype=torch.bool)
    for axis, (name, vectors) in zip(axes, starts.items()):
        path = descend(vectors * 8 / vectors.norm(dim=1, keepdim=True), 200, lr=10.0)[:, off]
        axis.plot(path, color="tab:blue", alpha=0.06)
        axis.plot(path.mean(1), color="black", label="mean")
        axis.axhline(0.54, color="tab:red", linestyle="--", label="tau")
        axis.set(title=name, xlabel="step")
    axes[0].set_ylabel("cosine of every pair")
    axes[0].legend()
    figure.savefig(file, dpi=150)
    print(f"wrote {file}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description="The paper's equations on numbers to check by hand."
    )
    parser.add_argument(
        "--plot", type=Path, metavar="DIR", help="draw entropy.png and cosines.png as well"
    )
    folder = parser.parse_args().plot
    print("--- Eq. 1 and Eq. 2\n")
    eq_1_and_2()
    print("\n--- Eq. 4\n")
    eq_4()
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
        plot_entropy_law(folder / "entropy.png")
        plot_trajectories(folder / "cosines.png")


if __name__ == "__main__":
    main()
