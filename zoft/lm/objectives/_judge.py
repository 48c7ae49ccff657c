"""The process that judges texts with a function: a line of JSON in, one out (:mod:`zoft.lm.objectives._grading`)."""

from __future__ import annotations

import json
import math
import os
import queue
import sys
import threading
from typing import Any


def main(function: str) -> None:
    """Answer requests until standard input ends."""
    # the pipe under another number: standard output belongs to the function
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the function prints is no reply
    from zoft.lm.objectives.reward import Reward

    judge = Reward(function=function)
    judge.loaded()
    asked: queue.Queue[str] = queue.Queue()
    threading.Thread(target=_read, args=(asked,), daemon=True).start()
    print("begun", file=replies, flush=True)
    while True:
        print(json.dumps(_judged(judge, json.loads(asked.get()))), file=replies, flush=True)


def _read(asked: queue.Queue[str]) -> None:
    """Beside the function, so that the process ends with the one that asks, also in the middle of a text."""
    for line in sys.stdin:
        asked.put(line)
    os._exit(0)


def _judged(judge: Any, job: list[Any]) -> dict[str, Any]:
    from zoft.lm.metrics.libraries import number_of
    from zoft.lm.objectives._grading import raised
    from zoft.lm.objectives.reward import takes_answers

    prompt, text, answer = job
    function = judge.loaded()
    more = {"answers": [answer]} if takes_answers(function) else {}
    try:
        values = list(function(prompts=[prompt], generations=[text], **more))
    except Exception as error:
        return {"error": f"it raised {raised(error)}"}
    number = number_of(values[0]) if len(values) == 1 else None
    if number is None or not math.isfinite(number):
        return {"error": f"it returned {values!r:.80} instead of a list of one finite number"}
    return {"value": number}


if __name__ == "__main__":
    main(sys.argv[1])
