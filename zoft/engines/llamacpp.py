"""Forwards in llama.cpp: a GGUF base in few bits, every point an adapter beside it."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from zoft.engines._elsewhere import Adapter, Backend, Elsewhere, ScoreRequest, WriteRequest
from zoft.engines._llama_library import Llama, library
from zoft.errors import UserError
from zoft.subspaces.base import BoundSubspace
from zoft.utils.lazy import Tensor, nn, torch
from zoft.weights.gguf_layout import rotated

ARCHITECTURES = {"llama": "LLAMA", "qwen2": "QWEN2", "qwen3": "QWEN3"}
"""A config's ``model_type``, which is GGUF's name of the architecture too -> its name in `gguf`."""

_SEQUENCES = 16  # rows that are computed together


@dataclass
class LlamaCpp(Elsewhere):
    """llama.cpp in this process, on the CPU: it has the base as a GGUF file, in as few bits as that has.

    Every point's adapter is written as GGUF and loaded beside the base, which takes milliseconds. Candidates are scored
    by the logits of a batch of rows; texts are written with the noise that torch's would have. Keys and values are
    float32. Of the base, ``model.name`` gives config and tokenizer alone.

    Args:
        file: the base as GGUF, of the model that model.name names.
        threads: that compute; 0 takes torch's number.

    References: github.com/ggml-org/llama.cpp (llama.h); the wheel of xllamacpp carries it.
    """

    writes: ClassVar[bool] = True
    holds_base: ClassVar[bool] = True
    about_quantization: ClassVar[str] = "engine.file is a GGUF file in as few bits as it was written with"

    file: str = ""
    threads: int = 0

    def check(self) -> None:
        """Refuse a negative number of threads."""
        self.require(self.threads >= 0, "threads", "0 (torch's number) or more")

    def prepare(self) -> None:
        """The package and the file have to be there."""
        if not Path(self.file).is_file():
            raise UserError(
                f"engine=llamacpp needs engine.file=MODEL.gguf, the base as llama.cpp has it, and got {self.file!r}"
            )
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise UserError("engine=llamacpp computes in one process: start the run without torchrun")
        library()

    def base_mb(self) -> float:
        """The file is mapped into this process's memory."""
        return Path(self.file).stat().st_size / 2**20 if Path(self.file).is_file() else 0.0

    def served_name(self) -> str:
        """The digest of the base's file."""
        with Path(self.file).open("rb") as file:
            return "gguf:" + hashlib.file_digest(file, "sha256").hexdigest()

    def backend(self, model: nn.Module, coordinates: BoundSubspace) -> Backend:
        """The base is loaded here, once for a run."""
        del coordinates
        self.prepare()
        return _LlamaBackend(Llama(Path(self.file), self.threads or torch.get_num_threads()), model, self.file)


