"""Reference updates of the public scripts, in PyTorch with diffusers' network, for timing.

The losses are those of gadjax.objectives.tdm, gad_script, dmd and anchor; each random number is
drawn anew. Nothing is compiled; on a GPU the networks run under autocast and AdamW is fused.
"""

import numpy as np
import torch
from benchmarks.common import Size
from diffusers import PixArtTransformer2DModel
from torch.utils.flop_counter import FlopCounterMode

from gadjax.diffusion.schedules import DDPM

H, HUBER, GUIDANCE = 1e-2, 1e-3, 4.5
GRID = 899, 674, 449, 224, -1


class Reference:
    """Student, critic and frozen teacher of one size.

    half: dtype of autocast on a GPU, and of the teacher there; float32 on a CPU.
    remat: gradient checkpointing of each block.
    """

    def __init__(self, size: Size, half: torch.dtype, remat: bool):
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.half = half if self.device == "cuda" else torch.float32
        torch.manual_seed(0)
        with torch.device(self.device):
            self.student, self.critic, self.teacher = (self.network(size) for _ in range(3))
            self.z = torch.randn(size.batch, 4, size.side, size.side)
            self.text, self.null_text = torch.randn(2, size.batch, size.text, size.caption)
            self.mask = torch.ones(size.batch, size.text)
        self.teacher.requires_grad_(False).to(self.half)
        self.optimizers = {}
        for model in (self.student, self.critic):
            if remat:
                model.enable_gradient_checkpointing()
            self.optimizers[model] = torch.optim.AdamW(
                model.parameters(), 1e-5, betas=(0.0, 0.95), fused=self.device == "cuda"
            )
        tables = DDPM().alpha_sigma(np.arange(-1.0, 1000.0))
        self.alpha, self.sigma = (
            torch.tensor(v, dtype=torch.float32, device=self.device) for v in tables
        )
        self.k = torch.arange(size.batch, device=self.device) % (len(GRID) - 1)
        self.grid = torch.tensor(GRID, device=self.device)

    def network(self, size: Size):
        return PixArtTransformer2DModel(
            num_attention_heads=size.heads,
            attention_head_dim=size.head_dim,
            num_layers=size.layers,
            cross_attention_dim=size.heads * size.head_dim,
            sample_size=size.side,
            caption_channels=size.caption,
            use_additional_conditions=False,
        ).train()

    def at(self, t):
        """Noise schedule: alpha and sigma [B, 1, 1, 1]."""
        return (v[t + 1].view(-1, 1, 1, 1) for v in (self.alpha, self.sigma))

    def raw(self, model, x, t, text, mask):
        with torch.autocast(self.device, self.half, enabled=self.device == "cuda"):
            out = model(
                x.to(self.half),
                text.to(self.half),
                t,
                added_cond_kwargs={"resolution": None, "aspect_ratio": None},
                encoder_attention_mask=mask,
                return_dict=False,
            )[0]
        return out.chunk(2, dim=1)[0].float()

    def predict(self, model, x, t):
        """Prediction (x0, eps)."""
        return self.split(self.raw(model, x, t, self.text, self.mask), x, t)

    def guided(self, x, t):
        cond_out, uncond_out = self.raw(
            self.teacher,
            torch.cat([x, x]),
            torch.cat([t, t]),
            torch.cat([self.text, self.null_text]),
            torch.cat([self.mask, self.mask]),
        ).chunk(2)
        return self.split(uncond_out + GUIDANCE * (cond_out - uncond_out), x, t)

    def split(self, eps, x, t):
        alpha, sigma = self.at(t)
        return (x - sigma * eps) / alpha, eps

    def next_latent(self, prediction, t):
        alpha, sigma = self.at(t)
        return alpha * prediction[0] + sigma * prediction[1]

    def times(self, k: int):
        return self.grid[k].expand(len(self.z))

    @torch.no_grad()
    def backward_simulate(self):
        """Backward simulation: latents at each sample's step of the grid."""
        x, states = self.z, [self.z]
        for k in range(len(GRID) - 2):
            x = self.next_latent(self.predict(self.student, x, self.times(k)), self.times(k + 1))
            states.append(x)
        return torch.stack(states)[self.k, torch.arange(len(x))]

    def generator(self, x_k=None):
        """Generator update: TDM and GAD by finite differences, from given latents.

        Returns: the critic's training data: x0, x_tau and tau.
        """
        x_k = self.z if x_k is None else x_k
        t_k, next_k = self.grid[self.k], self.grid[self.k + 1]
        prediction = self.predict(self.student, x_k, t_k)
        low = next_k.clamp(min=20)
        tau = (low + torch.rand(len(x_k), device=self.device) * (t_k - 10 - low)).long()
        with torch.no_grad():
            x_next, (a, s), (b, r) = (
                self.next_latent(prediction, next_k),
                self.at(next_k),
                self.at(tau),
            )
            fresh = torch.randn_like(x_next)
            x_tau = b / a * x_next + (r**2 - (b / a * s) ** 2).clamp(min=0).sqrt() * fresh
            raw = torch.randn_like(x_tau)
            perturbed = x_tau + H * raw / raw.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
            real, fake = self.guided(x_tau, tau)[0], self.predict(self.critic, x_tau, tau)[0]
            real_h = (self.guided(perturbed, tau)[0] - real) / H
            fake_h = (self.predict(self.critic, perturbed, tau)[0] - fake) / H
        ds = (self.predict(self.student, perturbed, tau)[0] - prediction[0]) / H
        error = ds - (ds + real_h - fake_h).detach()
        gad = (error**2 + HUBER**2).sqrt().mean() / (ds - real_h).abs().mean().detach()
        self.update(self.student, self.matching(prediction[0], real, fake) + gad)
        return prediction[0].detach(), x_tau, tau

    def matching(self, x0, real, fake):
        toward = (fake - real) / (x0.detach() - real).abs().mean(dim=(1, 2, 3), keepdim=True)
        return 0.5 * ((x0 - (x0 - toward).detach()) ** 2).mean()

    def iteration(self):
        """Backward simulation, the generator's update, and the critic's on the same pictures."""
        x0, x_tau, tau = self.generator(self.backward_simulate())
        error = self.predict(self.critic, x_tau, tau)[0] - x0
        self.update(self.critic, (error**2).mean())

    def dpdmd(self):
        """Student update of DP-DMD: DMD through the rollout but for its first step, which is
        trained by the secant to the result of 4 guided steps of the teacher."""
        x, first = self.z, None
        for k in range(len(GRID) - 1):
            prediction = self.predict(self.student, x, self.times(k))
            x = self.next_latent(prediction, self.times(k + 1))
            if k == 0:
                first, x = prediction, x.detach()
        with torch.no_grad():
            arrived, times = self.z, torch.linspace(GRID[0], GRID[1], 5).long().to(self.device)
            for now, after in zip(times[:-1], times[1:], strict=True):
                now, after = (v.expand(len(arrived)) for v in (now, after))
                arrived = self.next_latent(self.guided(arrived, now), after)
            (a, s), (b, r) = self.at(self.times(0)), self.at(self.times(1))
            scale = s * b - r * a
            x0, eps = (s * arrived - r * self.z) / scale, (b * self.z - a * arrived) / scale
            t = torch.randint(20, 980, (len(x),), device=self.device)
            alpha, sigma = self.at(t)
            noised = alpha * x + sigma * torch.randn_like(x)
            real, fake = self.guided(noised, t)[0], self.predict(self.critic, noised, t)[0]
        anchor = (((first[1] - first[0]) - (eps - x0)) ** 2).mean()
        self.update(self.student, self.matching(x, real, fake) + 0.05 * anchor)

    def update(self, model, loss):
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        self.optimizers[model].step()
        self.optimizers[model].zero_grad()

    def finished(self, run):
        run()
        if self.device == "cuda":
            torch.cuda.synchronize()

    def flops(self, f) -> float:
        with FlopCounterMode(display=False) as counter:
            f()
        return float(counter.get_total_flops())

    def once(self):
        with torch.no_grad():
            self.predict(self.student, self.z, self.times(0))
