"""Seeds of random number generators."""

import numpy as np


def derive_seed(*key: int) -> int:
    """A seed for PyTorch from several integers of at least 0."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)
