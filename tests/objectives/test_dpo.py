"""DPO against the formula written out by hand."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ftrun.objectives.dpo import Dpo


def view_of(policy, reference, sequence):
    """A stand-in for a step over pairs: flat token losses and the sequence of each."""
    index = torch.tensor(sequence)

    def per_sequence_sum(values):
        return torch.zeros(int(index.max()) + 1, dtype=values.dtype).index_add(0, index, values)

    return SimpleNamespace(
        token_nll=torch.tensor(policy, requires_grad=True),
        reference_nll=torch.tensor(reference),
        weights=torch.ones(len(policy)),
        per_sequence_sum=per_sequence_sum,
    )


POLICY, REFERENCE, SEQUENCE = [1.0, 2.0, 0.5, 3.0, 1.0], [1.5, 1.0, 0.5, 2.0, 2.5], [0, 0, 1, 1, 1]


@pytest.mark.parametrize("eps", [0.0, 0.2])
def test_sigmoid(eps):
    loss = Dpo(beta=0.3, label_smoothing=eps).loss(view_of(POLICY, REFERENCE, SEQUENCE))
    chosen, rejected = -(1.0 + 2.0) + (1.5 + 1.0), -(0.5 + 3.0 + 1.0) + (0.5 + 2.0 + 2.5)
    h = 0.3 * (chosen - rejected)
    expected = -(1 - eps) * np.log(1 / (1 + np.exp(-h))) - eps * np.log(1 / (1 + np.exp(h)))
    assert loss.value.item() == pytest.approx(expected, rel=1e-6)
    assert loss.parts["reward_accuracy"].item() == float(h > 0)


def test_ipo_averages_over_length():
    loss = Dpo(loss_type="ipo", beta=0.5).loss(view_of(POLICY, REFERENCE, SEQUENCE))
    chosen, rejected = -0.5 / 2, 0.5 / 3
    assert loss.value.item() == pytest.approx((chosen - rejected - 1.0) ** 2, rel=1e-6)


def test_equal_models_give_log_two():
    view = view_of(POLICY, POLICY, SEQUENCE)
    loss = Dpo().loss(view)
    assert loss.value.item() == pytest.approx(np.log(2))
    loss.value.backward()
    assert (view.token_nll.grad[:2] > 0).all() and (view.token_nll.grad[2:] < 0).all()
