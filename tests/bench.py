"""Where the time goes, as ratios measured side by side in one run. Not a test.

    python tests/bench.py                                steps of each method, by number of seeds
    python tests/bench.py --dataset=shakespeare_char     the same at text's sizes
    python tests/bench.py --compile                      and compiled: from how many steps it pays
    python tests/bench.py --nanogpt=../nanoGPT           beside nanoGPT's own model, from a clone
    python tests/bench.py --tiny_diffusion=DIR           (with tqdm) train its model on our text;
                                                         score it with our bound, beside an MDM's
    python tests/bench.py --gpu                          all we ask of a GPU, within eight minutes
    python tests/bench.py --gpu --tiny                   the same with tiny models, even on a CPU

All that is compared takes turns, in rounds; every time is the median over rounds.
"""
import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from unittest.mock import patch

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import mdm
import train
from data import runs

WARM_UP = 6  # steps before those we time: they find memory, choose kernels, record CUDA graphs
MODES = {"eager": None, "compiled": "default", "graphs": "reduce-overhead"}  # of torch.compile
METHODS = ["arm", "mdm", "ppots_mirror"]
TINY = {"n_layer": 1, "n_head": 2, "n_embd": 16, "batch_size": 4, "steps": 9, "eval_every": 4}


def prepare(args, methods, dataset="add3", **settings):
    """train.py's settings and data. With --tiny the model and the training are tiny."""
    if args.tiny:
        own = {"n_test": 16} if train.kind_of(dataset) == "sums" else {"block_size": 16}
        settings = settings | TINY | own
    flags = [f"--{name}={value}" for name, value in settings.items()]
    flags += [f"--method={','.join(methods)}", f"--dataset={dataset}"]
    cfg, methods, _ = train.parse_args(flags)
    return cfg, train.load_data(cfg, methods)


def clock(device):
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter()


# --------------------------------------------------------------------------------------------------
# Steps. A training is a function of `mark`, which it calls once a step, after the gradient.


def our_training(cfg, data, device, method, n_seeds, mode="eager"):
    """train.train itself, without evaluations."""
    cfg = argparse.Namespace(**vars(cfg) | {"compile": mode != "eager"})
    torch_compile = functools.partial(torch.compile, mode=MODES[mode])
    clip = train.clip_per_seed

    def training(mark):
        def mark_and_clip(*arguments):
            mark()
            return clip(*arguments)

        with (
            patch.object(train, "clip_per_seed", mark_and_clip),
            patch.object(train, "evaluate", lambda *_, **quick: {"nll": [9.0] * n_seeds}),
            patch.object(torch, "compile", torch_compile),
        ):
            list(train.train(cfg, method, list(range(n_seeds)), data, device))

    return training


def nanogpt_training(cfg, data, device, mode="eager"):
    """nanoGPT's loop at our shape: its model, AdamW and clipping; data from memory."""
    import model as nanogpt

    T = data.test.shape[1] - 1
    shape = (T, len(data.vocabulary), cfg.n_layer, cfg.n_head, cfg.n_embd)
    model = nanogpt.GPT(nanogpt.GPTConfig(*shape, dropout=0.0)).to(device)
    decay = (cfg.weight_decay, cfg.lr, (0.9, cfg.beta2))
    optimizer = model.configure_optimizers(*decay, device.split(":")[0])
    loss_of = model if mode == "eager" else torch.compile(model, mode=MODES[mode])
    train_x = data.train_blocks(device)

    def training(mark):
        for _ in range(cfg.steps):
            idx = torch.randint(len(train_x), (cfg.batch_size,), device=device)
            x = train_x[idx].long()
            _, loss = loss_of(x[:, :-1].contiguous(), x[:, 1:].contiguous())
            loss.backward()
            mark()
            torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return training


def measured(training, steps, device):
    """Run a training of so many steps: the ms of a step, the seconds to the first gradient, with
    all compiling, and the most memory in MB, which only CUDA tells."""
    on_cuda = device.startswith("cuda")
    if on_cuda:
        torch.cuda.reset_peak_memory_stats()
    times = [clock(device)]

    def mark():
        wait = len(times) in (1, WARM_UP, steps)  # in other steps the GPU may lag behind
        times.append(clock(device) if wait else None)

    training(mark)
    ms = 1e3 * (times[steps] - times[WARM_UP]) / (steps - WARM_UP)
    MB = torch.cuda.max_memory_allocated() / 1e6 if on_cuda else "skipped, as there is no CUDA"
    return ms, times[1] - times[0], MB


