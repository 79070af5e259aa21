import numpy as np
import pytest

from papilio.data_pipeline.mixing import key_of, mix64


def test_mix64_is_splitmix64() -> None:
    # The first outputs of splitmix64 seeded with 0 and with 1234567 (Vigna's reference program).
    assert int(mix64(np.array([0], np.uint64))[0]) == 0xE220A8397B1DCDAF
    assert int(mix64(np.array([1234567], np.uint64))[0]) == 6457827717110365317


@pytest.mark.parametrize("other", [(1, "a", 3), (1, "b", 2), (0, "a", 2), (-1, "a", 2), (1 + 2**64, "a", 2)])
def test_key_tells_its_parts_apart(other: tuple[int | str, ...]) -> None:
    assert key_of(1, "a", 2) == key_of(1, "a", 2)
    assert key_of(1, "a", 2) != key_of(*other)
    assert 0 <= key_of(*other) < 2**64
