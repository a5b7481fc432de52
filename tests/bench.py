"""Where the time goes. All that is compared takes turns, and times are medians. Not a test.

    python tests/bench.py                                steps of each method, by number of seeds
    python tests/bench.py --dataset=shakespeare_char     the same at text's sizes
    python tests/bench.py --compile                      and compiled: from how many steps it pays
    python tests/bench.py --nanogpt=../nanoGPT           beside nanoGPT's own model, from a clone
    python tests/bench.py --tiny_diffusion=DIR           (with tqdm) its model, scored by our bound
    python tests/bench.py --gpu                          all we ask of a GPU, within eight minutes
    python tests/bench.py --gpu --tiny                   the same with tiny models, even on a CPU
"""
import argparse
import collections
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from functools import partial
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import mdm
import train
from data import runs

WARM_UP = 6  # steps before those we time: they find memory, choose kernels, record CUDA graphs


class Mode(NamedTuple):
    compiler: str = ""  # the mode of torch.compile
    recorded: bool = False  # is a CUDA graph recorded of the gradient?


MODES = {
    "eager": Mode(),  # train.py on a CPU
    "recorded": Mode(recorded=True),  # train.py on a GPU
    "compiled, recorded": Mode("default", recorded=True),  # train.py --compile on a GPU
    "compiled": Mode("default"),  # train.py --compile on a CPU
    "reduce-overhead": Mode("reduce-overhead"),
}
METHODS = ["arm", "mdm", "ppots_mirror"]
TINY = {"n_embd": 24, "batch_size": 4, "steps": 9, "eval_every": 4, "n_test": 16, "block_size": 16}


def prepare(args, **settings):
    """train.py's settings and data. With --tiny the model and the training are tiny."""
    cfg, methods, _ = train.parse_args([f"--{name}={value}" for name, value in settings.items()])
    if args.tiny:
        vars(cfg).update(TINY)
    return cfg, train.load_data(cfg, methods)


def our_training(cfg, data, device, method, n_seeds, mode, mark):
    """train.train itself, without evaluations. mark() is called once a step, after the gradient."""
    compiler, is_recorded = MODES[mode]
    learning_rate = train.learning_rate

    def mark_and_rate(*arguments):
        mark()
        return learning_rate(*arguments)

    with (
        patch.object(cfg, "compile", bool(compiler)),
        patch.object(torch, "compile", partial(torch.compile, mode=compiler)),
        patch.object(torch.compiler, "reset"),  # another round finds its programs again
        patch.object(train, "RECORD_AFTER", train.RECORD_AFTER if is_recorded else -1),
        patch.object(train, "learning_rate", mark_and_rate),
        patch.object(train, "evaluate", lambda *_, **quick: {"nll": [9.0] * n_seeds}),
    ):
        list(train.train(cfg, method, list(range(n_seeds)), data, device))


def nanogpt_training(cfg, data, device, mode, mark):
    """nanoGPT's loop at our shape: its model, AdamW and clipping; data from memory."""
    import model as nanogpt  # from the clone
    shape = (data.test.shape[1] - 1, len(data.vocabulary), cfg.n_layer, cfg.n_head, cfg.n_embd)
    model = nanogpt.GPT(nanogpt.GPTConfig(*shape, dropout=0.0)).to(device)
    decay = (cfg.weight_decay, cfg.lr, (0.9, cfg.beta2))
    optimizer = model.configure_optimizers(*decay, device.split(":")[0])
    compiler = MODES[mode].compiler
    loss_of = torch.compile(model, mode=compiler) if compiler else model
    train_x = data.train_blocks(device)
    for _ in range(cfg.steps):
        x = train_x[torch.randint(len(train_x), (cfg.batch_size,), device=device)].long()
        _, loss = loss_of(x[:, :-1].contiguous(), x[:, 1:].contiguous())
        loss.backward()
        mark()
        torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def measured(training, steps, device):
    """A training's ms a step, seconds to the first gradient, with all compiling, and peak MB."""
    on_cuda = device.startswith("cuda")
    times = []

    def mark():
        if on_cuda and len(times) in (0, 1, WARM_UP, steps):  # at all others the GPU may lag
            torch.cuda.synchronize()
        times.append(time.perf_counter())

    if on_cuda:
        torch.cuda.reset_peak_memory_stats()
    mark()
    training(mark)
    ms = 1e3 * (times[steps] - times[WARM_UP]) / (steps - WARM_UP)
    MB = torch.cuda.max_memory_allocated() / 1e6 if on_cuda else "skipped: no CUDA"
    return ms, times[1] - times[0], MB


