"""Everything that tenko asks of fairseq, and the only module that imports it.

Where fairseq needs help, and what is done about it here:

- Importing it takes seconds, prints advice about packages that translation doesn't need and sets up logging: muted.
  Half of the time would go to packages that only speech, classification, trackers of its own and other optimizers take:
  they are kept out while it is imported.
- Official 0.12.2 does not import on Python 3.11; the maintained build is `ve-fairseq`, whose version is checked.
- A criterion asks the model for `get_normalized_probs`, which a DDP wrapper hides: `ModelWithLoss` puts model and loss
  into one module, so that DDP wraps both and its hooks see one forward.
- The output projection and its loss run over padding too, and the loss takes nine passes over the logits: rows of
  padding are dropped before the projection, `loss.py` takes three passes; a test holds the sums and the gradients
  to fairseq's own criterion.
- A CPU takes attention through `scaled_dot_product_attention`'s flash kernel, whose backward is slow for short
  sentences: the plain kernel is chosen (`short_attention`).
- Its data iterators seed the order with seed + epoch when made, so a resumed run sees another order: only
  `batch_by_size` is used, the order is ours (`batches.py`).
- `batch_by_size` drops the last batch if its size is no multiple of `required_batch_size_multiple`, so the longest
  sentences are never seen: what it dropped is put back.
- Attention gets a float mask for the future and a boolean one for padding, which torch warns about: muted.
- Generation drops what is too long and reorders: `Beam.generate` gives hypotheses by position.
"""

from __future__ import annotations

import contextlib
import io
import logging
import sys
import warnings
from argparse import Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .config import DecodeConfig, DistillConfig, ModelConfig
from .loss import distillation, label_smoothed_cross_entropy

KNOWN_VERSIONS = ("0.12.3",)
warnings.filterwarnings("ignore", "Support for mismatched key_padding_mask", UserWarning)
PAD, EOS = 1, 2


_OPTIONAL = ("wandb", "deepspeed", "tensorboardX", "torch.utils.tensorboard")
"""fairseq does without these, where they are not installed."""
_UNUSED = ("sklearn", "sklearn.metrics", "scipy", "scipy.stats")
"""Here it takes functions from at import, for criterions and tasks that nothing of tenko asks for."""


class _Unused(ModuleType):
    """Stands for a module of which nothing is called."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


@contextlib.contextmanager
def _kept_out() -> Iterator[None]:
    """`_OPTIONAL` and `_UNUSED` are not imported; afterwards they can be, by whoever needs them."""
    optional = [name for name in _OPTIONAL if name not in sys.modules]
    unused = [name for name in _UNUSED if name not in sys.modules]
    sys.modules.update(dict.fromkeys(optional))  # type: ignore[arg-type]  # None: an ImportError
    sys.modules.update({name: _Unused(name) for name in unused})
    try:
        yield
    finally:
        for name in optional + unused:
            sys.modules.pop(name, None)


def _import_fairseq() -> Any:
    loggers_before = logging.root.level
    stdout, sys.stdout = sys.stdout, io.StringIO()  # fairseq prints advice on optional packages
    try:
        logging.disable(logging.INFO)
        with _kept_out():
            import fairseq
            import fairseq.models.transformer
    except ImportError as error:
        raise ValueError(f"fairseq: cannot be imported ({error}); install ve-fairseq=={KNOWN_VERSIONS[-1]}") from error
    finally:
        logging.disable(logging.NOTSET)
        logging.root.setLevel(loggers_before)
        sys.stdout = stdout
    if fairseq.__version__ not in KNOWN_VERSIONS:
        known = ", ".join(KNOWN_VERSIONS)
        raise ValueError(f"fairseq: version {fairseq.__version__} is not known to work; install ve-fairseq {known}")
    return fairseq


_import_fairseq()
from fairseq.data import Dictionary, data_utils  # noqa: E402
from fairseq.data.language_pair_dataset import collate as _fairseq_collate  # noqa: E402
from fairseq.models import ARCH_CONFIG_REGISTRY, ARCH_MODEL_NAME_REGISTRY  # noqa: E402
from fairseq.models.transformer import TransformerModel  # noqa: E402
from fairseq.modules import FairseqDropout  # noqa: E402
from fairseq.sequence_generator import SequenceGenerator  # noqa: E402

_RENAMED = {
    "encoder_layers": ("encoder_layers",),
    "decoder_layers": ("decoder_layers",),
    "embed_dim": ("encoder_embed_dim", "decoder_embed_dim"),
    "ffn_dim": ("encoder_ffn_embed_dim", "decoder_ffn_embed_dim"),
    "attention_heads": ("encoder_attention_heads", "decoder_attention_heads"),
    "dropout": ("dropout",),
    "attention_dropout": ("attention_dropout",),
    "activation_dropout": ("activation_dropout",),
    "normalize_before": ("encoder_normalize_before", "decoder_normalize_before"),
}


def load_dictionary(path: Path) -> Dictionary:
    """The fairseq dictionary at `path` (`dict.txt`). Raises ValueError if it is missing or malformed."""
    try:
        return Dictionary.load(str(path))
    except Exception as error:  # fairseq raises bare Exceptions too
        raise ValueError(f"{path}: not a readable fairseq dictionary ({error})") from error


def model_args(config: ModelConfig) -> dict[str, Any]:
    """All options of the architecture as plain values: what fairseq's `args` would hold.

    Raises:
        ValueError: the architecture or an option in `extra` is unknown, or attention heads don't divide the width.
    """
    architectures = sorted(a for a, name in ARCH_MODEL_NAME_REGISTRY.items() if name == "transformer")
    if config.arch not in architectures:
        raise ValueError(f"model.arch: unknown architecture {config.arch!r}; valid: {', '.join(architectures)}")
    args = Namespace(arch=config.arch)
    for ours, theirs in _RENAMED.items():
        value = getattr(config, ours)
        if value is not None:
            for name in theirs:
                setattr(args, name, value)
    args.share_all_embeddings = config.share_all_embeddings
    args.share_decoder_input_output_embed = config.share_all_embeddings
    args.max_source_positions = args.max_target_positions = 1024
    known = Namespace(**vars(args))
    ARCH_CONFIG_REGISTRY[config.arch](known)
    unknown = [key for key in config.extra if key not in vars(known)]
    if unknown:
        valid = ", ".join(sorted(set(vars(known)) - {n for names in _RENAMED.values() for n in names} - {"arch"}))
        raise ValueError(f"model.extra: unknown option {unknown[0]!r} of fairseq's transformer; valid: {valid}")
    for key, value in config.extra.items():
        setattr(args, key, value)
    ARCH_CONFIG_REGISTRY[config.arch](args)
    for side in ("encoder", "decoder"):
        width, heads = getattr(args, f"{side}_embed_dim"), getattr(args, f"{side}_attention_heads")
        if width % heads:
            raise ValueError(f"model.attention_heads: must divide the width ({width}), is {heads}")
    return dict(vars(args))


class _Task:
    """The two dictionaries: all that fairseq's `build_model` wants of a task."""

    def __init__(self, dictionary: Dictionary) -> None:
        self.source_dictionary = self.target_dictionary = dictionary


