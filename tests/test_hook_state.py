"""What a hook keeps for a checkpoint comes back exactly, or is refused with the place where it stands."""

import json
import math
from collections import Counter, OrderedDict, namedtuple
from enum import StrEnum

import numpy
import pytest
import torch
from torch import nn
from transformers import TrainerCallback

from trl_core import hookimpl
from trl_core.errors import CheckpointError, HookResultError, PluginError
from trl_core.training.state import (
    join_tensors,
    read_manifest,
    read_state,
    split_tensors,
    write_manifest,
    write_tensors,
)

from .helpers_online import make_trainer
from .helpers_train import differences

T1, T2 = torch.tensor([1.0, 2.0]), torch.tensor([3.0])
SHARED = torch.arange(6.0).reshape(2, 3)
DTYPES = (torch.bool, torch.uint8, torch.int64, torch.float16, torch.bfloat16, torch.float64, torch.complex64)
EXACT = {
    "keys that clash flattened": {"a/b": T1, "a": {"b": T2}},
    "keys that clash escaped": {"a/b": T1, "a\\x2fb": T2, "a\\": {"x2fb": T1}, "~1": T2, "": {"": T1}, "/": T2},
    "a number and its text": {1: T1, "1": T2, 1.5: "x", None: 3, (1, "a"): [5], False: 0},
    "keys that JSON changes": {"é": T1, "\ud800": T2, "\0": 1, "key 0": {3: T1}, "0": [T2]},
    "reserved keys": {"__tensor__": "x"},
    "reserved keys inside": {"a": [{"__tuple__": [1]}, {"__items__": 3}, {"__float__": "nan", "x": T1}]},
    "containers": {
        "t": (1, (2, [3, ()])),
        "s": {1, "a"},
        "f": frozenset({(1, 2)}),
        "l": [],
        "d": {},
        "e": [[T1], (T2,)],
    },
    "numbers": {"inf": math.inf, "-inf": -math.inf, "zero": -0.0, "int": 10**5000, "neg": -(7**9999), "small": 5e-324},
    "text and bytes": {"b": b"\x00\xff", "s": "\ud800 \x1b é", "none": None, "yes": True},
    "tensors": {str(dtype): torch.ones(2, 1).to(dtype) for dtype in DTYPES}
    | {"empty": torch.zeros(0, 3), "0-d": T1[0]},
    "views": {
        "a": SHARED,
        "same": SHARED,
        "row": SHARED[1],
        "turned": SHARED.T,
        "conjugate": torch.tensor([1j]).conj(),
    },
}
POINT = namedtuple("Point", "x y")
LOOP = {}
LOOP["again"] = LOOP
REFUSED = {
    "an object": object(),
    "an array": numpy.zeros(2),
    "a number of numpy": numpy.int64(3),
    "a counter": Counter("a"),
    "a named tuple": POINT(1, 2),
    "an enum": StrEnum("Phase", "A").A,
    "a function": len,
    "a generator": torch.Generator(),
    "a sparse tensor": T1.to_sparse(),
    "a tensor without values": torch.zeros(2, device="meta"),
    "a tensor of double complex numbers": torch.zeros(2, dtype=torch.complex128),
    "tensors as keys": {T1: 1},
    "itself": LOOP,
    "a range": range(3),
}


def stored(state, folder):
    """The state after a way through the files of a checkpoint."""
    (folder / "trainer_state.json").write_text("{}")
    origin = {"step": 1, "composition": [], "options": {}, "inputs": {}}
    write_manifest(folder, {**origin, "state": write_tensors(folder, state)})
    return read_state(folder, read_manifest(folder))


