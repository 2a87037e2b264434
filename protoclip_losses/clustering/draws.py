"""Weighted draws of points that do not depend on the number of ranks.

Efraimidis, Spirakis, "Weighted random sampling with a reservoir", Inf. Process. Lett. 97 (2006): exponential keys.
"""

import numpy as np
import torch
from torch import Tensor


def exponential_keys(seed: int, run: int, draw: int, total: int) -> Tensor:
    """An exponential random number for each point of all ranks: divided by weights, the smallest are a weighted draw.

    Efraimidis and Spirakis (2006). The keys belong to positions, so that a draw does not depend on the number of ranks.
    """
    state = np.random.SeedSequence([seed, run, draw]).generate_state(1, np.uint64)[0] >> np.uint64(1)
    keys = torch.empty(total, dtype=torch.float32, device="cpu")
    return keys.exponential_(generator=torch.Generator("cpu").manual_seed(int(state)))
