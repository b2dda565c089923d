"""The second model that some token policies compare with: loaded, or made of the run's own model on the way."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from ftrun.adapters.peft_adapter import settled_warnings
from ftrun.errors import ComponentError, ConfigError, DataError
from ftrun.models.load import load_bundle
from ftrun.models.source import safe_adapter
from ftrun.runs import stagecache
from ftrun.runs.artifacts import digest, sha256
from ftrun.runs.stagecache import key_of
from ftrun.select.queries import load_rows
from ftrun.select.run import written_beside
from ftrun.select.trials.inner import InnerTraining, by_content, prepared_rows, trainable
from ftrun.tokens.base import TokenPolicy
from ftrun.training.scoring import Scoring

if TYPE_CHECKING:
    from ftrun.data.tokens import TokenTable
    from ftrun.models.bundle import Bundle
    from ftrun.training.context import Context

AUTO = "auto"
FEW_ROWS = 1000  # of which a reference learns little
LOSSES = "losses.npy"
# how the papers train their references: LoRA on all linears, 48 rows a step
LORA: dict[str, Any] = {"r": 64, "lora_alpha": 16.0, "lora_dropout": 0.1, "target_modules": "all-linear"}
BATCH_SIZE = 48
WARMUP = 0.03  # share of the steps
STEPS, SMALLEST = (
    20,
    8,
)  # steps at least of a training on few rows, and the rows of a step that it goes down to for that


@dataclass
class ComparesWithReference(TokenPolicy):
    """Base of policies that score a token by its loss under the run's model minus its loss under a reference.

    ``reference=auto`` trains the reference first: the run's model with LoRA on good rows, which is put back afterwards.
    """

    # what comes of a reference that is the run's own model
    own_reference: ClassVar[str] = "every score is 0, and the first tokens are kept"

    reference: str | None = None  # reference model: a folder, a hub id, the run folder that made it; auto: made first
    reference_path: str | None = None  # auto: file of good rows to train it on, laid out as data.path is
    reference_rows: float = 0.2  # auto, without such a file: share of the training rows, drawn at random
    reference_epochs: int = 1  # auto: passes over those rows
    reference_learning_rate: float = 1e-4  # auto: peak of that training

    def __post_init__(self) -> None:
        if not 0 < self.reference_rows <= 1:
            raise ConfigError(
                f"tokens.reference_rows is a share above 0 and up to 1, not {self.reference_rows}",
                f"tokens.reference_rows={self.reference_rows}",
            )
        for name in ("reference_epochs", "reference_learning_rate"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"tokens.{name} must be above 0", f"tokens.{name}={getattr(self, name)}")

    def excess_losses(self, table: TokenTable, ctx: Context) -> np.ndarray:
        """Loss under the run's model minus that under the reference of every trained token, (tokens,); NaN elsewhere.

        Raises ConfigError without a reference.
        """
        base = own_scoring(ctx)
        reference_losses = self.reference_losses(table, base, ctx)
        scores = base.token_nll(table, "score with the model") - reference_losses
        base.discard()
        if self.reference == AUTO and not np.nan_to_num(scores).any():
            ctx.report.warn("the reference has learned nothing, every score is 0: give it more rows, or a higher rate")
        return scores

    def reference_losses(self, table: TokenTable, base: Scoring, ctx: Context) -> np.ndarray:
        """Loss under the reference of every trained token, (tokens,); NaN elsewhere. Raises ConfigError without one."""
        if not self.reference:
            raise ConfigError(
                f"tokens={self.name} needs a reference model",  # type: ignore[attr-defined]
                todo="Set tokens.reference to a folder, a hub id, or a run folder; tokens.reference=auto trains one first.",
            )
        if self.reference == AUTO:
            rows = self._rows(table, base, ctx)
            training = short_training(len(rows), self.reference_epochs, self.reference_learning_rate, BATCH_SIZE, LORA)
            return losses_after(training, rows, table, base, ctx, f"train the reference on {len(rows):,} rows")
        path = self.reference
        reference = base.with_model(lambda: load_reference(path, base.bundle, ctx))
        if reference.bundle.fingerprint == base.bundle.fingerprint:
            ctx.report.warn(f"tokens.reference={path} is the run's own model: {self.own_reference}")
        return reference.token_nll(table, "score with the reference")

    def _rows(self, table: TokenTable, base: Scoring, ctx: Context) -> TokenTable:
        """What the reference learns."""
        if self.reference_path is not None:
            (pool,) = load_rows(ctx.settings, [self.reference_path]).pools
            return trainable(prepared_rows(pool, replace(ctx, scoring=base)).table)
        rows = drawn_rows(table, self.reference_rows, ctx.seed)
        few = " It is small, too: it may learn next to nothing." if len(rows) < FEW_ROWS else ""
        ctx.report.warn(
            f"the reference learns {len(rows):,} of the run's own rows, drawn at random; the paper takes about 10,000 "
            f"rows of high quality: name a file of good rows with tokens.reference_path.{few}"
        )
        return rows


def drawn_rows(table: TokenTable, share: float, seed: int, least: int = 1) -> TokenTable:
    """A share of the rows that have a trained token, drawn by content. Raises DataError when there are too few."""
    rows = trainable(table)
    if len(rows) < least:
        raise DataError(f"{least} rows with a trained token are needed, and there are {len(rows)}", "data.path")
    drawn = np.random.default_rng(seed).permutation(by_content(rows))
    return rows.rows(drawn[: max(least, round(share * len(rows)))])


def short_training(
    rows: int, epochs: int, learning_rate: float, batch_size: int, lora: dict[str, Any]
) -> InnerTraining:
    """A LoRA training with a linear schedule that learns something of few rows too.

    Where there are few it takes smaller steps, to make ``STEPS`` of them, and no warm-up that is less than a step. The
    size does not follow the number of processes: nor may the result.
    """
    batch_size = min(batch_size, max(SMALLEST, rows * epochs // STEPS))
    return InnerTraining(
        epochs=epochs,
        learning_rate=learning_rate,
        batch_size=batch_size,
        schedule="linear",
        warmup=WARMUP if rows * epochs * WARMUP >= batch_size else 0.0,
        lora=lora,
    )


def own_scoring(ctx: Context) -> Scoring:
    """The engine that scores with the run's own model; finished work lies in selection/token_shards until `discard`."""
    bundle = ctx.bundle
    if bundle is None:
        raise ComponentError("this token policy scores with the run's model, and no model is loaded")
    shards = ctx.out / "selection" / "token_shards"
    return Scoring(lambda: bundle, ctx.team, ctx.report, ctx.settings.select.batch_tokens, shards)


