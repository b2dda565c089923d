"""Masked thought: what is hidden, what is not, and what it does not depend on."""

from __future__ import annotations

import functools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import ftrun
from ftrun.data.batches import Batch, micro_batches
from ftrun.data.tokens import Sequence, TokenTable
from ftrun.errors import ConfigError
from ftrun.tokens.learned_embedding import LearnedEmbedding
from ftrun.tokens.policies.mft import MASKED, Mft
from ftrun.training.view import StepView


@pytest.fixture
def attached(bundle, context):
    def make(**knobs) -> Mft:
        policy = Mft(**knobs)
        policy.attach(bundle, context())
        return policy

    return make


@pytest.fixture
def batches(bundle, table):
    def make(batch_tokens: int = 60, packing: bool = False, of: TokenTable = table) -> list[Batch]:
        return list(micro_batches(of, np.arange(len(of)), batch_tokens, packing, bundle.pad_id))

    return make


def changed(batch: Batch, arranged: Batch) -> torch.Tensor:
    return (arranged.input_ids != batch.input_ids) | arranged.remembered[MASKED]


def by_row(batch: Batch, values: torch.Tensor) -> dict[int, list]:
    return {row: values[batch.sequence == number].tolist() for number, row in enumerate(batch.table_index.tolist())}


@pytest.mark.parametrize("replace_rate", [0.0, 0.5, 1.0])
def test_targets_and_prompts_stay(replace_rate, attached, batches):
    policy = attached(p_max=0.5, replace_rate=replace_rate)
    for batch in batches():
        arranged = policy.arrange(batch, (0, 3), 1.0)
        for part in ("row", "position", "ids", "weights", "sequence"):
            assert torch.equal(getattr(arranged.targets, part), getattr(batch.targets, part))
        response = torch.zeros_like(batch.input_ids, dtype=torch.bool)
        response[batch.predicting[0], batch.predicting[1] + 1] = True
        assert not (changed(batch, arranged) & ~response).any()
        assert arranged.attention is None and arranged.tokens == batch.tokens
        assert torch.equal(arranged.position_ids, batch.position_ids)


@pytest.mark.parametrize("replace_rate", [0.0, 0.3, 1.0])
def test_shares_lie_within_binomial_bounds(replace_rate, attached, batches):
    """Five standard deviations around what was asked for, over 20,000 response tokens."""
    ids = np.full(2003, 5, np.int32)
    weight = np.r_[np.zeros(3), np.ones(2000)].astype(np.float32)
    table = TokenTable.from_sequences([Sequence(ids, weight, i) for i in range(10)])
    policy = attached(p_max=0.4, replace_rate=replace_rate)
    masks = randoms = 0
    for batch in batches(10_000, of=table):
        arranged = policy.arrange(batch, (0, 0), 1.0)
        masked = arranged.remembered[MASKED]
        masks += int(masked.sum())
        randoms += int(((arranged.input_ids != 5) & ~masked).sum())
    for found, share in ((masks, 0.4 * (1 - replace_rate)), (randoms, 0.4 * replace_rate)):
        assert abs(found - 20_000 * share) <= 5 * np.sqrt(20_000 * share * (1 - share)) + 0.01 * found


def test_random_tokens_come_from_the_whole_vocabulary(attached, bundle, batches):
    ids, weight = np.full(3000, 5, np.int32), np.ones(3000, np.float32)
    table = TokenTable.from_sequences([Sequence(ids, weight, 0)])
    (batch,) = batches(of=table)
    drawn = attached(p_max=1.0, replace_rate=1.0).arrange(batch, (0, 0), 1.0).input_ids[0, 1:]
    size = len(bundle.tokenizer)
    assert 0 <= int(drawn.min()) < size / 50 and size * 0.98 < int(drawn.max()) < size
    assert len(drawn.unique()) > 0.95 * size


def test_p_rises_to_its_maximum():
    policy = Mft(p_max=0.4)
    rates = [policy.rate(step / 100) for step in range(100)]
    expected = [min(0.4, 0.4 * step / 66) for step in range(100)]
    np.testing.assert_allclose(rates, expected)
    assert rates[0] == 0 and Mft(warmup=0).rate(0) == 0.4


