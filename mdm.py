"""mdm.py - stable training of masked diffusion language models, in one file.

THE STORY. A sequence x0 is a prompt, always visible, and a response of n tokens. A masked diffusion
model (MDM) learns to fill in the response. Each training step draws a masking rate t between 0 and
1, and hides each response token with probability t. The hidden tokens are the mask m, and the
sequence with holes is xt. The loss is a sum over the hidden tokens, divided by n t, because n t
tokens are hidden on average:

    l(x0, t, m) = 1/(n t) * sum_{i in m} -log p(x0_i | xt)                                      (1)
    L           = E_{x0} E_{t ~ U(0,1)} E_m  l(x0, t, m)   >=   -log-likelihood per token       (2)

So (1) is a mean over all n tokens, where a hidden token has the weight 1/t, and a visible one 0.

AN EXAMPLE of four tokens, carried through this file. Every token gets a uniform random number r.
A token is hidden where r is below t. Say t = 0.5:

    r         .1   .8   .4   .6
    hidden    yes  no   yes  no
    weight    2    0    2    0        1/t = 2 for a hidden token

An autoregressive model (ARM) predicts all four tokens in every step, each with weight 1. So an
ARM's loss has one source of noise: the choice of the data. An MDM's loss has three. The law of
total variance separates them:

    Var(l) =  E_{x0,t} Var_m (l)            noise A, the masking pattern: which tokens are hidden
           +  E_{x0} Var_t (E_m l)          noise B, the masking rate
           +  Var_{x0} (E_{t,m} l)          noise C, the data                                   (3)

An ARM has only noise C. The same law holds for the gradient, with the trace of the covariance in
place of the variance.
"Bringing Stability to Diffusion" (arXiv 2511.18159, "the paper" from here on) lowers A and B with
six methods, first of all P-POTS (section 4) and MIRROR (section 5). Section 3 predicts the noise of
a method without a model. `python mdm.py` compares the prediction with the exact variance of a small
model. If you know nanoGPT, skip section 1. Section 9 is for readers who want the proof.

LETTERS  x0, xt    a sequence, and the same sequence with hidden tokens
         t, q(t)   masking rate, and the density it is drawn from
         p_mask    the probability of hiding a token, p for short: t, but at least eps (section 2)
         n, k      tokens in the response, and hidden ones among them
         u, r      uniform random numbers: u gives the rate, r (one per token) gives the mask
         l, L      the loss of a step, and its mean
         H         the sum of -log p over the hidden tokens, so that l = H / (n t)
         S         models trained side by side, one for each random seed
         B, T, V   sequences in a batch, tokens in a sequence, tokens in the vocabulary
         M         masks of each sequence in one step
         X, Q, N   sequences measured, rates on a grid, masks or samples in a list
A method is unbiased if its mean loss is L, apart from the small eps of section 2. OURS marks an
idea found neither in the paper nor, to our knowledge, anywhere else.
"""
import copy
import functools
import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

# --------------------------------------------------------------------------------------------------
# 1. The model: nanoGPT's transformer, with rotary positions and QK-norm.
#
# Every parameter has a leading axis of size S, with one row for each random seed. Rows never mix.
# So S models train together, by batched matrix products, which is faster than one after another.
# The model is not told t, because p(x0_i | xt) does not depend on t (RADD, arXiv 2406.03736).


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
    """S layer norms over the last axis of (S, B, T, n_embd)."""

    def __init__(self, S, n_embd):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(S, 1, 1, n_embd))
        self.bias = nn.Parameter(torch.zeros(S, 1, 1, n_embd))

    def forward(self, x):
        return torch.addcmul(self.bias, F.layer_norm(x, x.shape[-1:]), self.weight)


