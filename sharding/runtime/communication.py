"""Pooled embeddings and their gradients in fewer bits on the way between ranks: TorchRec's quantized collectives."""

from __future__ import annotations

import torch
from torchrec.distributed.fbgemm_qcomm_codec import CommType, QCommsConfig, get_qcomm_codecs_registry
from torchrec.distributed.types import QuantizedCommCodecs

from papilio.sharding.config import CommunicationConfig
from papilio.sharding.plan_file import PlanFile
from papilio.sharding.planner.constraints import INT8_COLUMNS, ROW_TYPES
from papilio.sharding.planner.errors import PlanError

COMM_TYPES = {"fp32": CommType.FP32, "fp16": CommType.FP16, "bf16": CommType.BF16, "int8": CommType.INT8}


def make_codecs(config: CommunicationConfig, device: torch.device) -> dict[str, QuantizedCommCodecs] | None:
    """Return what a sharder needs to send in the config's precisions; None where both are fp32.

    Gradients are not scaled: TorchRec's decoder divides by the loss scale while still in fp16, so a scale gains nothing
    (8e-3 of relative error with and without 1024).
    """
    quantization = QCommsConfig(
        forward_precision=COMM_TYPES[config.forward], backward_precision=COMM_TYPES[config.backward]
    )
    codecs: dict[str, QuantizedCommCodecs] | None = get_qcomm_codecs_registry(quantization, device=device)
    return codecs


def check_communication(config: CommunicationConfig, plan: PlanFile, device: torch.device) -> None:
    """Refuse what TorchRec would fail at in a step, or silently do otherwise, with this plan on this device.

    The planner plans nothing of the kind (sharding/planner/constraints.py); plan files and profiles of other devices
    come past it.

    Raises:
        PlanError: naming the key, the tables and the fix.
    """
    for direction, precision in config:
        if precision == "bf16" and device.type == "cpu":
            raise PlanError(
                f"sharding.communication.{direction} = 'bf16': gloo cannot send it, and TorchRec would take fp16 "
                "without a word; set fp16, int8 or fp32"
            )
        if precision == "int8":
            _check_int8(direction, plan)


def _check_int8(direction: str, plan: PlanFile) -> None:
    cut = [table for table in plan.tables if table.sharding_type in ROW_TYPES]
    if cut:
        raise PlanError(
            f"sharding.communication.{direction} = 'int8': partial sums cannot travel in it, but the plan makes "
            f"{_names([f'{table.name} {table.sharding_type}' for table in cut])}; make the plan again with it, or set "
            "fp16"
        )
    narrow = [table.name for table in plan.tables if any(shard.num_columns % INT8_COLUMNS for shard in table.shards)]
    if narrow and plan.machine.group_size > 1:
        raise PlanError(
            f"sharding.communication.{direction} = 'int8' packs {INT8_COLUMNS} columns together, but the plan has "
            f"shards of other widths of {_names(narrow)}; make the plan again with it, or set fp16"
        )


def _names(tables: list[str]) -> str:
    return ", ".join(tables[:3]) + (f" and {len(tables) - 3} more" if len(tables) > 3 else "")