def test_nothing_is_hidden_at_first(attached, batches):
    policy = attached()
    for batch in batches():
        assert not changed(batch, policy.arrange(batch, (0, 0), 0.0)).any()


def test_the_mask_is_at_first_the_mean_embedding(bundle, context):
    mask = Mft().attach(bundle, context())
    weight = bundle.model.get_input_embeddings().weight
    assert isinstance(mask, LearnedEmbedding)
    torch.testing.assert_close(mask.vector.detach(), weight.detach().double().mean(0).float(), rtol=1e-5, atol=1e-7)
    assert sum(p.numel() for p in mask.parameters()) == weight.shape[1]
    assert Mft(replace_rate=1.0).attach(bundle, context()) is None


def test_a_scaled_embedding_has_a_scaled_mean(bundle):
    """Gemma 3 multiplies inside its embedding: the vector stands behind that."""

    class Scaled(torch.nn.Embedding):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return super().forward(input) * 6

    weight = bundle.model.get_input_embeddings().weight
    bundle.model.set_input_embeddings(Scaled(*weight.shape, _weight=weight))
    torch.testing.assert_close(LearnedEmbedding(bundle).vector, weight.mean(0) * 6, rtol=1e-4, atol=1e-6)


def test_the_model_sees_the_mask_and_learns_it(attached, bundle, batches):
    """States as from the model's own forward on embeddings with the vector put in; the vector gets a gradient."""
    policy, batch = attached(p_max=0.5), batches()[0]
    arranged = policy.arrange(batch, (0, 1), 1.0)
    with torch.no_grad():
        policy._mask.vector.normal_()
    embedded = bundle.model.get_input_embeddings()(batch.input_ids).detach().clone()
    embedded[arranged.remembered[MASKED]] = policy._mask.vector.detach()
    expected = bundle.model.model(inputs_embeds=embedded).last_hidden_state[batch.predicting]
    perturb = functools.partial(policy.perturb, seed=(0, 1))
    view = StepView(bundle.model, bundle.architecture, arranged, perturb=perturb)
    torch.testing.assert_close(view.hidden, expected, rtol=1e-5, atol=1e-5)
    view.token_nll.sum().backward()
    assert policy._mask.vector.grad.abs().sum() > 0


def test_a_masked_token_leaves_no_trace(attached, bundle, batches):
    """What stands behind the mask changes no state."""
    policy, batch = attached(p_max=0.5), batches()[0]
    other = replace(batch, input_ids=batch.input_ids.clone())
    masked = policy.arrange(batch, (0, 1), 1.0).remembered[MASKED]
    other.input_ids[masked] += 1
    states = []
    for one in (batch, other):
        perturb = functools.partial(policy.perturb, seed=(0, 1))
        arranged = policy.arrange(one, (0, 1), 1.0)
        states.append(StepView(bundle.model, bundle.architecture, arranged, perturb=perturb).hidden)
    assert masked.any() and torch.equal(*states)


def test_dropped_masks_are_seen_by_none(attached, bundle, batches):
    """The states of what is not hidden do not depend on the mask's vector."""
    policy, batch = attached(p_max=0.5, drop_mask=True), batches()[0]
    arranged = policy.arrange(batch, (0, 1), 1.0)
    hidden = arranged.remembered[MASKED]
    assert arranged.attention is not None and not arranged.attention.transpose(1, 2)[hidden].any()
    states = []
    for size in (0.0, 3.0):
        with torch.no_grad():
            policy._mask.vector.fill_(size)
        perturb = functools.partial(policy.perturb, seed=(0, 1))
        view = StepView(bundle.model, bundle.architecture, arranged, perturb=perturb)
        states.append(view.hidden[~hidden[batch.predicting]])
    torch.testing.assert_close(*states)


def test_packing_and_the_cut_do_not_matter(attached, batches):
    policy = attached(p_max=0.5, replace_rate=0.5)
    whole: dict[int, list] = {}
    for batch in batches(10_000):
        whole |= by_row(batch, policy.arrange(batch, (7, 2), 1.0).input_ids)
    for packing, tokens in ((True, 60), (False, 1), (True, 10_000)):
        for batch in batches(tokens, packing):
            for row, ids in by_row(batch, policy.arrange(batch, (7, 2), 1.0).input_ids).items():
                assert ids == whole[row]


