"""Models trained beside the policy, and what hooks note about rows before training on them."""

import dataclasses
import itertools

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from torch import nn
from transformers import TrainerCallback

from trl_core import TokenRows, hookimpl
from trl_core.errors import ConfigError, HookResultError
from trl_core.models import token_values
from trl_core.stages import TokenMean
from trl_core.testing import tiny_classifier, tiny_model

from .helpers_online import Sampled, completions, log_lines, make_trainer, table, weights


class Critic(TrainerCallback):
    """Trains a classifier to give each token's id, beside whatever else is trained."""

    def __init__(self, **models):
        torch.manual_seed(0)
        self.given = models or {"critic": tiny_classifier()}
        self.models, self.gradients = {}, []

    @hookimpl
    def extra_models(self, policy):
        return self.given

    @hookimpl
    def loss_terms(self, samples):
        found = {}
        for name, model in self.models.items():
            values, _ = token_values(model, samples, pad_token_id=0)
            found[name] = TokenMean((values - samples.completion_ids[samples.loss_mask] / 100).square())
        return found

    def on_step_begin(self, args, state, control, **_):
        parameters = [p for model in self.models.values() for p in model.parameters()]
        self.gradients.append(any(p.grad is not None and bool(p.grad.any()) for p in parameters))


def with_critic(folder, **options):
    critic = Critic()
    trainer = make_trainer(folder, trainer={"callbacks": [critic]}, max_steps=4, **options)
    critic.models = trainer.context.models
    return trainer, critic


def flat(module):
    return torch.cat([p.detach().flatten() for p in module.parameters()])


# -- extra models -----------------------------------------------------------------------------------------------------
def test_extra_model_is_trained_and_the_policy_is_not_disturbed(tmp_path):
    plain = make_trainer(tmp_path / "plain", max_steps=4, max_grad_norm=0.0)
    plain.train()
    trainer, critic = with_critic(tmp_path / "critic", max_grad_norm=0.0, gradient_accumulation_steps=1)
    before = flat(trainer.extra_models["critic"])
    trainer.train()
    assert not torch.equal(flat(trainer.extra_models["critic"]), before)
    assert torch.equal(weights(trainer), weights(plain))
    assert critic.gradients == [False] * 4  # each step starts without those of the last


def test_extra_model_decays_and_is_scheduled_like_the_policy(tmp_path):
    trainer, _ = with_critic(tmp_path, weight_decay=0.1, lr_scheduler_type="linear")
    trainer.create_optimizer()
    critic = {id(p): name for name, p in trainer.extra_models["critic"].named_parameters()}
    groups = [[critic[id(p)] for p in g["params"] if id(p) in critic] for g in trainer.optimizer.param_groups]
    decay = {
        name: g["weight_decay"]
        for g, names in zip(trainer.optimizer.param_groups, groups, strict=True)
        for name in names
    }
    assert set(decay) == set(critic.values())
    assert {name for name, value in decay.items() if value == 0.0} == {name for name in decay if "norm" in name}
    trainer.train()
    assert {group["lr"] for group in trainer.optimizer.param_groups} == {0.0}


def test_extra_model_may_have_a_learning_rate_of_its_own(tmp_path):
    trainer, _ = with_critic(tmp_path, lr_scheduler_type="linear", optim="sgd", max_grad_norm=0.0)
    trainer.context.learning_rates["critic"] = 0.0
    before = flat(trainer.extra_models["critic"]), weights(trainer)
    trainer.train()
    assert torch.equal(flat(trainer.extra_models["critic"]), before[0])
    assert not torch.equal(weights(trainer), before[1])
    rates = [line["learning_rate"] for line in log_lines(trainer)]
    assert rates == pytest.approx([0.01, 0.0075, 0.005, 0.0025])  # the policy's


