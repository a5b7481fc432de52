"""Where the time goes, as ratios measured side by side in one run. Not a test.

    python tests/bench.py                            seeds, methods, parts of a step
    python tests/bench.py --nanogpt=../nanoGPT       beside nanoGPT's own model and loop, from a clone of yours
    python tests/bench.py --tiny_diffusion=...       beside nathan-barry/tiny-diffusion's, likewise
    python tests/bench.py --compile                  torch.compile, CUDA graphs, TF32 and bf16: which pay, and after how many steps
    python tests/bench.py --scaling                  time and memory against seeds, n_embd, batch size, n and T

Every figure is a median over --repeats rounds in which all the things compared take turns, after a warm-up.
"""
import argparse
import concurrent.futures
import importlib
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import mdm
import train
from data import arith


def clock(device):
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter()


def step_times(cfg, method, n_seeds, data, device, n=12, warm_up=4):
    """Seconds per step of train.train itself (its stop() is called after every step), the P-POTS refits left out."""
    times = []

    def stop():
        times.append(clock(device))
        return len(times) == n + warm_up

    train.train(cfg, mdm.parse_method(method), list(range(n_seeds)), data, device, stop=stop)
    return [b - a for a, b in zip(times[warm_up:], times[warm_up + 1 :])]


def timed(f, device, n=5):
    f()
    times = []
    for _ in range(n):
        began = clock(device)
        f()
        times.append(clock(device) - began)
    return statistics.median(times)


def nanogpt_step(path, cfg, data, device):
    """One step of nanoGPT's loop (its model, AdamW, clipping, data from memory), float32, at our shape: a function."""
    module = imported(path, "model")
    T = data.test.shape[1] - 1
    model = module.GPT(module.GPTConfig(block_size=T, vocab_size=len(data.vocabulary), n_layer=cfg.n_layer, n_head=cfg.n_head,
                                        n_embd=cfg.n_embd, dropout=0.0, bias=True)).to(device)  # fmt: skip
    optimizer = model.configure_optimizers(cfg.weight_decay, cfg.lr, train.BETAS, device.split(":")[0])
    train_x = data.train_blocks(device)

    def step():
        x = train_x[torch.randint(len(train_x), (cfg.batch_size,), device=device)]
        _, loss = model(x[:, :-1].contiguous(), x[:, 1:].contiguous())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def tiny_diffusion_step(path, cfg, data, device):
    """The same for tiny-diffusion: its model, its masks, its train_step."""
    training = imported(path, "training")
    T, V = data.test.shape[1], len(data.vocabulary)
    config = training.DiffusionConfig(sequence_len=T, vocab_size=V + 1, mask_token_id=V, n_layer=cfg.n_layer, n_head=cfg.n_head,
                                      n_embd=cfg.n_embd, context_len=data.prompt_len)  # fmt: skip
    model = training.DiffusionTransformer(config).to(device)
    model.init_weights()
    schedule = training.MaskedDiffusionSchedule(config.diffusion_steps, V, config.context_len)
    optimizer = torch.optim.AdamW(model.parameters(), lr=cfg.lr, weight_decay=cfg.weight_decay)
    train_x = data.train_blocks(device)
    return lambda: training.train_step(model, train_x[torch.randint(len(train_x), (cfg.batch_size,), device=device)], schedule, optimizer)


def imported(path, name):
    """A module of somebody's repository, which finds its own neighbours first."""
    sys.path.insert(0, str(Path(path).resolve()))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.pop(0)
        for other in ("model", "sample", "training"):
            sys.modules.pop(other, None)


