"""Masks: exact counts, nesting, ties counted once, ranks that agree, weights that stay at zero whatever moves them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tenko.compression import QuantizeConfig, QuantNoise, Technique
from tenko.compression.masks import Masks, PrunedWeights
from tenko.compression.pruning import keep_largest, magnitude, prunable, prune, random_masks, remaining_count


class Tied(nn.Module):
    """An embedding used twice and shared with the output, two matrices, a norm and biases."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.ModuleDict({"embed_tokens": nn.Embedding(12, 8, padding_idx=1), "fc": nn.Linear(8, 8)})
        self.decoder = nn.ModuleDict({"fc": nn.Linear(8, 8), "output_projection": nn.Linear(8, 12, bias=False)})
        self.decoder["embed_tokens"] = self.encoder["embed_tokens"]
        self.decoder["output_projection"].weight = self.encoder["embed_tokens"].weight
        self.norm = nn.LayerNorm(8)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.encoder["fc"](self.encoder["embed_tokens"](tokens)) + self.decoder["embed_tokens"](tokens)
        return self.decoder["output_projection"](self.norm(self.decoder["fc"](hidden)))


TOKENS = torch.tensor([[4, 5, 6, 1], [7, 8, 9, 10]])


@pytest.fixture
def model() -> Tied:
    torch.manual_seed(3)
    return Tied()


def tensors(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_parameters())


def half(model: nn.Module) -> Masks:
    """Half of all weights, the embeddings' as well."""
    found = prunable(model, embeddings=True)
    return prune(tensors(model), Masks.ones(found), fraction=0.5, rounds=1)


# What may be pruned


def test_biases_norms_and_by_default_embeddings_stay_and_a_tied_weight_counts_once(model: Tied) -> None:
    assert [w.name for w in prunable(model)] == ["encoder.fc.weight", "decoder.fc.weight"]
    with_embeddings = prunable(model, embeddings=True)
    assert [w.name for w in with_embeddings] == [
        "encoder.embed_tokens.weight",
        "encoder.fc.weight",
        "decoder.fc.weight",
    ]
    assert Masks.ones(with_embeddings).total == 12 * 8 + 2 * 64


def test_patterns_select_and_one_that_matches_nothing_is_an_error(model: Tied) -> None:
    assert [w.name for w in prunable(model, ("*fc*",), ("decoder.*",))] == ["encoder.fc.weight"]
    with pytest.raises(ValueError, match=r"^include: 'nothing' matches no weight; valid names are encoder\."):
        prunable(model, ("nothing",))
    with pytest.raises(ValueError, match=r"^include: .* matches embeddings only; set embeddings: true"):
        prunable(model, ("*embed_tokens*",))
    with pytest.raises(ValueError, match=r"^include: '\*embed_tokens\*' matches embeddings only"):
        prunable(model, ("*fc*", "*embed_tokens*"))
    with pytest.raises(ValueError, match=r"^exclude: .* leaves embeddings only"):
        prunable(model, ("*",), ("*fc*",))


@pytest.mark.parametrize("bad", [torch.tensor([0.0, 0.5]), torch.tensor([0, 2]), torch.tensor([1.0, torch.nan])])
def test_a_mask_that_is_not_0_or_1_is_refused(bad: Tensor) -> None:
    with pytest.raises(ValueError, match=r"^w: a mask holds 0 and 1 only$"):
        Masks({"w": bad})
    assert Masks({"w": torch.tensor([0.0, 1.0])})["w"].tolist() == [False, True]


# Exact counts


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=4),
    st.floats(0, 0.99),
    st.integers(1, 6),
    st.sampled_from(["global", "module"]),
    st.integers(1, 5),
)
def test_counts_are_exact_and_rounds_nested_even_where_magnitudes_are_equal(
    sizes: list[int], fraction: float, rounds: int, scope: str, values: int
) -> None:
    generator = torch.Generator().manual_seed(sum(sizes))
    # few different magnitudes: ties everywhere, zeros among them
    of = {f"w{i}": torch.randint(-values + 1, values, (2, n), generator=generator).float() for i, n in enumerate(sizes)}
    before = Masks({name: torch.ones_like(w) for name, w in of.items()})
    for number in range(1, rounds + 1):
        masks = prune(of, before, fraction=fraction, rounds=number, scope=scope)  # type: ignore[arg-type]
        total = sum(2 * n for n in sizes)
        if scope == "global":
            assert masks.remaining == round(total * (1 - fraction) ** number)
        else:
            assert masks.counts == {f"w{i}": round(2 * n * (1 - fraction) ** number) for i, n in enumerate(sizes)}
        assert masks.is_within(before)
        before = masks


