"""One adapter from many: values worked by hand, liars, and adapters that cannot be used."""

import math
from pathlib import Path

import numpy as np
import pytest

from fedmkt.ml.adapters import Adapter, pack_adapter, unpack_adapter
from fedmkt.ml.averaging import Contribution, average_adapters, bounded_weights, trimmed_each_end
from fedmkt.ml.models import load_base
from fedmkt.ml.party import Party
from fedmkt.protocol import AverageRule, FederationConfig, LoraConfig
from tiny_models import save_tiny

CONFIG = {"r": 1, "peft_type": "LORA"}
RULES: tuple[AverageRule, ...] = ("mean", "median", "trimmed_mean")


def adapter(*values: float, name: str = "a") -> bytes:
    return pack_adapter(Adapter(CONFIG, {name: np.array(values, np.float32)}))


def given(*blobs: bytes) -> list[Contribution]:
    return [Contribution(f"site-{number}", blob, 10) for number, blob in enumerate(blobs)]


def averaged(contributions: list[Contribution], rule: AverageRule) -> list[float]:
    blob = average_adapters(contributions, rule).blob
    assert blob is not None
    values: list[float] = unpack_adapter(blob).tensors["a"].tolist()
    return values


def test_the_mean_is_weighted_by_private_samples() -> None:
    parts = [Contribution("north", adapter(1.0, 2.0), 300), Contribution("south", adapter(5.0, 10.0), 100)]
    assert averaged(parts, "mean") == [2.0, 4.0]
    blob = average_adapters(parts).blob
    assert blob is not None
    assert unpack_adapter(blob).config == CONFIG


@pytest.mark.parametrize(
    ("rule", "expected"), [("mean", [22.0, 3.0]), ("median", [3.0, 3.0]), ("trimmed_mean", [3.0] * 2)]
)
def test_five_sites_by_hand(rule: AverageRule, expected: list[float]) -> None:
    # sorted: 1 2 3 4 100 and 1 2 3 4 5; a fifth at either end is one value
    parts = given(adapter(4, 5), adapter(100, 4), adapter(1, 3), adapter(3, 2), adapter(2, 1))
    assert averaged(parts, rule) == expected


@pytest.mark.parametrize(("rule", "expected"), [("mean", 4.0), ("median", 2.5), ("trimmed_mean", 2.5)])
def test_an_even_number_of_sites_has_the_middle_of_the_two_in_the_middle(rule: AverageRule, expected: float) -> None:
    assert averaged(given(adapter(1), adapter(10), adapter(2), adapter(3)), rule) == [expected]


@pytest.mark.parametrize(("sites", "trimmed"), [(1, 0), (2, 0), (3, 1), (4, 1), (5, 1), (9, 1), (10, 2), (100, 20)])
def test_a_fifth_is_trimmed_at_either_end_and_something_is_left(sites: int, trimmed: int) -> None:
    assert trimmed_each_end(sites) == trimmed
    assert 2 * trimmed < sites


@pytest.mark.parametrize("rule", RULES)
def test_one_site_alone_and_sites_that_agree_give_that_adapter(rule: AverageRule) -> None:
    assert average_adapters(given(adapter(0.1)), rule).blob == adapter(0.1)
    same = [Contribution(f"site-{samples}", adapter(0.1), samples) for samples in (1, 2, 3, 5)]
    assert average_adapters(same, rule).blob == adapter(0.1)


@pytest.mark.parametrize("rule", RULES)
def test_whatever_the_rule_the_average_is_what_a_slow_twin_gives(rule: AverageRule) -> None:
    random = np.random.default_rng(7)
    rows = random.normal(size=(7, 12)).astype(np.float32)
    samples = [3, 1, 4, 1, 5, 9, 2]
    expected = []
    for column in rows.T.tolist():
        ranked = sorted(column)
        if rule == "mean":
            expected.append(math.fsum(x * n for x, n in zip(column, samples, strict=True)) / sum(samples))
        else:
            expected.append(ranked[3] if rule == "median" else math.fsum(ranked[1:6]) / 5)
    parts = [
        Contribution(str(n), adapter(*row), count) for n, (row, count) in enumerate(zip(rows, samples, strict=True))
    ]
    np.testing.assert_allclose(averaged(parts, rule), expected, rtol=1e-6)


def test_an_adapter_a_thousand_times_too_large_moves_the_mean_and_not_the_median(tmp_path: Path) -> None:
    party = Party(load_base(save_tiny(tmp_path / "tiny", "llama"), device="cpu"), LoraConfig(rank=2), seed=0)
    honest = unpack_adapter(party.adapter_bytes())
    random = np.random.default_rng(0)
    near = [
        {name: value + random.normal(0, 0.01, value.shape).astype(np.float32) for name, value in honest.tensors.items()}
        for _ in range(4)
    ]
    lie = {name: 1000 * value for name, value in honest.tensors.items()}
    parts = given(*(pack_adapter(Adapter(honest.config, tensors)) for tensors in (lie, *near)))
    moved: dict[str, float] = {}
    for rule in RULES:
        blob = average_adapters(parts, rule).blob
        assert blob is not None
        party.load_adapter_bytes(blob)
        found = unpack_adapter(blob).tensors
        moved[rule] = max(float(np.abs(found[name] - value).max()) for name, value in honest.tensors.items())
    assert moved["mean"] > 10
    assert moved["median"] < 0.05
    assert moved["trimmed_mean"] < 0.05


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_adapter_that_is_not_finite_is_left_out_by_name(rule: AverageRule, value: float) -> None:
    parts = [*given(adapter(1.0), adapter(1.0)), Contribution("south", adapter(value), 10)]
    average = average_adapters(parts, rule)
    assert average.blob == adapter(1.0)
    assert average.left_out == {
        "south": "its adapter: tensor 'a' has 1 values that are not finite; train again from the last good state"
    }


def test_what_most_sites_sent_is_the_measure_even_if_the_first_one_differs() -> None:
    average = average_adapters(given(adapter(9.0, name="b"), adapter(1.0), adapter(3.0)))
    assert average.blob == adapter(2.0)
    assert list(average.left_out) == ["site-0"]
    assert "2 names differ" in average.left_out["site-0"]


def test_settings_that_mean_the_same_are_no_difference() -> None:
    tensors = {"a": np.ones(1, np.float32)}
    one, other = (pack_adapter(Adapter({"r": 1, "lora_alpha": alpha}, tensors)) for alpha in (16, 16.0))
    average = average_adapters(given(one, other, one))
    assert (average.blob, average.left_out) == (one, {})


def test_nothing_usable_is_no_average() -> None:
    assert average_adapters([]).blob is None
    average = average_adapters(given(b"no tar"))
    assert average.blob is None
    assert average.left_out["site-0"].startswith("its adapter: the tar")


@pytest.mark.parametrize("samples", [0, -1])
def test_a_contribution_needs_samples(samples: int) -> None:
    with pytest.raises(ValueError, match="must be positive"):
        average_adapters([Contribution("north", adapter(1.0), samples)])


def test_no_site_of_three_weighs_more_than_half_whatever_it_says() -> None:
    assert bounded_weights([300, 100]) == [0.75, 0.25]
    assert bounded_weights([10**12, 30, 10]) == [0.5, 0.375, 0.125]
    assert bounded_weights([2, 1, 1]) == [0.5, 0.25, 0.25]


def test_a_rule_without_averaging_is_refused() -> None:
    with pytest.raises(ValueError, match="average_rule is 'median' but average_adapters is off"):
        FederationConfig(name="tiny", sites=("north",), average_rule="median")
