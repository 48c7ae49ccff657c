"""A model as one GGUF file, for llama.cpp and what is built on it; a run's final model as such a file with its card."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from zoft.config.schema import ZoftConfig
from zoft.errors import UserError
from zoft.use.export.card import write_card
from zoft.use.export.folder import facts_of, merged_model, new_folder
from zoft.weights.gguf_layout import rotated

QUANTIZATIONS = ("f32", "f16", "q8_0", "q4_0")
ARCHITECTURES = {"llama": "LLAMA", "qwen2": "QWEN2", "qwen3": "QWEN3"}
"""A config's ``model_type`` -> the name of the architecture in `gguf`."""

_BLOCK = 32  # numbers that share a scale in q8_0 and q4_0


def export_gguf(cfg: ZoftConfig, run: str, output: str, quantize: str, *, name: str = "") -> Path:
    """Write the file and the card.

    Args:
        cfg: of the run.
        run: its folder.
        output: a folder that is empty or not there.
        quantize: f32, f16, q8_0 or q4_0.
        name: of the model in the card.

    Returns:
        The folder.

    Raises:
        UserError: a model that is not written as GGUF here, or a folder that is taken.
    """
    from zoft.lm import formats
    from zoft.run.build import tokenizer_of

    kind = formats.model_kind(cfg.task)
    if kind != "causal":
        raise UserError(f"--gguf writes causal language models, and this run has a {kind}: export without it")
    facts, tokenizer = facts_of(run), tokenizer_of(cfg)
    model = merged_model(cfg, run)
    require(model.config, tokenizer)
    title, name = str(facts.get("run_name", "run")), name or str(Path(output).absolute())
    file = f"{re.sub(r'[^A-Za-z0-9._-]+', '-', title)}-{quantize}.gguf"
    with new_folder(output) as folder:
        write_gguf(model, tokenizer, folder / file, quantize, title)
        write_card(folder, facts, kind="gguf", head=kind, name=name, files=[file])
    return Path(output)


def write_gguf(model: Any, tokenizer: Any, path: Path, quantize: str, name: str) -> Path:
    """Write a causal language model's weights and vocabulary.

    Matrices are written as ``quantize`` says, norms and biases in float32.

    Args:
        model: of transformers, without an adapter.
        tokenizer: the model's, with byte-level pairs (BPE).
        path: the file.
        quantize: one of :data:`QUANTIZATIONS`.
        name: of the model, in the file.

    Returns:
        The path.

    Raises:
        UserError: an architecture or a vocabulary that is not written here.
    """
    import gguf

    require(model.config, tokenizer)
    arch = gguf.MODEL_ARCH[ARCHITECTURES[model.config.model_type]]
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[arch])
    try:
        _write_sizes(writer, model.config, quantize, name)
        _write_vocabulary(writer, model.config, tokenizer)
        names = gguf.get_tensor_name_map(arch, model.config.num_hidden_layers)
        tied = model.config.tie_word_embeddings
        for key, tensor in model.state_dict().items():
            if key == "lm_head.weight" and tied:
                continue
            target = names.get_name(key, try_suffixes=(".weight", ".bias"))
            if target is None:
                raise UserError(f"{key} has no name in GGUF: export with --merge, and convert that folder elsewhere")
            data, kind = _encoded(rotated(key, tensor, model.config), quantize)
            writer.add_tensor(target, data, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()
    return path


def require(config: Any, tokenizer: Any) -> None:
    """Refuse what is not written here, before a file is begun.

    Raises:
        UserError: saying what can be done instead.
    """
    instead = "export with --merge, and convert that folder with llama.cpp's convert_hf_to_gguf.py"
    if config.model_type not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise UserError(
            f"--gguf writes models of the types {known}, this one is of type {config.model_type}: {instead}"
        )
    kind = _tokenizer_json(tokenizer)
    model = kind.get("model", {})
    if (
        model.get("type") != "BPE"
        or model.get("byte_fallback")
        or "ByteLevel" not in json.dumps(kind.get("pre_tokenizer"))
    ):
        raise UserError(
            f"--gguf writes vocabularies of byte-level pairs (BPE), and this tokenizer has another: {instead}"
        )


def _write_sizes(writer: Any, config: Any, quantize: str, name: str) -> None:
    import gguf

    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") != "default":
        raise UserError(
            f"--gguf writes plain rotary positions, this model has {rope['rope_type']!r}: export with --merge"
        )
    writer.add_name(name)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(float(rope.get("rope_theta", 10_000.0)))
    writer.add_vocab_size(config.vocab_size)
    types = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "q8_0": "MOSTLY_Q8_0", "q4_0": "MOSTLY_Q4_0"}
    writer.add_file_type(int(gguf.LlamaFileType[types[quantize]]))


def _write_vocabulary(writer: Any, config: Any, tokenizer: Any) -> None:
    import gguf

    known = {number: token for token, number in tokenizer.get_vocab().items()}
    added = tokenizer.added_tokens_decoder
    tokens, kinds = [], []
    for number in range(config.vocab_size):
        special = number in added and added[number].special
        kind = gguf.TokenType.CONTROL if special else gguf.TokenType.NORMAL
        if number in added and not special:
            kind = gguf.TokenType.USER_DEFINED
        tokens.append(known.get(number, f"[PAD{number}]"))
        kinds.append(int(kind if number in known else gguf.TokenType.UNUSED))
    merges = [
        pair if isinstance(pair, str) else " ".join(pair) for pair in _tokenizer_json(tokenizer)["model"]["merges"]
    ]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_pre(config, tokenizer))
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(merges)
    for role in ("bos", "eos", "pad", "unk"):
        token_id = getattr(tokenizer, f"{role}_token_id", None)
        if token_id is not None:
            getattr(writer, f"add_{role}_token_id")(int(token_id))
    writer.add_add_bos_token(bool(tokenizer("x")["input_ids"][:1] == [tokenizer.bos_token_id]))
    if getattr(tokenizer, "chat_template", None):
        writer.add_chat_template(tokenizer.chat_template)


def _pre(config: Any, tokenizer: Any) -> str:
    """llama.cpp's name of how text is split before pairs are merged."""
    if config.model_type.startswith("qwen"):
        return "qwen2"
    text = json.dumps(_tokenizer_json(tokenizer).get("pre_tokenizer"))
    if "{1,3}" in text:
        return "llama-bpe"
    return "smollm" if "Digits" in text or config.vocab_size == 49_152 else "gpt-2"


def _encoded(tensor: Any, quantize: str) -> tuple[Any, Any]:
    """(the numbers as bytes of their type, the type)."""
    import gguf
    import torch

    values = tensor.detach().to("cpu", torch.float32).contiguous().numpy()
    kinds = {
        "f32": gguf.GGMLQuantizationType.F32,
        "f16": gguf.GGMLQuantizationType.F16,
        "q8_0": gguf.GGMLQuantizationType.Q8_0,
        "q4_0": gguf.GGMLQuantizationType.Q4_0,
    }
    kind = kinds[quantize] if values.ndim == 2 else kinds["f32"]
    if kind in (kinds["q8_0"], kinds["q4_0"]) and values.shape[-1] % _BLOCK:
        kind = kinds["f16"]
    return gguf.quantize(values, kind), kind


def _tokenizer_json(tokenizer: Any) -> dict[str, Any]:
    return dict(json.loads(tokenizer.backend_tokenizer.to_str())) if tokenizer.is_fast else {}
