"""Every estimator against brute force: a model of 3 response tokens over a 3-letter alphabet, in float64, where all masks,
all rates and all permutations can be gone through by calling the very sampler that training uses."""
import itertools
import math

import numpy as np
import pytest
import torch

import mdm
from mdm import GPT, GPTConfig, parse_method

N, T, X = 3, 5, 4  # response tokens, block_size, sequences
POS = torch.arange(2, T)
EPS = 1e-2
TABLE_T = torch.linspace(1, 3, mdm.N_CELLS, dtype=torch.float64)[None] / torch.linspace(1, 3, mdm.N_CELLS).sum().double()
TABLE_K = torch.tensor([[0.5, 0.2, 0.3]], dtype=torch.float64)
UNBIASED = ["mdm", "ppots", "mirror", "ppots_mirror", "multi2", "multi2_mirror", "reclipped", "reclipped_mirror", "exactk",
            "exactk_ppots", "exactk_mirror", "exactk_ppots_mirror", "exactk_multi2"]  # fmt: skip
BATCHED = ["strats", "lowdisc", "ppots_strats_mirror", "ppots_lowdisc", "exactk_strats", "exactk_lowdisc", "exactk_strats_mirror"]
BIASED = ["clipped", "clipped_mirror", "isad", "ppots_isad_mirror"]


@pytest.fixture(scope="module")
def toy():
    """A model, four sequences, and for each sequence and mask: S_m (X, 8) and its gradient (X, 8, P), one backward each."""
    model = GPT(GPTConfig(3, T, n_layer=1, n_head=2, n_embd=4), [torch.Generator().manual_seed(0)]).double()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.5, generator=torch.Generator().manual_seed(p.numel()))
    x0 = torch.tensor([[0, 1, 2, 0, 1], [1, 1, 0, 0, 2], [2, 0, 1, 2, 2], [0, 2, 1, 1, 0]])
    sums, grads, nlls = [], [], []
    for x in x0:
        for mask in mdm.all_masks(N):
            nll = mdm.token_nll(model, x[None, None], POS, mask[None, None])[0, 0]
            model.zero_grad()
            S = (nll * mask).sum()
            S.backward()
            sums.append(S.item())
            nlls.append(nll.detach())
            grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    return model, x0, torch.tensor(sums, dtype=torch.float64).view(X, 8), torch.stack(grads).view(X, 8, -1), torch.stack(nlls).view(X, 8, N)


def table_of(method):
    return None if "ppots" not in method else TABLE_K if "exactk" in method else TABLE_T


def nodes(method):
    """Gauss-Legendre nodes on (0,1], fine enough for 1/(t + eps) and cut where the sampler's law has a corner."""
    table = torch.full((1, N), 1 / N, dtype=torch.float64) if "exactk" in method and "ppots" not in method else table_of(method)
    cuts = {0.0, 1.0, *(0.5**j for j in range(14)), *(i / 4 for i in range(4)), *([] if table is None else table[0].cumsum(0)[:-1].tolist())}
    x, w = np.polynomial.legendre.leggauss(12)
    edges = np.array(sorted(cuts | {half(method, table)}))
    u = (edges[:-1, None] + np.diff(edges)[:, None] * (x + 1) / 2).ravel()
    return torch.tensor(u), torch.tensor((np.diff(edges)[:, None] * w / 2).ravel())


def half(method, table):
    """Where p_mask = 1/2, a corner of MIRROR's law, from each sampler's own formula."""
    t = (0.5 - EPS) / (1 - EPS)
    if "exactk" in method:
        return 0.5
    if "ppots" in method:
        cdf, s = torch.cat([torch.zeros(1), table[0].cumsum(0)]).double(), math.sqrt(t) * mdm.N_CELLS
        return (cdf[int(s)] + (s - int(s)) * table[0, int(s)]).item()
    return (0.5 - 0.3) / 0.5 if method & {"clipped", "reclipped"} else t


