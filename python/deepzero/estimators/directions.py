"""Random directions: what each distribution draws, and a generator for each estimate.

All have E[u u^T] = I over their d dimensions, so that the mean of (u.s) u over directions is an unbiased estimate of s
in every case, with no further factor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

Draw = Callable[[int, int, torch.Generator], Iterator[Tensor]]

ORTHOGONAL_BYTES = 64 << 20
"""Bytes of one group of orthogonal directions, at most (but two directions at least). A constant, so that what is drawn
does not depend on the machine."""


def _gaussian(q: int, d: int, generator: torch.Generator) -> Iterator[Tensor]:
    return (torch.randn(d, generator=generator) for _ in range(q))


def _sphere(q: int, d: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Uniform on the sphere of radius sqrt(d) (the unit sphere with a factor d/mu is the same estimator)."""
    for _ in range(q):
        u = torch.randn(d, generator=generator, dtype=torch.float64)
        yield (u * (math.sqrt(d) / u.norm())).float()


def _rademacher(q: int, d: int, generator: torch.Generator) -> Iterator[Tensor]:
    return (torch.randint(0, 2, (d,), generator=generator).float() * 2 - 1 for _ in range(q))


def _orthogonal(q: int, d: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Uniform on the sphere of radius sqrt(d) each, orthogonal to all others of its group: the Q of a Gaussian matrix,
    with the signs that make it uniform (Mezzadri 2007, arXiv math-ph/0609050).

    Groups as large as ORTHOGONAL_BYTES allows are independent. In so many dimensions independent directions are nearly
    orthogonal anyway, so next to nothing is lost.
    """
    group = max(2, ORTHOGONAL_BYTES // (8 * d))
    for start in range(0, q, group):
        z = torch.randn(min(group, q - start), d, generator=generator, dtype=torch.float64)
        basis, r = torch.linalg.qr(z.t())
        yield from (basis * (r.diagonal().sign() * math.sqrt(d))).t().float()


DISTRIBUTIONS: dict[str, Draw] = {
    "gaussian": _gaussian,
    "sphere": _sphere,
    "rademacher": _rademacher,
    "orthogonal": _orthogonal,
}
"""distribution -> (q, d, generator) -> q directions [d] float32 on the CPU, one by one."""


class Directions:
    """q directions for each estimate of one estimator, the same for every block size, device and global random state.

    Raises ValueError for a q that is not a positive number, a distribution that is not known, and a seed that is not
    whole.
    """

    def __init__(self, queries: int, distribution: str, seed: int) -> None:
        if not isinstance(seed, int):
            raise ValueError(f"seed must be a whole number, got {seed!r}")
        if not isinstance(queries, int) or queries < 1:
            raise ValueError(f"queries must be a positive number of directions, got {queries!r}")
        if distribution not in DISTRIBUTIONS:
            known = ", ".join(map(repr, DISTRIBUTIONS))
            raise ValueError(f"distribution must be one of {known}, got {distribution!r}")
        self.count, self.distribution, self.seed = queries, distribution, seed

    def check(self, d: int) -> None:
        """ValueError when ``d`` coordinates have no room for so many directions."""
        if self.distribution == "orthogonal" and self.count > d:
            raise ValueError(
                f"queries = {self.count:,} directions cannot be orthogonal in the {d:,} dimensions that are selected. "
                f"Use at most {d:,}, at which the estimate is complete (as dz.CGE's), or another distribution."
            )

    def draw(self, d: int, number: int) -> Iterator[Tensor]:
        """The directions [d] float32 of estimate ``number``, one by one."""
        generator = torch.Generator().manual_seed(_mix(self.seed, number))
        return DISTRIBUTIONS[self.distribution](self.count, d, generator)


def _mix(seed: int, number: int) -> int:
    """One 63-bit seed from two numbers (splitmix64 finaliser), so that neighbouring estimates share nothing."""
    z = (seed * 0x9E3779B97F4A7C15 + number * 0xBF58476D1CE4E5B9 + 0x94D049BB133111EB) & (2**64 - 1)
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
    return (z ^ (z >> 31)) >> 1