def test_gradients_are_clipped_over_all_models_together(tmp_path):
    trainer, _ = with_critic(tmp_path, max_grad_norm=1e-3, learning_rate=0.0)
    norms = []

    class Norm(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **_):
            parameters = [p for m in (trainer.model, *trainer.extra_models.values()) for p in m.parameters()]
            norms.append(torch.stack([p.grad.norm() for p in parameters if p.grad is not None]).norm().item())

    trainer.add_callback(Norm())
    trainer.train()
    assert norms == pytest.approx([1e-3] * 4, rel=1e-2)
    assert min(line["grad_norm"] for line in log_lines(trainer)) > 1e-3


def test_extra_model_resumes_exactly_at_every_step(tmp_path):
    trainer, _ = with_critic(tmp_path / "all", save_strategy="steps", save_steps=1)
    trainer.train()
    expected = weights(trainer), flat(trainer.extra_models["critic"])
    saved = load_file(tmp_path / "all" / "checkpoint-4" / "critic.safetensors")
    assert all(torch.equal(saved[name], value) for name, value in trainer.extra_models["critic"].state_dict().items())
    for step in (1, 2, 3):
        again, _ = with_critic(tmp_path / f"from-{step}")
        with torch.no_grad():
            for parameter in again.extra_models["critic"].parameters():
                parameter.zero_()
        again.train(resume_from_checkpoint=str(tmp_path / "all" / f"checkpoint-{step}"))
        assert torch.equal(weights(again), expected[0])
        assert torch.equal(flat(again.extra_models["critic"]), expected[1])


def test_modes_and_dropout_follow_the_policy(tmp_path):
    modes = []

    class Modes(Critic):
        @hookimpl
        def annotate(self, samples):
            modes.append(("annotate", self.models["critic"].training, torch.is_grad_enabled()))
            return {}

        @hookimpl
        def loss_terms(self, samples):
            modes.append(("loss", self.models["critic"].training, torch.is_grad_enabled()))
            return {}

    critic = Modes()
    trainer = make_trainer(tmp_path, trainer={"callbacks": [critic]}, max_steps=1, eval_strategy="no")
    critic.models = trainer.context.models
    trainer.train()
    trainer.evaluate(trainer.train_dataset)
    assert modes[:2] == [("annotate", False, False), ("loss", True, True)]
    assert set(modes[2:]) == {("annotate", False, False), ("loss", False, False)}


@pytest.mark.parametrize(("given", "why"), [({"critic": None}, "to no module"), ({"critic": 3}, "to no module")])
def test_extra_models_must_be_modules(tmp_path, given, why):
    with pytest.raises(HookResultError, match=why):
        make_trainer(tmp_path, trainer={"callbacks": [Critic(**given)]})


