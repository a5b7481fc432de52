"""A run's files: its folder, its checkpoints and its result lines.

One folder holds one comparison. Its runs may differ in their method, the method's own settings,
the seed and the pretrained start. All other settings are the same for all runs:

    OUT_DIR/settings.json              the settings that all runs of this folder share
    OUT_DIR/results.jsonl              a line for each method, start and seed
    OUT_DIR/METHOD/ckpt_SEEDxN-HASH.pt    a checkpoint of N seeds, SEED first; HASH is of them all
    OUT_DIR/METHOD/ckpt_START-HASH_SEEDxN-HASH.pt    the same for a model fine-tuned from START
"""
import contextlib
import hashlib
import io
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import filelock
import numpy as np
import torch

VERSION = 5  # of checkpoints; raise it when the model or the random draws change
OUT_OF_MEMORY = ["memoryerror", "out of memory", "enough memory", "allocate memory", "alloc_failed"]


def fail(message):
    """Say in one line what is wrong and what to do, and leave with code 2."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def fingerprint(*parts):
    """8 hex digits that stand for the content of tensors, arrays, lists or text."""
    content = hashlib.sha256()
    for part in parts:
        if isinstance(part, (str, list)):
            content.update(json.dumps(part).encode())
        else:
            content.update(np.ascontiguousarray(part).tobytes())
    return content.hexdigest()[:8]


def machine(device):
    """Facts about the machine. They affect rounding, and so the results."""
    processor = platform.processor() or platform.machine()
    commit = ""
    with contextlib.suppress(OSError):  # only Linux has this file
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = [line for line in lines if line.startswith("model name")]
        processor = names[0].split(":")[1].strip() if names else processor
    if device.startswith("cuda"):
        processor = torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError):  # git is not installed
        git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    return {"processor": processor, "threads": torch.get_num_threads(),
            "torch": str(torch.__version__), "commit": commit}  # fmt: skip


def without_nan(lines):
    """The same lines with None for NaN and infinity, because JSON has neither."""
    return json.loads(json.dumps(lines), parse_constant=lambda _: None)


# --------------------------------------------------------------------------------------------------
# Files. A file is written under a temporary name, then renamed, so a killed run damages no file.


def write(path, content):
    """Write bytes to a file."""
    temporary = f"{path}.tmp"
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        Path(temporary).write_bytes(content)
        os.replace(temporary, path)
    except OSError as e:
        with contextlib.suppress(OSError):
            os.remove(temporary)
        fail(f"cannot write {path}: {e.strerror}")


def write_lines(path, lines):
    """Write a file with a line of JSON for each dictionary."""
    write(path, "".join(json.dumps(line) + "\n" for line in lines).encode())


def lock(path, timeout=0):
    """For a with block: only one program at a time is in a block of this path. A second one waits
    up to timeout seconds (-1: for ever), then it fails. After kill -9 the system frees the lock."""
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        return filelock.FileLock(f"{path}.lock").acquire(timeout)
    except filelock.Timeout:
        fail(f"{path} is in use by another run: wait, or choose another --out_dir")
    except (OSError, NotImplementedError) as e:  # some file systems have no locks
        why = getattr(e, "strerror", None) or e
        fail(f"cannot write {path}: {why}")


def guarded(main):
    """Run a program's main function. Faults outside our control end it in one line: Ctrl-C, a
    closed pipe, a full disk, too little memory."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # any text can be printed on any terminal
    try:
        code = main()
        sys.stdout.flush()  # a closed pipe is noticed here, not at the exit
        return code
    except KeyboardInterrupt:
        print("\nstopped (with --resume, the same train.py command goes on)", file=sys.stderr)
        return 130
    except OSError as e:
        sys.stdout = open(os.devnull, "w")  # flushing it at exit would fail again
        if not isinstance(e, BrokenPipeError):
            fail(e)
        return 1
    except (RuntimeError, MemoryError) as e:  # torch raises a RuntimeError
        said = repr(e).lower()
        if not any(words in said for words in OUT_OF_MEMORY):
            raise
        fail("out of memory: lower --n_seeds, --batch_size, --n_embd, --n_layer or --block_size")


# --------------------------------------------------------------------------------------------------
# The folder.


def newest_folder(parent="out"):
    """The folder of the latest training in parent. None if there is none."""
    newest = max(Path(parent).glob("*/settings.json"), key=os.path.getmtime, default=None)
    return newest and str(newest.parent)


