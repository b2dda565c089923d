"""Orthogonal steps for matrices."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ftrun.optim.base import OptimizerConfig
from ftrun.registry import register


@register("optim", "muon")
@dataclass
class Muon(OptimizerConfig):
    """Each hidden matrix moves by its momentum with all singular values made equal (Jordan, 2024; arXiv:2502.16982).

    ``m <- momentum * m + g``, ``u = orthogonalise(g + momentum * m)``, then
    ``p <- (1 - lr * weight_decay) * p - lr * s * u``, where ``s`` is ``0.2 * sqrt(max(rows, columns))`` (match_adamw:
    updates as large as AdamW's, so its learning rates fit) or ``sqrt(max(1, rows / columns))`` (original).
    AdamW trains the rest: vectors, and matrices with a part of ``adamw_on`` in their name (embeddings, output heads).
    """

    needs: ClassVar[dict[str, str]] = {"whole_weights": "orthogonalises the update of a whole matrix"}

    adamw_learning_rate: float | None = None  # peak learning rate of what AdamW trains; null: the same
    momentum: float = 0.95  # memory of past gradients
    nesterov: bool = True  # look ahead along the momentum
    iterations: int = 5  # Newton-Schulz iterations of the orthogonalisation
    scale: Literal["match_adamw", "original"] = "match_adamw"  # size of the update of a matrix
    adamw_on: list[str] = field(default_factory=lambda: ["embed", "lm_head", "wte", "wpe", "score"])  # names for AdamW
    beta1: float = 0.9  # AdamW: memory of the mean gradient
    beta2: float = 0.999  # AdamW: memory of the mean squared gradient
    eps: float = 1e-8  # AdamW: added to the root of the mean square

    def build(self, named_parameters: list[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        hidden = [(name, p) for name, p in named_parameters if self.is_hidden_matrix(name, p)]
        rest = [(name, p) for name, p in named_parameters if not self.is_hidden_matrix(name, p)]
        adamw_rate = self.learning_rate if self.adamw_learning_rate is None else self.adamw_learning_rate
        groups = [group | {"muon": True} for group in self.groups(hidden)] if hidden else []
        groups += [group | {"muon": False, "lr": adamw_rate} for group in self.groups(rest)] if rest else []
        return MuonWithAdamW(groups or self.groups(named_parameters), self)

    def is_hidden_matrix(self, name: str, parameter: nn.Parameter) -> bool:
        return parameter.ndim == 2 and not any(part in name for part in self.adamw_on)

    def state_bytes(self) -> float:
        return 4.0  # the momentum of hidden matrices, which are most parameters; what AdamW trains takes 8


class MuonWithAdamW(torch.optim.Optimizer):
    """One optimiser over both kinds of groups; ``group["muon"]`` says which rule moves its parameters."""

    def __init__(self, groups: list[dict[str, Any]], knobs: Muon):
        super().__init__(groups, {"lr": knobs.learning_rate, "weight_decay": 0.0})
        self.knobs = knobs
        self.adamw = torch.optim.AdamW(self.param_groups, betas=(knobs.beta1, knobs.beta2), eps=knobs.eps)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if group["muon"]:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        self._move(parameter, parameter.grad, group)
        # shared anew at every step: loading a checkpoint replaces both objects
        self.adamw.param_groups = [group for group in self.param_groups if not group["muon"]]
        self.adamw.state = self.state
        self.adamw.step()
        return loss

    def _move(self, parameter: nn.Parameter, gradient: Tensor, group: dict[str, Any]) -> None:
        knobs, state = self.knobs, self.state[parameter]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(gradient)
        momentum = state["momentum"].mul_(knobs.momentum).add_(gradient)
        direction = gradient.add(momentum, alpha=knobs.momentum) if knobs.nesterov else momentum
        update = orthogonalise(direction, knobs.iterations).to(parameter.dtype)
        rows, columns = parameter.shape
        match = knobs.scale == "match_adamw"
        scale = 0.2 * math.sqrt(max(rows, columns)) if match else math.sqrt(max(1, rows / columns))
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(update, alpha=-group["lr"] * scale)


def orthogonalise(matrix: Tensor, iterations: int = 5) -> Tensor:
    """A matrix with the singular vectors of ``matrix`` and singular values near 1 (about 0.7 to 1.2).

    Newton-Schulz: ``X <- a X + (b A + c A A) X`` with ``A = X X^T`` pushes every singular value in (0, 1] towards 1.
    """
    a, b, c = 3.4445, -4.7750, 2.0315  # steepest at zero, from Jordan's post
    # in bfloat16 the matrix products of many CPUs are tens of times slower
    x = matrix.bfloat16() if matrix.is_cuda else matrix.float()
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(iterations):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x
