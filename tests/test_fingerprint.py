"""Descriptions of what a run is given: the same for the same thing given again, another for what computes otherwise."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset, Features, IterableDataset, Value

from trl_core.redaction import is_named_secret
from trl_core.testing import tiny_model, tiny_tokenizer
from trl_core.training.fingerprint import MOST_ROWS, UNKNOWN, adapter, description

from .helpers_offline import pairs, texts, tiny_classifier
from .helpers_train import lora_config

REWARD = '''
import functools, math
LIMIT = 5
WORDS = {"yes": 1}
prefix = "a"
seen = []

def clipped(value):
    return min(value, LIMIT)

class Judge:
    """Counts."""
    def __init__(self, target=3, api_key="k", url="http://host:1"):
        self.target, self.api_key, self.url, self.calls = target, api_key, url, 0

    def score(self, text):
        return abs(len(text) - self.target)

    def __call__(self, completions, **_):
        self.calls += 1
        return [self.score(text) for text in completions]

def reward(completions, scale=2.0, **_):
    """A reward."""
    seen.append(1)
    # of the length
    bonus = len(prefix)
    return [clipped(scale * len(text)) + (text in {"x", "y"}) + WORDS.get(text, 0) + bonus for text in completions]

def counted():
    calls = 0
    def inner(completions, **_):
        nonlocal calls
        calls += 1
        return [weight * len(text) for text in completions]
    weight = 2
    return inner

async def awaited(completions, **_):
    return [1.0] * len(completions)
'''


def load(source, file="reward.py"):
    names = {"__name__": "reward"}
    exec(compile(source, file, "exec"), names)
    return names


WAYS = {
    "function": lambda names: names["reward"],
    "closure": lambda names: names["counted"](),
    "coroutine": lambda names: names["awaited"],
    "object": lambda names: names["Judge"](),
    "method": lambda names: names["Judge"]().score,
    "partial": lambda names: functools.partial(names["reward"], scale=3.0),
    "decorated": lambda names: functools.lru_cache(names["clipped"]),
    "lambda": lambda names: eval("lambda completions: [clipped(len(c)) for c in completions]", names),
}


@pytest.mark.parametrize("way", WAYS)
def test_same_code_is_the_same_wherever_it_lies_and_however_often_it_ran(way):
    first = WAYS[way](load(REWARD))
    described = description(first)
    assert described != UNKNOWN and json.loads(json.dumps(described)) == described
    if way not in ("coroutine", "method", "decorated"):
        first(completions=["abc"])
        assert description(first) == described
    moved = "# a comment\n\n" + REWARD.replace("    # of the length\n", "").replace(
        '"""A reward."""', '"""The reward."""'
    )
    assert description(WAYS[way](load(moved, "/elsewhere/other.py"))) == described


CODE = {
    "constant in it": ("function", "scale * len", "scale + len"),
    "default": ("function", "scale=2.0", "scale=2.5"),
    "set": ("function", '"x", "y"', '"x", "z"'),
    "global constant": ("function", "LIMIT = 5", "LIMIT = 6"),
    "global table": ("function", '"yes": 1', '"yes": 2'),
    "global text": ("function", 'prefix = "a"', 'prefix = "ab"'),
    "function it calls": ("function", "min(value", "max(value"),
    "captured value": ("closure", "weight = 2", "weight = 3"),
    "method": ("object", "abs(len", "(len"),
    "method of a bound one": ("method", "abs(len", "(len"),
    "what it was made with": ("object", "target=3", "target=4"),
    "coroutine": ("coroutine", "1.0", "2.0"),
    "below a partial": ("partial", "min(value", "max(value"),
    "below a decorator": ("decorated", "LIMIT)", "LIMIT, 7)"),
    "called by a lambda": ("lambda", "min(value", "max(value"),
}


@pytest.mark.parametrize("change", CODE)
def test_other_code_is_another(change):
    way, before, after = CODE[change]
    assert before in REWARD
    one, other = (description(WAYS[way](load(source))) for source in (REWARD, REWARD.replace(before, after)))
    assert one != other


def test_secrets_and_places_do_not_count():
    one = description(WAYS["object"](load(REWARD)))
    other = description(WAYS["object"](load(REWARD.replace('"k"', '"other"').replace("host:1", "elsewhere:2"))))
    assert one == other and "api_key" not in str(one)
    assert description({"token": "hf_x", "revision": "a"}) == {"revision": "a"}
    names = ("eos_token", "stop_token", "hub_token", "API_KEY", "password")
    assert [name for name in names if is_named_secret(name)] == ["hub_token", "API_KEY", "password"]


def test_partial_shows_its_values():
    partial = functools.partial(load(REWARD)["reward"], scale=3.0)
    assert description(partial)["scale"] == 3.0 and description(partial)["function"]["name"] == "reward"
    secret = description(functools.partial(load(REWARD)["reward"], "sk-123", api_key="sk-123"))
    assert "sk-123" not in str(secret)


def test_what_a_partial_below_a_function_binds_counts_also_where_it_takes_the_name_of_another():
    reward = load(REWARD)["reward"]

    def captured(scale):
        inner = functools.update_wrapper(functools.partial(reward, scale=scale), reward)
        return lambda completions: inner(completions)

    assert description(captured(2.0)) == description(captured(2.0)) != description(captured(3.0))


def test_what_cannot_be_described_is_unknown():
    class Cyclic:
        def __init__(self, me=None):
            self.me = self

    assert description(Cyclic()) == UNKNOWN
    assert description(len) == {"name": "len"}


# -- data -------------------------------------------------------------------------------------------------------------
def test_rows_count_wherever_they_are_stored(tmp_path):
    data = pairs(6)
    expected = description(data)
    data.save_to_disk(str(tmp_path / "saved"))
    data.to_json(str(tmp_path / "rows.jsonl"))
    again = Dataset.load_from_disk(str(tmp_path / "saved"))
    loaded = Dataset.from_json(str(tmp_path / "rows.jsonl"), cache_dir=str(tmp_path / "cache"))
    picked = pairs(9).select([0, 1, 2, 3, 4, 5])
    for same in (again, loaded, picked, data.map(lambda row: row), data.shuffle(seed=1).select(order_back(6))):
        assert description(same) == expected
    assert expected["rows"] == 6 and expected["columns"] == ["chosen", "prompt", "rejected"]


def order_back(rows):
    order = Dataset.from_dict({"i": list(range(rows))}).shuffle(seed=1)["i"]
    return [list(order).index(i) for i in range(rows)]


def test_other_rows_are_others():
    data = pairs(6)
    others = [
        data.select([1, 0, 2, 3, 4, 5]),
        data.select(range(5)),
        data.add_column("more", [1] * 6),
        data.map(lambda row, i: {"prompt": row["prompt"] + "!" * (i == 4)}, with_indices=True),
        data.remove_columns("prompt"),
    ]
    assert len({json.dumps(description(one), sort_keys=True) for one in (data, *others)}) == 6


def test_long_dataset_is_sampled_over_its_length():
    numbers = list(range(3 * MOST_ROWS))
    one = description(Dataset.from_dict({"n": numbers}))
    numbers[len(numbers) // 2 :] = [0] * (len(numbers) - len(numbers) // 2)
    other = description(Dataset.from_dict({"n": numbers}))
    assert one["rows"] == other["rows"] == 3 * MOST_ROWS and one["content"] != other["content"]


def test_stream_is_compared_by_what_is_known():
    def rows(first="a"):
        yield {"text": first}
        yield {"text": "b"}

    features = Features({"text": Value("string")})
    one, same, other = (
        description(IterableDataset.from_generator(rows, features, gen_kwargs={"first": name})) for name in "aab"
    )
    assert one == same != other and one["columns"] == ["text"]
    shuffled = texts().to_iterable_dataset().shuffle(buffer_size=4)
    assert description(shuffled)["content"] == UNKNOWN


# -- models -----------------------------------------------------------------------------------------------------------
def test_weights_and_tokenizers_and_adapters_are_told_apart():
    assert description(tiny_classifier()) == description(tiny_classifier()) != description(tiny_classifier(seed=1))
    changed = tiny_classifier()
    with torch.no_grad():
        changed.score.weight.mul_(2)
    assert description(changed) != description(tiny_classifier())
    templated = tiny_tokenizer()
    templated.chat_template = "{{ messages }}"
    assert description(tiny_tokenizer()) == description(tiny_tokenizer()) != description(templated)
    config = lora_config()
    config.target_modules = {"v_proj", "q_proj"}
    assert adapter(config) == adapter(lora_config())
    assert description(tiny_model(seed=1)) != description(tiny_model(seed=2))


@pytest.mark.slow
def test_description_is_that_of_another_process(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        REWARD
        + "\nimport json\nfrom trl_core.training.fingerprint import description\n"
        + "print(json.dumps([description(f) for f in (reward, counted(), Judge(), awaited, {'b', 'a', 'c'})]))\n"
    )
    found = set()
    for seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, str(script)],
            capture_output=True,
            text=True,
            check=True,
            cwd=Path(__file__).parent.parent,
            env={**os.environ, "PYTHONHASHSEED": seed},
        )
        found.add(done.stdout)
    assert len(found) == 1
