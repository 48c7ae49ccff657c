"""Every causal language model class of transformers: what is left out of its forward changes no loss and no score."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.models import PAD, VOCAB
from tests.unit.lm.data.test_packing import LONG, OTHER
from tests.unit.lm.objectives.test_objectives import row
from zoft.lm.data.tokens import OptionCollator
from zoft.lm.logits.call import arguments, called
from zoft.lm.logits.own_loss import own_loss
from zoft.lm.objectives.options import Options, answers, option_log_probs

SOME = [
    *("GPTNeoXForCausalLM", "GPTNeoForCausalLM", "MistralForCausalLM", "MixtralForCausalLM", "FalconForCausalLM"),
    *("GraniteForCausalLM", "MambaForCausalLM", "RwkvForCausalLM", "MiniMaxForCausalLM", "BertLMHeadModel"),
]
SMALL: dict[str, Any] = (
    dict.fromkeys(("hidden_size", "n_embd", "d_model", "emb_dim", "embedding_size", "word_embed_proj_dim"), 32)
    | dict.fromkeys(("n_layer", "num_layers", "num_hidden_layers", "n_layers", "decoder_layers"), 2)
    | dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), 4)
    | dict.fromkeys(("intermediate_size", "ffn_dim", "decoder_ffn_dim", "d_ff", "n_inner", "ffn_hidden_size"), 64)
    | dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx"), 64)
    | dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4)
    | dict.fromkeys(("kv_lora_rank", "q_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), 8)
    | dict.fromkeys(("head_dim", "rotary_dim", "state_size", "mamba_d_state"), 8)
    | dict.fromkeys(("num_key_value_heads", "num_experts_per_tok"), 2)
    | dict.fromkeys(("sliding_window", "attention_chunk_size", "moe_intermediate_size"), 32)
    | {"vocab_size": VOCAB, "pad_token_id": PAD, "bos_token_id": 0, "eos_token_id": 2, "encoder_layers": 1}
)
ODD = ("head_dim", "num_key_value_heads", "rotary_dim", "sliding_window", "attention_chunk_size", "q_lora_rank")


# Classes that `tiny` makes no small model of, by why. Every other class of the installed transformers has to pass: one
# that comes with a new release and cannot be made is added here, by hand.
UNMADE = {
    "fields that are not known here, or that the config refuses": """
        AXK1ForCausalLM BambaForCausalLM CohereCompassForCausalLM DbrxForCausalLM Dots1ForCausalLM
        Dots3NoteForCausalLM FalconH1ForCausalLM FuyuForCausalLM Gemma3ForConditionalGeneration Gemma3nForCausalLM
        Gemma3nForConditionalGeneration Gemma4AssistantForCausalLM Gemma4ForCausalLM Gemma4ForConditionalGeneration
        Gemma4UnifiedAssistantForCausalLM Gemma4UnifiedForCausalLM Gemma4UnifiedForConditionalGeneration
        GitForCausalLM GotOcr2ForConditionalGeneration GraniteMoeHybridForCausalLM Lfm2MoeForCausalLM
        Mamba2ForCausalLM MossTranscribeDiarizeForConditionalGeneration Qwen4ExpForCausalLM
        RecurrentGemmaForCausalLM ReformerModelWithLMHead RoCBertForCausalLM XmodForCausalLM Zamba2ForCausalLM
        ZambaForCausalLM ZayaForCausalLM
    """,
    "submodules of full size whatever the config says": """
        BltForCausalLM KimiLinearForCausalLM Phi4MultimodalForCausalLM
    """,
    "tokens in four streams": "MusicgenForCausalLM MusicgenMelodyForCausalLM",
}


def causal_classes() -> list[str]:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    known = {name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() if isinstance(name, str)}
    return sorted(known - {name for names in UNMADE.values() for name in names.split()})


def takes(config: Any, key: str) -> bool:
    return hasattr(config(), key) and not isinstance(getattr(config, key, None), property)


def tiny(name: str) -> Any:
    """A small model of the class, as far as its config has fields that are known here; None where that is no model."""
    import transformers

    cls = getattr(transformers, name)
    config = type(cls.config_class().get_text_config())
    known = {key: value for key, value in SMALL.items() if takes(config, key)}
    for without in ((), *((field,) for field in ODD), ("head_dim", "num_key_value_heads")):
        fields = {key: value for key, value in known.items() if key not in without}
        kinds = list(dict.fromkeys(config().layer_types or ())) if takes(config, "layer_types") else []
        if kinds:
            fields |= {"layer_types": kinds * (1 + (len(kinds) == 1)), "num_hidden_layers": max(2, len(kinds))}
        if name == "GPTNeoForCausalLM":
            fields |= {"attention_types": [[["global", "local"], 1]], "window_size": 20}
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                model = cls._from_config(config(**fields)).eval()
                for parameter in model.parameters():
                    parameter.data.add_(0.05 * torch.randn_like(parameter))
            batch = OptionCollator(PAD)(LONG)
            if sum(p.numel() for p in model.parameters()) < 3e6:
                model.config.use_cache = False  # as the Trainer sets it
                with torch.no_grad():  # transformers' own call: what fails in zoft's is a fault, and not swallowed here
                    model(batch["input_ids"])
                return model
        except Exception:  # this combination of fields does not go together; `UNMADE` says where none does
            continue
    return None


def check(model: Any) -> None:
    """Scores, losses over options and the model's own loss against those of all logits, in a second batch of each."""
    with torch.no_grad():
        for rows in (LONG, OTHER):
            batch = OptionCollator(PAD)(rows)
            logits = called(model, arguments(model, batch["input_ids"], batch["attention_mask"])).float()
            places, targets = answers(batch["input_ids"], batch["option_len"])
            wanted = torch.log_softmax(places.of(logits), -1).gather(1, targets.unsqueeze(1)).squeeze(1)
            torch.testing.assert_close(option_log_probs(model, batch), wanted, rtol=1e-4, atol=1e-4)
        single = OptionCollator(PAD)([row(6, [1, 1], 0, 1), row(9, [1, 1], 1, 2)])
        loss = Options().predict(model, single)[0]
        torch.testing.assert_close(Options().loss(model, single), loss, rtol=1e-5, atol=1e-6)
        for rows, count in ((LONG, 5), (OTHER, 7)):
            ids = OptionCollator(PAD)(rows)["input_ids"]
            labels = ids.clone()
            labels[:, :6] = -100
            inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
            inputs["num_items_in_batch"] = torch.tensor(count)
            torch.testing.assert_close(own_loss(model, **inputs)["loss"], model(**inputs).loss, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", SOME)
def test_some_classes(name: str):
    model = tiny(name)
    assert model is not None
    check(model)


@pytest.mark.slow
@pytest.mark.parametrize("name", causal_classes())
def test_every_class_that_can_be_made_small(name: str):
    model = tiny(name)
    assert model is not None, "no small model: add fields to SMALL, or the class to UNMADE"
    check(model)


def test_most_classes_are_tried():
    num_unmade = sum(len(names.split()) for names in UNMADE.values())
    assert len(causal_classes()) > 3 * num_unmade
    assert set(SOME) <= set(causal_classes())