def steps_in_turns(args, device, methods, numbers, modes):
    """Steps by method, number of seeds and mode. nanoGPT is measured beside the ARM of one seed."""
    torch._dynamo.config.automatic_dynamic_shapes = False  # a program for each number of seeds,
    torch._dynamo.config.cache_size_limit = 100  # as if there were no others
    steps = WARM_UP + (64 if args.gpu else 10)  # 64 steps draw one chunk of random numbers
    cfg, data = prepare(args, method=",".join(methods), dataset=args.dataset, steps=steps)
    cfg.ppots_refits = 1  # in the first step
    jobs = {(method, S, mode): partial(our_training, cfg, data, device, method, S, mode)
            for mode in modes for method in methods for S in numbers}  # fmt: skip
    if args.nanogpt and ("arm", 1, "eager") in jobs:
        for mode in modes:
            if not MODES[mode].recorded:  # its own loop records none
                jobs["nanoGPT", 1, mode] = partial(nanogpt_training, cfg, data, device, mode)
    rounds = [{key: measured(training, cfg.steps, device) for key, training in jobs.items()}
              for _ in range(args.rounds)]  # fmt: skip
    found = {key: statistics.median(each[key][0] for each in rounds) for key in jobs}
    for (method, S, mode), ms in found.items():
        _, start, MB = rounds[0][method, S, mode]
        line = {"method": method, "seeds": S, "mode": mode, "ms": ms, "per_seed": ms / S, "MB": MB}
        if ("nanoGPT", 1, mode) in found:
            line["x_nanoGPT"] = ms / S / found["nanoGPT", 1, mode]
        compiled = [m for m in modes if MODES[m].compiler and (method, S, m) in found]
        if mode in compiled[:1]:  # its programs serve others, too
            without = "recorded" if MODES[mode].recorded else "eager"
            line["compiling_s"] = start - rounds[0][method, S, without][1]
            saved = found[method, S, without] - ms
            line["pays_after_steps"] = 1e3 * line["compiling_s"] / saved if saved > 0 else "never"
        yield line


def tiny_diffusion(args, device):
    """Train tiny-diffusion's model by its own train_step. Then score it on our validation blocks
    with our bound, its mask token's logit off and its time the share of masked tokens."""
    import training  # from the clone
    cfg, data = prepare(args, method="mdm", dataset="shakespeare_char", eval_every=2000)
    V = len(data.vocabulary)
    T = data.test.shape[1]
    shape = {"n_layer": cfg.n_layer, "n_head": cfg.n_head, "n_embd": cfg.n_embd, "context_len": 1}
    config = training.DiffusionConfig(T, V + 1, mask_token_id=V, **shape)
    torch.manual_seed(42)
    theirs = training.DiffusionTransformer(config).to(device)
    theirs.init_weights()
    schedule = training.MaskedDiffusionSchedule(config.diffusion_steps, V, 1)
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=3e-4, weight_decay=cfg.weight_decay)
    train_x = data.train_blocks(device)
    began = time.perf_counter()
    for _ in range(cfg.steps):
        x = train_x[torch.randint(len(train_x), (cfg.batch_size,), device=device)].long()
        training.train_step(theirs, x, schedule, optimizer)  # it waits for the GPU
    seconds = time.perf_counter() - began

    class AsOurs:  # one seed, positions asked for, no mask in the logits
        config = mdm.GPTConfig(V, T, n_embd=cfg.n_embd)
        wte = torch.zeros(1, device=device)

        def __call__(self, idx, pos):
            share = (idx[0] == V).float().mean(-1) * T / (T - 1)
            t = (share * (schedule.num_timesteps - 1)).round().long()
            return theirs(idx[0], t)[None, :, pos, :V]

    theirs.eval()
    scores = train.evaluate(AsOurs(), data)
    yield {"method": "tiny-diffusion", "nats": scores["nll"][0], "seconds": seconds}
    *_, state = train.train(cfg, "mdm", [42], data, device)
    yield {"method": "mdm", "nats": state["curve"][-1]["nll"][0], "seconds": state["seconds"]}


# --------------------------------------------------------------------------------------------------
# --gpu has parts, and a part has cases. Each function yields what it finds about one case.


def difference(ours, theirs):
    """The largest difference between two lists of tensors, relative to each tensor's largest."""
    pairs = [(a.cpu().double(), b.cpu().double()) for a, b in zip(ours, theirs, strict=True)]
    worst = [(a - b).abs().max() / b.abs().max().clamp(min=1e-30) for a, b in pairs]
    return torch.stack(worst).max().item()  # NaN if there is any


