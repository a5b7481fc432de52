"""mdm.py - stable training of masked diffusion language models, in one file.

THE STORY. A sequence x0 is a prompt, always visible, and a response of n tokens. A masked diffusion
model (MDM) learns to fill in the response. In a training step each sequence draws a masking rate t
between 0 and 1, and hides each response token with probability t. The hidden tokens are the mask m.
The model sees xt, the sequence with holes. It gives the true token i the probability p(x0_i | xt).
The loss is a sum over the hidden tokens. On average n t tokens are hidden, so we divide by n t:

    l(x0, t, m) = 1/(n t) * sum_{i in m} -log p(x0_i | xt)                                      (1)
    L           = E_{x0} E_{t ~ U(0,1)} E_m  l(x0, t, m)   >=   -log-likelihood per token       (2)

E_m is the mean over the masks m at the rate t. Read (1) as a mean over all n tokens: a hidden token
has the weight 1/t, and a visible one 0.

AN EXAMPLE of four tokens, carried through this file. Every token gets a uniform random number r.
A token is hidden where r is below t. Say t = 0.5:

    r         .1   .8   .4   .6
    hidden    yes  no   yes  no
    weight    2    0    2    0        1/t = 2 for a hidden token

An autoregressive model (ARM) predicts all four tokens in every step, each with weight 1. So an
ARM's loss has one source of noise: the choice of the data. An MDM's loss has three, by the law of
total variance. An index says what is drawn at random, while the rest is held fixed:

    Var(l) =  E_{x0,t} Var_m (l)            noise A, the masking pattern: which tokens are hidden
           +  E_{x0} Var_t (E_m l)          noise B, the masking rate
           +  Var_{x0} (E_{t,m} l)          noise C, the data                                   (3)

(3) holds for the gradient, too. Its variance is the sum of the variances of its entries.

"Bringing Stability to Diffusion" (arXiv 2511.18159, "the paper" from here on) lowers A and B with
six methods, first of all P-POTS (section 4) and MIRROR (section 5). Section 3 predicts the noise of
a method without a model. `python mdm.py` compares the prediction with the noise of a small model.
If you know nanoGPT, skip section 1. Two parts can wait: section 9, where (3) is measured, and in
section 4 second_moment, epr and fit_epr, the road from a pilot to a density. If you want the
methods for a model of your own, begin with draw_masks in section 8.

LETTERS  n, k      tokens in the response, and hidden ones among them
         t, p      masking rate, and the probability of hiding a token: t, squeezed into (EPS, 1)
         u, r      uniform random numbers: u gives the rate, r (one per token) gives the mask
         H         the sum of -log p(x0_i | xt) over the hidden tokens, so that l = H / (n t)
         S, B, T   models trained side by side, sequences in a batch, tokens in a sequence
         M, X      masks of each sequence in a step, sequences that are measured
B in a shape is the batch, and elsewhere a noise. In shapes such as (..., n) -> (...), the dots are
any number of axes. A method is unbiased if its mean loss is L, apart from the small EPS of section
2. OURS marks an idea found neither in the paper nor, to our knowledge, anywhere else.
"""
import copy
import math
from collections import namedtuple
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

# --------------------------------------------------------------------------------------------------
# 1. The model: nanoGPT's transformer, with rotary positions and QK-norm. Every parameter has a
# leading axis of size S, one row for each random seed. Rows never mix. So S models train together,
# which is faster than one after another. The model is not told t. Once the visible tokens are
# known, t says nothing more about the hidden ones (RADD, arXiv 2406.03736).


@dataclass
class GPTConfig:
    vocab_size: int  # tokens to predict, ids 0 ... vocab_size - 1; the mask token has id vocab_size
    block_size: int  # prompt + response
    n_layer: int = 2
    n_head: int = 4
    n_embd: int = 64
    causal: bool = False  # the ONLY difference between an ARM's network (True) and an MDM's


def normal_parameter(generators, *shape, std=0.02):
    """A parameter (S, *shape). Each seed's row comes from the seed's own generator."""
    return nn.Parameter(std * torch.stack([torch.randn(shape, generator=g) for g in generators]))


class SeedLinear(nn.Module):
    """S linear layers, (S, ..., n_in) -> (S, ..., n_out), as one batched matrix product."""

    def __init__(self, generators, n_in, n_out, std=0.02):
        super().__init__()
        self.weight = normal_parameter(generators, n_in, n_out, std=std)
        self.bias = nn.Parameter(torch.zeros(len(generators), 1, n_out))

    def forward(self, x):
        return torch.baddbmm(self.bias, x.flatten(1, -2), self.weight).view(*x.shape[:-1], -1)


class SeedLayerNorm(nn.Module):
    def __init__(self, S, n_embd):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(S, 1, 1, n_embd))
        self.bias = nn.Parameter(torch.zeros(S, 1, 1, n_embd))

    def forward(self, x):
        return torch.addcmul(self.bias, F.layer_norm(x, x.shape[-1:]), self.weight)


