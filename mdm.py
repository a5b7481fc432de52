"""mdm.py - stable training of masked diffusion language models, in one file.

THE STORY. A masked diffusion model (MDM) hides tokens and learns to fill them in. To train on a
sequence x0 it draws a masking rate t and hides each of the n response tokens with probability t.
Those hidden are the mask m, what is left to see is xt, and the loss is that of the hidden ones:

    l(x0, t, m) = 1/(n t) * sum_{i in m} -log p(x0_i | xt)                                      (1)
    L           = E_{x0} E_{t ~ U(0,1)} E_m  l(x0, t, m)   >=   -log-likelihood per token       (2)

An autoregressive model (ARM) meets one kind of luck: which data it sees. An MDM is at the mercy
of three, and the law of total variance takes them apart:

    Var(l) =  E_{x0,t} Var_m (l)            A  masking-pattern noise: which tokens were hidden
           +  E_{x0} Var_t (E_m l)          B  masking-rate noise:    at which rate
           +  Var_{x0} (E_{t,m} l)          C  data noise:            all that an ARM has       (3)

The same holds for the gradient, with "variance" read as the trace of the covariance. "Bringing
Stability to Diffusion" (arXiv 2511.18159; "the paper" from here on) lowers A and B with six
methods, above all P-POTS (section 3) and MIRROR (section 4). `python mdm.py` computes (3) exactly
for an untrained model, method by method.

LETTERS  S          models trained side by side, one per random seed
         B, T       sequences in a batch; tokens in a sequence (block_size)
         n, M       tokens that may be masked, the response; masks per sequence (= passes needed)
         t, p       masking rate in (0,1); p_mask, a token's chance to be masked (p(t): t's density)
         u, r       the uniform random numbers that t and the mask m are made from
         k, H       the number of hidden tokens, and their summed loss: l = H/(n t)
         V          vocab_size; in section 7 H or its gradient, and A, B, C are those of (3)
         X, Q, N    how many sequences are measured, rates, samples or masks
A method is unbiased if its mean loss is L (but for eps). OURS: neither the paper's nor cited.
"""
import functools
import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

# --------------------------------------------------------------------------------------------------
# 1. The model: nanoGPT's transformer with rotary positions and an axis S first on every parameter.
# Row s of each parameter belongs to seed s, and rows never meet: S models train as one stream of
# batched matmuls. It is not told t, on which p(x0_i | xt) does not depend (RADD, arXiv 2406.03736).


@dataclass
class GPTConfig:
    vocab_size: int  # tokens that can be predicted; the mask token is one more and has this id
    block_size: int  # prompt + response
    n_layer: int = 2
    n_head: int = 4
    n_embd: int = 64
    causal: bool = False  # the ONLY difference between an ARM's network (True) and an MDM's


def normal(generators, *shape, std=0.02):
    """A parameter (S, *shape), the row of each seed drawn from the seed's own generator."""
    return nn.Parameter(std * torch.stack([torch.randn(shape, generator=g) for g in generators]))


class Linear(nn.Module):
    """S linear layers, (S, ..., n_in) -> (S, ..., n_out), as one batched matmul."""

    def __init__(self, generators, n_in, n_out, std=0.02):
        super().__init__()
        self.weight = normal(generators, n_in, n_out, std=std)
        self.bias = nn.Parameter(torch.zeros(len(generators), 1, n_out))

    def forward(self, x):
        return torch.baddbmm(self.bias, x.flatten(1, -2), self.weight).view(*x.shape[:-1], -1)


class LayerNorm(nn.Module):
    """S layer norms over the last axis of (S, B, T, n_embd)."""

    def __init__(self, S, n_embd):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(S, 1, 1, n_embd))
        self.bias = nn.Parameter(torch.zeros(S, 1, 1, n_embd))

    def forward(self, x):
        return F.layer_norm(x, x.shape[-1:]) * self.weight + self.bias


def rotate(x, rotation):
    """Rotary positions: turn pairs of x (..., T, head size), complex numbers; then QK-norm."""
    turned = torch.view_as_complex(x.unflatten(-1, (-1, 2))) * rotation
    return F.rms_norm(torch.view_as_real(turned).flatten(-2), x.shape[-1:])