def patterns(method, p):
    """All that the uniforms r of one sequence can do at rates p (n,) : a list of (r (copies, n), probability)."""
    if "exactk" in method:
        one = [([(i + 0.5) / N for i in perm], 1 / math.factorial(N)) for perm in itertools.permutations(range(N))]
    else:
        tokens = []
        for q in p:
            edges = sorted({0.0, q, 1 - q, 1.0})
            tokens.append([((a + b) / 2, b - a) for a, b in zip(edges, edges[1:]) if b > a])
        one = [([r for r, _ in c], math.prod(w for _, w in c)) for c in itertools.product(*tokens)]
    copies = 2 if "multi2" in method else 1
    return [([r for r, _ in c], math.prod(w for _, w in c)) for c in itertools.product(one, repeat=copies)]


def outcomes(method, rare=None):
    """Everything one draw can be: (probability of the node du, [(probability, masks (M, n), weights (M, n))]) for each u."""
    method, table = parse_method(method), table_of(parse_method(method))
    for u, du in zip(*nodes(method)):
        p = mdm.rate(method, u.view(1, 1), N, table, EPS)[0].view(1).expand(N)
        p = mdm.isad(p, rare) if "isad" in method else p
        cases = patterns(method, p.tolist())
        r = torch.tensor([r for r, _ in cases], dtype=torch.float64).transpose(0, 1)[:, None]  # (copies, 1, cases, n)
        is_rare = None if rare is None else rare.expand(r.shape[1:])
        mask, weight = mdm.draw_masks(method, u.expand(1, len(cases)), r, table, EPS, is_rare)
        yield u, du, torch.tensor([w for _, w in cases], dtype=torch.float64), mask[:, 0], weight[:, 0]


def index(mask):
    return (mask.long() * 2 ** torch.arange(N)).sum(-1)


def brute_force(method, V):
    """E[l | u] (Q, X, P), E|l|^2 given u (Q, X) and du (Q,), from V (X, 8, P), outcome by outcome."""
    given_u, second, du = [], [], []
    for _, d, prob, mask, weight in outcomes(method):
        assert prob.sum().item() == pytest.approx(1, abs=1e-12)
        scalar = weight[..., 0] / N  # no method here weighs tokens of one mask differently
        loss = (scalar[..., None] * V[:, index(mask)]).mean(1)  # (X, cases, P), the mean over the M masks
        given_u.append((prob[:, None] * loss).sum(1))
        second.append((prob * loss.square().sum(-1)).sum(1))
        du.append(d)
    return torch.stack(given_u), torch.stack(second), torch.stack(du)


def components(method, V):
    given_u, second, du = brute_force(method, V)
    mean = torch.einsum("q,qxp->xp", du, given_u)
    A = (du @ (second - given_u.square().sum(-1))).mean()
    B = (du @ given_u.square().sum(-1) - mean.square().sum(-1)).mean()
    C = (mean - mean.mean(0)).square().sum(-1).mean()
    return A.item(), B.item(), C.item(), mean, (du @ second).mean().item()


def objective(eps):
    """The weight of each mask in equation (2), (8,): Beta integrals for eps = 0, else over p_mask in (eps, 1)."""
    k = mdm.all_masks(N).sum(-1).numpy()
    x, w = np.polynomial.legendre.leggauss(40)
    p = eps + (1 - eps) * (x + 1) / 2
    weight = (w / 2 * p ** (k[:, None] - 1.0) * (1 - p) ** (N - k[:, None])).sum(-1) / N
    return torch.tensor(np.where(k > 0, weight, 0.0))


def test_objective_is_the_beta_integral():
    for k, weight in zip(mdm.all_masks(N).sum(-1).tolist(), objective(0.0).tolist()):
        if k:
            assert weight == pytest.approx(1 / (N * k * math.comb(N, k)), rel=1e-12)


@pytest.mark.parametrize("method", UNBIASED)
def test_exact_variance_is_brute_force(method, toy):
    """Mean, A, B and C of loss and gradient agree with outcome-by-outcome enumeration to 1e-10, and they add up."""
    model, x0, sums, grads, _ = toy
    m = parse_method(method)
    table = table_of(m)
    law = mdm.exact_law(m, N, None if table is None else table[0], EPS)
    eps = 0.0 if m & {"exactk", "reclipped"} else EPS
    torch.testing.assert_close(law.mean[1:], objective(eps)[1:], rtol=1e-10, atol=0)  # the same expectation as (2)
    for (K, K_mean), V in zip(mdm.grams(model, x0, POS), (sums[..., None], grads)):
        A, B, C, mean, second = components(method, V)
        got = mdm.exact_variance(law, K, K_mean)
        assert (got["A"], got["B"], got["C"]) == pytest.approx((A, B, C), rel=1e-10, abs=1e-12 * second)
        assert got["mean"] == pytest.approx(mean.mean(0).norm().item(), rel=1e-10)
        assert got["total"] == pytest.approx(second - mean.mean(0).square().sum().item(), rel=1e-10)  # total variance


