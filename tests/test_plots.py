"""The pictures show the data they are given, in the right places, and say what they leave out."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from math import sqrt
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from ppl_vae import plots


@pytest.fixture(autouse=True)
def drawn() -> Iterator[None]:
    """Renders every figure of a test, because matplotlib notices much only then, and closes it."""
    yield
    for number in plt.get_fignums():
        plt.figure(number).canvas.draw()
    plt.close("all")


def picture(ax: Axes) -> np.ndarray:
    return np.asarray(ax.images[0].get_array())


def legend(ax: Axes) -> list[str]:
    return [text.get_text() for text in ax.get_legend().get_texts()]


def test_importing_plots_does_not_import_pyplot() -> None:
    code = "import sys; from ppl_vae import plots; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_picture_is_drawn_on_the_axes_it_is_given() -> None:
    axes = plt.subplots(2, 5)[1].flat
    images = torch.rand(4, 5, 5)
    draw = [
        lambda ax: plots.loss_curve(SimpleNamespace(loss=[2.0, 1.0], validation=[]), ax=ax),
        lambda ax: plots.image_grid(images, ax=ax),
        lambda ax: plots.reconstructions(images, images, ax=ax),
        lambda ax: plots.latent_scatter(torch.randn(9, 3), ax=ax),
        lambda ax: plots.manifold(lambda z: torch.zeros(len(z), 5, 5), size=2, ax=ax),
        lambda ax: plots.estimate_against_samples([1, 2], [-2.0, -1.0], ax=ax),
        lambda ax: plots.pareto_k(torch.rand(5), ax=ax),
        lambda ax: plots.ladder(["ELBO", "IWAE 10"], [-2.0, -1.0], ax=ax),
        lambda ax: plots.kl_per_dimension(torch.rand(7, 3), ax=ax),
        lambda ax: plots.calibration(torch.rand(500), ax=ax),
    ]
    for function, ax in zip(draw, axes, strict=True):
        assert function(ax) is ax
        assert ax.has_data()
    assert len(plt.get_fignums()) == 1


def test_loss_curve_draws_both_losses_by_epoch() -> None:
    ax = plots.loss_curve(SimpleNamespace(loss=[3.0, 2.0, 1.5, 1.2], validation=[3.2, 2.4, 1.9, 1.7]))
    training, validation = ax.lines
    assert training.get_xydata().tolist() == [[1, 3.0], [2, 2.0], [3, 1.5], [4, 1.2]]
    assert validation.get_xydata().tolist() == [[1, 3.2], [2, 2.4], [3, 1.9], [4, 1.7]]
    assert legend(ax) == ["training", "validation"]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("epoch", "loss (nats per datum)")
    assert ax.get_title() == ""
    assert ax.get_ylim()[1] > 3.2


def test_loss_curve_cuts_a_beginning_that_dwarfs_the_end_and_says_so() -> None:
    end = [100.0 + 10.0 / epoch for epoch in range(3, 21)]
    ax = plots.loss_curve(SimpleNamespace(loss=[12345.0, 900.0, *end], validation=[]))
    low, high = ax.get_ylim()
    assert low < min(end)
    assert max(end) < high < 120.0
    assert "12,345.0 until epoch 2" in ax.get_title()


@pytest.mark.parametrize("loss", [[5.0], [5.0, 5.0, 5.0, 5.0], [float("inf"), 3.0, 2.0, float("nan")]])
def test_loss_curve_of_few_equal_or_infinite_losses(loss: list[float]) -> None:
    assert plots.loss_curve(SimpleNamespace(loss=loss, validation=[])).get_title() == ""


def test_loss_curve_refuses_an_empty_history() -> None:
    with pytest.raises(ValueError, match="Train for at least one epoch"):
        plots.loss_curve(SimpleNamespace(loss=[], validation=[]))


@pytest.mark.parametrize("gap", [0, 1, 3])
@pytest.mark.parametrize("channels", [(), (1,), (3,)])
def test_image_grid_puts_each_image_in_its_place(gap: int, channels: tuple[int, ...]) -> None:
    images = torch.rand(5, *channels, 4, 6)
    tiled = picture(plots.image_grid(images, columns=3, gap=gap))
    assert tiled.shape[:2] == (2 * 4 + gap, 3 * 6 + 2 * gap)
    for i, image in enumerate(images):
        top, left = i // 3 * (4 + gap), i % 3 * (6 + gap)
        tile = tiled[top : top + 4, left : left + 6]
        expected = image.movedim(0, -1) if channels == (3,) else image.reshape(4, 6)
        np.testing.assert_allclose(tile, expected)
    assert (tiled[4 : 4 + gap] == 1.0).all()
    assert (tiled[4 + gap :, 2 * (6 + gap) :] == 1.0).all()


def test_image_grid_is_square_clips_and_has_a_title() -> None:
    ax = plots.image_grid(torch.full((9, 2, 2), 1.5), gap=0, title="samples")
    assert picture(ax).shape == (6, 6)
    assert (picture(ax) == 1.0).all()
    assert ax.images[0].get_clim() == (0.0, 1.0)
    assert ax.get_title() == "samples"
    assert (picture(plots.image_grid(-torch.rand(1, 2, 2))) == 0.0).all()


@pytest.mark.parametrize(
    "images",
    [
        torch.rand(4, 4, requires_grad=True).expand(2, 4, 4),
        torch.rand(2, 4, 4).bfloat16(),
        torch.tensor([[[True, False]]]),
        np.random.default_rng(0).random((2, 4, 4)),
    ],
    ids=["gradient", "bfloat16", "bool", "numpy"],
)
def test_image_grid_takes_any_array(images: torch.Tensor | np.ndarray) -> None:
    first = torch.as_tensor(images)[0].detach().double()
    np.testing.assert_allclose(picture(plots.image_grid(images))[: first.shape[0], : first.shape[1]], first)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.rand(4, 784), "shape"),
        (torch.rand(4, 2, 8, 8), "C = 1 or 3"),
        (torch.rand(0, 8, 8), "at least one image"),
        (torch.full((1, 8, 8), 255, dtype=torch.uint8), "up to 255, which look like levels"),
    ],
)
def test_image_grid_refuses_what_are_no_images(images: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plots.image_grid(images)


@pytest.mark.parametrize("options", [{"columns": 0}, {"gap": -1}])
def test_image_grid_refuses_impossible_grids(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="columns >= 1 and gap >= 0"):
        plots.image_grid(torch.rand(2, 3, 3), **options)


def test_reconstructions_stand_below_their_images() -> None:
    images, reconstructed = torch.rand(12, 4, 6), torch.rand(12, 4, 6)
    ax = plots.reconstructions(images, reconstructed, num_images=3)
    tiled = picture(ax)
    assert tiled.shape == (4 + 1 + 4, 3 * 6 + 2)
    np.testing.assert_allclose(tiled[:4, 7:13], images[1])
    np.testing.assert_allclose(tiled[5:, 7:13], reconstructed[1])
    names = dict(zip(ax.get_yticks(), [label.get_text() for label in ax.get_yticklabels()], strict=True))
    assert names == {1.5: "input", 6.5: "reconstruction"}
    assert picture(plots.reconstructions(images[:2], reconstructed[:2])).shape == (9, 13)


def test_reconstructions_refuses_unpaired_images() -> None:
    with pytest.raises(ValueError, match="in pairs"):
        plots.reconstructions(torch.rand(3, 4, 4), torch.rand(2, 4, 4))
    with pytest.raises(ValueError, match="num_images=0"):
        plots.reconstructions(torch.rand(3, 4, 4), torch.rand(3, 4, 4), num_images=0)


def test_latent_scatter_draws_two_dimensions_as_they_are_by_class() -> None:
    latents, labels = torch.randn(30, 2), torch.arange(30) % 3
    ax = plots.latent_scatter(latents, labels)
    assert legend(ax) == ["0", "1", "2"]
    for dots, label in zip(ax.lines, range(3), strict=True):
        np.testing.assert_allclose(dots.get_xydata(), latents[labels == label])
    assert len({dots.get_color() for dots in ax.lines}) == 3
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("$z_1$", "$z_2$")


def test_latent_scatter_without_labels_has_no_legend() -> None:
    assert plots.latent_scatter(torch.randn(5, 2)).get_legend() is None


def test_latent_scatter_finds_the_directions_of_greatest_variance() -> None:
    z = torch.randn(400, 4, dtype=torch.float64)
    z = torch.linalg.qr(z - z.mean(0))[0] * torch.tensor([1.0, 9.0, 0.1, 3.0])
    rotation = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64))[0]
    ax = plots.latent_scatter(z @ rotation + 7.0)
    x, y = ax.lines[0].get_data()
    np.testing.assert_allclose(np.abs(x), z[:, 1].abs(), atol=1e-9)
    np.testing.assert_allclose(np.abs(y), z[:, 3].abs(), atol=1e-9)
    # 81 / 91.01 and 9 / 91.01
    assert ax.get_xlabel() == "first direction of greatest variance (89%)"
    assert ax.get_ylabel() == "second direction of greatest variance (10%)"


def test_latent_scatter_tells_twenty_classes_apart() -> None:
    ax = plots.latent_scatter(torch.randn(40, 2), np.array([f"class {i % 20}" for i in range(40)]))
    assert len({(dots.get_color(), dots.get_marker()) for dots in ax.lines}) == 20


@pytest.mark.parametrize(
    ("latents", "labels", "message"),
    [
        (torch.randn(5, 1), None, "N, D >= 2"),
        (torch.full((5, 2), torch.nan), None, "finite"),
        (torch.randn(5, 2), torch.arange(4), "labels of shape"),
        (torch.randn(30, 2), torch.randn(30), "at most 20 classes"),
    ],
)
def test_latent_scatter_refuses(latents: torch.Tensor, labels: torch.Tensor | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plots.latent_scatter(latents, labels)


def test_manifold_grows_to_the_right_and_upwards_over_quantiles_of_the_prior() -> None:
    seen: list[torch.Tensor] = []

    def decode(z: torch.Tensor) -> torch.Tensor:
        seen.append(z)
        shares = torch.special.ndtr(z)  # red tells z1, green tells z2
        colours = torch.stack([shares[:, 0], shares[:, 1], torch.zeros(len(z))], dim=1)
        return colours[:, :, None, None].expand(-1, 3, 4, 6)

    ax = plots.manifold(decode, size=5)
    assert seen[0].shape == (25, 2)
    assert seen[0].dtype == torch.float32
    pixels = picture(ax)
    assert pixels.shape == (20, 30, 3)
    shares = np.array([0.1, 0.3, 0.5, 0.7, 0.9])
    for row in range(0, 20, 4):
        np.testing.assert_allclose(pixels[row, ::6, 0], shares, atol=1e-6)
    for column in range(0, 30, 6):
        np.testing.assert_allclose(pixels[::4, column, 1], shares[::-1], atol=1e-6)
    # A tick of z stands in the middle of the tile decoded from it.
    for position, label in zip(ax.get_xticks(), ax.get_xticklabels(), strict=True):
        at = torch.special.ndtri(torch.tensor(pixels[0, int(position), 0])).item()
        assert float(label.get_text().replace("−", "-")) == pytest.approx(at, abs=0.051)
    for position, label in zip(ax.get_yticks(), ax.get_yticklabels(), strict=True):
        at = torch.special.ndtri(torch.tensor(pixels[int(position), 0, 1])).item()
        assert float(label.get_text().replace("−", "-")) == pytest.approx(at, abs=0.051)


def test_manifold_records_no_gradient() -> None:
    weight = torch.ones((), requires_grad=True)

    def decode(z: torch.Tensor) -> torch.Tensor:
        images = (weight * z[:, 0]).sigmoid()[:, None, None]
        assert not images.requires_grad
        return images

    plots.manifold(decode, size=1)


def test_manifold_refuses_the_wrong_number_of_images() -> None:
    with pytest.raises(ValueError, match="Expected 4 images from decode"):
        plots.manifold(lambda z: torch.rand(3, 4, 4), size=2)
    with pytest.raises(ValueError, match="size=0"):
        plots.manifold(lambda z: torch.rand(3, 4, 4), size=0)


def test_estimate_against_samples_sorts_and_bands_of_two_standard_errors() -> None:
    ax = plots.estimate_against_samples(
        [100, 1, 10], torch.tensor([-1.0, -3.0, -2.0]), [0.1, 0.5, 0.2], exact=-0.9, label="IS"
    )
    curve, exact = ax.lines
    np.testing.assert_allclose(curve.get_xydata(), [[1, -3], [10, -2], [100, -1]])
    corners = ax.collections[0].get_paths()[0].vertices
    for x, low, high in [(1, -4.0, -2.0), (10, -2.4, -1.6), (100, -1.2, -0.8)]:
        heights = corners[corners[:, 0] == x, 1]
        assert (heights.min(), heights.max()) == pytest.approx((low, high))
    assert set(exact.get_ydata()) == {-0.9}
    assert ax.get_xscale() == "log"
    assert legend(ax) == ["IS ± 2 standard errors", "exact"]


def test_estimates_compare_on_one_axes() -> None:
    ax = plots.estimate_against_samples([1, 10], [-3.0, -2.0], label="a")
    plots.estimate_against_samples([1, 10], [-2.5, -1.9], label="b", ax=ax)
    assert legend(ax) == ["a", "b"]
    assert ax.lines[0].get_color() != ax.lines[1].get_color()


@pytest.mark.parametrize(
    ("num_samples", "log_px", "error"),
    [([1, 2], [0.0], None), ([], [], None), ([0, 1], [0.0, 1.0], None), ([1], [0.0], [])],
)
def test_estimate_against_samples_refuses(
    num_samples: list[int], log_px: list[float], error: list[float] | None
) -> None:
    with pytest.raises(ValueError, match="Expected one number of samples"):
        plots.estimate_against_samples(num_samples, log_px, error)


LADDER = ["ELBO", "IWAE 10", "IWAE 100", "annealed", "upper bound"]
SIDES = ["lower", "lower", "lower", "lower", "upper"]


def test_ladder_puts_each_rung_in_its_row_with_its_value_and_what_it_adds() -> None:
    values = torch.tensor([-97.7, -95.1, -94.0, -92.2, -92.1], requires_grad=True)
    ax = plots.ladder(LADDER, values, [np.nan, 0.2, 0.1, 0.05, 0.02], sides=SIDES, exact=-92.15)
    lower, upper = ax.containers
    np.testing.assert_allclose(lower[0].get_xydata(), [[-97.7, 0], [-95.1, 1], [-94.0, 2], [-92.2, 3]], rtol=1e-6)
    np.testing.assert_allclose(upper[0].get_xydata(), [[-92.1, 4]], rtol=1e-6)
    bars = [segment[:, 0] for segment in lower[2][0].get_segments() if len(segment)]  # of an unknown error is none
    np.testing.assert_allclose(bars, [[-95.5, -94.7], [-94.2, -93.8], [-92.3, -92.1]], rtol=1e-6)
    assert lower[0].get_color() != upper[0].get_color()
    assert (lower[0].get_marker(), upper[0].get_marker()) == (">", "<"), "markers point to where the truth is"
    assert [label.get_text() for label in ax.get_yticklabels()] == LADDER
    assert ax.get_ylim() == (4.5, -0.5), "from top to bottom, as given"
    texts = {text.get_text(): text.xy[1] for text in ax.texts}
    assert texts == {
        **{"−97.70": 0, "−95.10": 1, "−94.00": 2, "−92.20": 3, "−92.10": 4},
        **{"+2.60": 0.5, "+1.10": 1.5, "+1.80": 2.5, "+0.10": 3.5},
    }
    assert ax.get_xlabel() == "log p(x) (nats per datum)"
    assert set(legend(ax)) == {
        "exact: −92.15",
        "lower bound ± 2 standard errors",
        "upper bound ± 2 standard errors",
    }
    assert set(ax.lines[-1].get_xdata()) == {-92.15}


@pytest.mark.parametrize(
    ("values", "outside", "texts"),
    [
        ([-122.3, -92.6, -92.4, -92.2, -92.1], {0}, {"−122.30", "+29.70"}),
        ([-130.0, -98.2, -92.4, -92.2, -92.1], {0, 1}, {"−98.20", "+31.80"}),
        ([-92.6, -92.5, -92.4, -92.2, 400.0], {4}, {"400.00", "+492.20"}),
        ([-9.80, -9.62, -9.60, -9.60, -9.594], {0}, {"−9.800", "+0.180", "+0.000", "+0.006"}),
        ([445.0, 454.0, 470.0, 492.0, 494.0], set(), {"445.00", "+22.00"}),
        ([-1.0, -1.0, -1.0, -1.0, -1.0], set(), {"−1.00", "+0.00"}),
        ([-5.0, -1.0, -1.0, -1.0, -1.0], {0}, {"−5.00", "+4.00"}),
    ],
)
def test_ladder_leaves_off_the_scale_what_would_hide_the_rest(
    values: list[float], outside: set[int], texts: set[str]
) -> None:
    ax = plots.ladder(LADDER, values, sides=SIDES)
    low, high = ax.get_xlim()
    assert {row for row, value in enumerate(values) if not low < value < high} == outside
    arrows = [text for text in ax.texts if text.get_text() == "off the scale"]
    assert {text.xy for text in arrows} == {(0.0 if values[row] < low else 1.0, row) for row in outside}
    assert texts <= {text.get_text() for text in ax.texts}


def test_ladder_has_its_scale_from_wide_bars_too() -> None:
    ax = plots.ladder(LADDER, [-27.67, -27.56, -27.56, -27.56, -27.55], [np.nan, 0.25, np.nan, 0.1, 0.1], sides=SIDES)
    assert ax.get_xlim()[0] < -28.06
    assert "off the scale" not in {text.get_text() for text in ax.texts}


def test_ladder_of_two_and_three_rungs_shows_all() -> None:
    for values in ([3.0], [-100.0, 0.0], [-100.0, -0.1, 0.0]):
        low, high = plots.ladder(LADDER[: len(values)], values).get_xlim()
        assert low < min(values) <= max(values) < high


def test_ladder_without_sides_or_errors_claims_no_bounds() -> None:
    for errors in (None, [np.nan, np.inf]):
        ax = plots.ladder(["a", "b"], [-2.0, -1.0], errors)
        assert legend(ax) == ["estimate"]
        assert ax.get_xlim() == pytest.approx((-2.06, -0.94))
    assert plots.ladder(["a"], [-2.0], [0.1], sides=["exact"]).containers[0][0].get_color() == "black"


@pytest.mark.parametrize(
    ("names", "values", "errors", "sides", "message"),
    [
        ([], [], None, None, "at least one rung; got 0 names"),
        (["a"], [1.0, 2.0], None, None, r"1 names, values of shape \(2,\)"),
        (["a"], [1.0], [0.1, 0.1], None, r"standard errors of shape \(2,\)"),
        (["a"], [1.0], None, ["lower", "upper"], "2 sides"),
        (["a"], [-np.inf], None, None, r"finite values of log p\(x\), got \[-inf\]"),
        (["a", "b"], [1.0, 2.0], None, ["lower", "above"], "\"exact\", got 'above'"),
    ],
)
def test_ladder_refuses(
    names: list[str], values: list[float], errors: list[float] | None, sides: list[str] | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        plots.ladder(names, values, errors, sides=sides)


def test_pareto_k_sorts_and_counts_every_kind() -> None:
    k = torch.tensor([0.9, -torch.inf, 0.6, torch.nan, 0.1, 0.5, torch.inf, 0.7, -0.2])
    ax = plots.pareto_k(k)
    good, fair, bad = ax.lines[:3]
    np.testing.assert_allclose(good.get_xydata(), [[5 - 2, 0.1], [6 - 2, 0.5], [4 - 2, -0.2]], atol=1e-6)
    np.testing.assert_allclose(fair.get_ydata(), [0.6, 0.7], atol=1e-6)
    np.testing.assert_allclose(bad.get_ydata(), [0.9], atol=1e-6)
    assert [line.get_ydata()[0] for line in ax.lines[3:]] == [0.5, 0.7]
    first, second, third = legend(ax)
    assert first.startswith("k ≤ 0.5, reliable: 4 of 9")
    assert "(1 not drawn: all weights equal)" in first
    assert second == "0.5 < k ≤ 0.7, of use: 2 of 9"
    assert third.startswith("k > 0.7, not to be trusted: 3 of 9")
    assert "(2 not drawn: infinite or undefined)" in third


@pytest.mark.parametrize("value", [-torch.inf, torch.inf, torch.nan])
def test_pareto_k_with_nothing_on_the_axis(value: float) -> None:
    assert "(3 not drawn" in "".join(legend(plots.pareto_k(torch.full((3,), value))))


def test_pareto_k_refuses_other_shapes() -> None:
    for k in (torch.rand(2, 2), torch.rand(0)):
        with pytest.raises(ValueError, match="one Pareto k per datum"):
            plots.pareto_k(k)


def test_kl_per_dimension_draws_the_largest_first_and_greys_what_is_not_active() -> None:
    kl = torch.tensor([[0.1, 3.0, 0.0], [0.3, 4.0, 0.0]])
    ax = plots.kl_per_dimension(kl, active=torch.tensor([True, True, False]), names=["a", "b", "c"])
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["b", "a", "c"]
    by_place = {round(bar.get_x() + bar.get_width() / 2): bar for bar in ax.patches}
    assert [by_place[i].get_height() for i in range(3)] == pytest.approx([3.5, 0.2, 0.0])
    assert by_place[0].get_facecolor() == by_place[1].get_facecolor() != by_place[2].get_facecolor()
    assert legend(ax) == ["active: 2 of 3", "not active: 1 of 3"]
    # Two standard errors to both sides: sd / √N is 0.5 for b.
    assert ax.collections[0].get_segments()[0][:, 1].tolist() == pytest.approx([2.5, 4.5])
    plots.kl_per_dimension(torch.rand(1, 40))


@pytest.mark.parametrize(
    "wrong", [torch.rand(3), torch.rand(0, 3), torch.full((2, 2), torch.inf)], ids=["vector", "no data", "infinite"]
)
def test_kl_per_dimension_refuses(wrong: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="Expected finite KL"):
        plots.kl_per_dimension(wrong)
    with pytest.raises(ValueError, match="an activity and a name for each of 2"):
        plots.kl_per_dimension(torch.rand(3, 2), names=["a"])


def test_calibration_of_uniform_numbers_stays_in_its_band() -> None:
    g = torch.Generator().manual_seed(0)
    ax = plots.calibration(torch.rand(5000, generator=g))
    low, high = _band(ax)
    heights = [bar.get_height() for bar in _bars(ax)]
    assert len(heights) == 20
    assert sum(heights) == pytest.approx(20)
    assert low < min(heights) < max(heights) < high
    # 1 ± 3.48 √(19 / 5000): the normal quantile of 0.01 / 40.
    assert high - 1 == pytest.approx(1 - low) == pytest.approx(3.4808 * sqrt(19 / 5000), rel=1e-3)
    heights = [bar.get_height() for bar in _bars(plots.calibration(torch.rand(5000, generator=g).square()))]
    assert heights[0] > high


def test_calibration_refuses() -> None:
    with pytest.raises(ValueError, match="5 numbers for each"):
        plots.calibration(torch.rand(99))
    with pytest.raises(ValueError, match=r"numbers in \[0, 1\]"):
        plots.calibration(torch.rand(500) + 0.5)
    with pytest.raises(ValueError, match=r"numbers in \[0, 1\]"):
        plots.calibration(torch.full((500,), torch.nan))


def _bars(ax: Any) -> list[Any]:
    return list(ax.containers[0])


def _band(ax: Any) -> tuple[float, float]:
    (band,) = [patch for patch in ax.patches if patch not in _bars(ax)]
    return band.get_y(), band.get_y() + band.get_height()
