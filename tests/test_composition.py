"""Algorithms side by side: who answers, in which order, and which compositions are refused. On synthetic plugins."""

import copy
import dataclasses
import pickle

import pytest
import torch

from trl_core import GRPOTrainer, OnlineConfig, get_config, get_trainer, hookimpl
from trl_core.composition import compose
from trl_core.errors import (
    CompositionError,
    ConfigError,
    InvalidHookError,
    PluginConflict,
    StabilityError,
)
from trl_core.hookspecs import HookContext, hook_kinds
from trl_core.testing import FixedRollouts

from .helpers_dist import write_plugin
from .helpers_online import Recorder, completions, make_trainer

HEADER = """
from dataclasses import dataclass
import torch
from trl_core import Algorithm, OnlineConfig, hookimpl, option, require
"""


def plugin(folder, name, body="", *, extends="grpo", **arguments):
    """Install a plugin whose hooks class has this body; further arguments of Algorithm are source text."""
    hooks = "class Hooks:\n    def __init__(self, context):\n        self.context = context\n"
    hooks += "".join(f"    {line}\n" for line in body.strip("\n").splitlines())
    given = {"extends": repr(extends), "hooks": "Hooks", **arguments}
    declared = ", ".join(f"{key}={value}" for key, value in given.items() if key != "before")
    source = (
        f"{HEADER}{given.get('before', '')}\n{hooks}\nalgorithm = Algorithm(name={name!r}, summary='x', {declared})\n"
    )
    write_plugin(folder, name, source=source)


def refine(change):
    """A refinement of the advantages."""
    return f"@hookimpl(wrapper=True)\ndef advantages(self):\n    result = yield\n    return {change}"


def provide(hook="advantages", arguments="rollouts, keep", answer="torch.zeros(4)"):
    return f"@hookimpl\ndef {hook}(self, {arguments}):\n    return {answer}"


def option_class(name, **options):
    fields = "".join(f"    {key}: {kind} = option({default!r}, 'x')\n" for key, (kind, default) in options.items())
    return f"@dataclass\nclass {name}:\n{fields}"


def advantages(folder, name, **options):
    """What the loss gets, where GRPO alone gives the rows 0.875, -0.125, 0.375 and -1.125."""
    recorder = Recorder(completions(6, 2, 4, 3))
    trainer = make_trainer(folder, name, trainer={"rollouts": recorder}, max_steps=1, scale_rewards="none", **options)
    trainer.train()
    rows = recorder.micro_batches[0]
    return rows.mean_per_row(rows.advantages).tolist()


BASE = [0.875, -0.125, 0.375, -1.125]


# -- order ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("twice", [2 * a for a in BASE]),
        ("twice+more", [2 * a + 1 for a in BASE]),
        ("more+twice", [2 * (a + 1) for a in BASE]),
        ("grpo+more+twice", [2 * (a + 1) for a in BASE]),
        ("trl-more:more + twice", [2 * (a + 1) for a in BASE]),
    ],
)
def test_order_of_names_is_the_order_of_nesting(name, expected, packages, tmp_path):
    plugin(packages, "twice", refine("result * 2"))
    plugin(packages, "more", refine("result + 1"))
    assert advantages(tmp_path, name) == pytest.approx(expected)


def test_refinement_gets_the_answer_of_another_algorithm(packages, tmp_path):
    plugin(packages, "flat", provide(answer="torch.tensor([1.0, 2.0, 3.0, 4.0])"))
    plugin(packages, "twice", refine("result * 2"))
    for name in ("flat+twice", "twice+flat"):
        assert advantages(tmp_path / name, name) == pytest.approx([2.0, 4.0, 6.0, 8.0])


def test_algorithm_replaces_what_its_ancestors_provide(packages, tmp_path):
    plugin(packages, "flat", provide(answer="torch.ones(4)"))
    plugin(packages, "flatter", provide(answer="torch.full((4,), 0.5)"), extends="flat")
    assert advantages(tmp_path, "flatter") == pytest.approx([0.5] * 4)
    assert compose("flatter").chain()["advantages"] == [("flatter", "provide")]
    assert [part["algorithm"] for part in compose("flatter").provenance()] == ["grpo", "flat", "flatter"]