@pytest.mark.parametrize("method", BATCHED)
def test_correlated_rates(method, toy):
    """strats and lowdisc: B times the variance of a batch's mean, from the definition of how a batch's u are drawn."""
    model, x0, sums, _, _ = toy
    batch_size, m = 4, parse_method(method)
    table = table_of(m)
    base = "_".join(sorted(m - {"strats", "lowdisc"})) or "mdm"
    u, given_u, second = refined(base, sums[..., None], batch_size)
    pop, pop_second = given_u.mean(1)[:, 0], second.mean(1)  # over sequences too: E[l | u], E[l^2 | u]
    du = u[1]
    if "strats" in m:  # two strata, two draws in each
        stratum = (u[0] * 2).long()
        variance = sum(2 * (du * pop_second)[stratum == j].sum() - (2 * (du * pop)[stratum == j].sum()) ** 2 for j in range(2)) / 2
    else:  # u_0 in (0, 1/4), then u_0 + i/4: conditionally independent sequences, and the moving mean of the comb
        inside = du @ (pop_second - pop**2)
        combs = pop.view(4, -1).mean(0)
        d0 = du[: len(combs)] * 4
        variance = inside + 4 * (d0 @ combs**2 - (d0 @ combs) ** 2)
    law = mdm.exact_law(m, N, None if table is None else table[0], EPS, batch_size=batch_size)
    got = mdm.exact_variance(law, *mdm.grams(model, x0, POS)[0])
    assert got["total"] == pytest.approx(variance.item(), rel=1e-9)


def refined(method, V, parts):
    """brute_force on nodes that repeat with period 1/parts, so that a comb of rates can be read off them."""
    m = parse_method(method)
    u, _ = nodes(m)
    table = torch.full((1, N), 1 / N, dtype=torch.float64) if "exactk" in m and "ppots" not in m else table_of(m)
    cuts = {0.0, *(0.5**j for j in range(2, 16)), *([] if table is None else (table[0].cumsum(0)[:-1] % (1 / parts)).tolist()), half(m, table) % (1 / parts)}
    x, w = np.polynomial.legendre.leggauss(12)
    edges = np.array(sorted(c for c in cuts if c <= 1 / parts))
    u0 = (edges[:-1, None] + np.diff(edges)[:, None] * (x + 1) / 2).ravel()
    du0 = (np.diff(edges)[:, None] * w / 2).ravel()
    u = torch.tensor(np.concatenate([u0 + i / parts for i in range(parts)]))
    du = torch.tensor(np.concatenate([du0] * parts))
    original = globals()["nodes"]
    globals()["nodes"] = lambda _: (u, du)
    try:
        given_u, second, _ = brute_force(method, V)
    finally:
        globals()["nodes"] = original
    return (u, du), given_u, second


@pytest.mark.parametrize("method", BIASED)
def test_biased_methods_are_biased_and_say_so(method, toy):
    """clipped and isad do not have the mean of (2), not even with 1/q; and --help says it."""
    *_, nlls = toy
    rare, eps = torch.tensor([True, False, False]), 0.0 if "clipped" in method else EPS
    wanted = torch.stack([objective(eps) @ (nlls[x] * mdm.all_masks(N)).sum(-1) for x in range(X)])
    got = torch.zeros(X, dtype=torch.float64)
    for _, du, prob, mask, weight in outcomes(method, rare if "isad" in method else None):
        loss = mdm.mdm_loss(nlls[:, index(mask)], mask, weight).mean(1)  # (X, cases)
        got += du * (loss @ prob)
    assert (got - wanted).abs().max() > 1e-4 * wanted.abs().max()  # brute force is exact to 1e-10
    assert any("BIASED" in mdm.INGREDIENTS[word][2] for word in parse_method(method))


