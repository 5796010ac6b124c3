"""Rows that need no gradient get none, and rows that do not fit go in parts; neither changes what is computed."""

import pytest
import torch
from datasets import Dataset

from trl_core import hookimpl
from trl_core.errors import ConfigError
from trl_core.models.parts import parts_of
from trl_core.stages.policy_loss import LOSS_TYPES
from trl_core.testing import tiny_model

from .helpers_offline import DESCENT, demonstrations, pairs
from .helpers_offline import make_trainer as make_offline
from .helpers_online import completions, log_lines, make_rows, make_trainer, table, weights

PROMPTS = Dataset.from_list([{"prompt": text} for text in ("abcdefghij", "klm", "nopqrst", "uv")])
ROLLOUTS = [completions(3, 9, 5, 1, 4, 4, 2, 7), completions(2, 3, 8, 4, 1, 6, 5, 9, start=60)]
# In each generation the second group has no difference.
REWARDS = table(1.0, 0.0, 0.5, -1.0, *[0.5] * 4)
PLAIN = {**DESCENT, "per_device_train_batch_size": 8, "max_completion_length": 9, "max_steps": 4, "num_iterations": 2}
CLOCKS = ("time/", "step_time")


class Passes:
    """Counts the tokens of each training pass through a model, by whether gradients were on."""

    def __init__(self, model):
        self.moving, self.still = [], []
        model.get_input_embeddings().register_forward_hook(self.count)
        self.model = model

    def count(self, module, args, output):
        if self.model.training:  # the layouts are tried in evaluation mode
            (self.moving if torch.is_grad_enabled() else self.still).append(args[0].numel())


def run(folder, *, whole=False, trainer=None, **options):
    """A trainer after training, its model's passes; with `whole`, every row goes with gradient."""
    given = {"model": tiny_model(), "train_dataset": PROMPTS, "rollouts": ROLLOUTS, "reward_funcs": REWARDS}
    made = make_trainer(folder, trainer=given | (trainer or {}), **{**PLAIN, **options})
    made.still_rows_count = whole
    passes = Passes(made.model)
    made.train()
    return made, passes


