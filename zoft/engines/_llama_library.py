"""llama.cpp's C interface, as the wheel of xllamacpp carries it: a GGUF model, adapters by file, logits."""

from __future__ import annotations

import ctypes
import importlib.util
import logging
import weakref
from collections.abc import Sequence
from ctypes import POINTER, c_bool, c_char_p, c_float, c_int8, c_int32, c_size_t, c_ubyte, c_uint32, c_void_p
from pathlib import Path
from typing import Any

from zoft.errors import UserError

log = logging.getLogger(__name__)

VERSION = "2026.10.11549"
"""Of xllamacpp: C structures change between versions, and nothing but their defaults tells."""

_F16, _F32 = 1, 0  # enum ggml_type
_AT_ONCE = 512  # tokens that are computed together: their logits take room
_CELLS = 256  # llama.cpp rounds the cells of a sequence up to this
_HEADER = [
    *[(name, c_uint32) for name in ("n_ctx", "n_batch", "n_ubatch", "n_seq_max", "n_rs_seq")],
    *[(name, c_uint32) for name in ("n_outputs_max", "n_outputs_max_per_seq")],
    *[
        (name, c_int32)
        for name in ("n_threads", "n_threads_batch", "ctx_type", "rope", "pooling", "attention", "flash")
    ],
]
_DEFAULTS = (512, 2048, 512, 1, 0, 0, 1, 4, 4, 0, -1, -1, -1, -1)  # of the fields above


class _ContextParams(ctypes.Structure):
    """struct llama_context_params; its tail, of which nothing is set, is longer here than there."""

    _fields_ = [
        *_HEADER,
        *[(f"float_{number}", c_float) for number in range(6)],
        ("yarn_orig_ctx", c_uint32),
        ("defrag_thold", c_float),
        ("cb_eval", c_void_p),
        ("cb_eval_user_data", c_void_p),
        ("type_k", c_int32),
        ("type_v", c_int32),
        ("tail", c_ubyte * 512),
    ]


class _ModelParams(ctypes.Structure):
    """struct llama_model_params, all as it is; longer here than there."""

    _fields_ = [("all", c_ubyte * 512)]


class _Batch(ctypes.Structure):
    """struct llama_batch: tokens with their positions, sequences, and whether logits are wanted behind them."""

    _fields_ = [
        ("n_tokens", c_int32), ("token", POINTER(c_int32)), ("embd", c_void_p), ("pos", POINTER(c_int32)),
        ("n_seq_id", POINTER(c_int32)), ("seq_id", POINTER(POINTER(c_int32))), ("logits", POINTER(c_int8)),
    ]  # fmt: skip


_SIGNATURES: dict[str, tuple[Any, ...]] = {  # name -> what it returns, what it takes
    "llama_backend_init": (None,),
    "llama_log_set": (None, c_void_p, c_void_p),
    "llama_model_default_params": (_ModelParams,),
    "llama_context_default_params": (_ContextParams,),
    "llama_model_load_from_file": (c_void_p, c_char_p, _ModelParams),
    "llama_model_free": (None, c_void_p),
    "llama_model_get_vocab": (c_void_p, c_void_p),
    "llama_model_n_embd": (c_int32, c_void_p),
    "llama_model_n_layer": (c_int32, c_void_p),
    "llama_model_meta_val_str": (c_int32, c_void_p, c_char_p, c_char_p, c_size_t),
    "llama_vocab_n_tokens": (c_int32, c_void_p),
    "llama_token_to_piece": (c_int32, c_void_p, c_int32, c_char_p, c_int32, c_int32, c_bool),
    "llama_init_from_model": (c_void_p, c_void_p, _ContextParams),
    "llama_free": (None, c_void_p),
    "llama_get_memory": (c_void_p, c_void_p),
    "llama_memory_clear": (None, c_void_p, c_bool),
    "llama_adapter_lora_init": (c_void_p, c_void_p, c_char_p),
    "llama_adapter_lora_free": (None, c_void_p),
    "llama_set_adapters_lora": (c_int32, c_void_p, POINTER(c_void_p), c_size_t, POINTER(c_float)),
    "llama_batch_init": (_Batch, c_int32, c_int32, c_int32),
    "llama_batch_free": (None, _Batch),
    "llama_decode": (c_int32, c_void_p, _Batch),
    "llama_get_logits_ith": (POINTER(c_float), c_void_p, c_int32),
}
_LOG = ctypes.CFUNCTYPE(None, c_int32, c_char_p, c_void_p)


def _say(_level: int, text: bytes, _data: Any) -> None:
    log.debug("llama.cpp: %s", text.decode("utf-8", "replace").rstrip())


_say_in_c = _LOG(_say)  # held here: llama.cpp keeps its address


def library() -> Any:
    """The wheel's shared library, with the signatures of what is called.

    Raises:
        UserError: it is not installed, or is another version.
    """
    spec = importlib.util.find_spec("xllamacpp")
    files = [] if spec is None else list(Path(str(spec.origin)).parent.glob("xllamacpp*.so"))
    if not files:
        raise UserError(f"engine=llamacpp needs xllamacpp: pip install 'xllamacpp=={VERSION}'")
    dll = ctypes.CDLL(str(files[0]))
    try:
        for name, (returned, *taken) in _SIGNATURES.items():
            function = getattr(dll, name)
            function.restype, function.argtypes = returned, taken
        defaults = dll.llama_context_default_params()
        first = tuple(getattr(defaults, name) for name, _ in _HEADER)
        is_known = first == _DEFAULTS and (defaults.type_k, defaults.type_v) == (_F16, _F16)
    except AttributeError as error:
        log.debug("%s", error)
        is_known = False
    if not is_known:
        raise UserError(
            f"engine=llamacpp knows the C structures of xllamacpp {VERSION}, and the one that is installed has others: "
            f"pip install 'xllamacpp=={VERSION}'"
        )
    return dll


