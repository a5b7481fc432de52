"""The machine: which device, which of torchrun's processes, and the checkpoints on its disk.

Seeds share nothing, so processes need not either: each takes a share of the seeds and writes files
of its own, such as OUT_DIR/METHOD/ckpt.1of2.pt (one process alone: ckpt.pt).
"""
import contextlib
import glob
import hashlib
import json
import os
import sys

import filelock
import numpy as np
import torch

RANK, WORLD_SIZE = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
SHARE = "" if WORLD_SIZE == 1 else f".{RANK + 1}of{WORLD_SIZE}"
VERSION = 4  # of checkpoints, and of the model in them


def fail(message):
    """Say what is wrong, in one line, and leave with code 2."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def pick_device(name):
    """The torch name of a device: what --device says, or the best there is for "auto"."""
    if name == "auto":
        there = torch.accelerator.is_available()
        name = torch.accelerator.current_accelerator().type if there else "cpu"
    try:
        if name == "cuda":  # each process takes a GPU of its own
            name = f"cuda:{int(os.environ.get('LOCAL_RANK', 0)) % torch.cuda.device_count()}"
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError, NotImplementedError, ZeroDivisionError):
        fail(f"--device={name} cannot be used here; leave it out to take the best there is")
    return name


def fingerprint(*parts):
    """What a run is made from is known by this, not by its name: 8 hex digits of the content of
    tensors, arrays, lists or text."""
    content = hashlib.sha256()
    for part in parts:
        content.update(np.ascontiguousarray(part).tobytes())
    return content.hexdigest()[:8]


def write(path, save):
    """Let save(name) write a file, and give it its name last: a killed run loses no older file."""
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        save(path + ".tmp")
        os.replace(path + ".tmp", path)
    except (OSError, RuntimeError) as e:  # the latter is torch's, when a disk is full
        fail(f"cannot write {path}: {getattr(e, 'strerror', None) or 'is the disk full?'}")


def write_lines(path, lines):
    """Write dictionaries as JSON, one a line."""

    def save(name):
        with open(name, "w", encoding="utf-8") as f:
            f.writelines(json.dumps(line) + "\n" for line in lines)

    write(path, save)


@contextlib.contextmanager
def lock(out_dir):
    """Keep other runs out of out_dir; the system lets go of the lock even after kill -9."""
    try:
        os.makedirs(out_dir, exist_ok=True)
        held = filelock.FileLock(os.path.join(out_dir, f"lock{SHARE}")).acquire(timeout=0)
    except filelock.Timeout:
        fail(f"--out_dir={out_dir} is in use by another run: wait, or choose another")
    except OSError as e:
        fail(f"cannot write to --out_dir={out_dir}: {e.strerror or e}")
    with held:
        yield


@contextlib.contextmanager
def enough_memory():
    """Say in one line when there is not."""
    try:
        yield
    except (RuntimeError, MemoryError) as e:  # of the CPU's torch makes no error of its own kind
        said = f"{e!r}".lower()
        if not any(word in said for word in ("out of memory", "memoryerror", "alloc", "overflow")):
            raise
        fail("out of memory: lower --n_seeds, --batch_size, --n_embd, --n_layer or --block_size")


def checkpoint_path(out_dir, method):
    return os.path.join(out_dir, method, f"ckpt{SHARE}.pt")


def save_checkpoint(out_dir, method, content):
    content = content | {"version": VERSION}
    write(checkpoint_path(out_dir, method), lambda name: torch.save(content, name))


def load_checkpoint(path):
    """The dictionary in a checkpoint."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if checkpoint["version"] == VERSION:
            return checkpoint
    except Exception:  # whatever torch makes of a file that is damaged or not its own
        pass
    fail(f"{path} is no checkpoint of this version, or damaged: delete it and train again")


def find_checkpoint(out_dir, method, seed=None):
    """A method's newest checkpoint (with that seed), from any share; "weights" has one row for each
    parameter, of that seed or else the first."""
    paths = glob.glob(os.path.join(glob.escape(out_dir), method, "ckpt*.pt"))
    seeds = []
    for path in sorted(paths, key=os.path.getmtime, reverse=True):
        checkpoint = load_checkpoint(path)
        seeds += checkpoint["seeds"]
        if seed is None or seed in checkpoint["seeds"]:
            s = checkpoint["seeds"].index(seed) if seed is not None else 0
            weights = {k: v[s : s + 1] for k, v in checkpoint["state"]["model"].items()}
            return checkpoint | {"weights": weights}
    if seeds:
        fail(f"--seed={seed} of {method} is not in {out_dir}; there are {seeds}")
    fail(f"there is no checkpoint of {method} in {out_dir}: train it, or check the path")