class Block(nn.Module):
    """Attention and MLP, each on a residual branch."""

    def __init__(self, generators, config):
        super().__init__()
        S, width = len(generators), config.n_embd
        residual_std = 0.02 / math.sqrt(2 * config.n_layer)  # as in GPT-2
        self.n_head, self.causal = config.n_head, config.causal
        self.ln_1, self.ln_2 = LayerNorm(S, width), LayerNorm(S, width)
        self.query = Linear(generators, width, width)
        self.key_value = Linear(generators, width, 2 * width)
        self.attn_proj = Linear(generators, width, width, residual_std)
        self.mlp_fc = Linear(generators, width, 4 * width)
        self.mlp_proj = Linear(generators, 4 * width, width, residual_std)

    def heads(self, x):
        """(S, B, T, n_embd) -> (S * B, n_head, T, head size)."""
        return x.flatten(0, 1).unflatten(-1, (self.n_head, -1)).transpose(1, 2)

    def forward(self, x, rotation, pos=None):
        """x (S, B, T, n_embd) -> the same, or (S, B, len(pos), n_embd) for the positions pos."""
        S, B, T, width = x.shape
        h = self.ln_1(x)
        k, v = self.key_value(h).chunk(2, dim=-1)
        k, v = rotate(self.heads(k), rotation), self.heads(v)
        causal, visible = self.causal and pos is None, None
        if pos is not None:  # all tokens are looked at, but only those at pos look and go on
            x, h, rotation = x[:, :, pos], h[:, :, pos], rotation[pos]
            visible = torch.arange(T, device=x.device) <= pos[:, None] if self.causal else None
        q = rotate(self.heads(self.query(h)), rotation)
        y = F.scaled_dot_product_attention(q, k, v, visible, is_causal=causal)
        x = x + self.attn_proj(y.transpose(1, 2).reshape(S, B, -1, width))
        return x + self.mlp_proj(F.gelu(self.mlp_fc(self.ln_2(x))))


class GPT(nn.Module):
    """S transformers, the weights of each drawn from its own one of the generators (on the CPU).
    The embedding knows the mask token, the head cannot predict it."""

    def __init__(self, config, generators):
        super().__init__()
        V, T, width = config.vocab_size, config.block_size, config.n_embd
        self.config = config
        self.wte = normal(generators, V + 1, width)  # token embedding, the mask token's last
        # Positions are learned, which suits the fixed columns of sums, and rotary, without which an
        # MDM hardly learns text. Their base is 100, since sequences are short.
        self.wpe = normal(generators, T, width)
        half = width // config.n_head // 2
        angle = torch.arange(T)[:, None] * 100.0 ** -(torch.arange(half) / half)
        turn = torch.polar(torch.ones_like(angle), angle)  # a complex number of length 1
        self.register_buffer("rotation", turn, persistent=False)
        self.blocks = nn.ModuleList(Block(generators, config) for _ in range(config.n_layer))
        self.ln_f, self.head = LayerNorm(len(generators), width), Linear(generators, width, V)

    def forward(self, idx, pos):
        """idx (S, B, T) token ids, pos (n,) positions -> logits (S, B, n, V) at these positions.
        The last block computes only these: two layers on `123+456=0579` save a quarter."""
        S, _, T = idx.shape
        row = torch.arange(S, device=idx.device).view(S, 1, 1) * self.wte.shape[1]  # of seed s
        x = F.embedding(idx + row, self.wte.flatten(0, 1)) + self.wpe[:, None, :T]
        rotation = self.rotation[:T]
        for block in self.blocks[:-1]:
            x = block(x, rotation)
        return self.head(self.ln_f(self.blocks[-1](x, rotation, pos)))


# --------------------------------------------------------------------------------------------------
# 2. The loss. Masks multiply, they never index: shapes are fixed, the host waits for no GPU.


def token_nll(model, x0, pos, mask=None):
    """-log p of each response token in nats, (S, ..., n), for x0 (S, ..., T) and pos (n,).
    MDM: -log p(x0_i | xt), xt hiding what mask (S, ..., n) says; of visible tokens it means nothing
    and is multiplied by 0. ARM: -log p(x0_i | x0_<i), from the logits at i - 1, so pos >= 1."""
    if model.config.causal:
        xt, at = x0[..., :-1], pos - 1
    else:
        xt, at = x0.clone(), pos
        xt[..., pos] = torch.where(mask, model.config.vocab_size, x0[..., pos])
    logits = model(xt.flatten(1, -2), at)
    nll = F.cross_entropy(logits.flatten(0, -2), x0[..., pos].flatten(), reduction="none")
    return nll.view(*x0.shape[:-1], -1)