def seeds_and_methods(cfg, data, device, repeats, counts, methods, references):
    """Steps of every method at every number of seeds, and of the references {name: step function}, taking turns."""
    times = {}
    for _ in range(repeats):
        for name, step in references.items():
            times.setdefault(name, []).append(timed(lambda: [step() for _ in range(10)], device) / 10)
        for S in counts:
            for method in methods:
                times.setdefault((method, S), []).extend(step_times(cfg, method, S, data, device))
    ms = {k: 1e3 * statistics.median(v) for k, v in times.items()}
    T = data.test.shape[1]
    print(f"\n{'method':14}{'seeds':>6}{'ms/step':>9}{'per seed':>9}{'seq/s/seed':>11}{'seq/s':>9}{'tokens/s':>10}{'x 1 seed':>9}"
          + "".join(f"  x {name}" for name in references))  # fmt: skip
    for method in methods:
        for S in counts:
            t, M = ms[method, S], mdm.n_masks(mdm.parse_method(method))
            total = S * cfg.batch_size * M / t * 1e3
            print(f"{method:14}{S:6}{t:9.2f}{t / S:9.2f}{total / S:11.0f}{total:9.0f}{total * T:10.0f}{t / ms[method, counts[0]]:9.2f}"
                  + "".join(f"{ms[name] * S * M / t:{len(name) + 4}.2f}" for name in references))  # fmt: skip
    print("ms/step: all seeds together, without P-POTS' refits; seq/s counts every forward pass; x 1 seed: the step's time over that of one seed")
    for name in references:
        print(f"{name}: {ms[name]:.2f} ms/step with its own model and loop; x {name}: our sequences per second, all seeds together, over its")


def parts_of_a_step(cfg, data, device, S, repeats):
    """The share of each part of a P-POTS+MIRROR step, and of what happens between the steps."""
    method, seeds = mdm.parse_method("ppots_mirror"), list(range(S))
    model, pos = train.build(cfg, method, seeds, data, device)
    params, train_x, n, K = list(model.parameters()), data.train_blocks(device), len(pos), 64
    optimizer = torch.optim.AdamW(params, lr=1e-4, betas=train.BETAS, fused=device.startswith(("cpu", "cuda")))
    refit = lambda: train.refit_ppots(cfg, method, seeds, model, train_x, pos, 0, cfg.steps * cfg.batch_size * 2, theta)
    theta = None
    table, theta, *_ = refit()
    block = lambda: train.draw_block(method, seeds, 0, K, cfg.batch_size, len(train_x), n, device)
    idx, u, r = block()
    spent = {}
    for i in range(repeats * 10):
        marks = [clock(device)]
        x0 = train_x[idx[i % K]]
        marks.append(clock(device))
        mask, weight = mdm.draw_masks(method, u[i % K], r[i % K], table, cfg.eps)
        marks.append(clock(device))
        loss = mdm.method_loss(model, x0, pos, mask, weight).mean(-1).sum()
        marks.append(clock(device))
        optimizer.zero_grad()
        loss.backward()
        marks.append(clock(device))
        train.clip_per_seed(params, cfg.grad_clip, torch.ones(S, dtype=torch.bool, device=device))
        optimizer.step()
        marks.append(clock(device))
        for name, a, b in zip(("data", "masks", "forward", "backward", "clip and optimizer"), marks, marks[1:]):
            spent.setdefault(name, []).append(b - a)
    ms = {k: 1e3 * statistics.median(v) for k, v in spent.items()}
    ms["random numbers"] = 1e3 * timed(block, device) / K
    ms["curve estimation"] = 1e3 * timed(refit, device) * cfg.ppots_refits / cfg.steps
    ms["evaluation"] = 1e3 * timed(lambda: train.evaluate(model, data, 128), device, 3) / cfg.eval_every
    total = sum(ms.values())
    print(f"\nOne step of ppots_mirror, {S} seeds, what happens once in many steps spread over them: {total:.2f} ms")
    for name, t in ms.items():
        print(f"  {name:20}{t:8.3f} ms {100 * t / total:6.1f} %")
    # multiply-adds of the linear layers, three times for forward and backward; the last block only where it is asked for
    C, T, L = cfg.n_embd, data.test.shape[1], cfg.n_layer
    per_sequence = (12 * C * C * (L - 1) + 2 * C * C) * T + (10 * C * C + C * len(data.vocabulary)) * n
    flops = 6 * per_sequence * 2 * cfg.batch_size * S
    a = torch.randn(1024, 1024, device=device)
    peak = 2 * 1024**3 / timed(lambda: a @ a, device, 20)
    print(f"  arithmetic of the linear layers {flops / 1e9:.2f} GFLOP a step: {flops / (total * 1e-3) / 1e9:.0f} GFLOP/s, "
          f"{100 * flops / (total * 1e-3) / peak:.0f} % of the {peak / 1e9:.0f} GFLOP/s of a 1024 x 1024 float32 product here")  # fmt: skip
    base = sum(v for k, v in ms.items() if k not in ("curve estimation", "evaluation"))
    print(f"  P-POTS' curve estimation over the step without it: {1 + ms['curve estimation'] / base:.4f}")


