"""How good an answer is: what a method that compares answers asks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import safe_open

from ftrun.config.settings import ModelConfig
from ftrun.data.render import Renderer
from ftrun.data.tokens import Sequence, TokenTable
from ftrun.errors import ConfigError
from ftrun.models.load import load_bundle
from ftrun.models.source import model_folder, weight_files
from ftrun.select.scoring.texts import added_ids, encode
from ftrun.training.scoring import segments

if TYPE_CHECKING:
    from ftrun.data.batches import Batch
    from ftrun.data.records import Record
    from ftrun.models.bundle import Bundle
    from ftrun.training.context import Context


def likelihood(records: list[Record], answers: list[str], ctx: Context) -> np.ndarray:
    """Mean log-likelihood of each answer's tokens, end of turn included, under the model that scores, (records,)."""
    bundle = ctx.scorer.bundle
    renderer = Renderer(bundle.tokenizer)
    prompts = [renderer.prompt_ids(record) for record in records]
    targets = [[*ids, renderer.end_of_turn] for ids in encode(bundle.tokenizer, answers)]
    room = [bundle.context_length - len(prompt) for prompt in prompts]
    texts = ((prompt, target[:left]) for prompt, target, left in zip(prompts, targets, room, strict=True))
    return -ctx.scorer.mean_nll(segments(texts), "score answers")


def reward(path: str, records: list[Record], answers: list[str], ctx: Context) -> np.ndarray:
    """What the sequence classifier ``path`` gives to each conversation that ends with the answer, (records,).

    Conversations are cut at the classifier's context. Raises ConfigError for a model that has no head of one output.
    """
    scoring = ctx.scorer.with_model(lambda: _reward_bundle(path, ctx))
    bundle = scoring.bundle
    sequences = []
    for number, (record, answer) in enumerate(zip(records, answers, strict=True)):
        ids = _conversation(record, answer, bundle.tokenizer)[: bundle.context_length]
        sequences.append(Sequence(np.array(ids, np.int32), np.ones(len(ids), np.float32), number))
    found = scoring.measure(TokenTable.from_sequences(sequences), "reward", _reward_of_batch, "ask the reward model")
    return np.array([float(value[0]) for value in found])


def _conversation(record: Record, answer: str, tokenizer: Any) -> list[int]:
    """Tokens of prompt and answer in the classifier's own layout; without one, the texts a line each."""
    messages = [{"role": message.role, "content": message.text} for message in record.prompt]
    messages.append({"role": "assistant", "content": answer})
    if getattr(tokenizer, "chat_template", None):
        return encode(tokenizer, [tokenizer.apply_chat_template(messages, tokenize=False)])[0]
    lead, tail = added_ids(tokenizer)
    return [*lead, *encode(tokenizer, ["\n".join(message["content"] for message in messages)])[0], *tail]


def _reward_bundle(path: str, ctx: Context) -> Bundle:
    config = ModelConfig(path=path, dtype=ctx.settings.model.dtype)
    bundle = load_bundle(config, task="classify", device=ctx.team.device)
    outputs = int(bundle.model.config.num_labels)  # type: ignore[union-attr]
    trained = _has_weights(model_folder(config), bundle.architecture.head_name)
    if outputs != 1 or not trained:
        what = f"has {outputs} outputs" if trained else "brings no trained head"
        raise ConfigError(
            f"{path} is no reward model: it {what}",
            f"select.picker.reward_model={path}",
            "Name a sequence classifier of one output.",
        )
    return bundle


def _has_weights(folder: Path, module: str | None) -> bool:
    """Whether the files hold the module; a head that they lack would be random."""
    for file in weight_files(folder):
        with safe_open(file, "pt") as tensors:
            if any(name.startswith(f"{module}.") for name in tensors.keys()):  # noqa: SIM118
                return True
    return False


def _reward_of_batch(bundle: Bundle, batch: Batch) -> list[np.ndarray]:
    logits = bundle.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    return list(logits.float().cpu().numpy())
