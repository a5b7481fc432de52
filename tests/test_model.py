"""The model and generation: what a reader would take for granted, shown."""
import itertools

import pytest
import torch

import mdm

V = 7
T = 9
POS = torch.arange(4, T)  # the response


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def tokens(*shape):
    return torch.randint(V, shape, generator=seeded())


def make(causal=False, seeds=(1, 2, 3)):
    """A model in float64, with larger weights, so that what it does depends on what it sees."""
    config = mdm.GPTConfig(V, T, n_embd=16, causal=causal)
    model = mdm.GPT(config, [seeded(seed) for seed in seeds]).double()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.mul_(10).add_(0.1 if "bias" in name else 0.0)
    return model


def test_arm_and_mdm_differ_only_by_causality():
    """Equal weights, and a checkpoint holds nothing else. The last token changes no earlier logits
    of an ARM, and all of an MDM. Which positions are asked for changes nothing."""
    arm = make(causal=True)
    model = make()
    assert all(torch.equal(a, b) for a, b in zip(arm.parameters(), model.parameters()))
    idx = tokens(3, 2, T)
    changed = idx.clone()
    changed[..., -1] = (changed[..., -1] + 1) % V
    before = torch.arange(T - 1)
    assert torch.equal(arm(idx, before), arm(changed, before))
    assert (model(idx, before) - model(changed, before)).abs().amax((0, 1, 3)).min() > 1e-3
    for net in (arm, model):
        assert set(net.state_dict()) == {name for name, _ in net.named_parameters()}
        torch.testing.assert_close(net(idx, POS[:2]), net(idx, before)[:, :, POS[:2]])


def test_learned_and_rotary_positions_each_tell_places_apart():
    """Two tokens of the prompt change places: the response notices, unless both kinds are off. The
    rotary ones show distances alone, so that all may begin three places later."""
    x = torch.arange(T).expand(3, 1, T) % V
    exchanged = x[..., [0, 2, 1, *range(3, T)]]
    for learned, rotary in itertools.product([0, 1], repeat=2):
        model = make()
        with torch.no_grad():
            model.wpe.mul_(learned)
            model.cos.pow_(rotary)
            model.sin.mul_(rotary)
        change = (model(x, POS) - model(exchanged, POS)).abs().max()
        assert (change > 1e-3) == (learned + rotary > 0)
    before = model(x, POS)
    longer = mdm.GPT(mdm.GPTConfig(V, T + 3, n_embd=16), [seeded()])
    model.cos.copy_(longer.cos[3:])
    model.sin.copy_(longer.sin[3:])
    torch.testing.assert_close(model(x, POS), before, rtol=1e-4, atol=1e-4)


def test_queries_and_keys_are_normed_and_the_first_weights_are_as_in_gpt2():
    """Scaling the weights of a query changes nothing. Residual branches end in smaller weights."""
    model = make()
    before = model(tokens(3, 2, T), POS)
    with torch.no_grad():
        for p in model.blocks[1].query.parameters():
            p.mul_(5)
    torch.testing.assert_close(model(tokens(3, 2, T), POS), before)
    block = mdm.GPT(mdm.GPTConfig(V, T, n_layer=8, n_embd=64), [seeded()]).blocks[3]
    for layer in (block.query, block.key_value, block.mlp_fc, block.attn_proj, block.mlp_proj):
        std = 0.02 / 4 if layer in (block.attn_proj, block.mlp_proj) else 0.02
        assert layer.weight.std().item() == pytest.approx(std, rel=0.06)  # of 4096 or more


def test_seeds_are_independent():
    """Each seed has the weights it has alone. Others' weights change nothing, to the bit."""
    three = make(seeds=[1, 2, 3])
    alone = make(seeds=[2])
    x = tokens(3, 2, T)
    before = three(x, POS)
    torch.testing.assert_close(before[1:2], alone(x[1:2], POS))
    with torch.no_grad():
        for p, q in zip(three.parameters(), alone.parameters()):
            assert torch.equal(p[1:2], q)
            p[1] += 1
    after = three(x, POS)
    assert torch.equal(after[::2], before[::2]) and not torch.equal(after[1], before[1])
    assert not torch.equal(three.wte[0], three.wte[2])


