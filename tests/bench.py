"""Where the time goes, as ratios measured side by side in one run. Not a test.

    python tests/bench.py                                steps of each method, by number of seeds
    python tests/bench.py --dataset=shakespeare_char     the same at text's sizes
    python tests/bench.py --compile                      and compiled: from how many steps it pays
    python tests/bench.py --nanogpt=../nanoGPT           beside nanoGPT's own model, from a clone
    python tests/bench.py --tiny_diffusion=DIR           (with tqdm) train its model on our text;
                                                         score it with our bound, beside an MDM's
    python tests/bench.py --gpu                          all we ask of a GPU, within eight minutes
    python tests/bench.py --gpu --tiny                   the same with tiny models, even on a CPU
    python tests/bench.py --gpu --part=sync              one of its parts alone

All that is compared takes turns, in rounds; every figure is the median over rounds.
"""
import argparse
import contextlib
import functools
import importlib
import io
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path
from unittest.mock import patch

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import mdm
import train
from data import runs

WARM_UP = 5  # steps before those we time: they find memory, choose kernels and record CUDA graphs
MODES = {"eager": None, "compiled": "default", "graphs": "reduce-overhead"}  # of torch.compile


def clock(device):
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter()


def prepare(args, methods, *flags):
    """Settings and data, as train.py makes them. --tiny makes the model and the training tiny."""
    if args.tiny:
        sizes = "--n_layer=1 --n_head=2 --n_embd=16 --batch_size=4 --steps=9 --eval_every=4"
        text = any("shakespeare" in flag for flag in flags)
        own = "--block_size=16" if text else "--n_test=16"
        flags = [*flags, *sizes.split(), own]
    cfg, methods, _ = train.parse_args([f"--method={','.join(methods)}", *flags])
    return cfg, train.load_data(cfg, methods)


# --------------------------------------------------------------------------------------------------
# A step: ours, nanoGPT's, tiny-diffusion's.


def our_step(cfg, method, n_seeds, data, device, mode="eager"):
    """A function that trains by train.train itself, and returns the seconds (of a step, of the
    start). The start is the time to the first gradient, compiling included."""
    cfg = argparse.Namespace(**vars(cfg) | {"compile": mode != "eager"})
    n_timed = cfg.steps - WARM_UP - 1
    torch_compile = functools.partial(torch.compile, mode=MODES[mode])
    clip = train.clip_per_seed

    def measure():
        marks = []

        def marked(*arguments):  # train.train calls it once a step
            wanted = len(marks) in (0, WARM_UP, WARM_UP + n_timed)
            marks.append(clock(device) if wanted else None)
            return clip(*arguments)

        no_scores = {"nll": [9.0] * n_seeds}
        began = clock(device)
        with (
            patch.object(train, "clip_per_seed", marked),
            patch.object(train, "evaluate", lambda *_, **quick: no_scores),
            patch.object(torch, "compile", torch_compile),
        ):
            for _ in train.train(cfg, method, list(range(n_seeds)), data, device):
                pass
        return (marks[WARM_UP + n_timed] - marks[WARM_UP]) / n_timed, marks[0] - began

    return measure


def imported(path, name):
    """A module of somebody's repository, which finds its own neighbours first."""
    sys.path.insert(0, str(Path(path).resolve()))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.pop(0)


def nanogpt_step(path, cfg, data, device, mode="eager"):
    """The same for nanoGPT's loop at our shape: its model, AdamW, clipping; data from memory."""
    theirs = imported(path, "model")
    config = theirs.GPTConfig(
        block_size=data.test.shape[1] - 1, vocab_size=len(data.vocabulary), n_layer=cfg.n_layer,
        n_head=cfg.n_head, n_embd=cfg.n_embd, dropout=0.0, bias=True,
    )  # fmt: skip
    with contextlib.redirect_stdout(sys.stderr):  # they talk
        model = theirs.GPT(config).to(device)
        betas = (0.9, cfg.beta2)
        kind = device.split(":")[0]
        optimizer = model.configure_optimizers(cfg.weight_decay, cfg.lr, betas, kind)
    train_x = data.train_blocks(device)
    loss_of = model if mode == "eager" else torch.compile(model, mode=MODES[mode])
    n_timed = cfg.steps - WARM_UP - 1

    def step():
        idx = torch.randint(len(train_x), (cfg.batch_size,), device=device)
        x = train_x[idx].long()
        _, loss = loss_of(x[:, :-1].contiguous(), x[:, 1:].contiguous())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def measure():
        began = clock(device)
        step()
        start = clock(device) - began
        for _ in range(WARM_UP):
            step()
        began = clock(device)
        for _ in range(n_timed):
            step()
        return (clock(device) - began) / n_timed, start

    return measure


