"""Circular convolution written out by its indices and sums: the road that shares nothing with `lipconvert.Grid`."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def circulant(K: Tensor) -> Tensor:
    """The matrix of y_i[s] = Σ_j Σ_a K_ij[a] x_j[s + a] on flattened images, by its indices."""
    q, p, h, w = K.shape
    s, t = torch.arange(h * w) // w, torch.arange(h * w) % w
    blocks = K[:, :, (s[None, :] - s[:, None]) % h, (t[None, :] - t[:, None]) % w]
    return blocks.permute(0, 2, 1, 3).reshape(q * h * w, p * h * w)


def matrices(K: Tensor) -> Tensor:
    """K̂(ω) = Σ_ab K[a, b] exp(2πi(ka/h + lb/w)) at the frequencies of rfft2, by the sum itself: (F, q, p)."""
    h, w = K.shape[2:]
    rows = torch.exp(2j * torch.pi * torch.outer(torch.arange(h), torch.arange(h)) / h)
    columns = torch.exp(2j * torch.pi * torch.outer(torch.arange(w // 2 + 1), torch.arange(w)) / w)
    return torch.einsum("ijab,ka,mb->kmij", K.to(torch.complex128), rows, columns).flatten(0, 1)


def correlate(x: Tensor, K: Tensor) -> Tensor:
    """The convolution itself, tap by tap."""
    taps = np.ndindex(*K.shape[2:])
    return torch.stack(
        [torch.einsum("ij,bjst->bist", K[:, :, a, b], torch.roll(x, (-a, -b), (2, 3))) for a, b in taps]
    ).sum(0)
