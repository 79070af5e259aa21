"""Rows of a table from fp32 to fewer bits and back, in the layout of `tables.bin` (see package.py).

Ranges of int4 and int2 rows can be chosen better than by their smallest and largest value: `greedy` narrows them step
by step while the error falls (Guan et al., arXiv 1911.02079), `least_squares` alternates between codes and the scale
and bias that fit them best.
"""

from __future__ import annotations

import fbgemm_gpu  # noqa: F401  # registers torch.ops.fbgemm
import torch

from papilio.trainer.inference.export.export_options import QUANTIZERS, SEARCHED_PRECISIONS
from papilio.trainer.inference.package.format import (
    PRECISION_BITS,
    SCALE_AND_BIAS_BYTES,
    PackageError,
    Precision,
    QuantizerName,
    row_bytes,
)

__all__ = ["QUANTIZERS", "dequantize_rows", "quantize_rows", "row_bytes", "scales_and_biases", "smallest_fine_span"]
# FBGEMM's kernels count bytes of the result in int32, so larger tables are cut.
MINMAX_VALUES = 1 << 22
# Searched at once by each thread: what stays in its cache.
SEARCH_VALUES = 1 << 16
GREEDY_STEPS = 200
GREEDY_SHARE = 0.16
SHRINKS = (1.0, 0.85, 0.7, 0.55)
# With 12 in place of 6, errors of normal and t(3) rows fall by less than 0.7 %, at 1.5 times the work (2026-11).
NUM_REFITS = 6
# fp16's least number, and the step of those near it.
SMALLEST_SCALE = 2.0**-24


def quantize_rows(values: torch.Tensor, precision: Precision, quantizer: QuantizerName = "minmax") -> torch.Tensor:
    """Return rows [n, row_bytes] uint8 of values [n, D] fp32; D is a multiple of 4.

    `quantizer` is for int4 and int2; int8 is always min/max.

    Raises:
        PackageError: there is no such precision.
    """
    if precision not in PRECISION_BITS:
        raise PackageError(f"{precision} is not a precision of tables; choose one of {', '.join(PRECISION_BITS)}")
    if precision in {"fp32", "fp16"}:
        return values.to(torch.float32 if precision == "fp32" else torch.float16).contiguous().view(torch.uint8)
    bits, dim = PRECISION_BITS[precision], values.shape[1]
    searches = precision in SEARCHED_PRECISIONS and quantizer != "minmax"
    chunk = max(1, (SEARCH_VALUES * torch.get_num_threads() if searches else MINMAX_VALUES) // dim)
    rows = torch.empty(len(values), row_bytes(precision, dim), dtype=torch.uint8)
    for start in range(0, len(values), chunk):
        piece = values[start : start + chunk]
        if not searches:
            rows[start : start + chunk] = _minmax(piece, bits)
        else:
            rows[start : start + chunk] = _searched(piece, precision, quantizer)
    return rows


def dequantize_rows(rows: torch.Tensor, precision: Precision, dim: int) -> torch.Tensor:
    """Return the values [n, D] fp32 of rows [n, row_bytes] uint8; they share no memory with the rows."""
    if precision in {"fp32", "fp16"}:
        return _own(rows).view(torch.float32 if precision == "fp32" else torch.float16).float()
    bits = PRECISION_BITS[precision]
    scale, bias = scales_and_biases(rows)
    packed = rows[:, SCALE_AND_BIAS_BYTES:]
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8)
    codes = (packed[:, :, None] >> shifts) & ((1 << bits) - 1)
    return codes.reshape(len(rows), dim).float() * scale[:, None] + bias[:, None]