def steps_in_turns(args, device, methods, numbers, modes, **settings):
    """Steps by method, by number of seeds and by mode: yield a dictionary for each."""
    torch._dynamo.config.automatic_dynamic_shapes = False  # a program for each number of seeds,
    torch._dynamo.config.cache_size_limit = 100  # as if there were no others
    steps = WARM_UP + (64 if args.gpu else 10)  # 64 steps draw one chunk of random numbers
    cfg, data = prepare(args, methods, steps=steps, **settings)
    cfg.ppots_refits = 1  # in the first step
    trainings = {}
    for mode in modes:
        if args.nanogpt and 1 in numbers:
            trainings["nanoGPT", 1, mode] = nanogpt_training(cfg, data, device, mode)
        for method in methods:
            for S in numbers:
                trainings[method, S, mode] = our_training(cfg, data, device, method, S, mode)
    rounds = [{key: measured(training, cfg.steps, device) for key, training in trainings.items()}
              for _ in range(args.rounds)]  # fmt: skip
    found = {key: statistics.median(each[key][0] for each in rounds) for key in trainings}
    for (method, S, mode), ms in found.items():
        _, start, MB = rounds[0][method, S, mode]
        line = {"method": method, "seeds": S, "mode": mode, "ms": ms, "per_seed": ms / S, "MB": MB}
        if ("nanoGPT", 1, mode) in found:
            line["x_nanoGPT"] = ms / S / found["nanoGPT", 1, mode]
        if mode != "eager":
            line["compiling_s"] = start - rounds[0][method, S, "eager"][1]
            saved = found[method, S, "eager"] - ms
            line["pays_after_steps"] = 1e3 * line["compiling_s"] / saved if saved > 0 else "never"
        yield line


def tiny_diffusion(args, device):
    """Train tiny-diffusion's model by its own train_step. Then score it on our validation blocks
    with our bound, its mask token's logit off and its time the share of masked tokens."""
    import training

    cfg, data = prepare(args, ["mdm"], "shakespeare_char", eval_every=2000)
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
    began = clock(device)
    for _ in range(cfg.steps):
        idx = torch.randint(len(train_x), (cfg.batch_size,), device=device)
        training.train_step(theirs, train_x[idx].long(), schedule, optimizer)
    seconds = clock(device) - began

    class AsOurs:
        """Their model with our interface: one seed, positions asked for, no mask in the logits."""

        config = mdm.GPTConfig(V, T, n_embd=cfg.n_embd)
        wte = torch.zeros(1, device=device)

        def __call__(self, idx, pos):
            share = (idx[0] == V).float().mean(-1) * T / (T - 1)
            t = (share * (schedule.num_timesteps - 1)).round().long()
            return theirs(idx[0], t)[None, :, pos, :V]

    theirs.eval()
    nats = train.evaluate(AsOurs(), data)["nll"][0]
    yield {"method": "tiny-diffusion", "nats": nats, "seconds": seconds}
    *_, state = train.train(cfg, "mdm", [42], data, device)
    yield {"method": "mdm", "nats": state["curve"][-1]["nll"][0], "seconds": state["seconds"]}


# --------------------------------------------------------------------------------------------------
# --gpu has parts, and a part has cases. Each function yields what it finds about one case.


def difference(ours, theirs):
    """The largest difference between two lists of tensors, relative to each tensor's largest."""
    worst = 0.0
    for a, b in zip(ours, theirs, strict=True):
        a = a.detach().cpu().double()
        b = b.detach().cpu().double()
        worst = max(worst, ((a - b).abs().max() / b.abs().max().clamp(min=1e-30)).item())
    return worst


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
    x0 = data.train[:64].view(2, 32, -1).to(device)
    rare = torch.tensor(data.isad, device=device)
    is_rare = torch.isin(x0[..., pos], rare)
    length = torch.arange(64, device=device).view(2, 32, 1) % n + 1
    response = torch.arange(n, device=device) < length  # of 1 to n tokens

    counts, H = mdm.pilot(model, x0, pos, pilot_r)
    table = mdm.ppots_table(counts, H, n, fit="grid")
    masking = words & mdm.MASKING.keys()
    draws = mdm.draw_masks(masking, u, r, table, is_rare=is_rare, response=response)
    question = x0.index_fill(-1, pos, model.config.vocab_size)
    states = list(mdm.generate(model, question, pos))
    loss = train.sequence_loss(model, words, x0, pos, u, r, table, rare, cfg.eps)
    if "ema" in words:
        loss, _ = mdm.ema_baseline(loss, u, torch.ones(2, 10, device=device))
    loss.sum().backward()
    gradient = [p.grad for p in model.parameters()]
    found = {"pilot": [H, table], "draws": draws, "generated": states, "loss": [loss]}
    return found | {"gradient": gradient, "variance": mdm.grams(model, x0[0, :2], pos)}


