"""AdaSpa (2502.21079): the true share of attention of each block, looked for at few steps, and a budget for each head.

Mass of a pair of blocks: the mean over its queries of sum exp(s - LSE). The LSE of the first search is used again by
later ones, as it hardly changes between steps. No code of the authors was found, so these are our reading: the mean
over queries, and the budget (select.adaptive_density): heads that keep more than 0.8 of their attention get the
sparsity (1 + s) / 2, and as many that keep least (3 s - 1) / 2, so that the mean stays s.
"""

from __future__ import annotations

import torch

from dit_accel.attention.block_sparse import BlockSparse
from dit_accel.attention.score import Call, Scored, mean_queries, score_rows, sum_keys


def settings(density: float = 0.2, search_steps: tuple[int, ...] = (10, 30)) -> BlockSparse:
    """The authors' numbers for 50 steps: sparsity 0.8, searches at steps 10 and 30, everything computed before."""
    return BlockSparse(
        density, score="mass", budget="adaptive", enough=0.8, keep=("text",), search_steps=search_steps, dense_steps=0.2
    )


def scores(call: Call) -> Scored:
    """Mass of every pair of blocks, and the LSE of every query; looks at every pair of tokens."""
    size = call.settings.block_size
    known = None if call.memory is None else call.memory.lse
    masses, sums = [], []
    for tokens, rows in score_rows(call.q, call.k, call.scale, call.key_bias, size):
        base = rows.amax(-1) if known is None else known[:, :, tokens]
        base = base.clamp(min=torch.finfo(base.dtype).min)  # -inf where no key can be seen
        shares = sum_keys(rows.sub_(base.unsqueeze(-1)).exp_(), size)
        if known is None:
            total = shares.sum(-1, keepdim=True)
            base = base + total.squeeze(-1).log()
            shares = shares / total.clamp(min=1e-30)
        masses.append(mean_queries(shares, size))
        sums.append(base)
    return Scored(torch.cat(masses, 2), lse=torch.cat(sums, 2))
