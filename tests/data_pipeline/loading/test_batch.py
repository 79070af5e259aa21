import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from torchrec.streamable import Pipelineable

from papilio.data_pipeline.loading.batch import Batch
from papilio.data_pipeline.loading.order import ReadPosition


def test_batch_moves_as_a_whole_and_keeps_its_position() -> None:
    sparse = KeyedJaggedTensor(keys=["u"], values=torch.tensor([3, 4]), lengths=torch.tensor([1, 1]))
    batch = Batch(torch.zeros(2, 1), sparse, torch.ones(2), ReadPosition(1, 2), 5, 2)
    assert isinstance(batch, Pipelineable)
    moved = batch.to(torch.device("meta"), non_blocking=True)
    assert {moved.dense_features.device.type, moved.labels.device.type, moved.sparse_features.values().device.type} == {
        "meta"
    }
    assert (moved.position, moved.global_batch_size) == (ReadPosition(1, 2), 5)
    same = batch.to(torch.device("cpu"))
    assert torch.equal(same.sparse_features.values(), torch.tensor([3, 4]))


def test_padding_adds_rows_of_zeros_with_empty_bags() -> None:
    sparse = KeyedJaggedTensor(keys=["u", "v"], values=torch.tensor([3, 4, 5]), lengths=torch.tensor([1, 1, 0, 1]))
    batch = Batch(torch.ones(2, 1), sparse, torch.ones(2), ReadPosition(1, 2), 5, 2)
    assert batch.padded_to(2) is batch
    padded = batch.padded_to(3)
    assert padded.dense_features.tolist() == [[1], [1], [0]]
    assert padded.labels.tolist() == [1, 1, 0]
    by_key = padded.sparse_features.to_dict()
    assert [bag.tolist() for bag in by_key["u"].to_dense()] == [[3], [4], []]
    assert [bag.tolist() for bag in by_key["v"].to_dense()] == [[], [5], []]
    assert (padded.num_samples, padded.sparse_features.stride()) == (2, 3)