def test_ancestor_comes_before_whatever_is_named(packages, tmp_path):
    # "more" is asked for by its own name and as the ancestor of "most": it acts once, before it.
    plugin(packages, "more", refine("result + 1"))
    plugin(packages, "most", refine("result * 10"), extends="more")
    for name in ("most", "more+most", "most+more"):
        assert advantages(tmp_path / name, name) == pytest.approx([10 * (a + 1) for a in BASE])


def test_chain_shows_who_acts_from_the_base_outwards(packages):
    plugin(packages, "twice", refine("result * 2"))
    plugin(packages, "keeper", provide("keep", "rollouts", "torch.ones(4, dtype=torch.bool)"))
    chain = compose("twice+keeper").chain()
    assert list(chain) == list(hook_kinds())
    assert chain["advantages"] == [("grpo", "provide"), ("twice", "refine")]
    assert chain["keep"] == [("keeper", "contribute")]
    assert chain["loss_terms"] == [("grpo", "contribute")]
    assert chain["generate"] == []


def test_provenance_keeps_the_order(packages):
    plugin(packages, "twice", refine("result * 2"))
    plugin(packages, "more", refine("result + 1"))
    assert [part["algorithm"] for part in compose("more+twice").provenance()] == ["grpo", "more", "twice"]
    assert compose("more+twice").provenance()[2] == {
        "algorithm": "twice",
        "distribution": "trl-twice",
        "version": "1.0",
        "stability": "experimental",
    }


# -- classes ----------------------------------------------------------------------------------------------------------
def test_same_composition_is_the_same_class():
    assert get_trainer("gfpo") is get_trainer("trl-gfpo:gfpo") is get_trainer("grpo+gfpo")
    assert get_config("gfpo") is get_config("trl-gfpo:gfpo")
    assert get_trainer("grpo") is GRPOTrainer is not get_trainer("gfpo")


def test_classes_are_named_after_their_algorithms(packages):
    plugin(packages, "my_method", refine("result"))
    plugin(packages, "named", refine("result"), config_name="'NiceConfig'", trainer_name="'NiceTrainer'")
    names = {n: (get_config(n).__name__, get_trainer(n).__name__) for n in ("grpo", "gfpo", "my_method", "named")}
    assert names == {
        "grpo": ("GRPOConfig", "GRPOTrainer"),
        "gfpo": ("GFPOConfig", "GFPOTrainer"),
        "my_method": ("MYMETHODConfig", "MYMETHODTrainer"),
        "named": ("NiceConfig", "NiceTrainer"),
    }
    assert get_trainer("named+gfpo").__name__ == "NAMEDGFPOTrainer"


def test_every_trainer_has_hooks_of_its_own(tmp_path):
    one, two = (make_trainer(tmp_path / str(i)) for i in range(2))
    assert one.hooks.objects["grpo"] is not two.hooks.objects["grpo"]
    assert one.hooks.manager is not two.hooks.manager


def test_state_is_kept_by_the_name_of_the_algorithm(packages, tmp_path):
    body = "def state_dict(self):\n    return {'seen': self.seen}\ndef load_state_dict(self, state):\n"
    plugin(packages, "memory", body + "    self.seen = state['seen']\nseen = 3")
    hooks = make_trainer(tmp_path, "memory").hooks
    state = hooks.state_dict()
    assert state["memory"] == {"seen": 3}
    assert set(state) == {"grpo", "memory"}
    hooks.load_state_dict({"memory": {"seen": 5}})
    assert hooks.state_dict()["memory"] == {"seen": 5}


# -- options ----------------------------------------------------------------------------------------------------------
def test_options_of_all_algorithms_are_in_one_config(packages, tmp_path):
    plugin(packages, "one", before=option_class("One", strength=("float", 0.5)), config="One")
    plugin(packages, "two", before=option_class("Two", patience=("int", 3)), config="Two")
    args = get_config("one+two")(str(tmp_path), strength=0.7, num_generations=4, report_to=[], use_cpu=True)
    assert (args.strength, args.patience, args.num_generations, args.epsilon) == (0.7, 3, 4, 0.2)
    assert isinstance(args, OnlineConfig)


