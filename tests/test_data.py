"""The arithmetic is right, the split is clean, and both are the same every time."""
import pytest

from data import arith


@pytest.mark.parametrize("name", arith.DATASETS)
def test_data_set(name):
    data = arith.make(name)
    train, test = ({data.decode(row) for row in part} for part in (data.train, data.test))
    assert len(test) == 512 and not train & test
    assert len(train) == len(data.train) >= 9000
    for text in list(test) + list(train)[:500]:
        prompt, response = text[: data.prompt_len], text[data.prompt_len :]
        assert prompt[-1] == "=" and "=" not in prompt[:-1]
        if name[:3] == "add":
            assert sum(map(int, prompt[:-1].split("+"))) == int(response)
        elif name[:3] == "mul":
            a, b = map(int, prompt[:-1].split("*"))
            parts, total = response.split("=")
            assert a * b == int(total) == sum(map(int, parts.split("+"))) and int(parts[:3]) == a * (b % 10)
        else:
            assert [int(c) for c in response] == [sum(map(int, prompt[: i + 1])) % 10 for i in range(int(name[3:]))]
    assert all(data.encode(data.decode(row)) == row.tolist() for row in data.test[:20])
    assert (arith.make(name).train == data.train).all()
    assert all(data.decode(data.train[0])[i] in "+*=" for i in data.structural)


def test_refusals():
    with pytest.raises(ValueError, match="add9"):
        arith.make("add9")
    with pytest.raises(ValueError, match="'x'"):
        arith.make("add2").encode("12x")