def rotate_and_norm(x, cos, sin):
    """Rotary positions, then QK-norm. x (..., T, n_head, head size), cos and sin (T, 1, head size).
    Entry j of the first half of x and entry j of the second are a point (x1, x2) of a plane. The
    point turns by an angle: (x1 cos - x2 sin, x2 cos + x1 sin). The argument sin carries the sign:
    -sin in its first half, +sin in its second."""
    other = x.roll(x.shape[-1] // 2, dims=-1)
    return F.rms_norm(x * cos + other * sin, x.shape[-1:])


class Block(nn.Module):
    """Attention and MLP, each on a residual branch."""

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

    def split_heads(self, x):
        """(S, B, T, n_embd) -> (S * B, T, n_head, head size)."""
        return x.flatten(0, 1).unflatten(-1, (self.n_head, -1))

    def forward(self, x, cos, sin, pos, **past_only):
        """Queries come from the positions pos, keys and values from all T positions:
        (S, B, T, n_embd) -> (S, B, len(pos), n_embd). pos is a tensor of positions, or slice(None)
        for every position. past_only tells scaled_dot_product_attention to hide the future."""
        S, B, T, width = x.shape
        h = self.ln_1(x)
        k, v = self.key_value(h).chunk(2, dim=-1)
        k = rotate_and_norm(self.split_heads(k), cos, sin)
        v = self.split_heads(v)
        q = rotate_and_norm(self.split_heads(self.query(h[:, :, pos])), cos[pos], sin[pos])
        q, k, v = (z.transpose(1, 2) for z in (q, k, v))  # heads before positions
        y = F.scaled_dot_product_attention(q, k, v, **past_only)
        y = y.transpose(1, 2).reshape(S, B, -1, width)
        x = x[:, :, pos] + self.attn_proj(y)
        return x + self.mlp_proj(F.gelu(self.mlp_fc(self.ln_2(x))))


class GPT(nn.Module):
    """S transformers, each with a random generator (torch.Generator, on the CPU) for its weights.
    The embedding knows the mask token. The head cannot predict it."""

    def __init__(self, config, generators):
        super().__init__()
        V, T, width = config.vocab_size, config.block_size, config.n_embd
        self.config = config
        self.wte = normal_parameter(generators, V + 1, width)  # token embedding, mask token last
        # Positions are learned AND rotary. Learned ones help on sums, where every digit has a fixed
        # place. Rotary ones are needed for text. Their base is only 100: sequences are short.
        self.wpe = normal_parameter(generators, T, width)
        half = width // config.n_head // 2
        angle = torch.arange(T).view(T, 1, 1) * 100.0 ** -(torch.arange(half) / half)
        self.register_buffer("cos", angle.cos().repeat(1, 1, 2), persistent=False)
        sin = torch.cat([-angle.sin(), angle.sin()], dim=-1)
        self.register_buffer("sin", sin, persistent=False)
        self.register_buffer("past", torch.ones(T, T).tril() > 0, persistent=False)
        self.blocks = nn.ModuleList(Block(generators, config) for _ in range(config.n_layer))
        self.ln_f = SeedLayerNorm(len(generators), width)
        self.head = SeedLinear(generators, width, V)

    def forward(self, idx, pos):
        """idx (S, B, T) token ids, pos (n,) positions -> logits (S, B, n, V) at the positions.
        In the last block only these positions need queries, and that saves time."""
        S, _, T = idx.shape
        # Seed s finds its tokens from row s * (V + 1) on.
        first_row = torch.arange(S, device=idx.device).view(S, 1, 1) * self.wte.shape[1]
        x = F.embedding(idx + first_row, self.wte.flatten(0, 1)) + self.wpe[:, None, :T]
        rotary = (self.cos[:T], self.sin[:T])
        everything = slice(None)
        for block in self.blocks[:-1]:
            x = block(x, *rotary, everything, is_causal=self.config.causal)
        last = {"attn_mask": self.past[pos, :T]} if self.config.causal else {}
        x = self.blocks[-1](x, *rotary, pos, **last)
        return self.head(self.ln_f(x))


# --------------------------------------------------------------------------------------------------
# 2. The loss. We compute the loss of every response token, and multiply it by the mask, 0 or 1. So
# all shapes are fixed, and the CPU never waits for the GPU to count the hidden tokens.


def token_nll(model, x0, pos, mask=None):
    """-log p of each response token in nats, (S, ..., n), for x0 (S, ..., T) and pos (n,).
    MDM: x0_i is predicted from xt, where mask (S, ..., n) bool hides tokens. The values at visible
    tokens have no meaning, and the loss multiplies them by 0.
    ARM: x0_i is predicted from the tokens before it, so pos must not hold 0. mask is ignored."""
    if model.config.causal:
        logits = model(x0[..., :-1].flatten(1, -2), pos - 1)
    else:
        xt = x0.clone()
        xt[..., pos] = torch.where(mask, model.config.vocab_size, x0[..., pos])
        logits = model(xt.flatten(1, -2), pos)
    target = x0[..., pos]
    nll = F.cross_entropy(logits.flatten(0, -2).float(), target.flatten(), reduction="none")
    return nll.view(target.shape)


def mdm_loss(nll, mask, weight, n=None):
    """Equation (1): nll, mask, weight (..., n) -> (...), in nats per response token.
    Plain training has weight 1/p_mask. n (...) is the number of response tokens. It is only needed
    if the last axis holds other tokens as well."""
    if n is None:
        return (nll * mask * weight).mean(-1)
    return (nll * mask * weight).sum(-1) / n.clamp(min=1)  # 0 for a sequence without response


EPS = 1e-3  # the smallest masking probability, as in LLaDA


def rate_to_p_mask(t, eps=EPS):
    """p_mask = (1 - eps) t + eps, the probability of hiding a token (LLaDA).

    OURS: without eps the variance would be infinite. At a small t, one token is hidden with
    probability about n t, and the loss is then l = H/(n t). So E[l^2 | t] is about H^2/(n t), and
    its integral from eps to 1 grows like log(1/eps). The price of eps: L is a mean over p_mask in
    (eps, 1)."""
    return (1 - eps) * t + eps


# --------------------------------------------------------------------------------------------------
# 3. A law of noise: how noisy a method is, compared with an ARM. OURS.
#
# A hidden token has a weight, for example 1/p. A visible token has the weight 0. W_i is the weight
# of token i, averaged over the masks of a step. In the example W = 2 0 2 0. An ARM has W = 1 1 1 1.
# An unbiased method has E[W_i] = 1. The spread of W_i around 1 is noise. Suppose the gradients of
# the tokens are uncorrelated, equally strong, and nearly 0 in the mean. Then the variance of a
# step's gradient is proportional to
#
#     E[W_i^2],    which is 1 for an ARM. In the example the tokens' mean is (4+0+4+0)/4 = 2.
#
# So one number describes a method, "noise in ARMs". If it is 4, a step is as noisy as a step of an
# ARM with a quarter of the batch. The ARM's 1 is noise C, the rest is noise A and B. Working the
# number out takes no model and no data. For example, plain training hides token i with probability
# p, and then has the weight 1/p. So E[W^2 | p] is p (1/p)^2 = 1/p, and the mean of 1/p over p in
# (eps, 1) is about ln(1/eps).
#
#     noise, in ARMs                     formula                          n = 4   n = 13   n = 64
#     ARM                                1                                 1        1        1
#     plain                              ln(1/eps)                         6.91     6.91     6.91
#     P-POTS (section 4)                 none; if tokens' losses are equal 3.94     4.38     5.26
#     MIRROR (section 5), two passes     ln(1/eps)/2 + ln 2 - 1/2          3.65     3.65     3.65
#     two independent masks, two passes  ln(1/eps)/2 + 1/2                 3.95     3.95     3.95
#     twice the batch, two passes        ln(1/eps)/2 (halves C as well)    3.45     3.45     3.45
#     clipped rates (section 6), biased  ln(.8/.3) / .5                    1.96     1.96     1.96
#     exact counts (section 7)           1 + 1/2 + ... + 1/n               2.08     3.18     4.74
#     P(k) ~ 1/sqrt(k) (section 7)       (sum_k k^-1/2)^2 / n              1.94     2.67     3.33
#
# The law has three limits. First, its ARM is an MDM with all weights 1. A real ARM has other
# gradients. Second, it ignores everything that tokens have in common, such as noise B. Third, it
# takes tokens to be equally strong, whatever k. While a model learns, they may be far from it, and
# then the methods with one mask gain less than the law says, or more. MIRROR keeps to the law.


# --------------------------------------------------------------------------------------------------
# 4. P-POTS, the Pareto-optimal t-sampler: draw noisy rates more often, with a smaller weight.
#
# Draw t from a density q(t) and multiply the loss by 1/q(t). The mean stays the same. The variance
# is int E[l^2 | t] / q(t) dt - L^2, and by Cauchy-Schwarz it is smallest for
#
#     q(t)  ~  sqrt( E[l^2 | t] )                                                                (4)
#
# where ~ means "proportional to". (The paper writes E[l^2 | t] as mean^2 + variance.) P-POTS lowers
# noise A and B together, though B alone may grow. It is unbiased. It costs one pass and, now and
# then, a pilot: a few forward passes to measure the loss. It minimises the variance of the loss;
# the variance of the gradient may have its minimum elsewhere.
#
# OURS: the pilot needs no grid of rates. Given the number k of hidden tokens, the mask does not
# depend on t. So the pilot measures E[H^2 | k]. At a given rate k is binomial:
#
#     E[l^2 | t]  =  sum_k Bin(k; n, p) E[H^2 | k] / (n p)^2                                     (5)

N_COUNTS = 16  # counts k that a pilot of train.py tries, or all of them if n is smaller


def ranks(r):
    """The rank, 0 to n-1, of each entry along the last axis. Ranks of uniforms are a random
    permutation: r = .1 .8 .4 .6 has the ranks 0 3 1 2."""
    return r.argsort(-1).argsort(-1)


def pilot_masks(r, response=None):
    """Masks for a pilot: n_counts masks for each of X sequences, with 1 to n hidden tokens.
    r (..., X, n_counts, n) is uniform. response (X, n) bool says which tokens may be hidden; None
    means all. Returns counts (X, n_counts) and mask (..., X, n_counts, n) bool."""
    if response is None:
        response = torch.ones(r.shape[-3], r.shape[-1], dtype=torch.bool, device=r.device)
    n = response.sum(-1, keepdim=True).clamp(min=1)
    share = torch.linspace(0, 1, r.shape[-2], device=r.device)
    counts = 1 + (share * (n - 1)).round().long()
    rank = ranks(r.masked_fill(~response[:, None], 2.0))  # all other tokens get the last ranks
    return counts, (rank < counts[..., None]) & response[:, None]


@torch.no_grad()
def pilot(model, x0, pos, r):
    """Measure H: x0 (S, X, T) and r (S, X, n_counts, n) uniform -> counts (X, n_counts) and
    H (S, X, n_counts) in nats. For each seed X * n_counts sequences go forward."""
    counts, mask = pilot_masks(r)
    nll = token_nll(model, x0[:, :, None].expand(-1, -1, r.shape[2], -1), pos, mask)
    return counts, (nll * mask).sum(-1)


def second_moment(counts, H, t, n, eps=EPS):
    """Equation (5): E[l^2 | t] at the rates t (Q,), as (..., Q) float64 on the CPU, from a pilot's
    counts (n_counts,) or (X, n_counts), H (..., X, n_counts) and n. n is a number, or (X,) if the
    responses differ in length. Then the curve is that of the median length, and the loss of a
    hidden token is taken to depend on k/n only. A rough curve causes no bias, only less of a gain.
    """
    counts = counts.cpu().double()
    lengths = torch.as_tensor(n).cpu().double().view(-1).clamp(min=1)
    n = int(lengths.median())
    share = (counts / lengths[:, None]).mean(0)  # of hidden tokens, (n_counts,)
    mean_square = (H.detach().cpu().double() / counts).square().mean(-2)  # per hidden token
    k = torch.arange(1, n + 1).double()
    every_k = np.apply_along_axis(lambda y: np.interp(k / n, share, y), -1, mean_square.numpy())
    p = rate_to_p_mask(t.cpu().double(), eps)[:, None]
    binomial = torch.distributions.Binomial(n, p).log_prob(k).exp()  # (Q, n)
    weight = k / (n * p)  # l is weight times H/k
    curve = torch.tensor(every_k) @ (binomial * weight.square()).T  # (5), with k^2 E[(H/k)^2 | k]
    return curve.clamp(min=1e-60)  # a perfect model has H = 0, and a density must not vanish


def epr(theta, t):
    """The paper's family of densities, called EPR: theta (..., 6), t (Q,) -> log q(t), (..., Q),
    up to a constant. With a, b, d, c1, c2, c3 = softplus(theta) > 0:

        q(t) ~ sqrt(v(t) + g(t)^2),   v = a t^(1 + c1) + b (1 - t)^(1 + c2),   g = exp(d t^(1 + c3))
    """
    a, b, d, c1, c2, c3 = F.softplus(theta).unsqueeze(-1).unbind(-2)
    v = a * t ** (1 + c1) + b * (1 - t) ** (1 + c2)
    g = torch.exp(d * t ** (1 + c3))
    return 0.5 * torch.log(v + g.square())


@torch.inference_mode(False)  # fitting needs gradients, whatever mode the caller is in
def fit_epr(t, curve, n_starts=20, n_steps=200):
    """Fit EPR to a curve (..., Q) at t (Q,): the theta (..., 6) with the least KL(curve || q).
    As in the paper, we keep the best of n_starts random starts. The paper uses L-BFGS. Adam keeps
    curves and starts apart, so that one seed cannot affect another."""
    t = t.clone()  # clones are ordinary tensors, even of a caller in inference mode
    target = (curve / curve.sum(-1, keepdim=True)).clone().unsqueeze(-2)
    theta = 2 * torch.randn(n_starts, 6, generator=torch.Generator().manual_seed(0)).to(target)
    theta = theta.expand(*curve.shape[:-1], -1, -1).clone().requires_grad_()
    optimizer = torch.optim.Adam([theta], betas=(0.9, 0.99))
    for step in range(n_steps):
        optimizer.param_groups[0]["lr"] = 0.2 * (1 - step / n_steps)
        kl = -(target * epr(theta, t).log_softmax(-1)).sum(-1)  # up to a constant, (..., n_starts)
        optimizer.zero_grad()
        kl.sum().backward()
        optimizer.step()
    best = kl.argmin(-1, keepdim=True)[..., None].expand(*kl.shape[:-1], 1, 6)
    return theta.detach().gather(-2, best).squeeze(-2)


# Near t = 0, (4) grows like t^(-1/2). Such a density is flat in sqrt(t). So we cut sqrt(t), from 0
# to 1, into N_CELLS equal cells, and keep q as a table with the probability, or mass, of each cell.
# Inside a cell sqrt(t) is uniform: q(t) = mass * N_CELLS / (2 sqrt(t)). We draw from this very q.
# So the weight 1/q(t) is exact, even if the fit is rough.
N_CELLS = 128
CELLS = ((torch.arange(N_CELLS).double() + 0.5) / N_CELLS).square()  # t at the middle of each cell


def ppots_table(counts, H, n, fit="epr", eps=EPS):
    """From a pilot to the density (4), as the probability of each cell, (..., N_CELLS).
    counts, H and n are those of second_moment. fit="epr" goes through the paper's family, and
    fit="grid" takes the curve as measured. Raises ValueError if H is not finite."""
    if not torch.isfinite(H).all():
        raise ValueError("H is not finite: the model has diverged, or its logits overflow")
    if fit == "grid":
        density = second_moment(counts, H, CELLS, n, eps).sqrt()
    else:
        t = torch.arange(1, 64).double() / 64
        theta = fit_epr(t, second_moment(counts, H, t, n, eps).sqrt())
        density = epr(theta, CELLS).softmax(-1)  # exp() alone could overflow
    mass = density * CELLS.sqrt()  # up to a constant: a cell is 2 sqrt(t) / N_CELLS wide in t
    mass = mass.clamp(min=1e-3 * mass.amax(-1, keepdim=True))  # every rate must be possible
    mass = mass / mass.sum(-1, keepdim=True)
    return mass.to(H.device, torch.promote_types(H.dtype, torch.float32))


def ppots_sample(u, table):
    """Invert the CDF: u (..., B) in (0,1] and table (..., N_CELLS) -> t and its weight 1/q(t)."""
    table = table.expand(*u.shape[:-1], -1)
    cdf = table.cumsum(-1)
    cell = torch.searchsorted(cdf, u.contiguous()).clamp(max=N_CELLS - 1)
    mass = table.gather(-1, cell)
    right = cdf.gather(-1, cell)  # the CDF at the right end of the cell
    sqrt_t = (cell + 1 - ((right - u) / mass).clamp(0, 1)) / N_CELLS
    return sqrt_t.square(), 2 * sqrt_t / (mass * N_CELLS)


# --------------------------------------------------------------------------------------------------
# 5. MIRROR: two masks as different as they can be. It lowers noise A, takes TWO passes, and is
# unbiased.


def mirror(r):
    """The random numbers r (M, ..., n) and their mirror images: (2M, ..., n).

    In the example r = .1 .8 .4 .6 hides tokens 1 and 3 at t = .5. The mirror image 1 - r is
    .9 .2 .6 .4, and hides tokens 2 and 4. The two masks together hide every token once: W = 1 1 1 1
    as for an ARM. For t <= 1/2 each token is hidden at most once, for t >= 1/2 at least once.

    Each mask alone is an ordinary mask, so the mean of the two losses is unbiased. Noise A becomes
    A (1 + rho) / 2. Here rho is the correlation of the two losses, given x0 and t. It is at most 0
    if hiding one more token never lowers H. Fair controls do twice the work as well (section 8):
    two independent masks (multi2), twice the batch (batch2), twice the steps (steps2)."""
    return torch.cat([r, 1 - r])


# --------------------------------------------------------------------------------------------------
# 6. Three more methods of the paper (SyRM, the sixth, is in train.py), and its baseline.


def stratify(u):
    """StraTS: cut (0,1] into equal strata, and draw equally many u (..., B) in each. It lowers
    noise B, and is unbiased. Sequences come in random order, so it does not matter which of them
    gets which stratum. The paper takes sqrt(B) strata; we take the largest divisor not above.
    """
    B = u.shape[-1]
    strata = n_strata(B)
    return (torch.arange(B, device=u.device) % strata + u) / strata


def n_strata(batch_size):
    return max(d for d in range(1, math.isqrt(batch_size) + 1) if batch_size % d == 0)


def isad(p, is_rare, delta=0.2):
    """ISAD: hide rare tokens with the probability min(p + delta, 1), and use 1 over it as their
    weight. p (..., B, 1), is_rare (..., B, n) bool -> (..., B, n). It lowers their noise A.
    BIASED (OURS): the context of every token now shows fewer rare tokens."""
    return torch.where(is_rare, (p + delta).clamp(max=1), p)


def ema_baseline(loss, u, ema, step=0.01):
    """EMA: subtract from each loss the running mean of its bin of rates, and add the mean over all
    bins. loss, u (S, B) and ema (S, bins) -> a steadier loss (S, B), and the new ema. The running
    mean has no gradient, so the GRADIENT is the same to the bit: EMA trains like plain training."""
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
# At t = .3 the example hides token 1 only: k = 1. Plain training divides H by n t = 1.2. But H
# depends on the mask alone. So the spread of 1/t, for one and the same mask, only adds noise. The
# mean of 1/t given k is (n + 1)/k: the best weight.
#
# At t = .05 the example hides nothing. So does one draw in n + 1, and the factor n + 1 makes up for
# it. Better never draw an empty mask: then the weight is n/k. Its sum over the tokens is n, as for
# an ARM. In the example W = 4 0 0 0.
#
# So a by-count method draws k from a law P(k) on 1 ... n, and hides k random tokens, each with the
# weight 1/(k P(k)). For every P(k) > 0 it is exactly unbiased, and it needs no eps:
#
#     exactk          P(k) = 1/n            (RADD, arXiv 2406.03736; LLaDA's evaluation)
#     sqrtk           P(k) ~ 1/sqrt(k)      OURS: the smallest possible E[W^2]
#     ppots_exactk    P(k) = integral of q(t) Bin(k; n, t), the counts that P-POTS hides. OURS
#
# By the law of section 3, sqrtk has the least noise of all unbiased methods with one mask. It tends
# to 4 ARMs as n grows. The biased clipped_exactk (OURS) draws the counts of clipped rates.


def binomial_law(n, t, k):
    """Bin(k; n, t) for n (..., 1), t (Q,) and k (K,) -> (..., Q, K); 0 where k > n."""
    law = torch.distributions.Binomial(n[..., None], t[:, None], validate_args=False)
    return law.log_prob(k).exp()


def count_law(words, n, n_max, table=None):
    """The law of k = 1 ... n_max for responses of n (..., B or 1) tokens: P(k) and the weight of
    each k, both (..., B or 1, n_max), in n's dtype. words are those of the method's name, such as
    {"sqrtk", "mirror"} (section 8). ppots needs a table (..., N_CELLS)."""
    k = torch.arange(1, n_max + 1, dtype=n.dtype, device=n.device)
    middle = (torch.arange(N_CELLS, dtype=n.dtype, device=n.device) + 0.5) / N_CELLS  # of each cell
    n = n[..., None]
    # The weight of k is the integral of Bin(k; n, t) / t over all t, divided by P(k).
    integral = 1 / k
    if "sqrtk" in words:
        chance = k**-0.5
    elif "ppots" in words:
        binomial = binomial_law(n, middle.square(), k)
        chance = (table[..., None, None, :].to(n) @ binomial).squeeze(-2)
    elif "clipped" in words:
        t = clipped(middle)
        binomial = binomial_law(n, t, k)
        chance = binomial.mean(-2)
        integral = (binomial / t[:, None]).mean(-2)
    else:
        chance = torch.ones_like(integral)
    chance = torch.where(k <= n, chance, 0.0)
    chance = chance / chance.sum(-1, keepdim=True)
    return chance, integral / chance.clamp(min=1e-30)


def draw_count(u, n, chance, weight):
    """Invert the CDF of a law of counts: u (..., B) -> k and its weight, both (..., B)."""
    k = 1 + (u[..., None] > chance.cumsum(-1)).sum(-1)
    k = torch.minimum(k.to(n), n)  # rounding may leave the last CDF value a little below u
    weight = weight.expand(*k.shape, -1).gather(-1, k.long()[..., None] - 1).squeeze(-1)
    return k, weight


# --------------------------------------------------------------------------------------------------
# 8. A method is a set of words. "ppots_mirror" is {"ppots", "mirror"}; "mdm" is the empty set.
#
# A METHOD OF YOUR OWN goes here: a word of small letters with a short description in MASKING, and
# an `if` where it belongs: in draw_masks for u, r or the mask, in draw_rates for p and the weight.
# Then train.py, its --help and sample.py know it. Without an `if` it is plain training.

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
CONFLICTS = ["ppots clipped", "ppots sqrtk", "exactk sqrtk", "clipped sqrtk", "exactk isad",
             "sqrtk isad", "batch2 steps2"]  # fmt: skip


def parse_method(name):
    """A method's words: "ppots_mirror" -> frozenset({"ppots", "mirror"}), "mdm" -> frozenset().
    name may be a set of words, too. Raises ValueError if the words make no sense."""
    if isinstance(name, str):  # some spell it pposts
        words = name.strip().lower().replace("pposts", "ppots").split("_")
    else:
        words = list(name)
    known = ["mdm", *MASKING, *TRAINING]
    if not set(words) <= set(known) or len(words) > len(set(words)):
        raise ValueError(f"unknown method '{name}': join words of {' '.join(known)} by _")
    for pair in CONFLICTS:
        if set(pair.split()) <= set(words):
            raise ValueError(f"method '{name}': choose one of {pair}")
    if "arm" in words and set(words) - {"arm", "batch2", "steps2"}:
        raise ValueError(f"method '{name}': an arm has no masks; add only batch2 or steps2")
    return frozenset(words) - {"mdm"}


def method_name(words):
    """The one spelling of a set of words: {"mirror", "ppots"} -> "ppots_mirror"."""
    ordered = [word for word in [*MASKING, *TRAINING] if word in words]
    if set(words) <= {"batch2", "steps2"}:
        ordered = ["mdm", *ordered]
    return "_".join(ordered)


class Work(NamedTuple):
    """The work of a method in multiples of plain training's: masks, batch size, steps, passes."""

    masks: int
    batch: int
    steps: int
    passes: int


def work(words):
    masks = 1
    for word in ("mirror", "multi2"):
        if word in words:
            masks *= 2
    batch = 2 if "batch2" in words else 1
    steps = 2 if "steps2" in words else 1
    return Work(masks, batch, steps, masks * batch * steps)


def draw_rates(words, u, n, n_max, table=None, eps=EPS):
    """From u (..., B) in (0,1]: p_mask, and the weight of a hidden token, both (..., B). By-count
    methods have p_mask = k/n. n (..., B or 1) is the length of the responses, n_max the largest."""
    if words & BY_COUNT:
        k, weight = draw_count(u, n, *count_law(words, n, n_max, table))
        return k / n, weight
    if "ppots" in words:
        t, importance = ppots_sample(u, table)
        p = rate_to_p_mask(t, eps)
        return p, importance / p
    p = clipped(u) if "clipped" in words else rate_to_p_mask(u, eps)
    return p, 1 / p


def draw_masks(method, u, r, table=None, eps=EPS, is_rare=None, response=None):
    """A method's masks, bool, and weights, both (M, ..., B, n): all that the loss needs.

    method     a name or a set of words; only words of MASKING
    u          (..., B) uniform in (0,1], as 1 - torch.rand() gives it: it sets the rate
    r          (..., B, n) uniform, for multi2 (2, ..., B, n): it picks the hidden tokens
    table      ppots: a table (..., N_CELLS) of ppots_table
    is_rare    isad: (..., B, n) bool, the rare tokens
    response   (..., B, n) bool: only these tokens can be hidden, so that n differs by sequence and
               r is as long as the sequences. Divide the loss by response.sum(-1): see mdm_loss.

    Raises ValueError for a word that belongs to a training loop, and for an argument that is
    missing or has another shape."""
    words = parse_method(method)
    check_arguments(words, u, r, table, is_rare, response)
    n_max = r.shape[-1]
    n = u.new_full((1,), n_max)
    if response is not None:
        n = response.sum(-1).clamp(min=1).to(u)
        r = r.masked_fill(~response, 2.0)  # all other tokens get the last ranks
    if "strats" in words:
        u = stratify(u)
    p, weight = draw_rates(words, u, n, n_max, table, eps)
    p, weight, n = p[..., None], weight[..., None], n[..., None]
    if "isad" in words:
        importance = weight * p
        p = isad(p, is_rare)
        weight = importance / p
    if words & BY_COUNT:
        r = (ranks(r) + 0.5) / n  # exactly k of the new r are below p = k/n
    if "multi2" not in words:
        r = r[None]
    if "mirror" in words:
        r = mirror(r)
    mask = r < p
    if response is not None:
        mask = mask & response
    return mask, weight.expand(mask.shape)


def check_arguments(words, u, r, table, is_rare, response):
    """Raise a ValueError of one line if an argument of draw_masks is missing or wrong."""
    others = words - MASKING.keys()
    if others:
        raise ValueError(f"draw_masks does not know {' '.join(others)}: a training loop does")
    if "ppots" in words and (table is None or table.shape[-1] != N_CELLS):
        raise ValueError("ppots needs a table: measure H on your model, then ppots_table")
    if "isad" in words and is_rare is None:
        raise ValueError("isad needs is_rare: a bool for each token")
    copies = (2,) if "multi2" in words else ()
    if r.shape[:-1] != (*copies, *u.shape):
        raise ValueError(f"r has the shape {tuple(r.shape)}, not {(*copies, *u.shape, 'n')}")
    for name, tokens in [("is_rare", is_rare), ("response", response)]:
        if tokens is not None and tokens.shape != (*u.shape, r.shape[-1]):
            raise ValueError(f"{name} has the shape {tuple(tokens.shape)}, not that of u and r")


def method_loss(model, x0, pos, mask, weight):
    """x0 (S, B, T), pos (n,), mask, weight (M, S, B, n) -> loss (S, B), its mean over the masks."""
    mask = mask.transpose(0, 1)  # (S, M, B, n): seeds lead, and all masks are one batch
    weight = weight.transpose(0, 1)
    x0 = x0[:, None].expand(-1, mask.shape[1], -1, -1)
    return mdm_loss(token_nll(model, x0, pos, mask), mask, weight).mean(1)


def cost_in_arms(method, n, table=None, eps=EPS, n_rates=256):
    """Section 3's number E[W_i^2] for n response tokens, from draw_masks itself. Not for isad.
    The integral over u has n_rates cells, narrow where 1/p is steep, and many random u in each. The
    r of a cell are equally spaced, in random order, because small r are rare and matter most."""
    draw = torch.Generator().manual_seed(0)
    words = parse_method(method) - {"strats"}  # strata change B, and the law knows no B
    edges = torch.linspace(0, 1, n_rates + 1).double() ** 4
    width = edges.diff()[:, None]
    rows = math.ceil(8192 / n)  # of r, for each cell of u
    u = edges[1:, None] - width * torch.rand(n_rates, rows, generator=draw).double()
    spaced = (torch.arange(rows * n).double() + 0.5) / (rows * n)
    spaced = spaced.view(n, rows).T  # each row has one value from each n-th part of (0,1)
    r = []
    for _ in range(2 if "multi2" in words else 1):
        row_order = torch.rand(n_rates, rows, generator=draw).argsort(-1)
        token_order = torch.rand(n_rates, rows, n, generator=draw).argsort(-1)
        r.append(spaced[row_order].gather(-1, token_order))
    mask, weight = draw_masks(words, u, torch.stack(r) if "multi2" in words else r[0], table, eps)
    W = (mask * weight).mean(0)
    return (width * W.square().mean(-1) / rows).sum().item()


# --------------------------------------------------------------------------------------------------
# 9. The variance, measured: equation (3) for the gradient of a given model, exactly.
#
# A response of n tokens has only N = 2^n masks. We list them all. Let G_m be the gradient of H
# under mask m. A step's gradient is the sum over m of c_m G_m. Here c_m is weight/n for the
# mask drawn, and 0 for all others. (With M masks per step, it is the mean of M such numbers.)
#
# Take two steps. The mean product of their gradients, Z, depends on how much the steps share:
#
#     Z0  nothing             sum over m, m' of  E[c_m] E[c_m'] <E_{x0} G_m, E_{x0} G_m'>
#     Z1  the data            sum over m, m' of  E[c_m] E[c_m'] K_mm',   K_mm' = E_{x0} <G_m, G_m'>
#     Z2  the data and t      sum over m, m' of  E_t[ E[c_m|t] E[c_m'|t] ] K_mm'
#     Z3  everything          sum over m, m' of  E[c_m c_m'] K_mm'
#
# The noise of the gradient is A = Z3 - Z2, B = Z2 - Z1 and C = Z1 - Z0.


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
    """All 2^n masks (2^n, n), bool. Row j holds the binary digits of j, the lowest first."""
    return (torch.arange(2**n)[:, None] >> torch.arange(n)) & 1 == 1


def grams(model, x0, pos):
    """K (N, N) as above, and K_mean (N, N), the products of means in Z0, both float64. x0 (X, T)
    counts as the whole data set. For an ARM N = 1, and G is the gradient of its loss."""
    n = len(pos)
    masks = all_masks(n).to(x0.device)
    weights = torch.full(masks.shape, float(n), device=x0.device)  # so that the loss is H
    if model.config.causal:
        masks = masks[-1:]
        weights = torch.ones(1, n, device=x0.device)
    K = 0.0
    G_mean = 0.0
    for x in x0:
        _, G = sample_gradients(model, x.expand(len(masks), -1), pos, masks, weights)
        G = G.cpu().double()
        K = K + G @ G.T / len(x0)
        G_mean = G_mean + G / len(x0)
    return K, G_mean @ G_mean.T


def mask_laws(words, p, n):
    """At the rate p: P(m) (N,) of one mask, and P(m, m') (N, N) of a mask and its mirror image."""
    if words & BY_COUNT:
        k = round(n * p)
        masks = all_masks(n).double()
        one = (masks.sum(1) == k).double()
        overlap = masks @ masks.T
        pair = torch.outer(one, one) * (overlap == max(0, 2 * k - n))  # the least possible
        return one / one.sum(), pair / pair.sum()
    # Tokens are independent, so both laws are Kronecker powers of the law of a single token.
    one = [1 - p, p]
    only_one = min(p, 1 - p)
    pair = [[max(1 - 2 * p, 0), only_one], [only_one, max(2 * p - 1, 0)]]
    one, pair = (torch.tensor(law, dtype=torch.float64) for law in (one, pair))
    return functools.reduce(torch.kron, [one] * n), functools.reduce(torch.kron, [pair] * n)


def exact_variance(method, K_pair, n, table=None, eps=EPS, n_rates=400):
    """{"A", "B", "C", "total"} of the gradient, per sequence, from a pair of grams(). If the pair
    holds products of H, it is the noise of the loss. table (N_CELLS,). Not for isad and strats.
    The integral over u is a midpoint rule, whose cells end where p or k jumps."""
    words = parse_method(method)
    K, K_mean = K_pair
    if "arm" in words:
        C = (K - K_mean).item()
        return {"A": 0.0, "B": 0.0, "C": C, "total": C}
    masks = work(words).masks
    mirrors = 1 if "mirror" in words else 0
    length = torch.tensor([float(n)]).double()
    if words & BY_COUNT:
        edges = [count_law(words, length, n, table)[0][0].cumsum(-1)]
    else:
        edges = [torch.linspace(0, 1, n_rates + 1).double() ** 4]  # narrow where 1/p is steep
        if "ppots" in words:
            edges.append(table.cumsum(-1))
    edges = torch.cat([torch.zeros(1), *edges]).double().clamp(max=1).unique()
    u = (edges[1:] + edges[:-1]) / 2
    p, weight = draw_rates(words, u, length, n, table, eps)

    same_step = torch.zeros(2**n, 2**n).double()  # E[c c']
    same_rate = torch.zeros(2**n, 2**n).double()  # E_t[E[c|t] E[c'|t]]
    mean = torch.zeros(2**n).double()  # E[c]
    for du, p_i, w_i in zip(edges.diff(), p.tolist(), weight / n):
        one, mirrored = mask_laws(words, p_i, n)
        independent = torch.outer(one, one)
        others = mirrors * mirrored + (masks - 1 - mirrors) * independent  # besides mask m itself
        same_step += du * w_i**2 * (torch.diag(one) + others) / masks
        same_rate += du * w_i**2 * independent
        mean += du * w_i * one
    same_data = torch.outer(mean, mean)  # E[c] E[c']

    A = ((same_step - same_rate) * K).sum().item()
    B = ((same_rate - same_data) * K).sum().item()
    C = (same_data * (K - K_mean)).sum().item()
    return {"A": A, "B": B, "C": C, "total": A + B + C}


# --------------------------------------------------------------------------------------------------
# 10. Generation: fill in the hidden tokens, a few per step.


@torch.no_grad()
def generate(model, x, pos, steps=None, temperature=0.0, order="confidence", generator=None):
    """Fill in the mask tokens of x (S, B, T) at pos (n,) in n steps, or fewer. Yield x after each.
    A step predicts all hidden tokens, and keeps some of them: the surest (order="confidence"), the
    leftmost ("left") or random ones ("random"). An ARM goes from left to right, one token per step.
    """
    n = len(pos)
    causal = model.config.causal
    mask_id = model.config.vocab_size
    steps = min(steps or n, n)
    if causal:
        order = "left"
        steps = n
    for step in range(steps):
        logits = model(x[..., :-1], pos - 1) if causal else model(x, pos)
        if temperature > 0:
            p = (logits / temperature).softmax(-1).flatten(0, -2)
            token = p.multinomial(1, generator=generator).view(logits.shape[:-1])
        else:
            token = logits.argmax(-1)
        if order == "left":
            score = -pos.float().expand(token.shape)
        elif order == "random":
            score = torch.rand(token.shape, generator=generator, device=x.device)
        else:
            score = logits.log_softmax(-1).gather(-1, token[..., None]).squeeze(-1)
        hidden = x[..., pos] == mask_id
        n_keep = (hidden.sum(-1, keepdim=True) / (steps - step)).ceil()  # the last step leaves none
        best_first = ranks(-score.masked_fill(~hidden, -torch.inf))
        keep = best_first < n_keep  # hidden tokens come first
        x = x.clone()
        x[..., pos] = torch.where(keep, token, x[..., pos])
        yield x


# --------------------------------------------------------------------------------------------------
# 11. A demonstration: train a tiny model, then compare the law with its exact gradient variance.

DEMO_METHODS = """mdm ppots mirror ppots_mirror multi2 exactk sqrtk clipped exactk_mirror
    sqrtk_mirror""".split()
DEMO_HEAD = """
How noisy is the gradient of this model? Each line is a method.
  passes     forward and backward passes per step
  law        the noise predicted by section 3, in ARMs (for ppots with the density of this model)
  predicted  the same, as a share of plain training's (mdm)
  measured   the exact variance of the gradient over 16 sequences, all rates and all 16 masks, as a
             share of plain training's; then its parts A (pattern), B (rate) and C (data)

method       passes         law   predicted    measured           A           B           C"""
DEMO_END = """
Most of plain training's noise is A, and the law predicts the order of the methods without a model.
P-POTS lowers A and pays with some B. Hiding exactly k tokens (exactk, sqrtk) needs one pass, and
leaves less noise than MIRROR does with two. Noise C stays: only a larger batch would lower it."""


def demo():
    torch.set_num_threads(1)  # the model is tiny
    draw = torch.Generator().manual_seed(0)
    prompt = torch.randint(10, (512, 4), generator=draw)
    x0 = torch.cat([prompt, prompt.flip(1)], 1)  # the response is the prompt, in reverse order
    n = 4
    pos = torch.arange(4, 8)
    model = GPT(GPTConfig(vocab_size=10, block_size=8, n_embd=32), [draw])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    print("A tiny MDM learns to write four digits in reverse order. (Guessing costs 2.30 nats.)")
    for step in range(61):
        batch = x0[torch.randint(len(x0), (1, 32), generator=draw)]
        u = 1 - torch.rand(1, 32, generator=draw)
        r = torch.rand(1, 32, n, generator=draw)
        mask, weight = draw_masks("sqrtk", u, r)
        loss = method_loss(model, batch, pos, mask, weight).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 20 == 0:
            print(f"  step {step:3}  loss {loss.item():.2f}")

    data = x0[:16]
    pairs = grams(model, data, pos)
    counts, H = pilot(model, data[None], pos, torch.rand(1, 16, n, n, generator=draw))
    table = ppots_table(counts, H, n, fit="grid")[0]
    plain_law = cost_in_arms("mdm", n)
    plain = exact_variance("mdm", pairs, n)["total"]
    print(DEMO_HEAD)
    for method in DEMO_METHODS:
        law = cost_in_arms(method, n, table)
        gradient = exact_variance(method, pairs, n, table)
        shares = [law / plain_law, *(gradient[part] / plain for part in ("total", "A", "B", "C"))]
        cells = "".join(f"{share:12.0%}" for share in shares)
        print(f"{method:15}{work(parse_method(method)).passes:4}{law:12.2f}{cells}")
    print(DEMO_END)


if __name__ == "__main__":
    demo()