def test_the_smallest_go_and_of_equal_ones_the_earlier(model: Tied) -> None:
    scores = torch.tensor([3.0, 1.0, 1.0, 0.0, 1.0, 2.0])
    alive = torch.tensor([1, 1, 1, 0, 1, 1]).bool()
    assert keep_largest(scores, alive, 3).tolist() == [True, False, False, False, True, True]
    assert keep_largest(scores, alive, 5).tolist() == alive.tolist()
    assert keep_largest(scores, alive, 0).tolist() == [False] * 6
    masks = half(model)
    kept = torch.cat([magnitude(w)[masks[n]] for n, w in tensors(model).items() if n in masks])
    gone = torch.cat([magnitude(w)[~masks[n]] for n, w in tensors(model).items() if n in masks])
    assert gone.max() <= kept.min()


def test_ties_are_decided_alike_in_whatever_order_masks_were_read() -> None:
    of = {"b": torch.ones(1, 5), "a": torch.ones(1, 5)}
    ones = {name: torch.ones_like(w) for name, w in of.items()}
    masks = prune(of, Masks(ones), fraction=0.3, rounds=1)
    assert masks == prune(of, Masks(dict(reversed(ones.items()))), fraction=0.3, rounds=1)
    assert masks.counts == {"a": 2, "b": 5}


def test_weights_that_were_pruned_stay_pruned_whatever_they_hold() -> None:
    first = prune({"w": torch.tensor([1.0, 2.0, 3.0, 4.0])}, Masks({"w": torch.ones(4)}), fraction=0.5, rounds=1)
    second = prune({"w": torch.tensor([9.0, 9.0, 3.0, 4.0])}, first, fraction=0.5, rounds=2)
    assert second["w"].tolist() == [False, False, False, True]


def test_global_scope_ranks_all_together_and_module_scope_each_tensor() -> None:
    of = {"small": torch.full((1, 4), 0.1), "large": torch.full((1, 4), 10.0)}
    ones = Masks({name: torch.ones_like(w) for name, w in of.items()})
    assert prune(of, ones, fraction=0.5, rounds=1).counts == {"small": 0, "large": 4}
    assert prune(of, ones, fraction=0.5, rounds=1, scope="module").counts == {"small": 2, "large": 2}


@pytest.mark.parametrize("fraction", [-0.1, 1.0, 1.5, float("nan")])
def test_a_fraction_outside_0_to_1_is_an_error(fraction: float) -> None:
    with pytest.raises(ValueError, match=r"^fraction: must be in \[0, 1\), is"):
        remaining_count(10, fraction, 1)


def test_weights_that_are_not_finite_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"^w: holds inf or NaN"):
        prune({"w": torch.tensor([1.0, torch.nan])}, Masks({"w": torch.ones(2)}), fraction=0.5, rounds=1)


def test_another_granularity_prunes_whole_rows() -> None:
    class Rows:
        def units(self, scores: Tensor) -> Tensor:
            return scores.any(dim=1) if scores.dtype == torch.bool else scores.sum(dim=1)

        def spread(self, units: Tensor, like: Tensor) -> Tensor:
            return units.reshape(-1, 1).expand(like.shape)

    weight = torch.tensor([[5.0, 0.0], [1.0, 1.0], [3.0, 3.0]])
    masks = prune({"w": weight}, Masks({"w": torch.ones(3, 2)}), fraction=1 / 3, rounds=1, granularity=Rows())
    assert masks["w"].tolist() == [[True, True], [False, False], [True, True]]


def test_random_masks_have_the_same_counts_and_are_nested_and_seeded(model: Tied) -> None:
    first = half(model)
    second = prune(tensors(model), first, fraction=0.5, rounds=2)
    random = [random_masks(masks, 7) for masks in (first, second)]
    assert [m.counts for m in random] == [first.counts, second.counts]
    assert random[1].is_within(random[0])
    assert not random[0].is_within(first)
    assert random_masks(first, 7) == random[0]
    assert random_masks(first, 8) != random[0]