def mdm_loss(nll, mask, weight):
    """Equation (1): all (..., n) -> (...), in nats per token. Plain training: weight = 1/p_mask."""
    return (nll * mask * weight).mean(-1)


def rate_to_p_mask(t, eps=1e-3):
    """p_mask = (1 - eps) t + eps, the probability with which a token is really masked (LLaDA).

    OURS: eps is not cosmetic. At small t a single hidden token costs H/(n t), so E[l^2 | t] ~ 1/t,
    and for t ~ U(0,1) the variance of l grows like log(1/eps), without bound. (Its price: L becomes
    the mean over p_mask in (eps, 1). Exact counts, below, need no eps.)"""
    return (1 - eps) * t + eps


# --------------------------------------------------------------------------------------------------
# 3. P-POTS: the Pareto-optimal t-sampler. Attacks the sum A + B; one pass and a pilot; unbiased.
#
# Draw t from a density p(t) and multiply the loss by 1/p(t): its mean stays what it was. Its
# variance is int E[l^2 | t] / p(t) dt - L^2, which by Cauchy-Schwarz is least for
#
#     p(t)  ~  sqrt( E[l^2 | t] )         (the paper writes it as mean^2 plus variance)          (4)
#
# Rates of large l come more often, in smaller steps. (B alone may grow; what is least is the loss's
# variance, not the gradient's.) OURS, cheaper than the paper's grid of rates: all masks of k tokens
# are equally likely at any t; so a pilot measures H by count, and the binomial law of k gives (4):
#
#     E[l^2 | t]  =  sum_k Bin(k; n, p) E[H^2 | k] / (n p)^2                                    (5)


def ranks(r):
    """The rank, 0 to n-1, of each entry along the last axis. Of uniforms: a random permutation."""
    return r.argsort(-1).argsort(-1)


@torch.no_grad()
def measure_counts(model, x0, pos, r):
    """The pilot, X * n_counts forward passes per seed: x0 (S, X, T) and r (S, X, n_counts, n)
    uniform -> counts (n_counts,), spread from 1 to n, and H (S, X, n_counts) in nats."""
    counts = torch.linspace(1, len(pos), r.shape[2], device=x0.device).round().long()
    mask = ranks(r) < counts[:, None]
    nll = token_nll(model, x0[:, :, None].expand(-1, -1, len(counts), -1), pos, mask)
    return counts, (nll * mask).sum(-1)


def second_moment(counts, H, t, n, eps=1e-3):
    """Equation (5) at the rates t (Q,): (S, Q), on the CPU; interpolated between the counts."""
    p = rate_to_p_mask(t, eps)[:, None]
    k = torch.arange(1, n + 1).double()
    per_token = (H.double() / counts).square().mean(1)
    per_token = torch.tensor(np.array([np.interp(k, counts, row) for row in per_token]))
    binomial = torch.distributions.Binomial(n, p).log_prob(k).exp()
    return (per_token @ (binomial * (k / (n * p)) ** 2).T).clamp(min=1e-60)  # H may be exactly 0


def epr(theta, t):
    """The paper's EPR family: theta (..., 6), t (Q,) -> log p(t), not normalised, (..., Q).

        p(t) ~ sqrt(v(t) + g(t)^2),    v = a t^c1 + b (1-t)^c2,    g = exp(d t^c3)

    a, b, d > 0 are softplus(theta), c1, c2, c3 > 1 are 1 + softplus(theta). OURS to note: EPR is
    finite at t = 0, where (4) grows like (t + eps)^(-1/2), so the log(1/eps) survives (in
    the table below down to its first cell, t < 6e-5)."""
    a, b, d, c1, c2, c3 = F.softplus(theta).unsqueeze(-1).unbind(-2)
    v = a * t ** (1 + c1) + b * (1 - t) ** (1 + c2)
    g = torch.exp(d * t ** (1 + c3))
    return 0.5 * torch.log(v + g.square())


