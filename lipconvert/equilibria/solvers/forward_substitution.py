"""Forward substitution: exact for a strictly block lower triangular W, one pass over its blocks."""

from __future__ import annotations

import torch
from torch import Tensor

from ...linalg.state_map import StateMap
from .iteration import Elementwise


def forward_substitution(map: StateMap, sigma: Elementwise, u: Tensor, out: Tensor | None = None) -> Tensor:
    """Solve z = σ(Tz + u), T the strictly triangular part of W: z_k = σ_k(Σ_{j<k} W_kj z_j + u_k).

    ``u`` (B, n), or (B, n, F). σ is 1-Lipschitz, so ‖z − σ(Wz + u)‖ ≤ ‖W − T‖ ‖z‖ (``map.remainder``), which is 0 for a
    triangular W and round-off for one rebuilt from LBEN parameters. (FORMULAS 5)
    ``out`` receives z; it may be u itself, which is then lost.
    """
    z = torch.empty_like(u) if out is None else out
    for block in map.order:
        z[:, block] = sigma[block](map.rows_below(block, z, u))
    return z
