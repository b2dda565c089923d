"""A small network that learns to tell from a text what training on it would bring."""

from __future__ import annotations

import copy
import hashlib
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ftrun.training.gradients import backward

CHANNELS, HIDDEN, DROPOUT = 256, 32, 0.1
TOKENS_AT_ONCE = 8192  # padded; a batch of long texts is cut, which changes nothing but the draws of dropout


class SecondaryLearner(nn.Module):
    """Embeddings -> convolution over three tokens -> highest value over time -> three linear layers without activation.

    The embeddings start as those of the model. Only the classes in ``known``, which the training texts hold, can change.
    """

    def __init__(self, embedding: Tensor, known: np.ndarray):
        super().__init__()
        self.base = embedding.detach()  # (vocabulary, width)
        classes = torch.from_numpy(known.astype(np.int64)).to(self.base.device)
        self.place = torch.full((len(self.base),), -1, device=self.base.device)
        self.place[classes] = torch.arange(len(classes), device=self.base.device)
        self.embedding = nn.Embedding.from_pretrained(self.base[classes].float(), freeze=False)
        self.convolution = nn.Conv1d(self.base.shape[1], CHANNELS, 3, padding=1)
        self.layers = nn.Sequential(
            nn.Linear(CHANNELS, HIDDEN), nn.Dropout(DROPOUT), nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, 1)
        )
        self.to(self.base.device)

    def forward(self, ids: Tensor, real: Tensor) -> Tensor:
        """One number a text, (texts,), from token ids (texts, time); padding, where ``real`` is False, has no say."""
        place = self.place[ids]
        own = self.embedding(place.clamp(min=0))
        vectors = torch.where((place >= 0)[..., None], own, F.embedding(ids, self.base).float())
        channels = self.convolution((vectors * real[..., None]).transpose(1, 2))
        pooled = channels.masked_fill(~real[:, None], -torch.inf).amax(2)
        return self.layers(pooled).squeeze(1)

    def fingerprint(self) -> str:
        """Hash of all that was learned."""
        digest = hashlib.blake2b(digest_size=8)
        for tensor in self.state_dict().values():
            digest.update(tensor.cpu().numpy().tobytes())
        return digest.hexdigest()


@dataclass
class Fit:
    """How the learner was made."""

    epochs: int
    batch_size: int
    learning_rate: float
    held: int  # the first texts, which choose the epoch that is kept

    def train(self, learner: SecondaryLearner, texts: list[np.ndarray], targets: np.ndarray) -> float:
        """Learn ``targets`` (texts,) by mean squared error with Adam; returns the lowest error on the held-out texts."""
        optimizer = torch.optim.Adam(learner.parameters(), lr=self.learning_rate)
        wanted = torch.from_numpy(targets.astype(np.float32)).to(learner.base.device)
        trained = np.arange(self.held, len(texts))
        best, kept = float("inf"), copy.deepcopy(learner.state_dict())
        for _ in range(self.epochs):
            learner.train()
            order = trained[torch.randperm(len(trained)).numpy()]
            for start in range(0, len(order), self.batch_size):
                batch = order[start : start + self.batch_size]
                optimizer.zero_grad(set_to_none=True)
                for part in _parts(texts, batch):
                    error = (learner(*padded(texts, part, learner.base.device)) - wanted[part]).square().sum()
                    backward(error / len(batch))
                optimizer.step()
            error = self.error(learner, texts, wanted)
            if error < best:
                best, kept = error, copy.deepcopy(learner.state_dict())
        learner.load_state_dict(kept)
        return best

    @torch.no_grad()
    def error(self, learner: SecondaryLearner, texts: list[np.ndarray], wanted: Tensor) -> float:
        """Mean squared error on the held-out texts."""
        learner.eval()
        total = 0.0
        for part in _parts(texts, np.arange(self.held)):
            total += float((learner(*padded(texts, part, learner.base.device)) - wanted[part]).square().sum())
        return total / self.held


def padded(texts: list[np.ndarray], places: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids of these texts, (texts, time), and which of them are real."""
    chosen = [torch.from_numpy(texts[place].astype(np.int64)) for place in places.tolist()]
    ids = nn.utils.rnn.pad_sequence(chosen, batch_first=True)
    lengths = torch.tensor([len(text) for text in chosen])
    return ids.to(device), (torch.arange(ids.shape[1]) < lengths[:, None]).to(device)


def _parts(texts: list[np.ndarray], batch: np.ndarray) -> list[np.ndarray]:
    longest = max(len(texts[place]) for place in batch.tolist())
    return np.split(batch, range(max(1, TOKENS_AT_ONCE // longest), len(batch), max(1, TOKENS_AT_ONCE // longest)))