def same(a, b):
    """Whether two states are the same, types included."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b) and a.dtype == b.dtype and a.shape == b.shape
    if isinstance(a, dict):
        return list(map(repr, a)) == list(map(repr, b)) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and repr(a) == repr(b) if isinstance(a, float) else type(a) is type(b) and a == b


@pytest.mark.parametrize("kind", EXACT)
def test_state_comes_back_exactly(kind, tmp_path):
    state = {"hooks": {"zeta": EXACT[kind]}}
    assert same(stored(state, tmp_path), state)
    tensors = {}
    assert same(join_tensors(split_tensors(state, tensors, copy=False), tensors), state)


def test_nan_and_ordered_dict_come_back_as_what_they_equal(tmp_path):
    state = {"nan": math.nan, "ordered": OrderedDict(a=1), "size": torch.Size([2]), "numpy": numpy.float64(0.1)}
    back = stored(state, tmp_path)
    assert math.isnan(back.pop("nan"))
    assert back == {"ordered": {"a": 1}, "size": (2,), "numpy": 0.1}
    json.loads((tmp_path / "trl_core_state.json").read_text(), parse_constant=pytest.fail)  # no NaN, which is no JSON


def test_state_is_a_copy(tmp_path):
    tensors = {}
    values = nn.Parameter(T1.clone())
    split_tensors({"p": values}, tensors)
    with torch.no_grad():
        values.zero_()
    assert tensors["/p"].tolist() == [1.0, 2.0]


@pytest.mark.parametrize("kind", REFUSED)
def test_what_would_not_come_back_is_refused_with_its_place(kind, tmp_path):
    with pytest.raises(
        HookResultError, match=r"state_dict of 'zeta' returned, at 'a/1(/again)*', .*cannot hold"
    ) as error:
        write_tensors(tmp_path, {"hooks": {"zeta": {"a": [1, REFUSED[kind]]}}})
    assert "numpy" in error.value.mend


class Keeps(TrainerCallback):
    """Has a state that clashes when it is flattened, and changes with every step."""

    def __init__(self):
        self.held = {"a/b": torch.zeros(1), "a": {"b": torch.zeros(1)}, 1: (0,), "1": {0}}

    @hookimpl
    def after_step(self, step):
        one, other = self.held["a/b"] + 1, self.held["a"]["b"] - step
        self.held = {"a/b": one, "a": {"b": other}, 1: (step,), "1": {step}}

    def state_dict(self):
        return self.held

    def load_state_dict(self, state):
        self.held = state


def keeping(folder, **options):
    callback = Keeps()
    return make_trainer(folder, trainer={"callbacks": [callback]}, **options), callback


def test_state_of_a_hook_survives_a_resume_exactly(tmp_path):
    trainer, callback = keeping(tmp_path, save_strategy="steps", save_steps=2, max_steps=2)
    trainer.train()
    resumed, again = keeping(tmp_path, max_steps=3)
    resumed.train(resume_from_checkpoint=True)
    assert callback.held[1] == (2,) and again.held[1] == (3,) and again.held["1"] == {3}
    assert (again.held["a/b"].item(), again.held["a"]["b"].item()) == (3.0, -6.0)
    assert differences(callback.held["a/b"], torch.tensor([2.0])) == []
    # Who takes part now and did not then, or the other way round, is told.
    without = make_trainer(tmp_path, max_steps=3)
    with pytest.raises(CheckpointError, match="the state of 'Keeps' is saved, which does not take part"):
        without.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_state_that_is_missing_or_cannot_be_loaded_is_told(tmp_path):
    plain = make_trainer(tmp_path / "a", save_strategy="steps", save_steps=1, max_steps=1)
    plain.train()
    trainer, callback = keeping(tmp_path / "a", max_steps=2)
    with pytest.raises(CheckpointError, match=r"Keeps \(tests.test_hook_state.Keeps\) has a state, of which nothing"):
        trainer.train(resume_from_checkpoint=True)
    trainer, callback = keeping(tmp_path / "a", max_steps=2, resume_check="warn")
    trainer.train(resume_from_checkpoint=True)
    assert callback.held[1] == (2,)
    callback.load_state_dict = lambda state: state["nothing"]
    with pytest.raises(PluginError, match=r"load_state_dict of Keeps \(.*\) raised KeyError: 'nothing'"):
        trainer.hooks.load_state_dict({"Keeps": {}})
