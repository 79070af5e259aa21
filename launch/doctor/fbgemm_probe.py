"""Loads torch, fbgemm and torchrec and prints as JSON what works; `papilio doctor` runs it in a process of its own.

A torch and an fbgemm that do not match end in an undefined symbol or a crash, which doctor must survive to report.
"""

from __future__ import annotations

import json

# Those without which no step runs.
NEEDED_OPERATORS = (
    "split_embedding_codegen_forward_cpu",
    "asynchronous_complete_cumsum",
    "permute_2D_sparse_data",
    "block_bucketize_sparse_features",
    "bounds_check_indices",
)


def main() -> None:
    """Print one JSON object a step, so that what was found before a crash is not lost."""
    import torch
    import torch.distributed as dist

    _report(
        torch_loads=True,
        torch_cuda=torch.version.cuda,
        num_visible_gpus=torch.cuda.device_count(),
        has_gloo=dist.is_available() and dist.is_gloo_available(),
        has_nccl=dist.is_available() and dist.is_nccl_available(),
    )
    import fbgemm_gpu  # noqa: F401

    missing = [name for name in NEEDED_OPERATORS if not hasattr(torch.ops.fbgemm, name)]
    _report(fbgemm_loads=True, missing_operators=missing)
    import torchrec  # noqa: F401

    _report(torchrec_loads=True)


def _report(**facts: object) -> None:
    print(json.dumps(facts), flush=True)


if __name__ == "__main__":
    main()
