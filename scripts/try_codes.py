"""The trial behind docs/quantised.md: steps on the codes of a quantiser, what is rounded off kept for later (QES).

    python scripts/try_codes.py                                    # the demo's model; 7 minutes of one core
    python scripts/try_codes.py --rates 0.03 --window 10           # what is kept is computed again from 10 steps

The matrices of the last block are held as 4-bit codes with a scale for 64 weights. A population of N points adds
d_i = +-SR(sigma z_i) to the codes (SR rounds stochastically); with a_i the standardised rewards,

    u_t = rate / (N sigma) sum_i a_i d_i + 0.9 e_{t-1},    codes += round(u_t),    e_t = u_t - round(u_t),

and what would leave the grid does not move (Xu et al. 2026, arXiv 2602.03120; e_0 uniform in [-0.5, 0.5) as in their
published code). `kept` is a float for every code; a window begins with e = 0 and goes through its steps again.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from typing import Any

import torch
import transformers

from zoft.config import compose
from zoft.lm.models.load import quiet
from zoft.run.build import load
from zoft.run.rehearsal import rehearsing, rehearsing_trainer

TOP, GROUP, DECAY, POPULATION = 15, 64, 0.9, 8


class Codes:
    """A matrix as codes [n, 64] in 0 to 15 times scales [n, 1]; the module computes with what they stand for."""

    def __init__(self, weight: torch.nn.Parameter, seed: int) -> None:
        self.weight, self.seed = weight, seed
        groups = weight.detach().view(-1, GROUP)
        self.scale = groups.abs().amax(1, keepdim=True) / 7
        self.codes = (groups / self.scale).round() + 8
        self.show(self.codes)

    def show(self, codes: torch.Tensor) -> None:
        """The weights are those of these codes from now on."""
        self.weight.data.copy_(((codes - 8) * self.scale).view_as(self.weight))

    def draw(self, step: int, pair: int, sigma: float) -> torch.Tensor:
        """d of a pair of points: gaussian noise of deviation sigma, rounded stochastically."""
        generator = torch.Generator().manual_seed(hash((self.seed, step, pair)) % 2**63)
        moved = sigma * torch.randn(self.codes.shape, generator=generator)
        return (moved + torch.rand(self.codes.shape, generator=generator)).floor()

    def first(self) -> torch.Tensor:
        """e_0."""
        return torch.rand(self.codes.shape, generator=torch.Generator().manual_seed(self.seed)) - 0.5

    def inside(self, moved: torch.Tensor) -> torch.Tensor:
        """What of a move stays on the grid."""
        codes = self.codes + moved
        return moved.where((codes >= 0) & (codes <= TOP), torch.zeros(()))

    def wanted(self, step: int, shares: list[float], sigma: float, residue: torch.Tensor) -> torch.Tensor:
        """u_t; ``shares`` has rate a_i / (N sigma) of each point."""
        u = DECAY * residue
        for pair in range(POPULATION // 2):
            d = self.draw(step, pair, sigma)
            u += shares[2 * pair] * self.inside(d) + shares[2 * pair + 1] * self.inside(-d)
        return u


def trial(rate: float, sigma: float, window: int, args: argparse.Namespace) -> list[Any]:
    """One training; the figures of its row."""
    words = ["model.name=zoft:smollm2-135m-instruct", "task=sms_spam", "task.num_train=64", "task.num_dev=16"]
    words += ["task.num_test=8", "task.max_length=32", "method=mezo", "trainable=last_blocks", f"seed={args.seed}"]
    words += ["trainer.per_device_train_batch_size=4", "trainer.per_device_eval_batch_size=4"]
    with tempfile.TemporaryDirectory() as folder:
        cfg = compose([*words, f"budget.queries={args.queries}", f"output_dir={folder}"])
        model, tokenizer, rows = load(cfg)
        trainer = rehearsing_trainer(rehearsing(cfg, folder, args.queries), model, tokenizer, rows)
    matrices = [Codes(p, number) for number, p in enumerate(model.model.layers[-1].parameters()) if p.dim() == 2]
    residues = [one.first() for one in matrices]
    first, moved, seconds, history = trainer.evaluate()["eval_loss"], 0, 0.0, []
    steps, total = args.queries // POPULATION, sum(one.codes.numel() for one in matrices)
    for step in range(steps):
        batch = trainer.collated([rows["train"][(4 * step + i) % 64] for i in range(4)])
        losses = []
        for point in range(POPULATION):
            for one in matrices:
                d = one.draw(step, point // 2, sigma)
                one.show(one.codes + one.inside(-d if point % 2 else d))
            with torch.inference_mode():
                losses.append(float(trainer.zo_objective.loss(model, batch)))
        rewards = -torch.tensor(losses)
        a = (rewards - rewards.mean()) / (rewards.std(correction=0) + 1e-8)
        history.append([rate * float(share) / (POPULATION * sigma) for share in a])
        began = time.process_time()
        for number, one in enumerate(matrices):
            if window and step:
                residues[number] = torch.zeros(one.codes.shape)
                for earlier in range(max(0, step - window), step):
                    u = one.wanted(earlier, history[earlier], sigma, residues[number])
                    residues[number] = u - one.inside(u.round())
            u = one.wanted(step, history[step], sigma, residues[number])
            delta = one.inside(u.round())
            residues[number], moved = u - delta, moved + int((delta != 0).sum())
            one.codes += delta
            one.show(one.codes)
        seconds += time.process_time() - began
    last = trainer.evaluate()["eval_loss"]
    share = f"{100 * moved / total / steps:.2g} %"
    return [f"{first:.4f}", f"{last:.4f}", share, f"{seconds / steps:.2f}"]


def main() -> None:
    """Print the table, a row as soon as it is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", nargs="+", type=float, default=[5e-4, 0.01, 0.1])
    parser.add_argument("--sigmas", nargs="+", type=float, default=[0.01, 0.3])
    parser.add_argument("--window", type=int, default=0, help="steps that are computed again; 0 keeps a float a code")
    parser.add_argument("--queries", type=int, default=120)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["HF_HUB_OFFLINE"] = "1"
    quiet()
    print(f"{args.queries} queries, torch {torch.__version__}, transformers {transformers.__version__}\n")
    print("| sigma | rate | kept | dev loss before | after | codes moved a step | CPU s of a step's update |")
    print("|--:|--:|:--|--:|--:|--:|--:|", flush=True)
    how = f"window of {args.window}" if args.window else "a float a code"
    for sigma in args.sigmas:
        for rate in args.rates:
            row = trial(rate, sigma, args.window, args)
            print("|", " | ".join(map(str, [f"{sigma:g}", f"{rate:g}", how, *row])), "|", flush=True)


if __name__ == "__main__":
    main()
