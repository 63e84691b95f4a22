"""The one table of tolerances: (rtol, atol) by the type of the result, whatever its size."""

import torch
from torch import Tensor

TOLERANCE: dict[torch.dtype, tuple[float, float]] = {
    torch.float64: (1e-10, 1e-10),
    torch.float32: (1e-5, 1e-5),
    torch.float16: (2e-3, 2e-3),
    torch.bfloat16: (1.6e-2, 1.6e-2),
}
NEAREST = 0.5 + 1e-4
"""How far an integer may be from the exact value."""


def assert_close(
    actual: Tensor,
    reference: Tensor,
    dtype: torch.dtype | None = None,
    *,
    arithmetic: torch.dtype = torch.float64,
    slack: float | Tensor = 0.0,
) -> None:
    """|actual - reference| <= atol + rtol |reference| + slack, by the row of `dtype` or `actual`.

    A float64 result of narrower arithmetic has the row of float32. Integers are the nearest ones to
    the reference, and saturate.
    """
    assert actual.shape == reference.shape, (actual.shape, reference.shape)
    dtype, reference = dtype or actual.dtype, reference.detach().double()
    if dtype == torch.float64 != arithmetic:
        dtype = torch.float32
    if dtype.is_floating_point:
        rtol, atol = TOLERANCE[dtype]
    else:
        limits = torch.iinfo(dtype)
        rtol, atol, reference = 0.0, NEAREST, reference.clamp(limits.min, limits.max)
    actual = actual.detach().double()
    error = (actual - reference).abs()
    right = error <= atol + rtol * reference.abs() + slack
    right |= (actual == reference) | (actual.isnan() & reference.isnan())
    assert right.all(), f"{dtype}: off by {error[~right].max()} at {(~right).nonzero()[0].tolist()}"