def fit_epr(t, w, n_starts=20, n_steps=200):
    """Fit EPR to a curve w (S, Q) at t (Q,): the theta (S, 6) of least KL(w || p), over n_starts.
    (The paper takes L-BFGS; with Adam the seeds do not affect each other.)"""
    w = (w / w.sum(-1, keepdim=True))[:, None]
    theta = 2 * torch.randn(n_starts, 6, generator=torch.Generator().manual_seed(0)).to(w)
    theta = theta.repeat(len(w), 1, 1).requires_grad_()
    optimizer = torch.optim.Adam([theta], betas=(0.9, 0.99))
    for step in range(n_steps):
        optimizer.param_groups[0]["lr"] = 0.2 * (1 - step / n_steps)
        kl = -(w * epr(theta, t).log_softmax(-1)).sum(-1)  # (S, n_starts), up to w's entropy
        optimizer.zero_grad()
        kl.sum().backward()
        optimizer.step()
    return theta.detach()[torch.arange(len(w)), kl.argmin(-1)]


# What is sampled from is a table of N_CELLS equal cells of sqrt(t), which is uniform within each.
# So the weight's p(t) is exactly the density drawn; near t = 0 it goes like t^(-1/2), as (4).
N_CELLS = 128
CELLS = ((torch.arange(N_CELLS).double() + 0.5) / N_CELLS).square()  # t at the middle of each cell


def ppots_table(counts, H, n, fit="epr", eps=1e-3):
    """From the pilot to (4) as a table (S, N_CELLS), the probability of each cell: through EPR
    (fit="epr", the paper's) or as measured (fit="grid")."""
    if fit == "grid":
        density = second_moment(counts, H, CELLS, n, eps).sqrt()
    else:
        t = torch.arange(1, 64).double() / 64
        theta = fit_epr(t, second_moment(counts, H, t, n, eps).sqrt())
        density = epr(theta, CELLS).softmax(-1)
    mass = density * CELLS.sqrt()  # dt = 2 sqrt(t) d sqrt(t)
    mass = mass.clamp(min=1e-3 * mass.amax(-1, keepdim=True))  # a rate never drawn is a bias
    return mass / mass.sum(-1, keepdim=True)


def ppots_sample(u, table):
    """Invert the CDF: u (S, B) in (0,1] and table (S, N_CELLS) -> t and its weight 1/p(t)."""
    cdf = table.cumsum(-1)
    cell = torch.searchsorted(cdf, u.contiguous()).clamp(max=N_CELLS - 1)
    mass, right = table.gather(-1, cell), cdf.gather(-1, cell)
    sqrt_t = (cell + 1 - ((right - u) / mass).clamp(0, 1)) / N_CELLS
    return sqrt_t.square(), 2 * sqrt_t / (mass * N_CELLS)


# --------------------------------------------------------------------------------------------------
# 4. MIRROR: two masks that make up for each other. Attacks A; TWO passes; unbiased.


def mirror(r):
    """The uniforms r (M, ..., n) that masks are made from (hidden where r < p) and their antithetic
    ones, r and 1 - r: (2M, ..., n). p <= 1/2: no token is hidden twice; p >= 1/2: none is spared.
    Each mask alone is an ordinary one, so the mean of both losses is unbiased. With rho = E[Cov] /
    E[Var] of the two given x0 and t, A becomes A/2 * (1 + rho); rho <= 0 for the plain loss if one
    more hidden token never lowers H. Fair controls: multi2 (independent masks), batch2, steps2."""
    return torch.cat([r, 1 - r])


# --------------------------------------------------------------------------------------------------
# 5. The other methods.


def exact_count(u, n):
    """Exact counts: hide exactly k ~ U{1..n} tokens, weight 1/k. Attacks A; one pass; unbiased, no
    eps. (RADD; LLaDA's evaluation.) u (S, B) in (0,1] -> k/n, which stands in for p. It takes off
    the noise k/(n t) of the plain weight; for small n nearly all of that is the empty mask."""
    return (u * n).ceil() / n


def stratify(u, shuffle, strata):
    """StraTS: draw equally often from each stratum of (0,1]. Attacks B; one pass; unbiased if full.
    u (..., B) uniform, shuffle (..., B) a random permutation of 0..B-1 -> u (..., B)."""
    return (shuffle % strata + u) / strata


def n_strata(batch_size):
    """The paper takes sqrt(batch_size) strata. OURS: the largest divisor up to that fills them."""
    return max(d for d in range(1, math.isqrt(batch_size) + 1) if batch_size % d == 0)


def isad(p, is_rare, delta=0.2):
    """ISAD: hide rare tokens with q = min(p + delta, 1), weight 1/q. Attacks A on these; one pass;
    BIASED (OURS to note): what a token is predicted from has more rare ones hidden than in (2).
    p (S, B, 1), is_rare (S, B, n) bool -> (S, B, n)."""
    return torch.where(is_rare, (p + delta).clamp(max=1), p)


