"""Independent statements of what Papilio computes: unsharded, in plain PyTorch or NumPy, written from the papers."""

from __future__ import annotations

import numpy as np
import torch


def pool_bags(weight: torch.Tensor, ids: torch.Tensor, lengths: torch.Tensor, mode: str) -> torch.Tensor:
    """Sum or average the rows of each bag, one by one."""
    pooled, start = [], 0
    for length in lengths.tolist():
        rows = weight[ids[start : start + length].long()]
        start += length
        total = rows.sum(0)
        pooled.append(total / length if mode == "mean" and length else total)
    return torch.stack(pooled) if pooled else weight.new_zeros(0, weight.shape[1])


class SparseReference:
    """One table's optimizer, from its formula, on a dense gradient; rows without a gradient stay as they are."""

    def __init__(self, name: str, learning_rate: float, eps: float, weight: torch.Tensor) -> None:
        self.name, self.learning_rate, self.eps = name, learning_rate, eps
        self.state = torch.zeros(weight.shape[0], 1 if name == "rowwise_adagrad" else weight.shape[1])

    def step(self, weight: torch.Tensor, gradient: torch.Tensor) -> None:
        """Update `weight` in place."""
        if self.name == "sgd":
            weight -= self.learning_rate * gradient
            return
        square = gradient.square()
        self.state += square.mean(1, keepdim=True) if self.name == "rowwise_adagrad" else square
        weight -= self.learning_rate * gradient / (self.state.sqrt() + self.eps)


def mlp(inputs: np.ndarray, layers: list[tuple[np.ndarray, np.ndarray]], *, last_relu: bool) -> np.ndarray:
    """Fully connected layers with ReLU; `layers` holds (weight [out, in], bias [out])."""
    for index, (weight, bias) in enumerate(layers):
        inputs = inputs @ weight.T + bias
        if last_relu or index < len(layers) - 1:
            inputs = np.maximum(inputs, 0)
    return inputs


def dlrm_logits(dense: np.ndarray, pooled: np.ndarray, bottom: list, top: list) -> np.ndarray:
    """DLRM (arXiv 1906.00091, section 2.1) for dense [B, I] and pooled embeddings [B, F, D], sample by sample."""
    logits = []
    for x, embeddings in zip(dense, pooled, strict=True):
        z = mlp(x, bottom, last_relu=True)
        vectors = [z, *embeddings]
        dots = [vectors[i] @ vectors[j] for i in range(len(vectors)) for j in range(i)]
        logits.append(mlp(np.concatenate([z, dots]), top, last_relu=False)[0])
    return np.array(logits)


def dcnv2_logits(dense: np.ndarray, pooled: np.ndarray, bottom: list, cross: list, top: list) -> np.ndarray:
    """DLRM-DCNv2: x_{l+1} = x_0 * (W_l (V_l x_l) + b_l) + x_l (arXiv 2008.13535, equation 2); cross: (W, V, b)."""
    logits = []
    for x, embeddings in zip(dense, pooled, strict=True):
        x_0 = np.concatenate([mlp(x, bottom, last_relu=True), embeddings.reshape(-1)])
        x_l = x_0
        for w, v, b in cross:
            x_l = x_0 * (w @ (v @ x_l) + b) + x_l
        logits.append(mlp(x_l, top, last_relu=False)[0])
    return np.array(logits)