class Llama:
    """A GGUF model in memory.

    Raises:
        UserError: no such file, or none that llama.cpp loads.
    """

    def __init__(self, path: Path, threads: int) -> None:
        self._lib, self._threads = library(), threads
        self._lib.llama_log_set(_say_in_c, None)
        self._lib.llama_backend_init()
        self._model = self._lib.llama_model_load_from_file(bytes(path), self._lib.llama_model_default_params())
        if not self._model:
            raise UserError(f"engine.file={path} is no GGUF file that llama.cpp loads")
        self._vocab = self._lib.llama_model_get_vocab(self._model)
        self.num_tokens = int(self._lib.llama_vocab_n_tokens(self._vocab))
        self.num_layers = int(self._lib.llama_model_n_layer(self._model))
        self.hidden_size = int(self._lib.llama_model_n_embd(self._model))
        # made for the first batch, and anew where one needs more room
        self._context: Any = None
        self._room = (0, 0)  # sequences, cells of each
        # freed once nobody holds this object; the context may be another one by then
        self._held = [self._model, None]
        weakref.finalize(self, _free, self._lib, self._held)

    def architecture(self) -> str:
        """The architecture's name in GGUF, such as llama or qwen2."""
        buffer = ctypes.create_string_buffer(128)
        self._lib.llama_model_meta_val_str(self._model, b"general.architecture", buffer, len(buffer))
        return buffer.value.decode()

    def piece(self, token: int) -> bytes:
        """A token's text; a special one has none."""
        buffer = ctypes.create_string_buffer(512)
        return buffer.raw[: max(0, self._lib.llama_token_to_piece(self._vocab, token, buffer, len(buffer), 0, False))]

    # ---- adapters and forwards ---------------------------------------------------------------------------------------

    def load_adapter(self, path: Path) -> Any:
        """Load an adapter from a GGUF file; free it with :meth:`free_adapter`."""
        adapter = self._lib.llama_adapter_lora_init(self._model, bytes(path))
        if not adapter:
            raise UserError(f"engine=llamacpp: llama.cpp does not load this adapter onto its base ({path.name})")
        return adapter

    def free_adapter(self, adapter: Any) -> None:
        """Free an adapter, which no forward may use any longer."""
        # the context still points at it
        self._lib.llama_set_adapters_lora(self._context, None, 0, None)
        self._lib.llama_adapter_lora_free(adapter)

    def begin(self, num_sequences: int, num_tokens: int, adapter: Any) -> None:
        """Sequences of up to ``num_tokens`` from now on, none of them begun, with this adapter."""
        cells = -(-num_tokens // _CELLS) * _CELLS
        if num_sequences > self._room[0] or cells > self._room[1]:
            self._room = (max(num_sequences, self._room[0]), max(cells, self._room[1]))
            self._make_context(*self._room)
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)
        # W + 1.0 (alpha / r) B A: a scale of -1 would move A and B together, which is no point of a pair
        if self._lib.llama_set_adapters_lora(self._context, (c_void_p * 1)(adapter), 1, (c_float * 1)(1.0)):
            raise RuntimeError("llama.cpp refused an adapter that it had loaded")

    def _make_context(self, sequences: int, cells: int) -> None:
        if self._context:
            self._lib.llama_free(self._context)
        params = self._lib.llama_context_default_params()
        params.n_ctx = params.n_batch = sequences * cells
        params.n_ubatch = min(_AT_ONCE, sequences * cells)
        # 0: logits at any number of places in a row
        params.n_seq_max, params.n_outputs_max_per_seq = sequences, 0
        params.n_threads = params.n_threads_batch = self._threads
        # float32 keys and values, without a fused attention: rounding would drown the difference of two points
        params.type_k = params.type_v = _F32
        params.flash = 0
        self._context = self._held[1] = self._lib.llama_init_from_model(self._model, params)
        if not self._context:
            raise UserError("engine=llamacpp: llama.cpp found no memory for the rows of a batch: use smaller batches")

    def logits(self, rows: Sequence[tuple[int, int, Sequence[int], Sequence[int]]]) -> Any:
        """Continue sequences in one batch.

        Args:
            rows: (which sequence, tokens that it has already, more of them, where among those logits are wanted).

        Returns:
            float32 [N, V], a numpy array, in the order of the rows and of the places in each.
        """
        import numpy

        total = sum(len(tokens) for _, _, tokens, _ in rows)
        batch = self._lib.llama_batch_init(total, 0, 1)
        try:
            indices = []
            for sequence, start, tokens, places in rows:
                for place, token in enumerate(tokens):
                    at = batch.n_tokens
                    batch.token[at], batch.pos[at], batch.n_seq_id[at] = token, start + place, 1
                    batch.seq_id[at][0], batch.logits[at] = sequence, place in places
                    if place in places:
                        indices.append(at)
                    batch.n_tokens += 1
            status = self._lib.llama_decode(self._context, batch)
            if status:
                raise RuntimeError(f"llama.cpp could not compute a batch of {total} tokens ({status})")
            # copied by stack: the next batch overwrites them
            of = self._lib.llama_get_logits_ith
            return numpy.stack([numpy.ctypeslib.as_array(of(self._context, at), (self.num_tokens,)) for at in indices])
        finally:
            self._lib.llama_batch_free(batch)


def _free(lib: Any, held: list[Any]) -> None:
    model, context = held
    if context:
        lib.llama_free(context)
    lib.llama_model_free(model)
