"""Pooled embeddings and their gradients in fewer bits on the way between ranks: TorchRec's quantized collectives."""

from __future__ import annotations

import torch
from torchrec.distributed.fbgemm_qcomm_codec import CommType, QCommsConfig, get_qcomm_codecs_registry
from torchrec.distributed.types import QuantizedCommCodecs

from sharding.config import CommunicationConfig

COMM_TYPES = {"fp32": CommType.FP32, "fp16": CommType.FP16, "bf16": CommType.BF16, "int8": CommType.INT8}


def make_codecs(config: CommunicationConfig, device: torch.device) -> dict[str, QuantizedCommCodecs] | None:
    """Return what a sharder needs to send in the config's precisions; None where both are fp32.

    What cannot be done on the device or with a sharding type is refused in planning
    (sharding/planning/constraints.py). Gradients are not scaled: TorchRec's decoder divides by the loss scale while
    still in fp16, so a scale gains nothing (8e-3 of relative error with and without 1024).
    """
    quantization = QCommsConfig(
        forward_precision=COMM_TYPES[config.forward], backward_precision=COMM_TYPES[config.backward]
    )
    codecs: dict[str, QuantizedCommCodecs] | None = get_qcomm_codecs_registry(quantization, device=device)
    return codecs
