"""Token-selective difficulty, averaged over noisy neighbours."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
import torch
from torch import nn

from ftrun.errors import ComponentError, ConfigError
from ftrun.registry import register
from ftrun.select.base import Scorer, Table
from ftrun.select.scoring.quantiles import percentile, rows_on_disk
from ftrun.select.scoring.texts import Turns, read_turns
from ftrun.select.scoring.token_scores import Scored, write_token_scores
from ftrun.training.scoring import aligned_batch, nll_of_batch, segments

if TYPE_CHECKING:
    from ftrun.data.batches import Batch
    from ftrun.data.pool import Pool
    from ftrun.models.bundle import Bundle
    from ftrun.training.context import Context


@register("select", "tshirt")
@dataclass
class Tshirt(Scorer):
    """IFD over the tokens that the instruction moves, stable under noise (Fu et al., 2025, "T-SHIRT", arXiv:2506.01317).

    Copy j of a row of L tokens gets noise E_j ~ U(-1, 1) * alpha / sqrt(L C) on its embeddings, of width C; the pass
    without the prompt carries the same E_j on the response. d_t = nll(y_t | y_<t, x) - nll(y_t | y_<t) for every
    response token but the first, and tau is the (100 - k)th percentile of |d_t| over all tokens of all copies of the
    whole pool.

    S-IFD_j = exp(mean of d_t over the tokens with |d_t| > tau), 1 where there is none. A row's ``s_ifd`` is the mean
    over its copies, ``s_ifd_std`` their standard deviation, ``ifd`` the mean of ppl(y | x) / ppl(y). Rows with an
    ``ifd`` of 1 and more are left out. A row with several answers gets the mean over its answers.

    Noise follows from the content of a row, so that neither order nor batches change a score. The d_t of one copy at a
    time are in memory. All of them lie in a file in the run folder, 4 bytes a token and copy, and once more in the
    shards from which a killed scoring goes on: for a million rows of 100 response tokens and 30 copies 2 x 12 GB.
    token_scores.parquet keeps of every token the mean of d_t over the copies, and the share of them in which it counts.
    """

    copies: int = 30  # noisy neighbours of every row
    alpha: float = 5.0  # size of the noise; at most its Frobenius norm
    k: float = 50.0  # share of all tokens that count, in percent: those with the largest |d|
    template: Literal["alpaca", "plain", "chat"] = "plain"  # layout of the prompt; plain: lines without any markup
    max_length: int = 1024  # tokens of prompt and response that are scored

    column: ClassVar[str] = "s_ifd"
    own_picker: ClassVar[str] = "steady"

    def __post_init__(self) -> None:
        if self.copies < 1:
            raise ConfigError("tshirt needs at least one copy of a row", f"select.copies={self.copies}")
        if not 0 <= self.k <= 100:
            raise ConfigError("a share in percent lies between 0 and 100", f"select.k={self.k:g}")
        if not self.max_length > 0:
            raise ConfigError("max_length must be above 0", f"select.max_length={self.max_length}")

    @property
    def passes(self) -> float:  # type: ignore[override]
        return 2.0 * self.copies  # with and without the prompt: at most

    def score(self, pool: Pool, ctx: Context) -> dict[str, np.ndarray]:
        """Mean and spread of S-IFD and the mean IFD, (rows,) each; NaN without a response of two tokens."""
        turns = read_turns(pool, ctx, self.template)
        kept = [y[: max(0, self.max_length - len(x))] for x, y in zip(turns.prompt, turns.response, strict=True)]
        scored = np.array([turn for turn, response in enumerate(kept) if len(response) > 1], np.int64)
        self._explain(turns, kept, len(pool), ctx)
        columns = {name: np.full(len(kept), np.nan) for name in ("s_ifd", "s_ifd_std", "ifd")}
        if len(scored):
            texts = [(turns.prompt[turn], kept[turn]) for turn in scored.tolist()]
            places = zip(pool.ids[turns.row[scored]].tolist(), turns.starts[scored].tolist(), strict=True)
            s_ifd, ifd = self._copies(texts, turns.answer_mark, places, ctx)
            columns["s_ifd"][scored], columns["s_ifd_std"][scored] = s_ifd.mean(0), s_ifd.std(0)
            columns["ifd"][scored] = ifd.mean(0)
        return {name: turns.row_mean(values, len(pool)) for name, values in columns.items()}

    def keep(self, table: Table) -> np.ndarray:
        return table.columns["ifd"] < 1

    def _copies(
        self, texts: list[tuple[list[int], list[int]]], mark: list[int], places: Iterable[tuple[int, int]], ctx: Context
    ) -> tuple[np.ndarray, np.ndarray]:
        """S-IFD and IFD of every noisy copy of every text (prompt, response), (copies, texts) each.

        ``places``: of every text the id of its row, and where in the row it starts.
        """
        table = segments(texts)
        counts = np.array([len(response) - 1 for _, response in texts])
        ends = np.cumsum(counts)
        ifd = np.empty((self.copies, len(texts)))
        with rows_on_disk(self.copies, int(ends[-1]), ctx.out) as gaps:
            for copy in range(self.copies):
                noisy = NoisyCopy(copy, self.alpha, ctx.seed, mark)
                found = ctx.scorer.measure(
                    table, noisy.name, noisy.measure, f"score noisy copy {copy + 1} of {self.copies}", packable=True
                )
                ifd[copy] = [math.exp(float(one[0]) - float(one[1])) for one in found]
                gaps[copy] = np.concatenate([one[2:] for one in found])
                ctx.scorer.forget(noisy.name)
            tau = percentile(gaps, 100 - self.k)
            ctx.report.note(f"tau = {tau:.4g}: tokens that the prompt moves further count")
            s_ifd = np.stack([selective_ifd(gaps[copy], ends - counts, tau) for copy in range(self.copies)])
            write_token_scores(scored_tokens(texts, places, gaps, tau), ctx)
        return s_ifd, ifd

    def _explain(self, turns: Turns, kept: list[list[int]], rows: int, ctx: Context) -> None:
        """Say why rows stay without a score, and how many were scored in part."""
        reasons = dict.fromkeys(range(rows), "no response")
        for row, prompt, response in zip(turns.row.tolist(), turns.prompt, kept, strict=True):
            if len(response) > 1:
                reasons[row] = ""
            elif reasons[row]:
                full = len(prompt) + 1 >= self.max_length
                reasons[row] = (
                    f"the prompt fills max_length={self.max_length}" if full else "a one-token response has no gap"
                )
        ctx.scorer.reasons |= {row: reason for row, reason in reasons.items() if reason}
        cut = sum(len(part) < len(whole) for part, whole in zip(kept, turns.response, strict=True))
        if cut:
            ctx.report.note(f"{cut} of {len(kept)} responses are scored up to max_length={self.max_length} only")


def selective_ifd(gaps: np.ndarray, starts: np.ndarray, tau: float) -> np.ndarray:
    """exp(mean of the gaps further from 0 than tau) of each text, (texts,); 1 where there is none."""
    counted = np.abs(gaps) > tau
    total = np.add.reduceat(np.where(counted, gaps, 0).astype(np.float64), starts)
    count = np.add.reduceat(counted.astype(np.int64), starts)
    return np.exp(np.divide(total, count, out=np.zeros(len(starts)), where=count > 0))


def scored_tokens(
    texts: list[tuple[list[int], list[int]]], places: Iterable[tuple[int, int]], gaps: np.ndarray, tau: float
) -> Iterator[Scored]:
    """Of every response token but the first, the mean of its gaps (copies, tokens), and the share of them beyond tau."""
    end = 0
    for (prompt, response), (row, start) in zip(texts, places, strict=True):
        begin, end = end, end + len(response) - 1
        found = gaps[:, begin:end]
        position = np.arange(len(prompt) + 1, len(prompt) + len(response))
        yield Scored(row, start, position, np.array(response[1:]), found.mean(0), (np.abs(found) > tau).mean(0))


@dataclass
class NoisyCopy:
    """Measures one noisy copy: mean loss with prompt, mean loss without, then d of every response token but the first."""

    copy: int
    alpha: float
    seed: int
    mark: list[int]  # token ids that stand before a response without its prompt

    @property
    def name(self) -> str:
        given = hashlib.blake2b(f"{self.alpha!r} {self.seed} {self.mark}".encode(), digest_size=6).hexdigest()
        return f"tshirt-{given}-{self.copy}"

    def measure(self, bundle: Bundle, batch: Batch) -> list[np.ndarray]:
        texts, noises, width = [], [], bundle.architecture.width
        for prompt, response in read_batch(batch):
            texts.append((self.mark, response))
            noises.append(noise(prompt, response, width, self.alpha, (self.copy, self.seed)))
        direct = aligned_batch(segments(texts), list(range(len(texts))), len(batch.input_ids) == 1, bundle)
        tails = [drawn[-len(self.mark) - len(response) :] for drawn, (_, response) in zip(noises, texts, strict=True)]
        with added_noise(bundle, batch, noises):
            conditional = nll_of_batch(bundle, batch)
        with added_noise(bundle, direct, tails):
            alone = nll_of_batch(bundle, direct)
        measured = []
        for (_, response), with_prompt, without in zip(texts, conditional, alone, strict=True):
            gaps = with_prompt[1 - len(response) :] - without[1 - len(response) :]
            means = [with_prompt.mean(dtype=np.float64), without.mean(dtype=np.float64)]
            measured.append(np.concatenate([means, gaps]))
        return measured


def noise(prompt: list[int], response: list[int], width: int, alpha: float, number: tuple[int, int]) -> np.ndarray:
    """Uniform noise for the embeddings of prompt and response, (tokens, width) float32, at most ``alpha`` in norm.

    It follows from the token ids and ``number`` (the copy, the seed) alone.
    """
    content = f"{prompt}{response}{number}".encode()
    key = int.from_bytes(hashlib.blake2b(content, digest_size=16).digest(), "little")
    shape = (len(prompt) + len(response), width)
    drawn = np.random.Generator(np.random.Philox(key=key)).random(shape, dtype=np.float32)
    return (2 * drawn - 1) * np.float32(alpha / math.sqrt(drawn.size))


def read_batch(batch: Batch) -> Iterator[tuple[list[int], list[int]]]:
    """Token ids of every sequence: what stands before the tokens asked for, and those."""
    real = batch.sequence >= 0
    ids = batch.input_ids[real].cpu().numpy()
    asked = (batch.loss_weight[real] > 0).cpu().numpy()
    lengths = torch.bincount(batch.sequence[real], minlength=batch.sequences).cpu().numpy()
    for end, length in zip(np.cumsum(lengths).tolist(), lengths.tolist(), strict=True):
        part = slice(end - length, end)
        yield ids[part][~asked[part]].tolist(), ids[part][asked[part]].tolist()


@contextmanager
def added_noise(bundle: Bundle, batch: Batch, noises: list[np.ndarray]) -> Iterator[None]:
    """Token embeddings of this batch come out with noise, (tokens, width) for each sequence, padding without."""
    real = batch.sequence >= 0
    total = torch.zeros(*real.shape, noises[0].shape[1], device=real.device)
    total[real] = torch.from_numpy(np.concatenate(noises)).to(real.device)

    applied = False

    def add(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor | None:
        nonlocal applied
        if inputs[0].data_ptr() != batch.input_ids.data_ptr():
            return None  # not this batch: the first packed one has the model tried on a few tokens
        applied = True
        return output + total.to(output.dtype)

    embedding = bundle.model.get_input_embeddings()  # type: ignore[operator]
    hook = embedding.register_forward_hook(add)
    try:
        yield
    finally:
        hook.remove()
    if not applied:
        raise ComponentError(f"{bundle.path} does not look its tokens up as they come: tshirt cannot add noise to them")
