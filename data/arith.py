"""Arithmetic as text of fixed width, made on the spot in well under a second.

    add2 ... add5   123+456=0579             a zero-padded sum, most significant digit first
    mul2            47*86=282+3760=4042      a product, by way of its two partial products
    sum4 ... sum8   3941=3267                the running sums of the digits, modulo 10
    mix3            007+042=0049             add3 with 1, 2 or 3 digits, for pretraining

The prompt ends with the first `=`. The rest is the response, and only the response is masked,
generated and scored. The problems are the same in all runs. No test problem is used for training.
(But 86*47 may be used for training when 47*86 is a test: common in mul2, rare in add3.)

A task of your own is a function from a number i to problem i. All problems have the same length,
and the first `=` in the same place. Paste it above DATASETS:

    def reverse(i):
        digits = f"{i:05}"
        return f"{digits}={digits[::-1]}"  # 12345=54321

    TASKS["reverse"] = (10**5, reverse)  # i is 0 ... 10**5 - 1, and every i gives another problem

`python data/arith.py reverse` prints a few, and `python train.py --dataset=reverse` trains on it.
"""
import sys
import zlib
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch

if __name__ == "__main__":  # let Python find the package `data` from any current folder
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import runs
from data.text import Vocabulary


def add(n_digits, i):
    a, b = divmod(i, 10**n_digits)
    return f"{a:0{n_digits}}+{b:0{n_digits}}={a + b:0{n_digits + 1}}"


def multiply(i):
    a, b = divmod(i, 100)
    ones = a * (b % 10)
    tens = a * (b - b % 10)
    return f"{a:02}*{b:02}={ones:03}+{tens:04}={a * b:04}"


def running_sums(n_digits, i):
    prompt = f"{i:0{n_digits}}"
    sums = accumulate(int(digit) for digit in prompt)
    return f"{prompt}=" + "".join(str(total % 10) for total in sums)


TASKS = {}  # name: (number of problems, function from i to problem i)
for n in (2, 3, 4, 5):
    TASKS[f"add{n}"] = (100**n, partial(add, n))
TASKS["mul2"] = (100**2, multiply)
for n in (4, 5, 6, 7, 8):
    TASKS[f"sum{n}"] = (10**n, partial(running_sums, n))

DATASETS = [*TASKS, "mix3"]


@dataclass
class Arithmetic:
    name: str
    vocabulary: Vocabulary
    train: torch.Tensor  # (N_train, T) int64 token ids
    test: torch.Tensor  # (N_test, T)
    prompt_len: int  # the response is tokens prompt_len ... T-1
    structural: list  # SyRM masks these positions too: the symbols of the prompt
    rare: list  # ISAD's default, as token ids: the symbols of the response
    fingerprint: str  # of all training problems in use

    def __post_init__(self):
        self.encode = self.vocabulary.encode
        self.decode = self.vocabulary.decode

    def train_blocks(self, device):
        return self.train.to(device)

    def describe(self):
        return f"{len(self.train)} training problems such as {self.decode(self.train[0])}"


def draw(name):
    """All training problems and all test problems of a data set, as two lists of text."""
    rng = np.random.default_rng(1337)
    if name != "mix3":
        total, problem = TASKS[name]
        n_train = min(20_000, total * 9 // 10)  # a small task keeps a tenth for tests
        n_drawn = min(n_train + 8192, total)
        texts = [problem(int(i)) for i in rng.choice(total, n_drawn, replace=False)]
        return texts[:n_train], texts[n_train:]
    n_digits = rng.integers(1, 4, (25_000, 1))
    pairs = rng.integers(0, 10**n_digits, (25_000, 2))
    texts = [add(3, 1000 * a + b) for a, b in pairs]
    # Short problems come up often. A checksum of the text puts all copies of one on the same side.
    test = [text for text in texts if zlib.crc32(text.encode()) % 8 == 0]
    held_out = {*test, *draw("add3")[1]}  # add3 is fine-tuned after mix3: hide its tests, too
    train = [text for text in texts if text not in held_out]
    return train[:20_000], test[:8192]


def make(name, n_train=0, n_test=512):
    """The data set of that name, with n_train training problems (0: all) and at most n_test others.
    Raises ValueError for an unknown name, and for more training problems than there are."""
    if name not in DATASETS:
        raise ValueError(f"unknown dataset '{name}': choose one of {', '.join(DATASETS)}")
    train, test = draw(name)
    if len({(len(text), text.find("=")) for text in train + test}) > 1 or "=" not in train[0]:
        raise ValueError(f"{name}: give all problems one length, and their first = one place")
    if n_train > len(train):
        raise ValueError(f"{name} has {len(train)} training problems, not {n_train}")
    vocabulary = Vocabulary("char", sorted(set("".join(train + test))))
    prompt, response = train[0].split("=", 1)
    structural = [i for i, char in enumerate(prompt + "=") if not char.isalnum()]
    rare = vocabulary.encode(sorted({char for char in response if not char.isalnum()}))
    train = torch.tensor([vocabulary.encode(text) for text in train[: n_train or len(train)]])
    test = torch.tensor([vocabulary.encode(text) for text in test[:n_test]])
    known_by = runs.fingerprint(train, vocabulary.items)
    prompt_len = len(prompt) + 1
    return Arithmetic(name, vocabulary, train, test, prompt_len, structural, rare, known_by)


if __name__ == "__main__":
    try:
        data = make(sys.argv[1] if len(sys.argv) > 1 else "add3")
    except ValueError as error:
        runs.fail(error)
    print(data.describe())
    print("\n".join(data.decode(row) for row in data.train[:5]))