def ways(cfg, data, device, S, repeats):
    """Forward and backward of a plain MDM step as train.py does it, and in ways that it might; a compilation has to earn its own time."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp()  # nothing compiled before, as for a new user
    torch.compiler.reset()
    model, pos = train.build(cfg, frozenset(), list(range(S)), data, device)
    x0 = data.train_blocks(device)[torch.randint(1000, (S, cfg.batch_size), device=device)].long()
    r, u = torch.rand(1, S, cfg.batch_size, len(pos), device=device), 1 - torch.rand(S, cfg.batch_size, device=device)
    mask, weight = mdm.draw_masks(frozenset(), u, r, None, cfg.eps)
    loss = lambda: mdm.method_loss(model, x0, pos, mask, weight).mean(-1).sum()
    cuda = device.startswith("cuda")

    def bf16(f):
        with torch.autocast(device.split(":")[0], torch.bfloat16):
            return f()

    kinds = {"as in train.py": loss, "bf16 autocast": lambda: bf16(loss), "compiled": torch.compile(loss)}
    if cuda:
        kinds["compiled, CUDA graph"] = torch.compile(loss, mode="reduce-overhead")
        kinds["TF32"] = loss
    times, first = {}, {}
    for name in list(kinds) * repeats:
        torch.backends.cuda.matmul.allow_tf32 = name == "TF32"

        def step():
            model.zero_grad()
            kinds[name]().backward()

        began = clock(device)
        step()
        first.setdefault(name, clock(device) - began)
        times.setdefault(name, []).append(timed(lambda: [step() for _ in range(10)], device) / 10)
    t = {k: statistics.median(v) for k, v in times.items()}
    eager = t["as in train.py"]
    print(f"\nForward and backward of mdm, {S} seeds{'':14}{'ms':>8}{'x train.py':>12}{'first call':>12}{'pays after':>12}")
    for name in kinds:
        pays = "" if not name.startswith("compiled") else f"{first[name] / (eager - t[name]):.0f} steps" if t[name] < eager else "never"
        print(f"  {name:45}{1e3 * t[name]:8.2f}{t[name] / eager:12.2f}{first[name]:10.1f} s{pays:>12}")


def overheads(cfg, data, device, S, repeats):
    """Is the method free? Pairs of methods of the same forward tokens, taking turns; refits included."""
    train_x = data.train_blocks(device)
    pairs = [("ppots", "mdm"), ("ppots_mirror", "multi2"), ("exactk", "mdm"), ("exactk_strats_mirror", "multi2"), ("mirror", "mdm_batch2")]
    print(f"\n{'method':22}{'against':14}time ratio at equal forward tokens, {S} seeds, P-POTS' refits included (median of {repeats} pairs, least, most)")
    for method, other in pairs:
        ratios = []
        for _ in range(repeats):
            t = [statistics.median(step_times(cfg, m, S, data, device, n=10)) for m in (method, other)]
            if "ppots" in method:
                m = mdm.parse_method(method)
                model, pos = train.build(cfg, m, list(range(S)), data, device)
                refit = lambda theta: train.refit_ppots(cfg, m, list(range(S)), model, train_x, pos, 0, cfg.steps * cfg.batch_size * mdm.n_masks(m), theta)
                began = clock(device)
                theta = refit(None)[1]
                first = clock(device) - began
                t[0] += (first + (cfg.ppots_refits - 1) * timed(lambda: refit(theta), device, 1)) / cfg.steps
            ratios.append(t[0] / t[1])
        print(f"{method:22}{other:14}{statistics.median(ratios):.3f}   ({min(ratios):.3f}, {max(ratios):.3f})")


def one_size(dataset, n_embd, batch_size, seeds, device):
    """Seconds per P-POTS+MIRROR step and the most memory (bytes) it needed beyond what an idle program has. Run in a process
    of its own, since a process's peak never falls."""
    cfg, data = train.Config(dataset=dataset, n_embd=n_embd, batch_size=batch_size, steps=1000), arith.make(dataset)
    idle = memory(device)
    seconds = statistics.median(step_times(cfg, "ppots_mirror", seeds, data, device, n=20))
    return seconds, memory(device) - idle


