"""Product quantization: codes exact where they can be, errors by K, empty clusters, storage, ties, bad blocks."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from toy_training import toy_model

from tenko.compression import Technique, kmeans, read_artefact, write_artefact
from tenko.compression.config import PqConfig, QuantizeConfig
from tenko.compression.kmeans import _nearest, _split_for_empty
from tenko.compression.pq import (
    PostTrainingPq,
    PqScheme,
    as_blocks,
    centroid_values,
    decode_packed,
    pack_pq,
    quantize_pq,
    select_blocks,
    store_centroids,
)
from tenko.nmt.corpus import Corpus

SCHEMES: tuple[PqScheme, ...] = get_args(PqScheme)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def relative_error(weight: torch.Tensor, block: int, centroids: int, scheme: PqScheme = "pq") -> float:
    codes, codebook = quantize_pq(weight, block, centroids, seed=1, scheme=scheme)
    decoded = decode_packed(pack_pq(codes, codebook, scheme), weight.shape)
    return float((decoded - weight).norm() / weight.norm())


def technique(
    scheme: PqScheme = "pq", exclude: tuple[str, ...] = (), seed: int = 0, **fields: object
) -> PostTrainingPq:
    config = QuantizeConfig(scheme=scheme, exclude=exclude, pq=PqConfig(**fields))  # type: ignore[arg-type]
    return PostTrainingPq(config, seed=seed)


def test_a_weight_made_of_k_codewords_comes_back_exactly() -> None:
    codewords = normal(256, 8).half().float()
    which = torch.randint(0, 256, (96, 16), generator=torch.Generator().manual_seed(2))
    weight = codewords[which].reshape(96, 128)
    codes, codebook = quantize_pq(weight, 8, seed=1)
    assert codes.dtype == torch.uint8
    assert codes.shape == (96, 16)
    assert codebook.dtype == torch.float32
    assert len(codebook) == len(which.unique())
    assert torch.equal(decode_packed(pack_pq(codes, codebook, "pq"), weight.shape), weight)


def test_a_weight_on_a_gpu_is_clustered_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without one: torch only follows the devices, and a codebook stands in for that of k-means."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        weight = torch.empty(64, 64, device="cuda")
        monkeypatch.setattr(kmeans, "fit", lambda blocks, count, **_: torch.empty(count, blocks.shape[1]))
        monkeypatch.setattr(kmeans, "_nearest", lambda points, _: (None, np.zeros(len(points), np.int64)))
        monkeypatch.setattr(kmeans, "_numpy", lambda tensor: np.empty(tensor.shape))
        codes, codebook = quantize_pq(weight, 4, 16, seed=1)
    assert codes.is_cpu
    assert codebook.is_cpu
    assert codes.shape == (64, 16)


def test_more_centroids_make_a_smaller_error_and_smaller_blocks_too() -> None:
    weight = normal(64, 64)
    by_centroids = [relative_error(weight, 8, k) for k in (4, 16, 64, 256)]
    assert by_centroids == sorted(by_centroids, reverse=True)
    assert by_centroids[0] > by_centroids[-1] + 0.2
    by_block = [relative_error(weight, block, 16) for block in (8, 4, 2, 1)]
    assert by_block == sorted(by_block, reverse=True)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_block_has_the_nearest_of_the_stored_centroids(scheme: PqScheme) -> None:
    weight = normal(40, 24)
    codes, codebook = quantize_pq(weight, 4, 32, seed=5, scheme=scheme)
    values = centroid_values(codebook, scheme)
    nearest = torch.cdist(as_blocks(weight, 4).double(), values.double()).argmin(1)
    assert torch.equal(codes.reshape(-1).long(), nearest)


def test_int8_centroids_are_off_by_at_most_half_a_scale_and_fp16_by_half_a_unit() -> None:
    codebook = normal(200, 8)
    stored = store_centroids(codebook, "pq_int8")
    assert stored["codebook"].dtype == torch.int8
    assert int(stored["codebook"].abs().max()) == 127
    half_scale = float(stored["scale"]) / 2
    assert float((centroid_values(codebook, "pq_int8") - codebook).abs().max()) <= half_scale * 1.0001
    assert store_centroids(codebook, "pq")["codebook"].dtype == torch.float16
    assert bool(((centroid_values(codebook, "pq") - codebook).abs() <= codebook.abs() * 2**-11 + 2**-25).all())


def test_a_codebook_of_zeros_is_stored_as_zeros() -> None:
    for scheme in SCHEMES:
        assert not centroid_values(torch.zeros(2, 4), scheme).any()
        codes, codebook = quantize_pq(torch.zeros(4, 8), 4, seed=1, scheme=scheme)
        assert not decode_packed(pack_pq(codes, codebook, scheme), (4, 8)).any()


def test_the_same_seed_gives_the_same_codes_and_another_one_others() -> None:
    weight = normal(64, 64)
    codes, codebook = quantize_pq(weight, 8, 64, seed=3)
    again = quantize_pq(weight, 8, 64, seed=3)
    assert torch.equal(codes, again[0])
    assert torch.equal(codebook, again[1])
    assert not torch.equal(codes, quantize_pq(weight, 8, 64, seed=4)[0])


def test_going_on_from_a_codebook_lowers_its_error() -> None:
    weight = normal(64, 64)
    blocks = as_blocks(weight, 8)
    first = kmeans.fit(blocks, 64, seed=3, iterations=1)
    further = kmeans.fit(blocks, 64, seed=99, iterations=5, start=first)

    def error(centroids: torch.Tensor) -> float:
        return float((blocks - centroids[kmeans.assign(blocks, centroids)]).square().sum())

    assert error(further) < error(first)
    assert torch.equal(further, kmeans.fit(blocks, 64, seed=7, iterations=5, start=first)), "the seed has no part in it"


def test_all_blocks_take_part_not_a_sample_of_256_a_centroid() -> None:
    # In the last thousandth of the blocks lies a cluster of its own, which a sample would hardly see.
    blocks = torch.zeros(20_000, 2)
    blocks[:, 0] = torch.linspace(0, 1, 20_000)
    blocks[-20:] = torch.tensor([50.0, 50.0]) + 0.01 * normal(20, 2)
    centroids = kmeans.fit(blocks, 4, seed=1)
    assert float((centroids - blocks[-20:].mean(0)).norm(dim=1).min()) < 1e-3


def test_fewer_distinct_blocks_than_centroids_are_the_codebook() -> None:
    codes, codebook = quantize_pq(torch.tensor([[1.0, 2.0, 1.0, 2.0], [3.0, 4.0, 1.0, 2.0]]), 2, 256, seed=1)
    assert codebook.tolist() == [[1.0, 2.0], [3.0, 4.0]]
    assert codes.tolist() == [[0, 0], [1, 0]]


def test_no_centroid_is_left_without_a_block_where_most_blocks_are_equal() -> None:
    blocks = torch.zeros(6000, 4)
    blocks[:300] = normal(300, 4)
    centroids = kmeans.fit(blocks, 256, seed=1)
    assert len(centroids) == 256
    assert len(kmeans.assign(blocks, centroids).unique()) == 256


def test_an_empty_cluster_splits_the_most_populous_one() -> None:
    large, small = normal(90, 2, seed=1) * 0.1, normal(10, 2, seed=2) * 0.1 + 50
    points = torch.cat([large, small]).numpy()
    centroids = np.array([[0, 0], [50, 50], [1000, 1000]], np.float32)
    split = _split_for_empty(points, centroids.copy())
    assert np.array_equal(split[:2], centroids[:2])
    outermost = int(np.square(points[:90]).sum(1).argmax())
    assert np.array_equal(split[2], points[outermost])
    assert np.bincount(_nearest(points, split)[1], minlength=3).min() > 0


def test_a_populous_cluster_of_equal_blocks_can_not_be_split_and_another_is() -> None:
    points = np.concatenate([np.zeros((90, 2)), np.array([[50, 50], [52, 50], [50, 53]])]).astype(np.float32)
    split = _split_for_empty(points, np.array([[0, 0], [50, 50], [1000, 1000]], np.float32))
    assert split[2].tolist() == [50, 53]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_baked_model_is_tied_and_equal_to_its_file(small_corpus: Corpus, tmp_path: Path, scheme: PqScheme) -> None:
    model = toy_model(small_corpus)
    names = set(model.state_dict())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    pq = technique(scheme)
    assert isinstance(pq, Technique)
    pq.attach(model)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    pq.bake(model)
    assert set(model.state_dict()) == names
    assert model.encoder.embed_tokens.weight is model.decoder.output_projection.weight
    for name, p in model.named_parameters():
        if p.dim() < 2:
            assert torch.equal(p, before[name].half().float()), name
        else:
            assert not torch.equal(p, before[name]), name
    write_artefact(tmp_path, model.state_dict(), metadata={}, technique=pq)
    state, metadata = read_artefact(tmp_path)
    for name, value in model.state_dict().items():
        assert torch.equal(state[name], value), name
    assert {entry["scheme"] for n, entry in metadata["tensors"].items() if n.endswith("fc1.weight")} == {scheme}
    embedding = pq.pack("decoder.output_projection.weight")
    assert embedding is pq.pack("encoder.embed_tokens.weight")
    assert embedding is not None
    assert embedding.parts["codes"].shape == (len(before["encoder.embed_tokens.weight"]), 16 // 8)
    attention = pq.pack("decoder.layers.0.encoder_attn.out_proj.weight")
    assert attention is not None
    assert attention.parts["codes"].shape == (16, 16 // 4)


def test_the_same_model_and_seed_bake_the_same(small_corpus: Corpus) -> None:
    models = [toy_model(small_corpus) for _ in range(3)]
    for model, seed in zip(models, (1, 1, 2), strict=True):
        pq = technique(centroids=16, seed=seed)
        pq.attach(model)
        pq.bake(model)
    one, same, other = (model.state_dict()["encoder.embed_tokens.weight"] for model in models)
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_the_first_group_that_matches_gives_the_block(small_corpus: Corpus) -> None:
    sizes = {"*encoder.layers.0.self_attn.*": 2, "attention": 4, "ffn": 16, "embedding": 8}
    items = select_blocks(toy_model(small_corpus), ("*",), (), PqConfig(blocks=sizes))
    found = {item.weight.name: (item.block, item.group) for item in items}
    assert found["encoder.layers.0.self_attn.q_proj.weight"] == (2, "*encoder.layers.0.self_attn.*")
    assert found["decoder.layers.0.self_attn.q_proj.weight"] == (4, "attention")
    assert found["decoder.layers.0.fc2.weight"] == (16, "ffn")
    assert found["encoder.embed_tokens.weight"] == (8, "embedding")
    assert len(found) == 1 + 2 * 2 + 3 * 4, "embeddings once; two FFNs of two; three attentions of four"


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        (
            {"ffn": 8, "embedding": 8, "attention": 5},
            r"pq\.blocks: attention is 5, which does not divide the 16 columns of "
            r"encoder\.layers\.0\.self_attn\.\w_proj\.weight; possible are 1, 2, 4, 8, 16",
        ),
        (
            {"ffn": 8, "embedding": 8},
            r"pq\.blocks: ffn, embedding have no size for .*_proj\.weight.* and 6 more; add a group.*",
        ),
        ({"*": 8, "ffn": 4}, r"pq\.blocks: 'ffn' takes nothing, groups before it have all its weights; put it first"),
        ({"fnn": 8}, r"pq\.blocks: 'fnn' matches no weight; valid is ffn, embedding, attention or a shell pattern .*"),
    ],
)
def test_bad_blocks_are_one_line_with_the_valid_choices(
    small_corpus: Corpus, blocks: dict[str, int], message: str
) -> None:
    model = toy_model(small_corpus)
    with pytest.raises(ValueError, match=rf"\A{message}\Z"):
        technique(blocks=blocks).attach(model)


def test_bad_settings_are_refused() -> None:
    for fields, message in (
        ({"blocks": {}}, "blocks: must name"),
        ({"blocks": {"ffn": 0}}, "blocks: ffn must be at least 1, is 0"),
        ({"centroids": 257}, "centroids: must be 2 to 256, is 257"),
        ({"centroids": {"ffn": 8}}, "centroids: must have the groups of blocks, ffn, embedding, attention; has ffn"),
        ({"centroids": {"ffn": 8, "embedding": 1, "attention": 8}}, "centroids: must be 2 to 256, is 1"),
        ({"iterations": 0}, "iterations: must be at least 1"),
    ):
        with pytest.raises(ValueError, match=f"^{message}"):
            PqConfig(**fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(("value", "message"), [(torch.nan, "inf or NaN"), (1e6, "1e.06, beyond fp16's 65504")])
def test_values_that_no_centroid_reaches_are_refused_by_name(small_corpus: Corpus, value: float, message: str) -> None:
    model = toy_model(small_corpus)
    with torch.no_grad():
        model.encoder.layers[0].fc1.weight[3, 3] = value
    pq = technique()
    pq.attach(model)
    before = model.state_dict()["encoder.embed_tokens.weight"].clone()
    with pytest.raises(ValueError, match=rf"^encoder\.layers\.0\.fc1\.weight: holds {message}"):
        pq.bake(model)
    assert torch.equal(model.state_dict()["encoder.embed_tokens.weight"], before), "nothing is baked by half"
