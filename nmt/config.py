"""The settings of data, model and training, as frozen dataclasses.

Light on purpose: nothing here imports torch or fairseq, so a recipe is checked as a whole in milliseconds.
A bad value raises `ValueError("key: what is wrong; valid choices")`; the recipe reader puts file and line before it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

DIRECTIONS = ("en-cs", "cs-en")


def require(condition: bool, key: str, message: str) -> None:
    """Raise `ValueError("key: message")` unless `condition` holds; for `__post_init__` of configurations."""
    if not condition:
        raise ValueError(f"{key}: {message}")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    train: str | dict[str, str] = "embedded"
    """`embedded` (the corpus that ships with tenko), one TSV file whose first two columns are English and Czech, or
    `{en: FILE, cs: FILE}`, two aligned files of one sentence a line. Plain, .gz, .xz or .zst, UTF-8."""
    valid: str | dict[str, str] | None = None
    """Sentences to validate on, same forms as `train`; null holds out `valid_size` pairs of `train`."""
    test: str | dict[str, str] | None = None
    """Sentences for the final BLEU, same forms; null holds out `test_size` pairs of `train`."""
    valid_size: int = 500
    """About how many pairs to hold out when `valid` is null, chosen by a hash of the normalised source."""
    test_size: int = 1000
    """The same for `test`."""
    vocab_size: int = 4000
    """Size of the joint sentencepiece BPE vocabulary, special symbols included; of no effect with `subwords`."""
    subwords: str | None = None
    """A sentencepiece model (fairseq's special symbols first, as tenko writes it) to use instead of training one; null
    trains one, or takes that of the stage pretrained, if it stands first."""
    max_tokens_per_sentence: int = 128
    """Pairs with a side of more subwords are dropped."""
    max_ratio: float = 3.0
    """Pairs whose lengths in characters differ by a larger factor are dropped."""
    cache: str = "runs/data"
    """Folder of binarized corpora, named by the hash of their inputs; runs with the same inputs share one."""

    def __post_init__(self) -> None:
        for key in ("train", "valid", "test"):
            value = getattr(self, key)
            if isinstance(value, dict):
                require(set(value) == {"en", "cs"}, key, f"needs the keys en and cs, has {sorted(value) or 'none'}")
        require(self.valid_size > 0, "valid_size", f"must be at least 1, is {self.valid_size}")
        require(self.test_size > 0, "test_size", f"must be at least 1, is {self.test_size}")
        require(64 <= self.vocab_size <= 1_000_000, "vocab_size", f"must be 64 to 1000000, is {self.vocab_size}")
        require(self.max_tokens_per_sentence >= 2, "max_tokens_per_sentence", "must be at least 2")
        require(self.max_ratio > 1, "max_ratio", f"must be above 1, is {self.max_ratio}")


FEWEST_POSITIONS = 1024
"""Of a learned table of positions: longest sentence that is translated, and fairseq's default."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    arch: str = "transformer"
    """A fairseq architecture of its `transformer` model, for instance transformer, transformer_iwslt_de_en,
    transformer_wmt_en_de (base), transformer_vaswani_wmt_en_de_big. What is null below is what it says."""
    encoder_layers: int | None = None
    """Layers of the encoder."""
    decoder_layers: int | None = None
    """Layers of the decoder."""
    embed_dim: int | None = None
    """Width of encoder and decoder."""
    ffn_dim: int | None = None
    """Inner width of the feed-forward blocks."""
    attention_heads: int | None = None
    """Heads of every attention; must divide `embed_dim`."""
    dropout: float | None = None
    """Dropout on embeddings and on what each block adds."""
    attention_dropout: float | None = None
    """Dropout on attention weights."""
    activation_dropout: float | None = None
    """Dropout inside the feed-forward blocks."""
    normalize_before: bool | None = None
    """Layer norm before each block (pre-norm) in encoder and decoder; false is the Transformer of 2017."""
    share_all_embeddings: bool = True
    """Encoder, decoder and output share one embedding table (the vocabulary is joint)."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Any other option of fairseq's transformer, by its own name, for instance {activation_fn: gelu}."""

    @classmethod
    def described(cls, metadata: Mapping[str, Any], file: Path) -> ModelConfig:
        """The settings that an artefact's metadata describe; the file is named in errors.

        They come from anybody, and fairseq takes options as they are: files to read embeddings from are left out, since
        the weights follow, and so are layers to keep; sizes and shares must be numbers that a model can have.

        Raises:
            ValueError: they describe no model.
        """
        try:
            config = cls(**metadata["model"])
            _hold_options(config.extra)
            extra = {key: value for key, value in config.extra.items() if key not in _LEFT_OUT}
            return replace(config, extra=extra)
        except (KeyError, TypeError, ValueError) as error:
            reason = str(error) if str(error).isprintable() else ascii(str(error))
            raise ValueError(f"{file}: its metadata describe no model ({reason[:300]})") from None

    def __post_init__(self) -> None:
        for key in ("encoder_layers", "decoder_layers", "embed_dim", "ffn_dim", "attention_heads"):
            value = getattr(self, key)
            whole = value is None or (isinstance(value, int) and value >= 1)  # metadata of a file may hold anything
            require(whole, key, f"must be a whole number of at least 1, is {value}")
        require(isinstance(self.extra, dict), "extra", f"must be options by name, is {self.extra!r}")
        for key in ("dropout", "attention_dropout", "activation_dropout"):
            value = getattr(self, key)
            require(value is None or 0 <= value < 1, key, f"must be in [0, 1), is {value}")
        if self.embed_dim and self.attention_heads:
            require(
                self.embed_dim % self.attention_heads == 0,
                "attention_heads",
                f"must divide embed_dim ({self.embed_dim}), is {self.attention_heads}",
            )
        require(self.embed_dim is None or self.embed_dim % 2 == 0, "embed_dim", "must be even (sinusoidal positions)")
        for side in ("source", "target"):
            positions = self.learned_positions(side)
            enough = positions is None or positions >= FEWEST_POSITIONS
            why = f"{FEWEST_POSITIONS} where positions are learned: sentences of as many subwords are translated"
            require(enough, "extra", f"max_{side}_positions must be at least {why}, is {positions}")

    def learned_positions(self, side: str) -> int | None:
        """How many positions a learned table holds, and so the longest sentence; None if there is none.

        Args:
            side: source or target.
        """
        learned = self.extra.get({"source": "encoder_learned_pos", "target": "decoder_learned_pos"}[side])
        positions = self.extra.get(f"max_{side}_positions") or FEWEST_POSITIONS
        return positions if learned and isinstance(positions, int) else None


MAX_POSITIONS = 100_000
"""Positions that an artefact may ask for: where fairseq's sinusoids end."""
_SIDES = ("encoder", "decoder")
_LEFT_OUT = tuple(f"{side}_{option}" for side in _SIDES for option in ("embed_path", "layers_to_keep"))
_SIZES = tuple(f"{side}_{size}" for side in _SIDES for size in ("embed_dim", "ffn_embed_dim", "attention_heads"))
_SHARES = ("dropout", "attention_dropout", "activation_dropout", "encoder_layerdrop", "decoder_layerdrop")


def _hold_options(extra: Mapping[str, Any]) -> None:
    """Refuse what no model can have of fairseq's options, which it checks only when a sentence comes."""
    for key in _SIZES:
        value = extra.get(key, 1)
        require(type(value) is int and value >= 1, key, f"must be a whole number of at least 1, is {value!r}")
    for key in _SHARES:
        value = extra.get(key, 0)
        require(type(value) in (int, float) and 0 <= value <= 1, key, f"must be a number in [0, 1], is {value!r}")
    for key in ("max_source_positions", "max_target_positions"):
        value = extra.get(key)  # None is fairseq's 1,024
        good = value is None or (type(value) is int and 2 <= value <= MAX_POSITIONS)
        require(good, key, f"must be a whole number from 2 to {MAX_POSITIONS}, is {value!r}")


MAX_LENGTH_PENALTY = 50.0
"""Of either sign. From 62 on `MAX_POSITIONS`, the longest length, to that power is no double: fairseq overflows."""


@dataclass(frozen=True, kw_only=True)
class DecodeConfig:
    beam: int = 4
    """Hypotheses kept by beam search; 1 is greedy."""
    length_penalty: float = 1.0
    """Exponent of the length that scores are divided by, -50 to 50; above 1 favours long translations."""
    max_tokens: int = 4000
    """Source tokens a batch while decoding."""

    def __post_init__(self) -> None:
        require(self.beam >= 1, "beam", f"must be at least 1, is {self.beam}")
        penalty, limit = self.length_penalty, MAX_LENGTH_PENALTY
        require(math.isfinite(penalty), "length_penalty", f"must be a finite number, is {penalty}")
        require(abs(penalty) <= limit, "length_penalty", f"must be from {-limit:g} to {limit:g}, is {penalty}")
        require(self.max_tokens >= 1, "max_tokens", f"must be at least 1, is {self.max_tokens}")


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    weight: float = 0.0
    """Share of the teacher in the loss: (1 - weight) * cross entropy + weight * temperature^2 * KL(teacher || student).
    The teacher is the model of the stage before; 0 trains without one."""
    temperature: float = 1.0
    """Divides both models' logits before the softmax."""
    sequences: bool = False
    """Sequence-level distillation: train on the teacher's translations of the training sources, in the place of the
    references; with any `weight`."""
    text: str | None = None
    """A file of more sentences of the source language, one a line, plain, .gz, .xz or .zst: the teacher's translations
    of them join the training split."""

    def __post_init__(self) -> None:
        require(0 <= self.weight <= 1, "weight", f"must be in [0, 1], is {self.weight}")
        require(self.temperature > 0, "temperature", f"must be above 0, is {self.temperature}")


@dataclass(frozen=True, kw_only=True)
class ProfileConfig:
    updates: tuple[int, ...] = ()
    """The first and the last update to record, a trace for each rank; none records nothing."""

    def __post_init__(self) -> None:
        good = len(self.updates) in (0, 2) and [*self.updates] == sorted(self.updates) and min(self.updates or (1,)) > 0
        require(good, "updates", f"must be [] or [FROM, TO], FROM at least 1, is {[*self.updates]}")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    max_update: int = 2000
    """Updates (optimizer steps) in all."""
    max_tokens: int = 1500
    """Tokens of a micro-batch, padding included, on each rank (fairseq's max_tokens)."""
    update_freq: int = 1
    """Micro-batches accumulated on each rank before an update. A run that goes on with fewer or more workers shares the
    micro-batches of an update anew: their number stays what it was when the training began."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """auto takes bf16 where the processor or GPU multiplies it natively, else fp32. fp16 scales the loss."""
    engine: Literal["ddp", "deepspeed"] = "ddp"
    """deepspeed splits the optimizer's state among the workers (ZeRO); needs comm.route: fp32."""
    zero_stage: Literal[1, 2] = 1
    """With deepspeed: 1 splits the optimizer's state, 2 the gradients as well."""
    lr: float = 5e-4
    """Peak learning rate."""
    warmup_updates: int = 4000
    """Updates of linear warm-up from `warmup_init_lr` to `lr`."""
    lr_schedule: Literal["inverse_sqrt", "linear"] = "inverse_sqrt"
    """After warm-up: lr * sqrt(warmup_updates / update); or linear, to 0 at max_update."""
    warmup_init_lr: float = 1e-7
    """Learning rate at update 0."""
    adam_betas: tuple[float, float] = (0.9, 0.98)
    """Adam's decay rates."""
    adam_eps: float = 1e-8
    """Adam's epsilon."""
    weight_decay: float = 0.0
    """Decoupled (AdamW) weight decay."""
    clip_norm: float = 0.0
    """Clip the global gradient norm to this; 0 does not clip."""
    label_smoothing: float = 0.1
    """Label smoothing of the cross entropy."""
    switchout: float = 0.0
    """Fraction of the source's words that an update replaces at random by words of its micro-batch, for a teacher too:
    it is asked about sentences that it has not learned by heart."""
    dropout: float | None = None
    """Every dropout of the model in this training, 0 to below 1; null keeps those of `model`. A model of few bits a
    weight underfits: it needs none."""
    init_scale: float = 128.0
    """First loss scale (fp16)."""
    scale_window: int = 2000
    """Updates without overflow after which the loss scale doubles (fp16)."""
    min_loss_scale: float = 1e-4
    """Stop with an error when the loss scale falls below (fp16)."""
    log_interval: int = 50
    """Updates between lines of metrics."""
    valid_interval: int = 500
    """Updates between validations (loss and BLEU)."""
    valid_sentences: int = 200
    """Sentences of the validation set translated for BLEU; the loss takes all."""
    save_interval: int = 500
    """Updates between checkpoints."""
    keep_last: int = 3
    """Checkpoints kept; the best by `best_by` is kept beside them."""
    keep_updates: tuple[int, ...] = ()
    """Updates whose checkpoints are kept for good, 0 for the initial weights: a lottery rewinds to one of them."""
    average_last: int = 1
    """The artefact averages the weights of this many last checkpoints; 1 takes the best by `best_by`."""
    best_by: Literal["bleu", "perplexity"] = "bleu"
    """Which validation is the best: by BLEU of `valid_sentences`, or by perplexity of the whole set, which
    is steadier where those are few."""
    patience: int = 0
    """Stop after this many validations without a better one; 0 never stops early."""
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Where figures go beside metrics.jsonl; `pip install tenko[trackers]` brings TensorBoard, `tenko[wandb]` W&B."""
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    """What to record for a look at single updates; a run that goes on may have another."""
    distill: DistillConfig = field(default_factory=DistillConfig)
    """Knowledge distillation from the stage before."""
    decode: DecodeConfig = field(default_factory=DecodeConfig)
    """Beam search for validation and test."""

    def __post_init__(self) -> None:
        at_least_one = (
            "max_update max_tokens update_freq log_interval valid_interval valid_sentences save_interval "
            "keep_last average_last scale_window"
        )
        for key in at_least_one.split():
            require(getattr(self, key) >= 1, key, f"must be at least 1, is {getattr(self, key)}")
        for key in ("lr", "adam_eps", "init_scale", "min_loss_scale"):
            require(getattr(self, key) > 0, key, f"must be above 0, is {getattr(self, key)}")
        for key in ("warmup_updates", "warmup_init_lr", "weight_decay", "clip_norm", "patience"):
            require(getattr(self, key) >= 0, key, f"must be at least 0, is {getattr(self, key)}")
        require(0 <= self.label_smoothing < 1, "label_smoothing", f"must be in [0, 1), is {self.label_smoothing}")
        require(0 <= self.switchout < 1, "switchout", f"must be in [0, 1), is {self.switchout}")
        require(
            self.dropout is None or 0 <= self.dropout < 1, "dropout", f"must be null or in [0, 1), is {self.dropout}"
        )
        require(
            self.engine == "ddp" or self.precision != "fp16",
            "precision",
            "must be fp32, bf16 or auto with engine: deepspeed, is fp16",
        )
        for update in self.keep_updates:
            require(
                0 <= update <= self.max_update,
                "keep_updates",
                f"must be 0 to max_update ({self.max_update}), holds {update}",
            )
        betas = self.adam_betas
        require(len(betas) == 2 and all(0 <= b < 1 for b in betas), "adam_betas", f"must be two in [0, 1), is {betas}")
        require(
            self.average_last <= self.keep_last,
            "average_last",
            f"must be at most keep_last ({self.keep_last}), is {self.average_last}",
        )

    def is_regular(self, update: int) -> bool:
        """Whether its checkpoint is one of those that `keep_last` counts and that are averaged."""
        return (update > 0 and update % self.save_interval == 0) or update == self.max_update

    def saves_at(self, update: int) -> bool:
        """Whether every run saves this update; others may be saved on notice, or where patience ends."""
        return self.is_regular(update) or update in self.keep_updates