# Masks as values


def test_packed_bits_come_back_and_damaged_ones_are_refused(model: Tied) -> None:
    masks = half(model)
    odd = Masks({**masks, "odd": torch.tensor([[1, 0, 1], [1, 1, 1], [0, 0, 1]])})
    state = odd.state_dict()
    assert state["odd.bits"].tolist() == [0b00111101, 1]
    again = Masks.from_state_dict(state)
    assert again == odd
    assert again.digest() == odd.digest() != masks.digest()
    with pytest.raises(ValueError, match=r"^odd: 1 bytes of mask don't fit \[3, 3\]"):
        Masks.from_state_dict({**state, "odd.bits": state["odd.bits"][:1]})
    with pytest.raises(ValueError, match=r"^odd: a mask without \.shape"):
        Masks.from_state_dict({name: value for name, value in state.items() if name != "odd.shape"})


def test_masks_are_recovered_from_exact_zeros(model: Tied) -> None:
    masks = half(model)
    assert not Masks.of_zeros(model), "the padding's row of zeros prunes nothing"
    technique = PrunedWeights(masks)
    technique.attach(model)
    technique.bake(model)
    found = Masks.of_zeros(model)
    padding = found["encoder.embed_tokens.weight"][1]
    assert not padding.any()
    assert found.keys() == masks.keys()
    for name in ("encoder.fc.weight", "decoder.fc.weight"):
        assert torch.equal(found[name], masks[name])
    assert list(Masks.of_zeros(model, ("*fc*",), ("encoder.*",))) == ["decoder.fc.weight"]


# The technique


def pruned_values(model: nn.Module, masks: Masks) -> Tensor:
    return torch.cat([tensors(model)[name].detach()[~mask] for name, mask in masks.items()])


def test_pruned_is_a_technique() -> None:
    assert isinstance(PrunedWeights(Masks({})), Technique)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_pruned_weights_are_zero_after_every_update_under_momentum_and_decay(model: Tied, optimizer: str) -> None:
    parameters = list(model.parameters())
    if optimizer == "sgd":
        steps: torch.optim.Optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.1)
    else:
        steps = torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.1)
    for _ in range(2):  # momentum of dense gradients, which would move the pruned weights
        model(TOKENS).square().mean().backward()
        steps.step()
        steps.zero_grad()
    masks = half(model)
    technique = PrunedWeights(masks)
    technique.attach(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for update in range(3):
        technique.before_update(update)
        for _ in range(2):  # accumulated
            model(TOKENS).square().mean().backward()
        for name, mask in masks.items():
            gradient = tensors(model)[name].grad
            assert gradient is not None
            assert not gradient[~mask].any(), name
            assert gradient[mask].any(), name
        steps.step()
        if update == 0:
            assert pruned_values(model, masks).any(), "momentum revives what after_update must zero again"
        technique.after_update(update)
        steps.zero_grad()
        values = pruned_values(model, masks)
        assert torch.equal(values, torch.zeros_like(values))
        assert not values.signbit().any(), "plain zeros"
    assert all(not torch.equal(before[name], p) for name, p in model.named_parameters())


def test_an_inf_under_the_mask_neither_reaches_the_gradient_nor_the_weight(model: Tied) -> None:
    masks = half(model)
    technique = PrunedWeights(masks)
    technique.attach(model)
    weight, mask = model.encoder["fc"].weight, masks["encoder.fc.weight"]
    (weight * torch.where(mask, 1.0, torch.inf)).sum().backward()
    assert weight.grad is not None
    assert torch.equal(weight.grad, mask.float())
    with torch.no_grad():
        weight[~mask] = torch.nan
    technique.after_update(0)
    assert not weight[~mask].any()


def test_hooks_go_with_bake_and_the_file_decides_how_to_store(model: Tied) -> None:
    masks = half(model)
    technique = PrunedWeights(masks)
    technique.attach(model)
    technique.bake(model)
    assert technique.pack("encoder.fc.weight") is None
    model(TOKENS).square().mean().backward()
    gradient = model.encoder["fc"].weight.grad
    assert gradient is not None
    assert gradient[~masks["encoder.fc.weight"]].any()


def test_stacks_with_a_parametrization_on_the_same_weights(model: Tied) -> None:
    masks = half(model)
    pruned = PrunedWeights(masks)
    pruned.attach(model)
    int8 = QuantNoise(QuantizeConfig())
    int8.attach(model)
    steps = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)
    model(TOKENS).square().mean().backward()
    steps.step()
    pruned.after_update(0)
    int8.bake(model)
    pruned.bake(model)
    assert not pruned_values(model, masks).any()
    assert model.encoder["embed_tokens"].weight is model.decoder["output_projection"].weight


