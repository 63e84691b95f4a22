"""The one table of tolerances: (rtol, atol) by the type of the result, whatever its size."""

import torch

TOLERANCE: dict[torch.dtype, tuple[float, float]] = {
    torch.float64: (1e-10, 1e-10),
    torch.float32: (1e-5, 1e-5),
    torch.float16: (2e-3, 2e-3),
    torch.bfloat16: (1.6e-2, 1.6e-2),
}


def assert_close(
    actual: torch.Tensor, reference: torch.Tensor, dtype: torch.dtype | None = None
) -> None:
    """|actual - reference| <= atol + rtol |reference| everywhere, by the row of ``dtype`` (that of ``actual``)."""
    rtol, atol = TOLERANCE[dtype or actual.dtype]
    torch.testing.assert_close(
        actual.double(), reference.double(), rtol=rtol, atol=atol, equal_nan=True
    )
