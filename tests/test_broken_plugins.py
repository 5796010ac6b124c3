"""Broken plugins of every kind: each is named, by its distribution and its hook, with what to do; no listing fails."""

import contextlib
import os
import signal
import socket
import sys
from dataclasses import dataclass

import pytest
import torch
from transformers import TrainerCallback

from trl_core import hookimpl
from trl_core.cli.main import main
from trl_core.composition import compose
from trl_core.discovery import damaged, find, list_algorithms
from trl_core.errors import (
    AlgorithmNotFoundError,
    ConfigError,
    HookResultError,
    NonFiniteLossError,
    PluginError,
    TRLCoreError,
)
from trl_core.testing import FixedRollouts, tiny_model

from . import helpers_offline
from .helpers_dist import algorithm_source, write_distribution, write_plugin
from .helpers_online import completions, log_lines, make_trainer

HEADER = """
from dataclasses import dataclass, InitVar, field
import functools, torch
from trl_core import Algorithm, Generated, OnlineConfig, hookimpl, option, stages
from trl_core.errors import ConfigError
"""
ALGORITHM = "algorithm = Algorithm(name='zeta', summary='x', extends={extends!r}, hooks=Hooks{more})\n"
INIT = "    def __init__(self, context):\n        self.context = context\n"


def indented(body):
    return "".join(f"    {line}\n" for line in body.strip("\n").splitlines())


def install(packages, hooks, *, extends="grpo", more="", init=INIT, before=""):
    """Install trl-zeta 1.0, whose class of hooks has this body."""
    body = "class Hooks:\n" + init + indented(hooks)
    source = f"{HEADER}{before}\n{body}\n{ALGORITHM.format(extends=extends, more=more)}"
    write_plugin(packages, "zeta", source=source)


@contextlib.contextmanager
def at_most(seconds):
    """Fail, instead of waiting for ever, if the block hangs."""

    def stop(*_):
        raise AssertionError("it hangs")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


# -- hooks that fail or answer wrongly ---------------------------------------------------------------------------------
def hook(name, body):
    """A hook of this name that takes all its arguments."""
    arguments = {
        "generate": "prompts, sampling",
        "score": "rollouts",
        "keep": "rollouts",
        "annotate": "samples",
        "reference_logps": "samples",
        "advantages": "rollouts, keep",
        "select": "samples",
        "log_ratio": "samples, logps",
        "loss_terms": "samples, logps",
        "after_step": "step, policy",
        "pair_loss": "pairs, policy",
    }[name]
    return f"@hookimpl\ndef {name}(self, {arguments}):\n    {body}"


def wrapper(name, body):
    return hook(name, body.replace("\n", "\n    ")).replace("@hookimpl", "@hookimpl(wrapper=True)")


def answers(name, *bodies):
    return {f"{name}: {body}": (hook(name, body), name) for body in bodies}


