"""A small model of a hundred made-up sentences, trained in seconds until it translates some that it never saw."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from tenko.compression import QuantizeConfig, QuantNoise, write_artefact
from tenko.nmt.config import ModelConfig
from tenko.nmt.fairseq_bridge import ModelWithLoss, build_model, collate
from tenko.nmt.subwords import EOS, Subwords, train_subwords

VERBS = {"sees": "vidí", "has": "má", "wants": "chce", "draws": "kreslí", "buys": "kupuje"}
THINGS = {"a house": "dům", "a tree": "strom", "a castle": "hrad", "the bread": "chléb", "an old table": "starý stůl"}
WHO = {"Jane": "Jana", "my brother": "můj bratr", "the young teacher": "mladý učitel", "nobody": "nikdo"}
PAIRS = [
    (f"{who} {verb} {thing}.", f"{WHO[who]} {VERBS[verb]} {THINGS[thing]}.")
    for who in WHO
    for verb in VERBS
    for thing in THINGS
]
UNSEEN = [i for i in range(len(PAIRS)) if i % 7 == 3]
# What was seen, what was not, and what makes the model guess.
LINES = [
    *[PAIRS[i][0] for i in range(0, len(PAIRS), 3)],
    *[PAIRS[i][0] for i in UNSEEN],
    "house my Jane a a sees.",
    "bread",
    "Nobody wants the old castle, my young brother draws a tree and has an old table.",
    "",
    "   ",
    "ξ sees ξ.",
]


def ids(subwords: Subwords, text: str) -> np.ndarray:
    """Token ids with </s>."""
    return np.array([*subwords.encode(text), EOS])


def write_sentence_model(folder: Path, *, int8: bool, updates: int = 150, **fields: Any) -> None:
    """Train on 86 of the 100 sentences, English to Czech, and write the artefact.

    Args:
        folder: gets the artefact.
        int8: quantized, else dense fp32.
        updates: of training.
        fields: of `ModelConfig`, over one layer of width 32 on each side.
    """
    subwords = train_subwords(lambda: (side for pair in PAIRS for side in pair), folder / "spm.model", vocab_size=110)
    subwords.write_dictionary(folder / "dict.txt")
    small = {"encoder_layers": 1, "decoder_layers": 1, "embed_dim": 32, "ffn_dim": 64, "attention_heads": 2}
    fields = {**small, "dropout": 0.0, **fields}
    torch.manual_seed(1)
    model = build_model(ModelConfig(**fields), folder / "dict.txt")
    with_loss = ModelWithLoss(model, 0.1)
    optimizer = torch.optim.Adam(model.parameters(), lr=4e-3)
    seen = [i for i in range(len(PAIRS)) if i not in UNSEEN]
    batches = [
        collate([(i, ids(subwords, PAIRS[i][0]), ids(subwords, PAIRS[i][1])) for i in seen[k::3]]) for k in range(3)
    ]
    for update in range(updates):
        sample = batches[update % 3]
        optimizer.zero_grad()
        (with_loss(sample)[0] / sample["ntokens"]).backward()
        optimizer.step()
    technique = None
    if int8:
        technique = QuantNoise(QuantizeConfig())
        technique.attach(model)
        technique.bake(model)
    metadata = {"direction": "en-cs", "model": {"arch": "transformer", **fields}}
    write_artefact(folder, model.state_dict(), metadata=metadata, technique=technique)