def build_model(config: ModelConfig, dict_path: Path) -> nn.Module:
    """A fairseq `TransformerModel` with fresh weights from torch's global generator (seed it first).

    Args:
        config: architecture and sizes.
        dict_path: the joint fairseq dictionary.

    Raises:
        ValueError: as `load_dictionary` and `model_args`; or fairseq builds no model of this.
    """
    dictionary = load_dictionary(dict_path)
    try:
        return TransformerModel.build_model(Namespace(**model_args(config)), _Task(dictionary))
    except STRANGE as error:
        if str(error).startswith("model."):
            raise
        reason = (str(error) or type(error).__name__).splitlines()[0]
        where = f"model.extra: with {', '.join(config.extra)}" if config.extra else "model:"
        raise ValueError(f"{where} fairseq builds no model ({reason})") from error


STRANGE = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""What fairseq comes to with options of a wrong type or size. Not all there is: a signal's exception may pass here."""


def set_dropout(model: nn.Module, p: float) -> None:
    """Give every dropout of a model (of embeddings and blocks, attention, activations) this probability."""
    for module in model.modules():
        if isinstance(module, FairseqDropout):
            module.p = p


class ModelWithLoss(nn.Module):
    """Model and label-smoothed cross entropy as one module, for DDP to wrap.

    `forward(sample)` gives `(loss, nll)`, both summed over the target tokens of the batch, in nats, fp32: the sums
    of fairseq's `label_smoothed_cross_entropy` (`eps / (V - 1)` on every other word of the vocabulary).

    With a teacher (a frozen model over the same dictionary) the loss is `(1 - weight) * cross entropy + weight *
    distillation`; `nll` stays the student's own. In training `switchout` replaces source words for both.
    """

    def __init__(
        self,
        model: nn.Module,
        label_smoothing: float,
        *,
        teacher: nn.Module | None = None,
        distill: DistillConfig | None = None,
        switchout: float = 0.0,
    ) -> None:
        super().__init__()
        self.model = model
        self.label_smoothing = label_smoothing
        self.distill = distill or DistillConfig()
        self.switchout = switchout
        assert teacher is not None or self.distill.weight == 0, "distillation needs a teacher"
        # In a tuple, so that DDP, `train()` and checkpoints see no submodule: a teacher is no part of what is trained.
        self._teacher = () if teacher is None else (teacher.eval().requires_grad_(False),)

    def forward(self, sample: dict[str, Any]) -> tuple[Tensor, Tensor]:
        if self.switchout and self.training:
            inputs = sample["net_input"]
            switched = {"src_tokens": switch_out(inputs["src_tokens"], self.switchout)}
            sample = {**sample, "net_input": {**inputs, **switched}}
        logits_nv = _logits(self.model, sample)
        target_n = sample["target"].reshape(-1).index_select(0, sample["kept"])
        loss, nll = label_smoothed_cross_entropy(logits_nv, target_n, self.label_smoothing)
        if self._teacher and self.distill.weight > 0:
            with torch.no_grad():
                teacher_nv = _logits(self._teacher[0], sample)
            taught = distillation(logits_nv, teacher_nv, self.distill.temperature)
            loss = (1 - self.distill.weight) * loss + self.distill.weight * taught
        return loss, nll


