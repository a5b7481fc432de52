"""mdm.py - stable training of masked diffusion language models, in one file.

THE STORY. A masked diffusion model (MDM) hides tokens and learns to fill them in. To train on a sequence x0 it
draws a masking rate t, hides each of the n response tokens with probability t, and pays for the hidden ones:

    l(x0, t, m) = 1/(n t) * sum_{i in m} -log p(x0_i | xt)                                                     (1)
    L           = E_{x0} E_{t ~ U(0,1)} E_m  l(x0, t, m)      >=  E_{x0}[-log p(response | prompt)] / n         (2)

An autoregressive model (ARM) meets only one kind of luck: which data it sees. An MDM is at the mercy of three,
and the law of total variance takes them apart ("Bringing Stability to Diffusion", arXiv 2511.18159, "the paper" from here on):

    Var(l) =  E_{x0,t} Var_m (l)            A  masking-pattern noise: which tokens were hidden
           +  E_{x0} Var_t (E_m l)          B  masking-rate noise:    how many were hidden
           +  Var_{x0} (E_{t,m} l)          C  data noise: all that an ARM has                                   (3)

The same identity holds for the gradient, with "variance" read as the trace of the covariance. The paper lowers A
and B with six methods; the two that matter most are P-POTS (a better law for t) and MIRROR (two masks that make
up for each other). This file holds them (all but the one line of SyRM, which masks more positions: see train.py's build),
read in this order:

    1 the model            2 the loss               3 P-POTS: choosing t            4 MIRROR: choosing the masks
    5 the other methods    6 a method, put together 7 the variance, measured        8 generation

`python mdm.py` measures (3) exactly for an untrained model, method by method: the theory in ten seconds.

LETTERS. S seeds (independent models trained side by side), B sequences in a batch, T = block_size tokens in a
sequence, n response tokens (only these are ever masked), M masks per sequence (= forward passes it costs),
V = vocab_size, C = n_embd. k = |m| is the number of hidden tokens, H or H_m = sum_{i in m} -log p(x0_i | xt) their summed loss.
(A, B and C are variances where variances are spoken of, sizes in shapes.) A method is called unbiased when the mean of its
loss is L. "OURS" marks what is derived here and not in the paper.
"""
import functools
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

# ---------------------------------------------------------------------------------------------------------------
# 1. The model: nanoGPT's pre-norm transformer, with a leading axis S on every parameter.
#
# Row s of each parameter belongs to seed s. The rows never meet: S models train in one stream of batched matmuls,
# cheaper than one after another wherever a single one leaves the machine idle. With S = 1 it is the transformer you
# know. There is no time embedding: t decides only which tokens are hidden, so given xt it says nothing more about them
# (RADD, arXiv 2406.03736).


@dataclass
class GPTConfig:
    vocab_size: int  # V: the tokens that can be predicted; the mask token is one more and has the id V
    block_size: int  # T: prompt + response
    n_layer: int = 2
    n_head: int = 4
    n_embd: int = 64
    causal: bool = False  # the ONLY difference between the ARM (True) and the MDM (False)


class Linear(nn.Module):
    """S linear layers, (S, ..., n_in) -> (S, ..., n_out), as one batched matmul."""

    def __init__(self, S, n_in, n_out, std=0.02):
        super().__init__()
        self.std = std
        self.weight = nn.Parameter(torch.empty(S, n_in, n_out))
        self.bias = nn.Parameter(torch.zeros(S, 1, n_out))

    def forward(self, x):
        return torch.baddbmm(self.bias, x.flatten(1, -2), self.weight).view(*x.shape[:-1], -1)


class LayerNorm(nn.Module):
    """S layer norms over the last axis of (S, B, T, C)."""

    def __init__(self, S, n_embd):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(S, 1, 1, n_embd))
        self.bias = nn.Parameter(torch.zeros(S, 1, 1, n_embd))

    def forward(self, x):
        return F.layer_norm(x, x.shape[-1:]) * self.weight + self.bias


