"""Metrics of a model on a whole split, over all ranks."""

from __future__ import annotations

import torch
from torchrec.distributed import DistributedModelParallel

from papilio.data_pipeline.config import DataConfig
from papilio.data_pipeline.dataset import Dataset
from papilio.data_pipeline.loading.loader import Loader
from papilio.trainer.config import TrainConfig
from papilio.trainer.metrics import ClickMetrics, MetricValues
from papilio.trainer.process_group import Ranks
from papilio.trainer.run.progress_lines import ProgressPrinter


def evaluate(
    model: DistributedModelParallel,
    dataset: Dataset,
    split: str,
    data: DataConfig,
    train: TrainConfig,
    ranks: Ranks,
    *,
    show_progress: bool,
) -> MetricValues:
    """Return the metrics of every sample of `split`. Collective; leaves the model in the mode it was in."""
    loader = Loader(
        dataset,
        split,
        data,
        global_batch_size=train.eval_batch_size,
        shuffle=False,
        rank=ranks.rank,
        world_size=ranks.world_size,
        pin_memory=ranks.device.type == "cuda",
    )
    printer = ProgressPrinter(train.log_every_s, is_silent=not (ranks.is_first and show_progress))
    metrics = ClickMetrics(ranks.device)
    was_training = model.training
    model.eval()
    with torch.no_grad():
        for index, batch in enumerate(loader, start=1):
            _, output = model(batch.to(ranks.device, non_blocking=True))
            metrics.update(output.logits, output.labels)
            printer.print(split, index, len(loader), f"{index}/{len(loader)} batches")
    model.train(was_training)
    return metrics.compute(ranks.group)
