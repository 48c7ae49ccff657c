"""The page itself: fields, buttons and what they show; every button is a verb (:mod:`zoft.use.page.commands`)."""

from __future__ import annotations

import importlib
import os
import tempfile
from pathlib import Path
from typing import Any

from zoft.config.catalog import choices
from zoft.errors import UserError
from zoft.use.page.commands import Fields, Running, answer, earlier_runs, shown, state_of

LOOPBACK = ("127.0.0.1", "localhost", "::1")
_METRICS = ("accuracy", "f1", "exact_match", "reward", "perplexity")
_SECONDS = 2.0  # between two looks at a training


def require_gradio() -> Any:
    """The package, without its reports to its makers.

    Raises:
        UserError: it is not installed.
    """
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        return importlib.import_module("gradio")
    except ImportError:
        raise UserError("zoft ui needs gradio: pip install 'zoft[ui]'") from None


def require_safe(host: str, token: str) -> None:
    """Refuse to listen where others can reach the page without a token: it starts processes.

    Args:
        host: the address.
        token: the password of the page; empty for none.

    Raises:
        UserError: another address than the machine's own, and no token of 16 characters or more.

    Example:
        >>> require_safe("127.0.0.1", "")
        >>> require_safe("0.0.0.0", "")
        Traceback (most recent call last):
        zoft.errors.UserError: host=0.0.0.0 is reached from other machines, and the page starts processes: ...
    """
    if host not in LOOPBACK and len(token) < 16:
        raise UserError(
            f"host={host} is reached from other machines, and the page starts processes: give token=... of 16 "
            "characters or more (the page asks for it), or leave host= out and use an ssh tunnel"
        )


def page(folder: Path | None = None) -> Any:
    """The page as gradio's Blocks, not yet served.

    Args:
        folder: for the output of a training; a temporary one if left out.
    """
    gradio = require_gradio()
    running = Running(Path(folder or tempfile.mkdtemp(prefix="zoft-ui-")) / "train.log")
    with gradio.Blocks(title="zoft") as blocks:
        gradio.Markdown("# zoft\nEvery button is a command, shown below it; the same in a terminal does the same.")
        earlier = gradio.Dropdown(
            ["", *earlier_runs()], value="", allow_custom_value=True, label="an earlier run: go on, try, export"
        )
        with gradio.Row():
            names = [*choices("config"), ""]
            config = gradio.Dropdown(names, value="quickstart", allow_custom_value=True, label="config")
            model = gradio.Textbox(label="model (hub name or folder; empty: the config's)")
            data = gradio.Textbox(label="data (a file on this machine; empty: the config's)")
        more = gradio.Textbox(label="other arguments", placeholder="budget.queries=200 'task.words={0: No, 1: Yes}'")
        output = gradio.Textbox(label="the run's folder (empty: runs/...)", placeholder="runs/mine")
        fields = [config, model, data, more, output]
        with gradio.Row():
            looks = {verb: gradio.Button(label) for verb, label in _LOOKS.items()}
            start, stop = gradio.Button("Start or go on", variant="primary"), gradio.Button("Stop")
        command = gradio.Code(label="command", language="shell", interactive=False)
        console = gradio.Textbox(
            label="what it says", lines=14, max_lines=30, interactive=False, elem_classes="console"
        )
        curve = gradio.Image(label="curve", interactive=False)
        with gradio.Row():
            run = gradio.Textbox(label="a finished run's folder")
            prompt = gradio.Textbox(label="text for the model")
        with gradio.Row():
            write, export = gradio.Button("Try it"), gradio.Button("Export")
        earlier.focus(lambda: gradio.Dropdown(choices=["", *earlier_runs()]), None, earlier, api_name=False)
        earlier.input(_taken_up, earlier, [*fields, run, console, curve], api_name="earlier")
        for verb, button in looks.items():
            button.click(_look(verb), fields, [command, console], api_name=verb)
        start.click(_begin(running), fields, [command, console], api_name="start")
        stop.click(_stopped(running), None, console, api_name="stop")
        write.click(_tried, [run, prompt], [command, console], api_name="generate")
        export.click(_exported, run, [command, console], api_name="export")
        last = gradio.State("")
        gradio.Timer(_SECONDS).tick(
            lambda text: _seen(running, text), last, [console, curve, last], api_name="seen", show_progress="hidden"
        )
    return blocks


_LOOKS = {"data": "See the rows", "check": "Check", "estimate": "Estimate"}


def _look(verb: str) -> Any:
    def look(*values: str) -> tuple[str, str]:
        try:
            words = Fields(*values).words()
        except UserError as error:
            return "", str(error)
        words = ["show", *words] if verb == "data" else words
        return shown(verb, words), answer(verb, words)

    return look


def _begin(running: Running) -> Any:
    def begin(*values: str) -> tuple[str, str]:
        try:
            running.start(Fields(*values).words())
        except UserError as error:
            return running.command, str(error)
        return running.command, "begun"

    return begin


def _stopped(running: Running) -> Any:
    def stopped() -> str:
        running.stop()
        return running.text()

    return stopped


def _taken_up(run: str) -> tuple[str, str, str, str, str, str, str, str | None]:
    """The fields of an earlier run, how it stands, and its loss beside its metric."""
    run = run.strip()
    if not (Path(run) / "config.yaml").is_file() or not run:
        return "quickstart", "", "", "", "", "", f"{run or 'nothing'} holds no run" if run else "", None
    return f"{run}/config.yaml", "", "", "", run, run, state_of(run), _curve(Path(run))


def _curve(folder: Path) -> str | None:
    """The picture of a run; None where nothing was logged yet."""
    from zoft.report.plots import learning_curve
    from zoft.report.results import read_metrics

    logged = {name for row in read_metrics(folder) for name in row}
    shown = next((name for name in _METRICS if f"eval_{name}" in logged), "accuracy")
    path = learning_curve(folder, metric=shown)
    return None if path is None else str(path)


def _tried(run: str, prompt: str) -> tuple[str, str]:
    words = [f"run={run.strip()}", f"prompt={prompt}"]
    return shown("generate", words), answer("generate", words)


def _exported(run: str) -> tuple[str, str]:
    words = [f"run={run.strip()}"]
    return shown("export", words), answer("export", words)


def _seen(running: Running, last: str) -> Any:
    """The training's output and curve, and the output once more for the next time; what has not changed is skipped.

    Else an ended run would take the place of whatever another button has said since.
    """
    gradio = require_gradio()
    text = running.text() if running.process is not None else last
    if text == last:
        return gradio.skip(), gradio.skip(), last
    folder = folder_of(running.words)
    path = _curve(folder) if folder else None
    return text, path or gradio.skip(), text


def folder_of(words: list[str]) -> Path | None:
    """The folder of the run that these arguments describe; None where they describe none."""
    from zoft.config import compose

    try:
        return Path(compose(words).output_dir)
    except UserError:
        return None


def serve(host: str, port: int, token: str) -> None:
    """Show the page until Ctrl-C.

    Args:
        host: the address to listen at.
        port: its port.
        token: the password, with the user name zoft; empty for none.
    """
    require_safe(host, token)
    gradio = require_gradio()
    theme = gradio.themes.Base(font=["system-ui", "sans-serif"], font_mono=["monospace"])  # no font is fetched
    page().launch(
        server_name=host,
        server_port=port,
        share=False,
        auth=("zoft", token) if token else None,
        theme=theme,
        css=".console textarea {font-family: monospace}",
        allowed_paths=[],
        footer_links=[],
    )