RAISES = {
    "a KeyError": "raise KeyError('x')",
    "StopIteration": "raise StopIteration",
    "endless recursion": "self.loss_terms(samples, logps)",
    "an error without text": "raise type('E', (Exception,), {'__str__': lambda self: 1 / 0})()",
    "a surrogate": "raise ValueError('\\ud800 \\x1b[2J')",
    "an import": "import no_such_module_at_all",
    "no memory": "raise MemoryError",
    "a group": "raise ExceptionGroup('g', [ValueError('x')])",
}
HOOKS = {
    **{f"raises {kind}": (hook("loss_terms", body), "loss_terms") for kind, body in RAISES.items()},
    **answers("generate", "return None", "return [[7]] * 4", "return Generated(completion_ids=[[7]] * 3)"),
    **answers("generate", "return Generated(completion_ids=[[7], [], [7], [7]])"),
    **answers("generate", "return Generated(completion_ids=[[7], [99999], [7], [7]])"),
    **answers("generate", "return Generated(completion_ids=[[7], [-1], [7], [7]])"),
    **answers("generate", "return Generated(completion_ids=[[7.5]] * 4)", "return Generated(completion_ids='abcd')"),
    **answers("generate", "return Generated(completion_ids=[[7]] * 4, logps=[[float('nan')]] * 4)"),
    **answers("generate", "return Generated(completion_ids=[[7]] * 4, logps=[[0.0, 0.0]] * 4)"),
    **answers("generate", "return Generated(completion_ids=[[7]] * 4, prompt_ids=[[7]])"),
    **answers("generate", "return Generated(completion_ids=[[7]] * 4, loss_mask=[[3]] * 4)"),
    **answers(
        "score", "pass", "return [[0.0]] * 4", "return torch.zeros(4)", "return torch.full((4, 1), float('inf'))"
    ),
    **answers("score", "return torch.zeros(4, 2)", "return torch.zeros(4, 1).numpy()"),
    **answers("keep", "pass", "return torch.ones(4)", "return torch.ones(3, dtype=torch.bool)", "return True"),
    **answers("keep", "return torch.ones(4, dtype=torch.bool, device='meta')", "return {}"),
    **answers("annotate", "pass", "return {'v': samples.reward[:-1]}", "return {3: samples.advantages}", "return []"),
    **answers("annotate", "return {'': samples.advantages}", "return {'v': samples.advantages + 0j}"),
    **answers("advantages", "pass", "return torch.zeros(3)", "return 0.5", "return torch.full((4,), float('nan'))"),
    **answers("advantages", "return (x for x in rollouts.reward)", "return torch.zeros(4).to_sparse()"),
    **answers("advantages", "rollouts.notes['v'] = [1.0]; return torch.zeros(4)"),
    **answers("advantages", "rollouts.notes = None; return torch.zeros(4)"),
    **answers("generate", "return Generated(completion_ids=torch.ones(4, 3, dtype=torch.long))"),
    **answers("advantages", "return torch.nested.nested_tensor([torch.zeros(4)])"),
    **answers("select", "samples.notes = {'x': 3}; return samples"),
    **{
        f"logs {given}": (hook("advantages", f"self.context.log({given})\n    return rollouts.reward"), "'advantages'")
        for given in (
            "'x', 'abc'",
            "'x', None",
            "'x', torch.zeros(3)",
            "'x', 1j",
            "'x', 10**400",
            "'loss', 1.0",
            "3, 1.0",
            "'', 1.0",
            "'\\ud800', 1.0",
            "'x', 1.0, None",
            "'x', 1.0, 1.0, 'sum'",
        )
    },
    **answers("advantages", "async def later(): return 1\n    return later()"),
    **answers("select", "pass", "return [samples]", "samples.position += 100; return samples"),
    **answers("select", "samples.position -= 1; return samples", "samples.advantages = None; return samples"),
    **answers("select", "samples.reward = samples.reward[1:]; return samples"),
    **answers("select", "samples.position = samples.position.float(); return samples"),
    **answers("select", "samples.advantages = samples.advantages / 0; return samples"),
    **answers("select", "samples.completion_ids = samples.completion_ids + 999; return samples"),
    **answers("log_ratio", "pass", "return logps.mean()", "return logps.long()", "return stages.TokenMean(logps)"),
    **answers("loss_terms", "pass", "return logps", "return {'policy': logps.mean()}", "return {1: logps}"),
    **answers("loss_terms", "return {'mine': torch.zeros(4)}", "return {'mine': None}", "return {'mine': 0.0}"),
    **answers("loss_terms", "return {'mine': logps.to('meta')}", "return [('mine', logps)]"),
    **answers("after_step", "return 1", "yield_ = policy; return {}"),
    "advantages: a wrapper without answer": (wrapper("advantages", "result = yield"), "advantages"),
    "advantages: a wrapper that yields twice": (wrapper("advantages", "x = yield\nyield\nreturn x"), "advantages"),
    "advantages: a wrapper that never yields": (wrapper("advantages", "if not keep.any(): yield"), "advantages"),
    "advantages: a wrapper that raises before": (wrapper("advantages", "1 / 0\nreturn (yield)"), "advantages"),
    "advantages: a wrapper that raises after": (wrapper("advantages", "x = yield\nreturn x[99]"), "advantages"),
    "advantages: a wrapper that changes the shape": (wrapper("advantages", "x = yield\nreturn x[1:]"), "advantages"),
    "state_dict: None": ("def state_dict(self): pass\ndef load_state_dict(self, state): pass", "state_dict"),
    "state_dict: raises": ("def state_dict(self): 1 / 0\ndef load_state_dict(self, state): pass", "state_dict"),
    "state_dict: an object": (
        "def state_dict(self): return {'a': {'b': [object()]}}\ndef load_state_dict(self, state): pass",
        "a/b/0",
    ),
}
PAIR_HOOKS = {
    **answers("pair_loss", "pass", "return policy.mean()", "return policy", "return [0.0] * pairs.num_pairs"),
    **answers("pair_loss", "return policy.detach().new_zeros(pairs.num_pairs)", "raise OSError(2, 'no')"),
    **answers("reference_logps", "pass", "return torch.zeros(1)"),
    **answers("reference_logps", "return torch.full((int(samples.loss_mask.sum()),), float('nan'))"),
}
QUICK = (
    "raises a KeyError",
    "StopIteration",
    "surrogate",
    "a wrapper",
    "state_dict",
    "pass",
    "forgotten",
    "async",
    "evil",
)
QUICK += (
    "policy}",
    "a pipe",
    "hostile",
    "an escape",
    "finder",
    "terabyte",
    "private",
    "a method",
    "never called",
    "nested",
    "logs",
    "= {'x'",
    "torch.ones(4, 3",
)


