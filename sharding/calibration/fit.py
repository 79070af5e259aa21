"""Figures from timings: non-negative least squares over the terms of the cost model. NumPy only."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]
NUM_REWEIGHTINGS = 5
# A measurement that a fit misses by more is taken for disturbed.
USUAL_ERROR = 0.05


def fit_relative(
    terms_MN: Matrix,
    seconds_M: Matrix,
    prior_N: Matrix | None = None,
    weight: float = 0.0,
    trust_M: Matrix | None = None,
) -> Matrix:
    """Return the non-negative x of least relative error of `terms_MN @ x` against `seconds_M`.

    Args:
        terms_MN: for each measurement the size of each term, in units of the cost model.
        seconds_M: what was measured.
        prior_N: values to which x is drawn; NaN where nothing is known beforehand.
        weight: how much: a figure twice its prior counts as much as a measurement that is off by `weight`.
        trust_M: what each measurement counts; by default all the same.
    """
    trust_M = np.ones(len(seconds_M)) if trust_M is None else trust_M
    rows = terms_MN * (trust_M / seconds_M)[:, None]
    targets = trust_M
    if prior_N is not None and weight:
        known = np.flatnonzero(np.isfinite(prior_N) & (prior_N > 0))
        pull = np.zeros((len(known), terms_MN.shape[1]))
        pull[np.arange(len(known)), known] = weight / prior_N[known]
        rows = np.vstack([rows, pull])
        targets = np.concatenate([targets, np.full(len(known), weight)])
    # Columns of one size, or the smallest figures drown in rounding.
    sizes = np.linalg.norm(rows, axis=0)
    sizes[sizes == 0] = 1.0
    fitted: Matrix = nnls(rows / sizes, targets) / sizes
    return fitted


def fit_robust(terms_MN: Matrix, seconds_M: Matrix, prior_N: Matrix, weight: float) -> Matrix:
    """Fit as `fit_relative`, but measurements that are far off, as when others disturbed them, count less (Huber)."""
    trust_M = np.ones(len(seconds_M))
    fitted = fit_relative(terms_MN, seconds_M, prior_N, weight)
    for _ in range(NUM_REWEIGHTINGS):
        error_M = np.abs(terms_MN @ fitted / seconds_M - 1)
        trust_M = np.sqrt(np.minimum(1.0, USUAL_ERROR / np.maximum(error_M, 1e-12)))
        fitted = fit_relative(terms_MN, seconds_M, prior_N, weight, trust_M)
    return fitted


def nnls(matrix_MN: Matrix, targets_M: Matrix) -> Matrix:
    """Return x >= 0 that minimizes |matrix x - targets| (Lawson and Hanson, Solving Least Squares Problems, ch. 23)."""
    num_columns = matrix_MN.shape[1]
    solution = np.zeros(num_columns)
    is_free = np.zeros(num_columns, np.bool_)
    for _ in range(3 * num_columns + 10):
        gradient = matrix_MN.T @ (targets_M - matrix_MN @ solution)
        gradient[is_free] = -np.inf
        if is_free.all() or gradient.max() <= 1e-10:
            break
        is_free[int(gradient.argmax())] = True
        solution = _shrink_to_feasible(matrix_MN, targets_M, solution, is_free)
    return solution


def _shrink_to_feasible(matrix_MN: Matrix, targets_M: Matrix, solution: Matrix, is_free: NDArray[np.bool_]) -> Matrix:
    """Solve for the free columns; those that would turn negative are fixed at 0, one after the other."""
    while True:
        wanted = np.zeros_like(solution)
        wanted[is_free] = np.linalg.lstsq(matrix_MN[:, is_free], targets_M, rcond=None)[0]
        negative = is_free & (wanted <= 0)
        if not negative.any():
            return wanted
        steps = solution[negative] / np.maximum(solution[negative] - wanted[negative], 1e-300)
        solution = solution + steps.min() * (wanted - solution)
        is_free &= solution > 1e-14
        solution[~is_free] = 0.0


def fit_line(sizes: Sequence[float], seconds: Sequence[float]) -> tuple[float, float]:
    """Return (fixed seconds, seconds per unit of size) of least relative error, neither below 0."""
    terms = np.stack([np.ones(len(sizes)), np.asarray(sizes, np.float64)], axis=1)
    fixed, slope = fit_relative(terms, np.asarray(seconds, np.float64))
    return float(fixed), float(slope)