def test_a_checkpoint_of_other_masks_is_refused_and_that_of_the_same_zeroed(model: Tied) -> None:
    masks = half(model)
    technique = PrunedWeights(masks)
    technique.attach(model)
    other = PrunedWeights(random_masks(masks, 1))
    with pytest.raises(ValueError, match="trained under other masks"):
        technique.load_state_dict(other.state_dict())
    with torch.no_grad():
        model.encoder["fc"].weight.fill_(1)
    technique.load_state_dict(PrunedWeights(masks).state_dict())
    assert not pruned_values(model, masks).any()


def test_a_mask_of_another_model_is_refused(model: Tied) -> None:
    with pytest.raises(ValueError, match=r"^other: the mask has shape \[2, 2\], the model's weight none$"):
        PrunedWeights(Masks({"other": torch.ones(2, 2)})).attach(model)
    with pytest.raises(
        ValueError, match=r"^encoder\.fc\.weight: the mask has shape \[8\], the model's weight \[8, 8\]$"
    ):
        PrunedWeights(Masks({"encoder.fc.weight": torch.ones(8)})).attach(model)


# Ranks

WORKER = """
    import sys, torch, torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel
    from tenko.comm import QuantizedAllReduce, register
    from tenko.compression.masks import Masks, PrunedWeights, check_ranks_agree, share
    from tenko.compression.pruning import prune

    dist.init_process_group("gloo")
    rank = dist.get_rank()
    assert dist.get_world_size() == 2
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(40, 40), torch.nn.Linear(40, 3))
    ones = Masks({n: torch.ones(p.shape) for n, p in model.named_parameters() if p.dim() > 1})
    mine = None
    if rank == 0:  # no other rank computes masks
        mine = prune(dict(model.named_parameters()), ones, fraction=0.5, rounds=1)
    masks = share(mine, ones)
    assert masks.remaining == 860, masks.remaining
    check_ranks_agree(masks)
    try:
        check_ranks_agree(ones if rank else masks)
    except RuntimeError as error:
        assert "masks differ between ranks (rank 0: " in str(error), error
    else:
        raise AssertionError("different masks were not noticed")

    technique = PrunedWeights(masks)
    technique.attach(model)
    wrapped = DistributedDataParallel(model)
    if sys.argv[1] == "3 bits":
        register(wrapped, QuantizedAllReduce(bits=3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    generator = torch.Generator().manual_seed(rank)
    for update in range(4):
        x = torch.randn(8, 40, generator=generator)
        with wrapped.no_sync():
            wrapped(x).square().mean().backward()
        wrapped(x.flip(0)).square().mean().backward()
        for name, mask in masks.items():
            gradient = dict(model.named_parameters())[name].grad
            assert not gradient[~mask].any(), "what came off the wire is zero where it was pruned"
            assert gradient[mask].any()
        optimizer.step()
        optimizer.zero_grad()
        technique.after_update(update)
        for name, mask in masks.items():
            weight = dict(model.named_parameters())[name].detach()
            assert not weight[~mask].any() and weight[mask].all()
            moments = optimizer.state[dict(model.named_parameters())[name]]
            assert not moments["exp_avg"][~mask].any()
        for parameter in model.parameters():
            others = [torch.empty_like(parameter) for _ in range(2)]
            dist.all_gather(others, parameter.detach())
            assert torch.equal(*others)
    print(f"holds: {rank}")
    dist.destroy_process_group()
"""


@pytest.mark.torchrun
@pytest.mark.parametrize("wire", ["fp32", "3 bits"])
def test_ranks_agree_on_masks_and_the_wire_carries_zeros(tmp_path: Path, wire: str) -> None:
    script = tmp_path / "worker.py"
    script.write_text(textwrap.dedent(WORKER))
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script), wire],
        env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    # Not by lines: two ranks on one pipe may print theirs as one.
    assert sorted(re.findall(r"holds: (\d)", done.stdout)) == ["0", "1"], done.stderr[-3000:]