def take_turns(steps, n_rounds):
    """Measure a dictionary of steps in turns: {key: (ms of a step, seconds of the first start)}."""
    found = {key: [] for key in steps}
    for _ in range(n_rounds):
        for key, measure in steps.items():
            found[key].append(measure())
    answer = {}
    for key, times in found.items():
        step_ms = 1e3 * statistics.median(step for step, _ in times)
        first_start = times[0][1]
        answer[key] = step_ms, first_start
    return answer


def one_program_per_shape():
    """Let torch.compile treat each number of seeds as a training that knows no other would."""
    torch._dynamo.config.automatic_dynamic_shapes = False
    torch._dynamo.config.cache_size_limit = 100


def tiny_diffusion(path, cfg, data, device):
    """Train tiny-diffusion's model by its own train_step. Then score it on our validation blocks
    with our bound, its mask token's logit off and its time the share of masked tokens."""
    training = imported(path, "training")
    V = len(data.vocabulary)
    T = data.test.shape[1]
    config = training.DiffusionConfig(
        sequence_len=T, vocab_size=V + 1, mask_token_id=V, n_layer=cfg.n_layer, n_head=cfg.n_head,
        n_embd=cfg.n_embd, context_len=1,
    )  # fmt: skip
    torch.manual_seed(42)
    theirs = training.DiffusionTransformer(config).to(device)
    theirs.init_weights()
    schedule = training.MaskedDiffusionSchedule(config.diffusion_steps, V, 1)
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=3e-4, weight_decay=cfg.weight_decay)
    train_x = data.train_blocks(device)
    began = clock(device)
    for step in range(cfg.steps):
        x = train_x[torch.randint(len(train_x), (cfg.batch_size,), device=device)].long()
        training.train_step(theirs, x, schedule, optimizer)
        if step % 500 == 0:
            print(f"  tiny-diffusion step {step}/{cfg.steps}", flush=True)
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
    nll = train.evaluate(AsOurs(), data)["nll"][0]
    print(f"tiny-diffusion: {nll:.3f} nats per character after {seconds:.0f} s")
    *_, state = train.train(cfg, "mdm", [42], data, device)
    nll = state["curve"][-1]["nll"][0]
    print(f"mdm: {nll:.3f} nats per character after {state['seconds']:.0f} s")


def table_of_steps(args, device):
    """The default: a table of steps, by method and by number of seeds."""
    methods = args.methods.split(",")
    flags = [f"--dataset={args.dataset}", "--steps=16", "--eval_every=2000", "--ppots_refits=1"]
    cfg, data = prepare(args, methods, *flags)
    one_program_per_shape()
    modes = ["eager", "compiled"] if args.compile else ["eager"]
    steps = {}
    for mode in modes:
        if args.nanogpt:
            steps["nanoGPT", 1, mode] = nanogpt_step(args.nanogpt, cfg, data, device, mode)
        for method in methods:
            for S in map(int, args.seeds.split(",")):
                steps[method, S, mode] = our_step(cfg, method, S, data, device, mode)
    found = take_turns(steps, args.rounds)

    threads = torch.get_num_threads()
    print(f"{args.dataset}, {threads} threads on {device}, torch {torch.__version__}")
    print(f"{'method':14}{'seeds':>6}{'':>10}{'ms/step':>9}{'per seed':>9}{'x nanoGPT per seed':>20}")
    for (method, S, mode), (ms, start) in found.items():
        line = f"{method:14}{S:6}{mode:>10}{ms:9.2f}{ms / S:9.2f}"
        if args.nanogpt:
            line += f"{ms / S / found['nanoGPT', 1, mode][0]:20.2f}"
        if mode == "compiled":
            eager_ms, eager_start = found[method, S, "eager"]
            saved = (eager_ms - ms) / 1e3
            pays = f"pays after {(start - eager_start) / saved:.0f} steps" if saved > 0 else "no gain"
            line += f"   compiling took {start - eager_start:.0f} s: {pays}"
        print(line)


# --------------------------------------------------------------------------------------------------
# --gpu. Each part is a program of its own, with its own time limit. It prints a line of JSON for
# each result, as soon as it is there: a late or failing part costs nothing but what it lacks.