def clipped(u, low=0.3, high=0.8):
    """Clipped rates: t ~ U[low, high]. Attacks A; one pass; BIASED. (Arriola, arXiv 2503.09573.)"""
    return low + (high - low) * u


def ema_baseline(loss, u, ema, step=0.01):
    """EMA: subtract from each loss a running mean of those at similar rates, one for each bin of
    u, and add back their mean. loss, u (S, B), ema (S, bins) -> a steadier loss (S, B), new ema.
    What is subtracted has no gradient: the GRADIENT, and training, is the same to the bit."""
    bins = ema.shape[-1]
    onehot = F.one_hot(((u * bins).ceil().long() - 1).clamp(0, bins - 1), bins).to(loss.dtype)
    steady = loss - (onehot @ ema[..., None])[..., 0] + ema.mean(-1, keepdim=True)
    with torch.no_grad():
        count = onehot.sum(1)
        mean = (onehot * loss[..., None]).sum(1) / count.clamp(min=1)
        return steady, torch.where(count > 0, ema + step * (mean - ema), ema)


# --------------------------------------------------------------------------------------------------
# 6. A method is what it does to u (the rate), to r (the mask) and to the weight. Its name is made
# of words, `"mirror" in "ppots_mirror"` (CONFLICTS: never both); "mdm" and "arm" are plain ones.
# train.py does strats, ema, batch2, steps2, and SyRM (symbols of the prompt are masked too).
WORDS = "ppots exactk clipped isad strats mirror multi2 syrm ema batch2 steps2".split()
CONFLICTS = ["ppots exactk", "ppots clipped", "exactk clipped", "exactk isad", "batch2 steps2"]


def n_masks(method):
    """M, the masks per sequence and step."""
    return 2 ** (("mirror" in method) + ("multi2" in method))


def rate(method, u, n, table=None, eps=1e-3, is_rare=None):
    """u (S, B) in (0,1] -> p (S, B, 1), for isad (S, B, n), and the importance weight (S, B, 1)."""
    p, importance = rate_to_p_mask(u, eps), torch.ones_like(u)
    if "ppots" in method:
        if table is None:
            raise ValueError("ppots needs a table: measure_counts on your model, then ppots_table")
        t, importance = ppots_sample(u, table)
        p = rate_to_p_mask(t, eps)
    if "exactk" in method:
        p = exact_count(u, n)
    if "clipped" in method:
        p = clipped(u)
    p, importance = p[..., None], importance[..., None]
    if "isad" in method:
        p = isad(p, is_rare)
    return p, importance


def draw_masks(method, u, r, table=None, eps=1e-3, is_rare=None):
    """Any method's masks, bool, and weights, both (M, S, B, n): all that the loss needs.
    Uniform u (S, B) in (0,1], for strats from stratify; and r (1, S, B, n), multi2: (2, S, B, n);
    for isad is_rare (S, B, n) bool; for ppots a table. ValueError: no table, or no such method."""
    words, n = set(method.split("_")), r.shape[-1]
    if not words <= {"mdm", *WORDS} or any({*pair.split()} <= words for pair in CONFLICTS):
        raise ValueError(f"no method {method}: join words of {WORDS} by _, none of {CONFLICTS}")
    p, importance = rate(method, u, n, table, eps, is_rare)
    if "exactk" in method:
        r = (ranks(r) + 0.5) / n  # exactly k of these are below k/n
    if "mirror" in method:
        r = mirror(r)
    mask = r < p
    return mask, (importance / p).expand(mask.shape)


def method_loss(model, x0, pos, mask, weight):
    """x0 (S, B, T), pos (n,), mask, weight (M, S, B, n) -> loss (S, B), its mean over the masks."""
    mask, weight = mask.transpose(0, 1), weight.transpose(0, 1)  # (S, M, B, n): one forward batch
    nll = token_nll(model, x0[:, None].expand(-1, mask.shape[1], -1, -1), pos, mask)
    return mdm_loss(nll, mask, weight).mean(1)


# --------------------------------------------------------------------------------------------------
# 7. The variance, measured: equation (3) at a given model, for the loss and for the gradient.