@pytest.mark.parametrize(("first", "second"), [("one", "two"), ("two", "one")])
def test_option_defined_by_two_algorithms_is_a_conflict(first, second, packages):
    for name in ("one", "two"):
        plugin(packages, name, before=option_class("Own", strength=("float", 0.5)), config="Own")
    with pytest.raises(PluginConflict, match=f"'strength' .*trl-{first}:{first}.*trl-{second}:{second}"):
        get_config(f"{first}+{second}")


def test_option_of_the_base_defined_again_is_a_conflict(packages):
    plugin(packages, "one", before=option_class("Own", epsilon=("float", 0.3)), config="Own")
    with pytest.raises(PluginConflict, match="'epsilon' is defined by 'grpo' and again by 'trl-one:one'"):
        get_config("one")


def test_default_of_the_base_can_be_another(packages, tmp_path):
    plugin(packages, "one", defaults="{'loss_type': 'grpo', 'beta': 0.04}")
    quiet = {"report_to": [], "use_cpu": True}
    args = get_config("one")(str(tmp_path), **quiet)
    assert (args.loss_type, args.beta) == ("grpo", 0.04)
    assert get_config("one")(str(tmp_path), loss_type="bnpo", **quiet).loss_type == "bnpo"
    assert get_config("grpo")(str(tmp_path), **quiet).loss_type == "dapo"
    # The help text stays.
    field = {f.name: f for f in dataclasses.fields(get_config("one"))}["beta"]
    assert "reference" in field.metadata["help"]


def test_default_that_can_be_changed_is_each_configs_own(packages, tmp_path):
    plugin(packages, "one", extends="dpo", defaults="{'loss_type': ['ipo'], 'model_init_kwargs': {'dtype': 'auto'}}")
    one, other = (get_config("one")(str(tmp_path), report_to=[], use_cpu=True) for _ in range(2))
    one.loss_type.append("sft")
    one.model_init_kwargs["dtype"] = "float32"
    assert (other.loss_type, other.model_init_kwargs) == (["ipo"], {"dtype": "auto"})
    assert get_config("dpo")(str(tmp_path), report_to=[], use_cpu=True).loss_type == ["sigmoid"]


@pytest.mark.parametrize("name", ["one+two", "two+one"])
def test_different_defaults_of_siblings_are_a_conflict(name, packages):
    plugin(packages, "one", defaults="{'loss_type': 'grpo', 'beta': 0.1}")
    plugin(packages, "two", defaults="{'loss_type': 'grpo', 'beta': 0.2}")
    first, second = ((part, "0.1" if part == "one" else "0.2") for part in name.split("+"))
    message = "'trl-{0}:{0}' and 'trl-{1}:{1}' want different defaults for the option 'beta': {2} and {3}"
    with pytest.raises(PluginConflict, match=message.format(first[0], second[0], first[1], second[1])) as caught:
        get_trainer(name)
    assert "set beta yourself" in caught.value.mend


def test_equal_defaults_of_siblings_go_together(packages, tmp_path):
    plugin(packages, "one", defaults="{'loss_type': 'grpo', 'beta': 0.1}")
    plugin(packages, "two", defaults="{'loss_type': 'grpo', 'epsilon': 0.3}")
    args = get_config("one+two")(str(tmp_path), report_to=[], use_cpu=True)
    assert (args.loss_type, args.beta, args.epsilon) == ("grpo", 0.1, 0.3)


@pytest.mark.parametrize("name", ["two", "one+two", "two+one", "three+two", "two+three"])
def test_algorithm_replaces_the_defaults_of_its_ancestors(name, packages, tmp_path):
    plugin(packages, "one", defaults="{'beta': 0.1}")
    plugin(packages, "two", defaults="{'beta': 0.2}", extends="one")
    plugin(packages, "three", defaults="{'beta': 0.2}")
    assert get_config(name)(str(tmp_path), report_to=[], use_cpu=True).beta == 0.2


def test_default_of_an_ancestor_that_is_replaced_contradicts_nobody_but_its_successor_does(packages):
    plugin(packages, "one", defaults="{'beta': 0.1}")
    plugin(packages, "two", defaults="{'beta': 0.2}", extends="one")
    plugin(packages, "three", defaults="{'beta': 0.1}")
    with pytest.raises(PluginConflict, match="'trl-two:two' and 'trl-three:three' want different defaults"):
        get_config("two+three")


