"""Chat models that answer questions about rows: the scoring model, or any OpenAI-compatible address."""

from __future__ import annotations

import http.client
import json
import math
import os
import threading
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

import torch

from ftrun.data.batches import collate
from ftrun.errors import ComponentError, ConfigError, DataError
from ftrun.models.generation import Writer
from ftrun.runs.artifacts import digest, disk_guard
from ftrun.training.scoring import Scoring, segments

if TYPE_CHECKING:
    from ftrun.models.bundle import Bundle
    from ftrun.runs.progress import Task

KEY_VARIABLE = "FTRUN_CHOOSER_KEY"
AGAIN = (408, 409, 425, 429, 500, 502, 503, 504)  # what a server answers when it may work later
LONGEST_WAIT = 60.0  # seconds
EXCERPT = 200  # characters of a server's answer in an error


class Chooser(Protocol):
    """Answers a question that offers options labelled with letters."""

    def answer(self, question: str, letters: list[str]) -> str:
        """The answer as text; ``letters`` are the labels of the options."""
        ...


class Answers:
    """Answers of a chooser, each written to ``file`` at once: a run that was killed does not ask again. Thread-safe."""

    def __init__(self, chooser: Chooser, file: Path | None, task: Task):
        self.chooser, self.file, self.task = chooser, file, task
        self.lock = threading.Lock()
        self.known = self._read()

    def of(self, question: str, letters: list[str]) -> str:
        key = digest(question)
        answer = self.known.get(key)
        if answer is None:
            answer = self.chooser.answer(question, letters)
            self._keep(key, answer)
        with self.lock:
            self.task.advance()
        return answer

    def _keep(self, key: str, answer: str) -> None:
        with self.lock:
            self.known[key] = answer
            if self.file is not None:
                with disk_guard(self.file):
                    self.file.parent.mkdir(parents=True, exist_ok=True)
                    with self.file.open("a", encoding="utf-8") as lines:
                        lines.write(json.dumps([key, answer]) + "\n")

    def _read(self) -> dict[str, str]:
        if self.file is None or not self.file.is_file():
            return {}
        lines = self.file.read_text(encoding="utf-8").split("\n")
        return dict(json.loads(line) for line in lines[:-1])  # what follows the last line break was cut off by a kill


@dataclass
class LocalChooser:
    """The scoring model. ``generate``: it writes an answer, greedily; ``letter``: the likeliest label, always valid."""

    scoring: Scoring
    max_new_tokens: int
    way: Literal["generate", "letter"] = "generate"

    def answer(self, question: str, letters: list[str]) -> str:
        bundle = self.scoring.bundle
        prompt = self._prompt(bundle, question)
        room = self.max_new_tokens if self.way == "generate" else 4
        if len(prompt) + room > bundle.context_length:
            raise DataError(
                f"a question of {len(prompt)} tokens and an answer of {room} do not fit into the "
                f"{bundle.context_length} that {bundle.path} attends to",
                todo="Lower select.picker.shown, .options, .row_length or .max_new_tokens.",
            )
        return self._letter(bundle, prompt, letters) if self.way == "letter" else self._generate(bundle, prompt)

    def _prompt(self, bundle: Bundle, question: str) -> list[int]:
        tokenizer = bundle.tokenizer
        if not tokenizer.chat_template:
            return tokenizer(question + "\n").input_ids
        message = [{"role": "user", "content": question}]
        text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        return tokenizer(text, add_special_tokens=False).input_ids

    @torch.no_grad()
    def _generate(self, bundle: Bundle, prompt: list[int]) -> str:
        ends, training = _ends(bundle), bundle.model.training
        bundle.model.eval()
        try:
            ids = Writer(max_new_tokens=self.max_new_tokens).generate(bundle, [prompt], ends, seed=0)[0]
        finally:
            bundle.model.train(training)
        return bundle.tokenizer.decode([token for token in ids if token not in ends], skip_special_tokens=True)

    @torch.no_grad()
    def _letter(self, bundle: Bundle, prompt: list[int], letters: list[str]) -> str:
        """The label with the highest probability behind an opening bracket; of equal ones the first."""
        tokenizer = bundle.tokenizer
        opened = [*prompt, *tokenizer("[", add_special_tokens=False).input_ids]
        labels = [tokenizer(letter, add_special_tokens=False).input_ids[0] for letter in letters]
        batch = collate(segments([(opened, labels[:1])]), [[0]], bundle.pad_id).to(bundle.device)
        training = bundle.model.training
        bundle.model.eval()
        try:
            state = bundle.architecture.hidden_states(bundle.model, batch)[batch.predicting]
            logits = bundle.architecture.head(bundle.model).logits(state)[0]
        finally:
            bundle.model.train(training)
        return f"[{letters[int(logits[labels].argmax())]}]"