def computed(cfg, data, method, device):
    """What mdm.py computes for a method, from random numbers of the CPU: {name: tensors}."""
    words = mdm.parse_method(method)
    model, pos = train.build(cfg, method, [1, 2], data, device)
    n = len(pos)
    draw = torch.Generator().manual_seed(0)
    u = (1 - torch.rand(2, 32, generator=draw)).to(device)
    r = torch.rand(2, 2, 32, n, generator=draw).to(device)
    r = r if "multi2" in words else r[0]
    pilot_r = torch.rand(2, 32, n, n, generator=draw).to(device)
    response = torch.rand(2, 32, n, generator=draw).to(device) < 0.5  # any of the tokens
    x0 = data.train[:64].view(2, 32, -1).to(device)
    rare = torch.tensor(data.rare)
    is_rare_token = torch.isin(torch.arange(len(data.vocabulary)), rare).to(device)
    is_rare = is_rare_token[x0[..., pos]]
    counts, H = mdm.pilot(model, x0, pos, pilot_r)
    table = mdm.ppots_table(counts, H, n, fit="grid")
    masking = words & mdm.MASKING.keys()
    draws = mdm.draw_masks(masking, u, r, table=table, is_rare=is_rare, response=response)
    states = mdm.generate(model, x0.index_fill(-1, pos, model.config.vocab_size), pos)
    loss = train.sequence_loss(model, words, x0, pos, u, r, table, is_rare_token, cfg.eps)
    if "ema" in words:
        loss, _ = mdm.ema_baseline(loss, u, torch.ones(2, 10, device=device))
    loss.sum().backward()
    gradient = [p.grad for p in model.parameters()]
    found = {"pilot": [H, table], "draws": draws, "generated": list(states), "loss": [loss]}
    return found | {"gradient": gradient, "variance": mdm.grams(model, x0[0, :2], pos)}


def check(args, device, method):
    """Does the device compute what the CPU does?"""
    cfg, data = prepare(args, method="isad", isad_tokens="12")
    here = computed(cfg, data, method, "cpu")
    there = computed(cfg, data, method, device)
    found = {name: difference(there[name], here[name]) for name in here}
    yield {"method": method, **found, "ok": all(x <= 1e-4 for x in found.values())}


def resume(args, device, method):
    """Is a resumed run the uninterrupted one to the bit? Is a seed alone the seed among others?"""
    seeds = [42, 731, 20231, 0, 1, 2, 3, 4]
    cfg, data = prepare(args, method=method, steps=20, eval_every=10)
    whole = list(train.train(cfg, method, seeds, data, device))
    with tempfile.TemporaryDirectory() as folder:
        runs.save_checkpoint(f"{folder}/ckpt.pt", {"state": whole[1]})
        halfway = runs.load_checkpoint(f"{folder}/ckpt.pt")["state"]
    *_, resumed = train.train(cfg, method, seeds, data, device, halfway)
    *_, again = train.train(cfg, method, seeds, data, device)
    *_, alone = train.train(cfg, method, [731], data, device)
    weights = whole[-1]["model"].values()
    among_others = torch.tensor([point["loss"][1] for point in whole[-1]["curve"][1:]])
    by_itself = torch.tensor([point["loss"][0] for point in alone["curve"][1:]])
    found = {"resumed": difference(resumed["model"].values(), weights)}
    found["repeated"] = difference(again["model"].values(), weights)  # if not 0, resumed cannot be
    found["alone"] = difference([by_itself], [among_others])
    yield {"method": method, **found, "ok": found["resumed"] == 0 and found["alone"] <= 1e-4}


def sync(args, device, method, dataset="add3"):
    """Does the CPU wait for the GPU once a step is recorded? torch raises then."""
    on_cuda = device.startswith("cuda")
    listen = torch.cuda.set_sync_debug_mode if on_cuda else lambda mode: None
    listen("default")  # the case before may have failed
    rare = {"isad_tokens": "12"} if dataset == "add3" else {}  # a text has rare ones of its own
    cfg, data = prepare(args, method="isad", dataset=dataset, steps=100, **rare)
    cfg.ppots_refits = 1  # in step 0, which may wait
    n_calls = itertools.count()
    mark = lambda: listen("error" if WARM_UP < next(n_calls) < cfg.steps - 1 else "default")
    our_training(cfg, data, device, method, 3, "recorded", mark)
    ok = True if on_cuda else "skipped: no CUDA"
    yield {"method": method, "dataset": dataset, "ok": ok}


