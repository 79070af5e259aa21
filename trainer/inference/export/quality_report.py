"""`report.json`: what was measured before a package was written. Needs no torch."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from papilio.trainer.inference.package.format import Precision, QuantizerName

# 2: it names the label.
REPORT_VERSION = 2


def percent(share: float, num_digits: int = 4) -> str:
    """Write a share in percent."""
    return f"{share * 100:.{num_digits}f} %"


class _Figures(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Quality(_Figures):
    """Of one model, as `papilio.trainer.metrics.MetricValues` has them; the AUC is exact."""

    auc: float
    ne: float
    logloss: float
    calibration: float


class Ratio(_Figures):
    """A figure of the second model over that of the first, with its 95 % interval over samples (paired)."""

    value: float
    low: float
    high: float


class CalibrationPoint(_Figures):
    """Samples of similar score: mean predicted probability, share of positives, and how many there are."""

    predicted: float
    observed: float
    num_samples: int


class Scatter(_Figures):
    """Counts by score of the first model (columns, from 0 to 1) and difference (rows, from -limit to limit).

    The outermost rows hold what lies beyond them, too.
    """

    limit: float
    counts: tuple[tuple[int, ...], ...]


class Histogram(_Figures):
    """Counts of differences in bins of equal width from -limit to limit; `num_beyond` are outside."""

    limit: float
    counts: tuple[int, ...]
    num_beyond: int


class Differences(_Figures):
    """Of probabilities: second minus first model.

    Attributes:
        absolute_quantiles: by share of samples, what their changes are below.
        rank_correlation: Spearman's.
        swapped_pairs_share: pairs of samples whose order turned round, of a fixed random million of them.
    """

    mean: float
    max_absolute: float
    absolute_quantiles: dict[str, float]
    rank_correlation: float
    swapped_pairs_share: float
    scatter: Scatter
    histogram: Histogram


class Comparison(_Figures):
    """Two models on the same samples; `auc_difference_error` is a standard error of the paired difference (DeLong)."""

    num_samples: int
    label_rate: float
    reference: Quality
    candidate: Quality
    auc_ratio: Ratio
    auc_difference_error: float
    ne_ratio: Ratio
    differences: Differences
    reference_calibration: tuple[CalibrationPoint, ...]
    candidate_calibration: tuple[CalibrationPoint, ...]


class OptionFigures(_Figures):
    """A table at one precision, all others in fp32, on the sample.

    Attributes:
        expected_increase: of the log loss, were the fp32 model's probabilities the true ones; nats a sample.
        measured_increase: of the log loss, by the labels that there are.
        measured_error: one standard error of that.
        auc_change: of the AUC on the sample.
    """

    precision: Precision
    quantizer: QuantizerName | None
    num_bytes: int
    expected_increase: float
    measured_increase: float
    measured_error: float
    auc_change: float


class TableFigures(_Figures):
    """A table as it is packaged, and what it would cost at each precision that was tried."""

    name: str
    feature: str
    rows: int
    dim: int
    precision: Precision
    quantizer: QuantizerName | None
    num_bytes: int
    fp32_bytes: int
    row_error: float
    options: tuple[OptionFigures, ...]

    @property
    def chosen(self) -> OptionFigures | None:
        """The option that it is packaged with; None where it was not measured."""
        found = (o for o in self.options if (o.precision, o.quantizer) == (self.precision, self.quantizer))
        return next(found, None)

    @property
    def expected_increase(self) -> float:
        """What its precision costs, in nats a sample."""
        return self.chosen.expected_increase if self.chosen else 0.0


class SampleFigures(_Figures):
    """Held-out samples that something was measured on."""

    data: str
    split: str
    num_samples: int
    num_rows: int


class Thresholds(_Figures):
    """What a package must reach: shares of the fp32 model's AUC, at least, and of its NE, at most."""

    min_auc_ratio: float
    max_ne_ratio: float

    def failures(self, found: Comparison) -> list[str]:
        """Return what does not reach them, in words; empty if the package may be written."""
        auc, ne = found.auc_ratio, found.ne_ratio
        failures = []
        # Written so that NaN fails.
        if not auc.value >= self.min_auc_ratio:
            asked = f"where {percent(self.min_auc_ratio)} is asked for"
            failures.append(_failure("AUC", found.candidate.auc, found.reference.auc, auc, asked))
        if not ne.value <= self.max_ne_ratio:
            allowed = f"where at most {percent(self.max_ne_ratio)} is allowed"
            failures.append(_failure("NE", found.candidate.ne, found.reference.ne, ne, allowed))
        return failures


def _failure(name: str, value: float, reference: float, ratio: Ratio, asked: str) -> str:
    return (
        f"its {name} is {value:.6f}, {percent(ratio.value)} of the fp32 model's {reference:.6f} (95 % interval "
        f"{percent(ratio.low)} to {percent(ratio.high)}), {asked}"
    )


class QualityReport(_Figures):
    """Contents of report.json.

    Attributes:
        label: name of the label's column.
        held_out: what the comparison was made on.
        table_sample: what single tables were measured on.
        table_bytes: of all tables as they are packaged; `fp32_table_bytes` as they were trained.
    """

    report_version: int = REPORT_VERSION
    papilio_version: str
    name: str
    architecture: str
    checkpoint: str
    step: int
    made_at: str
    label: str
    thresholds: Thresholds
    held_out: SampleFigures
    comparison: Comparison
    table_sample: SampleFigures
    table_bytes: int
    fp32_table_bytes: int
    dense_bytes: int
    tables: tuple[TableFigures, ...]

    @property
    def failures(self) -> list[str]:
        """What is below the thresholds, in words; empty if the package may be written."""
        return self.thresholds.failures(self.comparison)

    @property
    def is_within_noise(self) -> bool:
        """Whether other samples could have decided otherwise, by the 95 % intervals."""
        auc, ne = self.comparison.auc_ratio, self.comparison.ne_ratio
        least, most = self.thresholds.min_auc_ratio, self.thresholds.max_ne_ratio
        if self.failures:
            return auc.high >= least and ne.low <= most
        return auc.low < least or ne.high > most