def losses_after(
    training: InnerTraining, rows: TokenTable, table: TokenTable, base: Scoring, ctx: Context, title: str
) -> np.ndarray:
    """Losses of the trained tokens of ``table`` under the model of ``base`` once it has learned ``rows``, (tokens,).

    The model itself is left as it was. The losses are kept for the next run that asks for the same.
    """
    bundle = base.bundle
    quant = ctx.settings.slots["quant"]
    what = {
        "training": asdict(training),
        "tables": [rows.fingerprint(), table.fingerprint()],
        "model": bundle.computes | {"quant": quant},
        "seed": ctx.seed,
    }
    chosen = {"quant": [quant[0]], "select": [], "picker": [], "tokens": []}
    key = key_of("reference", what, modules=[__name__, type(training).__module__], chosen=chosen)
    file = (base.shards or ctx.out / "selection") / f"reference-{key.digest}" / LOSSES
    there = stagecache.fetch(key, file.parent) if ctx.team.rank == 0 else None
    if ctx.team.gather_object(there)[0]:
        ctx.report.note("the same reference was made before: its losses are used again")
        losses = np.load(file)
    else:
        with training.trained(rows, replace(ctx, scoring=base), title) as epoch:
            losses = epoch.scoring(replace(ctx, scoring=base)).token_nll(table, "score with the reference")
        if ctx.team.rank == 0:
            with written_beside(file) as beside, beside.open("wb") as out:
                np.save(out, losses)
            stagecache.keep(key, [file])
    ctx.team.barrier()
    return losses


def load_reference(path: str, base: Bundle, ctx: Context) -> Bundle:
    """The model that ``path`` names: a folder, a hub id, or a run folder with model/ or adapter/ in it.

    It is loaded as the run's model was, quantisation included. Raises ConfigError when its tokenizer gives other ids
    than that of ``base``.
    """
    folder = Path(path).expanduser()
    if (folder / "model" / "config.json").is_file():
        reference = _load(str(folder / "model"), ctx)
    elif (folder / "adapter" / "adapter_config.json").is_file():
        reference = _with_adapter(folder / "adapter", ctx)
    elif (folder / "adapter_config.json").is_file():
        reference = _with_adapter(folder, ctx)
    elif folder.is_dir() and not (folder / "config.json").is_file():
        raise ConfigError(
            f"{folder} holds no model",
            f"tokens.reference={path}",
            "Name a folder with config.json, or a finished run with model/ or adapter/ in it.",
        )
    else:
        reference = _load(path, ctx)
    check_same_tokenizer(base, reference)
    return reference


def check_same_tokenizer(base: Bundle, reference: Bundle) -> None:
    """Raise ConfigError where a token of the base means something else, or nothing, to the reference."""
    ours, theirs = base.tokenizer.get_vocab(), reference.tokenizer.get_vocab()
    different = sorted((number, token) for token, number in ours.items() if theirs.get(token) != number)
    if different:
        number, token = different[0]
        raise ConfigError(
            f"{reference.path} has another tokenizer than {base.path}: {len(different)} of {len(ours)} tokens differ, the first is {token!r} ({number})",
            todo="Token losses can only be compared over one vocabulary: use a reference that was fine-tuned from this model.",
        )


def _load(path: str, ctx: Context, revision: str | None = None) -> Bundle:
    config = ctx.settings.model
    if path != config.path or revision:
        config = replace(config, path=path, revision=revision)
    return load_bundle(config, task="causal", quant=ctx.settings.component("quant"), device=ctx.team.device)


def _with_adapter(folder: Path, ctx: Context) -> Bundle:
    from peft import PeftModel

    about = json.loads((folder / "adapter_config.json").read_text())
    path = _base_of_run(folder.parent) or about.get("base_model_name_or_path") or ctx.settings.model.path
    bundle = _load(path, ctx, about.get("revision"))
    weights = {file.name: sha256(file) for file in sorted(folder.glob("*.safetensors"))}
    if not weights:
        raise ConfigError(f"{folder} holds no weights", str(folder), "Only safetensors are read.")
    with settled_warnings():
        model = PeftModel.from_pretrained(bundle.model, str(safe_adapter(folder)))  # type: ignore[arg-type]
    return replace(bundle, model=model.eval(), path=str(folder), fingerprint=digest([bundle.fingerprint, weights]))


def _base_of_run(run: Path) -> str | None:
    """model.path of a run folder's config."""
    from omegaconf import OmegaConf

    file = run / "config.yaml"
    return OmegaConf.load(file).model.path if file.is_file() else None  # type: ignore[union-attr]
