"""Products by the faster library: as exact as ever, and for the time that was asked for."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from ppl_vae import precision


@pytest.fixture
def set_back() -> Iterator[None]:
    yield
    torch.set_float32_matmul_precision("highest")


def test_a_product_inside_is_exact() -> None:
    g = torch.Generator().manual_seed(1)
    a, b = torch.randn(131, 401, generator=g), torch.randn(401, 53, generator=g)
    exact = a.double() @ b.double()
    with precision.fast_and_exact():
        found = a @ b
    assert (found.double() - exact).norm() < 1e-6 * exact.norm()
    # bfloat16 and TF32, which the same words may mean elsewhere, are not
    for dtype_bits in (7, 10):
        rounded = [torch.round(t * 2.0 ** (dtype_bits)) / 2.0 ** (dtype_bits) for t in (a, b)]
        assert (rounded[0].double() @ rounded[1].double() - exact).norm() > 1e-5 * exact.norm()


@pytest.mark.usefixtures("set_back")
@pytest.mark.parametrize("exact", [True, False])
def test_the_setting_is_restored_whatever_happens(exact: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "_is_exact", lambda: exact)
    with pytest.raises(ZeroDivisionError), precision.fast_and_exact():  # noqa: PT012
        assert torch.get_float32_matmul_precision() == ("medium" if exact else "highest")
        with precision.fast_and_exact():
            assert torch.get_float32_matmul_precision() == ("medium" if exact else "highest")
        assert torch.get_float32_matmul_precision() == ("medium" if exact else "highest")
        _ = 1 / 0
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.usefixtures("set_back")
@pytest.mark.parametrize("setting", ["high", "medium"])
def test_what_the_user_has_set_stays(setting: str) -> None:
    torch.set_float32_matmul_precision(setting)
    with precision.fast_and_exact():
        assert torch.get_float32_matmul_precision() == setting
    assert torch.get_float32_matmul_precision() == setting


def test_a_processor_that_rounds_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    product = torch.Tensor.__matmul__
    monkeypatch.setattr(
        torch.Tensor, "__matmul__", lambda a, b: product(a, b) * (1 + 1e-3 * (a.dtype == torch.float32))
    )
    assert not precision._is_exact.__wrapped__()
    monkeypatch.undo()
    assert torch.get_float32_matmul_precision() == "highest"
