"""Tiny models with random weights, made from configurations: no files, no network, no global random state moved."""

from __future__ import annotations

from typing import Any

import torch

VOCAB = 64
PAD, BOS, EOS, MASK = 1, 0, 2, 3


def _build(loader: str, config: str, seed: int, fields: dict[str, Any], attn: str) -> Any:
    import transformers

    model_config = getattr(transformers, config)(
        **{"vocab_size": VOCAB, "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS} | fields
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, loader)._from_config(model_config, attn_implementation=attn)
        for parameter in model.parameters():  # norms start at 1 and biases at 0: nothing would depend on them
            parameter.data.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def tiny_llama(seed: int = 0, *, attn: str = "sdpa", **fields: Any) -> Any:
    """A causal LM with rotary positions and grouped keys; embeddings and head are separate."""
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
    more = {"num_key_value_heads": 2, "max_position_embeddings": 64}
    return _build("LlamaForCausalLM", "LlamaConfig", seed, small | more | fields, attn)


def tiny_qwen(seed: int = 0, *, attn: str = "sdpa", **fields: Any) -> Any:
    """A causal LM with biases on q, k and v, and tied embeddings."""
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
    more = {"num_key_value_heads": 2, "max_position_embeddings": 64, "tie_word_embeddings": True}
    return _build("Qwen2ForCausalLM", "Qwen2Config", seed, small | more | fields, attn)


def tiny_opt(seed: int = 0, *, attn: str = "sdpa", **fields: Any) -> Any:
    """A causal LM with learned positions, tied embeddings, and biases everywhere."""
    small = {"hidden_size": 16, "ffn_dim": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    more = {"word_embed_proj_dim": 16, "max_position_embeddings": 64, "dropout": 0.0}
    return _build("OPTForCausalLM", "OPTConfig", seed, small | more | fields, attn)


def tiny_gpt2(seed: int = 0, *, attn: str = "sdpa", **fields: Any) -> Any:
    """A causal LM with learned positions, tied embeddings, and Conv1D layers."""
    small = {"n_embd": 16, "n_layer": 3, "n_head": 2, "n_positions": 64}
    return _build("GPT2LMHeadModel", "GPT2Config", seed, small | fields, attn)


def tiny_gemma(seed: int = 0, *, attn: str = "sdpa", **fields: Any) -> Any:
    """A causal LM with scaled embeddings, tied to the head, and one shared key."""
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    more = {"num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 64}
    return _build("GemmaForCausalLM", "GemmaConfig", seed, small | more | fields, attn)


def tiny_gemma2(seed: int = 0, *, attn: str = "eager", **fields: Any) -> Any:
    """A causal LM that caps its logits behind the head; every second layer sees a window of 32 tokens only."""
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    more = {"num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 64, "sliding_window": 32}
    caps = {"final_logit_softcapping": 0.5, "attn_logit_softcapping": 50.0, "query_pre_attn_scalar": 8}
    return _build("Gemma2ForCausalLM", "Gemma2Config", seed, small | more | caps | fields, attn)


def tiny_cohere(seed: int = 0, *, attn: str = "sdpa", **fields: Any) -> Any:
    """A causal LM that scales its logits behind the head."""
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    more = {"num_key_value_heads": 2, "max_position_embeddings": 64, "logit_scale": 0.25}
    return _build("CohereForCausalLM", "CohereConfig", seed, small | more | fields, attn)


def tiny_olmo2(seed: int = 0, *, attn: str = "sdpa", **fields: Any) -> Any:
    """A causal LM that normalises what attention and feed-forward parts give, and not what they are given."""
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    more = {"num_key_value_heads": 2, "max_position_embeddings": 64}
    return _build("Olmo2ForCausalLM", "Olmo2Config", seed, small | more | fields, attn)


def tiny_granite(seed: int = 0, *, attn: str = "sdpa", **fields: Any) -> Any:
    """A causal LM whose blocks scale what they add to the residual stream."""
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    more = {"num_key_value_heads": 2, "max_position_embeddings": 64, "residual_multiplier": 0.25}
    return _build("GraniteForCausalLM", "GraniteConfig", seed, small | more | fields, attn)


def tiny_bloom(seed: int = 0, *, attn: str = "eager", **fields: Any) -> Any:
    """A causal LM without positions: attention falls with the distance (ALiBi)."""
    sizes = {"hidden_size": 16, "n_layer": 2, "n_head": 2}
    return _build("BloomForCausalLM", "BloomConfig", seed, sizes | fields, attn)


def tiny_bert_classifier(seed: int = 0, *, attn: str = "sdpa", **fields: Any) -> Any:
    """An encoder with a pooler and a classification head, three labels."""
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    more = {"max_position_embeddings": 64, "num_labels": 3}
    return _build("BertForSequenceClassification", "BertConfig", seed, small | more | fields, attn)


def tiny_roberta_mlm(seed: int = 0, *, attn: str = "sdpa", **fields: Any) -> Any:
    """A masked LM with tied embeddings; positions count from the padding index."""
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    more = {"max_position_embeddings": 66, "type_vocab_size": 1}
    return _build("RobertaForMaskedLM", "RobertaConfig", seed, small | more | fields, attn)


def tiny_t5(seed: int = 0, **fields: Any) -> Any:
    """An encoder-decoder with tied embeddings and relative positions."""
    small = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 2}
    more = {"decoder_start_token_id": BOS, "dropout_rate": 0.0}
    return _build("T5ForConditionalGeneration", "T5Config", seed, small | more | fields, "eager")


def tiny_translator(family: str = "Marian", encoder: int = 2, decoder: int = 2, seed: int = 0) -> Any:
    """An encoder-decoder whose blocks have two matrices and an activation of their own."""
    layers = {"encoder_layers": encoder, "decoder_layers": decoder, "d_model": 16, "max_position_embeddings": 64}
    small = {
        f"{side}_{name}": n for side in ("encoder", "decoder") for name, n in (("attention_heads", 2), ("ffn_dim", 32))
    }
    more = {"dropout": 0.0, "decoder_start_token_id": BOS, "forced_eos_token_id": None, "init_std": 0.3}
    loader = {"Marian": "MarianMTModel"}.get(family, f"{family}ForConditionalGeneration")
    return _build(loader, f"{family}Config", seed, layers | small | more, "eager")


def tiny_mixtral(seed: int = 0, *, attn: str = "sdpa", **fields: Any) -> Any:
    """A causal LM whose tokens go to two of four experts: which ones may differ between two points."""
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    more = {"num_key_value_heads": 2, "max_position_embeddings": 64, "num_local_experts": 4}
    return _build("MixtralForCausalLM", "MixtralConfig", seed, small | more | fields, attn)


def tiny_qwen3_moe(seed: int = 0, *, attn: str = "sdpa", **fields: Any) -> Any:
    """A causal LM of eight small experts, three a token, whose shares do not sum to one."""
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    more = {"num_key_value_heads": 2, "head_dim": 4, "max_position_embeddings": 64, "num_experts": 8}
    experts = {"num_experts_per_tok": 3, "moe_intermediate_size": 8, "norm_topk_prob": False}
    return _build("Qwen3MoeForCausalLM", "Qwen3MoeConfig", seed, small | more | experts | fields, attn)


def tiny_gpt_oss(seed: int = 0, *, attn: str = "eager", **fields: Any) -> Any:
    """A causal LM whose experts are transposed and have biases."""
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
    more = {"num_key_value_heads": 2, "head_dim": 4, "max_position_embeddings": 64, "num_local_experts": 4}
    return _build("GptOssForCausalLM", "GptOssConfig", seed, small | more | {"num_experts_per_tok": 2} | fields, attn)


def tiny_vit(seed: int = 0, *, attn: str = "sdpa", **fields: Any) -> Any:
    """An image classifier: convolutions, and a parameter of the root of its embeddings."""
    import transformers

    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.ViTConfig(**small | {"image_size": 8, "patch_size": 4, "num_labels": 3} | fields)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return transformers.ViTForImageClassification._from_config(config, attn_implementation=attn).eval()


CAUSAL = {"llama": tiny_llama, "opt": tiny_opt, "gpt2": tiny_gpt2, "qwen": tiny_qwen}
"""Causal LMs by family."""

DECODERS = CAUSAL | {"gemma": tiny_gemma, "gemma2": tiny_gemma2, "cohere": tiny_cohere, "bloom": tiny_bloom}
"""More of them, with what is done to logits and positions elsewhere."""

EVERY = CAUSAL | {"bert": tiny_bert_classifier, "roberta": tiny_roberta_mlm, "t5": tiny_t5}
"""One of each kind of model that zoft trains."""


def batch_for(model: Any, *, rows: int = 3, length: int = 7, seed: int = 0) -> dict[str, Any]:
    """Unpadded inputs with labels of the right kind for ``model``, so that ``model(**batch).loss`` exists."""
    generator = torch.Generator().manual_seed(seed)
    if hasattr(model.config, "image_size"):
        pixels = torch.randn(rows, 3, model.config.image_size, model.config.image_size, generator=generator)
        return {"pixel_values": pixels, "labels": torch.arange(rows) % model.config.num_labels}
    ids = torch.randint(4, VOCAB, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    if type(model).__name__.endswith("ForSequenceClassification"):
        labels = torch.randint(0, model.config.num_labels, (rows,), generator=generator)
    elif type(model).__name__.endswith("ForMaskedLM"):
        labels = torch.full_like(ids, -100)
        labels[:, 2] = ids[:, 2]
        ids = ids.clone()
        ids[:, 2] = MASK
    elif getattr(model.config, "is_encoder_decoder", False):
        labels = torch.randint(4, VOCAB, (rows, 4), generator=generator)
    else:
        labels = ids.clone()
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}
