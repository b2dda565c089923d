"""Tokens coloured by their loss weight: in the report's section on token methods, and in the preview."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ftrun.reporting.histograms import histogram
from ftrun.reporting.markup import Markup, tag
from ftrun.reporting.run import Run
from ftrun.reporting.tokenchoice import choice_tables

if TYPE_CHECKING:
    from tokenizers import Tokenizer

ROWS = 4  # coloured rows in the report
TOKENS = 400  # tokens of a coloured row


def level(weight: float, top: float = 1.0) -> int:
    """Shade of a weight: 0 not trained, 1 (least) to 5 (``top`` and more)."""
    return 0 if not weight > 0 else min(5, 1 + int(4 * min(weight / top, 1.0) + 1e-9))


def token_markup(token: str, weight: float, hint: str = "", top: float = 1.0) -> Markup:
    """One token: shade by weight, white space and special tokens made visible."""
    parts: list[Markup | str] = []
    for index, piece in enumerate(token.split("\n")):
        if index:
            parts.append(tag("i", "↵", class_="mark"))
            parts.append("\n")
        parts.append(piece.replace("\t", "⇥"))
    words = f"weight {weight:g}" + (f", {hint}" if hint else "")
    special = " special" if is_special(token) else ""
    return tag("span", *parts, class_=f"t w{level(weight, top)}{special}", title=words)


def is_special(token: str) -> bool:
    """Whether a token looks like a marker such as ``<|im_end|>``, ``<s>`` or ``[SEP]`` and not like text."""
    bare = token.strip()
    return re.fullmatch(r"<[|/]?\w[^\s<>]*>|\[[A-Z]+\d*\]", bare) is not None


def legend(top: float = 1.0, shades: bool = True) -> Markup:
    """The shades and what they stand for; without ``shades`` a token is trained or not."""
    words = ["not trained", *(f"{top * share:g}" for share in (0.2, 0.4, 0.6, 0.8)), f"weight {top:g}"]
    looks = {word: index for index, word in enumerate(words)} if shades else {"not trained": 0, "trained": 5}
    samples = [tag("span", word, class_=f"t w{look}") for word, look in looks.items()]
    return tag("p", *(Markup(f"{sample} ") for sample in samples), class_="note legend")


def weights_section(run: Run) -> Markup | None:
    """Distribution of the weights and a few coloured rows; None without a token method."""
    columns = run.tokens
    if not {"id", "weight"} <= columns.keys() or not len(columns["id"]):
        return None
    weight = columns["weight"].astype(float)
    trained = weight > 0
    scored = np.isfinite(columns["score"].astype(float)) if "score" in columns else np.zeros(len(weight), bool)
    asked = int(scored.sum()) if (scored | ~trained).all() and scored.any() else len(weight)
    words = [
        tag("strong", f"{int(trained.sum()):,} of {asked:,} {'scored ' * (asked < len(weight))}tokens"),
        f" are trained ({trained.sum() / asked:.1%}).",
        f" With the prompts the rows have {len(weight):,} tokens." if asked < len(weight) else None,
    ]
    parts = [tag("p", *words)]
    shades = len(np.unique(weight[:100_000])) > 2
    if shades:
        parts.append(
            _figure(
                histogram(weight[trained], None, "histogram of loss weights", "loss weight", height=170, unit="tokens"),
                "Loss weight of every trained token.",
            )
        )
    if scored.any():
        scores = columns["score"].astype(float)
        parts.append(
            _figure(
                histogram(scores, trained, "histogram of token scores", "score", height=190, unit="tokens"),
                "Score of every token; trained tokens stand out.",
            )
        )
    parts += choice_tables(run)
    identities = np.unique(columns["id"])
    chosen = identities[np.unique(np.linspace(0, len(identities) - 1, ROWS).astype(int))]
    shown = run.token_rows(chosen.tolist())
    if "token" in shown:
        top = max(1.0, float(np.percentile(weight[trained], 95))) if trained.any() else 1.0
        parts += [legend(top, shades), *(_coloured(shown, identity, top, run.tokenizer) for identity in chosen)]
    return Markup("".join(parts))


def _coloured(columns: dict[str, np.ndarray], identity: int, top: float, tokenizer: Tokenizer | None) -> Markup:
    at = np.flatnonzero(columns["id"] == identity)
    if "position" in columns:
        at = at[np.argsort(columns["position"][at], kind="stable")]
    kept, weight = at[:TOKENS], columns["weight"].astype(float)
    tokens = [
        token_markup(token_text(columns["token"][i], tokenizer), float(weight[i]), hint, top)
        for i, hint in zip(kept, _hints(columns, kept), strict=True)
    ]
    cut = [tag("span", f" … {len(at) - len(kept):,} more tokens", class_="muted")] if len(at) > len(kept) else []
    head = f"row {identity} · {len(at):,} tokens, {int((weight[at] > 0).sum()):,} trained"
    return tag("div", tag("div", head, class_="muted head"), tag("div", *tokens, *cut, class_="tokens"), class_="row")


def _hints(columns: dict[str, np.ndarray], at: np.ndarray) -> Sequence[str]:
    if "score" not in columns:
        return [""] * len(at)
    return [f"score {float(columns['score'][i]):.4g}" for i in at]


def token_text(token: Any, tokenizer: Tokenizer | None) -> str:
    """The token as text; an id that no tokenizer explains is bracketed."""
    if isinstance(token, str):
        return token
    piece = tokenizer.id_to_token(int(token)) if tokenizer else None
    if tokenizer is None or piece is None:
        return f"⟨{token}⟩"
    text = tokenizer.decode([int(token)], skip_special_tokens=False)
    # decoders of the sentencepiece kind drop the space in front of a text's first word
    return f" {text}" if piece.startswith("▁") and not text.startswith(" ") else text


def _figure(plot: Markup, caption: str) -> Markup:
    return tag("figure", plot, tag("figcaption", caption))