def sample_gradients(model, x0, pos, mask, weight):
    """Loss (N,) and gradient (N, P) of each of N samples x0 (N, T), mask and weight (N, n), at
    the first seed. The seed axis does the work: N copies of the model, each given one sample."""
    copies = {}
    for name, p in model.named_parameters():
        copies[name] = p[:1].detach().repeat_interleave(len(x0), 0).requires_grad_()

    def net(idx, at):
        return torch.func.functional_call(model, copies, (idx, at))

    net.config = model.config
    loss = method_loss(net, x0[:, None], pos, mask[None, :, None], weight[None, :, None])[:, 0]
    gradient = torch.autograd.grad(loss.sum(), list(copies.values()))
    return loss.detach(), torch.cat([g.flatten(1) for g in gradient], 1)


# OURS, exact for short responses: list all N = 2^n masks. With V_m the H of mask m, or its
# gradient, and a = weight/n, the loss is l = a V_m. So each moment of l is a sum over the Gram
# matrix K = E_{x0}[V V^T] (N, N), times a matrix that says how often the method draws what.


def all_masks(n):
    """All 2^n masks (2^n, n), bool."""
    return (torch.arange(2**n)[:, None] >> torch.arange(n)) & 1 == 1


def grams(model, x0, pos):
    """For the loss and for the gradient: K and that of the mean of V over x0, both (N, N), float64.
    x0 (X, T) counts as the whole data set. For an ARM N = 1 and V is the loss."""
    masks, weight = all_masks(len(pos)).to(x0.device), float(len(pos))
    if model.config.causal:
        masks, weight = masks[-1:], 1.0
    weights = torch.full(masks.shape, weight, device=x0.device)
    total, mean = [0, 0], [0, 0]
    for x in x0.unsqueeze(1).expand(-1, len(masks), -1):
        for i, V in enumerate(sample_gradients(model, x, pos, masks, weights)):
            V = V.cpu().double().view(len(masks), -1)
            total[i] = total[i] + V @ V.T / len(x0)
            mean[i] = mean[i] + V / len(x0)
    return [(K, V @ V.T) for K, V in zip(total, mean)]


def mask_probabilities(method, p, n):
    """P(m) of one mask at each of the rates p (Q, 1): (Q, N)."""
    k = all_masks(n).sum(1)
    if "exactk" in method:
        P = (k == (n * p).round()).double()
        return P / P.sum(1, keepdim=True)
    return p**k * (1 - p) ** (n - k)


def mirror_probabilities(method, p, n):
    """P(m, m') of MIRROR's masks at the rate p, (N, N): the n-th Kronecker power of one token's."""
    neither, one, both = max(1 - 2 * p, 0), min(p, 1 - p), max(2 * p - 1, 0)
    token = torch.tensor([[neither, one], [one, both]], dtype=torch.float64)
    pairs = functools.reduce(torch.kron, [token] * n)
    if "exactk" in method:  # of these pairs, those of n p tokens each
        right = all_masks(n).sum(1) == round(n * p)
        pairs = pairs * torch.outer(right, right)
    return pairs / pairs.sum()


def exact_variance(method, K, K_mean, n, table=None, eps=1e-3, batch_size=64, n_rates=840):
    """A, B, C, total per sequence (a batch's variance times batch_size, where strata matter), from
    a pair of grams(), by a midpoint rule of n_rates cells of u; not for isad."""
    if "arm" in method:
        return {"A": 0.0, "B": 0.0, "C": (K - K_mean).item(), "total": (K - K_mean).item()}
    edges = torch.linspace(0, 1, n_rates + 1, dtype=torch.float64)
    if "exactk" not in method:
        edges = edges**4  # dense where 1/t is steep (exact counts: 840 cells hold one count each)
    strata = n_strata(batch_size) if "strats" in method else 1
    u = (torch.arange(strata)[:, None] + (edges[1:] + edges[:-1]) / 2) / strata
    p, importance = (z[0] for z in rate(method, u.view(1, -1), n, table, eps))  # (rates, 1)
    a, du = importance / (n * p), edges.diff().repeat(strata)[:, None] / strata
    P = mask_probabilities(method, p, n)
    second = (du * a**2 * P).sum(0).diag()  # the matrix of E[l l]: one mask
    given_t = (a * P).T @ (du * a * P)  # that of E_t[E[l|t] E[l|t]]: two independent masks
    if "mirror" in method:  # l = (l1 + l2)/2, so E[l l] is half E[l1 l1] and half E[l1 l2]
        for one_p, weight in zip(p[:, 0].tolist(), du * a**2):
            second = second + weight * mirror_probabilities(method, one_p, n)
        second = second / 2
    if "multi2" in method:
        second = (second + given_t) / 2
    means = (du * a * P).view(strata, n_rates, -1).sum(1)  # each stratum's share of E[l], times V
    square = torch.outer(means.sum(0), means.sum(0))  # the matrix of E[l] E[l]
    between = strata * means.T @ means - square  # what strata differ by: it is taken off
    A = ((second - given_t) * K).sum()
    B = ((given_t - square) * K).sum() - (between * K_mean).sum()
    C = (square * (K - K_mean)).sum()
    return {"A": A.item(), "B": B.item(), "C": C.item(), "total": (A + B + C).item()}