def result(part, **fields):
    print(json.dumps({"part": part, **fields}), flush=True)


def difference(ours, theirs):
    """The largest difference between two lists of tensors, relative to each tensor's largest."""
    worst = 0.0
    for a, b in zip(ours, theirs, strict=True):
        a = a.detach().cpu().double()
        b = b.detach().cpu().double()
        if not torch.equal(a, b):
            worst = max(worst, ((a - b).abs().max() / b.abs().max()).item())
    return worst


def inputs(shape, n, device, doubled=False):
    """Random u, r and a table for draw_masks, the same on every device."""
    draw = torch.Generator().manual_seed(0)
    u = 1 - torch.rand(shape, generator=draw)
    r = torch.rand(*([2] if doubled else []), *shape, n, generator=draw)
    table = 0.1 + torch.rand(shape[0], mdm.N_CELLS, generator=draw)
    table = table / table.sum(-1, keepdim=True)
    return u.to(device), r.to(device), table.to(device)


def loss_and_gradient(cfg, data, method, device):
    """Of a batch of 32 sequences for two seeds: what a step of training begins with."""
    words = mdm.parse_method(method)
    model, pos = train.build(cfg, method, [1, 2], data, device)
    x0 = data.train[:64].view(2, 32, -1).to(device)
    u, r, table = inputs((2, 32), len(pos), device, "multi2" in words)
    rare = torch.tensor(data.isad, device=device)
    loss = train.sequence_loss(model, words, x0, pos, u, r, table, rare, cfg.eps)
    if "ema" in words:
        loss, _ = mdm.ema_baseline(loss, u, torch.ones(2, 10, device=device))
    loss.sum().backward()
    return [loss, *(p.grad for p in model.parameters())]


def draws_in_responses(method, device):
    """Masks and weights of responses of 1 to 13 tokens, as a fine-tune of one's own has them."""
    u, r, table = inputs((2, 32), 13, device, "multi2" in method)
    position = torch.arange(13, device=device)
    length = torch.arange(64, device=device).view(2, 32, 1) % 13 + 1
    response = position < length
    is_rare = (position % 3 == 0).expand(2, 32, 13)
    return mdm.draw_masks(method, u, r, table, is_rare=is_rare, response=response)


def generated(cfg, data, method, order, device):
    """All states of a generation for two seeds."""
    model, pos = train.build(cfg, method, [1, 2], data, device)
    x = data.test[:16].expand(2, -1, -1).to(device).clone()
    x[..., pos] = model.config.vocab_size
    return list(mdm.generate(model, x, pos, order=order))


def pilot_and_variance(cfg, data, device):
    """A pilot's H, P-POTS' table of it, and the matrices of the exact variance."""
    model, pos = train.build(cfg, "mdm", [1, 2], data, device)
    x0 = data.train[:16].view(2, 8, -1).to(device)
    _, r, _ = inputs((2, 8 * len(pos)), len(pos), device)
    counts, H = mdm.pilot(model, x0, pos, r.view(2, 8, len(pos), len(pos)))
    table = mdm.ppots_table(counts, H, len(pos), fit="grid")
    return [H, table, *mdm.grams(model, x0[0, :2], pos)]


def check_part(args, device):
    """Does the device compute what the CPU does? For every word, and for all that mdm.py offers."""
    cfg, data = prepare(args, ["isad"], "--isad_tokens=12")
    checks = {}
    for method in ["mdm", *mdm.MASKING, *mdm.TRAINING, "ppots_mirror", "ppots_exactk",
                   "clipped_exactk", "sqrtk_mirror", "isad_strats_mirror"]:  # fmt: skip
        checks[f"loss of {method}"] = functools.partial(loss_and_gradient, cfg, data, method)
    for method in [*mdm.MASKING, "ppots_exactk", "sqrtk_mirror"]:
        checks[f"draws of {method}"] = functools.partial(draws_in_responses, method)
    for method, order in [("arm", "left"), ("mdm", "left"), ("mdm", "confidence")]:
        name = f"generation of {method}, {order}"
        checks[name] = functools.partial(generated, cfg, data, method, order)
    checks["pilot and variance"] = functools.partial(pilot_and_variance, cfg, data)
    for name, check in checks.items():
        try:
            worst = difference(check(device), check("cpu"))
            result("checks", what=name, worst=worst, ok=worst <= 1e-4)
        except Exception as e:  # the other checks go on
            result("checks", what=name, error=repr(e)[:300], ok=False)


