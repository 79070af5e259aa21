import numpy as np
import pyarrow as pa
import pytest

from papilio.data_pipeline.manifest import DatasetError
from papilio.data_pipeline.preprocess import vocabulary as module
from papilio.data_pipeline.preprocess.vocabulary import Vocabulary, load_vocabulary, save_vocabulary, vocabulary_file


def binary(*values: bytes) -> pa.Array:
    return pa.array(values, pa.large_binary())


@pytest.mark.parametrize("dtype", [np.uint32, np.int64])
def test_numbers_by_rank(dtype):
    keys = np.array([7, 3, 2**31, 0], dtype)
    vocabulary = Vocabulary(keys)
    assert vocabulary.lookup(np.array([0, 1, 3, 7, 2**31], dtype)).tolist() == [5, 0, 3, 2, 4]
    assert vocabulary.num_embeddings == 6


def test_strings_by_rank():
    vocabulary = Vocabulary(binary(b"rome", b"oslo", b"z\xc3\xbcrich"))
    assert vocabulary.lookup(binary(b"oslo", b"", b"z\xc3\xbcrich", b"rome", b"paris")).tolist() == [3, 0, 4, 2, 0]


def test_strings_whose_hashes_collide_are_told_apart(monkeypatch):
    monkeypatch.setattr(module, "_probes", lambda keys: np.array([len(k) for k in keys.to_pylist()], np.uint64))
    vocabulary = Vocabulary(binary(b"aa", b"bb", b"c", b"dd"))
    assert vocabulary.lookup(binary(b"dd", b"c", b"xx", b"bb", b"aa", b"y", b"long")).tolist() == [5, 4, 0, 3, 2, 0, 0]


def test_an_empty_vocabulary_knows_nothing():
    assert Vocabulary(np.empty(0, np.uint32)).lookup(np.array([1], np.uint32)).tolist() == [0]
    assert Vocabulary(binary()).lookup(binary(b"a")).tolist() == [0]


def test_saved_vocabularies_come_back(tmp_path):
    for keys, kind in [
        (np.array([5, 1], np.uint32), "hex"),
        (np.array([-5, 1]), "integer"),
        (binary(b"b", "é".encode()), "string"),
    ]:
        file = vocabulary_file("a/b", kind)
        crc32 = save_vocabulary(keys, str(tmp_path), file)
        assert load_vocabulary(str(tmp_path), file, crc32).keys_by_rank.tolist() == keys.tolist()


def test_a_changed_or_missing_file_is_refused(tmp_path):
    file = vocabulary_file("c", "hex")
    crc32 = save_vocabulary(np.array([5, 1], np.uint32), str(tmp_path), file)
    with pytest.raises(DatasetError, match="was changed after it was written"):
        load_vocabulary(str(tmp_path), file, crc32 + 1)
    (tmp_path / file).unlink()
    with pytest.raises(DatasetError, match="is missing; restore it"):
        load_vocabulary(str(tmp_path), file, crc32)


def test_no_two_features_share_a_file_and_none_leaves_the_folder():
    names = ["a/b", "a%2Fb", "a%252Fb", "..", "../x", "user.id", "größe ✓"]
    files = [vocabulary_file(name, "string") for name in names]
    assert len(set(files)) == len(names)
    assert all(file.count("/") == 1 for file in files)