def check(args, device, method):
    """Does the device compute what the CPU does?"""
    cfg, data = prepare(args, ["isad"], isad_tokens="12")
    here = computed(cfg, data, method, "cpu")
    there = computed(cfg, data, method, device)
    found = {name: difference(there[name], here[name]) for name in here}
    yield {"method": method, **found, "ok": max(found.values()) <= 1e-4}


def resume(args, device, method):
    """Is a resumed run the uninterrupted one to the bit? Is a seed alone the seed among others?"""
    seeds = [42, 731, 20231, 0, 1, 2, 3, 4]
    cfg, data = prepare(args, [method], steps=20, eval_every=10)
    whole = list(train.train(cfg, method, seeds, data, device))
    with tempfile.TemporaryDirectory() as folder:
        runs.save_checkpoint(f"{folder}/ckpt.pt", {"state": whole[1]})
        halfway = runs.load_checkpoint(f"{folder}/ckpt.pt")["state"]
    *_, resumed = train.train(cfg, method, seeds, data, device, halfway)
    *_, again = train.train(cfg, method, seeds, data, device)
    *_, alone = train.train(cfg, method, [731], data, device)
    weights = [list(state["model"].values()) for state in (whole[-1], resumed, again)]
    among_others = torch.tensor([point["loss"][1] for point in whole[-1]["curve"][1:]])
    by_itself = torch.tensor([point["loss"][0] for point in alone["curve"][1:]])
    found = {"resumed": difference(weights[1], weights[0])}
    found["repeated"] = difference(weights[2], weights[0])  # if not 0, resumed cannot be 0
    found["alone"] = difference([by_itself], [among_others])
    yield {"method": method, **found, "ok": found["resumed"] == 0 and found["alone"] <= 1e-4}


def sync(args, device, method):
    """Does the CPU ever wait for the GPU between two evaluations? torch raises an error then. We
    listen from the first gradient to the last, so P-POTS' pilot, in step 0, may wait."""
    on_cuda = device.startswith("cuda")
    listen = torch.cuda.set_sync_debug_mode if on_cuda else lambda mode: None
    cfg, data = prepare(args, ["isad"], isad_tokens="12", steps=100)
    cfg.ppots_refits = 1
    steps_left = list(range(cfg.steps))

    def mark():
        steps_left.pop()
        listen("error" if steps_left else "default")

    try:
        our_training(cfg, data, device, method, 3)(mark)
    finally:
        listen("default")
    yield {"method": method, "ok": True if on_cuda else "skipped, as there is no CUDA"}


def compare(args, device):
    """`python train.py` with its default flags: seconds and accuracies."""
    tiny = [f"--{name}={value}" for name, value in TINY.items()] if args.tiny else []
    with tempfile.TemporaryDirectory() as folder:
        train.main([f"--out_dir={folder}", *tiny])
        lines = runs.read_results(folder)
    seconds = {line["method"]: line["seconds"] for line in lines}  # of all its seeds together
    for method in seconds:
        accuracy = [line["accuracy"] for line in lines if line["method"] == method]
        yield {"method": method, "seconds": seconds[method], "accuracy": accuracy}
    yield {"training_s": sum(seconds.values())}


