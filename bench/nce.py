"""Eq. 4's cosines four ways: time, memory and error.

    python -m bench.nce --out bench-nce

n samples of `length` tokens each, hidden size d, vocabulary V; forward and backward to hidden
states and head.
    autograd    the definition: a gradient [V, d] per sample by torch.autograd, differentiated again
    dense       `gradient_cosine`: the Gram identity on logits [N, V]
    chunked     `gradient_cosine_chunked`: the same without ever holding [N, V]
    sketched    `tensor_sketch`, m = 4096: unbiased, small enough to send between processes
Each is a process of its own: memory is the highest resident set above that before the computation.
The error is the largest of a cosine against autograd in float64. Writes JSON and a plot to --out.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

FORMS = ("autograd", "dense", "chunked", "sketched")


def work(form: str, n: int, length: int, d: int, v: int, dtype: str) -> dict:
    import torch
    import torch.nn.functional as F

    import ntk_infonce

    torch.manual_seed(0)
    kind = getattr(torch, dtype)
    hidden = (torch.randn(n * length, d, dtype=torch.float64) + 1).to(kind).requires_grad_()
    weight = (torch.randn(v, d, dtype=torch.float64) * d**-0.5).to(kind).requires_grad_()
    y, segment = torch.randint(v, (n * length,)), torch.arange(n).repeat_interleave(length)

    def cosines():
        if form == "chunked":
            return ntk_infonce.gradient_cosine_chunked(hidden, weight, y, segment, n)
        logits = hidden @ weight.T
        if form == "dense":
            return ntk_infonce.gradient_cosine(hidden, logits, y, segment, n)
        if form == "sketched":
            unit = F.normalize(ntk_infonce.tensor_sketch(hidden, logits, y, segment, n))
            return unit @ unit.T
        logp = logits.log_softmax(-1).gather(-1, y[:, None])[:, 0]
        rows = [
            torch.autograd.grad(logp[segment == i].sum(), weight, create_graph=True)[0].flatten()
            for i in range(n)
        ]
        unit = F.normalize(torch.stack(rows))
        return unit @ unit.T

    before, times = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, []
    for _ in range(3):
        start = time.perf_counter()
        cosine = cosines()
        (cosine * torch.linspace(-1, 1, n * n, dtype=kind).view(n, n)).sum().backward()
        times.append(time.perf_counter() - start)
        hidden.grad = weight.grad = None
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "seconds": min(times),
        "MB": (after - before) / 1024,
        "cosine": cosine.detach().double().tolist(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name, default in (("n", 8), ("length", 16), ("d", 256), ("v", 32768)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument(
        "--out", type=Path, default=Path("bench-nce"), help="folder for nce.json and nce.png"
    )
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    sizes = [args.n, args.length, args.d, args.v]
    if args.worker:
        print(json.dumps(work(args.worker[0], *sizes, args.worker[1])))
        return

    def run(form: str, dtype: str = "float32") -> dict:
        names = ("n", "length", "d", "v")
        options = [part for name, size in zip(names, sizes) for part in (f"--{name}", str(size))]
        command = [sys.executable, "-m", "bench.nce", "--worker", form, dtype, *options]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"error: {form} failed\n{done.stderr[-2000:]}")
        return json.loads(done.stdout.splitlines()[-1])

    truth = run("autograd", "float64")["cosine"]
    found = {form: run(form) for form in FORMS}
    print(
        f"n {args.n}, {args.length} tokens each, d {args.d}, V {args.v}, fp32, forward and "
        "backward\n"
    )
    print("| form | seconds | MB | largest error |\n|---|---|---|---|")
    for form, result in found.items():
        pairs = zip(sum(result.pop("cosine"), []), sum(truth, []))
        result["error"] = max(abs(a - b) for a, b in pairs)
        print(f"| {form} | {result['seconds']:.3f} | {result['MB']:.0f} | {result['error']:.1e} |")
    args.out.mkdir(exist_ok=True, parents=True)
    (args.out / "nce.json").write_text(json.dumps({"sizes": sizes, "forms": found}, indent=1))

    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(8, 3), layout="constrained")
    for axis, name in zip(axes, ("seconds", "MB")):
        axis.bar_label(axis.bar(FORMS, [found[form][name] for form in FORMS]), fmt="%.3g")
        axis.set_title(name)
    figure.savefig(args.out / "nce.png", dpi=150)


if __name__ == "__main__":
    main()