def scales_and_biases(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the scales [n] and biases [n], fp32, of rows of codes."""
    halves = _own(rows[:, :SCALE_AND_BIAS_BYTES]).view(torch.float16).float()
    return halves[:, 0], halves[:, 1]


def smallest_fine_span(precision: Precision) -> float:
    """Return the span of a row below which rounding its scale to fp16 may move a value by more than half a step."""
    num_steps = (1 << PRECISION_BITS[precision]) - 1
    return num_steps * num_steps * SMALLEST_SCALE


def _own(rows: torch.Tensor) -> torch.Tensor:
    """Copy bytes, so that they begin where a number may; `contiguous` leaves a single row at its odd place."""
    return rows.clone(memory_format=torch.contiguous_format)


def _minmax(values: torch.Tensor, bits: int) -> torch.Tensor:
    code_bytes = values.shape[1] * bits // 8
    # The operator wants codes of whole 16-bit words; what is repeated changes no range.
    padding = -values.shape[1] % (16 // bits)
    padded = torch.cat([values, values[:, :1].expand(-1, padding)], dim=1).contiguous()
    fused = torch.ops.fbgemm.FloatOrHalfToFusedNBitRowwiseQuantizedSBHalf(padded, bits)
    # It puts scale and bias last, the lookups want them first.
    return torch.cat([fused[:, -SCALE_AND_BIAS_BYTES:], fused[:, :code_bytes]], dim=1)


def _searched(values: torch.Tensor, precision: Precision, quantizer: QuantizerName) -> torch.Tensor:
    """Return rows with the ranges found, or the plain ones where they do no worse."""
    bits, dim = PRECISION_BITS[precision], values.shape[1]
    search = _greedy if quantizer == "greedy" else _least_squares
    found, plain = _pack(values, *search(values, bits), bits), _minmax(values, bits)
    error_found, error_plain = (
        (dequantize_rows(rows, precision, dim) - values).square_().sum(1, keepdim=True) for rows in (found, plain)
    )
    return torch.where(error_found < error_plain, found, plain)


def _greedy(values: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return scale and bias [n, 1]: from the whole range, take a step off the end where the error grows less."""
    low, high = values.amin(1, keepdim=True), values.amax(1, keepdim=True)
    step = (high - low) / GREEDY_STEPS
    best = (low, high, _range_error(values, low, high, bits))
    for _ in range(int(GREEDY_STEPS * GREEDY_SHARE)):
        error_low = _range_error(values, low + step, high, bits)
        error_high = _range_error(values, low, high - step, bits)
        takes_low = error_low < error_high
        low, high = torch.where(takes_low, low + step, low), torch.where(takes_low, high, high - step)
        error = torch.minimum(error_low, error_high)
        is_better = error < best[2]
        found = zip((low, high, error), best, strict=True)
        best = tuple(torch.where(is_better, new, old) for new, old in found)  # type: ignore[assignment]
    return (best[1] - best[0]) / ((1 << bits) - 1), best[0]


def _range_error(values: torch.Tensor, low: torch.Tensor, high: torch.Tensor, bits: int) -> torch.Tensor:
    return _error(values, *_as_stored((high - low) / ((1 << bits) - 1), low), bits)


def _least_squares(values: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return scale and bias [n, 1]: the best of several beginnings, each refitted to its own codes in turn."""
    low, high = values.amin(1, keepdim=True), values.amax(1, keepdim=True)
    middle, half = (low + high) / 2, (high - low) / 2
    mean = values.mean(1, keepdim=True)
    best_error = torch.full_like(low, torch.inf)
    best_scale, best_bias = torch.zeros_like(low), torch.zeros_like(low)
    for shrink in SHRINKS:
        scale, bias = _as_stored(2 * half * shrink / ((1 << bits) - 1), middle - half * shrink)
        for _ in range(NUM_REFITS):
            codes = _codes(values, scale, bias, bits)
            code_mean = codes.mean(1, keepdim=True)
            spread = codes - code_mean
            scale = (spread * values).sum(1, keepdim=True) / spread.square().sum(1, keepdim=True).clamp_min(1e-12)
            scale = scale.clamp_min(SMALLEST_SCALE)
            bias = mean - scale * code_mean
        error = _error(values, *_as_stored(scale, bias), bits)
        is_better = error < best_error
        best_error = torch.where(is_better, error, best_error)
        best_scale, best_bias = torch.where(is_better, scale, best_scale), torch.where(is_better, bias, best_bias)
    return best_scale, best_bias


def _as_stored(scale: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return them as they are once rounded to fp16; a scale that would be 0 becomes the smallest there is."""
    return scale.half().float().clamp_min(SMALLEST_SCALE), bias.half().float()


def _codes(values: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor, bits: int) -> torch.Tensor:
    return ((values - bias) / scale).round_().clamp_(0, (1 << bits) - 1)


def _error(values: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor, bits: int) -> torch.Tensor:
    codes = _codes(values, scale, bias, bits)
    return (codes.mul_(scale).add_(bias).sub_(values)).square_().sum(1, keepdim=True)


def _pack(values: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor, bits: int) -> torch.Tensor:
    scale, bias = _as_stored(scale, bias)
    codes = _codes(values, scale, bias, bits).to(torch.uint8).view(len(values), -1, 8 // bits)
    packed = torch.zeros(codes.shape[:2], dtype=torch.uint8)
    for place in range(8 // bits):
        packed |= codes[:, :, place] << (bits * place)
    halves = torch.cat([scale, bias], 1).half().view(torch.uint8)
    return torch.cat([halves, packed], 1)
