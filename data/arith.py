"""Arithmetic as text. A data set is made anew each time, which takes less than a second.

    add2 ... add5   123+456=0579             a zero-padded sum, most significant digit first
    mul2            47*86=282+3760=4042      a product, by way of its two partial products
    sum4 ... sum8   3941=3267                the running sums of the digits, modulo 10
    mix3            007+042=0049             add3 with 1, 2 or 3 digits, for pretraining

The prompt ends with the first `=`. The rest is the response. Only the response is masked, generated
and scored. Every run draws the same problems, and no test problem is used for training. (But 86*47
may be used for training when 47*86 is a test. This is common in mul2 and rare in add3.)

A task of your own is a function from a number i to problem i. All its problems have the same
length, and the first `=` in the same place. Paste it above DATASETS:

    def reverse(i):
        digits = f"{i:05}"
        return f"{digits}={digits[::-1]}"  # 12345=54321

    TASKS["reverse"] = (10**5, reverse)  # i is 0 ... 10**5 - 1, and every i gives another problem

`python data/arith.py reverse` prints a few, and `python train.py --dataset=reverse` trains on it.
"""
import sys
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import torch

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))  # there Python finds the package `data`
from data import runs
from data.text import Data, Vocabulary


def add(n_digits, i):
    a, b = divmod(i, 10**n_digits)
    return f"{a:0{n_digits}}+{b:0{n_digits}}={a + b:0{n_digits + 1}}"


def multiply(i):
    a, b = divmod(i, 100)
    ones = a * (b % 10)
    tens = a * (b - b % 10)
    return f"{a:02}*{b:02}={ones:03}+{tens:04}={a * b:04}"


def running_sums(n_digits, i):
    digits = f"{i:0{n_digits}}"
    sums = np.cumsum([int(digit) for digit in digits]) % 10
    return f"{digits}=" + "".join(str(total) for total in sums)


TASKS = {}  # name: (number of problems, function from i to problem i)
for n in (2, 3, 4, 5):
    TASKS[f"add{n}"] = (100**n, partial(add, n))
TASKS["mul2"] = (100**2, multiply)
for n in (4, 5, 6, 7, 8):
    TASKS[f"sum{n}"] = (10**n, partial(running_sums, n))

DATASETS = [*TASKS, "mix3"]


def draw(name):
    """All training problems and all test problems of a data set, as two lists of text."""
    rng = np.random.default_rng(1337)
    if name != "mix3":
        total, problem = TASKS[name]
        n_train = min(20_000, total * 9 // 10)  # a small task keeps a tenth for tests
        numbers = rng.choice(total, min(n_train + 8192, total), replace=False)
        texts = [problem(int(i)) for i in numbers]
        return texts[:n_train], texts[n_train:]

    n_digits = rng.integers(1, 4, (25_000, 1))
    pairs = rng.integers(0, 10**n_digits, (25_000, 2))
    texts = [add(3, 1000 * a + b) for a, b in pairs]  # add splits the number again
    # Short problems come up more than once. A checksum sends all copies to the same list.
    test = [text for text in texts if zlib.crc32(text.encode()) % 8 == 0]
    # After mix3 a model may be trained on add3, so mix3 must not show the tests of add3 either.
    held_out = {*test, *draw("add3")[1]}
    train = [text for text in texts if text not in held_out]
    return train[:20_000], test


def make(name, n_train=0, n_test=512):
    """A data set with n_train training problems (0: all) and at most n_test test problems."""
    train, test = draw(name)
    n_train = n_train or len(train)
    if n_train > len(train):
        raise ValueError(f"{name} has {len(train)} training problems, not {n_train}")
    if len({(len(text), text.find("=")) for text in train + test}) > 1 or "=" not in train[0]:
        raise ValueError(f"{name}: all problems need one length, and their first = in one place")

    vocabulary = Vocabulary("char", sorted(set("".join(train + test))))
    train_ids = torch.tensor([vocabulary.encode(text) for text in train[:n_train]])
    test_ids = torch.tensor([vocabulary.encode(text) for text in test[:n_test]])

    prompt, response = train[0].split("=", 1)
    structural = [i for i, char in enumerate(prompt + "=") if not char.isalnum()]
    # In arithmetic the symbols of the response count as rare.
    rare = sorted({char for char in response if not char.isalnum()})
    return Data(name=name, is_text=False, vocabulary=vocabulary, train=train_ids, test=test_ids,
                prompt_len=len(prompt) + 1, structural=structural, rare=vocabulary.encode(rare),
                fingerprint=runs.fingerprint(train_ids, vocabulary.items))


if __name__ == "__main__":
    name = sys.argv[1] if len(sys.argv) > 1 else "add3"
    if name not in DATASETS:
        runs.fail(f"{name} is no data set here: choose one of {', '.join(DATASETS)}")
    data = make(name)
    for row in data.train[:5]:
        print(data.decode(row))