class _LlamaBackend:
    """One base, and the adapter of the point that is asked about."""

    def __init__(self, llama: Llama, model: Any, file: str) -> None:
        self.llama, self.config = llama, model.config
        self.lora = model.peft_config[model.active_adapter]
        self._check(file)
        self.folder = Path(tempfile.mkdtemp(prefix="zoft-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None))
        weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)

    def _check(self, file: str) -> None:
        """Refuse another model's file."""
        config, llama = self.config, self.llama
        # another model of the same sizes is not noticed here, and its losses would be too high from the first step on
        sizes = {
            "architecture": (llama.architecture(), config.model_type),
            "number of layers": (llama.num_layers, config.num_hidden_layers),
            "hidden size": (llama.hidden_size, config.hidden_size),
            "number of tokens": (llama.num_tokens, config.vocab_size),
        }
        if config.model_type not in ARCHITECTURES:
            raise UserError(
                f"engine=llamacpp hands adapters to models of the types {', '.join(ARCHITECTURES)}, and this one is of "
                f"type {config.model_type}: use engine=auto or server"
            )
        for what, (of_file, of_model) in sizes.items():
            if of_file != of_model:
                raise UserError(
                    f"engine.file={file} is another model than model.name: its {what} is {of_file}, "
                    f"and that one's {of_model}"
                )

    # ---- what is asked -----------------------------------------------------------------------------------------------

    def scores(self, asked: Sequence[ScoreRequest]) -> list[Tensor]:
        """Float32 [N, C] for each."""
        return [self._with(one.adapter, lambda adapter, one=one: self._score(adapter, one)) for one in asked]

    def texts(self, asked: Sequence[WriteRequest]) -> list[list[list[int]]]:
        """The tokens written, for each and each of its prompts."""
        return [self._with(one.adapter, lambda adapter, one=one: self._write(adapter, one)) for one in asked]

    def _with(self, adapter: Adapter, ask: Any) -> Any:
        path = self.folder / "adapter.gguf"
        self._write_adapter(path, adapter)
        # the file is read here and now: the next point overwrites it
        loaded = self.llama.load_adapter(path)
        try:
            return ask(loaded)
        finally:
            self.llama.free_adapter(loaded)

    def _score(self, adapter: Any, one: ScoreRequest) -> Tensor:
        """Rows without their padding, some of them together; logits at the positions that are scored."""
        mask = one.inputs["attention_mask"].bool().cpu()
        rows = [ids[real].tolist() for ids, real in zip(one.inputs["input_ids"].cpu(), mask, strict=True)]
        # a column counts from the right: how many real tokens stand up to it
        places = mask.cumsum(1)[one.row, one.column + mask.shape[1]] - 1  # [N]
        indices_at: dict[int, dict[int, list[int]]] = {}  # row -> place in it -> which of the N; several may share one
        for n, (row, place) in enumerate(zip(one.row.tolist(), places.tolist(), strict=True)):
            indices_at.setdefault(row, {}).setdefault(place, []).append(n)
        log_probs, scored = (
            torch.empty(one.tokens.shape),
            list(indices_at),
        )  # rows of which nothing is scored are left out
        for first in range(0, len(scored), _SEQUENCES):
            numbers = scored[first : first + _SEQUENCES]
            self.llama.begin(len(numbers), max(len(rows[row]) for row in numbers), adapter)
            requests = [(number, 0, rows[row], sorted(indices_at[row])) for number, row in enumerate(numbers)]
            of_place = [indices_at[row][place] for row in numbers for place in sorted(indices_at[row])]
            for logits, sharing in zip(torch.from_numpy(self.llama.logits(requests)), of_place, strict=True):
                log_probs[sharing] = logits.log_softmax(-1)[one.tokens[sharing].cpu()]
        return log_probs

    def _write(self, adapter: Any, one: WriteRequest) -> list[list[int]]:
        return [
            written
            for first in range(0, len(one.prompts), _SEQUENCES)
            for written in self._write_some(adapter, one.prompts[first : first + _SEQUENCES], one.settings)
        ]

    def _write_some(self, adapter: Any, prompts: Sequence[Sequence[int]], settings: Any) -> list[list[int]]:
        """Token by token, all that have not ended in one batch."""
        from zoft.utils.random_state import prompt_generator

        room, temperature = settings["max_new_tokens"], settings["temperature"]
        written: list[list[int]] = [[] for _ in prompts]
        noise = [prompt_generator(settings["seed"], prompt) for prompt in prompts]
        self.llama.begin(len(prompts), max(map(len, prompts)) + room, adapter)
        going: dict[int, Sequence[int]] = dict(enumerate(prompts))  # sequence -> tokens that it has not seen
        num_seen = [0] * len(prompts)
        while going:
            rows = [(number, num_seen[number], tokens, [len(tokens) - 1]) for number, tokens in going.items()]
            for (number, _, tokens, _), logits in zip(rows, torch.from_numpy(self.llama.logits(rows)), strict=True):
                if temperature:
                    # s + T g with g = -log(-log u): its largest is a draw from softmax(s / T) (Gumbel-max)
                    logits = logits + temperature * -(-torch.rand(len(logits), generator=noise[number]).log()).log()
                num_seen[number] += len(tokens)
                written[number].append(int(logits.argmax()))
                going[number] = written[number][-1:]
                if len(written[number]) == room or self._has_ended(written[number], settings):
                    del going[number]
        return written

    def _has_ended(self, row: list[int], settings: Any) -> bool:
        if row[-1] in settings["ends"]:
            return True
        # a stop text may lie across tokens: the whole text is read
        text = b"".join(map(self.llama.piece, row)).decode("utf-8", "ignore")
        return bool(settings["stop"]) and settings["stop"] in text

    # ---- adapters ----------------------------------------------------------------------------------------------------

    def _write_adapter(self, path: Path, adapter: Adapter) -> None:
        """As llama.cpp's converter writes one."""
        import gguf

        kind = self.config.model_type
        names = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, ARCHITECTURES[kind]), self.config.num_hidden_layers)
        writer = gguf.GGUFWriter(path, kind)
        try:
            writer.add_type("adapter")
            writer.add_string("adapter.type", "lora")
            writer.add_float32("adapter.lora.alpha", float(self.lora.lora_alpha))  # W + (alpha / r) B A
            for name, tensor in adapter.items():
                key, factor = _weight_of(name)
                value = tensor.detach().float().cpu()
                # rows of q and k in GGUF's order, of which only B has any
                value = rotated(key, value, self.config) if factor == "lora_b" else value
                target = names.get_name(key, try_suffixes=(".weight",))
                # such as an embedding that the architecture ties to its head
                if target is None:
                    raise UserError(f"engine=llamacpp: {key} has no name in GGUF: leave it out of peft.target_modules")
                writer.add_tensor(f"{target}.{factor}", value.contiguous().numpy())
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()


def _weight_of(name: str) -> tuple[str, str]:
    """The weight that a factor of an adapter belongs to, and which of the two it is.

    Example:
        >>> _weight_of("base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight")
        ('model.layers.0.self_attn.q_proj.weight', 'lora_a')
    """
    module, _, rest = name.removeprefix("base_model.model.").partition(".lora_")
    return f"{module}.weight", f"lora_{rest[0].lower()}"