class Block(nn.Module):
    """Attention and MLP, each on a residual branch."""

    def __init__(self, S, config):
        super().__init__()
        C, residual_std = config.n_embd, 0.02 / math.sqrt(2 * config.n_layer)  # as in GPT-2
        self.n_head, self.causal = config.n_head, config.causal
        self.ln_1, self.ln_2 = LayerNorm(S, C), LayerNorm(S, C)
        self.query, self.key_value = Linear(S, C, C), Linear(S, C, 2 * C)
        self.attn_proj = Linear(S, C, C, residual_std)
        self.mlp_fc, self.mlp_proj = Linear(S, C, 4 * C), Linear(S, 4 * C, C, residual_std)

    def forward(self, x, pos=None):
        """x (S, B, T, C) -> (S, B, T, C), or (S, B, len(pos), C) when only the positions `pos` are wanted."""
        S, B, T, C = x.shape
        heads = lambda z: z.reshape(S * B, -1, self.n_head, C // self.n_head).transpose(1, 2)
        h = self.ln_1(x)
        k, v = self.key_value(h).chunk(2, dim=-1)
        visible = torch.ones(T, T, dtype=torch.bool, device=x.device).tril() if self.causal else None
        if pos is not None:  # keys and values come from everywhere, queries and all that follows only from pos
            x, h = x[:, :, pos], h[:, :, pos]
            visible = None if visible is None else visible[pos]
        y = F.scaled_dot_product_attention(heads(self.query(h)), heads(k), heads(v), attn_mask=visible)
        x = x + self.attn_proj(y.transpose(1, 2).reshape(S, B, -1, C))
        return x + self.mlp_proj(F.gelu(self.mlp_fc(self.ln_2(x))))


class GPT(nn.Module):
    """S transformers. The embedding has a row for the mask token, the head has none: it can never be predicted."""

    def __init__(self, config, generators):
        """generators: one CPU torch.Generator per seed; row s of every weight is drawn from generators[s] alone."""
        super().__init__()
        self.config, S, C = config, len(generators), config.n_embd
        self.wte = nn.Parameter(torch.empty(S, config.vocab_size + 1, C))  # token embedding, mask token last
        self.wpe = nn.Parameter(torch.empty(S, config.block_size, C))  # position embedding
        self.blocks = nn.ModuleList(Block(S, config) for _ in range(config.n_layer))
        self.ln_f, self.head = LayerNorm(S, C), Linear(S, C, config.vocab_size)
        weights = [(self.wte, 0.02), (self.wpe, 0.02)]
        weights += [(m.weight, m.std) for m in self.modules() if isinstance(m, Linear)]
        with torch.no_grad():
            for s, generator in enumerate(generators):
                for weight, std in weights:
                    weight[s].normal_(0.0, std, generator=generator)

    def forward(self, idx, pos):
        """idx (S, B, T) token ids, pos (P,) positions -> logits (S, B, P, V) at these positions.

        The last block computes only what is asked for. On `123+456=0579`, with 2 blocks, the answer is 4 of 12 tokens:
        this saves a quarter of all arithmetic.
        """
        S, B, T = idx.shape
        rows = idx + self.wte.shape[1] * torch.arange(S, device=idx.device).view(S, 1, 1)  # seed s has its own rows
        x = F.embedding(rows, self.wte.flatten(0, 1)) + self.wpe[:, None, :T]
        for block in self.blocks[:-1]:
            x = block(x)
        return self.head(self.ln_f(self.blocks[-1](x, pos)))


# ---------------------------------------------------------------------------------------------------------------
# 2. The loss. Masks multiply, they never index: every shape is known in advance, nothing waits for the device.


def corrupt(x0, mask, pos, mask_id):
    """The noised sequence xt (..., T): x0 with the mask token wherever mask (..., n) is True; pos (n,) says which
    positions the n entries of the mask belong to."""
    xt = x0.clone()
    xt[..., pos] = torch.where(mask, mask_id, x0[..., pos])
    return xt


def token_nll(model, x0, pos, mask=None):
    """-log p of each response token, in nats: (S, ..., n) for x0 (S, ..., T).

    MDM: -log p(x0_i | xt), xt noised by mask (S, ..., n). Entries of unmasked tokens mean nothing; the loss
    multiplies them by zero. ARM (causal, no mask): -log p(x0_i | x0_<i), read off one position earlier, so no pos is 0.
    """
    if model.config.causal:
        xt, at = x0[..., :-1], pos - 1
    else:
        xt, at = corrupt(x0, mask, pos, model.config.vocab_size), pos
    logits = model(xt.flatten(1, -2), at)
    nll = F.cross_entropy(logits.flatten(0, -2), x0[..., pos].flatten(), reduction="none")
    return nll.view(*x0.shape[:-1], len(pos))


def mdm_loss(nll, mask, weight):
    """Equation (1) with a general weight: l = 1/n sum_i weight_i mask_i nll_i, for the last axis n.

    nll, mask, weight (..., n) -> (...), in nats per response token. weight = 1/p_mask is the plain loss.
    """
    return (nll * mask * weight).mean(-1)


def rate_to_p_mask(t, eps=1e-3):
    """p_mask = (1 - eps) t + eps, the probability that a token is masked (LLaDA's schedule).

    OURS: eps is not cosmetic. For small t a single hidden token costs nll/(n t), so E[l^2 | t] ~ 1/t and, under
    t ~ U(0,1), Var(l) grows like log(1/eps) without bound. eps = 1e-3 is what keeps it finite.
    Its price: (2) is then an average over p_mask in (eps, 1), and that is what methods with this p_mask are unbiased for;
    exactk, reclipped and the validation bound (nll_masks) have no eps and aim at (2) itself.
    """
    return (1 - eps) * t + eps


# ---------------------------------------------------------------------------------------------------------------
# 3. P-POTS: the Pareto-optimal t-sampler. Attacks the sum A + B; one pass, and about 1 % for the pilot; unbiased.
#
# Draw t ~ p(t) and multiply the loss by 1/p(t): the mean stays, whatever p > 0 is. The variance becomes
# int E[l^2|t] / p(t) dt - L^2, and by Cauchy-Schwarz it is least for
#
#     p*(t)  ∝  sqrt( E_{x0}[ g(x0,t)^2 + v(x0,t) ] ),     g = E_m[l | x0,t],   v = Var_m[l | x0,t]             (4)
#
# "Visit the hard rates more often, in steps that are smaller in proportion." It is the sum that falls, mostly by way of A;
# B may rise, since g/p is less even than g. And it is the loss's variance: the gradient's optimum has the squared norm of the
# gradient in place of l^2, for which the loss stands in, as in the paper. Rates are taken to be independent.
#
# How to measure (4)? The authors average over a grid of rates, sequences and masks. OURS, better and cheaper: given
# the NUMBER k of hidden tokens, all masks are equally likely, whatever t was. So it is enough to measure the summed
# loss H = sum_{i in m} nll_i by count, and every t follows from the binomial law of k:
#
#     E[l | x0,t]  =  sum_k Bin(k; n, t) E[H | x0,k] / (n t),      E[l^2 | t]  =  sum_k Bin(k; n, t) E[H^2 | k] / (n t)^2


@torch.no_grad()
def measure_counts(model, x0, pos, uniforms, max_counts=16):
    """The pilot: H for X sequences, n_counts mask sizes and so many repeats of each. It costs X * n_counts * repeats
    forward passes and no backward.

    x0 (S, X, T) training sequences; uniforms (S, X, n_counts, repeats, n) in [0,1), n_counts = min(n, max_counts).
    Returns counts (n_counts,) from 1 to n, and H (S, X, n_counts, repeats) in nats.
    """
    n = len(pos)
    counts = torch.linspace(1, n, min(n, max_counts), device=x0.device).round().long()
    mask = ranks(uniforms) < counts[:, None, None]  # exactly `count` of n tokens hidden
    nll = token_nll(model, x0[:, :, None, None].expand(*mask.shape[:-1], -1), pos, mask)
    return counts, (nll * mask).sum(-1)


def ranks(uniforms):
    """The rank, 0 to n-1, of each entry along the last axis; of independent uniforms, a random permutation."""
    return uniforms.argsort(-1).argsort(-1)


def log_choose(n, k):
    """log C(n, k) for a tensor k, float64."""
    k = k.double()
    return math.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)


def binomial(t, n):
    """Bin(k; n, t) for k = 1..n: (len(t), n), float64."""
    k, t = torch.arange(1, n + 1, device=t.device), t.double()[:, None]
    return torch.exp(log_choose(n, k) + k * t.log() + torch.xlogy(n - k, 1 - t))


def curves(counts, H, t, n, eps=1e-3):
    """g^2 and v of equation (4), averaged over x0, at the rates t (Q,): two tensors (S, Q), float64.

    From the pilot's counts (n_counts,) and H (S, X, n_counts, repeats >= 2). Both are unbiased when every count was
    measured (n <= 16); beyond, E[H/k] and E[(H/k)^2] are interpolated between counts. It is the mean over x0 of g^2 that
    belongs in (4), not the square of the mean (with the latter the data's own spread is lost: a slip in the authors'
    release). P-POTS needs only the sum of the two; the repeats serve to tell them apart.
    """
    p_mask, per_token = rate_to_p_mask(t, eps), H.double() / counts[:, None]
    k = torch.arange(1, n + 1, device=t.device)
    first = (binomial(p_mask, n) * k) @ interpolation(counts, n)  # (Q, n_counts)
    second = per_token.square().mean((1, 3)) @ ((binomial(p_mask, n) * k**2) @ interpolation(counts, n)).T
    g = per_token.mean(3) @ first.T  # (S, X, Q); its square is too large by the noise of the repeats: take that out
    g2 = (g.square() - per_token.var(3) @ first.square().T / H.shape[3]).mean(1)
    scale = (n * p_mask).square()
    return g2 / scale, (second - g2) / scale