def quick(kinds):
    """The names of a table, of which all but a few of each kind are slow: what they show, others show too."""
    return [pytest.param(k, marks=[] if any(q in k for q in QUICK) else pytest.mark.slow) for k in kinds]


def swapped(trainer, body, packages, extends):
    """The trainer with the hooks of a plugin in place of its own: making one of its own takes half a second."""
    install(packages, body, extends=extends)
    composition, facts = compose("zeta"), trainer.hooks.facts
    backend = FixedRollouts([completions(6, 2, 4, 3)], cycle=True)
    backends = {"rollouts": backend} if extends == "grpo" and "def generate" not in body else None
    trainer.hooks = composition.instantiate(trainer.context, trainer.default_hooks(trainer), backends)
    trainer.hooks.facts |= facts
    return trainer


@pytest.fixture(scope="module")
def online(tmp_path_factory):
    folder = tmp_path_factory.mktemp("online")
    return make_trainer(folder, trainer={"rollouts": completions(6, 2, 4, 3)}, max_steps=1, num_iterations=1)


@pytest.fixture(scope="module")
def offline(tmp_path_factory):
    return helpers_offline.make_trainer(tmp_path_factory.mktemp("offline"), "DPO", max_steps=1)


def refusal(trainer, where):
    with pytest.raises(TRLCoreError) as caught:
        trainer.train()
    said = str(caught.value)
    said += "".join(getattr(caught.value, "__notes__", ()))
    assert "zeta" in said and where in said and "\n  To mend: " in said, said
    assert "\x1b" not in said
    said.encode()
    return caught.value


@pytest.mark.parametrize("kind", quick(HOOKS))
def test_broken_hook_is_named(kind, online, packages):
    body, where = HOOKS[kind]
    error = refusal(swapped(online, body, packages, "grpo"), where)
    if "raises" in kind:
        assert isinstance(error, PluginError)
        assert isinstance(error.__cause__, Exception)
        assert "of 'zeta' of trl-zeta 1.0 raised" in str(error)


@pytest.mark.parametrize("kind", quick(PAIR_HOOKS))
def test_broken_hook_on_pairs_is_named(kind, offline, packages):
    body, where = PAIR_HOOKS[kind]
    refusal(swapped(offline, body, packages, "dpo"), where)


def test_whole_path_from_the_entry_point_to_the_step(packages, tmp_path):
    install(packages, hook("advantages", "raise KeyError('lost')"))
    error = refusal(make_trainer(tmp_path, "zeta", trainer={"rollouts": completions(2, 2, 2, 2)}), "'advantages'")
    assert repr(error.__cause__) == "KeyError('lost')"
    assert isinstance(error, RuntimeError)


