"""Scales of data: levels, their noise, their logits, and the Jacobians that lead back."""

from __future__ import annotations

from collections.abc import Callable
from math import log
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import ppl_vae as pv
from ppl_vae import data
from ppl_vae.data import AsIs, Data, Dequantized, DynamicDequantization, Levels, Logit, Unit

COUNTS = [2, 17, 256, 65536]


@pytest.fixture(scope="module")
def digits() -> Data:
    return data.load("digits")


def every_level(count: int, repeats: int = 1) -> Tensor:
    return torch.arange(float(count)).repeat(repeats, 1)


# Levels.


def test_levels_come_back_without_rounding(digits: Data) -> None:
    levels = digits.as_levels()
    assert (digits.scale, levels.scale, levels.levels) == (Unit(17), Levels(17), 17)
    for grey, whole in ((digits.train, levels.train), (digits.test, levels.test)):
        assert torch.equal(whole, whole.round())
        torch.testing.assert_close(whole / 16, grey)
    assert levels.as_levels() is levels
    for count in COUNTS[1:]:
        assert torch.equal(Unit(count).to_levels(every_level(count) / (count - 1)), every_level(count))


def test_what_is_loaded_or_binarised_says_its_scale(digits: Data) -> None:
    assert digits.static_binarization().scale == digits.dynamic_binarization().scale == Levels(2)
    assert Data(torch.rand(4, 2), torch.rand(3, 2)).scale == AsIs()
    assert AsIs().levels is None


