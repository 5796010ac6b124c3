"""What the core does for algorithms with ratio levels of their own: options of a base, refusals, warnings, metrics."""

import dataclasses
import logging

import pytest
import torch

from trl_core import GRPOConfig, get_config, get_trainer
from trl_core.errors import ConfigError
from trl_core.testing import FixedRollouts, tiny_model

from .helpers_dist import write_plugin
from .helpers_online import TOKENIZER, completions, log_lines, make_trainer, prompts, table, weights

PLAIN = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "activation_checkpointing": False}
SMALL = {"per_device_train_batch_size": 4, "num_generations": 4, "max_completion_length": 6, "shuffle_dataset": False}

PLUGIN = """
from dataclasses import dataclass
from trl_core import Algorithm, hookimpl, option

@dataclass
class Options:
    importance_sampling_levels = ("token", "sequence", "half")
    uses_reference = True

class Hooks:
    def __init__(self, context):
        self.level = context.args.importance_sampling_level

    @hookimpl(wrapper=True)
    def log_ratio(self):
        result = yield
        return result / 2 if self.level == "half" else result

algorithm = Algorithm(name="halved", summary="x", extends="grpo", config=Options, hooks=Hooks)
"""


@pytest.fixture
def halved(packages):
    """An algorithm with a further ratio level, no option of its own, and a property that differs from GRPO's."""
    write_plugin(packages, "halved", source=PLUGIN)
    return get_trainer("halved")


def made(trainer, args, model=None):
    return trainer(
        model or tiny_model(),
        reward_funcs=table(1.0, 0.0, 0.5, -1.0),
        args=args,
        train_dataset=prompts(),
        processing_class=TOKENIZER,
        rollouts=FixedRollouts([completions(6, 2, 4, 3)], cycle=True),
    )


# -- the config of another algorithm -----------------------------------------------------------------------------------
def test_config_of_the_base_is_taken_over_with_the_properties_of_the_algorithm(halved, tmp_path):
    args = GRPOConfig(str(tmp_path), importance_sampling_level="half", epsilon=0.3, **SMALL, **PLAIN)
    trainer = made(halved, args)
    assert type(trainer.args) is get_config("halved")
    assert dataclasses.asdict(trainer.args) == dataclasses.asdict(args)
    assert (trainer.args.uses_reference, args.uses_reference) == (True, False)
    assert type(args) is GRPOConfig
    assert trainer.reference is not None


def test_config_of_the_algorithm_itself_is_used_as_it_is(halved, tmp_path):
    args = get_config("halved")(str(tmp_path), **SMALL, **PLAIN)
    assert made(halved, args).args is args


def test_config_that_derives_from_the_algorithms_is_used_as_it_is(tmp_path):
    @dataclasses.dataclass
    class Mine(GRPOConfig):
        mine: int = 3

    args = Mine(str(tmp_path), **SMALL, **PLAIN)
    assert made(get_trainer("grpo"), args).args is args


def test_config_without_the_options_of_the_algorithm_is_refused(tmp_path):
    args = GRPOConfig(str(tmp_path), **SMALL, **PLAIN)
    with pytest.raises(ConfigError, match="args is a GRPOConfig, which lacks options of 'gfpo'"):
        made(get_trainer("gfpo"), args)


def test_run_with_a_config_taken_over_resumes_under_a_config_of_its_own(halved, tmp_path):
    options = {**SMALL, **PLAIN, "importance_sampling_level": "half", "learning_rate": 1e-2, "num_iterations": 2}
    options |= {"max_steps": 4, "save_steps": 3}
    taken = made(halved, GRPOConfig(str(tmp_path), **options))
    taken.train()
    own = made(halved, get_config("halved")(str(tmp_path), **options))
    own.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert torch.equal(weights(taken), weights(own))


# -- levels of the ratio -----------------------------------------------------------------------------------------------
def test_grpo_says_where_sequence_token_is_to_be_had(tmp_path):
    with pytest.raises(ConfigError, match="importance_sampling_level='sequence_token'") as caught:
        make_trainer(tmp_path, trainer={"model": "no/such-model"}, importance_sampling_level="sequence_token")
    assert "from trl_gspo import GRPOTrainer" in caught.value.mend


@pytest.mark.usefixtures("halved")
@pytest.mark.parametrize(
    ("level", "loss_type", "warned"),
    [
        ("token", "dapo", False),
        ("sequence", "dapo", True),
        ("half", "dapo", True),
        ("half", "bnpo", True),
        ("half", "grpo", False),
        ("half", "luspo", False),
    ],
)
def test_weight_by_length_is_warned_of_at_every_level_but_that_of_tokens(level, loss_type, warned, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        make_trainer(tmp_path, "halved", importance_sampling_level=level, loss_type=loss_type)
    message = f"importance_sampling_level='{level}' with loss_type='{loss_type}' weights each sequence by its length"
    assert (message in caplog.text) is warned


@pytest.mark.usefixtures("halved")
@pytest.mark.parametrize(("level", "counted", "other"), [("token", 15, 4), ("half", 15, 4), ("sequence", 4, 15)])
def test_clipping_is_counted_in_rows_only_where_a_row_has_one_ratio(level, counted, other, tmp_path):
    # Rows of 6, 2, 4 and 3 tokens.
    options = {"num_iterations": 2, "optim": "sgd", "learning_rate": 0.05, "epsilon": 0.05, "loss_type": "grpo"}
    recorded = {"rollouts": completions(6, 2, 4, 3)}
    trainer = make_trainer(tmp_path, "halved", recorded, importance_sampling_level=level, **options)
    trainer.train()
    share = log_lines(trainer)[1]["clip_ratio/region_mean"]
    assert share * counted == pytest.approx(round(share * counted), abs=1e-4)
    assert abs(share * other - round(share * other)) > 0.01
