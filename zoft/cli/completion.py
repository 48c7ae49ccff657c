"""`zoft completion`: a bash script, and the words it offers."""

from __future__ import annotations

import dataclasses
import importlib

from zoft.cli.verbs import VERBS
from zoft.component import GROUPS, components
from zoft.config.catalog import ORDER, choices, preset_files
from zoft.errors import UserError

SCRIPT = """\
_zoft() {
  local line="${COMP_LINE:0:COMP_POINT}"
  local word="${line##*[[:space:]]}"
  mapfile -t COMPREPLY < <(zoft completion --words "$line" 2>/dev/null)
  # bash splits words at '=' and wants only what follows it
  if [[ "$word" == *=* && "$COMP_WORDBREAKS" == *=* ]]; then COMPREPLY=("${COMPREPLY[@]#"${word%%=*}="}"); fi
  if [[ ${#COMPREPLY[@]} -eq 1 && "${COMPREPLY[0]}" == *[=.] ]]; then compopt -o nospace; fi
}
complete -o default -F _zoft zoft
"""

KEYS = ("seed=", "output_dir=", "model.name=", "model.dtype=", "budget.queries=", "tracker.project=", "trainer.")

BENCH_KEYS = ("methods", "prompts", "seeds", "queries", "rates", "references", "jobs", "output_dir")


def command(arguments: list[str]) -> int:
    """Print the script, or (for the script) the words that can stand at the end of a line."""
    if arguments[:1] == ["--words"]:
        print("\n".join(words(arguments[1] if len(arguments) > 1 else "")))
    elif arguments:
        raise UserError(f"zoft completion takes no arguments, got {arguments[0]!r}")
    else:
        print(SCRIPT, end="")
    return 0


def words(line: str) -> list[str]:
    """What can complete a command line.

    Example:
        >>> words("zoft train estimator=cen")
        ['estimator=central']
    """
    before, _, word = line.rpartition(" ")
    typed = before.split()[1:]
    if not typed:
        return [verb for verb in VERBS if verb.startswith(word)]
    if typed[0] == "ls":
        offered = list(ORDER)
    elif typed[0] == "show":
        offered = [f"{group}/{name}" for group in ORDER for name in choices(group, plugins=False)]
    elif typed[0] == "train":
        offered = _arguments(word)
    elif typed[0] == "eval":
        keys = ["run=", "mode=", "k=", "split=", "evaluate=", "harness=", "harness_path=", "harness_limit=", "--json"]
        offered = [*_arguments(word), *keys]
    elif typed[0] == "bench":
        from zoft.cli.bench import FLAGS

        benches = [f"config={name}" for name in preset_files("bench")]
        offered = [*benches, *_arguments(word), *(f"{key}=" for key in BENCH_KEYS), *FLAGS]
    elif typed[0] == "data":
        offered = [*_arguments(word), "--rows", "--json"] if typed[1:] else ["show"]
    elif typed[0] == "doctor":
        offered = ["--json"]
    else:
        module = importlib.import_module(f"zoft.cli.{typed[0]}") if typed[0] in VERBS else None
        offered = [*(f"{key}=" for key in getattr(module, "KEYS", ())), *getattr(module, "FLAGS", ())]
    return [text for text in offered if text.startswith(word)]


def _arguments(word: str) -> list[str]:
    group, sign, _ = word.partition("=")
    if sign:
        return [f"{group}={name}" for name in choices(group, plugins=False)] if group in ORDER else []
    section = word.partition(".")[0]
    if "." in word and section in GROUPS:
        fields = {field.name for cls in components(section).values() for field in dataclasses.fields(cls)}
        return [f"{section}.{name}=" for name in sorted(fields)]
    if word.startswith("trainer."):
        from zoft.config.training_arguments import HOMES
        from zoft.config.training_arguments import fields as trainer_fields

        return [f"trainer.{name}=" for name in trainer_fields() if name not in HOMES]
    return [*(f"{group}=" for group in ORDER), *KEYS, "--multirun", "--cfg", "--help"]