class Backend(FixedRollouts):
    """Raises what it is given."""

    def __init__(self, error):
        super().__init__([completions(6, 2, 4, 3)], cycle=True)
        self.error = error

    @hookimpl
    def loss_terms(self, samples):
        raise self.error


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(3), ConfigError("no", mend="do")], ids=repr)
def test_what_ends_the_process_and_errors_of_our_own_pass_as_they_are(error, online):
    facts, backends = online.hooks.facts, {"rollouts": Backend(error)}
    online.hooks = compose("grpo").instantiate(online.context, online.default_hooks(online), backends)
    online.hooks.facts |= facts
    with pytest.raises(type(error)) as caught:
        online.train()
    assert caught.value is error
    if isinstance(error, ConfigError):
        assert error.__notes__ == ["The hook 'loss_terms' of rollouts (tests.test_broken_plugins.Backend) raised this."]


# -- what a plugin declares --------------------------------------------------------------------------------------------
def options(body, decorator="@dataclass", more=""):
    """A class of options with this body."""
    return {"before": f"{decorator}\nclass Own:\n{indented(body)}", "more": f", config=Own{more}"}


KEEP = hook("keep", "return rollouts.group >= 0").replace("@hookimpl\n", "")
DECLARED = {
    # Fields of Algorithm.
    "summary of another type": ({"more": ", removal=3"}, "removal=3"),
    "config an instance": ({"more": ", config=5"}, "config=5"),
    "hooks a function": ({"before": "", "more": "", "hooks_are": "lambda context: None"}, "hooks=<function"),
    "hooks an instance": ({"hooks_are": "Hooks(None)"}, "hooks=<trl_zeta.Hooks"),
    "defaults a list": ({"more": ", defaults=['beta']"}, "defaults=['beta']"),
    "arguments a list": ({"more": ", arguments=['judge']"}, "arguments=['judge']"),
    "an argument that is no name": ({"more": ", arguments={'my judge': 'x'}"}, "'my judge'"),
    "a class name that is none": ({"more": ", config_name='My Config'"}, "'My Config'"),
    "extends a number": ({"extends": 3}, "extends=3"),
    # Options.
    "no dataclass": (options("x: int = 3", decorator=""), "no dataclass"),
    "a forgotten decorator": (options("x: int = option(3, 'x')", decorator=""), "dataclass"),
    "an option without default": (options("x: int"), "'x' without a default"),
    "an option that is private": (options("_x: int = option(3, 'x')"), "'_x'"),
    "an option named like a method": (options("to_dict: int = option(3, 'x')"), "'to_dict'"),
    "an option named like a property": (options("device: int = option(3, 'x')"), "'device'"),
    "an option named like a field of the class": (options("algorithm_name: str = option('', 'x')"), "'algorithm_name'"),
    "an option of the base": (options("beta: float = option(3.0, 'x')"), "'beta'"),
    "a default above its range": (options("x: int = option(3, 'x', le=2)"), "'x' with the default 3"),
    "a default of another type": (options("x: float = option(None, 'x')"), "'x' with the default None"),
    "a default that is no choice": (options("x: str = option('c', 'x', choices=('a',))"), "'x' with the default 'c'"),
    "a bound that is no number": (options("x: int | None = option(None, 'x', ge='a')"), "'x' with the default None"),
    "an InitVar": (options("x: InitVar[int] = 3"), "'x'"),
    "frozen options": (options("x: int = option(3, 'x')", decorator="@dataclass(frozen=True)"), "frozen"),
    "a mutable default": (options("x: list = []"), "mutable default"),
    "a check that fails": (options("x: int = option(3, 'x')\ndef __post_init__(self): self.y"), "'y'"),
    "a default that there is not": ({"more": ", defaults={'betta': 1}"}, "betta"),
    # Hooks.
    "hooks without context": ({"init": "    def __init__(self):\n        pass\n"}, "cannot be made as Hooks(context)"),
    "hooks that cannot be made": ({"init": "    def __init__(self, context):\n        context.nothing\n"}, "Making"),
    "hooks that want it by name": (
        {"init": "    def __init__(self, *, context):\n        pass\n"},
        "as Hooks(context)",
    ),
    "an async hook": ({"hooks": "@hookimpl\nasync " + KEEP}, "coroutine"),
    "a generator that is no wrapper": ({"hooks": hook("keep", "yield")}, "has a yield"),
    "a wrapper that is no generator": ({"hooks": wrapper("advantages", "return keep")}, "wrapper without a yield"),
    "a partial": ({"hooks": "keep = hookimpl(functools.partial(print))"}, "partial"),
    "a property": ({"hooks": "@property\n" + KEEP}, "not marked"),
    "a static method that is not marked": ({"hooks": "@staticmethod\ndef keep(rollouts): return 1"}, "not marked"),
    "state without load": ({"hooks": "def state_dict(self): return {}"}, "no load_state_dict"),
    "load without state": ({"hooks": "def load_state_dict(self, state): pass"}, "no state_dict"),
    "a hook that is never called": ({"hooks": hook("pair_loss", "return policy")}, "never called by ZETATrainer"),
    "a step that nobody provides": (
        {"extends": None, "more": ", config=OnlineConfig, trainer='trl_core.training.online:OnlineTrainer'"},
        "provides the step 'advantages'",
    ),
    # The trainer.
    "a trainer that is not there": ({"extends": None, "more": ", config=OnlineConfig, trainer='os:Nope'"}, "os:Nope"),
    "a trainer that is none": ({"extends": None, "more": ", config=OnlineConfig, trainer='os:path'"}, "os:path"),
    # Models.
    "no dict of models": ({"hooks": "@hookimpl\ndef extra_models(self, policy): pass"}, "nothing"),
}
MODELS = {
    "{'../evil': torch.nn.Linear(1, 1)}": "no plain name",
    "{'': torch.nn.Linear(1, 1)}": "expected a name",
    "{'...': torch.nn.Linear(1, 1)}": "no plain name",
    "{'a.b': torch.nn.Linear(1, 1)}": "no plain name",
    "{'ﬁ': torch.nn.Linear(1, 1)}": "no plain name",
    "{'x' * 300: torch.nn.Linear(1, 1)}": "no plain name",
    "{'nul': torch.nn.Linear(1, 1)}": "a device",
    "{'Model': torch.nn.Linear(1, 1)}": "a file of each checkpoint",
    "{'model_00001': torch.nn.Identity()}": "without parameters",
    "{'critic': torch.nn.Linear}": "to no module",
    "{'a': torch.nn.Linear(1, 1), 'A': torch.nn.Linear(1, 1)}": "twice",
    "{'a': policy}": "shares parameters with the policy",
    "{'a': policy.lm_head}": "shares parameters with the policy",
    "{'a': self.one, 'b': torch.nn.Sequential(self.one)}": "shares parameters with the model 'a'",
    "{1: torch.nn.Linear(1, 1)}": "expected a name",
}
for source, said in MODELS.items():
    body = f"one = torch.nn.Linear(1, 1)\n@hookimpl\ndef extra_models(self, policy): return {source}"
    DECLARED[f"models {source}"] = ({"hooks": body}, said)


