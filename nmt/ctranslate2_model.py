"""An artefact as a CTranslate2 model, written from its decoded tensors: the model is never built in fairseq.

Every tensor of the artefact must find its place in CTranslate2's specification, and every place its tensor, of the
right shape: a model with parts that CTranslate2 doesn't know is refused instead of translating something else.
CTranslate2 quantizes to int8 with a scale a row, as an artefact of granularity `channel` does: such a one keeps its
codes. One of granularity `tensor` gets scales, and codes, of its rows.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .artefact_model import DICTIONARY, SUBWORDS, read_folder
from .config import ModelConfig
from .ctranslate2_engine import CARD, FORMAT, QUANTIZATIONS, sums_of, vocabulary
from .subwords import PAD
from .vocabulary_map import VMAP, VocabularyMap

MAX_POSITIONS = 1024
"""Positions of encoder and decoder, as `fairseq_bridge.model_args` sets them."""
_LEFT_SECONDS = 3600
"""After so long nobody writes any more."""
_ACTIVATIONS = {"relu": "RELU", "gelu": "GELU", "gelu_accurate": "GELUTanh", "gelu_fast": "GELUTanh", "swish": "SWISH"}
"""fairseq's activations by the name of CTranslate2's."""
# Buffers that hold no weights: a format version, and the dtype of sinusoidal positions.
_NO_WEIGHTS = (".version", "._float_tensor")


def export_ctranslate2(
    artefact_dir: Path, out_dir: Path, *, quantization: str = "int8", vocabulary_map: VocabularyMap | None = None
) -> Path:
    """Write a CTranslate2 model folder with `spm.model`, `dict.txt` and `tenko.json`: complete, or not at all.

    Args:
        artefact_dir: folder with `model.safetensors`, `spm.model` and `dict.txt`; packed tensors are decoded.
        out_dir: the folder to write; missing or empty.
        quantization: int8 (a scale a row), int16 or fp32.
        vocabulary_map: which subwords may translate which; None leaves all of them to every sentence.

    Returns:
        `out_dir`.

    Raises:
        ValueError: one line with the file and what is wrong: the artefact is missing, damaged, its parts don't fit,
            or CTranslate2 has no place for them.
        OSError: the folder can't be written.
    """
    artefact_dir, out_dir = Path(artefact_dir), Path(out_dir)
    if quantization not in QUANTIZATIONS:
        raise ValueError(f"quantization: unknown {quantization!r}; valid are {', '.join(QUANTIZATIONS)}")
    artefact = read_folder(artefact_dir)
    pieces = artefact.subwords.pieces()
    try:
        spec = specification(artefact.config, artefact.state, pieces)
    except ValueError as error:
        raise ValueError(f"{artefact.file}: {error}") from None
    card: dict[str, Any] = {
        "format": FORMAT,
        "direction": artefact.direction,
        "quantization": quantization,
        "vocabulary_map": vocabulary_map is not None,
    }
    with _written_beside(out_dir) as folder:
        spec.validate()
        spec.optimize(quantization=QUANTIZATIONS[quantization])
        spec.save(str(folder))
        if vocabulary_map is not None:
            vocabulary_map.write(folder / VMAP, pieces)
        for name in (SUBWORDS, DICTIONARY):
            shutil.copyfile(artefact_dir / name, folder / name)
        card["files"] = sums_of(folder)
        (folder / CARD).write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
    return out_dir


def specification(config: ModelConfig, state: dict[str, Tensor], pieces: list[str]) -> Any:
    """CTranslate2's `TransformerSpec` with the weights of a fairseq transformer.

    Args:
        config: the model's settings.
        state: its whole `state_dict`, fp32.
        pieces: the joint vocabulary by id.

    Raises:
        ValueError: CTranslate2 has no such model, or the tensors aren't those of the settings.
    """
    from ctranslate2.specs import common_spec, transformer_spec

    sizes, activation = _sizes(config), str(config.extra.get("activation_fn", "relu"))
    heads = sizes["encoder_attention_heads"]
    if heads != sizes["decoder_attention_heads"]:
        decoder = sizes["decoder_attention_heads"]
        raise ValueError(f"CTranslate2 wants {heads} attention heads in the decoder as in the encoder, not {decoder}")
    if activation not in _ACTIVATIONS:
        valid = ", ".join(_ACTIVATIONS)
        raise ValueError(f"CTranslate2 has no activation {activation}; it has {valid} (--engine fairseq has them all)")
    if config.extra.get("no_token_positional_embeddings"):
        raise ValueError("CTranslate2 has no model without positions; --engine fairseq has")
    if config.extra.get("cross_self_attention"):
        raise ValueError("CTranslate2 has no attention to source and target at once; --engine fairseq has")
    layers = []
    for side in ("encoder", "decoder"):
        layers.append(len({name.split(".")[2] for name in state if name.startswith(f"{side}.layers.")}))
        if layers[-1] != sizes[f"{side}_layers"]:
            raise ValueError(f"{sizes[f'{side}_layers']} layers in the {side}; the tensors have {layers[-1]}")
    spec = transformer_spec.TransformerSpec.from_config(
        tuple(layers),
        heads,
        # As the weights have it: a pre-norm model ends with a norm, a post-norm one doesn't.
        pre_norm="encoder.layer_norm.weight" in state,
        activation=getattr(common_spec.Activation, _ACTIVATIONS[activation]),
        alignment_heads=0,
        layernorm_embedding="encoder.layernorm_embedding.weight" in state,
    )
    weights = _Weights(state, width=sizes["encoder_embed_dim"])
    if weights.width % heads:
        raise ValueError(f"{heads} attention heads do not divide the width {weights.width}")
    scale = 1.0 if config.extra.get("no_scale_embedding") else math.sqrt(weights.width)
    for side, part in (("encoder", spec.encoder), ("decoder", spec.decoder)):
        embeddings = part.embeddings[0] if side == "encoder" else part.embeddings
        embeddings.weight = weights.take(f"{side}.embed_tokens.weight", len(pieces), weights.width)
        part.scale_embeddings = scale
        part.position_encodings.encodings = weights.positions(side)
        for index, layer in enumerate(part.layer):
            weights.layer(layer, f"{side}.layers.{index}", sizes[f"{side}_ffn_embed_dim"], of=side)
        for norm in ("layer_norm", "layernorm_embedding"):
            if hasattr(part, norm):
                weights.norm(getattr(part, norm), f"{side}.{norm}")
    projection = "decoder.output_projection"
    weights.linear(spec.decoder.projection, projection, len(pieces), weights.width, bias=f"{projection}.bias" in state)
    weights.expect_all_taken()
    spec.register_source_vocabulary(vocabulary(pieces))
    spec.register_target_vocabulary(vocabulary(pieces))
    spec.config.decoder_start_token = spec.config.eos_token
    spec.config.add_source_eos = True
    return spec


def _sizes(config: ModelConfig) -> dict[str, int]:
    """Layers, widths and heads of both sides, by fairseq's names."""
    ours: dict[str, Any] = {"encoder_layers": config.encoder_layers, "decoder_layers": config.decoder_layers}
    for side in ("encoder", "decoder"):
        ours[f"{side}_embed_dim"] = config.embed_dim
        ours[f"{side}_ffn_embed_dim"] = config.ffn_dim
        ours[f"{side}_attention_heads"] = config.attention_heads
    sizes = {name: config.extra.get(name, value) for name, value in ours.items()}
    if None in sizes.values():  # the architecture says; fairseq takes seconds to import
        from .fairseq_bridge import model_args

        args = model_args(config)
        sizes = {name: args[name] for name in sizes}
    for name, value in sizes.items():
        if type(value) is not int or value < 1:
            raise ValueError(f"{name} must be a whole number of at least 1, is {value!r}")
    return sizes