def read_settings(out_dir):
    """The shared settings of a folder. None if it has none yet."""
    path = os.path.join(out_dir, "settings.json")
    if not os.path.exists(path):
        return None
    try:
        with open(path, encoding="utf-8") as f:
            settings = json.load(f)
    except (OSError, ValueError) as e:
        fail(f"cannot read {path}: {e}")
    if not isinstance(settings, dict) or "dataset" not in settings:
        fail(f"{path} is damaged: mend it, or take another --out_dir")
    return settings


def join_folder(out_dir, settings):
    """Write the settings of a new folder. For an old one, refuse different settings."""
    with lock(os.path.join(out_dir, "settings.json"), -1):
        theirs = read_settings(out_dir)
        if theirs is None and list(Path(out_dir).glob("results*.jsonl")):
            fail(f"{out_dir} has results of an older version: take another --out_dir")
        theirs = theirs or settings  # a new folder takes ours
        for name, value in settings.items():
            old = theirs.get(name)
            if old != value and name != "dataset":  # data may move, but their fingerprint must stay
                fail(f"the runs in {out_dir} have {name} {old}, not {value}: "
                     "take another --out_dir")
        # Even if unchanged: the date tells newest_folder() which folder was used last.
        write_lines(os.path.join(out_dir, "settings.json"), [theirs])
    read_results(out_dir)  # damaged lines are found before the training, not after it


def run_of(line):
    """The key of a run: no two runs of a folder share it."""
    return line["method"], line["start"], line["seed"]


def read_results(out_dir):
    """All result lines of a folder, as dictionaries. Where a run is there twice, the later line
    counts."""
    path = os.path.join(out_dir, "results.jsonl")
    if not os.path.exists(path):
        return []
    by_run = {}
    with open(path, "rb") as f:
        for number, text in enumerate(f, 1):
            try:
                line = json.loads(text)
                by_run[run_of(line)] = line
                line["passes"], line["diverged"], line["curve"]  # the report needs these
            except (ValueError, TypeError, KeyError):
                fail(f"line {number} of {path} is damaged, or of an older version: mend it, or "
                     "move it to another file")
    return list(by_run.values())


def save_lines(out_dir, lines):
    """Add lines to results.jsonl. A line replaces the older line of the same run."""
    path = os.path.join(out_dir, "results.jsonl")
    with lock(path, -1):
        by_run = {run_of(line): line for line in read_results(out_dir) + lines}
        write_lines(path, by_run.values())


# --------------------------------------------------------------------------------------------------
# Checkpoints.


def checkpoint_path(out_dir, method, start, seeds):
    """start: None, or a dictionary with a "name" and the "fingerprint" of its weights."""
    origin = f"{start['name']}-{start['fingerprint']}_" if start else ""
    name = f"ckpt_{origin}{seeds[0]}x{len(seeds)}-{fingerprint(seeds)}.pt"
    return os.path.join(out_dir, method, name)


def save_checkpoint(path, content):
    file = io.BytesIO()
    torch.save(content | {"version": VERSION}, file)
    write(path, file.getvalue())


def load_checkpoint(path):
    """The dictionary in a checkpoint, on the CPU."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # torch raises many kinds of errors for a bad file
        why = str(e).partition("\n")[0][:100] or type(e).__name__
        fail(f"cannot read {path} ({why}): if it is damaged or too large, move it away")
    if not isinstance(checkpoint, dict) or checkpoint.get("version") != VERSION:
        fail(f"{path} is of another version of this code: train again in another --out_dir")
    return checkpoint


def find_checkpoint(out_dir, method, seed=None):
    """The newest checkpoint of a method with this seed (None: the smallest there is). It also has
    "weights", the parameters of this seed, each with a single row."""
    found = {}  # the newest checkpoint of each seed
    for path in sorted(Path(out_dir, method).glob("ckpt*.pt"), key=os.path.getmtime):
        checkpoint = load_checkpoint(path)
        found |= dict.fromkeys(checkpoint["seeds"], checkpoint)
    if not found:
        fail(f"there is no checkpoint of {method} in {out_dir}: check --method and --out_dir")
    seed = min(found) if seed is None else seed
    if seed not in found:
        fail(f"seed {seed} of {method} is not in {out_dir}; there are {sorted(found)}")
    checkpoint = found[seed]
    row = checkpoint["seeds"].index(seed)
    weights = {k: v[row : row + 1] for k, v in checkpoint["state"]["model"].items()}
    finite = all(torch.isfinite(v).all() for v in weights.values())
    if checkpoint["state"]["diverged"][row] > 0 or not finite:
        fail(f"{method} with seed {seed} in {out_dir} has diverged: take another seed")
    return checkpoint | {"weights": weights, "seed": seed}