def rotate_and_norm(x, cos, sin):
    """Rotary positions, then QK-norm, of x (..., T, n_head, head size). Entry j of the first half
    and entry j of the second are a point (x1, x2) of a plane. It turns by an angle that grows with
    the position: (x1 cos - x2 sin, x2 cos + x1 sin). The argument sin (T, 1, head size) holds the
    signs: -sin in its first half, +sin in its second."""
    swapped = x.roll(x.shape[-1] // 2, dims=-1)  # (x2, x1)
    return F.rms_norm(x * cos + swapped * sin, x.shape[-1:])


class Block(nn.Module):
    def __init__(self, generators, config):
        super().__init__()
        S = len(generators)
        width = config.n_embd
        self.n_head = config.n_head
        residual_std = 0.02 / math.sqrt(2 * config.n_layer)  # as in GPT-2
        self.ln_1 = SeedLayerNorm(S, width)
        self.query = SeedLinear(generators, width, width)
        self.key_value = SeedLinear(generators, width, 2 * width)
        self.attn_proj = SeedLinear(generators, width, width, residual_std)
        self.ln_2 = SeedLayerNorm(S, width)
        self.mlp_fc = SeedLinear(generators, width, 4 * width)
        self.mlp_proj = SeedLinear(generators, 4 * width, width, residual_std)

    def forward(self, x, cos, sin, pos, **causality):
        """(S, B, T, n_embd) -> (S, B, len(pos), n_embd): only the positions in pos go on. pos is a
        tensor, or slice(None) for all. causality, is_causal or attn_mask, hides an ARM's future."""
        S, B, T, width = x.shape
        head_size = width // self.n_head
        h = self.ln_1(x)
        q = self.query(h[:, :, pos]).view(S * B, -1, self.n_head, head_size)
        k, v = self.key_value(h).view(S * B, T, 2, self.n_head, head_size).unbind(2)
        q = rotate_and_norm(q, cos[pos], sin[pos])
        k = rotate_and_norm(k, cos, sin)
        q, k, v = (z.transpose(1, 2) for z in (q, k, v))  # heads before positions
        y = F.scaled_dot_product_attention(q, k, v, **causality)
        x = x[:, :, pos] + self.attn_proj(y.transpose(1, 2).reshape(S, B, -1, width))
        return x + self.mlp_proj(F.gelu(self.mlp_fc(self.ln_2(x))))


class GPT(nn.Module):
    """S transformers. generators: one torch.Generator on the CPU for the weights of each. The
    embedding knows the mask token. The head cannot predict it."""

    def __init__(self, config, generators):
        super().__init__()
        V, T, width = config.vocab_size, config.block_size, config.n_embd
        self.config = config
        self.wte = normal_parameter(generators, V + 1, width)  # token embedding, mask token last
        # Positions are learned AND rotary. Learned ones help on sums, where every digit has a fixed
        # place. Rotary ones are needed for text. Their base is only 100: sequences are short.
        self.wpe = normal_parameter(generators, T, width)
        half = width // config.n_head // 2
        frequency = 100.0 ** -(torch.arange(half) / half)
        angle = torch.arange(T).view(T, 1, 1) * frequency
        sin = torch.cat([-angle.sin(), angle.sin()], dim=-1)
        self.register_buffer("cos", angle.cos().repeat(1, 1, 2), persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self.blocks = nn.ModuleList(Block(generators, config) for _ in range(config.n_layer))
        self.ln_f = SeedLayerNorm(len(generators), width)
        self.head = SeedLinear(generators, width, V)

    def forward(self, idx, pos):
        """idx (S, B, T) token ids, pos (n,) positions -> logits (S, B, n, V). To save time, the
        last block computes only the positions in pos."""
        S, _, T = idx.shape
        # Seed s finds its tokens from row s * (V + 1) on.
        first_row = torch.arange(S, device=idx.device).view(S, 1, 1) * self.wte.shape[1]
        x = F.embedding(idx + first_row, self.wte.flatten(0, 1)) + self.wpe[:, None, :T]
        rotary = (self.cos[:T], self.sin[:T])
        for block in self.blocks[:-1]:
            x = block(x, *rotary, slice(None), is_causal=self.config.causal)
        past = torch.arange(T, device=pos.device) <= pos[:, None]  # is_causal needs T queries
        x = self.blocks[-1](x, *rotary, pos, attn_mask=past if self.config.causal else None)
        return self.head(self.ln_f(x))


# --------------------------------------------------------------------------------------------------
# 2. The loss. We compute the loss of every response token, and multiply it by the mask, 0 or 1. So
# all shapes are fixed, and the CPU never waits for the GPU to count the hidden tokens.


def token_nll(model, x0, pos, mask=None):
    """-log p of each response token in nats, (S, ..., n), for x0 (S, ..., T). pos (n,): where the
    response is, in all sequences alike.
    MDM: x0_i is predicted from xt, where mask (S, ..., n) bool hides tokens. The values at visible
    tokens have no meaning, and the loss multiplies them by 0.
    ARM: x0_i is predicted from the tokens before it, so pos must not hold 0. mask is ignored."""
    target = x0[..., pos]
    if model.config.causal:
        logits = model(x0[..., :-1].flatten(1, -2), pos - 1)
    else:
        xt = x0.clone()
        xt[..., pos] = torch.where(mask, model.config.vocab_size, target)  # the mask token's id
        logits = model(xt.flatten(1, -2), pos)
    nll = F.cross_entropy(logits.flatten(0, -2).float(), target.flatten(), reduction="none")
    return nll.view(target.shape)


def mdm_loss(nll, mask, weight, n=None):
    """Equation (1): nll, mask, weight (..., n) -> (...), in nats per response token. Plain training
    has the weight 1/p, where p is almost t. If the last axis holds other tokens, too, n (...) is
    the length of each response."""
    if n is None:
        return (nll * mask * weight).mean(-1)
    return (nll * mask * weight).sum(-1) / n.clamp(min=1)  # 0 for a sequence without response


EPS = 1e-3  # the smallest p, as in LLaDA


def rate_to_p_mask(t, eps=EPS):
    """p, the probability of hiding a token at the rate t, squeezed into (eps, 1). Without eps the
    variance would be infinite (OURS). At a small t the loss is mostly 0. With probability n t a
    token is hidden, and l = H/(n t). So E[l^2 | t] is n t (H/(n t))^2 = H^2/(n t). Its integral
    over t grows like log(1/eps). The price: L is a mean over p in (eps, 1), not (0, 1)."""
    return (1 - eps) * t + eps


# --------------------------------------------------------------------------------------------------
# 3. A law of noise: how noisy a method is, compared with an ARM. OURS.
#
# Let W_i be the weight of token i in a step, or its mean weight if the step has two masks. In the
# example W = 2 0 2 0. An ARM has W = 1 1 1 1. An unbiased method has E[W_i] = 1, and the
# spread of W_i around 1 is noise. A step's gradient is 1/n sum_i W_i g_i, where g_i is the gradient
# of token i. Suppose the g_i are uncorrelated, nearly 0 in the mean, and equally strong, whatever
# else is hidden. Then only squares W_i^2 |g_i|^2 are left in the variance. It is proportional to
#
#     E[W_i^2],    which is 1 for an ARM. In the example the tokens' mean is (4+0+4+0)/4 = 2.
#
# So one number describes a method, its noise "in ARMs". If it is 4, a step is as noisy as a step of
# an ARM with a quarter of the batch. You can work it out without a model and without data. For
# example, plain training hides token i with probability p, and then its weight is 1/p. So the mean
# of W^2 is p (1/p)^2 = 1/p at this p. Its mean over p in (EPS, 1) is about ln(1/EPS).
#
#     name        what it is                passes  noise in ARMs            n = 4  n = 13  n = 64
#     mdm         plain training               1    ln(1/EPS)                 6.91    6.91    6.91
#     ppots       section 4, if H = k          1    (numerically)             4.50    5.02    6.05
#                 the same, with fit="grid"    1    (numerically)             3.94    4.39    5.28
#     clipped     section 6; biased            1    ln(.8/.3) / .5            1.96    1.96    1.96
#     exactk      section 7                    1    1 + 1/2 + ... + 1/n       2.08    3.18    4.74
#     sqrtk       section 7                    1    (sum_k k^-1/2)^2 / n      1.94    2.67    3.33
#     mirror      section 5                    2    ln(1/EPS)/2 + ln 2 - 1/2  3.65    3.65    3.65
#     multi2      two masks of the same t      2    ln(1/EPS)/2 + 1/2         3.95    3.95    3.95
#     mdm_batch2  twice the batch              2    ln(1/EPS)/2               3.45    3.45    3.45
#
# The law has limits. A real ARM has other gradients than an MDM. What tokens have in common is left
# out, and with it most of noise B. While a model learns, its tokens are not equally strong. Then a
# method may gain less than the law says, or more. In our tests mirror and multi2 kept to it.

# --------------------------------------------------------------------------------------------------
# 4. P-POTS, the Pareto-optimal t-sampler: draw noisy rates more often, with a smaller weight.
#
# This is importance sampling: draw t from a density q(t), and multiply the loss by 1/q(t). The mean
# stays the same, so P-POTS is unbiased, and noise C stays, too. The variance becomes
# int E[l^2 | t] / q(t) dt - L^2. By Cauchy-Schwarz it is smallest for
#
#     q(t)  ~  sqrt( E[l^2 | t] )            where ~ means "proportional to".                    (4)
#
# So P-POTS lowers the sum of A and B of the loss, though B alone may grow. (The gradient may have
# another best q.) Now and then a pilot, a few forward passes, measures E[l^2 | t]. The paper writes
# it as mean^2 + variance of l. But in the paper's pilot, l is a mean over x0 already. So the
# variance from one sequence to the next is left out.
#
# OURS: the pilot needs no grid of rates. All masks of k tokens are equally likely, whatever t is.
# So it is enough to measure E[H^2 | k]. At a given rate, k has the binomial law Bin(k; n, p):
#
#     E[l^2 | t]  =  sum_k Bin(k; n, p) E[H^2 | k] / (n p)^2                                     (5)


def ranks(r):
    """The rank of each entry along the last axis: r = .1 .8 .4 .6 has the ranks 0 3 1 2."""
    return r.argsort(-1).argsort(-1)


def binomial(k, n, p):
    """Bin(k; n, p), the chance of k hidden tokens among n. It is 0 for k > n."""
    return torch.distributions.Binomial(n, p, validate_args=False).log_prob(k).exp()


def pilot_masks(r, response=None):
    """A pilot's masks, with counts spread evenly from 1 to n: r (..., X, n_counts, n) uniform ->
    counts (X, n_counts) and mask (..., X, n_counts, n) bool. response (X, n) bool: only these
    tokens can be hidden."""
    if response is None:
        response = torch.ones(r.shape[-3], r.shape[-1], dtype=torch.bool, device=r.device)
    n = response.sum(-1, keepdim=True).clamp(min=1)
    evenly = torch.linspace(0, 1, r.shape[-2], device=r.device)
    counts = 1 + (evenly * (n - 1)).round().long()
    rank = ranks(r.masked_fill(~response[:, None], 2.0))  # all other tokens get the last ranks
    return counts, (rank < counts[..., None]) & response[:, None]


@torch.no_grad()
def pilot(model, x0, pos, r):
    """Measure H: x0 (S, X, T) and r (S, X, n_counts, n) uniform -> counts (X, n_counts) and
    H (S, X, n_counts) in nats."""
    counts, mask = pilot_masks(r)
    nll = token_nll(model, x0[:, :, None].expand(-1, -1, r.shape[2], -1), pos, mask)
    return counts, (nll * mask).sum(-1)


def second_moment(counts, H, t, n, eps=EPS):
    """Equation (5): E[l^2 | t] at Q rates t (Q,), as (..., Q) float64 on the CPU. counts, H and n
    are a pilot's: (X, n_counts) or (n_counts,); (..., X, n_counts); a number, or (X,) lengths. We
    interpolate E[(H/k)^2 | k], since H/k, the mean loss of a hidden token, changes slowly with k.
    If lengths differ, we compare equal shares k/n, and then take the median length for n."""
    counts = counts.cpu().double()
    lengths = torch.as_tensor(n).cpu().double().view(-1, 1).clamp(min=1)
    share = (counts / lengths).mean(0)  # of hidden tokens, (n_counts,)
    measured = (H.detach().cpu().double() / counts).square().mean(-2)  # E[(H/k)^2 | k]
    n = int(lengths.median())
    k = torch.arange(1, n + 1).double()
    # Straight lines between the counts that were measured lead to every k.
    every_k = np.apply_along_axis(lambda y: np.interp(k / n, share, y), -1, measured.numpy())
    p = rate_to_p_mask(t.cpu().double(), eps)[:, None]
    factor = k / (n * p)  # l is factor times H/k
    curve = torch.tensor(every_k) @ (binomial(k, n, p) * factor.square()).T
    return curve.clamp(min=1e-60)  # a perfect model has H = 0, and a density must not vanish


def epr(theta, t):
    """EPR, the paper's formula for (4): theta (..., 6), t (Q,) -> log q(t) + constant."""
    a, b, d, c1, c2, c3 = F.softplus(theta).unsqueeze(-1).unbind(-2)
    variance = a * t ** (1 + c1) + b * (1 - t) ** (1 + c2)  # of l, given t
    mean = torch.exp(d * t ** (1 + c3))
    return 0.5 * torch.log(variance + mean.square())


@torch.inference_mode(False)  # fitting needs gradients, whatever mode the caller is in
def fit_epr(t, density, n_starts=20, n_steps=200):
    """Fit EPR to a density (..., Q) at t (Q,): the theta (..., 6) of the least KL(density || q), in
    the best of n_starts random starts. The paper uses L-BFGS. Adam fits each row as if alone."""
    t = t.clone()  # clones are ordinary tensors, even of a caller in inference mode
    target = (density / density.sum(-1, keepdim=True)).clone().unsqueeze(-2)
    theta = 2 * torch.randn(n_starts, 6, generator=torch.Generator().manual_seed(0)).to(target)
    theta = theta.expand(*density.shape[:-1], -1, -1).clone().requires_grad_()
    optimizer = torch.optim.Adam([theta], betas=(0.9, 0.99))
    for step in range(n_steps):
        optimizer.param_groups[0]["lr"] = 0.2 * (1 - step / n_steps)
        kl = -(target * epr(theta, t).log_softmax(-1)).sum(-1)  # up to a constant, (..., n_starts)
        optimizer.zero_grad()
        kl.sum().backward()
        optimizer.step()
    best = kl.argmin(-1)[..., None, None]
    return theta.detach().take_along_dim(best, -2).squeeze(-2)


# Near t = 0, E[l^2 | t] grows like 1/t (section 2), and (4) like 1/sqrt(t). The density of
# s = sqrt(t) is flat there. So we cut s, not t, into N_CELLS equal cells from 0 to 1. A table holds
# the probability, or mass, of each. In a cell the density of s is mass * N_CELLS. The density of t
# is q(t) = mass * N_CELLS / (2 s), because ds/dt = 1/(2 s). We draw from this very q and divide by
# it. So a rough fit biases nothing.
N_CELLS = 128
CELLS = ((torch.arange(N_CELLS).double() + 0.5) / N_CELLS).square()  # t at the middle of each cell
N_COUNTS = 16  # counts k that a pilot of train.py tries, or all of them if n is smaller


def ppots_table(counts, H, n, fit="epr", eps=EPS):
    """From a pilot to the density (4), as the probability of each cell, (..., N_CELLS).
    counts, H and n are those of second_moment. fit="epr" goes through the paper's family, and
    fit="grid" takes the curve as measured. Raises ValueError if H is not finite."""
    if not torch.isfinite(H).all():
        raise ValueError("H is not finite: the model has diverged, or its logits overflow")
    t = CELLS if fit == "grid" else torch.arange(1, 64).double() / 64
    density = second_moment(counts, H, t, n, eps).sqrt()
    if fit == "epr":
        density = epr(fit_epr(t, density), CELLS).softmax(-1)  # exp() alone could overflow
    mass = density * CELLS.sqrt()  # up to a constant: a cell is 2 sqrt(t) / N_CELLS wide in t
    mass = mass.clamp(min=1e-3 * mass.amax(-1, keepdim=True))  # every rate must be possible
    mass = mass / mass.sum(-1, keepdim=True)
    return mass.to(H.device, torch.promote_types(H.dtype, torch.float32))


def ppots_sample(u, table):
    """Invert the CDF: u (..., B) in (0,1] and table (..., N_CELLS) -> t and its weight 1/q(t)."""
    table = table.expand(*u.shape[:-1], -1)
    cdf = table.cumsum(-1)  # at the right end of each cell
    cell = torch.searchsorted(cdf, u.contiguous()).clamp(max=N_CELLS - 1)
    mass = table.gather(-1, cell)
    above = (cdf.gather(-1, cell) - u) / mass  # the part of the cell above u
    s = (cell + 1 - above.clamp(0, 1)) / N_CELLS
    return s.square(), 2 * s / (mass * N_CELLS)


# --------------------------------------------------------------------------------------------------
# 5. MIRROR: two masks as different as they can be, by the old trick of antithetic random numbers,
# r and 1 - r. It lowers noise A, and is unbiased.


def mirror(r):
    """The random numbers r (M, ..., n) and their mirror images: (2M, ..., n).

    In the example r = .1 .8 .4 .6 hides tokens 1 and 3 at t = .5. The mirror image 1 - r is
    .9 .2 .6 .4, and hides tokens 2 and 4. Together they hide every token once: W = 1 1 1 1, as for
    an ARM. For t < 1/2 a token is hidden at most once, for t > 1/2 at least once.

    A becomes A (1 + rho) / 2, where rho is the correlation of the two losses, given x0 and t. If
    hiding one more token never lowers H, rho is at most 0. MIRROR costs two passes, as the paper
    concedes. So do its controls: two independent masks (multi2, the paper's MultiSample-2), twice
    the batch (batch2) and twice the steps (steps2). Twice the batch, of fresh data, leaves
    (A + B + C) / 2. So MIRROR beats it only if -rho A > B + C."""
    return torch.cat([r, 1 - r])


# --------------------------------------------------------------------------------------------------
# 6. Three more methods of the paper (SyRM, the sixth, is in train.py), and its baseline.


def stratify(u):
    """StraTS: cut (0,1] into equal strata, and move equally many u (..., B) into each. It lowers
    noise B. It is unbiased: sequences come in random order, so each finds a random stratum."""
    strata = n_strata(u.shape[-1])
    stratum = torch.arange(u.shape[-1], device=u.device) % strata
    return (stratum + u) / strata


def n_strata(batch_size):
    """The paper takes sqrt(B) strata. We take the largest divisor of B that is at most sqrt(B)."""
    return max(d for d in range(1, math.isqrt(batch_size) + 1) if batch_size % d == 0)


def isad(p, weight, is_rare, delta=0.2):
    """ISAD: hide rare tokens with a higher probability, min(p + delta, 1), and a lower weight.
    p, weight (..., B, 1), is_rare (..., B, n) bool -> p, weight (..., B, n). It lowers noise A of
    rare tokens. It is BIASED: all tokens now see fewer rare tokens around them (OURS)."""
    higher = torch.where(is_rare, (p + delta).clamp(max=1), p)
    return higher, weight * p / higher


def ema_baseline(loss, u, ema, step=0.01):
    """EMA: cut the u into bins, and keep a running mean of the loss in each. Subtract it from each
    loss of the bin, and add the mean over all bins. loss, u (S, B) and ema (S, bins) -> a
    steadier loss (S, B), and the new ema. The running mean has no gradient, so the GRADIENT is the
    same to the bit: EMA trains like plain training."""
    bins = ema.shape[-1]
    bin_of = ((u * bins).ceil().long() - 1).clamp(0, bins - 1)
    steady = loss - ema.gather(-1, bin_of) + ema.mean(-1, keepdim=True)
    with torch.no_grad():
        count = torch.zeros_like(ema).scatter_add(-1, bin_of, torch.ones_like(loss))
        mean = torch.zeros_like(ema).scatter_add(-1, bin_of, loss) / count.clamp(min=1)
        return steady, torch.where(count > 0, ema + step * (mean - ema), ema)


def clipped(u, low=0.3, high=0.8):
    """Clipped rates: t ~ U[low, high] (Arriola, arXiv 2503.09573), the paper's baseline. No rate
    is small, so no weight is large. It lowers noise A. BIASED: the bound (2) needs all rates."""
    return low + (high - low) * u


# --------------------------------------------------------------------------------------------------
# 7. By count: hide exactly k tokens.
#
# At t = .3 the example hides token 1 only: k = 1. Plain training divides H by n t = 1.2. At t = .2
# the mask and its H are the same, but n t is 0.8. This spread only adds noise. The best weight is
# the mean of 1/t given k (Rao-Blackwell). It is (n + 1)/k, because t given k is Beta(k+1, n-k+1).
#
# At t = .05 the example hides nothing. Plain training draws such an empty mask once in n + 1 times.
# If we never draw it, all others come (n + 1)/n times as often. So their weight falls to n/k: in
# the example W = 4 0 0 0. And k need not be uniform. So a by-count method draws k from 1 ... n with
# the probability P(k), and hides k random tokens. Each has the weight 1/(k P(k)). For P(k) = 1/n
# this is n/k again. This is exactly unbiased, and needs no EPS:
#
#     exactk          P(k) = 1/n            (RADD, arXiv 2406.03736; LLaDA's evaluation)
#     sqrtk           P(k) ~ 1/sqrt(k)      OURS: of all P(k), the smallest E[W^2]
#     ppots_exactk    P(k) ~ integral of q(t) Bin(k; n, t), the counts that P-POTS hides. OURS
#     clipped_exactk  the counts and mean weights of clipped rates, and as BIASED. OURS
#
# By section 3 exactk gains nothing at n = 560, where 1 + 1/2 + ... + 1/n is 6.9, too. For longer
# responses it loses. The noise of sqrtk never passes 4 ARMs.


def count_law(words, n, n_max, table=None):
    """P(k) and the weight of k = 1 ... n_max, both (..., B or 1, n_max), for responses of
    n (..., B or 1) tokens. words: the method (section 8). ppots needs a table (..., N_CELLS)."""
    k = torch.arange(1, n_max + 1, dtype=n.dtype, device=n.device)
    middle = (torch.arange(N_CELLS, dtype=n.dtype, device=n.device) + 0.5) / N_CELLS  # of cells
    chance = torch.ones_like(k)
    integral = 1 / k  # of Bin(k; n, t) / t over all rates; the weight of k is integral / P(k)
    if "sqrtk" in words:
        chance = k**-0.5
    if "ppots" in words:  # middle is sqrt(t)
        given_t = binomial(k, n[..., None, None], middle.square()[:, None])
        chance = (table[..., None, None, :].to(n) @ given_t).squeeze(-2)
    if "clipped" in words:  # middle is u
        t = clipped(middle)[:, None]
        given_t = binomial(k, n[..., None, None], t)
        chance = given_t.mean(-2)
        integral = (given_t / t).mean(-2)
    chance = torch.where(k <= n[..., None], chance, 0.0)
    chance = chance / chance.sum(-1, keepdim=True)
    return chance, integral / chance.clamp(min=1e-30)


# --------------------------------------------------------------------------------------------------
# 8. A method is a set of words. "ppots_mirror" is {"ppots", "mirror"}; "mdm" is the empty set.
#
# A METHOD OF YOUR OWN goes here: a word without _ or capitals, described in MASKING, and an
# `if` where it belongs: in draw_masks for u, r or the mask, in draw_rates for p and the weight, in
# work() if it draws two masks. Then train.py, its --help and sample.py know it. A word without an
# `if` changes nothing. On a GPU these lines are recorded once and repeated. So never ask a tensor
# for its value there, as .item() does, and make no tensor from a Python list.

MASKING = {  # words that change the masks or their weights
    "ppots": "t from the density of least variance, measured by a pilot",
    "clipped": "t ~ U[0.3, 0.8]; BIASED",
    "exactk": "exactly k hidden tokens, k uniform; with ppots or clipped, k from their rates",
    "sqrtk": "exactly k hidden tokens, P(k) ~ 1/sqrt(k)",
    "isad": "rare tokens hidden more often; BIASED",
    "strats": "stratified rates over the batch",
    "mirror": "two negatively correlated masks; two passes",
    "multi2": "a control: two independent masks; two passes",
}
TRAINING = {  # words that change the training loop, so train.py does them
    "arm": "the autoregressive model",
    "syrm": "symbols of the prompt are hidden and asked for, too; BIASED",
    "ema": "a steadier reported loss, the same training",
    "batch2": "a control: twice the batch; two passes",
    "steps2": "a control: twice the steps; two passes",
}
BY_COUNT = {"exactk", "sqrtk"}
Work = namedtuple("Work", "masks batch steps passes")
AT_MOST_ONE_OF = ["ppots clipped sqrtk", "exactk sqrtk isad", "mirror multi2", "batch2 steps2"]


def parse_method(name):
    """A method's words: "ppots_mirror" -> frozenset({"ppots", "mirror"}), "mdm" -> frozenset().
    name may be a set of words, too. Raises ValueError if the words make no sense."""
    parts = name
    if isinstance(name, str):  # some spell it pposts
        parts = name.strip().lower().replace("pposts", "ppots").split("_")
    words = frozenset(parts) - {"mdm"}
    known = {**MASKING, **TRAINING}
    if not words <= known.keys() or len(parts) > len(set(parts)):
        raise ValueError(f"unknown method '{name}': join words of mdm {' '.join(known)} by _")
    for group in AT_MOST_ONE_OF:
        if len(words & set(group.split())) > 1:
            raise ValueError(f"method '{name}': choose one of {group}")
    if "arm" in words and not set(parts) <= {"arm", "batch2", "steps2"}:
        raise ValueError(f"method '{name}': an arm has no masks; add only batch2 or steps2")
    return words


def work(words):
    """The work of a method, in multiples of plain training's."""
    masks = 2 if words & {"mirror", "multi2"} else 1
    batch = 2 if "batch2" in words else 1
    steps = 2 if "steps2" in words else 1
    return Work(masks, batch, steps, passes=masks * batch * steps)


def draw_rates(words, u, n, n_max, table=None, eps=EPS):
    """From u (..., B) in (0,1]: p, and the weight of a hidden token, both (..., B). By-count
    methods have p = k/n. n (..., B or 1) is the length of the responses, n_max the largest."""
    if words & BY_COUNT:
        chance, weight = count_law(words, n, n_max, table)
        k = 1 + (u[..., None] > chance.cumsum(-1)).sum(-1)  # invert the CDF
        k = torch.minimum(k, n.long())  # rounding may leave the last CDF value a little below u
        weight = weight.expand(*k.shape, -1).gather(-1, k[..., None] - 1)
        return k / n, weight.squeeze(-1)
    if "ppots" in words:
        t, importance = ppots_sample(u, table)
        p = rate_to_p_mask(t, eps)
        return p, importance / p
    p = clipped(u) if "clipped" in words else rate_to_p_mask(u, eps)
    return p, 1 / p


def draw_masks(method, u, r, *, table=None, eps=EPS, is_rare=None, response=None):
    """A method's masks, bool, and weights, both (M, ..., B, n): all that the loss needs.

    method     a name or a set of words; only words of MASKING
    u          (..., B) uniform in (0,1], as 1 - torch.rand() gives it: it sets the rate
    r          (..., B, n) uniform, for multi2 (2, ..., B, n): it picks the hidden tokens
    table      ppots: a table (..., N_CELLS) of ppots_table
    is_rare    isad: (..., B, n) bool, the rare tokens
    response   (..., B, n) bool: only these tokens can be hidden, if sequences have other tokens,
               too. Then give response.sum(-1) to mdm_loss.
    Raises ValueError if arguments do not fit."""
    words = parse_method(method)
    check_arguments(words, u, r, table, is_rare, response)
    n_max = r.shape[-1]
    n = u.new_full((1,), n_max)
    if response is not None:
        n = response.sum(-1).clamp(min=1).to(u)
        r = r.masked_fill(~response, 2.0)  # above every p, and last in rank
    if "strats" in words:
        u = stratify(u)
    p, weight = draw_rates(words, u, n, n_max, table, eps)
    p, weight, n = p[..., None], weight[..., None], n[..., None]  # an axis for the tokens
    if "isad" in words:
        p, weight = isad(p, weight, is_rare)
    if words & BY_COUNT:
        r = (ranks(r) + 0.5) / n  # exactly k of the new r are below p = k/n
    if "multi2" not in words:
        r = r[None]
    if "mirror" in words:
        r = mirror(r)
    mask = r < p
    if response is not None:
        mask = mask & response  # the mirror image of 2.0 is below p
    return mask, weight.expand(mask.shape)


def check_arguments(words, u, r, table, is_rare, response):
    """Raise a ValueError of one line if an argument of draw_masks is missing or wrong."""
    if not words <= MASKING.keys():
        raise ValueError(f"draw_masks knows only {' '.join(MASKING)}; a training loop knows more")
    if "ppots" in words and table is None:
        raise ValueError("ppots needs a table: see ppots_table")
    if "isad" in words and is_rare is None:
        raise ValueError("isad needs is_rare: a bool for each token")
    tokens = (*u.shape, r.shape[-1])
    r_shape = (2, *tokens) if "multi2" in words else tokens
    wanted = [("r", r, r_shape), ("is_rare", is_rare, tokens), ("response", response, tokens)]
    for name, given, shape in wanted:
        if given is not None and given.shape != shape:
            raise ValueError(f"{name} has the shape {tuple(given.shape)}, not {shape}")


def method_loss(model, x0, pos, mask, weight):
    """x0 (S, B, T), pos (n,), mask, weight (M, S, B, n) -> (S, B), the mean loss over the masks."""
    mask = mask.transpose(0, 1)  # (S, M, B, n): seeds lead, and all masks are one batch
    weight = weight.transpose(0, 1)
    x0 = x0[:, None].expand(-1, mask.shape[1], -1, -1)
    return mdm_loss(token_nll(model, x0, pos, mask), mask, weight).mean(1)


# --------------------------------------------------------------------------------------------------
# 9. The noise of a method, predicted by section 3, and measured exactly.


def noise_in_arms(method, n, table=None, eps=EPS):
    """Section 3's number E[W_i^2] for n response tokens, from draw_masks itself. Not for isad."""
    words = parse_method(method) - {"strats"}  # strata change B, and the law knows no B
    draw = torch.Generator().manual_seed(0)
    # Small u have the large weights. So u = v^4 with a uniform v, and du = 4 v^3 dv.
    rows = math.ceil(4096 / n)  # draws in each of 256 cells of v
    v = (torch.arange(256)[:, None] + torch.rand(256, rows, generator=draw)).double() / 256
    # Small r matter most, too. So the r of a cell are evenly spread, in random order.
    r = torch.rand(work(words).masks, 256, rows * n, generator=draw).double()
    r = (ranks(r) + torch.rand(r.shape, generator=draw)) / (rows * n)
    r = r.view(-1, 256, rows, n)
    mask, weight = draw_masks(words, v**4, r if "multi2" in words else r[0], table=table, eps=eps)
    W = (mask * weight).mean(0)
    return (4 * v**3 * W.square().mean(-1)).mean().item()


# Now equation (3), for the gradient of a given model. A response of n tokens has only N = 2^n
# masks, and we list them all. Let G_m be the gradient of H under mask m. A step that draws m has
# the gradient G = c G_m, where c is weight/n. (With two masks, G is the mean of the two.)
#
# The square of a mean is the mean product of two independent draws. So take two steps, G and G',
# that share less and less. Each line takes one kind of noise out of E <G, G'>:
#
#     two steps share          E <G, G'> is |E G|^2 plus    in the code
#     all, so that G = G'      C, B and A                   same_step * K
#     the data and the rate    C and B                      same_rate * K
#     the data                 C                            same_data * K
#     nothing                  nothing                      same_data * K_mean
#
# Each line is a sum over pairs of masks m, m'. A pair adds K_mm' = E_{x0} <G_m, G_m'> times the
# mean of c c', where c c' counts as 0 unless G draws m and G' draws m'. (They factor: masks are
# drawn without the data.) In the last line K_mean_mm' = <E_{x0} G_m, E_{x0} G_m'> replaces K_mm'.


def sample_gradients(model, x0, pos, mask, weight):
    """Loss (N,) and gradient (N, n_params) of each of N samples x0 (N, T), mask and weight (N, n).
    The model's first seed is copied N times along the seed axis, and each copy gets one sample."""
    copies = copy.deepcopy(model)
    for parameter in copies.parameters():
        parameter.data = parameter.data[:1].repeat_interleave(len(x0), 0)
    loss = method_loss(copies, x0[:, None], pos, mask[None, :, None], weight[None, :, None])[:, 0]
    gradient = torch.autograd.grad(loss.sum(), list(copies.parameters()))
    return loss.detach(), torch.cat([g.flatten(1) for g in gradient], 1)


def all_masks(n):
    """All 2^n masks (2^n, n), bool: row j holds the binary digits of j."""
    digits = (torch.arange(2**n)[:, None] >> torch.arange(n)) & 1
    return digits.bool()


def grams(model, x0, pos):
    """The Gram matrices K and K_mean, (N, N) float64. x0 (X, T) counts as the whole data set. For
    an ARM N = 1, and G is the gradient of its loss."""
    n = len(pos)
    masks = all_masks(n).to(x0.device)
    weights = torch.full(masks.shape, float(n), device=x0.device)  # so that the loss is H
    if model.config.causal:
        masks = masks[-1:]
        weights = weights[-1:] / n
    K = 0.0
    G_mean = 0.0
    for x in x0:
        _, G = sample_gradients(model, x.expand(len(masks), -1), pos, masks, weights)
        G = G.cpu().double()
        K = K + G @ G.T / len(x0)
        G_mean = G_mean + G / len(x0)
    return K, G_mean @ G_mean.T


def mirror_law(words, p, n):
    """P(m, m') (N, N), the chance of mask m and its mirror image m' at the rate p."""
    one = min(p, 1 - p)  # the chance that m hides a token and m' does not: r < p and r <= 1 - p
    token = [[max(1 - 2 * p, 0), one], [one, max(2 * p - 1, 0)]]  # for a single token
    law = torch.ones(1, 1).double()
    for _ in range(n):  # tokens are independent
        law = torch.kron(law, torch.tensor(token, dtype=law.dtype))
    if words & BY_COUNT:  # keep the pairs of n p tokens each: all of these are equally likely
        right = all_masks(n).sum(1) == round(n * p)
        law = law * right * right[:, None]
    return law / law.sum()


EXACT = {"arm", "ppots", "clipped", "mirror", "multi2"} | BY_COUNT  # words whose P(m, m') is known


def exact_variance(method, K_pair, n, table=None, eps=EPS):
    """{"A", "B", "C", "total"} of the gradient, per sequence, from a pair of grams(). A pair with
    products of H, in place of those of G, gives the noise of the loss. table (N_CELLS,).
    Raises ValueError for words outside EXACT."""
    words = parse_method(method)
    if not words <= EXACT:
        raise ValueError(f"exact_variance knows only {' '.join(sorted(EXACT))}")
    K, K_mean = K_pair
    if "arm" in words:
        C = (K - K_mean).item()
        return {"A": 0.0, "B": 0.0, "C": C, "total": C}

    # The integral over u: cells are narrow where 1/p is steep, and end where p or the weight jumps.
    length = torch.tensor([float(n)]).double()
    edges = torch.linspace(0, 1, 401).double() ** 4
    if words & BY_COUNT:
        chance, _ = count_law(words, length, n, table)
        edges = torch.cat([edges, chance[0].cumsum(-1)])
    elif "ppots" in words:
        edges = torch.cat([edges, table.double().cumsum(-1)])
    edges = edges.clamp(max=1).unique()
    p, weight = draw_rates(words, (edges[1:] + edges[:-1]) / 2, length, n, table, eps)

    same_step = 0.0  # (N, N): the mean of c c' if one step draws both m and m', and 0 if not
    same_rate = 0.0  # (N, N): the same for two steps of one rate
    mean = 0.0  # (N,): the mean of c if a step draws m, and 0 if not
    for du, p_i, c in zip(edges.diff(), p.tolist(), weight / n):
        mirrored = mirror_law(words, p_i, n)
        single = mirrored.sum(1)  # the chance of each mask
        independent = torch.outer(single, single)
        # The chance of a pair in one step. Two masks make four pairs, and two of these are a mask
        # and itself.
        together = torch.diag(single)
        if "mirror" in words:
            together = (together + mirrored) / 2
        if "multi2" in words:
            together = (together + independent) / 2
        same_step += du * c**2 * together
        same_rate += du * c**2 * independent
        mean += du * c * single
    same_data = torch.outer(mean, mean)

    A = ((same_step - same_rate) * K).sum().item()
    B = ((same_rate - same_data) * K).sum().item()
    C = (same_data * (K - K_mean)).sum().item()
    return {"A": A, "B": B, "C": C, "total": A + B + C}


# --------------------------------------------------------------------------------------------------
# 10. Generation: fill in the hidden tokens, a few per step.


@torch.no_grad()
def generate(model, x, pos, steps=None, temperature=0.0, generator=None):
    """Fill in the mask tokens of x (S, B, T) at pos (n,) in n steps, or fewer. Yield x after each.
    A step predicts all hidden tokens, and keeps the surest ones. An ARM goes from left to right,
    one token per step."""
    n = len(pos)
    causal = model.config.causal
    steps = n if causal else min(steps or n, n)
    for step in range(steps):
        logits = model(x[..., :-1], pos - 1) if causal else model(x, pos)
        if temperature > 0:
            chance = (logits / temperature).softmax(-1).flatten(0, -2)
            token = chance.multinomial(1, generator=generator).view(logits.shape[:-1])
        else:
            token = logits.argmax(-1)
        if causal:
            score = -pos.float().expand(token.shape)
        else:
            score = logits.log_softmax(-1).gather(-1, token[..., None]).squeeze(-1)
        hidden = x[..., pos] == model.config.vocab_size
        n_keep = (hidden.sum(-1, keepdim=True) / (steps - step)).ceil()  # an equal share
        best_first = ranks(-score.masked_fill(~hidden, -torch.inf))  # hidden tokens come first
        x = x.clone()
        x[..., pos] = torch.where(best_first < n_keep, token, x[..., pos])
        yield x


# --------------------------------------------------------------------------------------------------
# 11. A demonstration: train a tiny model, then compare the law with its exact gradient variance.

DEMO_METHODS = "mdm ppots mirror ppots_mirror multi2 exactk sqrtk clipped sqrtk_mirror".split()
DEMO_HEAD = """
How noisy is the gradient of this model? Each line is a method; mdm is plain training.
  passes     forward and backward passes per step
  law        the noise that section 3 predicts, in ARMs; for ppots, from this model's losses
  predicted  the same, as a share of plain training's
  measured   the exact variance of the gradient, as a share of plain training's
  A, B, C    its three parts: the pattern, the rate, the data

method       passes         law   predicted    measured           A           B           C"""
DEMO_END = """
Most of plain training's noise is A, and the law predicts the order of the methods.
P-POTS lowers A and pays with some B. Hiding exactly k tokens (exactk, sqrtk) needs one pass. With
four tokens it leaves less noise than MIRROR does with two passes. Noise C stays: only a larger
batch would lower it."""


def demo():
    torch.set_num_threads(1)  # the model is tiny
    draw = torch.Generator().manual_seed(0)
    prompt = torch.randint(10, (512, 4), generator=draw)
    x0 = torch.cat([prompt, prompt.flip(1)], 1)  # the response is the prompt, in reverse order
    pos = torch.arange(4, 8)
    model = GPT(GPTConfig(vocab_size=10, block_size=8, n_embd=32), [draw])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    print("A tiny MDM learns to write four digits in reverse order. (Guessing costs 2.30 nats.)")
    for step in range(61):
        batch = x0[torch.randint(len(x0), (1, 32), generator=draw)]
        u = 1 - torch.rand(1, 32, generator=draw)
        mask, weight = draw_masks("sqrtk", u, torch.rand(1, 32, 4, generator=draw))
        loss = method_loss(model, batch, pos, mask, weight).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 20 == 0:
            print(f"  step {step:3}  loss {loss.item():.2f}")

    pairs = grams(model, x0[:16], pos)
    counts, H = pilot(model, x0[None, :16], pos, torch.rand(1, 16, 4, 4, generator=draw))
    table = ppots_table(counts, H, 4, fit="grid")[0]
    plain_law = noise_in_arms("mdm", 4)
    plain = exact_variance("mdm", pairs, 4)["total"]
    print(DEMO_HEAD)
    for method in DEMO_METHODS:
        law = noise_in_arms(method, 4, table)
        parts = exact_variance(method, pairs, 4, table)
        shares = [law / plain_law, *(parts[name] / plain for name in ("total", "A", "B", "C"))]
        cells = "".join(f"{share:12.0%}" for share in shares)
        print(f"{method:15}{work(parse_method(method)).passes:4}{law:12.2f}{cells}")
    print(DEMO_END)


if __name__ == "__main__":
    demo()
