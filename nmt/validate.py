"""Validation while training: loss on the held-out split, BLEU on its first sentences, shared by the ranks."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from . import distributed, precision
from .batches import fixed_batches, to_device
from .config import TrainConfig
from .corpus import Corpus
from .evaluate import corpus_bleu
from .fairseq_bridge import Beam, ModelWithLoss, collate
from .subwords import Subwords


@dataclass(frozen=True)
class Validation:
    """What a validation found; the same on all ranks."""

    nll: float
    """Negative log-likelihood of a target token, in nats."""
    bleu: float
    """sacreBLEU, detokenized, of the first `valid_sentences` sentences."""
    signature: str
    """sacreBLEU's signature."""


@dataclass
class Best:
    """The best validation so far, and how long ago it was."""

    bleu: float = -1.0
    update: int = 0
    since: int = 0
    """Validations without a better BLEU, or perplexity."""
    nll: float = math.inf
    """Breaks ties of BLEU, for instance while that is still 0."""

    def take(self, result: Validation, update: int, by: str) -> bool:
        """Hold a validation against the best; True if it is now the best itself.

        Args:
            result: of the validation.
            update: after which it was made.
            by: bleu or perplexity.
        """
        if by == "perplexity":
            better = improved = result.nll < self.nll
        else:
            improved = result.bleu > self.bleu
            better = (result.bleu, -result.nll) > (self.bleu, -self.nll)
        self.since = 0 if improved else self.since + 1
        if better:
            self.bleu, self.update, self.nll = result.bleu, update, result.nll
        return better


class Validator:
    """Validates the model as it is, on every rank at once.

    Args:
        model: the fairseq model that is being trained.
        corpus: gives the split `valid`.
        direction: `en-cs` or `cs-en`.
        config: sentences, batches and beam.
        on_batch: called after each batch of this rank.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        corpus: Corpus,
        direction: str,
        config: TrainConfig,
        on_batch: Callable[[], None] = lambda: None,
    ) -> None:
        self.model, self.config, self.on_batch = model, config, on_batch
        self.shards = corpus.split("valid")
        self.source, self.target = direction.split("-")
        self.direction = direction
        texts = dict(zip(("en", "cs"), corpus.text("valid"), strict=True))
        self.references = texts[self.target][: config.valid_sentences]
        self.subwords = Subwords(corpus.spm_path)
        self.dict_path = corpus.dict_path
        self.device = next(model.parameters()).device
        self.precision = precision.resolve(config.precision, self.device)

    def __call__(self) -> Validation:
        self.model.eval()
        nll = self.nll()
        hypotheses = self._translate()
        bleu = corpus_bleu(hypotheses, self.references)
        return Validation(nll, bleu.score, bleu.signature)

    @torch.no_grad()
    def nll(self) -> float:
        """Of a target token of the split, in nats, by the model as evaluation sees it."""
        with_loss = ModelWithLoss(self.model, 0.0).eval()
        total, tokens = 0.0, 0
        for batch in self._batches(self.config.max_tokens):
            sample = collate([self._pair(i) for i in batch])
            with precision.autocast(self.precision, self.device):
                _, nll = with_loss(to_device(sample, self.device))
            total += nll.item()
            tokens += sample["ntokens"]
            self.on_batch()
        total, summed = distributed.sum_over_ranks([total, tokens], self.device)
        return total / max(summed, 1)

    def _translate(self) -> list[str]:
        beam = Beam(self.model, self.dict_path, self.config.decode)
        mine: list[tuple[int, str]] = []
        for batch in self._batches(self.config.decode.max_tokens):
            kept = [i for i in batch if i < len(self.references)]
            if kept:
                sample = collate([(i, self.shards.tokens(self.source, i), None) for i in kept])
                found = beam.generate(to_device(sample, self.device))
                mine += [(index, self.subwords.decode(ids)) for index, ids in found]
                self.on_batch()
        hypotheses = [""] * len(self.references)
        for part in distributed.gather_json(mine, self.device):
            for index, text in part:
                hypotheses[index] = text
        return hypotheses

    def _batches(self, max_tokens: int) -> list[list[int]]:
        batches = fixed_batches(self.shards, self.direction, max_tokens, distributed.rank(), distributed.world_size())
        return [[int(i) for i in batch] for batch in batches]

    def _pair(self, index: int) -> tuple[int, np.ndarray, np.ndarray]:
        return index, self.shards.tokens(self.source, index), self.shards.tokens(self.target, index)
