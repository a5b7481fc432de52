"""Any UTF-8 text as data: by characters, or by the tokens of a BPE (tiktoken).

The first 90 % of the text is for training, the rest for validation. A sequence is a window of
block_size + 1 tokens. Its first token is the prompt and the others are the response. An ARM then
has nanoGPT's loss at the same block_size, and an MDM answers the same question as the ARM:
-log p(block_size tokens | the token before them).

`python data/text.py FILE` shows the size and the beginning of a text. Without FILE it shows
shakespeare_char: Tiny Shakespeare, nanoGPT's million characters, in the file shakespeare.txt.gz.
"""
import gzip
import os
import sys
from dataclasses import dataclass

import numpy as np
import torch

HERE = os.path.dirname(os.path.abspath(__file__))
if __name__ == "__main__":  # let Python find the package `data` from any current folder
    sys.path.insert(0, os.path.dirname(HERE))
from data import runs

SHAKESPEARE = os.path.join(HERE, "shakespeare.txt.gz")
N_TEST = 512  # validation blocks at most, spread evenly over the validation text


@dataclass
class Vocabulary:
    """The characters or BPE tokens that occur in a text. A token id is an index of items."""

    tokenizer: str  # "char", or the name of a tiktoken encoding
    items: list  # characters, or the encoding's own numbers; sorted

    def __len__(self):
        return len(self.items)

    def encode(self, text):
        """Token ids (list) of a string. Raises ValueError for a token outside the vocabulary."""
        items = text if self.tokenizer == "char" else encode_bpe(self.tokenizer, text)
        index = {item: i for i, item in enumerate(self.items)}
        for item in items:
            if item not in index:
                shown = item if self.tokenizer == "char" else bpe(self.tokenizer).decode([item])
                raise ValueError(f"{shown!r} does not occur in the data the model was trained on")
        return [index[item] for item in items]

    def decode(self, ids, mask="_"):
        """The string of token ids. The mask token, whose id is len(self), is shown as `mask`.
        A BPE token may be a part of a character: without the rest it is shown as U+FFFD."""
        items_and_mask = [*self.items, None]
        items = [items_and_mask[i] for i in map(int, ids)]
        if self.tokenizer == "char":
            return "".join(mask if item is None else item for item in items)
        to_bytes = bpe(self.tokenizer).decode_single_token_bytes
        parts = [mask.encode() if item is None else to_bytes(item) for item in items]
        return b"".join(parts).decode(errors="replace")


@dataclass
class Text:
    name: str
    vocabulary: Vocabulary
    tokens: torch.Tensor  # (N,) the ids of the training text, as uint8 or int32
    test: torch.Tensor  # (n_blocks, T) int64, from the validation text
    rare: list  # ISAD's default: the ids of the rarest tokens, together at most 5 % of the text
    fingerprint: str  # of the whole text
    prompt_len: int = 1
    structural: tuple = ()  # for SyRM: text has no symbols at fixed positions

    def __post_init__(self):
        self.encode = self.vocabulary.encode
        self.decode = self.vocabulary.decode

    def train_blocks(self, device):
        """All windows of T tokens, (N - T + 1, T): a view, which costs no memory."""
        return self.tokens.to(device).unfold(0, self.test.shape[1], 1)

    def describe(self):
        sample = self.decode(self.tokens[:40])
        return f"{len(self.tokens):,} tokens to train on, {len(self.vocabulary)} kinds: {sample!r}"


def bpe(name):
    """The tiktoken encoding of that name. Raises ValueError if there is none, or no download."""
    try:
        import tiktoken
    except ImportError:
        raise ValueError(f"--tokenizer={name} needs a package: pip install tiktoken") from None
    names = tiktoken.list_encoding_names()
    if name not in names:
        raise ValueError(f"--tokenizer={name} is neither char nor one of {', '.join(names)}")
    try:
        return tiktoken.get_encoding(name)
    except Exception as error:  # a network can fail in many ways
        raise ValueError(f"--tokenizer={name} cannot be downloaded ({type(error).__name__}): copy "
                         "the cache of another machine and set TIKTOKEN_CACHE_DIR to it") from None


def encode_bpe(name, text):
    """A string as the encoding's own numbers (list). Raises ValueError if tiktoken gives up."""
    encoding = bpe(name)
    try:
        return encoding.encode_ordinary(text)
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # tiktoken's Rust code has given up
            raise
        raise ValueError(f"--tokenizer={name} fails on this text, perhaps on a million spaces in "
                         "a row: shorten them, or use --tokenizer=char") from None


def read(path):
    """The text of a UTF-8 file. Raises ValueError with the reason if there is none to read."""
    try:
        if path == "shakespeare_char":
            return gzip.open(SHAKESPEARE, "rt", encoding="utf-8").read()
        with open(os.path.expanduser(path), encoding="utf-8-sig") as file:
            return file.read()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error.reason}") from None
    except OSError as error:
        raise ValueError(f"{path} is no data set, and no readable file: {error.strerror}") from None


def tokenize(content, tokenizer):
    """The Vocabulary of a text, and its token ids (N,). Raises ValueError as bpe does."""
    if tokenizer == "char":
        tokens = np.frombuffer(content.encode("utf-32-le"), dtype="<u4")
    else:
        tokens = np.array(encode_bpe(tokenizer, content), dtype=np.int32)
    items, ids = np.unique(tokens, return_inverse=True)
    items = [chr(item) for item in items] if tokenizer == "char" else items.tolist()
    return Vocabulary(tokenizer, items), ids.astype(np.uint8 if len(items) <= 256 else np.int32)


def make(path, block_size, tokenizer="char"):
    """The Text in a file, or shakespeare_char. Raises ValueError if the file cannot be read or is
    too short."""
    vocabulary, ids = tokenize(read(path), tokenizer)
    T = block_size + 1
    n_needed = 10 * T + 10  # so that the last 10 % hold at least one block
    if len(ids) < n_needed or len(vocabulary) < 2:
        raise ValueError(f"{path} has {len(ids)} tokens, {len(vocabulary)} different; "
                         f"--block_size={block_size} needs {n_needed}, 2 different")
    split = int(0.9 * len(ids))
    tokens = torch.from_numpy(ids[:split])
    counts = np.bincount(ids[:split], minlength=len(vocabulary))
    order = np.argsort(counts, kind="stable")  # the rarest first
    rare = order[np.cumsum(counts[order]) <= 0.05 * split].tolist()
    # A block begins with the last token of the one before, so each token is asked for once.
    blocks = torch.from_numpy(ids[split:]).unfold(0, T, block_size)
    chosen = torch.linspace(0, len(blocks) - 1, min(N_TEST, len(blocks))).round().long()
    test = blocks[chosen].long()
    known_by = runs.fingerprint(ids, vocabulary.items)
    return Text(path, vocabulary, tokens, test, rare, known_by)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # a terminal may lack a character
    try:
        data = make(sys.argv[1] if len(sys.argv) > 1 else "shakespeare_char", block_size=64)
    except ValueError as error:
        runs.fail(error)
    print(data.describe())