def resume_part(args, device):
    """Is a resumed run the uninterrupted one, to the bit? Is a seed alone the seed among others?"""
    seeds = train.parse_seeds(argparse.Namespace(seeds="", n_seeds=8))
    for method in ("arm", "mdm", "ppots_mirror"):
        cfg, data = prepare(args, [method], "--steps=60", "--eval_every=30")
        whole = list(train.train(cfg, method, seeds[:3], data, device))
        again = list(train.train(cfg, method, seeds[:3], data, device))
        file = io.BytesIO()
        torch.save(whole[1], file)
        file.seek(0)
        halfway = torch.load(file, map_location="cpu", weights_only=True)
        resumed = list(train.train(cfg, method, seeds[:3], data, device, halfway))
        last = list(whole[-1]["model"].values())
        worst = difference(resumed[-1]["model"].values(), last)
        repeated = difference(again[-1]["model"].values(), last)
        result("resume", method=method, resumed=worst, repeated=repeated, ok=worst == 0)

        cfg, data = prepare(args, [method])
        cfg.eval_every = 1
        cfg.steps = 6
        *_, together = train.train(cfg, method, seeds, data, device)
        *_, alone = train.train(cfg, method, seeds[1:2], data, device)
        theirs = torch.tensor([point["loss"][1] for point in together["curve"][1:]])
        own = torch.tensor([point["loss"][0] for point in alone["curve"][1:]])
        worst = difference([own], [theirs])
        result("resume", method=method, alone=worst, ok=worst <= 1e-4)


def sync_part(args, device):
    """Does the CPU ever wait for the GPU between two evaluations? torch raises an error then."""
    on_cuda = device.startswith("cuda")
    watch = torch.cuda.set_sync_debug_mode if on_cuda else lambda mode: None

    def unwatched(function, afterwards):
        def call(*arguments, **named):
            watch("default")
            answer = function(*arguments, **named)
            watch(afterwards)
            return answer

        return call

    evaluate = unwatched(train.evaluate, "default")  # until train() yields
    measure_table = unwatched(train.measure_table, "error")  # P-POTS' few pilots may wait
    for method in ["arm", "mdm", "ppots_mirror", "exactk_strats_mirror", "sqrtk_batch2",
                   "isad_ema", "syrm_steps2", "multi2", "clipped_exactk"]:  # fmt: skip
        cfg, data = prepare(args, ["isad"], "--isad_tokens=12", "--steps=140", "--eval_every=70")
        where = None
        try:
            with (
                patch.object(train, "evaluate", evaluate),
                patch.object(train, "measure_table", measure_table),
            ):
                for _ in train.train(cfg, method, [42, 731, 20231], data, device):
                    watch("error")
        except RuntimeError as e:
            frames = traceback.extract_tb(e.__traceback__)
            ours = [frame for frame in frames if frame.filename.startswith(str(ROOT))]
            where = f"{Path(ours[-1].filename).name}:{ours[-1].lineno} {str(e)[:150]}"
        watch("default")
        if on_cuda or where:
            result("sync", method=method, waits=where, ok=where is None)
    if not on_cuda:
        result("sync", skipped="the loop ran, but only CUDA tells when the CPU waits for it")


def compare_part(args, device):
    """`python train.py` with its default flags: seconds and accuracies."""
    tiny = "--n_layer=1 --n_head=2 --n_embd=16 --batch_size=4 --steps=9 --n_test=16".split()
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        train.main([f"--out_dir={folder}", *(tiny if args.tiny else [])])
        lines = runs.read_results(folder)
    wall = time.perf_counter() - began
    seconds = {line["method"]: line["seconds"] for line in lines}  # of all its seeds together
    for method in seconds:
        accuracy = [line["accuracy"] for line in lines if line["method"] == method]
        result("compare", method=method, seconds=seconds[method], accuracy=accuracy)
    result("compare", seconds_of_training=sum(seconds.values()), seconds_with_all_else=wall)


def timed_settings(args):
    """65 steps after the warm-up: one chunk of random numbers is drawn among them."""
    steps = WARM_UP + 1 + 64
    cfg, data = prepare(args, ["ppots"], f"--steps={steps}", "--ppots_refits=1")
    cfg.eval_every = cfg.steps
    return cfg, data, [1, 32] if args.tiny else [1, 8, 32, 128]