def switch_out(tokens_bt: Tensor, fraction: float) -> Tensor:
    """A copy in which a random fraction of the words is another of these words, as frequent ones as often.

    Args:
        tokens_bt: [batch, tokens], int64; padding, `<s>` and `</s>` stay where they are and go nowhere else. A
            batch has a word at least.
        fraction: of the words, in [0, 1).

    Source: SwitchOut, Wang et al. 2018, which draws from the whole vocabulary, each word alike.
    """
    words = tokens_bt > EOS
    switched = words & (torch.rand(tokens_bt.shape, device=tokens_bt.device) < fraction)
    drawn = torch.multinomial(words.flatten().float(), tokens_bt.numel(), replacement=True)
    return torch.where(switched, tokens_bt.flatten()[drawn].view_as(tokens_bt), tokens_bt)


def _logits(model: nn.Module, sample: dict[str, Any]) -> Tensor:
    """Logits [tokens, vocabulary] of the batch's target tokens, padding left out."""
    inputs = sample["net_input"]
    with short_attention(inputs["src_tokens"]):
        features_btc, _ = model(**inputs, features_only=True)
    features_nc = features_btc.reshape(-1, features_btc.size(-1)).index_select(0, sample["kept"])
    decoder: Any = model.decoder
    return decoder.output_layer(features_nc)


@contextlib.contextmanager
def short_attention(tokens: Tensor) -> Iterator[None]:
    """Plain attention kernels on a CPU, where flash attention's backward is slower on short sentences."""
    if tokens.device.type != "cpu":
        yield
        return
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.MATH):
        yield


def batch_by_tokens(order: np.ndarray, sizes: np.ndarray, max_tokens: int, multiple: int = 8) -> list[np.ndarray]:
    """Cut `order` into batches of at most `max_tokens` tokens, padding included (fairseq's `batch_by_size`).

    Args:
        order: sentence indices, sorted by length for little padding, int64 [n].
        sizes: length of every sentence of the corpus in tokens, indexed by sentence.
        max_tokens: longest sentence of a batch times its sentences.
        multiple: batches hold this multiple of sentences where they can.
    """
    batches = data_utils.batch_by_size(
        order,
        num_tokens_fn=None,
        num_tokens_vec=sizes[order].astype(np.int64),
        max_tokens=max_tokens,
        required_batch_size_multiple=multiple,
    )
    batched = sum(len(b) for b in batches)
    return batches if batched == len(order) else [*batches, order[batched:]]


def collate(pairs: Sequence[tuple[int, np.ndarray, np.ndarray | None]]) -> dict[str, Any]:
    """fairseq's batch: source padded on the left, target on the right, `prev_output_tokens` starting with </s>.

    Args:
        pairs: (id, source tokens, target tokens or None), both ending with </s>.

    Returns:
        `net_input.src_tokens [batch, source length]`, `net_input.prev_output_tokens` and
        `target [batch, target length]`, `kept [target tokens]` (places in the flattened target that are no padding),
        `ntokens` (target tokens), `id [batch]`.
    """
    samples = [
        {
            "id": index,
            "source": torch.from_numpy(source.astype(np.int64)),
            "target": None if target is None else torch.from_numpy(target.astype(np.int64)),
        }
        for index, source, target in pairs
    ]
    batch = _fairseq_collate(samples, PAD, EOS)
    if batch["target"] is not None:
        # Found here, on the CPU: finding it on a GPU would wait for the device.
        batch["kept"] = batch["target"].reshape(-1).ne(PAD).nonzero().squeeze(1)
    return batch


class Beam:
    """Beam search over one model (fairseq's `SequenceGenerator`), hypotheses in the order of the sources."""

    def __init__(self, model: nn.Module, dict_path: Path, config: DecodeConfig) -> None:
        dictionary = load_dictionary(dict_path)
        self.model = model
        decoder: Any = model.decoder
        for layer in decoder.layers:
            layer.need_attn = False  # attention weights nobody reads would keep attention off its fast path
        self.generator = SequenceGenerator(
            [model],
            dictionary,
            beam_size=config.beam,
            len_penalty=config.length_penalty,
            # An untrained model never says </s>: twice the source and 20 more is where a translation is cut.
            max_len_a=2,
            max_len_b=20,
        )

    @torch.no_grad()
    def generate(self, sample: dict[str, Any]) -> list[tuple[int, list[int]]]:
        """(id, token ids without </s>) of the best hypothesis of each sentence of a collated batch.

        Raises:
            ValueError: the model's scores are NaN, so that no hypothesis can be chosen.
        """
        try:
            hypotheses = self.generator.generate([self.model], sample)
        except AssertionError as error:  # fairseq's, where every score is
            raise ValueError("beam search found no translation: the model's scores are NaN or infinite") from error
        return [
            (int(index), [t for t in best[0]["tokens"].tolist() if t != EOS])
            for index, best in zip(sample["id"].tolist(), hypotheses, strict=True)
        ]
