import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError
from sklearn.metrics import log_loss, roc_auc_score

from papilio.data_pipeline.generate.generate_options import GenerateOptions
from papilio.data_pipeline.generate.generated_stats import SplitTruth
from papilio.data_pipeline.generate.generator import generate
from papilio.data_pipeline.generate.shapes import SHAPES, Shape
from papilio.data_pipeline.generate.synthetic import draw_chunk, make_teacher
from papilio.data_pipeline.manifest import DatasetError, Manifest, read_manifest
from papilio.data_pipeline.schema import MISSING_ID, NUM_RESERVED_IDS
from papilio.data_pipeline.shards import Columns, open_shard

TINY = Shape("tiny", 3, (50, 4000, 7), (1, 1, 3))


@pytest.fixture(autouse=True)
def tiny_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Shape, "chunk_rows", property(lambda shape: 1024))
    monkeypatch.setitem(SHAPES, "tiny", TINY)


def _generate(folder: Path, num_rows: int = 3000, shape: str = "tiny", **options: object) -> Manifest:
    found = GenerateOptions.model_validate(
        {"shape": shape, "num_rows": num_rows, "output": str(folder), "show_progress": False, **options}
    )
    return generate(found)


def _read(folder: Path) -> dict[str, list[Columns]]:
    manifest = read_manifest(str(folder))
    return {
        name: [open_shard(info, manifest.data_schema, str(folder)) for info in split.shards]
        for name, split in manifest.splits.items()
    }


def _flat(shards: list[Columns]) -> list[list[object]]:
    labels = np.concatenate([shard.labels for shard in shards]).tolist()
    dense = np.concatenate([shard.dense for shard in shards]).tolist()
    ids = [np.concatenate([shard.bags[f].ids for shard in shards]).tolist() for f in range(3)]
    sizes = [np.concatenate([np.diff(s.bags[2].offsets) for s in shards if s.bags[2].offsets is not None]).tolist()]
    return [labels, dense, *ids, *sizes]


def test_same_options_give_the_same_bytes_and_another_seed_others(tmp_path: Path) -> None:
    first, again = _generate(tmp_path / "a"), _generate(tmp_path / "b")
    assert first == again == read_manifest(str(tmp_path / "a"))
    other = _generate(tmp_path / "c", seed=1)
    assert {s.crc32 for s in first.splits["train"].shards}.isdisjoint(s.crc32 for s in other.splits["train"].shards)


def test_rows_do_not_depend_on_the_size_of_the_shards(tmp_path: Path) -> None:
    _generate(tmp_path / "one")
    _generate(tmp_path / "many", rows_per_shard=700)
    one, many = _read(tmp_path / "one"), _read(tmp_path / "many")
    assert {name: len(shards) for name, shards in many.items()} == {"train": 4, "validation": 1, "test": 1}
    for name, shards in one.items():
        assert _flat(shards) == _flat(many[name])


