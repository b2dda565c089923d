"""An operation without a gradient ends the training."""

from __future__ import annotations

import pytest
import torch

from ftrun.errors import ComponentError
from ftrun.training.gradients import backward, gradients_of


@pytest.fixture(scope="module")
def doubled():
    """An operation for the forward pass alone, as libraries write them for inference."""
    library = torch.library.Library("ftrun_test", "DEF")
    library.define("doubled(Tensor x) -> Tensor")
    library.impl("doubled", lambda x: x * 2, "CPU")
    yield torch.ops.ftrun_test.doubled
    library._destroy()


@pytest.mark.parametrize("attempt", [1, 2], ids=["first", "again"])
def test_an_operation_without_a_gradient_is_an_error_every_time(doubled, attempt):
    """Torch alone warns, gives whatever gradient comes out, and trains on."""
    x = torch.ones(3, requires_grad=True)
    with pytest.raises(ComponentError, match=r"ftrun_test::doubled, an operation without a gradient") as caught:
        backward((doubled(x) * x).sum())
    assert caught.value.exit_code == 5 and caught.value.todo
    with pytest.raises(ComponentError, match="without a gradient"):
        gradients_of((doubled(x) * x).sum(), [x])


def test_other_gradients_pass(doubled):
    x, unused = torch.ones(3, requires_grad=True), torch.ones(1, requires_grad=True)
    backward((x * doubled(x.detach())).sum())
    assert torch.equal(x.grad, torch.full((3,), 2.0))
    assert gradients_of(x.square().sum(), [x, unused])[1] is None


def test_a_run_ends_with_it(doubled, tiny_dir, rows_file, tmp_path, monkeypatch):
    """Whatever part of a step brought it, and although warnings are silenced."""
    import warnings

    import ftrun
    from ftrun.objectives.base import TokenLoss
    from ftrun.training.parts import Loss

    plain = TokenLoss.loss
    monkeypatch.setattr(TokenLoss, "loss", lambda self, view: Loss(doubled(plain(self, view).value), {}))
    overrides = ["recipe=lora_sft", f"model.path={tiny_dir}", f"data.path={rows_file}", f"out={tmp_path / 'run'}"]
    with warnings.catch_warnings(), pytest.raises(ComponentError, match="ftrun_test::doubled"):
        warnings.simplefilter("ignore")
        ftrun.run("train", overrides=[*overrides, "eval=[]", "data.heldout=0", "train.max_steps=2"])