@pytest.mark.parametrize("causal", [False, True])
def test_token_nll(causal):
    """-log p of the response: an MDM's given the sequence with holes, an ARM's given its past."""
    model = make(causal)
    x0 = tokens(3, 2, T)
    mask = torch.rand(3, 2, 5, generator=seeded()) < 0.5
    xt = x0.clone()
    xt[..., 4:][mask] = V
    logits = model(x0, POS - 1) if causal else model(xt, POS)
    wanted = -logits.log_softmax(-1).gather(-1, x0[..., 4:, None])[..., 0]
    torch.testing.assert_close(mdm.token_nll(model, x0, POS, mask), wanted.float())


def test_bfloat16_weights_have_a_pilot_and_a_table_in_float32():
    r = torch.rand(3, 2, 5, 5, generator=seeded())
    counts, H = mdm.pilot(make().bfloat16(), tokens(3, 2, T), POS, r)
    table = mdm.ppots_table(counts, H, 5, "grid")
    assert H.dtype == table.dtype == torch.float32 and torch.isfinite(table).all()
    assert mdm.ppots_table(counts, H.bfloat16(), 5, "grid").dtype == torch.float32


def test_sample_gradients_are_autograd():
    """Those of the first seed, sample by sample. method_loss is the mean over the masks."""
    model = make()
    x0 = tokens(3, T)
    mask = torch.rand(2, 3, 5, generator=seeded(1)) < 0.5
    weight = torch.rand(2, 3, 5, generator=seeded(2))
    found = [mdm.sample_gradients(model, x0, POS, m, w) for m, w in zip(mask, weight)]
    for i, x in enumerate(x0):
        nll = mdm.token_nll(model, x.expand(3, 1, T), POS, mask[0, i].expand(3, 1, 5))[0, 0]
        wanted = (nll * mask[0, i] * weight[0, i]).sum() / 5
        assert found[0][0][i].item() == pytest.approx(wanted.item(), rel=1e-5)
        gradient = torch.autograd.grad(wanted, list(model.parameters()))
        gradient = torch.cat([g[0].flatten() for g in gradient])
        torch.testing.assert_close(found[0][1][i], gradient, rtol=1e-4, atol=1e-6)
    masks = mask[:, None].expand(-1, 3, -1, -1)
    both = mdm.method_loss(model, x0.expand(3, 3, T), POS, masks, weight[:, None].expand_as(masks))
    torch.testing.assert_close(both[0], (found[0][0] + found[1][0]) / 2)


@pytest.mark.parametrize("steps", [None, 1, 2, 4])
def test_generate_fills_in_what_is_masked_and_only_that(steps):
    """The first token kept is the surest one."""
    model = make()
    x = tokens(3, 9, T)
    x[..., 4:] = V
    x[0, 0, 6] = 3
    x[1, 1, 5:] = 2
    states = list(mdm.generate(model, x, POS, steps, generator=seeded()))
    assert len(states) == (steps or 5)
    assert (states[-1] < V).all() and torch.equal(states[-1][x < V], x[x < V])
    if steps is None:
        p, token = model(x, POS).softmax(-1).max(-1)
        hidden = x[..., 4:] == V
        kept = (states[0][..., 4:] < V) & hidden
        assert (kept.sum(-1) == 1).all() and torch.equal(states[0][..., 4:][kept], token[kept])
        assert torch.equal(kept.int().argmax(-1), (p * hidden).argmax(-1))


def test_arm_generates_left_to_right():
    """One token a step, the likeliest one after what is there."""
    arm = make(causal=True)
    x = tokens(3, 2, T)
    x[..., 4:] = V
    states = list(mdm.generate(arm, x, POS, steps=2))
    assert len(states) == 5
    for i, state in zip(POS, states):
        x[..., i] = arm(x, POS - 1)[:, :, i - 4].argmax(-1)
        assert torch.equal(state, x)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_temperature_samples_the_model(temperature):
    """20,000 samples of a token have the model's shares, to 5 standard errors."""
    model = make(seeds=[1])
    x = tokens(1, 20_000, T)
    x[:] = x[:, :1]
    x[..., 6] = V
    p = (model(x[:, :1], POS[2:3])[0, 0, 0] / temperature).softmax(-1)
    (y,) = mdm.generate(model, x, POS, 1, temperature, generator=seeded())
    share = y[0, :, 6].bincount(minlength=V) / 20_000
    assert ((share - p).abs() < 5 * (p * (1 - p) / 20_000).sqrt() + 1e-4).all()
