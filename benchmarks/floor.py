"""The least time that a LAST step can take: its operations over the machine's matrix rate.

Counted from the shapes of the rank-space form (pipeline/side/rank_space.py), per image and member.
A multiply and an add are two operations. Elementwise work, softmax, the head and the optimiser are
left out, so the floor is never reached.
"""

from __future__ import annotations

from collections.abc import Callable

import torch


def last_step_operations(*, tokens: int, dim: int, rank: int, modules: int) -> dict[str, float]:
    """Operations per image of one training step, by product, forward and backward.

    state      S_c (P_c^T, W_1,c, …): once forward, once for the weights' gradient (S_c is data)
    earlier    A (column of gram that the newest block adds, cross): once forward, twice backward
    attention  scores and output: once forward, twice backward
    """
    T, D, R = tokens, dim, rank
    widths = [j * (R + 1) for j in range(modules)]  # columns of the earlier modules' output
    state = sum(2 * T * D * (3 * R + width) for width in widths)
    earlier = sum(2 * T * width * (R + 1 + 3 * R) for width in widths)
    attention = modules * 2 * (2 * T * T * R)
    return {"state": 2 * state, "earlier": 3 * earlier, "attention": 3 * attention}


def matrix_products(
    device: torch.device, precision: torch.dtype, products: int = 40
) -> Callable[[], float]:
    """A function that multiplies (6304 x 768) @ (768 x 256) and returns operations.

    6304 = 32 images of 197 tokens; 256 is about the width of a late module's product.
    """
    m, k, n = 6304, 768, 256
    left = torch.randn(m, k, device=device).to(precision)
    right = torch.randn(k, n, device=device).to(precision)
    out = torch.empty(m, n, device=device, dtype=precision)

    def run() -> float:
        for _ in range(products):
            torch.matmul(left, right, out=out)
        return products * 2.0 * m * k * n

    return run
