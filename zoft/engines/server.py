"""Forwards in a serving engine: adapters through a shared folder, many points in one batch of requests."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import uuid
import weakref
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from zoft.engines._elsewhere import Adapter, Backend, Elsewhere, ScoreRequest, WriteRequest, digest_of, saved_name
from zoft.engines._server_client import BadReplyError, Client
from zoft.errors import UserError
from zoft.subspaces.base import BoundSubspace
from zoft.utils.lazy import Tensor, nn, torch

_UNION = 64
"""Tokens that one request asks for at every prompt; where the prompts want more than that, each asks for its own."""

_AT_ONCE = 64
"""Requests of one prompt each that are on their way together."""

T = TypeVar("T")
Request = TypeVar("Request", ScoreRequest, WriteRequest)


@dataclass
class Server(Elsewhere):
    """A vLLM server that serves LoRA: it holds the base, and every point is an adapter that it loads.

    Adapters are written to a folder that both can read and loaded under the digest of their numbers. Candidates are
    scored by the log-probabilities of the next token, every position with a request of its own (prompts share the
    server's prefix cache); texts are generated there. A server that fails is asked again, and then the run stops as for
    a signal, with exit code 75: the same command goes on.

    Args:
        url: where the server listens.
        folder: shared with the server; empty takes /dev/shm, or the system's temporary folder where there is none.
        max_adapters: points that are asked for at a time: the server's --max-loras.
        timeout: seconds that a reply may take.
        retries: how often a failed request is repeated, with growing pauses.

    References: docs.vllm.ai (LoRA adapters; logprob_token_ids); Sarkar et al. 2025 (EGGROLL), whose
    population is made of adapters as well.
    """

    writes: ClassVar[bool] = True
    holds_base: ClassVar[bool] = True
    about_quantization: ClassVar[str] = "the server is started with its own --quantization"

    url: str = "http://127.0.0.1:8000"
    folder: str = ""
    max_adapters: int = 8
    timeout: float = 600.0
    retries: int = 5

    def check(self) -> None:
        """Refuse an invalid address, and counts that are too small to work."""
        self.require(self.url.startswith(("http://", "https://")), "url", "http://host:port")
        self.require(self.max_adapters >= 1, "max_adapters", "at least 1")
        self.require(0 < self.timeout < float("inf"), "timeout", "> 0 and finite")
        self.require(self.retries >= 0, "retries", "at least 0")

    def prepare(self) -> None:
        """A server that loads adapters has to answer, and the folder has to be there."""
        if self.folder and not Path(self.folder).is_dir():
            raise UserError(f"engine.folder={self.folder} is no folder: give one that the server can read too")
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise UserError("engine=server is asked by one process: start the run without torchrun")
        self.client().base()

    def served_name(self) -> str:
        """What the server calls its base, and where it has it from."""
        card = self.client().base()
        return f"{card.get('id')}:{card.get('root')}"

    def client(self) -> Client:
        """The client of the server."""
        return Client(self.url, self.timeout, self.retries)

    def backend(self, model: nn.Module, coordinates: BoundSubspace) -> Backend:
        """Adapters of this model are served from now on."""
        del coordinates
        return _ServedAdapters(self, model)


class _ServedAdapters:
    """Adapters on the server, by the digest of their numbers."""

    def __init__(self, engine: Server, model: Any) -> None:
        self.client, self.size = engine.client(), engine.max_adapters
        self.config = model.peft_config[model.active_adapter]
        shared = engine.folder or ("/dev/shm" if os.path.isdir("/dev/shm") else tempfile.gettempdir())
        self.folder = Path(tempfile.mkdtemp(prefix="zoft-", dir=shared))
        self.folder.chmod(0o755)  # the server may run as another user
        self.prefix = f"zoft-{uuid.uuid4().hex[:8]}"
        self.digests: list[str] = []  # of those that are loaded, the longest unused first
        # two pools: who waits for the prompts of a point must not take the threads that they need
        self._threads, self._prompts = ThreadPoolExecutor(self.size), ThreadPoolExecutor(_AT_ONCE)
        pools = (self._threads, self._prompts)
        weakref.finalize(self, _leave, self.client, self.prefix, self.digests, self.folder, pools)

    # ---- what is asked -----------------------------------------------------------------------------------------------

    def scores(self, asked: Sequence[ScoreRequest]) -> list[Tensor]:
        """Float32 [N, C] for each."""
        return self._each(asked, "score tokens", self._score)

    def texts(self, asked: Sequence[WriteRequest]) -> list[list[list[int]]]:
        """The tokens written, for each and each of its prompts."""
        return self._each(asked, "write texts", self._write)

    def _each(self, asked: Sequence[Request], what: str, ask: Callable[[str, str, Request], T]) -> list[T]:
        """Call ``ask`` for every request with its adapter loaded, as many adapters at a time as there are slots."""
        digests = [digest_of(one.adapter) for one in asked]
        distinct = list(dict.fromkeys(digests))
        answers: dict[int, T] = {}
        for first in range(0, len(distinct), self.size):
            wave = distinct[first : first + self.size]
            members = {number: digest for number, digest in enumerate(digests) if digest in wave}
            attempt = partial(self._wave, {number: asked[number] for number in members}, members, ask)
            answers |= self.client.repeated(what, attempt)
        return [answers[number] for number in range(len(asked))]

    def _wave(
        self, asked: dict[int, Request], digests: dict[int, str], ask: Callable[[str, str, Request], T]
    ) -> dict[int, T]:
        """Carry out, all at once, the requests whose adapters have room together."""
        adapters = {digests[number]: one.adapter for number, one in asked.items()}
        self._load(adapters)

        def of(number: int) -> T:
            return ask(self._name(digests[number]), digests[number], asked[number])

        replies = list(self._threads.map(of, asked))
        self._check_versions(adapters)  # no other adapter has been loaded under these names meanwhile
        return dict(zip(asked, replies, strict=True))

    def _score(self, name: str, digest: str, one: ScoreRequest) -> Tensor:
        """Every position is a prompt that ends there; what several ask at the same prompt is asked once."""
        ids, mask = one.inputs["input_ids"].tolist(), one.inputs["attention_mask"].tolist()
        length, tokens_of_row = one.inputs["input_ids"].shape[1], one.tokens.tolist()
        prompts = [
            tuple(token for token, real in zip(ids[row][:stop], mask[row][:stop], strict=True) if real)
            for row, stop in zip(one.row.tolist(), (one.column + length + 1).tolist(), strict=True)
        ]
        of_prompt: dict[tuple[int, ...], set[int]] = {}
        for prompt, tokens in zip(prompts, tokens_of_row, strict=True):
            of_prompt.setdefault(prompt, set()).update(tokens)
        union = set().union(*of_prompt.values())
        requests: dict[tuple[int, ...], list[tuple[int, ...]]] = {}
        for prompt, tokens_of_prompt in of_prompt.items():
            requests.setdefault(tuple(sorted(union if len(union) <= _UNION else tokens_of_prompt)), []).append(prompt)
        log_probs: dict[tuple[int, ...], dict[int, float]] = {}
        for tokens, sharing in requests.items():
            for prompt, values in zip(sharing, self.client.scores(name, digest, sharing, tokens), strict=True):
                log_probs[prompt] = dict(zip(tokens, values, strict=True))
        return torch.tensor([[log_probs[p][t] for t in ts] for p, ts in zip(prompts, tokens_of_row, strict=True)])

    def _write(self, name: str, digest: str, one: WriteRequest) -> list[list[int]]:
        if not one.settings["temperature"]:
            return self.client.texts(name, digest, one.prompts, one.settings)

        def of(prompt: Sequence[int]) -> list[int]:
            # a prompt's noise comes from the seed and the prompt, at every point the same; a request has one seed
            drawn = hashlib.blake2b(f"{one.settings['seed']}:{list(prompt)}".encode(), digest_size=7).digest()
            settings = {**one.settings, "seed": int.from_bytes(drawn, "little")}
            return self.client.texts(name, digest, [prompt], settings)[0]

        return list(self._prompts.map(of, one.prompts))  # of all points side by side: the server batches what is there

    # ---- adapters ----------------------------------------------------------------------------------------------------

    def _load(self, adapters: dict[str, Adapter]) -> None:
        """Load the adapters that the server lacks; those unused for the longest make room."""
        roots = self._roots()
        lost = [digest for digest in self.digests if roots.get(self._name(digest)) != str(self.folder / digest)]
        new = [digest for digest in adapters if digest not in self.digests or digest in lost]
        unused = [digest for digest in self.digests if digest not in adapters]
        room = self.size - len(adapters)
        # a name that is loaded from elsewhere is in the way of ours; the server forgets an unused version by itself
        for digest in {*lost, *unused[: max(0, len(unused) - room)]}:
            self._let_go(digest, known=self._name(digest) in roots)
        for digest in new:
            self._write_adapter(self.folder / digest, adapters[digest])
        # in place, as whoever leaves at the end holds this list; before the loads, of which one may fail
        self.digests[:] = [digest for digest in self.digests if digest not in adapters] + list(adapters)
        list(self._threads.map(lambda digest: self.client.load(self._name(digest), str(self.folder / digest)), new))

    def _let_go(self, digest: str, known: bool) -> None:
        if known:
            self.client.unload(self._name(digest))
        self.digests.remove(digest)
        shutil.rmtree(self.folder / digest, ignore_errors=True)

    def _check_versions(self, digests: Iterable[str]) -> None:
        roots = self._roots()
        for digest in digests:
            root = roots.get(self._name(digest))
            if root != str(self.folder / digest):
                raise BadReplyError(f"{self._name(digest)} is another adapter: {root}")

    def _roots(self) -> dict[Any, Any]:
        """Name of each adapter that the server has -> the folder that it came from."""
        return {card.get("id"): card.get("root") for card in self.client.cards()}

    def _name(self, digest: str) -> str:
        """Another version of an adapter has another name: no reply can be of the wrong one, no cache either."""
        return f"{self.prefix}-{digest}"

    def _write_adapter(self, target: Path, adapter: Adapter) -> None:
        """As peft saves one, in a folder that appears whole."""
        from safetensors.torch import save_file

        if target.exists():
            return
        building = target.with_name(f"{target.name}.part")
        building.mkdir(parents=True, exist_ok=True)
        self.config.save_pretrained(str(building))
        tensors = {saved_name(key): tensor.detach().cpu().contiguous() for key, tensor in adapter.items()}
        save_file(tensors, str(building / "adapter_model.safetensors"))
        building.rename(target)


def _leave(
    client: Client, prefix: str, digests: list[str], folder: Path, pools: tuple[ThreadPoolExecutor, ...]
) -> None:
    for pool in pools:
        pool.shutdown(wait=False)
    patient = Client(client.url, min(client.timeout, 5.0), 0)
    for digest in digests:
        patient.unload(f"{prefix}-{digest}")
    shutil.rmtree(folder, ignore_errors=True)
