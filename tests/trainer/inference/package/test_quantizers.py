"""Rows in fewer bits: the documented layout, how large their errors are, and that cutting a table changes no byte."""

import numpy as np
import pytest
import torch

from papilio.trainer.inference.package import quantizers
from papilio.trainer.inference.package.format import PRECISIONS, PackageError, row_bytes
from papilio.trainer.inference.package.quantizers import (
    QUANTIZERS,
    dequantize_rows,
    quantize_rows,
    smallest_fine_span,
)
from tests.support.package_bytes import values_of

WAYS = [(p, "minmax") for p in PRECISIONS] + [(p, q) for p in ("int4", "int2") for q in ("greedy", "least_squares")]
# FBGEMM's own greedy search and layout, as another implementation; it puts scale and bias last.
TORCH_GREEDY = {
    "int4": torch.ops.quantized.embedding_bag_4bit_prepack,
    "int2": torch.ops.quantized.embedding_bag_2bit_prepack,
}


def normal_rows(num_rows, dim, seed=0):
    return torch.randn(num_rows, dim, generator=torch.Generator().manual_seed(seed)) * 0.05


def row_errors(values, rows, precision):
    found = values_of(rows.numpy(), precision, values.shape[1])
    return np.linalg.norm(found - values.numpy(), axis=1) / np.linalg.norm(values.numpy(), axis=1)


@pytest.mark.parametrize("dim", [4, 12, 16, 20, 64])
@pytest.mark.parametrize(("precision", "quantizer"), WAYS)
def test_bytes_are_those_of_the_documented_layout(precision, quantizer, dim):
    values = normal_rows(50, dim)
    rows = quantize_rows(values, precision, quantizer)
    assert (rows.dtype, rows.shape) == (torch.uint8, (50, row_bytes(precision, dim)))
    expected = values_of(rows.numpy(), precision, dim)
    np.testing.assert_array_equal(dequantize_rows(rows, precision, dim).numpy(), expected)
    # One row, beginning anywhere.
    np.testing.assert_array_equal(dequantize_rows(rows[7:8], precision, dim).numpy(), expected[7:8])


def test_fp32_is_exact_and_fp16_rounds_to_nearest():
    values = normal_rows(30, 8)
    np.testing.assert_array_equal(values_of(quantize_rows(values, "fp32").numpy(), "fp32", 8), values.numpy())
    halves = values.numpy().astype(np.float16).astype(np.float32)
    np.testing.assert_array_equal(values_of(quantize_rows(values, "fp16").numpy(), "fp16", 8), halves)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_values_and_rows_share_no_memory(precision):
    values = normal_rows(10, 8)
    rows = quantize_rows(values, precision)
    before = rows.clone()
    dequantize_rows(rows, precision, 8).zero_()
    assert torch.equal(rows, before)


@pytest.mark.parametrize(("precision", "levels"), [("int8", 255), ("int4", 15), ("int2", 3)])
def test_minmax_is_within_half_a_step_of_the_range(precision, levels):
    values = normal_rows(200, 16)
    found = values_of(quantize_rows(values, precision, "minmax").numpy(), precision, 16)
    span = np.ptp(values.numpy(), axis=1, keepdims=True)
    # Beside half a step: scale and bias are rounded to 11 bits.
    rounding = 2.0**-11 * (span + np.abs(values.numpy()).max(1, keepdims=True))
    assert (np.abs(found - values.numpy()) <= span / levels / 2 + rounding).all()


@pytest.mark.parametrize(("precision", "least_gain"), [("int4", 0.07), ("int2", 0.17)])
@pytest.mark.parametrize("quantizer", ["greedy", "least_squares"])
def test_searched_ranges_are_never_worse_than_minmax_and_better_on_average(precision, least_gain, quantizer):
    values = normal_rows(500, 64)
    plain = row_errors(values, quantize_rows(values, precision, "minmax"), precision)
    found = row_errors(values, quantize_rows(values, precision, quantizer), precision)
    assert (found <= plain * (1 + 1e-6)).all()
    assert found.mean() < plain.mean() * (1 - least_gain)


@pytest.mark.parametrize("precision", ["int4", "int2"])
def test_greedy_is_as_good_as_pytorchs(precision):
    values = normal_rows(500, 64)
    packed = TORCH_GREEDY[precision](values, True, 200, 0.16)
    theirs = row_errors(values, torch.cat([packed[:, -4:], packed[:, :-4]], 1), precision)
    ours = row_errors(values, quantize_rows(values, precision, "greedy"), precision)
    assert ours.mean() <= theirs.mean() * 1.005