@pytest.mark.parametrize("kind", quick(DECLARED))
def test_broken_declaration_is_named(kind, packages, tmp_path):
    given, said = dict(DECLARED[kind][0]), DECLARED[kind][1]
    hooks_are = given.pop("hooks_are", None)
    install(packages, given.pop("hooks", "pass"), **given)
    if hooks_are:
        source = packages / "trl_zeta.py"
        source.write_text(source.read_text().replace("hooks=Hooks", f"hooks={hooks_are}"))
    assert find("zeta").name == "zeta"  # it is listed
    model = tiny_model() if "model" in kind else "no/such-model"
    with pytest.raises(TRLCoreError) as caught:
        make_trainer(tmp_path, "zeta", trainer={"model": model, "rollouts": completions(2, 2, 2, 2)})
    error = str(caught.value)
    assert said in error and "zeta" in error and "\n  To mend: " in error, error


@pytest.mark.parametrize("name", ["model", "config", "help", "resume"])
def test_option_with_the_name_of_a_key_of_a_run_is_told(name, packages, capsys):
    install(packages, "pass", **options(f"{name}: int = option(1, 'x')"))
    assert main(["train", "zeta", "--beta", "0"]) == 2
    said = capsys.readouterr().err
    assert f"{name!r} of 'zeta' is also the name" in said or f"'{name}' of 'run'" in said
    assert "rename it" in said and "Traceback" not in said