def test_manifest_tells_what_the_shards_hold(tmp_path: Path) -> None:
    manifest = _generate(tmp_path)
    assert [split.num_rows for split in manifest.splits.values()] == [2700, 150, 150]
    shards = _read(tmp_path)
    labels = shards["train"][0].labels
    assert manifest.splits["train"].num_positives == labels.sum()
    dense = np.concatenate([columns.dense for found in shards.values() for columns in found])
    ids = [np.concatenate([c.bags[f].ids for found in shards.values() for c in found]) for f in range(3)]
    stats = manifest.dense_stats["I1"]
    assert (stats.mean, stats.standard_deviation) == pytest.approx((dense[:, 0].mean(), dense[:, 0].std()), rel=1e-5)
    assert (stats.minimum, stats.maximum) == (dense[:, 0].min(), dense[:, 0].max())
    assert 0.3 < stats.missing_rate < 0.6
    for feature, name in enumerate(("C1", "C2", "C3")):
        real = ids[feature][ids[feature] >= NUM_RESERVED_IDS]
        counts = -np.sort(-np.unique(real, return_counts=True)[1])
        found = manifest.categorical_stats[name]
        assert found.cardinality == len(counts)
        assert found.mean_ids_per_sample == pytest.approx(len(real) / 3000)
        assert found.skew == pytest.approx(counts[: -(-len(counts) // 100)].sum() / len(real))
        assert found.num_embeddings == TINY.cardinalities[feature] + NUM_RESERVED_IDS
        assert ids[feature].max() < found.num_embeddings


def test_best_scores_are_those_of_the_true_probabilities(tmp_path: Path) -> None:
    manifest = _generate(tmp_path, num_rows=1024)
    chunk = draw_chunk(TINY, make_teacher(TINY), 0, 0)
    for name, rows in (("train", slice(0, 922)), ("test", slice(973, 1024))):
        split = manifest.splits[name]
        labels, probabilities = chunk.labels[rows], chunk.probabilities[rows].astype(np.float64)
        assert split.best_auc == pytest.approx(roc_auc_score(labels, probabilities), abs=2e-5)
        assert split.best_logloss == pytest.approx(log_loss(labels, probabilities), abs=1e-6)


def test_auc_of_many_samples_is_exact_to_the_stated_error() -> None:
    rng = np.random.default_rng(0)
    probabilities = rng.random(200_000, np.float32)
    labels = (rng.random(200_000) < probabilities).astype(np.uint8)
    truth = SplitTruth()
    truth.add(labels[:70_000], probabilities[:70_000])
    truth.add(labels[70_000:], probabilities[70_000:])
    assert truth.split_info(()).best_auc == pytest.approx(roc_auc_score(labels, probabilities), abs=2e-6)


def test_a_split_of_one_label_has_no_best_auc() -> None:
    truth = SplitTruth()
    truth.add(np.zeros(3, np.uint8), np.full(3, 0.25, np.float32))
    info = truth.split_info(())
    assert info.best_auc is None
    assert info.best_logloss == pytest.approx(-np.log(0.75))


def test_tsv_holds_the_same_rows_before_preprocessing(tmp_path: Path) -> None:
    _generate(tmp_path / "shards", 1500, "criteo_small")
    _generate(tmp_path / "raw", 1500, "criteo_small", format="tsv")
    assert [path.name for path in (tmp_path / "raw").iterdir()] == ["train.txt"]
    rows = [line.split("\t") for line in (tmp_path / "raw/train.txt").read_text().splitlines()]
    assert {len(row) for row in rows} == {40}
    shards = [columns for found in _read(tmp_path / "shards").values() for columns in found]
    assert [int(row[0]) for row in rows] == np.concatenate([c.labels for c in shards]).tolist()
    dense = np.concatenate([c.dense for c in shards])
    counts = [[np.log1p(max(float(field), 0.0)) if field else 0.0 for field in row[1:14]] for row in rows]
    assert np.array_equal(np.array(counts).astype(np.float32), dense)
    assert any(field.startswith("-") for row in rows for field in row[1:14])
    for feature in range(26):
        ids = np.concatenate([c.bags[feature].ids for c in shards]).tolist()
        fields = [row[14 + feature] for row in rows]
        assert [field == "" for field in fields] == [i == MISSING_ID for i in ids]
        assert {len(field) for field in fields if field} == {8}
        pairs = {(i, field) for i, field in zip(ids, fields, strict=True) if field}
        assert len(pairs) == len({i for i, _ in pairs}) == len({field for _, field in pairs})


@pytest.mark.parametrize("name", ["criteo", "criteo_small", "criteo_multi_hot", "big_basin", "big_basin_pooling_10"])
def test_every_shape_is_skewed_and_has_its_pooling_factors(tmp_path: Path, name: str) -> None:
    shape = SHAPES[name]
    manifest = _generate(tmp_path, 2000, name)
    for stats, column, pooling_factor in zip(
        manifest.categorical_stats.values(), shape.schema.categorical, shape.pooling_factors, strict=True
    ):
        assert column.multi_hot == (pooling_factor > 1)
        if column.multi_hot:
            assert stats.mean_ids_per_sample == pytest.approx(pooling_factor, rel=0.1)
        if stats.cardinality > 500:
            assert stats.skew > 0.1
    assert manifest.splits["train"].label_rate == pytest.approx(0.25, abs=0.05)
    assert manifest.splits["train"].best_auc == pytest.approx(0.8, abs=0.04)


def test_a_data_set_is_not_overwritten(tmp_path: Path) -> None:
    _generate(tmp_path)
    with pytest.raises(DatasetError, match=r"manifest\.json exists already; delete .* or choose another --output"):
        _generate(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shape": "crite"}, "there is no shape 'crite'; choose one of criteo, criteo_small"),
        (
            {"shape": "big_basin", "format": "tsv"},
            "format tsv holds 13 counts and 26 single ids; shape 'big_basin' needs",
        ),
        ({"num_rows": 3}, "num_rows\n.*greater than or equal to 20"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        GenerateOptions.model_validate({"num_rows": 100, "output": "x", **options})


def test_generating_and_its_options_import_no_torch() -> None:
    code = (
        "import sys, papilio.data_pipeline.generate.generate_options, papilio.data_pipeline.config; "
        "assert 'pyarrow' not in sys.modules;"
        "import papilio.data_pipeline.generate.generator; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, cwd=Path(__file__).parents[3])