def profile(args, device, method, S):
    """Which kernels take the time of a recorded step? Microseconds and calls a step, the longest
    first."""
    on_cuda = device.startswith("cuda")
    os.environ["TEARDOWN_CUPTI"] = "0"  # or a second profile may see nothing
    activities = torch.profiler.ProfilerActivity
    profiler = torch.profiler.profile(activities=[activities.CUDA if on_cuda else activities.CPU])
    cfg, data = prepare(args, method=method, steps=WARM_UP + 40)
    cfg.ppots_refits = 1  # in step 0
    first, last = (2, 6) if args.tiny else (WARM_UP, WARM_UP + 30)
    n_calls = itertools.count()

    def mark():
        call = next(n_calls)
        if on_cuda and call in (first, last):
            torch.cuda.synchronize()
        if call == first:
            profiler.start()
        if call == last:
            profiler.stop()

    our_training(cfg, data, device, method, S, "recorded", mark)
    time_of = "self_device_time_total" if on_cuda else "self_cpu_time_total"
    found = [(getattr(e, time_of) / (last - first), e.count / (last - first), e.key[:90])
             for e in profiler.key_averages()]  # fmt: skip
    found = [x for x in sorted(found, reverse=True) if x[0] > 0]
    if not found:
        raise RuntimeError("the profiler saw no kernels")
    yield {"method": method, "seeds": S, "us": sum(us for us, _, _ in found)}
    for us, calls, kernel in found[:12]:
        yield {"method": method, "seeds": S, "us": us, "calls": calls, "kernel": kernel}


def compare(args, device):
    """`python train.py` with its default flags: seconds and accuracies."""
    cfg, data = prepare(args)
    with tempfile.TemporaryDirectory() as cfg.out_dir:
        train.compare(cfg, METHODS, train.PAPER_SEEDS, data, device)
        lines = runs.read_results(cfg.out_dir)
    seconds = {line["method"]: line["seconds"] for line in lines}  # of all its seeds together
    accuracy = {m: [x["accuracy"] for x in lines if x["method"] == m] for m in METHODS}
    yield {"training_s": sum(seconds.values()), "seconds": seconds, "accuracy": accuracy}


