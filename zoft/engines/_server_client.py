"""Talking to a server that serves LoRA adapters, as vLLM does: requests, retries, what a reply must have."""

from __future__ import annotations

import http.client
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar
from urllib.parse import urlsplit

from zoft.errors import ServerLostError, UserError

log = logging.getLogger(__name__)
T = TypeVar("T")

NO_LORA = (
    "engine=server: the server at {} serves no LoRA adapters, or lets none be loaded while it runs: start it with "
    "--enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 (scripts/serve_vllm.md)"
)
_LONGEST_WAIT = 30.0  # seconds between two tries
_TOKENS = 128  # that vLLM scores behind a prompt in one request, at most
_NOT_A_NUMBER = "json compliant"  # in its error where a log-probability is NaN, which JSON cannot hold
_NEVER = ("not support", "expected target modules")  # of an adapter, in what vLLM says of one that it cannot load
_wait = time.sleep


class BadReplyError(Exception):
    """A reply that cannot be used: late, short, of another adapter, no JSON, or an error of the server's own."""


class NaNReplyError(BadReplyError):
    """A log-probability behind one of the prompts of a request is no number."""


class Client:
    """One server.

    Args:
        url: where it listens, ``http://host:port``.
        timeout: seconds that a reply may take.
        retries: how often a request is repeated.
    """

    def __init__(self, url: str, timeout: float, retries: int) -> None:
        self.url, self.timeout, self.retries = url.rstrip("/"), timeout, retries
        self.context: int | None = None  # tokens of a prompt and what is written behind it, once the server has said

    # ---- one request -------------------------------------------------------------------------------------------------

    def ask(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> tuple[int, Any]:
        """(status, the reply, JSON where it is such).

        Raises:
            BadReplyError: no reply in time, or none at all.
        """
        where = urlsplit(self.url)
        kind = http.client.HTTPSConnection if where.scheme == "https" else http.client.HTTPConnection
        connection = kind(where.hostname or "", where.port, timeout=self.timeout)
        try:
            data = None if body is None else json.dumps(body).encode()
            connection.request(method, where.path + path, data, {"Content-Type": "application/json"})
            reply = connection.getresponse()
            text = reply.read().decode("utf-8", "replace")
        except TimeoutError as error:
            raise BadReplyError(f"no reply within {self.timeout:g} s") from error
        except (OSError, http.client.HTTPException) as error:
            raise BadReplyError(f"{type(error).__name__}: {error}") from error
        finally:
            connection.close()
        try:
            return reply.status, json.loads(text)
        except ValueError:
            return reply.status, text

    def asked(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """The reply to a request that succeeds.

        Raises:
            BadReplyError: it may succeed when it is repeated.
            UserError: it will not.
            NaNReplyError: the reply would have to hold something that is no number.
        """
        status, reply = self.ask(method, path, body)
        if status == 200:
            return reply
        said = _message(reply)
        if _NOT_A_NUMBER in said.lower():
            raise NaNReplyError(said)
        raise self.failure(status, said, path)

    def failure(self, status: int, said: str, path: str) -> Exception:
        """The exception for a failed reply: :class:`BadReplyError` where a retry may help, else :class:`UserError`."""
        if "lora is not enabled" in said.lower() or "enable_lora" in said.lower():
            return UserError(NO_LORA.format(self.url))
        if status in (404, 408, 409, 425, 429) or status >= 500:  # 404: it has been started anew, without adapters
            return BadReplyError(f"{status} {said}")
        return UserError(f"engine=server: {self.url}{path} refuses the request: {said} ({status})")

    def repeated(self, what: str, attempt: Callable[[], T]) -> T:
        """What ``attempt`` returns, tried again a bounded number of times with growing pauses.

        Args:
            what: in words, for the log.
            attempt: asks the server; raises :class:`BadReplyError` where another try may help.

        Raises:
            ServerLostError: it did not help.
        """
        for number in range(self.retries + 1):
            try:
                return attempt()
            except BadReplyError as error:
                if number == self.retries:
                    raise ServerLostError(
                        f"the server at {self.url} did not {what} in {self.retries + 1} tries: {error}; the steps "
                        "before this one are in the journal, and the same command goes on from there"
                    ) from error
                pause = min(_LONGEST_WAIT, 0.1 * 4**number)
                log.warning("engine=server: could not %s (%s); trying again in %.1f s", what, error, pause)
                _wait(pause)
        raise AssertionError

    # ---- what it serves ----------------------------------------------------------------------------------------------

    def cards(self) -> list[dict[str, Any]]:
        """The models that it serves: bases, and adapters with the path they came from as ``root``."""
        reply = self.asked("GET", "/v1/models")
        rows = reply.get("data") if isinstance(reply, dict) else None
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise BadReplyError("/v1/models lists nothing")
        lengths = [row["max_model_len"] for row in rows if isinstance(row.get("max_model_len"), int)]
        self.context = min(lengths, default=None)
        return rows

    def base(self) -> dict[str, Any]:
        """The card of the one base that it serves.

        Raises:
            UserError: nothing answers, or it is no such server, or it serves no adapters.
        """
        start = "start one as scripts/serve_vllm.md says, or give engine.url"
        try:
            bases = [card for card in self.cards() if not card.get("parent")]
            status, reply = self.ask("POST", "/v1/load_lora_adapter", {"lora_name": "zoft-none", "lora_path": "/none"})
        except BadReplyError as error:
            raise UserError(
                f"engine=server: nothing that can be used answers at {self.url} ({error}): {start}"
            ) from error
        if not bases:
            raise UserError(f"engine=server: the server at {self.url} lists no base model: {start}")
        no_route = status in (404, 405) and isinstance(reply, dict) and "detail" in reply
        if no_route or "lora is not enabled" in _message(reply).lower():
            raise UserError(NO_LORA.format(self.url))
        return bases[0]

    def load(self, name: str, path: str) -> None:
        """Load an adapter under a name that nothing has; one that has it already is left as it is.

        Never ``load_inplace``: vLLM reads such an adapter from its folder again before every step of its scheduler.

        Raises:
            BadReplyError: it may succeed when it is repeated.
            UserError: the server does not take such adapters.
        """
        status, reply = self.ask("POST", "/v1/load_lora_adapter", {"lora_name": name, "lora_path": path})
        said = _message(reply)
        if status == 200 or "already been loaded" in said:  # by a request whose reply came too late
            return
        if "max_lora_rank" in said:
            raise UserError(
                f"engine=server: the server at {self.url} does not take adapters of this rank ({said}): start it with "
                "--max-lora-rank of at least peft.r"
            )
        if any(words in said for words in _NEVER):
            raise UserError(f"engine=server: the server at {self.url} cannot load this adapter: {said}")
        raise self.failure(status, said, "/v1/load_lora_adapter")

    def unload(self, name: str) -> None:
        """Unload an adapter; an error is passed over."""
        try:
            self.ask("POST", "/v1/unload_lora_adapter", {"lora_name": name})
        except BadReplyError as error:
            log.debug("could not unload %s: %s", name, error)

    # ---- what it computes --------------------------------------------------------------------------------------------

    def scores(
        self, name: str, salt: str, prompts: Sequence[Sequence[int]], tokens: Sequence[int]
    ) -> list[list[float]]:
        """Log-probabilities of ``tokens`` behind each prompt.

        Args:
            name: of the adapter.
            salt: of the prefix cache: what another version of the adapter left there is not used.
            prompts: token ids.
            tokens: which are wanted.
        """
        pieces = [
            self._scores(name, salt, prompts, tokens[first : first + _TOKENS])
            for first in range(0, len(tokens), _TOKENS)
        ]
        return [[value for part in parts for value in part] for parts in zip(*pieces, strict=True)]

    def _scores(
        self, name: str, salt: str, prompts: Sequence[Sequence[int]], tokens: Sequence[int]
    ) -> list[list[float]]:
        try:
            choices = self._completed(
                name, salt, prompts, max_tokens=1, temperature=0.0, logprobs=len(tokens),
                logprob_token_ids=list(tokens), return_tokens_as_token_ids=True,
            )  # fmt: skip
        except NaNReplyError:
            # the whole reply is lost to one number: halves find out whose it is
            if len(prompts) == 1:
                return [[float("nan")] * len(tokens)]
            half = len(prompts) // 2
            return [row for some in (prompts[:half], prompts[half:]) for row in self._scores(name, salt, some, tokens)]
        return [_scores_of(choice, tokens) for choice in choices]

    def texts(
        self, name: str, salt: str, prompts: Sequence[Sequence[int]], settings: Mapping[str, Any]
    ) -> list[list[int]]:
        """The tokens written behind each prompt.

        Args:
            name: of the adapter.
            salt: as for :meth:`scores`.
            prompts: token ids.
            settings: of :meth:`zoft.weights.elsewhere.Runtime.write`.
        """
        choices = self._completed(
            name, salt, prompts, max_tokens=settings["max_new_tokens"], temperature=settings["temperature"],
            seed=settings["seed"], stop=[settings["stop"]] if settings["stop"] else [],
            include_stop_str_in_output=True, stop_token_ids=list(settings["ends"]), return_token_ids=True,
        )  # fmt: skip
        written = [choice.get("token_ids") for choice in choices]
        if not all(isinstance(ids, list) and all(type(token) is int for token in ids) for ids in written):
            raise BadReplyError("a choice has no token_ids")
        # what an engine that is stopped had by then is no text: it would be judged as if the model had ended there
        for choice, ids in zip(choices, written, strict=True):
            reason, room = choice.get("finish_reason"), settings["max_new_tokens"]
            if reason not in ("stop", "length") or (reason == "length" and len(ids) < room):  # type: ignore[arg-type]
                raise BadReplyError(f"a text of {len(ids)} tokens ended for {reason!r}")  # type: ignore[arg-type]
        return written  # type: ignore[return-value]

    def _completed(self, name: str, salt: str, prompts: Sequence[Sequence[int]], **more: Any) -> list[dict[str, Any]]:
        """The choices, one a prompt in their order."""
        self._fit(prompts, more["max_tokens"])
        body = {"model": name, "prompt": [list(prompt) for prompt in prompts], "cache_salt": salt, "top_p": 1.0, "n": 1}
        reply = self.asked("POST", "/v1/completions", body | more)
        if not isinstance(reply, dict) or reply.get("model") != name:
            raise BadReplyError(f"the reply is not of {name}")
        try:
            choices = sorted(reply["choices"], key=lambda choice: int(choice["index"]))
        except (KeyError, TypeError, ValueError) as error:
            raise BadReplyError(f"its choices have no numbers ({error})") from error
        if [choice["index"] for choice in choices] != list(range(len(prompts))):
            raise BadReplyError(f"{len(choices)} choices for {len(prompts)} prompts")
        return choices

    def _fit(self, prompts: Sequence[Sequence[int]], room: int) -> None:
        """vLLM writes less than it was asked for where its context ends: such a text would never become whole."""
        longest = max(map(len, prompts))
        if self.context is not None and longest + room > self.context:
            raise UserError(
                f"engine=server: a prompt of {longest} tokens and {room} behind it do not fit into the {self.context} "
                f"of the server at {self.url}: start it with a larger --max-model-len, or lower task.max_length"
            )


def _scores_of(choice: Mapping[str, Any], tokens: Sequence[int]) -> list[float]:
    try:
        (row,) = choice["logprobs"]["top_logprobs"]
        return [float("nan") if row[f"token_id:{t}"] is None else float(row[f"token_id:{t}"]) for t in tokens]
    except (KeyError, TypeError, ValueError) as error:
        raise BadReplyError(f"a choice lacks log-probabilities ({error})") from error


def _message(reply: Any) -> str:
    """The message in a server's reply to a failed request."""
    inner = reply.get("error", reply) if isinstance(reply, dict) else reply
    said = inner.get("message", inner.get("detail", inner)) if isinstance(inner, dict) else inner
    return f"{said}"[:300]