def test_last_named_algorithm_overrides_what_is_no_option(packages):
    for name, least in (("one", 3), ("two", 5)):
        own = option_class("Own", **{f"of_{name}": ("int", 0)}) + f"    minimum_generations = {least}\n"
        plugin(packages, name, before=own, config="Own")
    least = {name: get_config(name).minimum_generations for name in ("grpo", "one+two", "two+one")}
    assert least == {"grpo": 2, "one+two": 5, "two+one": 3}


def test_default_of_an_unknown_option_is_refused(packages):
    plugin(packages, "one", defaults="{'betta': 0.1}")
    with pytest.raises(CompositionError, match="betta"):
        get_config("one")


def test_checks_of_base_and_of_own_options_run(packages, tmp_path):
    check = "\n    def __post_init__(self):\n        require(self.strength < 1, 'strength is too high', 'Lower it.')\n"
    plugin(packages, "one", before=option_class("Own", strength=("float", 0.5)) + check, config="Own")
    config = get_config("one")
    with pytest.raises(ConfigError, match="strength is too high"):
        config(str(tmp_path), strength=2.0, report_to=[], use_cpu=True)
    with pytest.raises(ConfigError, match="num_generations=1"):
        config(str(tmp_path), num_generations=1, report_to=[], use_cpu=True)


@pytest.mark.parametrize(
    "duplicate", [copy.copy, copy.deepcopy, lambda args: pickle.loads(pickle.dumps(args)), dataclasses.replace]
)
def test_merged_config_can_be_copied(duplicate, tmp_path):
    args = get_config("gfpo")(
        str(tmp_path), num_remains_in_group=2, epsilon=0.3, gradient_accumulation_steps=2, report_to=[], use_cpu=True
    )
    twin = duplicate(args)
    assert type(twin) is type(args)
    assert twin is not args
    assert dataclasses.asdict(twin) == dataclasses.asdict(args)
    assert (twin.num_remains_in_group, twin.epsilon, twin.steps_per_generation) == (2, 0.3, 2)


# -- arguments of the trainer -----------------------------------------------------------------------------------------
def test_argument_of_an_algorithm_reaches_its_hooks(packages, tmp_path):
    plugin(packages, "one", arguments="{'judge': 'A function.', 'coach': 'Another.'}")
    judge = object()
    context = make_trainer(tmp_path, "one", trainer={"judge": judge}).hooks.objects["one"].context
    assert context.arguments == {"judge": judge, "coach": None}


def test_arguments_of_all_algorithms_are_known(packages, tmp_path):
    plugin(packages, "one", arguments="{'judge': 'A function.'}")
    with pytest.raises(ConfigError, match=r"no argument 'umpire'.*group_filter_func, judge"):
        make_trainer(tmp_path, "gfpo+one", trainer={"umpire": 1})


def test_context_outside_a_trainer_drops_metrics_and_gathers_nothing():
    context = HookContext(None, {})
    context.log("name", 1.0)
    values = torch.tensor([1.0])
    assert context.gather(values) is values


# -- conflicts --------------------------------------------------------------------------------------------------------
def test_two_providers_of_one_step_are_a_conflict(packages):
    plugin(packages, "one", provide())
    plugin(packages, "two", provide())
    with pytest.raises(PluginConflict, match="'trl-one:one' and 'trl-two:two' both provide 'advantages'"):
        get_trainer("one+two")


def test_providers_of_different_steps_go_together(packages):
    plugin(packages, "one", provide())
    plugin(packages, "two", provide("score", "rollouts"))
    assert compose("one+two").chain()["score"] == [("two", "provide")]


def test_backend_beside_an_algorithm_that_generates_is_a_conflict(packages, tmp_path):
    plugin(packages, "one", provide("generate", "prompts, sampling"))
    with pytest.raises(PluginConflict, match="rollouts and the algorithm 'one' both provide 'generate'"):
        make_trainer(tmp_path, "one", trainer={"rollouts": completions(3, 3, 3, 3)})


def test_algorithms_without_a_common_base_are_refused(packages):
    plugin(packages, "alone", extends=None, config="OnlineConfig", trainer="'trl_core.training.online:OnlineTrainer'")
    assert issubclass(get_config("alone"), OnlineConfig)
    with pytest.raises(CompositionError, match="'gfpo' builds on 'grpo', 'alone' builds on 'alone'"):
        get_trainer("gfpo+alone")