@pytest.mark.parametrize(("precision", "levels"), [("int4", 15), ("int2", 3)])
def test_least_squares_is_near_the_best_of_all_ranges(precision, levels):
    """Against an exhaustive search over 100 x 100 ranges of each row, in NumPy."""
    values = normal_rows(20, 16).numpy()
    found = values_of(quantize_rows(torch.from_numpy(values), precision, "least_squares").numpy(), precision, 16)
    for row, stored in zip(values, found, strict=True):
        lows, highs = np.linspace(row.min(), row.mean(), 100), np.linspace(row.mean(), row.max(), 101)[1:]
        low, scale = lows[:, None, None], (highs[None, :, None] - lows[:, None, None]) / levels
        codes = np.clip(np.rint((row - low) / scale), 0, levels)
        best = np.linalg.norm(codes * scale + low - row, axis=2).min()
        assert np.linalg.norm(stored - row) <= best * 1.12


@pytest.mark.parametrize(("precision", "quantizer"), WAYS)
@pytest.mark.parametrize("value", [0.0, 0.25, -3.0])
def test_rows_of_one_value_are_kept(precision, quantizer, value):
    values = torch.full((3, 8), value)
    np.testing.assert_array_equal(values_of(quantize_rows(values, precision, quantizer).numpy(), precision, 8), values)


@pytest.mark.parametrize(("precision", "quantizer"), [way for way in WAYS if way[0].startswith("int")])
def test_rows_of_tiny_and_of_large_values_stay_near(precision, quantizer):
    """Down to where fp16's smallest number is the step, and up to where its largest is the bias."""
    levels = {"int8": 255, "int4": 15, "int2": 3}[precision]
    for size in (1e-7, 1e-5, 1.0, 6e4):
        values = normal_rows(20, 16) / 0.2 * size
        values.clamp_(-size, size)
        found = values_of(quantize_rows(values, precision, quantizer).numpy(), precision, 16)
        step = np.ptp(values.numpy(), axis=1, keepdims=True) / levels
        tolerance = np.maximum(step, 2.0**-24 * levels) + size * 2.0**-10
        worst = np.abs(found - values.numpy()).max(1, keepdims=True)
        # What a search clips may be farther off than half a step, never than the range itself.
        limit = tolerance if quantizer == "minmax" else np.ptp(values.numpy(), axis=1, keepdims=True) / 2 + tolerance
        assert (worst <= limit).all(), size


@pytest.mark.parametrize(("precision", "quantizer"), WAYS)
@pytest.mark.parametrize("dim", [4, 16, 20])
def test_cutting_a_table_anywhere_changes_no_byte(monkeypatch, precision, quantizer, dim):
    values = normal_rows(300, dim)
    whole = quantize_rows(values, precision, quantizer)
    for size in (1, 43):
        pieces = [quantize_rows(values[i : i + size], precision, quantizer) for i in range(0, 129, size)]
        assert torch.equal(torch.cat(pieces), whole[:129])
    monkeypatch.setattr(quantizers, "MINMAX_VALUES", 5 * dim)
    monkeypatch.setattr(quantizers, "SEARCH_VALUES", 11 * dim)
    assert torch.equal(quantize_rows(values, precision, quantizer), whole)


def test_a_table_beyond_64_mib_is_as_fbgemm_quantizes_it_at_once():
    values = normal_rows(300_000, 64)
    assert values.numel() * 4 > 64 << 20
    at_once = torch.ops.fbgemm.FloatOrHalfToFusedNBitRowwiseQuantizedSBHalf(values, 8)
    assert torch.equal(quantize_rows(values, "int8"), torch.cat([at_once[:, -4:], at_once[:, :-4]], 1))


def test_no_rows_give_no_rows():
    for precision, quantizer in WAYS:
        assert quantize_rows(torch.empty(0, 8), precision, quantizer).shape == (0, row_bytes(precision, 8))
        assert dequantize_rows(torch.empty(0, row_bytes(precision, 8), dtype=torch.uint8), precision, 8).shape == (0, 8)


@pytest.mark.parametrize(("precision", "levels"), [("int8", 255), ("int4", 15), ("int2", 3)])
def test_rows_that_span_little_have_coarse_scales(precision, levels):
    """Above the limit the largest error is half a step or a little more, below it the scale's rounding rules."""
    for factor, is_fine in ((4.0, True), (0.2, False)):
        spans = smallest_fine_span(precision) * factor * torch.linspace(0.8, 1.2, 400)[:, None]
        values = torch.rand(400, 16, generator=torch.Generator().manual_seed(0)) * spans
        values[:, :1], values[:, 1:2] = 0, spans
        found = values_of(quantize_rows(values, precision, "minmax").numpy(), precision, 16)
        errors_in_steps = np.abs(found - values.numpy()) / (spans.numpy() / levels)
        assert (errors_in_steps.max() < 0.7) == is_fine


def test_another_precision_is_refused():
    with pytest.raises(
        PackageError, match="int3 is not a precision of tables; choose one of fp32, fp16, int8, int4, int2"
    ):
        quantize_rows(torch.zeros(1, 4), "int3")
    assert QUANTIZERS == ("minmax", "greedy", "least_squares")