def test_given_optimizer_must_have_the_extra_model(tmp_path):
    model, critic = tiny_model(), Critic()
    parameters = [*model.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    arguments = {"model": model, "callbacks": [critic], "optimizers": (optimizer, None)}
    with pytest.raises(ConfigError, match="not all parameters of 'critic'"):
        make_trainer(tmp_path, trainer=arguments)
    both = torch.optim.SGD([*parameters, *critic.given["critic"].parameters()], lr=0.1)
    trainer = make_trainer(tmp_path, trainer=arguments | {"optimizers": (both, None)})
    critic.models, before = trainer.context.models, flat(trainer.extra_models["critic"])
    trainer.train()
    assert not torch.equal(flat(trainer.extra_models["critic"]), before)


@pytest.mark.parametrize(("options", "tokens"), [({}, 10 + 6), ({"share_prompts": False}, 4 * 10 + 6)])
def test_a_prompt_goes_through_an_extra_model_once_per_group(options, tokens, tmp_path):
    critic = Critic()
    rows = {"train_dataset": Dataset.from_list([{"prompt": "abcdefghij"}]), "rollouts": completions(1, 2, 1, 2)}
    made = make_trainer(tmp_path, trainer={"callbacks": [critic], **rows}, max_steps=1, padding_free=True, **options)
    critic.models, seen = made.context.models, []

    def count(module, args, output):
        if module.training:  # the layouts are tried in evaluation mode
            seen.append(args[0].numel())

    made.extra_models["critic"].get_input_embeddings().register_forward_hook(count)
    made.train()
    assert seen == [tokens]


def test_two_extra_models_of_one_name_are_refused(tmp_path):
    with pytest.raises(HookResultError, match="'critic' twice"):
        make_trainer(tmp_path, trainer={"callbacks": [Critic(), Critic()]})


@pytest.mark.parametrize("name", ["model", "reference", "trl_core_state"])
def test_extra_model_may_not_take_the_file_of_another(name, tmp_path):
    with pytest.raises(HookResultError, match=f"{name!r} which a file of each checkpoint has"):
        make_trainer(tmp_path, trainer={"callbacks": [Critic(**{name: tiny_classifier()})]})


def test_a_language_model_is_no_critic():
    rows = TokenRows.from_lists([[5, 6]], [[7, 8]])
    with pytest.raises(ConfigError, match="no value for each token"):
        token_values(tiny_model(), rows, pad_token_id=0)


def test_values_stand_before_each_token_and_after_the_last():
    model = tiny_classifier()
    rows = TokenRows.from_lists([[5, 6, 9], [4]], [[7, 8], [9, 3, 2]], loss_mask=[[1, 1], [1, 0, 1]])
    values, after = token_values(model, rows, pad_token_id=0)
    hidden = [model.model(torch.tensor([ids])).last_hidden_state for ids in ([5, 6, 9, 7, 8], [4, 9, 3, 2])]
    first, second = (model.score(h)[0, :, 0] for h in hidden)
    assert torch.allclose(values, torch.stack([first[2], first[3], second[0], second[2]]), atol=1e-6)
    assert torch.allclose(after, torch.stack([first[4], second[3]]), atol=1e-6)


# -- notes ------------------------------------------------------------------------------------------------------------
class Notes(Sampled):
    """Notes the token ids, and checks in the loss that each row has its own."""

    def __init__(self):
        super().__init__()
        self.sizes, self.checked = [], 0

    @hookimpl
    def annotate(self, samples):
        self.sizes.append(samples.num_rows)
        return {"ids": samples.completion_ids[samples.loss_mask].float()}

    @hookimpl
    def keep(self, rollouts):
        return torch.arange(rollouts.num_rows) % 3 != 1

    @hookimpl
    def loss_terms(self, samples, logps):
        assert torch.equal(samples.notes["ids"], samples.completion_ids[samples.loss_mask].float())
        self.checked += samples.num_rows
        return {}


class Doubled(TrainerCallback):
    """Adds to the notes when advantages are formed."""

    @hookimpl(wrapper=True)
    def advantages(self, rollouts, keep):
        result = yield
        kept = keep[rollouts.row_of_token]
        ids = rollouts.completion_ids[rollouts.loss_mask].float()
        assert torch.equal(rollouts.notes["ids"], ids * kept)
        rollouts.notes["doubled"] = 2 * ids
        return result

    @hookimpl
    def loss_terms(self, samples, logps):
        assert torch.equal(samples.notes["doubled"], 2 * samples.notes["ids"])
        return {}


def test_notes_stay_with_their_rows(tmp_path):
    notes = Notes()
    trainer = make_trainer(
        tmp_path,
        trainer={"callbacks": [Doubled()], "rollouts": notes},
        shuffle_dataset=True,
        steps_per_generation=4,
        num_iterations=2,
        gradient_accumulation_steps=3,
        max_steps=4,
        save_strategy="steps",
        save_steps=1,
    )
    trainer.train()
    assert sum(notes.sizes) == 22  # 11 of 16 rows, in two generation batches
    assert max(notes.sizes) == 4
    again = Notes()
    resumed = make_trainer(
        tmp_path / "again",
        trainer={"callbacks": [Doubled()], "rollouts": again},
        shuffle_dataset=True,
        steps_per_generation=4,
        num_iterations=2,
        gradient_accumulation_steps=3,
        max_steps=4,
    )
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))  # in the middle of a generation batch
    assert torch.equal(weights(resumed), weights(trainer))
    assert notes.checked > again.checked > 0