def steps_part(args, device):
    """A step by method and by number of seeds, not compiled."""
    cfg, data, numbers = timed_settings(args)
    steps = {}
    if args.nanogpt:
        steps["nanoGPT", 1] = nanogpt_step(args.nanogpt, cfg, data, device)
    for method in ("arm", "mdm", "ppots_mirror"):
        for S in numbers:
            steps[method, S] = our_step(cfg, method, S, data, device)
    for (method, S), (ms, _) in take_turns(steps, 2 if args.tiny else 3).items():
        result("steps", method=method, seeds=S, ms=ms, ms_per_seed=ms / S)


def memory_part(args, device):
    """The most memory that a training takes, by method and by number of seeds."""
    if not device.startswith("cuda"):
        return result("memory", skipped=f"torch does not count the memory of {device}")
    cfg, data, numbers = timed_settings(args)
    for method in ("arm", "mdm", "ppots_mirror"):
        for S in numbers:
            torch.cuda.reset_peak_memory_stats()
            our_step(cfg, method, S, data, device)()
            result("memory", method=method, seeds=S, MB=torch.cuda.max_memory_allocated() / 1e6)


def text_part(args, device):
    """A text at nanoGPT's size for it, in two precisions: nats and tokens per second."""
    torch.set_float32_matmul_precision("high")  # TF32
    methods = ["arm", "mdm", "sqrtk"]
    flags = "--n_layer=6 --n_head=6 --n_embd=384 --block_size=256 --batch_size=64 --lr=1e-3"
    cfg, data = prepare(args, methods, "--dataset=shakespeare_char", *flags.split(),
                        "--steps=1500", "--eval_every=500")  # fmt: skip
    sequence_loss = train.sequence_loss
    evaluate = train.evaluate
    pauses = []

    def in_bfloat16(*arguments):
        with torch.autocast(device.split(":")[0], torch.bfloat16):
            return sequence_loss(*arguments)

    def timed_evaluate(*arguments, **quick):
        began = clock(device)
        scores = evaluate(*arguments, **quick)
        pauses.append(clock(device) - began)
        return scores

    for precision, loss in [("bf16", in_bfloat16), ("tf32", sequence_loss)]:
        for method in methods:
            pauses.clear()
            with (
                patch.object(train, "sequence_loss", loss),
                patch.object(train, "evaluate", timed_evaluate),
            ):
                for state in train.train(cfg, method, [42], data, device):
                    if state["step"]:
                        tokens = state["step"] * cfg.batch_size * cfg.block_size
                        rate = tokens / (state["seconds"] - sum(pauses))
                        result("text", precision=precision, method=method, step=state["step"],
                               nats=state["curve"][-1]["nll"][0], tokens_per_s=rate)


def compiled_part(args, device):
    """A step compiled, and replayed from CUDA graphs. The most telling ones come first."""
    cfg, data, numbers = timed_settings(args)
    one_program_per_shape()
    jobs = [(S, method) for S in (1, 32, 8, 128) for method in ("arm", "mdm", "ppots_mirror")]
    for S, method in jobs[:1] if args.tiny else jobs:
        steps = {}
        for mode in MODES:
            steps[method, mode] = our_step(cfg, method, S, data, device, mode)
            if args.nanogpt and (S, method) == jobs[0]:
                steps["nanoGPT", mode] = nanogpt_step(args.nanogpt, cfg, data, device, mode)
        try:
            found = take_turns(steps, 2 if args.tiny else 3)
        except Exception as e:  # the other jobs go on
            result("compiled", method=method, seeds=S, error=repr(e)[:300])
            continue
        for (name, mode), (ms, start) in found.items():
            result("compiled", method=name, seeds=S, mode=mode, ms=ms, seconds_to_start=start)


PARTS = {  # in this order, each with its limit in seconds
    "checks": (check_part, 60),
    "resume": (resume_part, 60),
    "sync": (sync_part, 60),
    "compare": (compare_part, 60),
    "steps": (steps_part, 60),
    "memory": (memory_part, 40),
    "text": (text_part, 220),
    "compiled": (compiled_part, 240),
}
SECONDS = 460  # for all parts together


