"""BAC where it comes from: a small diffusion policy (Chi et al. 2303.04137), trained here, episodes alike."""

from __future__ import annotations

import functools
import math

import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn

import dit_accel
from dit_accel import Policy

HORIZON, WIDTH, LAYERS, STEPS = 16, 48, 4, 50


class DiffusionPolicy(nn.Module):
    """Noise in a path of 16 positions in the plane, given where it starts and ends: torch's own decoder layers."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(2, WIDTH), nn.Linear(WIDTH, 2)
        self.place = nn.Parameter(0.02 * torch.randn(HORIZON, WIDTH))
        self.seen = nn.Linear(4, WIDTH)
        layer = nn.TransformerDecoderLayer(WIDTH, 4, 4 * WIDTH, 0.0, "gelu", batch_first=True, norm_first=True)
        self.decoder = nn.TransformerDecoder(layer, LAYERS, nn.LayerNorm(WIDTH))

    def forward(self, sample: Tensor, timestep: Tensor, observation: Tensor) -> Tensor:
        rates = torch.exp(-math.log(1e4) * torch.arange(WIDTH // 2) / (WIDTH // 2))
        angles = timestep.reshape(-1, 1).expand(len(sample), 1) * rates
        time = torch.cat([angles.sin(), angles.cos()], dim=1)
        memory = torch.stack([time, self.seen(observation)], dim=1)
        return self.leave(self.decoder(self.enter(sample) + self.place, memory))


def scheduler() -> DDIMScheduler:
    return DDIMScheduler(num_train_timesteps=1000, beta_schedule="squaredcos_cap_v2", clip_sample=False)


def demonstrations(count: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Paths [B, 16, 2] from a start to an end, bent to one side or the other, and what is seen of them [B, 4]."""
    ends = torch.rand(count, 2, 2, generator=rng) * 2 - 1
    along = torch.linspace(0, 1, HORIZON).view(1, -1, 1)
    straight = torch.lerp(ends[:, :1], ends[:, 1:], along)
    side = torch.randint(2, (count, 1, 1), generator=rng) * 2.0 - 1
    across = (ends[:, 1:] - ends[:, :1]).flip(-1) * torch.tensor([-1.0, 1.0])
    return straight + 0.3 * side * (math.pi * along).sin() * across, ends.flatten(1)


@functools.lru_cache(maxsize=1)
def trained() -> DiffusionPolicy:
    torch.manual_seed(0)
    model, noise_levels = DiffusionPolicy(), scheduler()
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    rng = torch.Generator().manual_seed(0)
    for step in range(600):
        paths, seen = demonstrations(64, rng)
        noise, time = torch.randn(paths.shape, generator=rng), torch.randint(1000, (64,), generator=rng)
        loss = (model(noise_levels.add_noise(paths, noise, time), time, seen) - noise).square().mean()
        optimiser.param_groups[0]["lr"] = 3e-3 * min(1.0, (600 - step) / 300)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return model.eval().requires_grad_(False)


def episode(model: nn.Module, seed: int, session: dit_accel.Session | None = None) -> tuple[Tensor, Tensor]:
    """A path made for what is seen, and that."""
    rng = torch.Generator().manual_seed(1000 + seed)
    _, seen = demonstrations(1, rng)
    path, solver = torch.randn(1, HORIZON, 2, generator=rng), scheduler()
    solver.set_timesteps(STEPS)

    def run(path: Tensor) -> Tensor:
        for time in solver.timesteps:
            path = solver.step(model(path, time, seen), time, path).prev_sample
        return path

    if session is None:
        return run(path), seen
    with session.run(scheduler=solver):
        return run(path), seen


def missed(path: Tensor, seen: Tensor) -> float:
    """How far the ends of a path lie from what was asked for."""
    ends = torch.stack([path[0, 0], path[0, -1]]).flatten()
    return float((ends - seen[0]).abs().max())


def test_the_masks_of_one_episode_serve_the_others() -> None:
    model = trained()
    plain = [episode(model, seed) for seed in range(5)]
    assert max(missed(*one) for one in plain) < 0.15, "it has learned to go where it is told"
    with dit_accel.apply(model, Policy.named("bac", budget=0.2)) as session:
        made = [episode(model, seed, session) for seed in range(5)]
        assert torch.equal(made[0][0], plain[0][0]), "the first episode measures"
        shares = [run.flops_share for run in session.stats.runs.values()]
        (known,) = session.calibration.known.values()
    assert torch.equal(episode(model, 4)[0], plain[4][0])
    layers = ("self_attn", "multihead_attn", "linear1", "linear2")
    assert set(known.masks) == {f"{place}.{name}" for place in range(LAYERS) for name in layers}
    counts = sorted(mask.count("1") for mask in known.masks.values())
    assert counts[0] == 10 and counts[-1] > 10, "a fifth of the steps, and more for the two that bubbled up"
    assert len([count for count in counts if count > 10]) <= 2
    assert shares[0] == 1.0 and max(shares[1:]) == min(shares[1:]) < 0.35
    assert max(missed(*one) for one in made) < 0.15, "it goes there still"
    errors = [float((a - b).norm() / b.norm()) for (a, _), (b, _) in zip(made[1:], plain[1:])]
    assert 0 < max(errors) < 0.2, errors
