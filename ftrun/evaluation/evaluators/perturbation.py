"""How much a model's loss rises when noise is added to its weights."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
from torch import nn

from ftrun.errors import ConfigError
from ftrun.evaluation.base import Evaluation, Evaluator, Metric
from ftrun.evaluation.likelihood import likelihood
from ftrun.models.load import load_bundle
from ftrun.models.wrappers import unwrap
from ftrun.registry import register
from ftrun.tokens.reference import check_same_tokenizer

if TYPE_CHECKING:
    from ftrun.data.tokens import TokenTable
    from ftrun.models.bundle import Bundle
    from ftrun.training.context import Context


@register("eval", "perturbation")
@dataclass
class Perturbation(Evaluator):
    """Rise of the held-out loss under Gaussian noise on the weights (Springer et al., 2025, arXiv:2503.19206).

    theta' = theta + sigma s eps, with eps standard normal and s the spread of the matrix: its standard deviation, or
    that of the model's initialisation. ``loss`` is the clean mean loss of a trained token, ``rise_SIGMA`` the mean over
    the seeds of the loss under noise minus that. The same eps serves every sigma and every model, so that their curves
    compare. Further models, such as the checkpoints of one pre-training, are measured on the same rows. Norms, biases,
    embeddings and the head stay clean unless asked for.
    """

    needs: ClassVar[dict[str, str]] = {"trainable_base": "adds noise to the base weights"}

    sigmas: list[float] = field(default_factory=lambda: [0.01, 0.03, 0.1])  # noise as a share of a matrix's spread
    seeds: int = 3  # draws of the noise
    spread: Literal["matrix", "initial"] = "matrix"  # of each weight matrix now, or the config's initializer_range
    norms: bool = False  # noise on norm weights and biases too
    embeddings: bool = False  # noise on the embeddings and the head too
    models: list[str] = field(default_factory=list)  # further models, each PATH, PATH@REVISION or @REVISION
    batch_tokens: int | None = None  # upper bound of the tokens in one batch; null: 1024 on a CPU, 4096 on a GPU

    def __post_init__(self) -> None:
        if self.seeds < 1:
            raise ConfigError("eval.perturbation.seeds must be at least 1", f"eval.perturbation.seeds={self.seeds}")
        if not self.sigmas or not all(0 <= s < math.inf for s in self.sigmas) or len({*self.sigmas}) < len(self.sigmas):
            where = f"eval.perturbation.sigmas={self.sigmas}"
            raise ConfigError("eval.perturbation.sigmas are different numbers, none below 0", where)

    def evaluate(self, bundle: Bundle, ctx: Context) -> Evaluation:
        table = ctx.heldout_tokens
        if table is None or not table.trained_counts().any():
            raise ConfigError(
                "eval=perturbation has no held-out token to predict",
                f"data.heldout={ctx.settings.data.heldout:g}",
                "Raise data.heldout or set data.heldout_path.",
            )
        config = ctx.settings.model
        measured = [self._measure(bundle, table, ctx, {"model": config.path, "revision": config.revision})]
        for named in self.models:
            path, _, revision = named.partition("@")
            chosen = replace(config, path=path or config.path, revision=revision or None)
            other = load_bundle(chosen, task="causal", device=ctx.team.device)
            check_same_tokenizer(bundle, other)
            about = {"model": chosen.path, "revision": chosen.revision}
            measured.append(self._measure(other, table, ctx, about))
        metrics: dict[str, Metric] = {}
        for number, lines in enumerate(measured):
            metrics |= summary(lines, "" if number == 0 else f" of {self.models[number - 1]}")
        for number in range(1, len(measured)):
            self._compare(metrics, number, ctx)
        return Evaluation(metrics, [line for lines in measured for line in lines])

    def _measure(self, bundle: Bundle, table: TokenTable, ctx: Context, about: dict[str, Any]) -> list[dict[str, Any]]:
        """One line a seed and sigma: the loss, and its rise over the clean one."""
        about |= {"fingerprint": bundle.fingerprint}
        clean = self._loss(bundle, table, ctx)
        lines = [about | {"sigma": 0.0, "seed": None, "loss": clean, "rise": 0.0}]
        parameters = self._noisy(bundle)
        for sigma in self.sigmas:
            for seed in range(self.seeds):
                with noise(parameters, sigma, (ctx.seed, seed)):
                    loss = self._loss(bundle, table, ctx)
                lines.append(about | {"sigma": sigma, "seed": seed, "loss": loss, "rise": loss - clean})
        return lines

    def _loss(self, bundle: Bundle, table: TokenTable, ctx: Context) -> float:
        found = likelihood(bundle, table, ctx, self.batch_tokens, "loss under noise")
        return math.fsum(found.nll) / int(found.tokens.sum())

    def _noisy(self, bundle: Bundle) -> dict[str, tuple[nn.Parameter, float]]:
        """Parameters that get noise, with the standard deviation that sigma multiplies."""
        base: Any = unwrap(bundle.model)
        outside = {*bundle.architecture.embeddings, bundle.architecture.head_name}
        initial = getattr(base.config.get_text_config(), "initializer_range", None)
        if self.spread == "initial" and not initial:
            raise ConfigError(
                f"the config of {bundle.path} does not say how its weights were drawn",
                "eval.perturbation.spread=initial",
                "Use eval.perturbation.spread=matrix.",
            )
        found = {}
        for name, parameter in base.named_parameters():
            name = name.replace(".base_layer.", ".")  # as it was before peft wrapped it
            if ".lora_" in name or ".modules_to_save." in name or "prompt_encoder" in name:
                continue
            if not parameter.is_floating_point():
                raise ConfigError(
                    f"{name} is quantised: noise cannot be added to it", "eval.perturbation", "Use quant=none."
                )
            outer = name.rpartition(".")[0] in outside
            if (outer and not self.embeddings) or (not outer and parameter.ndim < 2 and not self.norms):
                continue
            found[name] = (parameter, float(initial or 0) if self.spread == "initial" else _spread(parameter))
        return found

    def _compare(self, metrics: dict[str, Metric], number: int, ctx: Context) -> None:
        """Say where a model of a lower clean loss is the more sensitive one."""
        before = "" if number == 1 else f" of {self.models[number - 2]}"
        now = f" of {self.models[number - 1]}"
        worse = [
            f"{sigma:g}"
            for sigma in self.sigmas
            if metrics[f"rise_{sigma:g}{now}"].value > metrics[f"rise_{sigma:g}{before}"].value
        ]
        if metrics[f"loss{now}"].value < metrics[f"loss{before}"].value and worse:
            ctx.report.note(
                f"{self.models[number - 1]} has a lower loss than the model before it, and noise of sigma "
                f"{', '.join(worse)} harms it more"
            )


def summary(lines: list[dict[str, Any]], suffix: str) -> dict[str, Metric]:
    """Metrics of one model from its lines: the clean loss, and the mean rise of every sigma with its error over seeds."""
    found = {f"loss{suffix}": Metric(lines[0]["loss"], None, 1, higher_is_better=False)}
    for sigma in dict.fromkeys(line["sigma"] for line in lines[1:]):
        rises = [line["rise"] for line in lines[1:] if line["sigma"] == sigma]
        found[f"rise_{sigma:g}{suffix}"] = Metric.mean(rises, higher_is_better=False)
    return found


@contextmanager
def noise(parameters: dict[str, tuple[nn.Parameter, float]], sigma: float, seed: tuple[int, int]) -> Iterator[None]:
    """Weights with noise; afterwards they are the same bits as before.

    eps follows from the seed and the parameter's name and is drawn in float32 on the CPU: the same on every process
    and device.
    """
    before = {name: parameter.detach().clone() for name, (parameter, _) in parameters.items()}
    try:
        with torch.no_grad():
            for name, (parameter, spread) in parameters.items():
                generator = torch.Generator().manual_seed(_seed_of(name, seed))
                eps = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
                added = (sigma * spread * eps).to(parameter.device)
                parameter.copy_((parameter.float() + added).to(parameter.dtype))
        yield
    finally:
        with torch.no_grad():
            for name, (parameter, _) in parameters.items():
                parameter.copy_(before[name])


def _spread(parameter: nn.Parameter) -> float:
    """Standard deviation of the entries, with the mean taken off; in float64, so that every device agrees."""
    values: np.ndarray = parameter.detach().double().cpu().numpy()
    return float(values.std())


def _seed_of(name: str, seed: tuple[int, int]) -> int:
    return int.from_bytes(hashlib.blake2b(repr((seed, name)).encode(), digest_size=7).digest(), "big")