def lines_of_part(name, seconds, log):
    """Run a part for at most so many seconds, and yield its results as dictionaries."""
    if seconds < 5:
        yield {"part": name, "error": "no time was left"}
        return
    command = [sys.executable, __file__, *sys.argv[1:], f"--part={name}"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True
    )

    def stop():  # it and its own children, such as compilers
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)

    timer = threading.Timer(seconds, stop)
    timer.start()
    try:
        for line in process.stdout:
            if line.startswith("{"):
                yield json.loads(line)
        code = process.wait()
    finally:
        timer.cancel()
        stop()
    if code == -signal.SIGKILL:
        yield {"part": name, "error": f"stopped after {seconds:.0f} s"}
    elif code:
        yield {"part": name, "error": f"failed with code {code}: see {log.name}"}


def readable(line):
    """A result as text: "steps     method mdm  seeds 8  ms 3.21"."""
    shown = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in line.items() if k != "part"}
    return f"{line['part']:10}" + "  ".join(f"{k} {v}" for k, v in shown.items())


def print_goals(lines):
    """Say how far the goals are reached, as far as there are numbers."""
    step = {(x["method"], x["seeds"]): x["ms"] for x in lines if x["part"] == "steps" and "ms" in x}
    for method, S in step:
        if S == 32:
            ratio = step[method, 32] / step[method, 1]
            print(f"goal: 32 seeds take at most twice the time of one. {method}: {ratio:.2f} times")
    for x in lines:
        if "seconds_of_training" in x:
            seconds = x["seconds_of_training"]
            print(f"goal: train.py trains for at most 20 s. It took {seconds:.1f} s")
    one = {(x["method"], x["mode"]): x["ms"] for x in lines if "mode" in x and x["seeds"] == 1}
    for mode in MODES:
        if ("nanoGPT", "compiled") in one:
            ratio = one["arm", mode] / one["nanoGPT", "compiled"]
            print("goal: ARM at one seed is no slower than nanoGPT's compiled step. "
                  f"{mode}: {ratio:.2f} times its time")  # fmt: skip
    bad = [x for x in lines if "error" in x or x.get("ok") is False]
    print(f"{len(lines)} results, {len(bad)} of them bad")
    for x in bad:
        print("BAD", readable(x))


def gpu(args, device):
    """Run all parts, print what they find, and write it down."""
    began = time.perf_counter()
    path = Path(args.out or Path(os.environ.get("OUT", "out")) / "gpu.jsonl")
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = []
    with open(path, "w") as file, open(path.with_suffix(".log"), "w") as log:

        def keep(line):
            lines.append(line)
            file.write(json.dumps(line) + "\n")
            file.flush()
            print(readable(line), flush=True)

        keep({"part": "machine", "device": device, "tiny": args.tiny, **train.machine(device)})
        for name, (_, limit) in PARTS.items():
            part_began = time.perf_counter()
            left = SECONDS - (part_began - began)
            for line in lines_of_part(name, min(limit, left), log):
                keep(line)
            keep({"part": name, "seconds": time.perf_counter() - part_began})
    print_goals(lines)
    print(f"{time.perf_counter() - began:.0f} s; all of it is in {path}")


def main():
    formatter = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--seeds", default="1,8", help="numbers of seeds [1,8]")
    parser.add_argument("--methods", default="arm,mdm,ppots_mirror", help="[arm,mdm,ppots_mirror]")
    parser.add_argument("--dataset", default="add3", help="[add3]")
    parser.add_argument("--rounds", type=int, default=5, help="[5]")
    parser.add_argument("--compile", action="store_true", help="compiled steps, too")
    parser.add_argument("--nanogpt", help="a clone of nanoGPT; its model.py is enough")
    parser.add_argument("--tiny_diffusion", help="a clone of tiny-diffusion")
    parser.add_argument("--gpu", action="store_true", help="all we ask of a GPU")
    parser.add_argument("--part", choices=list(PARTS), help="--gpu: one part alone")
    parser.add_argument("--tiny", action="store_true", help="tiny models, to try the code")
    parser.add_argument("--out", help="--gpu: the file of results [$OUT/gpu.jsonl, out/gpu.jsonl]")
    args = parser.parse_args()
    device = train.pick_device("auto")
    if args.part:
        part, _ = PARTS[args.part]
        part(args, device)
    elif args.gpu:
        gpu(args, device)
    elif args.tiny_diffusion:
        cfg, data = prepare(args, ["mdm"], "--dataset=shakespeare_char", "--eval_every=2000")
        tiny_diffusion(args.tiny_diffusion, cfg, data, device)
    else:
        table_of_steps(args, device)


if __name__ == "__main__":
    main()