def test_isad_weighs_every_token_fully(toy):
    """What 1/q does achieve: each token's expected weight is 1, so a model blind to its context sees no bias."""
    total = torch.zeros(N, dtype=torch.float64)
    for _, du, prob, mask, weight in outcomes("isad", torch.tensor([True, False, False])):
        total += du * torch.einsum("c,mcn->n", prob, mask * weight)
    torch.testing.assert_close(total, torch.ones(N, dtype=torch.float64), rtol=1e-10, atol=0)


def test_exact_count_is_rao_blackwell(toy):
    """Against the plain loss with the same mean (eps -> 0): never more variance, whatever the model."""
    exactk = mdm.exact_law(parse_method("exactk"), N)
    for eps in (1e-4, 1e-8):
        plain = mdm.exact_law(frozenset(), N, eps=eps)
        torch.testing.assert_close(plain.mean[1:], exactk.mean[1:], rtol=20 * eps, atol=0)
        gap = plain.second - exactk.second  # as the means agree, Var(plain) - Var(exactk) = <gap, K>, K any Gram matrix
        assert torch.linalg.eigvalsh(gap)[0] > -20 * eps * exactk.second.max()


def test_variance_of_the_plain_loss_grows_like_log_eps(toy):
    """h(t) ~ c/t with c from the one-token masks: each power of ten in eps adds c ln 10. P-POTS (grid) settles."""
    model, x0, sums, _, _ = toy
    K = mdm.grams(model, x0, POS)[0]
    one = mdm.all_masks(N).sum(-1) == 1
    c = (sums[:, one].square().sum(1) / N**2).mean().item()
    total = lambda method, eps, table=None: mdm.exact_variance(mdm.exact_law(parse_method(method), N, table, eps), *K)["total"]
    plain = [total("mdm", 10.0**-e) for e in range(4, 9)]
    assert np.diff(plain) == pytest.approx(c * math.log(10), rel=1e-2)
    w = torch.stack([second_moment(sums, t) for t in mdm.cell_rates().tolist()]).sqrt()
    table = mdm.ppots_table(w[None])[0]
    ppots = [total("ppots", 10.0**-e, table) for e in range(4, 9)]
    steps = np.diff(ppots)
    assert steps[0] < 0.03 * c * math.log(10) and (steps[1:] < 0.4 * steps[:-1]).all()  # a geometric series: it converges


def second_moment(sums, t):
    """E[l^2 | t] over the toy's sequences, by enumeration: h(t) of equation (4)."""
    k = mdm.all_masks(N).sum(-1).double()
    return ((t ** (k - 2) * (1 - t) ** (N - k))[1:] * sums[:, 1:].square() / N**2).sum(1).mean()