@dataclass
class RemoteChooser:
    """A model behind an OpenAI-compatible address; the key is read from FTRUN_CHOOSER_KEY, if it is set."""

    url: str
    model: str
    max_new_tokens: int
    timeout: float  # seconds that a request may take
    attempts: int = 6  # of one request, where the server is busy or out of reach
    first_wait: float = 1.0  # seconds before the second attempt; doubled for each further one
    key: str | None = field(default_factory=lambda: os.environ.get(KEY_VARIABLE) or None, repr=False)

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise ConfigError(
                "select.picker.chooser_url is an address such as http://localhost:8000/v1",
                f"select.picker.chooser_url={self.url}",
            )
        self.address = self.url.rstrip("/")
        if not self.address.endswith("/chat/completions"):
            self.address += "/chat/completions"

    def answer(self, question: str, letters: list[str]) -> str:
        """The model's answer at temperature 0. Raises ComponentError when the server refuses or stays out of reach."""
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": question}],
            "temperature": 0,
            "max_tokens": self.max_new_tokens,
        }
        reply = self._post(json.dumps(body).encode())
        try:
            content = json.loads(reply)["choices"][0]["message"]["content"]
        except (ValueError, LookupError, TypeError):
            excerpt = reply[:EXCERPT].decode(errors="replace")
            raise ComponentError(
                f"the chooser's answer is not that of a chat completion: {excerpt}", self.address
            ) from None
        return content if isinstance(content, str) else ""

    def _post(self, body: bytes) -> bytes:
        headers = {"Content-Type": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        problem = ""
        for attempt in range(self.attempts):
            wait = min(LONGEST_WAIT, self.first_wait * 2**attempt)
            request = urllib.request.Request(self.address, body, headers)
            try:
                with urllib.request.urlopen(request, timeout=self.timeout) as response:
                    return response.read()
            except urllib.error.HTTPError as error:
                problem = f"HTTP {error.code}: {error.read(EXCERPT).decode(errors='replace') or error.reason}"
                if error.code not in AGAIN:
                    raise ComponentError(
                        f"the chooser refuses: {problem}", self.address, self._advice(error.code)
                    ) from None
                wait = _asked_wait(error.headers.get("Retry-After"), wait)
            except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
                problem = str(getattr(error, "reason", error)) or type(error).__name__
            if attempt + 1 < self.attempts:
                time.sleep(wait)
        raise ComponentError(
            f"the chooser cannot be reached, {self.attempts} attempts: {problem}",
            self.address,
            "Start it, or raise select.picker.timeout; run the same command again to go on from the answers so far.",
        )

    def _advice(self, code: int) -> str:
        if code in (401, 403):
            return f"Put its key into the environment variable {KEY_VARIABLE}."
        return f"Check select.picker.chooser_url and select.picker.chooser_model={self.model}."


def _ends(bundle: Bundle) -> list[int]:
    """Tokens that tokenizer or model call an end."""
    named = getattr(getattr(bundle.model, "generation_config", None), "eos_token_id", None)
    ends = [bundle.tokenizer.eos_token_id, *(named if isinstance(named, list) else [named])]
    return sorted({end for end in ends if end is not None})


def _asked_wait(header: str | None, otherwise: float) -> float:
    """Seconds that a server asks to wait, at most LONGEST_WAIT."""
    try:
        asked = float(header) if header else otherwise
    except ValueError:  # a date
        return otherwise
    return min(LONGEST_WAIT, asked) if math.isfinite(asked) and asked >= 0 else otherwise