def test_every_visit_draws_anew(attached, batches):
    policy, batch = attached(p_max=0.5), batches()[0]
    first, again, later = (changed(batch, policy.arrange(batch, (0, step), 1.0)) for step in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, later)


@pytest.mark.parametrize("knobs", [{"p_max": 1.5}, {"replace_rate": -0.1}, {"warmup": 2}])
def test_knobs_are_shares(knobs):
    with pytest.raises(ConfigError, match="is a share from 0 to 1"):
        Mft(**knobs)


# ---- through the loop ----

QUICK = ["data.heldout=0.2", "data.max_length=256", "train.batch_size=4", "train.max_steps=4", "tokens.warmup=0"]


def run(tiny_dir: Path, rows_file: Path, out: Path, *more: str) -> tuple[dict, list[float]]:
    words = ["recipe=sft", f"model.path={tiny_dir}", f"data.path={rows_file}", f"out={out}", *QUICK, *more]
    if "tokens=mft" not in more:
        words.remove("tokens.warmup=0")
    summary = ftrun.run("train", overrides=words)
    lines = [json.loads(line) for line in (out / "train/metrics.jsonl").read_text().splitlines()]
    return summary, [line["loss"] for line in lines if "loss" in line]


def test_hiding_nothing_is_plain_training(tiny_dir, rows_file, tmp_path):
    _, plain = run(tiny_dir, rows_file, tmp_path / "sft")
    _, none = run(tiny_dir, rows_file, tmp_path / "mft", "tokens=mft", "tokens.p_max=0")
    assert plain == none


@pytest.mark.parametrize("more", [["train.packing=true"], ["train.batch_tokens=1"], ["tokens.drop_mask=true"]])
def test_a_run_does_not_depend_on_the_cut(more, tiny_dir, rows_file, tmp_path):
    same = ("tokens=mft", "tokens.replace_rate=0.5", *[word for word in more if word.startswith("tokens.")])
    _, one = run(tiny_dir, rows_file, tmp_path / "a", *same, "train.packing=false")
    cut = more if same[-1] not in more else ["train.packing=true"]
    _, two = run(tiny_dir, rows_file, tmp_path / "b", *same, *cut)
    np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-5)


def test_only_training_meets_the_mask(tiny_dir, rows_file, tmp_path):
    """Held-out loss is that of whole rows; the saved model has the old vocabulary; checkpoints hold the vector."""
    still = ("optim.learning_rate=0", "optim.weight_decay=0")
    plain, _ = run(tiny_dir, rows_file, tmp_path / "sft", *still)
    hidden, _ = run(tiny_dir, rows_file, tmp_path / "mft", *still, "tokens=mft")
    assert plain["metrics"]["heldout"] == hidden["metrics"]["heldout"]
    saved = load_file(tmp_path / "mft/model/model.safetensors")
    assert saved.keys() == load_file(tmp_path / "sft/model/model.safetensors").keys()
    newest = sorted((tmp_path / "mft/train/checkpoints").glob("step-*"))[-1]
    assert "tokens.vector" in load_file(newest / "trainable.safetensors")


def test_adapters_train_with_checkpointed_activations(tiny_dir, rows_file, tmp_path):
    more = ("adapter=lora", "train.gradient_checkpointing=true", "tokens=mft")
    _, losses = run(tiny_dir, rows_file, tmp_path / "lora", *more)
    assert np.isfinite(losses).all()


@pytest.mark.slow
def test_two_processes_hide_what_one_hides(tiny_dir, rows_file, tmp_path):
    losses = []
    for processes in (1, 2):
        out = tmp_path / str(processes)
        words = ["recipe=sft", f"model.path={tiny_dir}", f"data.path={rows_file}", f"out={out}", *QUICK, "eval=[]"]
        words += ["tokens=mft", "tokens.replace_rate=0.5", "launch.threads=1", f"launch.processes={processes}"]
        ftrun.run("train", overrides=words)
        lines = [json.loads(line) for line in (out / "train/metrics.jsonl").read_text().splitlines()]
        losses.append([line["loss"] for line in lines if "loss" in line])
    np.testing.assert_allclose(*losses, rtol=1e-5, atol=1e-5)
