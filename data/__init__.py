"""The data sets: `data.load(name)` is an arith.Arithmetic or a text.Text, which offer the same."""


def load(name, block_size=64, tokenizer="char", n_train=0, n_test=512):
    """The data set of that name: arithmetic, shakespeare_char, or the path of a UTF-8 text file.
    Raises ValueError, with one line to show."""
    from data import arith, text

    if name in arith.DATASETS:
        return arith.make(name, n_train, n_test)
    path = text.shakespeare() if name == "shakespeare_char" else name
    return text.make(path, block_size, tokenizer, name)