def test_extra_model_of_two_plugins_that_is_one_module_is_refused(packages, tmp_path):
    class Gives(TrainerCallback):
        def __init__(self, name):
            self.name = name

        @hookimpl
        def extra_models(self, policy):
            return {self.name: module}

    module = torch.nn.Linear(1, 1)
    with pytest.raises(
        HookResultError, match=r"'[ab]' to a module that shares parameters with the model '[ab]'.*of Gives"
    ):
        make_trainer(tmp_path, trainer={"callbacks": [Gives("a"), Gives("b")]})


def test_static_class_and_lambda_hooks_are_called(packages, tmp_path):
    body = (
        "@staticmethod\n@hookimpl\ndef keep(rollouts): return rollouts.group >= 0\n"
        "@hookimpl\n@classmethod\ndef loss_terms(cls, logps): return {'mine': 0 * logps}\n"
        "advantages = hookimpl(lambda self, rollouts, keep: torch.full((4,), 0.25))\n"
        "@property\ndef unrelated(self): raise RuntimeError('not asked for')"
    )
    install(packages, body)
    trainer = make_trainer(tmp_path, "zeta", trainer={"rollouts": completions(2, 2, 2, 2)}, max_steps=1)
    trainer.train()
    assert log_lines(trainer)[0]["loss"] == pytest.approx(-0.25)


def test_equal_hook_objects_are_two(tmp_path):
    @dataclass
    class Counts(TrainerCallback):
        calls: int = 0

        @hookimpl
        def after_step(self, step):
            self.calls += 1

    first, second = Counts(), Counts()
    make_trainer(tmp_path, trainer={"callbacks": [first, second], "rollouts": completions(2, 2, 2, 2)}).train()
    assert (first.calls, second.calls) == (2, 2)


def test_loss_without_gradient_is_told_with_its_terms(packages, tmp_path):
    install(packages, hook("loss_terms", "return {'mine': logps.detach()}"), extends="sft")
    trainer = helpers_offline.make_trainer(tmp_path, "SFT", max_steps=1)
    composition = compose("zeta")
    trainer.hooks = composition.instantiate(trainer.context, trainer.default_hooks(trainer))
    trainer.hooks.manager.unregister(name="sft")
    with pytest.raises(
        HookResultError, match="has no gradient; it consists of the loss term 'mine' of 'zeta' of trl-z"
    ):
        trainer.train()


def test_loss_that_is_not_finite_names_the_term(packages, online):
    trainer = swapped(online, hook("loss_terms", "return {'mine': logps / 0}"), packages, "grpo")
    with pytest.raises(NonFiniteLossError, match=r"the loss term 'mine' of 'zeta' of trl-zeta 1\.0 is not finite"):
        trainer.train()


# -- what is installed -------------------------------------------------------------------------------------------------
def replaced(name, make):
    """Damage: another kind of file in place of one of the metadata."""

    def damage(packages, info):
        (info / name).unlink()
        make(info / name)

    return damage


def written(name, content):
    def damage(packages, info):
        (info / name).write_bytes(content)

    return damage


def sock(path):
    with contextlib.chdir(path.parent), socket.socket(socket.AF_UNIX) as server:
        server.bind(path.name)


