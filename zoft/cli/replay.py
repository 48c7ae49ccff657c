"""`zoft replay`: a run's weights at any step, from the base model and the journal alone."""

from __future__ import annotations

from pathlib import Path

from zoft.cli.journal import journal_of
from zoft.errors import UserError
from zoft.utils import own_files
from zoft.utils.terminal import fitted
from zoft.utils.words import folder_of, read_words


def command(arguments: list[str]) -> int:
    """Rebuild weights and say their hash, or save them."""
    run, settings, options = _parsed(arguments)
    from zoft.run import folder

    config = folder.config_of(run)
    journal_of(run)
    from zoft.config import compose
    from zoft.run.replay import replay_run

    text = replay_run(
        compose([f"config={config}", *settings], runs_code=False),
        Path(run),
        to=options.get("--to"),
        output=options.get("--output"),
    )
    print(fitted(text))
    return 0


def _parsed(arguments: list[str]) -> tuple[str, list[str], dict[str, str]]:
    words = read_words("replay", arguments, options=["--to", "--output"])
    settings = [word for word in words.rest if own_files.split(word.partition("=")[2])]
    runs = [word for word in words.rest if word not in settings]
    if len(runs) != 1:
        raise UserError("say which run: zoft replay RUN [--to STEP] [--output DIR]")
    return folder_of(runs[0]), settings, words.options
