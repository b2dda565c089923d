"""What training adds to the weights in memory."""

from __future__ import annotations

import pytest
import torch

from ftrun.config.settings import Settings, TrainConfig
from ftrun.training.estimate import Trained, narrowed_bytes, widening_bytes

FULL, LORA, LISA = Trained(100, 100, 100), Trained(10, 10, 0), Trained(30, 100, 100)


@pytest.mark.parametrize(
    ("dtype", "pure", "trained", "added"),
    [
        (torch.float32, False, FULL, 0),
        (torch.float32, False, LORA, 10 * 4),
        (torch.bfloat16, False, FULL, 100 * 2 + 100 * 2),  # two bytes more each, and a narrow copy for the products
        (torch.bfloat16, False, LORA, 10 * 4 + 10 * 2),
        (torch.bfloat16, False, LISA, 100 * 2 + 100 * 2),  # layers that sleep are float32 too
        (torch.bfloat16, True, FULL, 0),
        (torch.bfloat16, True, LORA, 10 * 2),
    ],
)
def test_float32_weights_and_their_narrow_copies_are_counted(dtype, pure, trained, added):
    settings = Settings(train=TrainConfig(pure_bfloat16=pure))
    assert widening_bytes(settings, trained, dtype) == added
    assert narrowed_bytes(settings, trained.ever, dtype) == (0 if pure or dtype.itemsize == 4 else 2 * trained.ever)