SPECIAL = {
    "a pipe": os.mkfifo,
    "a folder": os.mkdir,
    "a socket": sock,
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a link to nothing": lambda path: path.symlink_to("nothing"),
    "a link to a device": lambda path: path.symlink_to("/dev/zero"),
    "a file of a terabyte": lambda path: os.truncate(os.open(path, os.O_CREAT | os.O_WRONLY), 2**40),
    "not UTF-8": lambda path: path.write_bytes(b"[trl_core.stable]\nName: \xff\xfe = x"),
}
POINTS = b"[trl_core.stable]\nzeta = trl_zeta:algorithm\n"
HOSTILE = "\x1b[2J\x1b]8;;http://x\x07\r\x07\x9b31m\u202eevil\u200b\ud800[red]x[/red]"
DAMAGED = {
    f"{name} is {kind}": replaced(name, make)
    for name in ("METADATA", "entry_points.txt")
    for kind, make in SPECIAL.items()
}
DAMAGED |= {
    "no Name": written("METADATA", b"Version: 1.0\n"),
    "an empty Name": written("METADATA", b"Name:  \nVersion: 1.0\n"),
    "no METADATA": lambda packages, info: (info / "METADATA").unlink(),
    "entry points without form": written("entry_points.txt", b"[trl_core.stable\nno equals sign\n"),
    "entry points without group": written("entry_points.txt", b"zeta = trl_zeta:algorithm\n[trl_core.stable]\n"),
}
BROKEN = {
    "a value without object": ("its entry point", written("entry_points.txt", POINTS.replace(b":algorithm", b""))),
    "a value with an escape": ("its entry point", written("entry_points.txt", POINTS.replace(b":al", b":\x1b[2J"))),
    "no module": ("is not found", lambda packages, info: (packages / "trl_zeta.py").unlink()),
    "a module that is a pipe": ("is not found", replaced("../trl_zeta.py", os.mkfifo)),
    "a name with an escape": (
        "characters other",
        written("entry_points.txt", b"[trl_core.stable]\nze\x1b[2Jta = a:b\n"),
    ),
    "a name of 5000 characters": (
        "longer than",
        written("entry_points.txt", POINTS.replace(b"zeta =", b"z" * 5000 + b" =")),
    ),
    "a requirement that is none": (
        "cannot be read",
        written("METADATA", b"Name: trl-zeta\nRequires-Dist: trl-core ]] \x1b[2J\n"),
    ),
    "a core that is excluded": (
        "requires trl-core",
        written("METADATA", b"Name: trl-zeta\nRequires-Dist: trl-core>99\n"),
    ),
    "a distribution name with an escape": (
        "of its distribution",
        written("METADATA", b"Name: \x1b]0;x\x07 y\nVersion: 1.0\n"),
    ),
}
ODD = {
    "no version": written("METADATA", b"Name: trl-zeta\n"),
    "a version that is none": written("METADATA", b"Name: trl-zeta\nVersion: not.a.version \x1b[2J\n"),
    "a long version": written("METADATA", b"Name: trl-zeta\nVersion: " + b"1." * 5000 + b"0\n"),
    "a source with a null byte": replaced("../trl_zeta.py", lambda path: path.write_bytes(b"x = 1\0\n")),
    "a source of deep nesting": replaced("../trl_zeta.py", lambda path: path.write_text("x = " + "(" * 9999)),
    "a source of many signs": replaced("../trl_zeta.py", lambda path: path.write_text("x = " + "-" * 99999 + "1")),
    "a source of a terabyte": replaced("../trl_zeta.py", SPECIAL["a file of a terabyte"]),
    "a source that is not UTF-8": replaced("../trl_zeta.py", lambda path: path.write_bytes(b"algorithm = '\xff'")),
    "a hostile summary": replaced(
        "../trl_zeta.py", lambda path: path.write_text(algorithm_source("zeta", summary=HOSTILE))
    ),
    "a summary of a megabyte": replaced(
        "../trl_zeta.py", lambda path: path.write_text(algorithm_source("zeta", summary="y" * 2**20))
    ),
    "extends with an escape": replaced(
        "../trl_zeta.py", lambda path: path.write_text(algorithm_source("zeta", extends=HOSTILE))
    ),
    "RECORD is a pipe": lambda packages, info: os.mkfifo(info / "RECORD"),
    "direct_url.json is a pipe": lambda packages, info: os.mkfifo(info / "direct_url.json"),
    "a pipe on the import path": lambda packages, info: (
        os.mkfifo(packages / "p"),
        sys.path.insert(0, str(packages / "p")),
    ),
    "a path entry that is no text": lambda packages, info: sys.path.insert(0, packages),
    "a finder that raises": lambda packages, info: sys.meta_path.insert(0, BadFinder()),
}