def interpolation(counts, n):
    """The matrix (n, n_counts) that interpolates linearly from the measured counts to every k = 1..n."""
    counts, k = counts.double(), torch.arange(1, n + 1, dtype=torch.float64, device=counts.device)
    right = torch.searchsorted(counts, k).clamp(min=min(1, len(counts) - 1))
    left = (right - 1).clamp(min=0)
    slope = (k - counts[left]) / (counts[right] - counts[left]).clamp(min=1)
    one = torch.eye(len(counts), dtype=torch.float64, device=counts.device)
    return (1 - slope)[:, None] * one[left] + slope[:, None] * one[right]


def epr(theta, t):
    """The paper's EPR family: p(t) ∝ sqrt(v_fit + g_fit^2), v_fit = a t^r + b (1-t)^q, g_fit = exp(k t^m).

    theta (..., 6) stands for these a, b, k, r, q, m, without constraint: softplus makes them positive, and 1 is added to
    the exponents r, q, m. The paper's amplitude of g is 1 here, since only the shape matters. Returns log p, not
    normalised: (..., len(t)). OURS: the family stays finite at t = 0, where the optimum (4) grows like (t + eps)^(-1/2), so
    under it some of the plain loss's log(1/eps) survives. The measured curve itself (fit="grid") is free of it.
    """
    a, b, k, r, q, m = F.softplus(theta).unsqueeze(-1).unbind(-2)
    log_t, log_1mt = t.log(), (1 - t).log()
    v = a * torch.exp((1 + r) * log_t) + b * torch.exp((1 + q) * log_1mt)
    return 0.5 * torch.log(v + torch.exp(2 * k * torch.exp((1 + m) * log_t)))


def fit_epr(t, w, start=None, n_starts=20, n_steps=400):
    """Fit EPR to the measured curve w (S, Q) at the rates t (Q,) by minimising KL(w || p). Returns theta (S, 6).

    n_starts random starts (always the same ones) and, if given, the previous fit `start` (S, 6); the best wins.
    The authors use L-BFGS; Adam works entry by entry, so here neither starts nor seeds influence each other.
    """
    S, w = w.shape[0], (w / w.sum(-1, keepdim=True))[:, None]
    theta = torch.randn(n_starts, 6, generator=torch.Generator().manual_seed(0), dtype=t.dtype) * 2
    theta = theta.expand(S, -1, -1) if start is None else torch.cat([start[:, None], theta.expand(S, -1, -1)], 1)
    theta = theta.clone().requires_grad_()
    kl = lambda: -(w * epr(theta, t).log_softmax(-1)).sum(-1)  # up to the entropy of w
    with torch.enable_grad():
        optimizer = torch.optim.Adam([theta], lr=0.1, betas=(0.9, 0.99))
        for step in range(n_steps):
            optimizer.param_groups[0]["lr"] = 0.1 * (1 - step / n_steps)
            optimizer.zero_grad()
            kl().sum().backward()
            optimizer.step()
    with torch.no_grad():
        return theta[torch.arange(S), kl().argmin(-1)]


# The law that is really sampled is a table. With s = sqrt(t), the density of s is constant on each of n_cells equal cells:
# p(t) = cell_mass * n_cells / (2 sqrt(t)). Two things follow. The inverse of the CDF is exact, so the weight 1/p(t)
# is that of the density really drawn and E[weight] = 1 to rounding. And within a cell p goes like t^(-1/2), as the
# optimum does at 0, so that for a fitted EPR too the variance has a limit, once eps is far below the first cell's edge, 6e-5.
N_CELLS = 128


def cell_rates(device=None):
    """The rates t at the middle, in sqrt(t), of the table's cells: (N_CELLS,), float64."""
    return ((torch.arange(N_CELLS, dtype=torch.float64, device=device) + 0.5) / N_CELLS).square()


def ppots_table(w):
    """The table of p(t) ∝ w: w (S, N_CELLS), taken at cell_rates(), -> probability of each cell (S, N_CELLS)."""
    return normalised(w * cell_rates(w.device).sqrt())  # dt = 2 s ds


def normalised(mass):
    """Probabilities (S, cells), none of them zero: where p is 0 nothing is ever drawn, and the estimate is biased."""
    mass = mass.clamp(min=1e-30).clamp(min=1e-3 * mass.amax(-1, keepdim=True))
    return mass / mass.sum(-1, keepdim=True)


def ppots_sample(u, table):
    """Inverse CDF: u (S, B) in (0,1] and table (S, n_cells) -> t (S, B) in (0,1] and weight 1/p(t) (S, B)."""
    cell, left, mass = invert_cdf(u, table)
    s = (cell + ((u - left) / mass).clamp(0, 1)) / table.shape[-1]
    return s.square(), 2 * s / (mass * table.shape[-1])


def invert_cdf(u, table):
    """The cell into which u falls, the CDF at its left edge and its mass: three tensors (S, B)."""
    cdf = table.cumsum(-1)
    cell = torch.searchsorted(cdf, u.contiguous()).clamp(max=table.shape[-1] - 1)
    return cell, (cdf - table).gather(-1, cell), table.gather(-1, cell)


# ---------------------------------------------------------------------------------------------------------------
# 4. MIRROR: two masks that make up for each other. Attacks A; TWO passes; unbiased.


def bernoulli_masks(r, p_mask):
    """The plain mask, hidden where r < p_mask. r (..., n) uniform in [0,1) -> (1, ..., n)."""
    return (r < p_mask)[None]


def mirror_masks(r, p_mask):
    """MIRROR: the SAME uniforms r, read from both ends -> two masks (2, ..., n).

    Each mask alone is an ordinary one at rate p_mask, so the mean of their losses is unbiased. For p_mask <= 1/2
    they are disjoint; for p_mask >= 1/2 they cover every token. With rho their losses' correlation given x0 and t,
    Var_m(mean) = Var_m(l)/2 * (1 + rho): A falls by half, and by more where rho < 0. rho <= 0 holds when hiding one more
    token never lowers the summed loss (the two losses are then monotone, in opposite directions, in independent r). That is
    about the loss; for the gradient it is an observation (see --variance), not a theorem. B and C stay.
    The second pass is paid for: compare with two independent masks (`multi2`), twice the batch (`batch2`), twice the
    steps (`steps2`). (A fresh r for the second mask, as in the head of the authors' release, is multi2, not MIRROR.)
    """
    return torch.stack([r < p_mask, r >= 1 - p_mask])


# ---------------------------------------------------------------------------------------------------------------
# 5. The other methods. u is a uniform number in (0,1] that the rate is made of; r are the n of the mask.


def stratify(u, shuffle, strata):
    """StraTS: stratified rates. Attacks B; one pass; unbiased. (Paper; MDLM calls one draw per stratum antithetic.)

    (0,1] is cut into so many strata and the batch into as many equal groups; u (..., B) and shuffle (..., B), a random
    permutation of 0..B-1, decide what falls where. Each u alone stays uniform, so this goes before any inverse CDF.
    """
    return (shuffle % strata + u) / strata


