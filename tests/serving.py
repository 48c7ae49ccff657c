"""A small server over a real tiny model that speaks what zoft asks of vLLM: loopback only, in a thread, with faults.

Its replies, refusals among them, are those of vLLM 0.32.0 (`tests/unit/engines/test_vllm.py` asks that one).
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file


class TinyServer(ThreadingHTTPServer):
    """Serves a peft model.

    Args:
        model: a base with a LoRA on it, whose tensors are replaced by those of each loaded adapter.
        lora: whether adapters can be loaded.
        tokenizer: for texts that end at a string.
        context: tokens of a prompt and what is written behind it.
        max_rank: of adapters.
    """

    daemon_threads = True

    def __init__(
        self, model: Any, *, lora: bool = True, tokenizer: Any = None, context: int = 64, max_rank: int = 8
    ) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.context, self.max_rank = context, max_rank
        self.model, self.lora, self.tokenizer = model.eval(), lora, tokenizer
        self.adapters: dict[str, tuple[str, dict[str, torch.Tensor]]] = {}
        self.in_place: set[str] = set()  # adapters that vLLM reads again from their folder in every step
        self.cache: dict[Any, torch.Tensor] = {}  # as a prefix cache: by name and salt, not by what the adapter is
        self.not_numbers: set[Any] = set()  # names and prompts whose log-probabilities are none
        self.faults: list[str] = []  # what goes wrong with the next completions, one each
        self.completions: list[dict[str, Any]] = []  # bodies
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def log_probs(self, name: str, salt: str, prompt: list[int]) -> torch.Tensor:
        """[V], behind the prompt."""
        key = (name, salt, tuple(prompt))
        if key not in self.cache:
            ids = torch.tensor([prompt])
            with torch.no_grad():
                output = torch.func.functional_call(self.model, self.adapters[name][1], (), {"input_ids": ids})
            self.cache[key] = output.logits[0, -1].float().log_softmax(-1)
        return self.cache[key]

    def load(self, name: str, path: str) -> None:
        """As peft saved it.

        Raises:
            ValueError: an adapter of too high a rank.
        """
        tensors = load_file(Path(path) / "adapter_model.safetensors")
        rank = json.loads((Path(path) / "adapter_config.json").read_text())["r"]
        if rank > self.max_rank:
            raise ValueError(f"LoRA rank {rank} is greater than max_lora_rank {self.max_rank}.")
        named = {f"{key.removesuffix('.weight')}.default.weight": value for key, value in tensors.items()}
        assert named.keys() == {n for n, p in self.model.named_parameters() if p.requires_grad}
        self.adapters[name] = (path, named)


class _Handler(BaseHTTPRequestHandler):
    server: TinyServer
    late = False

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        cards = [{"id": "tiny", "root": "tiny", "parent": None, "max_model_len": self.server.context}]
        cards += [
            {"id": name, "root": path, "parent": "tiny", "max_model_len": None}
            for name, (path, _) in self.server.adapters.items()
        ]
        self._reply(200, {"object": "list", "data": cards})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            status, reply = self._answer(body)
        if self.late:
            time.sleep(4.0)
        self._reply(status, reply)

    def _answer(self, body: dict[str, Any]) -> tuple[int, Any]:
        if self.path == "/v1/load_lora_adapter" and self.server.lora:
            return self._load(body["lora_name"], body["lora_path"], body.get("load_inplace", False))
        if self.path == "/v1/unload_lora_adapter" and self.server.lora:
            if self.server.adapters.pop(body["lora_name"], None) is None:
                return _error(404, f"The lora adapter '{body['lora_name']}' cannot be found.")
            return 200, "Success"
        if self.path == "/v1/completions":
            return self._completed(body)
        return 404, {"detail": "Not Found"}

    def _load(self, name: str, path: str, inplace: bool) -> tuple[int, Any]:
        if name in self.server.adapters and not inplace:
            return _error(400, f"The lora adapter '{name}' has already been loaded.")
        try:
            self.server.load(name, path)
        except FileNotFoundError:
            return _error(404, f"Loading lora {name} failed: No adapter found for {path}")
        except ValueError as error:
            return _error(500, f"Call to add_lora method failed: Worker failed with error '{error}'")
        if inplace:
            self.server.in_place.add(name)
        return 200, f"Success: LoRA adapter '{name}' added successfully."

    def _completed(self, body: dict[str, Any]) -> tuple[int, Any]:
        server, name = self.server, body["model"]
        server.completions.append(body)
        fault = server.faults.pop(0) if server.faults else ""
        if fault == "down":
            return _error(500, "EngineDeadError")
        if fault == "restarted":
            server.adapters.clear()
        if name not in server.adapters:
            return _error(404, f"The model `{name}` does not exist.")
        if "prompt_logprobs" in body:
            return _error(400, "prompt_logprobs with LoRA is wrong")
        if max(map(len, body["prompt"])) >= server.context:
            return _error(400, f"This model's maximum context length is {server.context} tokens.")
        if name in server.in_place:
            server.load(name, server.adapters[name][0])
        wanted = body.get("logprob_token_ids")
        if len(wanted or ()) > 128:
            return _error(400, f"Requested logprob_token_ids of length {len(wanted)}, more than 128")
        if fault == "nan":
            server.not_numbers.add((name, tuple(body["prompt"][0])))
        if wanted and any((name, tuple(prompt)) in server.not_numbers for prompt in body["prompt"]):
            return _error(400, "Out of range float values are not JSON compliant")
        make = self._scored if wanted else self._written
        choices = [{"index": number, **make(body, prompt)} for number, prompt in enumerate(body["prompt"])]
        if fault == "cut":
            choices[0] |= {"token_ids": choices[0]["token_ids"][:1], "finish_reason": "abort"}
        if fault == "other":  # somebody loads something else under this name while it is asked
            server.adapters[name] = ("/elsewhere", server.adapters[name][1])
        self.late = fault == "late"
        if fault == "misnamed":
            name = "tiny"
        return 200, {"object": "text_completion", "model": name, "choices": choices[fault == "short" :]}

    def _scored(self, body: dict[str, Any], prompt: list[int]) -> dict[str, Any]:
        log_probs = self.server.log_probs(body["model"], body["cache_salt"], prompt)
        assert body["max_tokens"] == 1
        row = {
            f"token_id:{token}": float(log_probs[token])
            for token in [int(log_probs.argmax()), *body["logprob_token_ids"]]
        }
        return {"text": "", "finish_reason": "length", "logprobs": {"top_logprobs": [row]}}

    def _written(self, body: dict[str, Any], prompt: list[int]) -> dict[str, Any]:
        drawn = torch.Generator().manual_seed(body["seed"])
        row: list[int] = []
        while len(row) < min(body["max_tokens"], self.server.context - len(prompt)):  # and says nothing of it
            scores = self.server.log_probs(body["model"], body["cache_salt"], [*prompt, *row])
            if body["temperature"]:
                noise = -(-torch.rand(len(scores), generator=drawn).log()).log()
                scores = scores + body["temperature"] * noise
            row.append(int(scores.argmax()))
            text = self.server.tokenizer.decode(row) if body["stop"] else ""
            if row[-1] in body["stop_token_ids"] or any(stop in text for stop in body["stop"]):
                return self._text(body, row, "stop")
        return self._text(body, row, "length")

    def _text(self, body: dict[str, Any], row: list[int], reason: str) -> dict[str, Any]:
        return {"text": "", "finish_reason": reason, "token_ids": row if body.get("return_token_ids") else None}

    def _reply(self, status: int, reply: Any) -> None:
        data = json.dumps(reply).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        with suppress(BrokenPipeError):
            self.wfile.write(data)


def _error(status: int, message: str) -> tuple[int, Any]:
    return status, {"error": {"message": message, "param": None, "code": status}}


@contextmanager
def serving(model: Any, **given: Any) -> Iterator[TinyServer]:
    """A server in a thread, until the block ends."""
    server = TinyServer(model, **given)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