def memory(device):
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated()
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def scaling(device):
    """One P-POTS+MIRROR step at four sizes of everything, the pilot included in the memory."""
    base = dict(dataset="sum4", n_embd=64, batch_size=64, seeds=2)
    print(f"\n{'what':20}" + "".join(f"{'value':>8}{'ms/step':>9}{'MB':>7}" for _ in range(4)))
    for what, values in [("seeds", (1, 2, 4, 8)), ("n_embd", (32, 64, 128, 256)), ("batch_size", (32, 64, 128, 256)),
                         ("dataset", ("sum4", "sum5", "sum6", "sum8"))]:  # fmt: skip
        row = f"{what if what != 'dataset' else 'n (T = 2n + 1)':20}"
        for value in values:
            with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                seconds, used = pool.submit(one_size, **{**base, what: value}, device=device).result()
            row += f"{value:>8}{1e3 * seconds:9.2f}{used / 1e6:7.0f}"
        print(row, flush=True)
    print("MB: the most memory in use beyond an idle program's")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="1,2,4,8,16,32", help="numbers of seeds [1,2,4,8,16,32]")
    parser.add_argument("--methods", default="arm,mdm,ppots,ppots_mirror", help="[arm,mdm,ppots,ppots_mirror]")
    parser.add_argument("--dataset", default="add3", help="[add3]")
    parser.add_argument("--repeats", type=int, default=5, help="rounds [5]")
    parser.add_argument("--nanogpt", help="a clone of nanoGPT to measure beside")
    parser.add_argument("--tiny_diffusion", help="a clone of tiny-diffusion to measure beside")
    parser.add_argument("--compile", action="store_true", help="only torch.compile, CUDA graphs, TF32 and bf16, against training as it is")
    parser.add_argument("--scaling", action="store_true", help="only time and memory at four sizes of everything")
    parser.add_argument("--device", default="auto", help="cpu, cuda, auto [auto]")
    args = parser.parse_args()
    device = train.pick_device(args.device)
    cfg = train.Config(dataset=args.dataset, eval_every=250)
    data = arith.make(cfg.dataset)
    name = torch.cuda.get_device_name() if device.startswith("cuda") else f"CPU, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    print(f"{cfg.dataset}, {cfg.n_layer} layers of {cfg.n_embd}, batch {cfg.batch_size}, torch {torch.__version__}, {name}")
    if args.scaling:
        return scaling(device)
    if args.compile:
        for S in [int(s) for s in args.seeds.split(",")]:
            ways(cfg, data, device, S, args.repeats)
        return
    references = {"nanoGPT": nanogpt_step(args.nanogpt, cfg, data, device)} if args.nanogpt else {}
    if args.tiny_diffusion:
        references["tiny-diffusion"] = tiny_diffusion_step(args.tiny_diffusion, cfg, data, device)
    seeds_and_methods(cfg, data, device, args.repeats, [int(s) for s in args.seeds.split(",")], args.methods.split(","), references)
    parts_of_a_step(cfg, data, device, 8, args.repeats)
    overheads(cfg, data, device, 8, 3 * args.repeats)


if __name__ == "__main__":
    main()