# Noise.


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("scale", [Dequantized, Logit])
def test_noise_never_changes_the_level(count: int, scale: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even the largest and the smallest that can be drawn; and neither 0 nor 1 occurs."""
    levels, scale = every_level(count), scale(count)
    drawn = [scale.draw(levels)]
    for extreme in (lambda parts: parts - 1, lambda parts: 0):
        monkeypatch.setattr(
            torch, "randint", lambda parts, shape, extreme=extreme, **_: torch.full(shape, float(extreme(parts)))
        )
        drawn.append(scale.draw(levels))
    for x in drawn:
        v = scale.to_unit(x.double())
        assert ((v > 0) & (v < 1)).all()
        assert torch.equal(scale.to_levels(x), levels)
    scale.check(drawn[0])


@pytest.mark.parametrize("count", COUNTS[:-1])
def test_noise_is_uniform(count: int) -> None:
    levels = every_level(count, 100_000 // count)
    u = Dequantized(count).draw(levels).double() * count - levels
    error = (1 / 12 / u.numel()) ** 0.5
    assert abs(u.mean().item() - 0.5) < 4.5 * error
    assert abs(u.var().item() - 1 / 12) < 4.5 * (1 / 180 / u.numel()) ** 0.5
    assert abs((u * levels).mean() / levels.mean() - 0.5) < 4.5 * error * 2  # not tied to the level
    rows = u[:, 0], u[:, 1]
    assert abs(torch.corrcoef(torch.stack(rows))[0, 1].item()) < 4.5 / len(u) ** 0.5  # nor to that of another number


@pytest.mark.usefixtures("rng_unchanged")
def test_static_dequantization(digits: Data) -> None:
    noisy, again, other = (digits.static_dequantization(seed=seed) for seed in (3, 3, 4))
    assert (noisy.scale, noisy.dequantization) == (Dequantized(17), "static, seed 3")
    assert torch.equal(noisy.train, again.train)
    assert torch.equal(noisy.test, again.test)
    assert not torch.equal(noisy.test, other.test)
    assert torch.equal(noisy.scale.to_levels(noisy.test), digits.as_levels().test)
    assert noisy.test.dtype == torch.float32
    n = len(digits.test)
    u = [
        part * 17 - levels
        for part, levels in ((noisy.train[:n], digits.train[:n] * 16), (noisy.test, digits.test * 16))
    ]
    assert (u[0] - u[1]).abs().mean() > 0.3  # 1/3 if independent, 0 if one noise served both


def test_dynamic_dequantization(digits: Data) -> None:
    noisy = digits.dynamic_dequantization(seed=3)
    assert noisy.dequantization == "dynamic, test seed 3"
    assert torch.equal(noisy.test, digits.static_dequantization(seed=3).test)
    assert not torch.equal(noisy.test, digits.dynamic_dequantization(seed=4).test)
    index = torch.tensor([5, 3, 3, 1000])
    (first,), (second,) = noisy.train[index], noisy.train[index]
    assert (first != second).float().mean() > 0.99
    assert (first[1] != first[2]).float().mean() > 0.99  # one image seen twice has two noises
    assert torch.equal(noisy.scale.to_levels(first), digits.as_levels().train[index])
    torch.manual_seed(1)
    (first,) = noisy.train[:7]
    torch.manual_seed(1)
    assert torch.equal(first, noisy.train[:7][0])


def test_dynamic_dequantization_is_a_tensor_dataset() -> None:
    levels = torch.arange(60.0).reshape(10, 6)
    noisy = DynamicDequantization(levels, Dequantized(61))
    assert isinstance(noisy, TensorDataset)
    assert len(noisy) == 10
    for index in (3, slice(2, 5), slice(0, 0), torch.tensor([9, 0, 9]), torch.arange(10) > 4):
        (v,) = noisy[index]
        assert torch.equal((v * 61).floor(), levels[index])
    batches = [batch for (batch,) in DataLoader(noisy, batch_size=4)]
    assert torch.equal((torch.cat(batches) * 61).floor(), levels)


@pytest.mark.parametrize("margin", [1e-6, 0.05])
def test_noise_is_new_in_every_epoch(margin: float) -> None:
    """As `fit` sees it, through both programs."""
    seen: list[Tensor] = []

    class Encoder(torch.nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(x)
            return super().forward(x)

    raw = Data(torch.randint(17, (11, 5)) / 16, torch.rand(3, 5), scale=Unit(17))
    noisy = raw.dynamic_dequantization().logit_transform(margin=margin)
    vae = pv.VAE(5, 2, likelihood=pv.likelihoods.Gaussian(), encoder=Encoder(5, 4))
    pv.fit(vae.model, vae.guide, noisy.train, epochs=3, batch_size=11, progress=False)
    epochs = torch.stack(seen[-3:])
    assert torch.equal(noisy.scale.to_levels(epochs[0]), noisy.scale.to_levels(epochs[1]))
    for a, b in ((0, 1), (1, 2), (0, 2)):
        assert (epochs[a] != epochs[b]).float().mean() > 0.99


# Logits.


def test_logit_transform(digits: Data) -> None:
    for noisy in (digits.static_dequantization(), digits.dynamic_dequantization()):
        on_line = noisy.logit_transform(margin=0.05)
        assert on_line.scale == Logit(17, margin=0.05)
        assert on_line.dequantization == noisy.dequantization
        torch.testing.assert_close(on_line.test, torch.logit(0.05 + 0.9 * noisy.test))
        torch.testing.assert_close(on_line.scale.to_unit(on_line.test), noisy.test)
    (y,) = on_line.train[:7]
    assert torch.equal(on_line.scale.to_levels(y), digits.as_levels().train[:7])
    static = digits.static_dequantization()  # float32 would lose the margin near 1
    exact = torch.logit(1e-6 + (1 - 2e-6) * static.train.double())
    torch.testing.assert_close(static.logit_transform().train.double(), exact, rtol=1e-6, atol=1e-6)


SCALES: dict[str, tuple[Any, Callable[[Tensor], Tensor]]] = {
    "levels": (Levels(17), lambda k: k),
    "unit": (Unit(17), lambda k: k / 16),
    "dequantised": (Dequantized(17), lambda k: k / 17),
    "logit": (Logit(17), lambda k: torch.logit(1e-6 + (1 - 2e-6) * k / 17)),
    "logit with a margin": (Logit(17, margin=0.05), lambda k: torch.logit(0.05 + 0.9 * k / 17)),
}


@pytest.mark.parametrize("name", SCALES)
def test_jacobians_are_those_of_autograd(name: str) -> None:
    scale, forward = SCALES[name]
    level = (17 * torch.rand(7, 3, 5, dtype=torch.float64)).requires_grad_()
    x = forward(level)
    (slope,) = torch.autograd.grad(x.sum(), level)
    torch.testing.assert_close(scale.log_jacobian(x.detach()), slope.log().sum((1, 2)))
    assert scale.log_jacobian(x.detach().float()).dtype == torch.float64


def test_the_jacobian_of_bytes_is_eight_bits() -> None:
    x = torch.rand(5, 3, 7)
    torch.testing.assert_close(Dequantized(256).log_jacobian(x) / log(2), torch.full((5,), -8.0 * 21).double())


# Refusals.


@pytest.mark.parametrize(
    ("scale", "x", "match"),
    [
        (Levels(17), torch.tensor([0.0, 0.5]), "whole numbers from 0 to 16; got values from 0 to 0.5, such as 0.5"),
        (Levels(17), torch.tensor([17.0]), "such as 17"),
        (Levels(17), torch.tensor([-1.0]), "such as -1"),
        (Levels(17), torch.tensor([torch.nan]), "such as nan"),
        (Unit(17), torch.tensor([0.0, 0.3]), "levels divided by 16; got .* such as 0.3"),
        (Unit(17), torch.tensor([17 / 16]), "such as 1.0625"),
        (Dequantized(17), torch.tensor([0.3, 0.0]), "such as 0"),
        (Dequantized(17), torch.tensor([0.3, 1.0]), "such as 1"),
        (Dequantized(17), torch.arange(1, 16) / 16, "17 levels dequantised to .* u drawn for each number; got"),
        (Dequantized(17), (torch.arange(17) + 0.5) / 17, "u drawn for each number; got"),
        (Dequantized(256), torch.arange(1, 255) / 255, "u drawn for each number; got"),
        (Logit(17), torch.tensor([0.0, 14.0]), "logits of 1e-06 .* such as 14"),
        (Logit(17, margin=0.05), torch.tensor([-3.0]), "logits of 0.05"),
        (Logit(17), Logit(17).from_unit(torch.arange(1, 16) / 16), "u drawn for each number; got"),
        (AsIs(), torch.tensor([torch.inf]), "as they were loaded; got .* such as inf"),
    ],
)
def test_data_that_do_not_lie_on_a_scale_are_refused(scale: data.Scale, x: Tensor, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        scale.check(x)


@pytest.mark.parametrize("on_line", [False, True])
@pytest.mark.parametrize("shape", [(), (11, 1, 1), (1, 3, 5), (1, 1, 5)])
def test_noise_that_numbers_share_is_refused(shape: tuple[int, ...], on_line: bool) -> None:
    """One for all, for each datum, for each dimension of all data."""
    scale = Logit(256) if on_line else Dequantized(256)
    levels = torch.randint(256, (11, 3, 5))

    def placed(u: Tensor) -> Tensor:
        return scale.from_unit((levels + u) / 256)

    u = torch.rand(11, 3, 5).clamp(0.01, 0.99)
    scale.check(placed(u))
    shared = scale.holds(placed(torch.rand(shape) * 0.9 + 0.05))
    assert not shared.any()
    if shape == (11, 1, 1):  # of one datum alone
        u[7] = 0.3
        assert scale.holds(placed(u)).flatten(1).all(1).tolist() == [n != 7 for n in range(11)]


def test_few_numbers_may_agree() -> None:
    Dequantized(17).check(torch.full((7, 1), 0.3))
    Dequantized(17).check(torch.zeros(0, 3))


def test_bad_scales_are_refused(digits: Data) -> None:
    for bad in (1, 0, 2.0, 65537, None):
        with pytest.raises(ValueError, match="2 to 65536; got"):
            Levels(bad)  # type: ignore[arg-type]
    for margin in (0.0, 0.5, -1.0, float("nan")):
        with pytest.raises(ValueError, match="between 0 and ½; got"):
            digits.dynamic_dequantization().logit_transform(margin=margin)
    with pytest.raises(TypeError, match=r"floating point data, got torch.uint8"):
        DynamicDequantization(torch.ones(3, dtype=torch.uint8), Dequantized(17))
    with pytest.raises(ValueError, match="no level to differentiate by"):
        AsIs().log_jacobian(torch.rand(3, 2))


def test_transforms_come_in_their_order(digits: Data) -> None:
    dynamic, raw = digits.dynamic_dequantization(), Data(torch.rand(4, 2), torch.rand(3, 2))
    for wrong, match in (
        (raw.as_levels, "these data are numbers as they were loaded. Load data of type uint8 anew"),
        (raw.dynamic_dequantization, "numbers as they were loaded"),
        (dynamic.as_levels, "these data are 17 levels dequantised"),
        (dynamic.static_dequantization, "these data are 17 levels dequantised"),
        (digits.logit_transform, r"levels divided by 16. Call dynamic_dequantization\(\) before"),
        (dynamic.logit_transform().logit_transform, "these are logits of"),
        (digits.dynamic_binarization().dynamic_dequantization, "stay the same, but these are a DynamicBinarization"),
        (dynamic.static_binarization, r"not binarised, but these are \(dequantised: dynamic, test seed 0\)"),
        (digits.as_levels().static_binarization, "from 0 to 16"),
    ):
        with pytest.raises(ValueError, match=match):
            wrong()
    binary = digits.static_binarization().dynamic_dequantization()
    assert (binary.scale, binary.binarization) == (Dequantized(2), "static, seed 0")
