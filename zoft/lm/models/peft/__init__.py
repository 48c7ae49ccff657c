"""Adapters through the peft library: none, LoRA, prefix tuning, prompt tuning."""

from zoft.lm.models.peft._load import load_adapter
from zoft.lm.models.peft.base import Peft

__all__ = ["Peft", "load_adapter"]
