"""`zoft ui`: one page in a browser on this machine that drives the other verbs."""

from __future__ import annotations

from zoft.errors import UserError
from zoft.utils.words import read_words

HELP = """\
usage: zoft ui [port=7860] [host=127.0.0.1] [token=TEXT]

One page: pick a config, a model and data, see the rows, check, estimate, start, watch the curve, stop and go on, try
the result, export. Every button runs a verb of the command line, whose command the page shows; nothing is fetched from
elsewhere. It listens on this machine alone and asks for no login. Another host= needs a token= of 16 characters or
more, which the page asks for (user name zoft). Ctrl-C ends the page; a training that it started goes on.

Needs gradio: pip install 'zoft[ui]'.
"""


def command(arguments: list[str]) -> int:
    """Serve the page."""
    words = read_words("ui", arguments, keys=("port", "host", "token"), bare=False)
    if words.rest:
        raise UserError(
            f"zoft ui takes port=, host= and token=, not {words.rest[0]!r}: the page has fields for a run's"
        )
    host, port, token = words.own.get("host", "127.0.0.1"), words.own.get("port", "7860"), words.own.get("token", "")
    if not port.isdecimal() or not 0 < int(port) < 65536:
        raise UserError(f"port must be a number from 1 to 65535, got {port!r}")
    from zoft.use.page.page import require_safe, serve

    require_safe(host, token)
    serve(host, int(port), token)
    return 0