class BadFinder:
    """What a package may put on `sys.meta_path`."""

    def find_spec(self, *_):
        return None

    def find_distributions(self, *_):
        raise RuntimeError("a finder")


def listed_beside(packages, damage, capsys):
    """Damage trl-zeta, list all in each form, and return its record (None if there is none) and what was warned of."""
    info = write_distribution(
        packages,
        "trl-zeta",
        {"trl_core.stable": {"zeta": "trl_zeta:algorithm"}},
        files={"trl_zeta.py": algorithm_source("zeta")},
    )
    write_plugin(packages, "eta")
    damage(packages, info)
    with at_most(30):
        infos = list_algorithms()
        assert [each.qualified for each in infos if each.name in ("eta", "grpo")] == ["trl-eta:eta", "trl-core:grpo"]
        assert find("eta").broken is None
        for form in ("table", "md", "json"):
            capsys.readouterr()
            assert main(["list", "--format", form]) == 0
            out, err = capsys.readouterr()
            assert "eta" in out
            assert all(c.isprintable() or c == "\n" for c in out + err), form
            assert max(map(len, out.splitlines())) < (10**5 if form == "json" else 10_001)
    record = next((each for each in infos if each.value.startswith("trl_zeta") or each.value == "a:b"), None)
    return record, err


@pytest.mark.parametrize("kind", quick(DAMAGED))
def test_distribution_that_cannot_be_read_is_warned_of(kind, packages, capsys):
    record, err = listed_beside(packages, DAMAGED[kind], capsys)
    assert record is None
    assert "warning: trl_zeta-1.0.dist-info is left out: its " in err
    assert [each.place for each in damaged()] == ["trl_zeta-1.0.dist-info"]


@pytest.mark.parametrize("kind", quick(BROKEN))
def test_algorithm_that_cannot_be_used_has_a_reason(kind, packages, capsys):
    reason, damage = BROKEN[kind]
    record, _ = listed_beside(packages, damage, capsys)
    assert reason in record.broken
    assert record.broken.isprintable()


@pytest.mark.parametrize("kind", quick(ODD))
def test_oddity_leaves_the_record_usable(kind, packages, capsys):
    record, err = listed_beside(packages, ODD[kind], capsys)
    assert (record.qualified, record.broken) == ("trl-zeta:zeta", None)
    assert str(record).isprintable() and (record.summary or "").isprintable() and len(record.summary or "") <= 1000
    assert "warning" not in err


def test_algorithm_that_is_not_found_may_be_in_what_is_damaged(packages):
    info = write_distribution(packages, "trl-zeta", {"trl_core.stable": {"zeta": "trl_zeta:algorithm"}})
    replaced("METADATA", os.mkfifo)(packages, info)
    with at_most(20), pytest.raises(AlgorithmNotFoundError, match=r"trl_zeta-1.0.dist-info is left out"):
        find("zeta")


def test_thousands_of_entry_points_are_listed(packages):
    points = {f"z{number}": "trl_zeta:algorithm" for number in range(3000)}
    write_distribution(packages, "trl-zeta", {"trl_core.stable": points}, files={"trl_zeta.py": algorithm_source("z1")})
    with at_most(60):
        infos = [info for info in list_algorithms() if info.distribution == "trl-zeta"]
    assert len(infos) == 3000
    assert {info.summary for info in infos} == {"Read from the source."}


def test_core_whose_copy_is_a_pipe_is_still_found(packages):
    info = packages / "trl_core-9.dist-info"
    info.mkdir()
    os.mkfifo(info / "METADATA")
    with at_most(30):
        assert find("grpo").version != "9"
