"""``ftrun generate``: try a model, with the template that it was trained with."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from transformers import TextStreamer

from ftrun.config.compose import Composed
from ftrun.config.saved import run_folder
from ftrun.data.records import Message, Record
from ftrun.data.render import Renderer, apply_template, prompt_ids
from ftrun.errors import ConfigError
from ftrun.models.generation import stop_ids
from ftrun.models.load import load_bundle
from ftrun.stages.trained import load_trained, plain_context


def generate(composed: Composed) -> dict[str, Any]:
    """Answer ``prompt`` with a run's model, or with ``model.path``; the answer streams to standard output."""
    asked = composed.settings
    if not asked.prompt:
        raise ConfigError("what shall it answer?", todo='Give prompt="..."')
    if asked.run:
        run = run_folder(asked.run)
        bundle = load_trained(run, asked, plain_context(asked, run).team.device)
    else:
        ctx = plain_context(asked, Path("."))
        bundle = load_bundle(asked.model, task="causal", quant=asked.component("quant"), device=ctx.team.device)
        apply_template(bundle.tokenizer, asked.model.template)
    system = (Message("system", asked.data.system),) if asked.data.system else ()
    record = Record(id=0, kind="prompts", messages=(*system, Message("user", asked.prompt)))
    record = asked.component("tokens").edit_prompt(record)
    ids = torch.tensor([prompt_ids(record, bundle.tokenizer)], device=bundle.device)
    model: Any = bundle.model.eval()
    streamer: Any = TextStreamer(bundle.tokenizer, skip_prompt=True, skip_special_tokens=True)
    with torch.no_grad():
        output = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=256,
            do_sample=False,
            eos_token_id=stop_ids(bundle, Renderer(bundle.tokenizer)),
            pad_token_id=bundle.pad_id,
            streamer=streamer,
        )
    sys.stdout.flush()
    return {"text": bundle.tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)}