class _Weights:
    """A fairseq transformer's tensors on their way into a specification, each taken once."""

    def __init__(self, state: dict[str, Tensor], *, width: int) -> None:
        self._left = {name: tensor for name, tensor in state.items() if not name.endswith(_NO_WEIGHTS)}
        self.width = width

    def take(self, name: str, *shape: int | None) -> Any:
        """The tensor as numpy's, once; a dimension of None may have any length."""
        tensor = self._left.pop(name, None)
        if tensor is None:
            raise ValueError(f"misses tensor {name}")
        if tensor.dim() != len(shape) or any(w not in (None, n) for w, n in zip(shape, tensor.shape, strict=True)):
            wanted = ", ".join("any" if n is None else str(n) for n in shape)
            raise ValueError(f"tensor {name} has shape {list(tensor.shape)}, not [{wanted}]")
        return tensor.float().numpy()

    def linear(self, spec: Any, name: str, rows: int, columns: int, *, bias: bool = True) -> None:
        """A matrix, with its bias."""
        spec.weight = self.take(f"{name}.weight", rows, columns)
        if bias:
            spec.bias = self.take(f"{name}.bias", rows)

    def norm(self, spec: Any, name: str) -> None:
        """A layer norm."""
        spec.gamma, spec.beta = self.take(f"{name}.weight", self.width), self.take(f"{name}.bias", self.width)

    def attention(self, spec: Any, name: str, groups: tuple[str, ...]) -> None:
        """Projections in CTranslate2's order; those of a group ("qkv") become one matrix."""
        from ctranslate2.converters.utils import fuse_linear
        from ctranslate2.specs.common_spec import LinearSpec

        for target, group in zip(spec.linear, groups, strict=False):
            parts = [LinearSpec() for _ in group]
            for part, letter in zip(parts, group, strict=True):
                self.linear(part, f"{name}.{letter}_proj", self.width, self.width)
            fuse_linear(target, parts)
        self.linear(spec.linear[-1], f"{name}.out_proj", self.width, self.width)
        self.norm(spec.layer_norm, f"{name}_layer_norm")

    def layer(self, spec: Any, name: str, inner: int, *, of: str) -> None:
        """A layer of encoder or decoder; `inner` is the width of its feed-forward block."""
        self.attention(spec.self_attention, f"{name}.self_attn", ("qkv",))
        if of == "decoder":
            self.attention(spec.attention, f"{name}.encoder_attn", ("q", "kv"))
        self.norm(spec.ffn.layer_norm, f"{name}.final_layer_norm")
        self.linear(spec.ffn.linear_0, f"{name}.fc1", inner, self.width)
        self.linear(spec.ffn.linear_1, f"{name}.fc2", self.width, inner)

    def positions(self, side: str) -> Any:
        """Encodings [position, width]: learned, or fairseq's sinusoids; positions begin behind padding's id."""
        learned = f"{side}.embed_positions.weight"
        if learned in self._left:
            return self.take(learned, None, self.width)[PAD + 1 :]
        half = self.width // 2
        frequencies = torch.exp(torch.arange(half, dtype=torch.float) * -(math.log(10000) / (half - 1)))
        angles = torch.arange(PAD + 1, PAD + 1 + MAX_POSITIONS, dtype=torch.float)[:, None] * frequencies
        return torch.cat([torch.sin(angles), torch.cos(angles)], dim=1).numpy()

    def expect_all_taken(self) -> None:
        """Raises: ValueError if a tensor found no place."""
        if self._left:
            raise ValueError(f"CTranslate2 has no place for tensor {sorted(self._left)[0]}; --engine fairseq has")