def text(args, device, method, precision):
    """A text at nanoGPT's size for it: tokens per second, and nats."""
    torch.set_float32_matmul_precision("high")  # TF32
    size = {"n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256, "batch_size": 64}
    length = {"steps": 1500, "eval_every": 500, "lr": 1e-3}
    cfg, data = prepare(args, [method], "shakespeare_char", **size, **length)
    short = argparse.Namespace(**vars(cfg) | {"steps": WARM_UP + (2 if args.tiny else 30)})
    loss = train.sequence_loss

    def in_precision(*arguments):
        with torch.autocast(device.split(":")[0], torch.bfloat16, enabled=precision == "bf16"):
            return loss(*arguments)

    with patch.object(train, "sequence_loss", in_precision):
        ms, _, MB = measured(our_training(short, data, device, method, 1), short.steps, device)
        name = {"method": method, "precision": precision}
        yield {**name, "tokens_per_s": 1e3 * cfg.batch_size * cfg.block_size / ms, "MB": MB}
        for state in train.train(cfg, method, [42], data, device):
            yield {**name, "step": state["step"], "nats": state["curve"][-1]["nll"][0]}


CHECKED = ["mdm", *mdm.MASKING, *mdm.TRAINING, "ppots_mirror", "ppots_exactk", "clipped_exactk"]
WATCHED = [*METHODS, "exactk_strats_mirror", "sqrtk_batch2", "isad_ema", "syrm", "multi2"]
PARTS = {  # name: (function, the cases in the order of their weight, the limit in seconds)
    "check": (check, [[method] for method in CHECKED], 60),
    "resume": (resume, [[method] for method in METHODS], 60),
    "sync": (sync, [[method] for method in WATCHED], 60),
    "compare": (compare, [[]], 60),
    "steps": (steps_in_turns, [[METHODS, [1, 8, 32, 128], ["eager"]]], 60),
    "text": (text, [[m, p] for p in ("tf32", "bf16") for m in ("arm", "mdm", "sqrtk")], 220),
    "compiled": (steps_in_turns,
                 [[[method], [S], MODES] for S in (1, 32, 8, 128) for method in METHODS], 240),
}  # fmt: skip
SECONDS = 460  # for all parts together


def run_part(args, device):
    """Print a line of JSON for each result as soon as it is there. A case that fails costs none
    of the others."""
    function, cases, _ = PARTS[args.part]
    stdout = sys.stdout
    sys.stdout = sys.stderr  # for all that others print
    for case in cases[:2] if args.tiny and args.part == "compiled" else cases:
        try:
            for line in function(args, device, *case):
                print(json.dumps({"part": args.part} | line), file=stdout, flush=True)
        except Exception as error:
            traceback.print_exc()
            line = {"part": args.part, "case": str(case), "error": repr(error)[:200]}
            print(json.dumps(line), file=stdout, flush=True)


def run_parts(args, device):
    """Run each part as a process with a time limit: one that is late costs none of the others."""
    path = Path(args.out or os.path.join(os.environ.get("OUT", "out"), "gpu.jsonl"))
    path.parent.mkdir(parents=True, exist_ok=True)
    machine = {"part": "machine", "device": device, **train.machine(device)}
    path.write_text(json.dumps(machine) + "\n")
    lines = []
    end = time.perf_counter() + SECONDS
    for name, (_, _, limit) in PARTS.items():
        began = time.perf_counter()
        seconds = max(1, min(limit, end - began))
        command = [sys.executable, __file__, *sys.argv[1:], f"--part={name}"]
        last = {"part": name}
        with open(path, "a") as file, open(path.with_suffix(".log"), "a") as log:
            try:
                subprocess.run(command, stdout=file, stderr=log, timeout=seconds, check=True)
            except subprocess.SubprocessError as error:
                last["error"] = f"{type(error).__name__}: limit {seconds:.0f} s, see {log.name}"
            last["seconds"] = time.perf_counter() - began
            file.write(json.dumps(last) + "\n")
        n_shown = len(lines)
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        print("\n".join(map(readable, lines[n_shown:])), flush=True)
    print_goals(lines)


def readable(line):
    """A result as text: "part step  method mdm  seeds 8  ms 3.21"."""
    return "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in line.items())


def print_goals(lines):
    """Say how far the goals are reached, as far as there are numbers."""
    print("\nGoals: 32 seeds in at most twice the time of one; at most 20 s of training in train.py;"
          "\nan ARM at one seed no slower than nanoGPT's compiled step. In numbers:")
    ms = {(x["method"], x["seeds"], x["mode"]): x["ms"] for x in lines if "ms" in x}
    for method, S, mode in ms:
        if S == 32:
            ratio = ms[method, 32, mode] / ms[method, 1, mode]
            print(f"32 seeds take {ratio:.2f} times the time of one ({method}, {mode})")
        if (method, S) == ("arm", 1) and ("nanoGPT", 1, "compiled") in ms:
            ratio = ms[method, S, mode] / ms["nanoGPT", 1, "compiled"]
            print(f"an ARM's step takes {ratio:.2f} times nanoGPT's compiled one ({mode})")
    for x in lines:
        if "training_s" in x:
            print(f"train.py trains for {x['training_s']:.1f} s")
        if "error" in x or x.get("ok") is False:
            print("BAD", readable(x))


def main():
    formatter = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--seeds", default="1,8", help="numbers of seeds [1,8]")
    parser.add_argument("--methods", default=",".join(METHODS), help="[arm,mdm,ppots_mirror]")
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
        return run_part(args, device)
    if args.gpu:
        return run_parts(args, device)
    found = tiny_diffusion(args, device)
    if not args.tiny_diffusion:
        print(f"{args.dataset}, {torch.get_num_threads()} threads on {device}")
        modes = ["eager", "compiled"] if args.compile else ["eager"]
        case = args.methods.split(","), [int(S) for S in args.seeds.split(",")], modes
        found = steps_in_turns(args, device, *case, dataset=args.dataset)
    for line in found:
        print(readable(line), flush=True)


if __name__ == "__main__":
    main()