def same(one, other, tolerance=1e-5):
    """Whether two trainers moved alike and logged the same."""
    start = weights(make_trainer("unused", trainer={"model": tiny_model()}))
    moved = weights(other) - start
    assert float(moved.norm()) > 0
    assert float((weights(one) - weights(other)).norm()) <= tolerance * float(moved.norm())
    for line, expected in zip(log_lines(one), log_lines(other), strict=True):
        assert line.keys() == expected.keys()
        for name, value in expected.items():
            if not name.startswith(CLOCKS):
                assert line[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name


# -- rows without advantage -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_rows_without_advantage_need_no_gradient(loss_type, tmp_path):
    options = {"loss_type": loss_type, **({"epsilon_high": 5.0} if loss_type == "cispo" else {}), "padding_free": True}
    usual, passes = run(tmp_path / "usual", **options)
    whole, all_passes = run(tmp_path / "whole", whole=True, **options)
    assert not usual.still_rows_count
    # The prompts have 10 and 3, then 7 and 2 tokens, completions 18 and 17, then 17 and 21.
    assert (passes.moving, passes.still) == ([28, 28, 24, 24], [20, 20, 23, 23])
    assert (all_passes.moving, all_passes.still) == ([48, 48, 47, 47], [])
    same(usual, whole)


@pytest.mark.parametrize(
    "options",
    [
        {"importance_sampling_level": "sequence", "loss_type": "grpo"},
        {"top_entropy_quantile": 0.4},
        {"off_policy_mask_threshold": 0.1},
        {"mask_truncated_completions": True},
        {"activation_checkpointing": True},
        {"share_prompts": False},
        {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "num_generations": 4},
        {"max_tokens_per_forward": 20},
    ],
    ids=lambda options: "-".join(options),
)
def test_options_change_nothing_about_that(options, tmp_path):
    usual, passes = run(tmp_path / "usual", **options)
    assert passes.still
    same(usual, run(tmp_path / "whole", whole=True, **options)[0])


def test_their_entropy_and_clipping_are_still_counted(tmp_path):
    usual, _ = run(tmp_path / "usual", temperature=0.7)
    other, _ = run(tmp_path / "other", temperature=0.7, trainer={"reward_funcs": table(1.0, 0.0, 0.5, -1.0, *range(4))})
    # Before any step the entropy is that of all rows, whatever their rewards.
    assert log_lines(usual)[0]["entropy"] == pytest.approx(log_lines(other)[0]["entropy"], rel=1e-6)


@pytest.mark.parametrize("options", [{"beta": 0.2}, {"beta": 0.2, "use_bias_correction_kl": True}])
def test_gradient_they_have_after_all_is_not_lost(options, tmp_path):
    usual, passes = run(tmp_path / "usual", **options)
    same(usual, run(tmp_path / "whole", whole=True, **options)[0])
    assert usual.still_rows_count
    # While the weights are the reference's, a KL term has no gradient but that of rounding.
    assert len(passes.still) in (1, 2)
    assert len(passes.moving) == 4 + 1


def test_gradient_from_another_plugins_term_is_not_lost(tmp_path):
    class LikelyRows:
        @hookimpl
        def loss_terms(self, samples, logps):
            return {"likely": -0.3 * logps}

    def made(whole):
        from trl_core.testing import FixedRollouts

        class Both(LikelyRows, FixedRollouts):
            pass

        return run(tmp_path / str(whole), whole=whole, trainer={"rollouts": Both(ROLLOUTS, cycle=True)})[0]

    usual = made(False)
    assert usual.still_rows_count
    same(usual, made(True))


def test_nothing_is_tried_where_rows_count_for_certain(tmp_path):
    assert not run(tmp_path / "entropy", entropy_coef=0.01)[1].still
    noisy = {"model": tiny_model(attention_dropout=0.1)}
    assert not run(tmp_path / "noise", trainer=noisy)[1].still
    assert run(tmp_path / "quiet", trainer=noisy, disable_dropout=True)[1].still


def test_batch_without_any_advantage_moves_nothing(tmp_path):
    trainer, passes = run(tmp_path, trainer={"reward_funcs": table(1.0)}, padding_free=True)
    assert torch.equal(weights(trainer), weights(make_trainer(tmp_path / "new", trainer={"model": tiny_model()})))
    assert passes.still == [48, 48, 47, 47]
    assert passes.moving == [2] * 4  # a row without loss tokens
    assert log_lines(trainer)[0]["entropy"] > 1


# -- parts ------------------------------------------------------------------------------------------------------------
def test_parts_hold_no_more_tokens_than_allowed():
    rows = make_rows([5, 1, 9, 4, 2], group=[0, 0, 1, 1, 2])  # two prompt tokens each

    def parts(most, kind):
        return [part.tolist() for part in parts_of(rows, most, kind)]

    assert parts(None, "packed") == [[0, 1, 2, 3, 4]]
    assert parts(1000, "packed") == [[2, 0, 3, 4, 1]]
    assert parts(13, "packed") == [[2], [0, 3], [4, 1]]
    assert parts(13, "padded") == [[2], [0], [3, 4, 1]] or parts(14, "padded") == [[2], [0, 3], [4, 1]]
    assert parts(15, "shared") == [[2, 3], [0, 1, 4]]
    assert parts(1, "packed") == [[2], [0], [3], [4], [1]]
    assert parts_of(rows.take([]), 7, "packed")[0].tolist() == []


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dapo", "dr_grpo", "luspo"])
@pytest.mark.parametrize("share", [True, False])
def test_micro_batch_in_parts_has_the_loss_of_the_whole(loss_type, share, tmp_path):
    options = {"loss_type": loss_type, "share_prompts": share, "beta": 0.1, "top_entropy_quantile": 0.6}
    parts, passes = run(tmp_path / "parts", whole=True, max_tokens_per_forward=24, **options)
    assert max(passes.moving) <= (28 if share else 24)  # one group with its prompt once has 28
    same(parts, run(tmp_path / "whole", whole=True, **options)[0])


@pytest.mark.parametrize("algorithm", ["SFT", "DPO"])
def test_datasets_are_trained_on_in_parts_as_well(algorithm, tmp_path):
    # With the policy's own start as the reference, whose reward is greater would be a matter of rounding.
    given = {"train_dataset": demonstrations(4)} if algorithm == "SFT" else {"train_dataset": pairs(4)}
    if algorithm == "DPO":
        given["ref_model"] = tiny_model(seed=1)
    options = {"per_device_train_batch_size": 4, "max_steps": 2, **DESCENT}

    def trained(name, **more):
        model = tiny_model()
        trainer = make_offline(tmp_path / name, algorithm, {"model": model, **given}, **options, **more)
        passes = Passes(model)
        trainer.train()
        return trainer, passes

    parts, passes = trained("parts", max_tokens_per_forward=32)
    assert max(passes.moving) <= 32
    assert len(passes.moving) > 4
    same(parts, trained("whole")[0])


def test_parts_keep_the_activations_of_one_part_only(tmp_path):
    def kept(most):
        trainer = make_trainer(
            tmp_path / str(most),
            trainer={"train_dataset": PROMPTS, "rollouts": completions(*[9] * 8)},
            **{**PLAIN, "max_steps": 1, "num_iterations": 1, "max_tokens_per_forward": most},
        )
        sizes = []
        score = trainer.score

        def measured(*args, **kwargs):
            def pack(tensor):
                sizes.append(tensor.numel())
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                return score(*args, **kwargs)

        trainer.score = measured
        trainer.train()
        return sum(sizes)

    assert kept(13) < kept(None) / 3


def test_router_loss_refuses_parts(tmp_path):
    from transformers import MixtralConfig, MixtralForCausalLM

    model = MixtralForCausalLM(
        MixtralConfig(
            vocab_size=261,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            num_local_experts=2,
            output_router_logits=True,
        )
    )
    with pytest.raises(ConfigError, match="max_tokens_per_forward=64 with a router loss"):
        make_trainer(tmp_path, trainer={"model": model}, max_tokens_per_forward=64)
    with pytest.raises(ConfigError, match="max_tokens_per_forward=0"):
        make_trainer(tmp_path, max_tokens_per_forward=0)


def test_reward_models_refuse_parts(tmp_path):
    with pytest.raises(ConfigError, match="max_tokens_per_forward=64 does not act on reward models"):
        make_offline(tmp_path, "Reward", max_tokens_per_forward=64)