@contextlib.contextmanager
def _written_beside(folder: Path) -> Iterator[Path]:
    """A folder to fill, renamed to `folder` at the end; removed if that fails, with an OSError that names `folder`."""
    beside = folder.with_name(f".{folder.name}.{_node()}-{os.getpid()}.tmp")
    try:
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        yield beside
        for file in beside.iterdir():
            with file.open("rb") as written:
                os.fsync(written.fileno())
        try:
            os.replace(beside, folder)  # over an empty folder, too
        except OSError:
            if not folder.is_dir() or not any(folder.iterdir()):
                raise
            # Somebody else was quicker: the folder is never half-written, so theirs is as good.
    except OSError as error:  # a full disk is reported by write(), which knows no file name
        raise OSError(error.errno, error.strerror or str(error), str(folder)) from None
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def sweep(folder: Path, names: str) -> None:
    """Delete what killed processes have left half-written in a folder that others may be writing to.

    Args:
        folder: a cache.
        names: shell pattern of the folders' names; those of this machine go when their process is gone, any after an
            hour.
    """
    for left in folder.glob(f".{names}.tmp"):
        node, _, process = left.name.removesuffix(".tmp").rpartition(".")[2].rpartition("-")
        with contextlib.suppress(OSError, ValueError):
            ours = node in ("", _node())  # none: as earlier versions named them
            gone = ours and not Path("/proc", str(int(process))).exists()
            if gone or time.time() - left.stat().st_mtime > _LEFT_SECONDS:
                shutil.rmtree(left, ignore_errors=True)


def _node() -> str:
    return os.uname().nodename.partition(".")[0]
