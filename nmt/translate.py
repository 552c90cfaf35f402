"""Translate text with an artefact read from disk by fairseq's beam search; the folder holds all that it takes.

`ctranslate2_engine.py` does the same several times faster on a CPU; `engines.py` chooses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tenko.compression import attach_activations

from .artefact_model import DICTIONARY, SUBWORDS, open_artefact
from .batches import to_device
from .config import DecodeConfig
from .fairseq_bridge import EOS, Beam, batch_by_tokens, collate
from .subwords import MAX_SOURCE_TOKENS, Subwords


class Translator:
    """A model with its subwords, ready to translate.

    Args:
        model: a fairseq model with its weights.
        subwords: the sentencepiece model it was trained with.
        dict_path: its fairseq dictionary.
        direction: `en-cs` or `cs-en`.
    """

    def __init__(self, model: torch.nn.Module, subwords: Subwords, dict_path: Path, direction: str) -> None:
        self.model = model.eval()
        self.subwords, self.dict_path, self.direction = subwords, dict_path, direction
        self.tokens_produced = 0
        """Subwords of all hypotheses so far, ends of sentences included."""
        self.cut: list[int] = []
        """Which of the last sentences were cut, at `MAX_SOURCE_TOKENS`."""

    @classmethod
    def load(cls, artefact: Path | str, *, threads: int | None = None, device: str = "cpu") -> Translator:
        """Read an artefact folder (`model.safetensors`, `spm.model`, `dict.txt`).

        Args:
            artefact: the folder.
            threads: CPU threads; None leaves torch's setting.
            device: cpu or cuda.

        Raises:
            ValueError: a file is missing or damaged, or they don't fit each other; the message names it.
        """
        artefact = Path(artefact)
        if threads:
            torch.set_num_threads(threads)
        model, _, metadata = open_artefact(artefact)
        if metadata.get("activations"):  # trained with 8-bit inputs: translate with them
            try:
                attach_activations(model, metadata["activations"])
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                raise ValueError(f"{artefact}: its ranges of activations do not fit the model ({error})") from None
        subwords, direction = Subwords(artefact / SUBWORDS), metadata["direction"]  # checked when it was opened
        return cls(model.to(device), subwords, artefact / DICTIONARY, direction)

    def translate(
        self,
        sentences: Sequence[str],
        *,
        decode: DecodeConfig | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[str]:
        """Translations in the order of the sentences; an empty or blank line gives an empty line.

        Args:
            sentences: detokenized text, one sentence each.
            decode: beam search; the default is beam 4.
            progress: told (sentences done, sentences in all) after each batch.
        """
        decode = decode or DecodeConfig()
        beam = Beam(self.model, self.dict_path, decode)
        encoded = [self.subwords.encode(sentence) for sentence in sentences]
        self.cut = [index for index, ids in enumerate(encoded) if len(ids) > MAX_SOURCE_TOKENS]
        sources = [np.array([*ids[:MAX_SOURCE_TOKENS], EOS], dtype=np.int64) if ids else None for ids in encoded]
        sizes = np.array([0 if s is None else len(s) for s in sources])
        order = np.array([i for i in np.argsort(-sizes, kind="stable") if sizes[i]], dtype=np.int64)
        results = [""] * len(sentences)
        done = len(sentences) - len(order)
        if len(order) == 0:
            return results
        device = next(self.model.parameters()).device
        for batch in batch_by_tokens(order, sizes, max(decode.max_tokens, int(sizes.max())), multiple=1):
            sample: dict[str, Any] = collate([(int(i), sources[i], None) for i in batch])
            for index, ids in beam.generate(to_device(sample, device)):
                results[index] = self.subwords.decode(ids)
                self.tokens_produced += len(ids) + 1
            done += len(batch)
            if progress is not None:
                progress(done, len(sentences))
        return results
