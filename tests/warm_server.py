"""What the server of warm processes does once, before it forks: imports, and what is read from disk. No computation."""

import importlib

from transformers import AutoModelForCausalLM, AutoTokenizer, conversion_mapping
from transformers.models.llama import modeling_llama

from ftrun import cli, registry
from ftrun.config import compose
from ftrun.stages import chain

for slot in registry.SLOTS:
    for spec in registry.specs(slot).values():
        importlib.import_module(spec.module)
compose.load(["recipe=lora_sft"])
conversion_mapping.get_checkpoint_conversion_mapping("llama")
__all__ = ["AutoModelForCausalLM", "AutoTokenizer", "chain", "cli", "modeling_llama"]