# --------------------------------------------------------------------------------------------------
# 8. Generation.


@torch.no_grad()
def generate(model, x, pos, steps=None, temperature=0.0, order="confidence", generator=None):
    """Fill in the mask tokens of x (S, B, T) at pos (n,), in n or fewer steps; yield x after each.
    A step predicts all and keeps the surest ("confidence"), first ("left") or any ("random")."""
    n, causal, mask_id = len(pos), model.config.causal, model.config.vocab_size
    order, steps = ("left", n) if causal else (order, min(steps or n, n))
    for step in range(steps):
        logits = model(x[..., :-1], pos - 1) if causal else model(x, pos)
        if temperature > 0:
            p = (logits / temperature).softmax(-1).flatten(0, -2)
            token = p.multinomial(1, generator=generator).view(logits.shape[:-1])
        else:
            token = logits.argmax(-1)
        score = logits.log_softmax(-1).gather(-1, token[..., None])[..., 0]
        if order == "left":
            score = -pos.float().expand(token.shape)
        if order == "random":
            score = torch.rand(token.shape, generator=generator, device=x.device)
        masked = x[..., pos] == mask_id
        n_keep = (masked.sum(-1, keepdim=True) / (steps - step)).ceil()  # the last step leaves none
        keep = masked & (ranks(-score.masked_fill(~masked, -torch.inf)) < n_keep)
        x = x.clone()
        x[..., pos] = torch.where(keep, token, x[..., pos])
        yield x


def demo():
    """Equation (3) for an untrained model on 16 toy sequences: six digits, four sums mod 10."""
    draw = torch.Generator().manual_seed(0)
    x0 = torch.randint(10, (16, 10), generator=draw)
    x0[:, 6:], pos, n = (x0[:, :4] + x0[:, 2:6]) % 10, torch.arange(6, 10), 4
    arm, model = (GPT(GPTConfig(10, 10, causal=c), [draw.manual_seed(1)]) for c in (True, False))
    K_arm, K_mdm = grams(arm, x0, pos), grams(model, x0, pos)
    pilot = measure_counts(model, x0[None], pos, torch.rand(1, 16, n, n, generator=draw))
    table, plain = ppots_table(*pilot, n), None

    print("Variance per sequence, over all masks and 840 rates; in the last column over mdm's.\n")
    print(f"{'':21}{'loss':^36}{'gradient':^36}\n{'method':15}passes", end="")
    print(f"{'A':>9}{'B':>9}{'C':>9}{'total':>9}" * 2 + f"{'ratio':>9}")
    for method in "mdm arm ppots mirror ppots_mirror multi2 strats exactk exactk_mirror".split():
        pairs = K_arm if method == "arm" else K_mdm
        loss, gradient = (exact_variance(method, *pair, n, table) for pair in pairs)
        plain = plain or gradient["total"]  # mdm comes first
        values = [*loss.values(), *gradient.values(), gradient["total"] / plain]
        print(f"{method:15}{n_masks(method):^6}" + "".join(f"{value:9.3g}" for value in values))
    epsilons = [1e-2, 1e-3, 1e-4, 1e-5, 1e-6]
    print("\nThe loss's total as eps -> 0: mdm's grows like log(1/eps); others settle, EPR late.")
    print(f"\n{'eps':21}" + "".join(f"{eps:9.0e}" for eps in epsilons))
    for method, fit in [("mdm", ""), ("ppots", "epr"), ("ppots", "grid"), ("exactk", "")]:
        line = f"{method + ' ' + fit:21}"
        for eps in epsilons:
            table = ppots_table(*pilot, n, fit, eps) if fit else None
            line += f"{exact_variance(method, *K_mdm[0], n, table, eps)['total']:9.3f}"
        print(line)


if __name__ == "__main__":
    demo()