def n_strata(batch_size):
    """The authors take sqrt(batch) strata; here the largest divisor of batch_size not above that, so that the strata are
    equally full (for a prime batch size it is 1, and nothing is stratified)."""
    return max(d for d in range(1, math.isqrt(batch_size) + 1) if batch_size % d == 0)


def low_discrepancy(u, shuffle):
    """One random offset and a comb: (u_0 + i/B) mod 1 for i = 0..B-1, shuffled (and mirrored, to be in (0,1]). Attacks B;
    one pass; unbiased. (VDM, arXiv 2107.00630, appendix I.1; SMDM's evaluation.)"""
    return 1 - (u[..., :1] + shuffle / u.shape[-1]) % 1.0  # in (0,1]


def exact_count(u, table):
    """Exact count: hide exactly k ~ U{1..n} tokens, weight 1/k. Attacks A; one pass; unbiased (for eps = 0).
    (RADD, arXiv 2406.03736; LLaDA's evaluation; PUMA trains with it.)

    Its mean is L since int t^(k-1) (1-t)^(n-k) dt = 1/(k C(n,k)). At eps = 0 its variance is never larger than the plain
    one's: averaging the plain weight 1/t over t given the mask (Rao-Blackwell) leaves (n+1)/k, on k ~ U{0..n}; never
    drawing the useless k = 0 multiplies E[l^2] by n/(n+1). There is no 1/t left, and no eps. (Against a plain loss with
    eps > 0 that is so for each mask while n eps < .26, up to 260 tokens at 1e-3; then k = 1 is the first to cost more.)
    Its rate is k itself. The luck of k given t, part of A before, counts as B now: B is never smaller than the plain
    one's, and only totals should be compared.
    OURS: with t = k/n and the ranks of r in place of r, other methods apply as they are: MIRROR takes the k lowest and
    the k highest ranks (which are not independent: rho <= 0 is no theorem then), StraTS stratifies k, P-POTS draws k
    from a table of p_k with weight 1/(n p_k), optimal, for the loss, when p_k ∝ sqrt(E[(H/k)^2]).

    u (S, B) in (0,1], table (S, n) the probability of each k -> k/n (S, B) and importance weight (S, B).
    """
    k, _, p_k = invert_cdf(u, table)
    return (k + 1).to(u.dtype) / table.shape[-1], 1 / (table.shape[-1] * p_k)


def isad(p_mask, is_rare, delta=0.2):
    """ISAD: hide chosen rare tokens more often. Attacks A on these tokens; one pass; BIASED. (Paper.)

    q = min(p_mask + delta, 1) where is_rare (..., n), and the weight there is 1/q, so every token counts as often as
    before. OURS: that does not make it unbiased. The OTHER tokens are now predicted with the rare ones hidden more
    often, so the contexts are others than those of (2), which shows as soon as a prediction depends on a rare token.
    (The authors' history multiplies by p/q once more, which in addition weighs the rare tokens less.)
    """
    return torch.where(is_rare, (p_mask + delta).clamp(max=1), p_mask)


def clipped(u, beta=0.3, omega=0.8):
    """Clipped rates: t ~ U[beta, omega]. Attacks A; one pass; BIASED: a different mean of g(t).
    (Arriola et al., arXiv 2503.09573, who call their estimate biased; the bounds are among those they use.)"""
    return beta + (omega - beta) * u


