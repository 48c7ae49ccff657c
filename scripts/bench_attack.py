"""Success rate against queries of every method of `zoft attack`, on the same images of the same classifiers.

    python scripts/bench_attack.py --data digits                      # about a minute on a CPU
    python scripts/bench_attack.py --data fashion_mnist --folder DIR  # several minutes
    python scripts/bench_attack.py --data digits --first 50 --images 200 --only flips,squares   # other images
    python scripts/bench_attack.py --data digits --plot docs/attack_digits_queries.png

The images are the first ones of the test set that the classifier has right. The last line of each table is no attack by
queries: projected gradient descent with the classifier's gradients (5 starts of 60 steps), for how much can be reached.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

import numpy as np
import torch

from zoft.blackbox.attack import pictures
from zoft.blackbox.attack.attack import attack
from zoft.blackbox.attack.data import digits, fashion_mnist
from zoft.blackbox.attack.methods import AttackMethod
from zoft.blackbox.attack.report import curve, summary
from zoft.blackbox.attack.settings import RADII
from zoft.lm.metrics.intervals import wilson

ROWS = {
    "flips": ("flips", {}, "pixels"),
    "squares": ("squares", {}, "pixels"),
    "greedy": ("greedy", {}, "pixels"),
    "greedy, low frequency": ("greedy", {}, "low_frequency"),
    "random": ("random", {}, "pixels"),
    "random, low frequency": ("random", {}, "low_frequency"),
    "sign": ("sign", {}, "pixels"),
    "sign, 20 directions": ("sign", {"num_directions": 20}, "pixels"),
    "sign, square": ("sign", {}, "square"),
    "coordinate": ("coordinate", {}, "pixels"),
    "minimize": ("minimize", {}, "pixels"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=("digits", "fashion_mnist"), default="digits")
    parser.add_argument("--folder", help="of Fashion-MNIST's files")
    parser.add_argument("--norm", choices=("linf", "l2"), default="linf")
    parser.add_argument("--radius", type=float)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--images", type=int, default=50)
    parser.add_argument("--budget", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default=",".join(name for name in ROWS if "," not in name), help="or 'all'")
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    setting = digits() if args.data == "digits" else fashion_mnist(args.folder)
    radius = args.radius or RADII[args.data][args.norm == "l2"]
    right = np.flatnonzero(setting.classifier(setting.images).argmax(1) == setting.labels)
    chosen = right[args.first : args.first + args.images]
    images, labels = setting.images[chosen], setting.labels[chosen]
    print(f"{setting.about}; {args.norm} {radius:g}, {len(chosen)} images, budget {args.budget}, seed {args.seed}\n")
    print("| method | flipped, % (95 % interval) | median queries of those flipped | of all (95 % interval) | CPU s |")
    print("|:--|--:|--:|--:|--:|")
    curves, side = {}, images.shape[-1]
    for name in ROWS if args.only == "all" else args.only.split(","):
        method, changes, subspace = ROWS[name]
        started = time.process_time()
        outcomes = attack(
            setting.classifier,
            images,
            labels.tolist(),
            norm=args.norm,
            radius=radius,
            budget=args.budget,
            method=AttackMethod(method, changes),
            subspace=subspace,
            grid=0 if subspace == "pixels" else side // (2 if side < 10 else 4),
            seed=args.seed,
            numbers=[int(number) for number in chosen],
        )
        curves[name] = curve(outcomes)
        print(row(name, summary(outcomes), time.process_time() - started), flush=True)
    if args.norm == "linf":
        share = white_box(setting.classifier.scores, images, labels, radius)
        low, high = wilson(round(share * len(images)), len(images))
        print(f"| with gradients | {100 * share:.0f} ({100 * low:.0f} to {100 * high:.0f}) | | | |")
    if args.plot:
        title = f"{args.data}, {args.norm} {radius:g}: flipped, % of {len(chosen)} images (95 % intervals)"
        pictures.curves(curves, args.plot, budget=args.budget, title=title)


def row(name: str, figures: dict, seconds: float) -> str:
    """A line of the table."""
    low, high = (100 * end for end in figures["success_interval"])
    ends = ["> budget" if end is None else f"{end:g}" for end in figures["median_interval"]]
    middle = "> budget" if figures["median_queries"] is None else f"{figures['median_queries']:g}"
    flipped = "-" if figures["median_queries_flipped"] is None else f"{figures['median_queries_flipped']:g}"
    rate = f"{100 * figures['success_rate']:.0f} ({low:.0f} to {high:.0f})"
    return f"| {name} | {rate} | {flipped} | {middle} ({ends[0]} to {ends[1]}) | {seconds:.1f} |"


def white_box(net: torch.nn.Module, images: np.ndarray, labels: np.ndarray, radius: float) -> float:
    """Share of the images that gradients flip (Madry et al. 2018), in an L-inf ball."""
    x, y = torch.from_numpy(images), torch.from_numpy(labels)
    random, done = torch.Generator().manual_seed(0), torch.zeros(len(x), dtype=torch.bool)
    for _ in range(5):
        moved = (x + radius * (2 * torch.rand(x.shape, generator=random) - 1)).clamp(0, 1)
        for _ in range(60):
            moved.requires_grad_(True)
            (gradient,) = torch.autograd.grad(torch.nn.functional.cross_entropy(net(moved), y, reduction="sum"), moved)
            moved = moved.detach() + radius / 8 * gradient.sign()
            moved = torch.minimum(torch.maximum(moved, x - radius), x + radius).clamp(0, 1)
            done |= net(moved).argmax(1) != y
    return float(done.float().mean())


if __name__ == "__main__":
    main()
