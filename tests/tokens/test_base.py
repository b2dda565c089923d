"""What every policy that weighs tokens inside the step keeps to."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ftrun.data.tokens import Sequence, TokenTable
from ftrun.objectives.sft import Sft
from ftrun.tokens.base import TokenPolicy
from ftrun.tokens.policies.dft import Dft
from ftrun.tokens.policies.entropy_weighting import EntropyWeighting
from ftrun.tokens.policies.forgetting_sft import ForgettingSft
from ftrun.tokens.policies.pear import Pear
from ftrun.tokens.policies.rft_shad import RftShad
from ftrun.tokens.policies.rho1 import Rho1
from ftrun.tokens.policies.sstoken import SsToken
from ftrun.tokens.policies.talr import Talr
from ftrun.training.view import StepView

POLICIES = [
    Talr(),
    Talr(normalize="simplex"),
    Dft(),
    EntropyWeighting(),
    EntropyWeighting(form="up"),
    Rho1(),
    Rho1(scope="sample"),
    SsToken(),
    ForgettingSft(),
    RftShad(),
    Pear(ratio_floor=-5.0, ratio_ceiling=5.0),
    Pear(variant="block"),
    Pear(variant="sequence"),
]
EMPTY = 12  # the row without a trained token

every_policy = pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: f"{policy.name}-{POLICIES.index(policy)}")


@pytest.fixture
def known(table) -> TokenTable:
    """The rows, one more without a trained token, and numbers of all tokens for policies that remember some."""
    ids = np.arange(20, 27, dtype=np.int32)
    rows = [*(table.sequence(row) for row in range(len(table))), Sequence(ids, np.zeros(7, np.float32), 500)]
    made, random = TokenTable.from_sequences(rows), np.random.default_rng(3)
    size = len(made.input_ids)
    losses = {name: random.uniform(4, 8, size) for name in ("history_nll", "reference_nll", "behaviour_nll")}
    return made.with_remembered(
        losses | {"sign": random.choice([-1.0, 1.0], size), "shad_minus_base": random.normal(size=size)}
    )


@pytest.fixture
def weighed(make_views):
    """The views of one optimiser step of these rows, with the factors of the policy."""

    def make(policy: TokenPolicy, table: TokenTable, *cut) -> list[StepView]:
        views = make_views(table, *cut, watched_layer=policy.watched_layer(), step=5, steps=10)
        if policy.whole_step:
            everything = torch.cat([policy.statistic(view).detach() for view in views])
        for view in views:
            view.step_statistics = everything if policy.whole_step else None
            view.factors = policy.weigh(view)
        return views

    return make


def by_row(views: list[StepView]) -> dict[int, np.ndarray]:
    return {
        row: view.factors[view.batch.target_sequence == number].numpy()
        for view in views
        for number, row in enumerate(view.batch.table_index.tolist())
    }


def gradient(value: torch.Tensor, model: torch.nn.Module) -> torch.Tensor:
    model.zero_grad()
    value.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@every_policy
def test_weights_are_numbers_to_the_gradient(policy, known, weighed, bundle):
    (view,) = weighed(policy, known, 10_000)
    assert not view.factors.requires_grad and len(view.factors.unique()) > 1
    found = gradient(Sft().loss(view).value, bundle.model)
    (again,) = weighed(policy, known, 10_000)
    factors = torch.tensor(view.factors.tolist(), dtype=again.token_nll.dtype)
    torch.testing.assert_close(found, gradient((factors * again.token_nll).sum(), bundle.model), rtol=1e-4, atol=1e-7)


@every_policy
def test_packed_rows_weigh_what_rows_apart_do(policy, known, weighed):
    apart = by_row(weighed(policy, known, 10_000))
    assert set(apart) == set(range(13)) and len(apart[EMPTY]) == 0
    for cut in ((10_000, True), (60, True), (1, False)):
        found = by_row(weighed(policy, known, *cut))
        for row, factors in apart.items():
            np.testing.assert_allclose(found[row], factors, rtol=2e-4, atol=1e-6)


@every_policy
def test_a_micro_batch_without_trained_tokens_has_no_loss(policy, known, weighed, bundle):
    views = weighed(policy, known, 1)
    (empty,) = [view for view in views if view.batch.table_index.tolist() == [EMPTY]]
    value = Sft().loss(empty).value
    assert value == 0 and all(float(part) == 0 for part in empty.parts.values())
    assert not gradient(value, bundle.model).any()
    assert all(torch.isfinite(view.factors).all() for view in views)


@every_policy
def test_a_step_without_trained_tokens_has_no_loss(policy, known, weighed):
    (view,) = weighed(policy, known.rows(np.array([EMPTY])), 10_000)
    assert len(view.factors) == 0 and Sft().loss(view).value == 0


@every_policy
def test_weights_of_the_data_are_multiplied(policy, known, weighed, plain_losses):
    """Half of the tokens weigh a quarter in the data: what is trained stays, and so do the factors."""
    quarter = np.where(np.arange(len(known.input_ids)) % 2, 0.25, 1.0) * known.loss_weight
    static = known.with_weights(quarter)
    views = weighed(policy, static, 60)
    factors, expected = by_row(weighed(policy, known, 60)), 0.0
    for row, nll in plain_losses(known).items():
        weight = static.sequence(row).loss_weight[1:]
        expected += float((weight[weight > 0] * factors[row] * nll).sum())
    assert sum(float(Sft().loss(view).value.detach()) for view in views) == pytest.approx(expected, rel=1e-4, abs=1e-4)
