"""n clients train one model on rows of their own and send scalars: bytes a round, and what the merged model is worth.

    python scripts/federate.py [--clients 8] [--rounds 5] [--steps 20] [--mode own|shared|pool] [--seeds 64]

A simulation in one process, of a tiny random model on rows in which every client sees half of the patterns. In each
round every client begins at the round's model and takes its steps; the journals go up, `zoft.journal.merge` makes one
of them (the mean of the clients' models), and that goes down to all, who replay it. Modes: ``own`` directions of each
client; ``shared``, the same directions for all (DeComFL: the merged journal is as long as one client's); ``pool``,
drawn from a finite set of seeds (FedKSeed: it is never longer than the set).
"""

from __future__ import annotations

import argparse
import random
import tempfile
from pathlib import Path
from typing import Any

import torch

from zoft import ZOConfig, ZOTrainer
from zoft.engines.in_place import InPlace
from zoft.estimators.central import Central
from zoft.journal.file import NAME, Journal, read
from zoft.journal.merge import merge
from zoft.noise.direction import step_seed
from zoft.run.replay import replay
from zoft.step.directions import StepDirections
from zoft.step.method import Method
from zoft.step.update import ZOOptimizer
from zoft.weights.tensors import Weights

MODES = ("own", "shared", "pool")
LENGTH, VOCABULARY = 8, 32


def model_of(seed: int = 0) -> Any:
    """A tiny random Llama."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=32, **sizes)).float()


def rows_of(client: int, count: int = 32) -> list[dict[str, torch.Tensor]]:
    """Ascending runs of tokens for even clients, descending ones for odd."""
    draw, step = random.Random(client), 1 if client % 2 == 0 else -1
    starts = [draw.randrange(VOCABULARY) for _ in range(count)]
    ids = [torch.tensor([(start + step * place) % VOCABULARY for place in range(LENGTH)]) for start in starts]
    return [{"input_ids": one, "labels": one} for one in ids]


def loss_of(model: Any, rows: list[dict[str, torch.Tensor]]) -> float:
    """The mean loss over rows."""
    ids = torch.stack([row["input_ids"] for row in rows])
    with torch.inference_mode():
        return float(model(input_ids=ids, labels=ids).loss)


def train(model: Any, client: int, number: int, folder: Path, args: argparse.Namespace) -> Path:
    """A client's round; its journal."""
    seed = step_seed(number, 0 if args.mode == "shared" else client + 1)
    draw = random.Random(seed)
    pool = args.mode == "pool"
    config = ZOConfig(
        output_dir=str(folder), max_steps=args.steps, per_device_train_batch_size=8, learning_rate=args.rate,
        lr_scheduler_type="constant", weight_decay=0.0, save_strategy="no", report_to=[], disable_tqdm=True, seed=seed,
        use_cpu=True, logging_steps=args.steps,
    )  # fmt: skip
    trainer = ZOTrainer(
        model,
        config,
        train_dataset=rows_of(client),
        engine=InPlace(restore="copy"),
        estimator=Central(eps=1e-3, noise="torch_sequential" if pool else "counter"),
        direction_seeds=[draw.randrange(args.seeds) for _ in range(args.steps)] if pool else None,
    )
    trainer.train()
    return folder / NAME


def take(model: Any, path: Path, noise: str) -> None:
    """The merged journal's steps, into a model that is at the round's start."""
    method = Method.of(estimator=Central(eps=1e-3, noise=noise))
    coordinates = method.bind(Weights(model))
    session = InPlace(restore="copy").bind(model, coordinates, lambda batch: batch)
    optimizer = ZOOptimizer([{"params": list(model.parameters())}], method.optimizer, session, 1.0)
    contents = read(path)
    replay(optimizer, StepDirections(method.estimator, 0), contents, contents.end, path)


def simulate(args: argparse.Namespace, folder: Path) -> list[dict[str, float]]:
    """A row a round: bytes up and down, the loss on all clients' rows, the merged model's distance from the mean."""
    model, noise = model_of(), "torch_sequential" if args.mode == "pool" else "counter"
    drawn = StepDirections(Central(noise=noise), 0)
    everything = [row for client in range(args.clients) for row in rows_of(client)]
    rows = []
    for number in range(args.rounds):
        start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        total = {name: torch.zeros_like(tensor) for name, tensor in start.items()}
        paths = []
        for client in range(args.clients):
            client_model = model_of()
            client_model.load_state_dict(start)
            paths.append(train(client_model, client, number, folder / f"{number}-{client}", args))
            for name, tensor in client_model.state_dict().items():
                total[name] += tensor / args.clients
        header, records = merge(
            [(str(path), read(path)) for path in paths],
            "mean",
            lambda step: drawn.at(step)[0].seed,
            fold=args.mode == "pool",
        )
        merged = folder / f"{number}-merged"
        merged.mkdir()
        journal = Journal.create(merged / NAME, header)
        for record in records:
            journal.append(record)
        journal.seal()
        journal.close()
        take(model, merged / NAME, noise)
        off = max(float((tensor - total[name]).abs().max()) for name, tensor in model.state_dict().items())
        rows.append({
            "round": number + 1,
            "up": sum(path.stat().st_size for path in paths) / args.clients,
            "down": (merged / NAME).stat().st_size,
            "coefficients": sum(len(record.coefficients) for record in records),
            "loss": loss_of(model, everything),
            "off": off,
        })  # fmt: skip
    return rows


def parsed(words: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("clients", 8), ("rounds", 5), ("steps", 20), ("seeds", 64)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--mode", choices=MODES, default="own")
    return parser.parse_args(words)


def main() -> None:
    """Print the table."""
    args, model = parsed(), model_of()
    whole = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    print(f"{args.clients} clients, {args.steps} steps a round, mode={args.mode}; the model has {whole:,} bytes")
    print(f"{'round':>5} {'up, a client':>13} {'down, a client':>14} {'coefficients':>13} {'loss':>8} {'off mean':>9}")
    with tempfile.TemporaryDirectory() as folder:
        for row in simulate(args, Path(folder)):
            print(
                f"{row['round']:>5} {row['up']:>13,.0f} {row['down']:>14,} {row['coefficients']:>13,} "
                f"{row['loss']:>8.4f} {row['off']:>9.1e}"
            )


if __name__ == "__main__":
    main()
