"""The split: every parameter has one route, and an error names the one that has none or two."""

from __future__ import annotations

import pytest
import torch

from tenko.comm import SplitRule
from tenko.comm.split import assign, row_sparsity

SHAPES = {
    "embed.weight": torch.Size([1000, 16]),
    "fc.weight": torch.Size([64, 16]),
    "fc.bias": torch.Size([64]),
    "scale": torch.Size([]),
}


def test_rules_by_name_size_and_dimensions() -> None:
    rules = [
        SplitRule(route="rows", match=("embed*",)),
        SplitRule(route="all_reduce", min_numel=100, exclude=("embed*",)),
        SplitRule(route="fp32", max_numel=99),
    ]
    assert assign(rules, SHAPES) == {
        "embed.weight": "rows",
        "fc.weight": "all_reduce",
        "fc.bias": "fp32",
        "scale": "fp32",
    }


@pytest.mark.parametrize(
    ("rules", "line"),
    [
        ([SplitRule(route="fp32", max_dims=1)], r"split: no rule takes embed\.weight \(16000 elements, 2 dimensions\)"),
        (
            [SplitRule(route="fp32"), SplitRule(route="server", match=("fc*",))],
            r"split: fc\.weight is taken by split\[0\] \(fp32\) and split\[1\] \(server\)",
        ),
        (
            [SplitRule(route="fp32"), SplitRule(route="server", match=("decoder*",))],
            r"split\[1\]: takes no parameter \(decoder\*\); names are like embed\.weight",
        ),
        ([SplitRule(route="rows")], r"split\[0\]: route rows takes matrices, fc\.bias is a vector"),
    ],
)
def test_an_error_names_the_parameter(rules: list[SplitRule], line: str) -> None:
    with pytest.raises(ValueError, match=f"^{line}"):
        assign(rules, SHAPES)


def test_sparsity_decides_once_it_is_known() -> None:
    rules = [
        SplitRule(route="rows", min_dims=2, min_sparsity=0.5),
        SplitRule(route="all_reduce", min_dims=2, max_sparsity=0.5),
        SplitRule(route="fp32", max_dims=1),
    ]
    before = assign(rules, SHAPES)
    assert before == {"embed.weight": "", "fc.weight": "", "fc.bias": "fp32", "scale": "fp32"}
    after = assign(rules, SHAPES, {"embed.weight": 0.5, "fc.weight": 0.1})
    assert (after["embed.weight"], after["fc.weight"]) == ("rows", "all_reduce")


@pytest.mark.parametrize(
    ("rules", "line"),
    [
        (
            [SplitRule(route="rows", match=("embed*",), min_sparsity=0.5), SplitRule(route="server")],
            r"split: embed\.weight is taken by split\[0\] \(rows\) and split\[1\] \(server\) where 0\.50 of its first",
        ),
        (
            [SplitRule(route="rows", min_dims=2, min_sparsity=0.5), SplitRule(route="fp32", max_dims=1)],
            r"split: no rule takes embed\.weight \(16000 elements, 2 dimensions\) where 0\.00 of its first",
        ),
        (
            [SplitRule(route="all_reduce", max_sparsity=0.5), SplitRule(route="rows", min_dims=2, min_sparsity=0.6)],
            r"split: no rule takes embed\.weight \(16000 elements, 2 dimensions\) where 0\.50 of",
        ),
    ],
)
def test_rules_that_fail_at_some_sparsity_are_refused_before_it_is_known(rules: list[SplitRule], line: str) -> None:
    with pytest.raises(ValueError, match=f"^{line}"):
        assign(rules, SHAPES)


def test_a_vector_has_no_rows_that_could_be_zero() -> None:
    rules = [SplitRule(route="rows", min_sparsity=0.5), SplitRule(route="all_reduce", max_sparsity=0.5)]
    assert assign(rules, SHAPES)["fc.bias"] == "all_reduce"


def test_row_sparsity_counts_rows() -> None:
    gradient = torch.zeros(8, 3)
    gradient[2, 1] = gradient[5, 0] = 1
    assert row_sparsity(gradient) == 0.75
    assert row_sparsity(torch.zeros(5)) == 0


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"min_numel": -1}, "min_numel: must be at least 0, is -1"),
        ({"min_sparsity": 1.5}, "min_sparsity: must be between 0 and 1, is 1.5"),
    ],
)
def test_rules_that_make_no_sense_are_refused(settings: dict[str, float], line: str) -> None:
    with pytest.raises(ValueError, match=f"^{line}"):
        SplitRule(route="rows", **settings)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="not with route server"):
        SplitRule(route="server", min_sparsity=0.5)


def test_limits_of_size_are_inside() -> None:
    rules = [
        SplitRule(route="rows", min_numel=16000),
        SplitRule(route="all_reduce", min_numel=1024, max_numel=1024),
        SplitRule(route="fp32", min_numel=64, max_numel=64),
        SplitRule(route="fp16", max_numel=1),
    ]
    assert list(assign(rules, SHAPES).values()) == ["rows", "all_reduce", "fp32", "fp16"]


def test_a_row_of_a_tensor_of_three_dimensions_is_all_behind_its_first() -> None:
    gradient = torch.zeros(4, 3, 2)
    gradient[1, 2, 1] = 1
    assert row_sparsity(gradient) == 0.75