@functools.lru_cache
def clipped_weights(n, beta=0.3, omega=0.8, device=None, dtype=torch.float64):
    """OURS: what to put in place of 1/t so that clipped rates are unbiased (`reclipped`): (n+1,), by |m| = 0..n.
    Raises ValueError for n > 16: masks that are frequent under (2), such as a single token, hardly occur here
    when n is large, and their weights grow exponentially (beyond n of about 10 the variance exceeds the plain one's).

    Every mask can occur at some t in [beta, omega], so weigh it by how often it occurs under (2) and how often here:
    int_0^1 t^(k-1) (1-t)^(n-k) dt over the mean over [beta, omega] of t^k (1-t)^(n-k), k = |m|.
    """
    if n > 16:
        raise ValueError(f"reclipped is for responses of up to 16 tokens, not {n}: its variance grows exponentially")
    x, w = gauss_legendre(n // 2 + 1)  # exact for polynomials of degree n
    t, k = beta + (omega - beta) * x, torch.arange(n + 1)
    here = (t ** k[:, None] * (1 - t) ** (n - k[:, None])) @ w
    wanted = 1 / (k.clamp(min=1) * log_choose(n, k).exp())  # at k = 0 there is nothing to weigh
    return (wanted / here).to(dtype).to(device)


@functools.lru_cache
def gauss_legendre(order):
    """Nodes and weights on (0,1), float64, from the Jacobi matrix (Golub and Welsch 1969)."""
    k = torch.arange(1, order, dtype=torch.float64)
    off = k / torch.sqrt(4 * k**2 - 1)
    x, vectors = torch.linalg.eigh(torch.diag(off, 1) + torch.diag(off, -1))
    return (x + 1) / 2, vectors[0].square()


def ema_control_variate(loss, u, ema, rate=0.01):
    """EMA: subtract from each loss a running mean of the losses at similar rates. (Paper; 10 bins, rate 0.01.)

    loss, u (S, B), ema (S, bins), one bin for each equal share of u -> steadier losses (S, B) and the new ema. The
    mean over the bins is added back, so the reported loss keeps its mean. What is subtracted does not depend on the
    parameters: the GRADIENT is unchanged to the last bit, and so is training. It steadies the curve one looks at.
    (The authors' optional coefficient Cov/Var would change the curve once more, and the gradient as little.)
    """
    bins = ema.shape[-1]
    onehot = F.one_hot((u * bins).ceil().long().clamp(1, bins) - 1, bins).to(loss.dtype)  # (S, B, bins)
    steady = loss - (onehot @ ema[..., None]).squeeze(-1) + ema.mean(-1, keepdim=True)
    with torch.no_grad():
        count = onehot.sum(1)
        mean = (onehot * loss[..., None]).sum(1) / count.clamp(min=1)
        return steady, torch.where(count > 0, ema + rate * (mean - ema), ema)


# ---------------------------------------------------------------------------------------------------------------
# 6. A method is a set of ingredients, written with underscores: "ppots_mirror". It is what happens to u (the
# rate), to r (the mask) and to the weight. (Four do something else: syrm masks more positions, ema touches the reported
# loss only, batch2 and steps2 the length of the training; train.py does these.)

INGREDIENTS = {  # name: (attacks, passes, what it does)
    "exactk": ("A", 1, "mask exactly k ~ U{1..n} tokens, weight 1/k (no eps)"),
    "ppots": ("A+B", 1, "draw t (or k) from the law of least variance of the loss"),
    "strats": ("B", 1, "stratified rates over the batch"),
    "lowdisc": ("B", 1, "one-offset low-discrepancy rates over the batch"),
    "isad": ("A", 1, "mask rare tokens more often, weight 1/q; BIASED: other contexts"),
    "syrm": ("-", 1, "mask the prompt's structural symbols too; BIASED: another objective"),
    "clipped": ("A", 1, "t ~ U[0.3, 0.8]; BIASED"),
    "reclipped": ("A", 1, "the same, reweighted to be unbiased (ours); short responses only"),
    "ema": ("-", 1, "control variate on the reported loss; the gradient is unchanged"),
    "multi2": ("A", 2, "control: the mean of two independent masks"),
    "mirror": ("A", 2, "two negatively correlated masks"),
    "batch2": ("A+B+C", 2, "control: twice the batch"),
    "steps2": ("-", 2, "control: twice the steps"),
}
CONFLICTS = [  # each of these groups sets the same thing in different ways
    {"strats", "lowdisc"},
    {"ppots", "clipped", "reclipped"},
    {"exactk", "clipped"},
    {"exactk", "reclipped"},
    {"exactk", "isad"},
    {"reclipped", "isad"},
    {"batch2", "steps2"},
]


def parse_method(name):
    """"pposts_mirror" -> frozenset({"ppots", "mirror"}); "mdm" -> frozenset(); "arm" -> frozenset({"arm"}).
    Raises ValueError, with one line for the user, when the name makes no sense."""
    words = name.strip().lower().replace("pposts", "ppots").split("_")
    method = frozenset(words) - {"mdm"}
    for word in words:
        if word not in INGREDIENTS and word not in ("arm", "mdm"):
            raise ValueError(f"unknown method '{name}': '{word}' is not one of arm, mdm, {', '.join(INGREDIENTS)}")
    if len(words) != len(set(words)):
        raise ValueError(f"method '{name}' names an ingredient twice")
    if "arm" in method and ("mdm" in words or method - {"arm", "batch2", "steps2"}):
        raise ValueError(f"method '{name}' makes no sense: an ARM draws no masks, so 'arm' goes only with batch2 or steps2")
    for group in CONFLICTS:
        if len(group & method) > 1:
            raise ValueError(f"method '{name}' makes no sense: {' and '.join(sorted(group & method))} exclude each other")
    return method


def method_name(method):
    """The one spelling of a method: its ingredients in a fixed order, after "mdm" when none of them is an estimator."""
    words = [] if method - {"batch2", "steps2"} else ["mdm"]
    return "_".join(words + [w for w in ("arm", *INGREDIENTS) if w in method])


def n_masks(method):
    """M, the masks per sequence and step."""
    return 2 ** len(method & {"multi2", "mirror"})


def n_passes(method):
    """The compute of a method, as a multiple of the plain one's forward (and backward) passes."""
    return n_masks(method) * 2 ** len(method & {"batch2", "steps2"})


def draw_rates(method, u, shuffle):
    """The uniform numbers the rates are made of, correlated over the batch if the method says so: (..., B)."""
    if "strats" in method:
        return stratify(u, shuffle, n_strata(u.shape[-1]))
    if "lowdisc" in method:
        return low_discrepancy(u, shuffle)
    return u


def rate(method, u, n, table=None, eps=1e-3):
    """From u (S, B) in (0,1] to p_mask (S, B), or k/n with exactk, and the importance weight (S, B).
    table: P-POTS' law, (S, N_CELLS), or (S, n) with exactk."""
    if "exactk" in method:
        return exact_count(u, torch.full((len(u), n), 1 / n, dtype=u.dtype, device=u.device) if table is None else table)
    if "ppots" in method:
        t, importance = ppots_sample(u, table)
        return rate_to_p_mask(t, eps), importance
    if "clipped" in method or "reclipped" in method:
        return clipped(u), torch.ones_like(u)
    return rate_to_p_mask(u, eps), torch.ones_like(u)


def draw_masks(method, u, r, table=None, eps=1e-3, is_rare=None):
    """Masks and weights of any method, ready for mdm_loss: mask (M, S, B, n) bool, weight (M, S, B, n).

    u (S, B) in (0,1], from draw_rates; r (1, S, B, n) uniform in [0,1), or (2, S, B, n) for multi2 (MIRROR makes two of
    each); table as in rate(); is_rare (S, B, n) bool for isad. Raises ValueError for reclipped with a long response.
    """
    n = r.shape[-1]
    p_mask, importance = (z[..., None] for z in rate(method, u, n, table, eps))
    if "exactk" in method:
        r = (ranks(r) + 0.5) / n
    if "isad" in method:
        p_mask = isad(p_mask, is_rare)
    mask = mirror_masks(r, p_mask) if "mirror" in method else bernoulli_masks(r, p_mask)
    mask = mask.flatten(0, 1)
    if "reclipped" in method:
        weight = clipped_weights(n, device=u.device, dtype=u.dtype)[mask.sum(-1, keepdim=True)]
    else:
        weight = importance / p_mask
    return mask, weight.expand(mask.shape)


def method_loss(model, x0, pos, mask, weight):
    """The loss of each sequence, (S, B), in nats per response token: the mean over the M masks, one forward batch.

    x0 (S, B, T), mask and weight (M, S, B, n).
    """
    mask, weight = mask.transpose(0, 1), weight.transpose(0, 1)  # (S, M, B, n)
    nll = token_nll(model, x0[:, None].expand(-1, mask.shape[1], -1, -1), pos, mask)
    return mdm_loss(nll, mask, weight).mean(1)


def ppots_law(method, counts, H, n, fit="epr", eps=1e-3, start=None):
    """From the pilot's counts and H to the table that draw_masks wants: (table (S, cells), theta or None), float64.

    exactk: p_k ∝ sqrt(E[H^2 | k]) / k. Otherwise equation (4), through the EPR family (fit="epr") or as it was
    measured (fit="grid"). start: the previous theta, if any. Beside MIRROR too p is that of the single mask, as in the
    paper: any p is unbiased; for the pair it is not quite the optimum.
    """
    if "exactk" in method:
        per_token = H.double() / counts[:, None]
        return normalised((per_token.square().mean((1, 3)) @ interpolation(counts, n).T).sqrt()), None
    if fit == "grid":
        return ppots_table(sum(curves(counts, H, cell_rates(H.device), n, eps)).sqrt()), None
    t = torch.arange(1, 64, dtype=torch.float64, device=H.device) / 64
    w = sum(curves(counts, H, t, n, eps)).clamp(min=1e-30).sqrt()
    theta = fit_epr(t, w) if start is None else fit_epr(t, w, start, n_starts=3, n_steps=60)
    return ppots_table(epr(theta, cell_rates(H.device)).softmax(-1)), theta


# ---------------------------------------------------------------------------------------------------------------
# 7. The variance, measured. How noisy is a method at a given model? Equation (3), for the loss and for the gradient.
#
# Exactly, where all 2^n masks can be listed (OURS). Let V_m be what mask m brings: the number H_m = sum_{i in m} nll_i,
# or the vector of its gradient. A method's loss is l = sum_m a_m V_m, where a_m is weight/(n M) for each time m is drawn: it is
# random, but knows neither model nor data. So the moments of l are linear in the Gram matrix K = E_{x0}[V V^T]
# (N x N, N = 2^n), and all that makes a METHOD is in three arrays (<X, K> is the sum of all X_mm' K_mm'):
#
#     E ||l||^2 = <second, K>      E ||E[l | x0,t]||^2 = <given_t, K>      E ||E[l | x0]||^2 = <mean mean^T, K>
#     second = E[a a^T]            given_t = E_t[E[a|t] E[a|t]^T]          mean = E[a]
#
# A and B are the differences of these. C takes K minus the Gram matrix of the mean V over x0. A fourth array, `between`,
# is what rates that are correlated over the batch (strats, lowdisc) take off B.


@dataclass
class Law:
    """A method as quadratic forms over the N = 2^n masks."""

    second: torch.Tensor  # (N, N)
    given_t: torch.Tensor  # (N, N)
    mean: torch.Tensor  # (N,): probability times weight of each mask, so E[l] = mean . V; unbiased: those of (2), at its eps
    between: torch.Tensor  # (N, N): what correlated rates (strats, lowdisc) take off B, as a form in the mean V


def all_masks(n):
    """All 2^n masks (2^n, n), bool."""
    return (torch.arange(2**n)[:, None] >> torch.arange(n)) & 1 == 1


def law_at(method, u, n, table, eps):
    """At the nodes u (Q,): P(m | u) (Q, N), the weight of V_m (Q, N), and p_mask (Q,)."""
    p_mask, importance = (z[0] for z in rate(method, u[None], n, table, eps))
    p, k = p_mask[:, None], all_masks(n).sum(-1)
    P = p**k * (1 - p) ** (n - k)
    if "exactk" in method:
        P = (k == (n * p).round()) / log_choose(n, k).exp()
    weight = clipped_weights(n)[k] if "reclipped" in method else importance[:, None] / p
    return P.to(u), (weight / n).expand(P.shape), p_mask


def mirror_law(p_mask, n):
    """P(m, m' | t) of MIRROR's two masks, by their sizes k, k' and overlap: (Q, n+1, n+1, n+1). A token is in both with
    probability max(2p - 1, 0), in a given one only with min(p, 1 - p), in none with max(1 - 2p, 0)."""
    k = torch.arange(n + 1, dtype=p_mask.dtype)
    both, p = k, p_mask[:, None, None, None]
    one = k[:, None, None] + k[:, None] - 2 * both
    possible = (both <= torch.minimum(k[:, None, None], k[:, None])) & (both + one <= n)
    law = (2 * p - 1).clamp(min=0) ** both * torch.minimum(p, 1 - p) ** one * (1 - 2 * p).clamp(min=0) ** (n - both - one)
    return torch.where(possible, law, 0.0)


def half_rate(method, n, table, eps):
    """The u (1,) at which p_mask passes 1/2, where MIRROR's law has its corner; by bisection."""
    low, high = torch.zeros(1, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
    for _ in range(60):
        middle = (low + high) / 2
        below = rate(method, middle, n, table, eps)[0] < 0.5
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return high[0]


def quadrature(cuts):
    """Gauss-Legendre nodes (Q,) and weights (Q,) on the intervals between the sorted cuts."""
    x, w = gauss_legendre(8)
    return (cuts[:-1, None] + cuts.diff()[:, None] * x).flatten(), (cuts.diff()[:, None] * w).flatten()


def n_rate_groups(method, batch_size):
    """The number of equal parts of (0,1] the differences between which are taken off B: strats' strata, lowdisc's comb, and
    for the loss ema's bins, once converged (not for the gradient: ask for method - {"ema"} there; beside strats or lowdisc
    they are not counted)."""
    if "lowdisc" in method:
        return batch_size
    return n_strata(batch_size) if "strats" in method else 10 if "ema" in method else 1


def exact_law(method, n, table=None, eps=1e-3, batch_size=64):
    """The Law of a method for n response tokens, by quadrature over u; the rates come from the same rate() that
    training uses. table (cells,) float64. Costs 2^n times 500 to 1500 nodes (lowdisc: times batch_size), and 4^n numbers.
    Raises ValueError for isad, whose weights depend on the tokens, and where the variance is infinite: a plain 1/t with
    eps = 0."""
    if "isad" in method:
        raise ValueError("isad's law depends on the tokens: measure it with monte_carlo_variance")
    if eps == 0 and not method & {"exactk", "ppots", "clipped", "reclipped"}:
        raise ValueError("with eps = 0 the variance of the plain loss is infinite")
    if "exactk" in method and table is None:
        table = torch.full((n,), 1 / n, dtype=torch.float64)
    edges = torch.zeros(0, dtype=torch.float64) if table is None else table.cumsum(0)[:-1]
    table = None if table is None else table[None]
    strata = n_rate_groups(method, batch_size)
    dyadic = 0.5 ** torch.arange(60, dtype=torch.float64)  # between these even 1/(t + eps) is smooth
    cuts = torch.cat([torch.arange(strata, dtype=torch.float64) / strata, dyadic, edges, half_rate(method, n, table, eps)]).unique()
    u, du = quadrature(cuts)
    P, weight, p_mask = law_at(method, u, n, table, eps)

    first = weight * P  # E[l | u] = first . V
    mean, given_t = du @ first, (first * du[:, None]).T @ first
    second = (du @ (weight.square() * P)).diag()
    if "mirror" in method:  # l = (l1 + l2)/2, so E l^2 = E l1^2 / 2 + E l1 l2 / 2
        masks, one_of_each = all_masks(n).double(), 2 ** torch.arange(n + 1) - 1  # a mask of each size
        k, overlap = masks.sum(-1).long(), (masks @ masks.T).long()
        pair = mirror_law(p_mask, n)
        if "exactk" in method:  # of all pairs that MIRROR allows, those of k tokens each, equally likely
            pair = pair * (P[:, one_of_each] > 0)[:, :, None, None] * (P[:, one_of_each] > 0)[:, None, :, None]
            pairs = torch.zeros_like(pair[0]).index_put_((k[:, None], k, overlap), torch.ones(1).double(), accumulate=True)
            pair = pair / (pair * pairs).sum((1, 2, 3), keepdim=True)
        w = weight[:, one_of_each]  # a weight depends on the mask's size only
        cross = torch.einsum("q,qkjo,qk,qj->kjo", du, pair, w, w)[k[:, None], k, overlap]
        second = (second + cross) / 2
    if "multi2" in method:  # two independent copies given t
        second = (second + given_t) / 2

    between = torch.zeros_like(second)
    if strata > 1 and "lowdisc" not in method:  # every stratum is there equally often: differences between them are gone
        share = torch.zeros(strata, len(mean), dtype=u.dtype).index_add_(0, (u * strata).long(), first * du[:, None])
        between = strata * share.T @ share - torch.outer(mean, mean)
    if "lowdisc" in method:  # given the offset no rate is random; left over is how the comb's mean moves with it
        period = torch.tensor([1 / strata], dtype=u.dtype)
        offset, d_offset = quadrature(torch.cat([cuts % period, period]).unique())
        comb = (offset[:, None] + torch.arange(strata, dtype=u.dtype) / strata).flatten()
        P, weight, _ = law_at(method, comb, n, table, eps)
        comb = (weight * P).view(len(offset), strata, -1).mean(1) - mean
        between = given_t - torch.outer(mean, mean) - strata**2 * (comb * d_offset[:, None]).T @ comb
    return Law(second, given_t, mean, between)


def sample_gradients(model, s, x0, pos, mask, weight):
    """Loss (N,) and gradient (N, P) of each of N samples, x0 (N, T), mask and weight (N, n), for seed s of the model.

    The seed axis does the work: N copies of one model, each given one sample, have one gradient each.
    """
    params = {k: p[s].detach().expand(len(x0), *p[s].shape).requires_grad_() for k, p in model.named_parameters()}
    net = lambda idx, at: torch.func.functional_call(model, params, (idx, at))
    net.config = model.config
    loss = mdm_loss(token_nll(net, x0[:, None], pos, mask[:, None]), mask[:, None], weight[:, None])[:, 0]
    return loss.detach(), torch.cat([g.flatten(1) for g in torch.autograd.grad(loss.sum(), list(params.values()))], 1)


def grams(model, x0, pos, s=0, chunk=128):
    """What exact_variance needs of model and data, for the loss and for the gradient: the pairs (K, K of the mean V),
    each (N, N) float64 with N = 2^n masks, or N = 1 for an ARM. x0 (X, T) is taken as the whole data set.

    One sequence at a time: memory holds 2^n gradients, however many sequences there are.
    """
    n, causal = len(pos), model.config.causal
    masks = (torch.ones(1, n) > 0 if causal else all_masks(n)).to(x0.device)
    total, means = [0.0, 0.0], [0.0, 0.0]
    for x in x0:
        weight = torch.full((1, n), 1.0 if causal else n, device=x.device)  # the ARM's loss is the mean, V_m a sum
        parts = [sample_gradients(model, s, x.expand(len(m), -1), pos, m, weight.expand(m.shape)) for m in masks.split(chunk)]
        for i, V in enumerate(torch.cat(part) for part in zip(*parts)):
            V = (V.cpu() if V.device.type == "mps" else V).double().reshape(len(masks), -1)  # mps knows no float64
            total[i], means[i] = total[i] + V @ V.T / len(x0), means[i] + V / len(x0)
    return [(K.cpu(), (V @ V.T).cpu()) for K, V in zip(total, means)]


def exact_variance(law, K, K_mean):
    """A, B, C and their total per sequence, of a Law (None for an ARM), and the mean (of the loss, or the norm of the
    mean gradient), from one pair of grams(). A batch of b sequences has 1/b of it (strats, lowdisc: for the batch_size that
    exact_law was given)."""
    if law is None:
        return {"A": 0.0, "B": 0.0, "C": float(K - K_mean), "total": float(K - K_mean), "mean": float(K_mean) ** 0.5}
    A = (law.second - law.given_t).mul(K).sum()
    B = (law.given_t - torch.outer(law.mean, law.mean)).mul(K).sum() - law.between.mul(K_mean).sum()
    C = law.mean @ (K - K_mean) @ law.mean
    mean = (law.mean @ K_mean @ law.mean).sqrt()
    return {k: float(v) for k, v in dict(A=A, B=B, C=C, total=A + B + C, mean=mean).items()}


def variance_table(rows):
    """Text of rows {"method", "passes", "loss", "gradient"}, the last two as exact_variance gives them; a row that was
    sampled has "gradient_error" too."""
    base = {row["method"]: row for row in rows}.get("mdm", rows[0])["gradient"]["total"]
    parts, extra = ["A", "B", "C", "total"], ["ratio", "x passes"]
    extra += ["+-"] if any("gradient_error" in row for row in rows) else []
    lines = [f"{'':30}{'loss':^40}{'gradient':^40}", f"{'method':23}passes " + "".join(f"{h:>10}" for h in parts * 2 + extra)]
    for row in rows:
        ratio = row["gradient"]["total"] / base
        values = [row[of][k] for of in ("loss", "gradient") for k in parts] + [ratio, ratio * row["passes"]]
        values += [row["gradient_error"]["total"] / base] if "gradient_error" in row else []
        lines += [f"{row['method']:23}{row['passes']:^6} " + "".join(f"{v:10.3g}" for v in values)]
    return "\n".join(lines + ["+-: standard error of the ratio, where the row was sampled and not exact"] * (len(extra) > 2))


def monte_carlo_variance(model, x0, pos, method, generator, table=None, eps=1e-3, is_rare=None, s=0, batch_size=64,
                         n_rates=6, n_repeats=2, n_bootstrap=200):  # fmt: skip
    """The same by sampling, for responses of any length and sequences drawn at random: a nested analysis of variance.

    For each x0 (X, T) n_rates rates, for each rate n_repeats masks (M each), drawn by draw_masks. With W the variance
    within a rate, R that of the rates' means, D that of the sequences' means: A = W, B = R - W/n_repeats,
    C = D - R/n_rates, each unbiased. (But lowdisc, and strata beyond 16, are taken for 16 strata; and for ema only the
    loss's B is meant, see n_rate_groups.) is_rare (X, n) bool for isad. Returns (loss, gradient), each {"A", "B", "C",
    "total", "mean": (estimate, standard error)}, the error from a bootstrap over x0. Memory: X gradients for each of the
    strata.
    """
    X, n, arm = len(x0), len(pos), model.config.causal
    strata = min(n_rate_groups(method, batch_size), 16)
    within, rates, parts = [[], []], [[], []], [[], []]
    for i, x in enumerate(x0):
        u = 1 - torch.rand(1, 1 if arm else n_rates, generator=generator)
        if arm:
            mask, weight = torch.ones(1, 1, n, dtype=torch.bool), torch.ones(1, 1, n)
        else:
            r = torch.rand(2 if "multi2" in method else 1, 1, n_rates * n_repeats, n, generator=generator)
            rare = None if is_rare is None else is_rare[i].expand(r.shape[1:])
            mask, weight = (z[:, 0] for z in draw_masks(method, u.repeat_interleave(n_repeats, 1), r, table, eps, rare))
        flat = [z.flatten(0, 1).to(x.device) for z in (mask, weight)]
        group = F.one_hot(((u[0] * strata).ceil().long() - 1).clamp(0, strata - 1), strata).double()
        for out, v in enumerate(sample_gradients(model, s, x.expand(len(flat[0]), -1), pos, *flat)):
            v = v.cpu().double().view(len(mask), u.shape[1], -1, v[0].numel()).mean(0)  # (rates, repeats, P)
            cell = v.mean(1)
            within[out].append(0.0 if arm else v.var(1).sum(-1).mean().item())
            rates[out].append(0.0 if arm else cell.var(0).sum().item())
            parts[out].append((group.T @ cell / len(cell)).float())  # (strata, P), their sum is the sequence's mean
    results = []
    for W, R, V in zip(within, rates, parts):
        W, R, V = torch.tensor(W), torch.tensor(R), torch.stack(V, 1).double()  # V (strata, X, P)
        K_strata = torch.stack([v @ v.T for v in V])
        V = V.sum(0)
        K_mean = V @ V.T

        def components(c):
            """From the number of times c (X,) that each sequence counts; a pair is never a sequence with itself."""
            pairs = lambda K: (K @ c @ c - K.diagonal(dim1=-2, dim2=-1) @ c.square()) / (c.sum() ** 2 - c.square().sum())
            w, r = (W * c).mean(), (R * c).mean()
            between = 0.0 if strata == 1 else strata * sum(pairs(K) for K in K_strata) - pairs(K_mean)
            B, C = r - w / n_repeats - between, (K_mean.diagonal() * c).mean() - pairs(K_mean) - r / n_rates
            return torch.stack([w, B, C, w + B + C, pairs(K_mean).clamp(min=0).sqrt()])

        draws = torch.randint(X, (n_bootstrap, X), generator=torch.Generator().manual_seed(0))
        spread = torch.stack([components(torch.bincount(d, minlength=X).double()) for d in draws]).std(0)
        estimate = components(torch.ones(X, dtype=torch.float64))
        results.append({k: (float(e), float(se)) for k, e, se in zip(("A", "B", "C", "total", "mean"), estimate, spread)})
    return results


# ---------------------------------------------------------------------------------------------------------------
# 8. Generation.


@torch.no_grad()
def generate(model, x, pos, steps=None, temperature=0.0, order="confidence", generator=None):
    """Fill in the mask tokens of x (S, B, T) at the positions pos (n,), and yield x after every step.

    MDM: each step predicts all masked tokens and keeps some: the surest first (order="confidence"), or "left" to right,
    or "random". steps (default: one token a step) spreads them evenly. Tokens that are given stay as they are, wherever
    they stand. ARM: one token a step, left to right. temperature 0 takes the likeliest token.
    """
    mask_id = model.config.vocab_size
    noise = lambda shape: torch.rand(shape, generator=generator, device=x.device).clamp(1e-20)
    steps = len(pos) if model.config.causal or steps is None else min(steps, len(pos))
    for step in range(steps):
        at = pos[step : step + 1] if model.config.causal else pos
        logits = model(x[..., :-1], at - 1) if model.config.causal else model(x, at)
        noisy = logits  # with Gumbel noise its argmax is a sample of softmax(logits / temperature)
        if temperature > 0:
            noisy = logits / temperature - (-noise(logits.shape).log()).log()
        token = noisy.argmax(-1)
        confidence = logits.log_softmax(-1).gather(-1, token[..., None])[..., 0]
        masked = x[..., at] == mask_id
        if order == "left":
            confidence = -at.to(confidence).expand_as(confidence)
        elif order == "random":
            confidence = noise(confidence.shape)
        confidence = confidence.masked_fill(~masked, -torch.inf)
        steps_left = 1 if model.config.causal else steps - step
        keep = (masked.sum(-1, keepdim=True) / steps_left).ceil()  # so that the last step leaves none
        chosen = masked & (ranks(-confidence) < keep)
        x = x.clone()
        x[..., at] = torch.where(chosen, token, x[..., at])
        yield x


def nll_masks(n, X, generator, strata=8, all_up_to=6):
    """The masks of the validation bound, the same for every method, by exact counts: mask (X, R, n), weight (X, R, n);
    the sum over R of mdm_loss estimates the bound of each of X sequences.

    n <= all_up_to: all masks but the empty one, so that it is exact. Else R = strata: draw_masks with exactk, one count from
    each stratum for every sequence.
    """
    if n <= all_up_to:
        mask = all_masks(n)[1:].expand(X, -1, -1)
        k = mask.sum(-1, keepdim=True)
        return mask, (1 / (k * log_choose(n, k).exp())).float().expand(mask.shape)
    u = (torch.arange(strata) + 1 - torch.rand(X, strata, generator=generator)) / strata
    mask, weight = draw_masks(frozenset({"exactk"}), u, torch.rand(1, X, strata, n, generator=generator))
    return mask[0], weight[0] / strata


def demo():
    """The paper's theory in two tables, for an untrained model on toy sequences."""
    x0 = torch.randint(10, (16, 10), generator=torch.Generator().manual_seed(0))
    x0[:, 6:] = (x0[:, :4] + x0[:, 2:6]) % 10  # six digits, and four sums of them
    pos, n = torch.arange(6, 10), 4
    arm, model = (GPT(GPTConfig(10, 10, causal=causal), [torch.Generator().manual_seed(0)]) for causal in (True, False))
    K_arm, K_mdm = grams(arm, x0, pos), grams(model, x0, pos)
    pilot = measure_counts(model, x0[None], pos, torch.rand(1, 16, n, 4, n, generator=torch.Generator().manual_seed(1)))

    def law(name, eps=1e-3, fit="epr"):
        method = parse_method(name)
        return exact_law(method, n, ppots_law(method, *pilot, n, fit, eps)[0][0] if "ppots" in method else None, eps)

    print("Variance of the training loss and of its gradient, untrained model, exact over all masks and rates, per sequence.")
    print("A masking pattern, B masking rate, C data. ratio: the gradient's total to mdm's; x passes: times the passes it takes.\n")
    rows = []
    for name in "arm mdm ppots mirror ppots_mirror multi2 strats exactk exactk_mirror".split():
        loss, gradient = (exact_variance(None if name == "arm" else law(name), *K) for K in (K_arm if name == "arm" else K_mdm))
        rows.append({"method": name, "passes": n_masks(parse_method(name)), "loss": loss, "gradient": gradient})
    print(variance_table(rows))

    epsilons = [1e-2, 1e-3, 1e-4, 1e-5, 1e-6]
    print("\nThe loss's total variance as eps -> 0: without bound, like log(1/eps), for mdm; under the fitted EPR until eps is far")
    print("below the table's first cell, 6e-5; settled under the law as it was measured, and for exact counts.\n")
    print(f"{'eps':22}" + "".join(f"{eps:10.0e}" for eps in epsilons))
    for label, name, fit in [("mdm", "mdm", ""), ("ppots, EPR", "ppots", "epr"), ("ppots, as measured", "ppots", "grid"), ("exactk", "exactk", "")]:
        print(f"{label:22}" + "".join(f"{exact_variance(law(name, eps, fit), *K_mdm[0])['total']:10.4g}" for eps in epsilons))


if __name__ == "__main__":
    demo()
