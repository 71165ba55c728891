"""Muon optimiser for weight matrices (Jordan et al. 2024; update scale of Moonlight, 2502.16982), made for a CPU.

torch.optim.Muon orthogonalises in bf16, one matrix at a time: twice the cost of these models' forward and backward on a
CPU. Here it is fp32, with all matrices of one shape in one batch.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class Muon:
    """Nesterov momentum whose update has all singular values near one."""

    def __init__(self, parameters: dict[str, nn.Parameter], momentum: float = 0.95):
        self.parameters, self.momentum = parameters, momentum
        self.state = {name: torch.zeros_like(p) for name, p in parameters.items()}
        shapes = sorted({tuple(p.shape) for p in parameters.values()})
        self.groups = [[n for n, p in parameters.items() if tuple(p.shape) == shape] for shape in shapes]

    @staticmethod
    def orthogonalise(g: Tensor) -> Tensor:
        """Quintic Newton-Schulz iteration: singular values of [N, R, C] to about one."""
        transposed = g.shape[-2] > g.shape[-1]
        x = g.mT if transposed else g
        x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
        for _ in range(5):
            a = x @ x.mT
            x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
        return x.mT if transposed else x

    @torch.no_grad()
    def step(self, rate: float) -> None:
        for names in self.groups:
            gradient = torch.stack([self.parameters[n].grad for n in names])
            buffer = torch.stack([self.state[n] for n in names]).lerp_(gradient, 1 - self.momentum)
            update = self.orthogonalise(gradient.lerp(buffer, self.momentum))
            scale = 0.2 * math.sqrt(max(update.shape[-2:]))
            for name, one, moment in zip(names, update, buffer):
                self.state[name].copy_(moment)
                self.parameters[name].mul_(1 - rate * 0.01).add_(one, alpha=-rate * scale)