def test_notes_have_names_where_no_row_is_kept(tmp_path):
    class Nothing(Notes):
        @hookimpl
        def keep(self, rollouts):
            return torch.zeros(rollouts.num_rows, dtype=torch.bool)

    notes = Nothing()
    make_trainer(tmp_path, trainer={"callbacks": [Doubled()], "rollouts": notes}).train()
    assert notes.checked == 2  # a row without loss tokens stands for what was dropped


class Gives(TrainerCallback):
    def __init__(self, **notes):
        self.notes = notes

    @hookimpl
    def annotate(self, samples):
        return {name: make(samples) for name, make in self.notes.items()}


def test_note_of_another_size_is_refused(tmp_path):
    trainer = make_trainer(tmp_path, trainer={"callbacks": [Gives(mine=lambda samples: samples.reward[:-1])]})
    with pytest.raises(HookResultError, match="'mine'"):
        trainer.train()


def test_note_of_two_algorithms_is_refused(tmp_path):
    callbacks = [Gives(mine=lambda samples: samples.advantages), Gives(mine=lambda samples: samples.advantages)]
    trainer = make_trainer(tmp_path, trainer={"callbacks": callbacks})
    with pytest.raises(HookResultError, match="mine"):
        trainer.train()


def test_added_note_of_another_size_is_refused(tmp_path):
    class Adds(TrainerCallback):
        @hookimpl(wrapper=True)
        def advantages(self, rollouts, keep):
            rollouts.notes["short"] = torch.zeros(1)
            return (yield)

    trainer = make_trainer(tmp_path, trainer={"callbacks": [Adds()]})
    with pytest.raises(HookResultError, match=r"notes\['short'\] has 1"):
        trainer.train()


def test_rows_with_other_notes_are_not_joined():
    rows = [TokenRows.from_lists([[1]], [[2, 3]], notes={name: torch.zeros(2)}) for name in "ab"]
    with pytest.raises(HookResultError, match=r"other notes"):
        TokenRows.concat(rows)


def test_notes_are_saved_by_name():
    rows = TokenRows.from_lists([[1]], [[2, 3]], notes={"a": torch.tensor([1.0, 2.0])})
    tensors = rows.tensors()
    assert tensors["notes.a"].tolist() == [1.0, 2.0]
    assert TokenRows.from_tensors(tensors).notes["a"].tolist() == [1.0, 2.0]


# -- hidden states ----------------------------------------------------------------------------------------------------
def test_hidden_states_are_given_where_they_are_asked_for(tmp_path):
    seen = []

    class States(TrainerCallback):
        @hookimpl
        def annotate(self, samples):
            seen.append(("annotate", samples.states.shape, samples.last_states.shape, samples.states.requires_grad))
            head = trainer.model.get_output_embeddings()
            logps = head(samples.states).log_softmax(-1).gather(-1, samples.completion_ids[:, None]).squeeze(-1)
            assert torch.allclose(logps, samples.old_logps, atol=1e-5)
            return {}

        @hookimpl
        def loss_terms(self, samples, logps):
            seen.append(("loss", samples.states.shape, samples.last_states.shape, samples.states.requires_grad))
            return {}

    trainer = make_trainer(tmp_path, trainer={"callbacks": [States()]}, max_steps=1)
    trainer.context.token_statistics.add("states")
    trainer.train()
    (first, *before), (second, *during) = seen
    assert (first, second) == ("annotate", "loss")
    size = trainer.model.config.hidden_size
    assert before[:2] == during[:2]
    assert before[0][1] == size
    assert before[1] == (4, size)
    assert (before[2], during[2]) == (False, True)


# -- log-probabilities of fresh rows ----------------------------------------------------------------------------------
class Passes(TrainerCallback):
    """Implements `select`, and changes nothing unless told to."""

    def __init__(self, change=lambda samples: samples):
        self.change, self.seen = change, []

    @hookimpl(wrapper=True)
    def select(self, samples):
        samples = yield
        assert samples.old_logps is not None
        return self.change(samples)

    @hookimpl
    def loss_terms(self, samples, logps):
        old = samples.expand(samples.generation.float()) < 0
        self.seen.append((old, samples.old_logps, logps.detach()))
        return {}


