"""The same over a sweep of sizes, to count the variants that it compiles."""

from collections.abc import Iterator

from tests.plans.soft_target_focal_loss import F32, LARGE, elementwise, step
from tests.triton_checked.plan import Case


def cases() -> Iterator[Case]:
    for n in (1, 2, 15, 16, 17, 1000, 1024, 4096, 99_991, 1 << 20, LARGE, LARGE + 3):
        yield Case(f"{n} elements", step(F32, F32, inner=n))
        yield Case(f"losses of {n} elements", elementwise(F32, F32, inner=n))
