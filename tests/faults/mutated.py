"""Config keys with a mistake in them: each refused, with the key that was meant, in no time and without torch.

A program of its own (``python -m tests.faults.mutated COUNT``), so that what it loads is seen.
"""

from __future__ import annotations

import json
import random
import sys
import time

WRONG = {"int": "many", "float": "small", "bool": "perhaps"}


def mistaken(name: str, generator: random.Random) -> str:
    """One letter left out, doubled, changed, or swapped with its neighbour."""
    at = generator.randrange(len(name) - 1)
    kind = generator.choice(["out", "double", "change", "swap"])
    middle = {
        "out": "",
        "double": name[at] * 2,
        "change": generator.choice("abcdefghijklmnopqrstuvwxyz"),
        "swap": name[at + 1] + name[at],
    }[kind]
    return name[:at] + middle + name[at + (2 if kind == "swap" else 1) :]


def main(count: int) -> None:
    """Try so many, and print what was found as JSON."""
    from zoft.config import compose, resolved_yaml
    from zoft.errors import UserError
    from zoft.run.folder import _lines

    generator, values = random.Random(0), {}
    for key, line in _lines(resolved_yaml(compose([]))):
        value = line.split(":", 1)[-1].strip() if ":" in line else ""
        name = key.rsplit(".", 1)[-1]
        if value and len(name) > 3 and key not in ("config", "output_dir", "method") and "_target_" not in key:
            values[key] = value
    refused = meant = typos = 0
    slowest, accepted = 0.0, []
    for number in range(count):
        key = generator.choice(list(values))
        above, _, name = key.rpartition(".")
        if number % 5 == 4:  # the wrong type, where there is one
            kinds = {k: type(json.loads(v)).__name__ for k, v in values.items() if _is_json(v)}
            key = generator.choice([k for k, kind in kinds.items() if kind in WRONG])
            argument, name = f"{key}={WRONG[kinds[key]]}", key.rsplit(".", 1)[-1]
        else:
            typos += 1
            wrong = name
            while wrong == name or f"{above}.{wrong}".strip(".") in values:
                wrong = mistaken(name, generator)
            argument = generator.choice(["", "", "+", "++"]) + f"{above}.{wrong}".strip(".") + "=1"
        began = time.process_time()
        try:
            compose([argument])
        except UserError as error:
            refused += 1
            meant += number % 5 != 4 and name in str(error).replace(argument.split("=")[0], "")
        else:
            accepted.append(argument)
        slowest = max(slowest, time.process_time() - began)
    figures = {"refused": refused, "meant": meant, "typos": typos, "slowest": slowest, "accepted": accepted}
    print(json.dumps(figures | {"torch": "torch" in sys.modules}))


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


if __name__ == "__main__":
    main(int(sys.argv[1]))