def text(args, device, method, precision):
    """A text at nanoGPT's size for it: tokens per second, and nats."""
    torch.set_float32_matmul_precision("high")  # TF32
    size = {"n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256, "batch_size": 64}
    length = {"steps": 1500, "eval_every": 500, "lr": 1e-3}
    cfg, data = prepare(args, method=method, dataset="shakespeare_char", **size, **length)
    short = argparse.Namespace(**vars(cfg) | {"steps": min(cfg.steps, WARM_UP + 30)})
    loss = train.sequence_loss

    def in_precision(*arguments):
        with torch.autocast(device.split(":")[0], torch.bfloat16, enabled=precision == "bf16"):
            return loss(*arguments)

    training = partial(our_training, short, data, device, method, 1, "recorded")
    name = {"method": method, "precision": precision}
    with patch.object(train, "sequence_loss", in_precision):
        ms, _, MB = measured(training, short.steps, device)
        yield {**name, "tokens_per_s": 1e3 * cfg.batch_size * cfg.block_size / ms, "MB": MB}
        for state in train.train(cfg, method, [42], data, device):
            yield {**name, "step": state["step"], "nats": state["curve"][-1]["nll"][0]}


CHECKED = [*METHODS, *mdm.MASKING, "syrm", "ema", "ppots_exactk", "clipped_exactk"]
WATCHED = [*METHODS, "exactk_strats_mirror", "sqrtk_batch2", "isad_ema", "syrm", "multi2",
           "ppots_exactk", "clipped_exactk"]  # fmt: skip
PARTS = {  # name: (function, cases, the most important first, and the limit in seconds)
    "check": (check, [[method] for method in CHECKED], 40),
    "resume": (resume, [[method] for method in [*METHODS, "strats_ema"]], 40),
    "sync": (sync, [[m] for m in WATCHED] + [["isad", "shakespeare_char"]], 40),
    "compare": (compare, [[]], 40),
    "steps": (steps_in_turns,
              [[METHODS, [1, 8, 32, 128], ["recorded"]], [METHODS, [1, 32], ["eager"]]], 90),
    "profile": (profile, [["mdm", 32], ["mdm", 1]], 30),
    "compiled": (steps_in_turns,
                 [[["arm"], [1], MODES], [["mdm"], [32], list(MODES)[:3]]], 120),
    "text": (text, [[m, p] for p in ("tf32", "bf16") for m in ("arm", "mdm", "sqrtk")], 280),
}  # fmt: skip


def say(part, **found):
    """Print a line of JSON, with four digits of each number."""
    found = {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in found.items()}
    print(json.dumps({"part": part, **found}), file=sys.__stdout__, flush=True)


def run_part(name, function, cases, args, device):
    """Say what a function finds. A case that fails costs none of the others, unless it failed in a
    recording: then believe none of the part's later cases."""
    sys.stdout = sys.stderr  # for all that others print
    for case in cases:
        try:
            for found in function(args, device, *case):
                say(name, **found)
        except Exception as error:
            traceback.print_exc()
            say(name, case=str(case), error=repr(error)[:200])


def run_parts(args, device):
    """Run each part as a process with a time limit: one that is late costs none of the others."""
    path = Path(args.out or os.path.join(os.environ.get("OUT", "out"), "gpu.jsonl"))
    path.parent.mkdir(parents=True, exist_ok=True)
    n_shown = 0
    end = time.perf_counter() + 460  # for all parts together
    with open(path, "w", buffering=1) as file, open(path.with_suffix(".log"), "w") as log:
        file.write(json.dumps({"part": "machine"} | runs.machine(device)) + "\n")
        for name, (_, _, limit) in PARTS.items():
            limit = max(1, min(limit, end - time.perf_counter()))
            command = [sys.executable, __file__, *sys.argv[1:], f"--part={name}"]
            try:
                subprocess.run(command, stdout=file, stderr=log, timeout=limit, check=True)
            except subprocess.SubprocessError as error:
                fault = f"{type(error).__name__}, its limit was {limit:.0f} s"
                file.write(json.dumps({"part": name, "error": fault}) + "\n")
            print(path.read_text()[n_shown:], end="", flush=True)
            n_shown = len(path.read_text())
    print_goals([json.loads(line) for line in path.read_text().splitlines() if line[0] == "{"])


def print_goals(lines):
    """Say how near the goals are, nan if not measured, and what went wrong."""
    ms = collections.defaultdict(lambda: torch.nan)
    for x in lines:
        if "ms" in x:
            ms[x["part"], x["method"], x["seeds"], x["mode"]] = x["ms"]
        if "training_s" in x:
            print(f"goal 20: train.py trains for {x['training_s']} s")
        if "error" in x or x.get("ok") is False:
            print(f"BAD {x}")
    for mode in ("recorded", "eager"):
        for method in METHODS:
            ratio = ms["steps", method, 32, mode] / ms["steps", method, 1, mode]
            print(f"goal 2: 32 seeds take {ratio:.2f} times the time of one ({method}, {mode})")
    for mode in MODES:
        ratio = ms["compiled", "arm", 1, mode] / ms["compiled", "nanoGPT", 1, "compiled"]
        print(f"goal 1: the ARM's step takes {ratio:.2f} times nanoGPT's compiled one ({mode})")


def main():
    formatter = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 8], help="how many [1 8]")
    parser.add_argument("--methods", nargs="+", default=METHODS, help="[arm mdm ppots_mirror]")
    parser.add_argument("--dataset", default="add3", help="[add3]")
    parser.add_argument("--rounds", type=int, default=3, help="[3]")
    parser.add_argument("--compile", action="store_true", help="compiled steps, too")
    parser.add_argument("--nanogpt", help="a clone of nanoGPT; its model.py is enough")
    parser.add_argument("--tiny_diffusion", help="a clone of tiny-diffusion")
    parser.add_argument("--gpu", action="store_true", help="all we ask of a GPU")
    parser.add_argument("--part", choices=list(PARTS), help="only this part of --gpu")
    parser.add_argument("--tiny", action="store_true", help="tiny models, to try the code")
    parser.add_argument("--out", help="--gpu: the file of results [$OUT/gpu.jsonl, out/gpu.jsonl]")
    args = parser.parse_args()
    device = train.pick_device("auto")
    sys.path[:0] = filter(None, [args.nanogpt, args.tiny_diffusion])
    if args.part:
        run_part(args.part, *PARTS[args.part][:2], args, device)
    elif args.gpu:
        run_parts(args, device)
    elif args.tiny_diffusion:
        run_part("text", tiny_diffusion, [()], args, device)
    else:
        print(f"{args.dataset}, {torch.get_num_threads()} threads on {device}")
        modes = ["eager", "compiled"] if args.compile else ["eager"]
        run_part("steps", steps_in_turns, [(args.methods, args.seeds, modes)], args, device)


if __name__ == "__main__":
    main()
