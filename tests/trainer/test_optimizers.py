import pytest
import torch

from papilio.trainer.config import ScheduleConfig, SparseOptimizerConfig
from papilio.trainer.config_file import ConfigError, build_config
from papilio.trainer.optimizers import check_data_parallel_tables, check_sparse_optimizer, learning_rate_factor


@pytest.mark.parametrize("name", ["adam", "partial_rowwise_adam", "lamb"])
def test_optimizers_without_a_cpu_kernel_are_refused_by_name(name):
    config = SparseOptimizerConfig(name=name)
    with pytest.raises(
        ConfigError, match=rf"optimizer.sparse.name = '{name}': FBGEMM has no CPU kernel .* rowwise_adagrad"
    ):
        check_sparse_optimizer(config, torch.device("cpu"))
    check_sparse_optimizer(config, torch.device("cuda"))


def test_weight_decay_that_would_be_ignored_is_refused():
    config = SparseOptimizerConfig(name="sgd", weight_decay=0.1)
    with pytest.raises(ConfigError, match=r"optimizer.sparse.weight_decay = 0.1: FBGEMM's CPU kernels ignore it"):
        check_sparse_optimizer(config, torch.device("cpu"))


def test_the_schedule_warms_up_stays_and_decays():
    schedule = ScheduleConfig(warmup_steps=4, decay_start_step=10, decay_steps=10, decay_power=2, floor=0.1)
    factors = [learning_rate_factor(schedule, step) for step in (0, 1, 3, 4, 9, 10, 15, 20, 1000)]
    assert factors == pytest.approx([0.25, 0.5, 1, 1, 1, 1, 0.1 + 0.9 * 0.25, 0.1, 0.1])


def test_without_a_schedule_the_rate_is_constant():
    assert {learning_rate_factor(ScheduleConfig(), step) for step in range(100)} == {1.0}


def config_with(sparse=None, model=None):
    return build_config(
        {"name": "n", "data": {"path": "d"}, "optimizer": {"sparse": sparse or {}}, "model": model or {}}, source="test"
    )


@pytest.mark.parametrize(
    ("sections", "reason"),
    [
        ({"sparse": {"name": "adam"}}, r"optimizer.sparse.name = 'adam' .* use one of sgd, adagrad, rowwise_adagrad"),
        ({"sparse": {"name": "lamb"}}, r"optimizer.sparse.name = 'lamb'"),
        ({"sparse": {"weight_decay": 0.1}}, r"optimizer.sparse.weight_decay = 0.1 .* set it to 0"),
        ({"model": {"table_precision": "fp16"}}, r"model.table_precision = 'fp16' .* use fp32"),
    ],
)
def test_data_parallel_tables_that_would_be_trained_otherwise_are_refused(sections, reason):
    config = config_with(**sections)
    sections_of_config = config.optimizer.sparse, config.model.table_precision
    check_data_parallel_tables([], *sections_of_config)
    tables = ["t_a", "t_b", "t_c", "t_d"]
    with pytest.raises(ConfigError, match=rf"4 table\(s\) data_parallel \(t_a, t_b, t_c, ...\), but {reason}") as error:
        check_data_parallel_tables(tables, *sections_of_config)
    assert str(error.value).endswith("or leave data_parallel out of sharding.types")


@pytest.mark.parametrize("name", ["sgd", "adagrad", "rowwise_adagrad"])
def test_other_data_parallel_tables_are_not(name):
    config = config_with({"name": name})
    check_data_parallel_tables(["t_a"], config.optimizer.sparse, config.model.table_precision)
