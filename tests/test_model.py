"""The model and generation: what a reader would take for granted, shown."""
import pytest
import torch

import mdm
from mdm import GPT, GPTConfig

V, T = 7, 9
POS = torch.arange(4, T)


def make(causal=False, seeds=(1, 2, 3)):
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    model = GPT(GPTConfig(V, T, n_embd=16, causal=causal), generators)
    with torch.no_grad():  # larger weights, so that what depends on what can be seen
        for name, p in model.named_parameters():
            p.mul_(10).add_(0.1 if "bias" in name else 0.0)
    return model


def test_arm_and_mdm_differ_only_by_causality():
    arm, model = make(causal=True), make()
    assert all(torch.equal(a, b) for a, b in zip(arm.parameters(), model.parameters()))
    idx = torch.randint(V, (3, 2, T))
    changed = idx.clone()
    changed[..., -1] = (changed[..., -1] + 1) % V
    before = torch.arange(T - 1)
    assert torch.equal(arm(idx, before), arm(changed, before))  # the future changes nothing
    assert (model(idx, before) - model(changed, before)).abs().amax((0, 1, 3)).min() > 1e-3
    for net in (arm, model):  # and what else is asked for changes nothing
        torch.testing.assert_close(net(idx, POS[:2]), net(idx, before)[:, :, POS[:2]])


def test_sample_gradients_are_autograd():
    """Those of the first seed, sample by sample."""
    model, x0 = make().double(), torch.randint(V, (3, T))
    mask, weight = torch.rand(3, 5) < 0.5, torch.rand(3, 5, dtype=torch.float64)
    loss, grads = mdm.sample_gradients(model, x0, POS, mask, weight)
    for i in range(3):
        model.zero_grad()
        x, m, w = (z[i].expand(3, 1, -1) for z in (x0, mask, weight))
        wanted = mdm.mdm_loss(mdm.token_nll(model, x, POS, m), m, w)[0, 0]
        wanted.backward()
        assert loss[i].item() == pytest.approx(wanted.item())
        gradient = torch.cat([p.grad[0].flatten() for p in model.parameters()])
        torch.testing.assert_close(grads[i], gradient)


@pytest.mark.parametrize("steps", [None, 1, 2, 4])
@pytest.mark.parametrize("order", ["confidence", "left", "random"])
def test_generate_fills_in_what_is_masked_and_only_that(steps, order):
    model, x = make(), torch.randint(V, (3, 2, T))
    x[..., 4:] = V
    x[0, 0, 6], x[1, 1, 5:] = 3, 2
    states = list(mdm.generate(model, x, POS, steps, order=order))
    assert len(states) == (steps or 5)
    assert (states[-1] < V).all() and torch.equal(states[-1][x < V], x[x < V])
    if steps is None and order == "left":
        assert (states[0][2, 0, 4] < V) and (states[0][2, 0, 5:] == V).all()


def test_arm_generates_left_to_right():
    arm, x = make(causal=True), torch.full((3, 2, T), V)
    x[..., :4] = torch.randint(V, (3, 2, 4))
    states = list(mdm.generate(arm, x, POS))
    wanted = x.clone()
    for i in POS:
        wanted[..., i] = arm(wanted, torch.arange(T))[:, :, i - 1].argmax(-1)
        assert torch.equal(states[i - 4], wanted)


def test_temperature_samples_the_model():
    model = make(seeds=[1])
    x = torch.randint(V, (1, 1, T))
    x[..., 6] = V
    p = model(x, torch.tensor([6]))[0, 0, 0].softmax(-1)
    draw = torch.Generator().manual_seed(0)
    *_, y = mdm.generate(model, x.expand(1, 20_000, -1), POS, None, 1.0, generator=draw)
    share = y[0, :, 6].bincount(minlength=V) / 20_000
    assert ((share - p).abs() < 4 * (p * (1 - p) / 20_000).sqrt() + 1e-4).all()
