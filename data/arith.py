"""Arithmetic as character-level, fixed-width text, made on the spot (well under a second, nothing is downloaded).

    add2 ... add5   123+456=0579             zero-padded sum, most significant digit first
    mul2            47*86=282+3760=4042      two-digit product by way of its two partial products
    sum4 ... sum8   3941=3267                running sums of the digits, mod 10

What stands up to the first `=` is the prompt; the rest is the response, which alone is masked, generated and scored.
Training and test problems are disjoint and come from a seed of their own: every run sees the same ones. (Not up to swapping the
operands: 47*86 may be in one and 86*47 in the other, as it nearly always is in the small mul2, rarely in add3.)

`python data/arith.py add3` prints a few.
"""
import sys
from dataclasses import dataclass

import numpy as np
import torch

DATASETS = ["add2", "add3", "add4", "add5", "mul2", "sum4", "sum5", "sum6", "sum7", "sum8"]
DATA_SEED = 1337
N_TRAIN, N_TEST = 20_000, 512  # fewer to train on where there are fewer problems: all but 1000 of them


@dataclass
class Arithmetic:
    name: str
    chars: str  # the vocabulary; a token id is an index into it
    train: torch.Tensor  # (N_train, T) int64 token ids
    test: torch.Tensor  # (N_test, T)
    prompt_len: int  # the response is tokens prompt_len ... T-1

    def encode(self, text):
        """Token ids of a string. Raises ValueError naming the first character that is not in the vocabulary."""
        for c in text:
            if c not in self.chars:
                raise ValueError(f"character {c!r} is not in the vocabulary of {self.name}: {self.chars}")
        return [self.chars.index(c) for c in text]

    def decode(self, ids):
        """The string of a sequence of token ids; a mask token (id V) shows as `_`."""
        return "".join((self.chars + "_")[i] for i in ids)

    @property
    def structural(self):
        """Positions (list) of the prompt's structural symbols, the same in all problems; for SyRM."""
        return [i for i in range(self.prompt_len) if self.chars[self.train[0, i]] in "+*="]


def problem(name, i):
    """Problem number i of a data set, as text."""
    d = int(name[3:])
    if name.startswith("add"):
        a, b = divmod(i, 10**d)
        return f"{a:0{d}}+{b:0{d}}={a + b:0{d + 1}}"
    if name.startswith("mul"):
        a, b = divmod(i, 10**d)
        ones, tens = a * (b % 10), a * (b // 10 * 10)
        return f"{a:02}*{b:02}={ones:03}+{tens:04}={a * b:04}"
    digits = [int(c) for c in f"{i:0{d}}"]
    return f"{i:0{d}}=" + "".join(str(s % 10) for s in np.cumsum(digits))


def make(name):
    """The data set of that name. Raises ValueError for an unknown one."""
    if name not in DATASETS:
        raise ValueError(f"unknown dataset '{name}': choose one of {', '.join(DATASETS)}")
    total = 10 ** (int(name[3:]) * (1 if name.startswith("sum") else 2))
    n_train = min(N_TRAIN, total - 1000)
    numbers = np.random.default_rng(DATA_SEED).choice(total, n_train + N_TEST, replace=False)
    texts = [problem(name, int(i)) for i in numbers]
    chars = "".join(sorted(set("0123456789").union(texts[0])))
    table = np.zeros(128, dtype=np.int64)
    table[[ord(c) for c in chars]] = range(len(chars))
    ids = torch.from_numpy(table[np.frombuffer("".join(texts).encode(), dtype=np.uint8)]).view(len(texts), -1)
    return Arithmetic(name, chars, ids[:n_train], ids[n_train:], texts[0].index("=") + 1)


if __name__ == "__main__":
    try:
        data = make(sys.argv[1] if len(sys.argv) > 1 else "add3")
    except ValueError as e:
        sys.exit(f"error: {e}")
    print(f"{data.name}: {len(data.train)} training and {len(data.test)} test problems, vocabulary {data.chars!r}, "
          f"{data.prompt_len} prompt and {data.train.shape[1] - data.prompt_len} response tokens")  # fmt: skip
    print("\n".join(data.decode(row) for row in data.train[:5]))