def test_algorithm_that_stands_on_nothing_is_refused(packages):
    plugin(packages, "alone", extends=None)
    with pytest.raises(CompositionError, match="no trainer or no config"):
        get_trainer("alone")


def test_algorithm_that_extends_itself_is_refused(packages):
    plugin(packages, "one", extends="two")
    plugin(packages, "two", extends="one")
    with pytest.raises(CompositionError, match="extends itself"):
        get_trainer("one")


def test_less_stable_part_is_refused_if_asked_to():
    assert get_trainer("grpo", require="stable") is GRPOTrainer
    with pytest.raises(StabilityError, match="gfpo"):
        get_trainer("gfpo", require="stable")


# -- hooks that do not fit the contract -------------------------------------------------------------------------------
BAD_HOOKS = {
    "misspelt": ("@hookimpl\ndef advantage(self, rollouts): ...", r"'advantage' .*Did you mean 'advantages'\?"),
    "unknown": ("@hookimpl\ndef zzz(self): ...", "'zzz' .*does not exist"),
    "unmarked": ("def advantages(self, rollouts, keep): ...", "'advantages' .*is not marked"),
    "wrapped_contribution": (
        "@hookimpl(wrapper=True)\ndef keep(self, rollouts):\n    return (yield)",
        "'keep' .*is a wrapper, but contribute hooks",
    ),
    "wrapped_reference": (
        "@hookimpl(wrapper=True)\ndef reference_logps(self, samples):\n    return (yield)",
        "'reference_logps' .*is a wrapper",
    ),
    "default": ("@hookimpl\ndef advantages(self, rollouts, keep=None): ...", "'keep' a default value"),
    "strange_argument": (
        "@hookimpl\ndef advantages(self, rollouts, epoch): ...",
        "takes 'epoch'; allowed: keep, rollouts",
    ),
    "open_arguments": ("@hookimpl\ndef advantages(self, **kwargs): ...", r"takes '\*\*kwargs'"),
    "first": ("@hookimpl(tryfirst=True)\ndef keep(self, rollouts): ...", "uses tryfirst"),
    "last": ("@hookimpl(trylast=True)\ndef keep(self, rollouts): ...", "uses tryfirst, trylast"),
    "old_wrapper": ("@hookimpl(hookwrapper=True)\ndef advantages(self):\n    yield", "hookwrapper"),
}


@pytest.mark.parametrize(("body", "message"), BAD_HOOKS.values(), ids=BAD_HOOKS)
def test_hook_that_does_not_fit_is_refused_by_name(body, message, packages):
    plugin(packages, "zeta", body)
    with pytest.raises(InvalidHookError, match=message) as caught:
        get_trainer("zeta")
    assert "of 'trl-zeta:zeta'" in str(caught.value)


def test_hook_may_take_no_argument(packages, tmp_path):
    plugin(packages, "one", "@hookimpl\ndef advantages(self):\n    return torch.full((4,), 0.25)")
    assert advantages(tmp_path, "one") == pytest.approx([0.25] * 4)


class Misspelt:
    @hookimpl
    def generat(self, prompts): ...


class Unmarked:
    def generate(self, prompts, sampling): ...


@pytest.mark.parametrize(
    ("backend", "message"),
    [
        (Misspelt(), r"'generat' of 'rollouts'.*Did you mean 'generate'"),
        (Unmarked(), r"'generate' of 'rollouts'.*not marked"),
        (lambda prompts: prompts, "rollouts .*no hook"),
        (FixedRollouts, "rollouts .*no hook"),
    ],
)
def test_backend_without_a_usable_hook_is_refused(backend, message, tmp_path):
    with pytest.raises(InvalidHookError, match=message):
        make_trainer(tmp_path, trainer={"rollouts": backend})


def test_refusal_of_an_algorithm_comes_before_the_model_is_loaded(packages, tmp_path):
    body = "def __init__(self, context):\n    require(context.args.beta == 0, 'beta must be 0', 'Set it.')"
    plugin(packages, "picky", body)
    with pytest.raises(ConfigError, match="beta must be 0"):
        make_trainer(tmp_path, "picky", trainer={"model": "no/such-model"}, beta=0.1)
