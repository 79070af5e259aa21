"""Mixing of integers: the same on every machine and in every process, unlike hash()."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

# Constants of splitmix64 (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, 2014).
_GOLDEN = 0x9E3779B97F4A7C15
_FIRST = 0xBF58476D1CE4E5B9
_SECOND = 0x94D049BB133111EB
_MASK = (1 << 64) - 1


def mix64(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Splitmix64's output function: a bijection on 64-bit integers that looks random."""
    values = values + np.uint64(_GOLDEN)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(_FIRST)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(_SECOND)
    return values ^ (values >> np.uint64(31))


def key_of(*parts: int | str) -> int:
    """Fold whole numbers and words into one 64-bit key, for example (seed, purpose, epoch)."""
    key = 0
    for part in parts:
        number = part if isinstance(part, int) else int.from_bytes(part.encode(), "little")
        # Folded limb by limb, sign first: no two numbers of any width share their limbs.
        limbs = [int(number < 0), abs(number) & _MASK]
        while abs(number) >> (64 * (len(limbs) - 1)):
            limbs.append(abs(number) >> (64 * (len(limbs) - 1)) & _MASK)
        for limb in limbs:
            key = _mix(key ^ limb)
    return key


def _mix(number: int) -> int:
    number = (number + _GOLDEN) & _MASK
    number = ((number ^ (number >> 30)) * _FIRST) & _MASK
    number = ((number ^ (number >> 27)) * _SECOND) & _MASK
    return number ^ (number >> 31)