@pytest.mark.parametrize("options", [{}, {"num_iterations": 2}, {"steps_per_generation": 2, "beta": 0.1}])
def test_select_that_changes_nothing_is_exact(tmp_path, options):
    plain = make_trainer(tmp_path / "plain", max_steps=4, **options)
    plain.train()
    selecting = make_trainer(tmp_path / "select", trainer={"callbacks": [Passes()]}, max_steps=4, **options)
    selecting.train()
    assert torch.equal(weights(selecting), weights(plain))


def test_rows_of_an_earlier_generation_keep_their_log_probabilities(tmp_path):
    def half_old(samples):
        generation = samples.generation.clone()
        generation[:2] = -1
        return dataclasses.replace(samples, generation=generation, old_logps=samples.old_logps - 0.25)

    passes = Passes(half_old)
    make_trainer(tmp_path, trainer={"callbacks": [passes]}, max_steps=2).train()
    assert len(passes.seen) == 2
    for old, old_logps, logps in passes.seen:
        assert 0 < old.sum() < len(old)
        assert torch.equal(old_logps[~old], logps[~old])
        assert torch.allclose(old_logps[old], logps[old] - 0.25, atol=1e-5)


# -- smaller things ---------------------------------------------------------------------------------------------------
def test_term_that_is_a_mean_may_have_any_number_of_entries(tmp_path):
    class Extra(TrainerCallback):
        @hookimpl
        def loss_terms(self, samples, logps):
            return {"extra": TokenMean(logps.sum() * 0 + torch.tensor([1.0, 2.0, 6.0]))}

    plain = make_trainer(tmp_path / "plain", gradient_accumulation_steps=2)
    plain.train()
    extra = make_trainer(tmp_path / "extra", gradient_accumulation_steps=2, trainer={"callbacks": [Extra()]})
    extra.train()
    for a, b in zip(log_lines(plain), log_lines(extra), strict=True):
        assert b["loss"] - a["loss"] == pytest.approx(3.0, abs=1e-5)
    assert torch.equal(weights(plain), weights(extra))


def test_a_variance_is_that_of_the_logging_interval(tmp_path):
    class Logs(TrainerCallback):
        @hookimpl
        def loss_terms(self, samples, logps):
            trainer.context.log("spread", next(numbers), reduce="variance")
            return {}

    numbers = itertools.cycle([1.0, 5.0])
    trainer = make_trainer(tmp_path, trainer={"callbacks": [Logs()]}, max_steps=4, logging_steps=2)
    trainer.train()
    assert [line["spread"] for line in log_lines(trainer)] == [8.0, 8.0]


def test_reward_functions_may_have_the_prompt_ids(tmp_path):
    seen = []

    def reward(prompts, prompt_ids, completion_ids):
        seen.extend(zip(prompts, prompt_ids, strict=True))
        return [0.0] * len(completion_ids)

    trainer = make_trainer(tmp_path, trainer={"reward_funcs": reward}, max_steps=1)
    trainer.train()
    assert len(seen) == 4
    assert all(trainer.processing_class.decode(ids) == text for text, ids in seen)


def test_given_reference_is_the_reference(tmp_path):
    other = tiny_model(seed=5)
    trainer = make_trainer(tmp_path, trainer={"ref_model": other}, beta=0.1, max_steps=1)
    assert trainer.reference.module is other
    trainer.train()
    assert log_lines(trainer)[0]["kl"] > 1e-3
    with pytest.raises(ConfigError, match="uses no reference"):
        make_trainer(tmp_path / "none", trainer={"ref_model": tiny_model()})


def test_linear_extra_model_needs_no_special_methods(tmp_path):
    head = nn.Linear(1, 1)
    trainer = make_trainer(
        tmp_path,
        trainer={"callbacks": [Critic(head=head)], "reward_funcs": table(1.0, 0.0)},
        activation_checkpointing=True,
    )
    assert trainer.extra_models == {"head": head}