def test_pilot_measures_the_exact_curve(toy):
    """E[l^2 | t] is exact when each count sees all its masks; g^2 and v are unbiased (mean of g^2, not square of mean)."""
    _, _, sums, _, _ = toy
    t = torch.tensor([0.05, 0.3, 0.5, 0.9, 1.0], dtype=torch.float64)
    k = mdm.all_masks(N).sum(-1)
    by_count = torch.stack([sums[:, k == c].repeat(1, 3 // (k == c).sum()) for c in (1, 2, 3)], 1)[None]  # (1, X, 3, 3)
    counts = torch.arange(1, N + 1)
    g2, v = mdm.curves(counts, by_count, t, N, eps=0.0)
    torch.testing.assert_close((g2 + v)[0], torch.stack([second_moment(sums, s) for s in t.tolist()]), rtol=1e-12, atol=0)
    P = t[:, None] ** k * (1 - t[:, None]) ** (N - k)
    exact = ((P @ sums.T) / (N * t[:, None])).square().mean(1)
    draws = torch.randint(3, (4000, X, 3, 2), generator=torch.Generator().manual_seed(0))
    g2, _ = mdm.curves(counts, by_count.expand(4000, -1, -1, -1).gather(3, draws), t, N, eps=0.0)
    assert ((g2.mean(0) - exact).abs() < 4 * g2.std(0) / 4000**0.5 + 1e-12).all()


def test_pilot_masks_have_exact_counts(toy):
    model, x0, sums, _, _ = toy
    r = torch.rand(1, X, N, 5, N, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    counts, got = mdm.measure_counts(model, x0[None], POS, r)
    assert counts.tolist() == [1, 2, 3]
    torch.testing.assert_close(got[0, :, 2, 0], sums[:, 7], rtol=1e-10, atol=0)  # all three hidden
    for x in range(X):
        assert all(min(abs(s - sums[x, mdm.all_masks(N).sum(-1) == 1])) < 1e-10 for s in got[0, x, 0])


def test_interpolation_is_exact_on_straight_lines():
    for n, n_counts in [(4, 4), (13, 13), (64, 16), (64, 2), (1, 1)]:
        counts = torch.linspace(1, n, n_counts).round().long()
        line = 2.0 + 3.0 * counts.double()
        torch.testing.assert_close(mdm.interpolation(counts, n) @ line, 2.0 + 3.0 * torch.arange(1, n + 1).double())


# ---- P-POTS


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_ppots_weight_is_the_density_really_sampled(dtype, tolerance):
    """E[1/p(t)] = 1, by quadrature in u; and t is distributed as the weight says: du/dt = p(t)."""
    for table in (TABLE_T, mdm.ppots_table(mdm.cell_rates()[None] + 0.01)):
        edges = torch.cat([torch.zeros(1, dtype=torch.float64), table[0].cumsum(0)])
        x, w = np.polynomial.legendre.leggauss(4)
        u = (edges[:-1, None] + edges.diff()[:, None] * torch.tensor((x + 1) / 2)).flatten()
        du = (edges.diff()[:, None] * torch.tensor(w / 2)).flatten()
        t, weight = mdm.ppots_sample(u[None].to(dtype), table.to(dtype))
        assert (weight[0].double() @ du).item() == pytest.approx(1, abs=tolerance)
        assert 0 <= t.min() and t.max() <= 1 and (t[0].diff() >= 0).all()
    # inside a cell, the slope of t(u) is the weight
    for at in (0.1, 0.5, 0.9):
        t, weight = mdm.ppots_sample(torch.tensor([[at - 1e-6, at, at + 1e-6]], dtype=torch.float64), TABLE_T)
        assert ((t[0, 2] - t[0, 0]) / 2e-6).item() == pytest.approx(weight[0, 1].item(), rel=1e-5)


def test_ppots_reaches_both_ends():
    t, _ = mdm.ppots_sample(torch.tensor([[1e-9, 1.0]], dtype=torch.float64), TABLE_T)
    assert t[0, 0] < 1e-12 and t[0, 1] == 1.0


@pytest.mark.parametrize("true", [[1.0, -1.0, 0.5, 0.0, 1.0, 0.5], [-2.0, 2.0, -1.0, 1.0, 3.0, 0.0], [3.0, 1.0, 1.5, 0.0, -1.0, 2.0]])
def test_epr_recovers_its_own_family(true):
    t = torch.arange(1, 64, dtype=torch.float64) / 64
    theta = torch.tensor([true], dtype=torch.float64)
    p = mdm.epr(theta, t).softmax(-1)
    fit = mdm.epr(mdm.fit_epr(t, p), t)
    kl = (p * (p.log() - fit.log_softmax(-1))).sum()
    assert kl < 1e-5
    assert (p * (p.log() - math.log(1 / 63))).sum() > 100 * kl  # and the curve was not flat to begin with


def test_epr_formula():
    theta = torch.tensor([0.3, -0.4, 0.1, 0.2, -0.5, 0.7], dtype=torch.float64)
    a, b, k, r, q, m = torch.nn.functional.softplus(theta).tolist()
    for t in (0.1, 0.5, 0.9):
        p = math.sqrt(a * t ** (1 + r) + b * (1 - t) ** (1 + q) + math.exp(k * t ** (1 + m)) ** 2)
        assert mdm.epr(theta, torch.tensor([t], dtype=torch.float64)).exp().item() == pytest.approx(p)


@pytest.mark.parametrize("fit", ["epr", "grid"])
def test_fitted_law_beats_uniform(fit, toy):
    """At the model it was measured on, P-POTS' exact variance is lower than the plain one; so is the one over counts."""
    model, x0, _, _, _ = toy
    K = mdm.grams(model, x0, POS)[0]
    r = torch.rand(1, X, N, 64, N, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    counts, got = mdm.measure_counts(model, x0[None], POS, r)
    total = lambda m, table: mdm.exact_variance(mdm.exact_law(m, N, table), *K)["total"]
    for name in ("ppots", "exactk_ppots"):
        m = parse_method(name)
        table, _ = mdm.ppots_law(m, counts, got, N, fit)
        assert table.sum().item() == pytest.approx(1)
        assert total(m, table[0]) < total(m - {"ppots"}, None)
    if fit == "grid":  # and it is the optimum: any other table does worse
        table, _ = mdm.ppots_law(parse_method("ppots"), counts, got, N, fit)
        for seed in range(5):
            other = table * (1 + 0.3 * torch.rand(table.shape, generator=torch.Generator().manual_seed(seed)).double())
            assert total(parse_method("ppots"), table[0]) < total(parse_method("ppots"), (other / other.sum())[0])


# ---- MIRROR


def check_mirror(masks_of):
    """Each mask alone is Bernoulli(p); disjoint for p <= 1/2; covering for p >= 1/2."""
    r = torch.rand(200_000, 2, generator=torch.Generator().manual_seed(0))
    for p in (0.1, 0.5, 0.7, 1.0):
        first, second = masks_of(r, torch.tensor(p))
        for mask in (first, second):
            assert abs(mask.float().mean().item() - p) < 4 * math.sqrt(p * (1 - p) / mask.numel()) + 1e-9
        if p <= 0.5:
            assert not (first & second).any()
        if p >= 0.5:
            assert (first | second).all()


def test_mirror_masks():
    check_mirror(mdm.mirror_masks)


def test_independent_masks_are_not_mirror():
    """The slip of the public release, as a mutant: the test above must catch it."""
    fresh = lambda r, p: torch.stack([r < p, torch.rand(r.shape, generator=torch.Generator().manual_seed(1)) < p])
    with pytest.raises(AssertionError):
        check_mirror(fresh)


def test_mirror_halves_the_pattern_noise_or_better(toy):
    model, x0, *_ = toy
    A = lambda name, K: mdm.exact_variance(mdm.exact_law(parse_method(name), N, None if "ppots" not in name else TABLE_T[0]), *K)["A"]
    for K in mdm.grams(model, x0, POS):
        for one, pair, two in [("mdm", "mirror", "multi2"), ("ppots", "ppots_mirror", "ppots_multi2"), ("exactk", "exactk_mirror", "exactk_multi2")]:
            assert A(two, K) == pytest.approx(A(one, K) / 2, rel=1e-9)
            assert A(pair, K) < A(one, K) / 2


# ---- the rest


def test_strata_are_equally_filled():
    u, shuffle = torch.rand(3, 64), torch.rand(3, 64).argsort(-1)
    cells = (mdm.stratify(u, shuffle, mdm.n_strata(64)) * 8).long()
    assert all((row.bincount(minlength=8) == 8).all() for row in cells)
    assert [mdm.n_strata(b) for b in (1, 7, 12, 64, 100)] == [1, 1, 3, 8, 10]
    comb = mdm.low_discrepancy(u, shuffle).sort(-1).values
    torch.testing.assert_close(comb.diff(), torch.full((3, 63), 1 / 64), rtol=0, atol=1e-6)
    assert 0 < comb.min() and comb.max() <= 1


def test_ema_leaves_the_gradient_alone_to_the_bit():
    """And the reported loss has the same mean, but less spread."""
    torch.manual_seed(0)
    w = torch.randn(5, requires_grad=True)
    u, features, ema = torch.rand(2, 64), torch.randn(2, 64, 5), torch.rand(2, 10) * 3
    plain = (features @ w).exp() / (u + 0.1)
    steady, new = mdm.ema_control_variate(plain, u, ema)
    (a,), (b,) = (torch.autograd.grad(loss.mean(), w, retain_graph=True) for loss in (plain, steady))
    assert torch.equal(a, b)
    assert not torch.equal(steady, plain) and not torch.equal(new, ema)
    for _ in range(2000):  # converged, on losses that fall with the rate
        u = torch.rand(1, 64)
        steady, ema = mdm.ema_control_variate(1 / (u + 0.1), u, ema[:1])
    u = (torch.arange(6400)[None] + 0.5) / 6400
    plain, (steady, _) = 1 / (u + 0.1), mdm.ema_control_variate(1 / (u + 0.1), u, ema)
    assert steady.mean().item() == pytest.approx(plain.mean().item(), rel=1e-4)
    assert steady.std() < 0.5 * plain.std()


def test_clipped_weights_need_no_monte_carlo():
    """The weights are finite and positive."""
    for n in (3, 16):
        assert torch.isfinite(mdm.clipped_weights(n)).all() and (mdm.clipped_weights(n) > 0).all()


@pytest.mark.parametrize("method", ["mdm", "ppots_mirror", "multi2", "exactk", "exactk_strats", "exactk_mirror", "reclipped"])
def test_monte_carlo_agrees_with_exact(method, toy):
    """Within 4 standard errors, each of A, B, C and total, for loss and gradient; the data are 120 sequences."""
    model = toy[0].float()
    x0 = torch.randint(3, (120, T), generator=torch.Generator().manual_seed(2))
    m = parse_method(method)
    table = table_of(m)
    law = mdm.exact_law(m, N, None if table is None else table[0], 0.1)
    sampled = mdm.monte_carlo_variance(model, x0, POS, m, torch.Generator().manual_seed(3), None if table is None else table.float(), 0.1)
    for exact, mc in zip((mdm.exact_variance(law, *K) for K in mdm.grams(model, x0, POS)), sampled):
        for name in ("A", "B", "C", "total"):
            estimate, error = mc[name]
            assert 0 < error < exact["total"]
            assert abs(estimate - exact[name]) < 4 * error, (name, exact, mc)
    toy[0].double()


def test_arm_has_only_data_noise(toy):
    _, x0, *_ = toy
    model = GPT(GPTConfig(3, T, n_embd=8, n_head=2, causal=True), [torch.Generator().manual_seed(0)]).double()
    K = mdm.grams(model, x0, POS)
    nll = mdm.token_nll(model, x0[None], POS)[0].mean(-1)
    got = mdm.exact_variance(None, *K[0])
    assert got["A"] == got["B"] == 0 and got["C"] == pytest.approx(nll.var(unbiased=False).item(), rel=1e-10)


def test_meaningless_methods_are_refused():
    for name in ("arm_mirror", "arm_mdm", "nonsense", "", "ppots_ppots", "exactk_isad", "strats_lowdisc", "clipped_ppots", "batch2_steps2"):
        with pytest.raises(ValueError):
            parse_method(name)
    assert parse_method("pposts_mirror") == parse_method("mirror_ppots") == parse_method("mdm_ppots_mirror")
    names = ["mdm", "arm", "arm_batch2", "mdm_batch2", "ppots_mirror", "exactk_strats_mirror"]
    assert [mdm.method_name(parse_method(n)) for n in names] == names


def test_long_responses_are_interpolated_per_token():
    """n = 64 with 16 counts: where every hidden token costs the same, H = c k, the curve is exact: E[l^2|t] = c^2 E[k^2]/(n t)^2."""
    n, c, t = 64, 2.0, torch.tensor([0.02, 0.3, 0.9], dtype=torch.float64)
    counts = torch.linspace(1, n, 16).round().long()
    H = (c * counts.double())[None, None, :, None].expand(1, 5, -1, 2)
    g2, v = mdm.curves(counts, H, t, n, eps=0.0)
    torch.testing.assert_close(g2[0], torch.full((3,), c**2, dtype=torch.float64))
    torch.testing.assert_close(v[0], c**2 * (1 - t) / (n * t))


def test_no_rate_is_ever_given_up():
    """A pilot that happened to see no loss at some count must not make its probability 0: that would be a bias."""
    table = mdm.normalised(torch.tensor([[0.0, 1.0, 1.0], [0.0, 0.0, 0.0]]))
    assert 0 < table[0, 0] < 1e-2 and table[1].tolist() == pytest.approx([1 / 3] * 3)
    H = torch.zeros(1, 4, N, 2)
    for name in ("ppots", "exactk_ppots"):
        for fit in ("epr", "grid"):
            table, _ = mdm.ppots_law(parse_method(name), torch.arange(1, N + 1), H, N, fit)
            assert torch.isfinite(table).all() and (table > 0).all()


def test_plain_variance_without_eps_is_refused():
    with pytest.raises(ValueError, match="infinite"):
        mdm.exact_law(frozenset(), N, eps=0.0)
    assert math.isfinite(mdm.exact_law(parse_method("ppots"), N, TABLE_T[0], eps=0.0).second.max())
