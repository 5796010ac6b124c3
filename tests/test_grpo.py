"""What the trainer of GRPO does, on recorded or sampled completions of a tiny model."""

import json
import math
from importlib.metadata import version

import pyarrow.parquet
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    MixtralConfig,
    MixtralForCausalLM,
    TrainerCallback,
)

from trl_core import hookimpl
from trl_core.errors import ConfigError, HookResultError, NonFiniteLossError
from trl_core.testing import tiny_model

from .helpers_online import (
    EOS,
    TOKENIZER,
    Recorder,
    Sampled,
    completions,
    log_lines,
    make_trainer,
    plain_logps,
    prompts,
    table,
    weights,
)

LENGTHS = completions(6, 2, 4, 3)
"""Four completions of 6, 2, 4 and 3 tokens, for one prompt."""


def trained(folder, recorder=None, algorithm="grpo", trainer=None, **options):
    recorder = recorder or Recorder(LENGTHS, cycle=True)
    made = make_trainer(folder, algorithm, {"rollouts": recorder, **(trainer or {})}, **options)
    made.train()
    return made, recorder


# -- what reward functions get ----------------------------------------------------------------------------------------
def test_reward_function_gets_columns_of_its_row_and_the_means_to_log(tmp_path):
    seen = []

    def check(prompts, completions, completion_ids, answer, trainer_state, log_extra, log_metric):
        seen.append((prompts, completions, completion_ids, answer, trainer_state.global_step))
        log_metric("exact", 0.25)
        log_extra("guess", [f"{a}?" for a in answer])
        return [1.0, 0.0, 0.0, 0.0] * 2

    dataset = prompts(2, answer=["four", "six"])
    batch = {"completion_ids": LENGTHS["completion_ids"] * 2}
    trainer, _ = trained(
        tmp_path,
        Recorder(batch),
        trainer={"train_dataset": dataset, "reward_funcs": check},
        max_steps=1,
        gradient_accumulation_steps=2,
        log_completions=True,
        num_completions_to_print=0,
    )
    (given,) = seen
    texts = [TOKENIZER.decode(ids, skip_special_tokens=True) for ids in LENGTHS["completion_ids"]]
    assert given[0] == ["say a"] * 4 + ["say ab"] * 4
    assert given[1] == texts * 2
    assert given[2] == LENGTHS["completion_ids"] * 2
    assert given[3] == ["four"] * 4 + ["six"] * 4
    assert given[4] == 0
    assert log_lines(trainer)[0]["exact"] == 0.25
    written = pyarrow.parquet.read_table(tmp_path / "completions" / "part-00001.parquet")
    assert written["extra/guess"].to_pylist() == ["four?"] * 4 + ["six?"] * 4


def chat(*turns):
    return [{"role": role, "content": content} for role, content in turns]


def test_conversation_is_rendered_and_answered_with_a_message(tmp_path):
    seen = []

    def polite(prompts, completions, **_):
        seen.append((prompts, completions))
        return [1.0, 0.0, 0.0, 0.5]

    asked = chat(("system", "Be brief."), ("user", "Hi"))
    _, recorder = trained(
        tmp_path,
        trainer={"train_dataset": Dataset.from_list([{"prompt": asked}]), "reward_funcs": polite},
        max_steps=1,
    )
    rendered = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert recorder.prompts == [[TOKENIZER(rendered)["input_ids"]] * 4]
    (given,) = seen
    assert given[0] == [asked] * 4
    text = TOKENIZER.decode(LENGTHS["completion_ids"][1], skip_special_tokens=True)
    assert given[1][1] == chat(("assistant", text))


def test_last_assistant_message_is_continued(tmp_path):
    asked = chat(("user", "Count"), ("assistant", "One, two"))
    _, recorder = trained(tmp_path, trainer={"train_dataset": Dataset.from_list([{"prompt": asked}])}, max_steps=1)
    assert TOKENIZER.decode(recorder.prompts[0][0]).endswith("<|im_start|>assistant\nOne, two")


def test_template_gets_the_arguments_of_the_run_and_of_the_row(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(saved_tokenizer(tmp_path))
    tokenizer.chat_template = "{{ mood }}/{{ place }}/{{ tools | length if tools else 0 }}:{{ messages[0]['content'] }}"
    row = {"prompt": chat(("user", "Hi"))}
    tool = {"type": "function", "function": {"name": "clock"}}
    rows = [
        {**row, "chat_template_kwargs": {"place": "sea"}, "tools": [tool]},
        {**row, "chat_template_kwargs": {"place": "hill"}, "tools": []},
    ]
    _, recorder = trained(
        tmp_path / "run",
        trainer={"train_dataset": Dataset.from_list(rows), "processing_class": tokenizer},
        chat_template_kwargs={"mood": "calm", "place": "nowhere"},
    )
    assert [tokenizer.decode(batch[0]) for batch in recorder.prompts] == ["calm/sea/1:Hi", "calm/hill/0:Hi"]


def saved_tokenizer(folder):
    TOKENIZER.save_pretrained(folder / "tokenizer")
    return folder / "tokenizer"


# -- data -------------------------------------------------------------------------------------------------------------
def shown(recorder):
    """The first prompt of every generation, as text."""
    return [TOKENIZER.decode(batch[0]) for batch in recorder.prompts]


@pytest.mark.parametrize("kind", ["map", "stream"])
def test_prompts_come_in_order_and_start_again(kind, tmp_path):
    dataset = prompts(3) if kind == "map" else prompts(3).to_iterable_dataset()
    _, recorder = trained(tmp_path, trainer={"train_dataset": dataset}, max_steps=4)
    assert shown(recorder) == ["say a", "say ab", "say abc", "say a"]


def test_shuffled_prompts_are_each_seen_once_an_epoch(tmp_path):
    _, recorder = trained(tmp_path, trainer={"train_dataset": prompts(6)}, max_steps=12, shuffle_dataset=True)
    first, second = shown(recorder)[:6], shown(recorder)[6:]
    assert sorted(first) == sorted(second) == [f"say {'abcdef'[: i + 1]}" for i in range(6)]
    assert first != sorted(first)
    assert first != second


def test_every_completion_is_used_once_per_iteration(tmp_path):
    # 16 completions of 4 prompts in 4 micro-batches, shuffled in whole groups; twice.
    batch = completions(*[3] * 16)
    _, recorder = trained(
        tmp_path,
        Recorder(batch),
        trainer={"reward_funcs": table(*range(16))},
        max_steps=4,
        gradient_accumulation_steps=2,
        steps_per_generation=4,
        num_iterations=2,
        shuffle_dataset=True,
        max_completion_length=3,
    )
    positions = [rows.position.tolist() for rows in recorder.micro_batches]
    assert len(positions) == 8
    assert sorted(position for slice in positions[:4] for position in slice) == list(range(16))
    assert positions[:4] == positions[4:]
    assert positions[:4] != sorted(positions[:4])
    assert all(len(set(rows.group.tolist())) == 1 for rows in recorder.micro_batches)


# -- the loss ---------------------------------------------------------------------------------------------------------
class Ratios(Recorder):
    """Also notes the log-ratios."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.log_ratios = []

    @hookimpl
    def loss_terms(self, samples, logps, log_ratio):
        self.log_ratios.append(log_ratio.detach().abs().max().item())
        return super().loss_terms(samples, logps)


def test_second_iteration_is_off_policy_and_the_first_is_not(tmp_path):
    _, recorder = trained(tmp_path, Ratios(LENGTHS, cycle=True), num_iterations=2, max_steps=4)
    first, second, third, fourth = recorder.log_ratios
    assert max(first, third) < 1e-5
    assert min(second, fourth) > 1e-3
    assert recorder.calls == 2


def test_truncated_rows_leave_the_loss_but_not_the_group(tmp_path):
    batch = {"completion_ids": [[*range(10, 16)], [20, EOS], [30, 31, 32, EOS], [40, 41, EOS]]}
    _, recorder = trained(tmp_path, Recorder(batch), max_steps=1, mask_truncated_completions=True, scale_rewards="none")
    rows = recorder.micro_batches[0]
    assert rows.lengths.tolist() == [0, 2, 4, 3]
    # Rewards 1, 0, 0.5, -1: their mean of 0.125 holds the truncated row.
    assert rows.mean_per_row(rows.advantages).tolist() == pytest.approx([0.0, -0.125, 0.375, -1.125])


class PerToken(Recorder):
    """Gives the tokens of each row the advantages 0.1, 0.2, ..."""

    @hookimpl
    def advantages(self, rollouts, keep):
        counts = [torch.arange(1, n + 1) / 10 for n in rollouts.lengths.tolist()]
        return torch.cat(counts)[:, None]


def test_advantages_per_token_reach_the_loss(tmp_path):
    trainer, recorder = trained(tmp_path, PerToken(LENGTHS), max_steps=1)
    by_hand = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.1, 0.2, 0.1, 0.2, 0.3, 0.4, 0.1, 0.2, 0.3]
    assert recorder.micro_batches[0].advantages.tolist() == pytest.approx(by_hand)
    # On policy every ratio is 1: minus the mean of the advantages.
    assert log_lines(trainer)[0]["loss"] == pytest.approx(-4.0 / 15, abs=1e-6)


def test_loss_term_of_a_provider_is_added(tmp_path):
    class Constant(Recorder):
        @hookimpl
        def loss_terms(self, samples, logps):
            return {"constant": torch.full_like(logps, 3.0), "policy": torch.full_like(logps, 0.5)}

    plain, _ = trained(tmp_path / "plain", max_steps=1)
    more, _ = trained(tmp_path / "more", Constant(LENGTHS), max_steps=1)
    assert log_lines(more)[0]["loss"] - log_lines(plain)[0]["loss"] == pytest.approx(3.5, abs=1e-5)


@pytest.mark.parametrize("answer", [torch.ones(4), torch.ones(3, dtype=torch.bool), [True] * 4])
def test_keep_that_is_no_flag_per_row_is_told(answer, tmp_path):
    class Wrong(Recorder):
        @hookimpl
        def keep(self, rollouts):
            return answer

    with pytest.raises(HookResultError, match="keep returned"):
        trained(tmp_path, Wrong(LENGTHS))


def test_only_rows_that_all_keep_are_trained_on(tmp_path):
    class First(Recorder):
        @hookimpl
        def keep(self, rollouts):
            return torch.tensor([True, True, True, False])

    # GFPO keeps the three shortest, which leaves out the first.
    _, recorder = trained(
        tmp_path,
        First(LENGTHS),
        algorithm="gfpo",
        trainer={"group_filter_func": "shortest"},
        num_remains_in_group=3,
        max_steps=1,
        scale_rewards="none",
    )
    rows = recorder.micro_batches[0]
    assert rows.position.tolist() == [1, 2]
    # Their rewards are 0 and 0.5.
    assert rows.mean_per_row(rows.advantages).tolist() == pytest.approx([-0.25, 0.25])


def test_entropy_bonus_is_the_mean_entropy_of_tokens(tmp_path):
    # Equal rewards: nothing but the bonus is left of the loss. It ignores how rows are weighted.
    trainer, _ = trained(
        tmp_path, trainer={"reward_funcs": table(1.0)}, max_steps=4, entropy_coef=0.1, loss_type="grpo"
    )
    lines = log_lines(trainer)
    assert [line["loss"] for line in lines] == pytest.approx([-0.1 * line["entropy"] for line in lines], rel=1e-5)
    assert lines[-1]["entropy"] > lines[0]["entropy"]
    assert lines[0]["entropy_coef"] == pytest.approx(0.1)


def test_adaptive_entropy_bonus_acts_below_its_target(tmp_path):
    trainer, _ = trained(
        tmp_path,
        trainer={"reward_funcs": table(1.0)},
        max_steps=4,
        entropy_coef=0.1,
        use_adaptive_entropy=True,
        entropy_target=100.0,
        entropy_coef_delta=0.03,
        entropy_coef_max=0.15,
    )
    lines = log_lines(trainer)
    # The entropy of a step is known after it: the first step acts not yet.
    coefficients = [0.1, 0.13, 0.15, 0.15]
    assert [line["entropy_coef"] for line in lines] == pytest.approx(coefficients)
    losses = [-c * line["entropy"] for c, line in zip([0.0, *coefficients[1:]], lines, strict=True)]
    assert [line["loss"] for line in lines] == pytest.approx(losses, rel=1e-5, abs=1e-7)


def test_adaptive_entropy_bonus_rests_above_its_target(tmp_path):
    trainer, _ = trained(
        tmp_path,
        trainer={"reward_funcs": table(1.0)},
        max_steps=4,
        entropy_coef=0.05,
        use_adaptive_entropy=True,
        entropy_target=0.2,
        entropy_coef_delta=0.02,
    )
    lines = log_lines(trainer)
    assert [line["entropy_coef"] for line in lines] == pytest.approx([0.05, 0.03, 0.01, 0.0])
    assert [line["loss"] for line in lines] == pytest.approx([0.0] * 4, abs=1e-7)


def test_dropout_can_be_switched_off_in_every_module(tmp_path):
    # Dropout in the attention of this model is no module, only a number.
    for off in (True, False):
        trainer, recorder = trained(
            tmp_path / str(off),
            Ratios(LENGTHS),
            trainer={"model": tiny_model(attention_dropout=0.5)},
            max_steps=1,
            beta=0.1,
            disable_dropout=off,
        )
        rows = recorder.micro_batches[0]
        kl = log_lines(trainer)[0]["kl"]
        assert (kl < 1e-6) is off
        assert rows.ref_logps is not None


def test_activation_checkpointing_gives_the_same_step(tmp_path):
    runs = []
    for on in (False, True):
        trainer, _ = trained(
            tmp_path / str(on), max_steps=2, beta=0.1, activation_checkpointing=on, optim="sgd", learning_rate=1.0
        )
        runs.append(weights(trainer))
        assert trainer.model.is_activation_checkpointing is on
    moved = (runs[0] - weights(make_trainer(tmp_path))).norm()
    assert (runs[0] - runs[1]).norm() < 1e-6 * moved


def test_gradient_checkpointing_is_the_older_spelling(tmp_path):
    off = make_trainer(tmp_path, activation_checkpointing=None, gradient_checkpointing=False).args
    on = make_trainer(tmp_path, activation_checkpointing=None).args
    assert (off.activation_checkpointing, on.activation_checkpointing) == (False, True)


def test_router_loss_of_a_mixture_of_experts_is_added(tmp_path):
    config = MixtralConfig(
        vocab_size=261,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=2,
        max_position_embeddings=64,
        router_aux_loss_coef=0.5,
        output_router_logits=True,
        bos_token_id=0,
        eos_token_id=EOS,
        pad_token_id=2,
    )
    trainer, _ = trained(
        tmp_path,
        trainer={"model": MixtralForCausalLM(config), "reward_funcs": table(1.0)},
        max_steps=1,
    )
    line = log_lines(trainer)[0]
    assert line["aux_loss"] > 0.5
    assert line["loss"] == pytest.approx(0.5 * line["aux_loss"], rel=1e-5)


# -- the reference model ----------------------------------------------------------------------------------------------
def test_no_reference_is_made_without_a_kl_term(tmp_path):
    assert make_trainer(tmp_path).reference is None


def test_reference_moves_only_when_it_is_time(tmp_path):
    seen = []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            reference = torch.cat([p.detach().flatten() for p in made.reference.module.parameters()])
            seen.append((reference, weights(made).float()))

    made = make_trainer(
        tmp_path,
        trainer={"rollouts": LENGTHS, "callbacks": [Watch()]},
        max_steps=3,
        beta=0.1,
        sync_ref_model=True,
        ref_model_sync_steps=2,
        ref_model_mixup_alpha=0.25,
    )
    start = weights(made).float()
    made.train()
    made.callback_handler.call_event("on_step_end", made.args, made.state, made.control)
    # The core moves it at the end of a step, after the callbacks of users.
    (before, _), (at_second, policy), (after, _), _ = seen
    assert torch.equal(before, start)
    assert torch.equal(at_second, start)
    torch.testing.assert_close(after, 0.25 * policy + 0.75 * start, rtol=1e-6, atol=1e-7)


LORA = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


def reference_sums(model):
    prompt = TOKENIZER("say a")["input_ids"]
    return [sum(plain_logps(model, prompt, ids)) for ids in LENGTHS["completion_ids"]]


def test_reference_of_a_new_adapter_is_the_model_without_it(tmp_path):
    trainer, recorder = trained(
        tmp_path,
        trainer={"peft_config": LORA, "train_dataset": prompts(1)},
        beta=0.1,
        max_steps=3,
        disable_dropout=True,
    )
    assert trainer.reference.module is None
    expected = reference_sums(tiny_model())
    for rows in recorder.micro_batches:
        assert rows.sum_per_row(rows.ref_logps).tolist() == pytest.approx(expected, abs=1e-4)
    kl = [line["kl"] for line in log_lines(trainer)]
    assert kl[0] == pytest.approx(0.0, abs=1e-7)
    assert kl[2] > 1e-6
    trained_names = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert trained_names
    assert all("lora_" in name for name in trained_names)


def with_adapter():
    """A model that carries an adapter which does something; the same each time."""
    model = get_peft_model(tiny_model(), LORA)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def test_reference_of_a_continued_adapter_is_its_copy(tmp_path):
    trainer, recorder = trained(
        tmp_path, trainer={"model": with_adapter(), "train_dataset": prompts(1)}, beta=0.1, max_steps=3
    )
    expected = reference_sums(with_adapter())
    assert max(abs(a - b) for a, b in zip(expected, reference_sums(tiny_model()), strict=True)) > 0.1
    for rows in recorder.micro_batches:
        assert rows.sum_per_row(rows.ref_logps).tolist() == pytest.approx(expected, abs=1e-4)
    assert trainer.model.active_adapter == "default"
    parameters, start = dict(trainer.model.named_parameters()), dict(with_adapter().named_parameters())
    copies = [name for name in parameters if ".ref." in name]
    assert copies
    for name in copies:
        own = name.replace(".ref.", ".default.")
        assert not parameters[name].requires_grad
        assert torch.equal(parameters[name], start[own])
        assert parameters[own].requires_grad
        assert not torch.equal(parameters[own], start[own])


def test_checkpointed_adapter_gives_the_same_step(tmp_path):
    runs = []
    for on in (False, True):
        trainer, _ = trained(tmp_path / str(on), trainer={"peft_config": LORA}, activation_checkpointing=on)
        runs.append({name: p for name, p in trainer.model.named_parameters() if p.requires_grad})
    for name, value in runs[0].items():
        torch.testing.assert_close(runs[1][name], value, rtol=1e-4, atol=1e-6)


def test_saved_adapter_loads_onto_its_base(tmp_path):
    trainer, _ = trained(tmp_path / "run", trainer={"model": with_adapter()}, beta=0.1)
    trainer.save_model(tmp_path / "saved")
    loaded = PeftModel.from_pretrained(tiny_model(), tmp_path / "saved")
    ids = torch.tensor([[10, 11, 12]])
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, trainer.model.eval()(ids).logits)


def test_second_adapter_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="already carries an adapter"):
        make_trainer(tmp_path, trainer={"model": with_adapter(), "peft_config": LORA})


def test_moving_reference_of_an_adapter_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="adapter"):
        make_trainer(tmp_path, trainer={"peft_config": LORA}, beta=0.1, sync_ref_model=True)


# -- sampling ---------------------------------------------------------------------------------------------------------
def texts(rows):
    return [TOKENIZER.decode(ids) for ids in rows.prompt_ids.split(rows.prompt_lengths.tolist())]


def test_dynamic_sampling_replaces_groups_without_difference(tmp_path):
    def reward(prompts, completions, **_):
        return [float(i % 2) if len(prompt) > 5 else 1.0 for i, prompt in enumerate(prompts)]

    trainer, recorder = trained(
        tmp_path,
        Sampled(),
        trainer={"reward_funcs": reward},
        max_steps=1,
        per_device_train_batch_size=8,
        dynamic_sampling=True,
    )
    rows = recorder.micro_batches[0]
    # "say a" gives equal rewards. It is drawn first once more, as the first of the spare prompts; then "say ab".
    assert texts(rows) == ["say ab"] * 8
    assert rows.group.tolist() == [0] * 4 + [1] * 4
    line = log_lines(trainer)[0]
    assert line["dynamic_sampling/refilled_groups"] == 2.0
    assert line["frac_reward_zero_std"] == 0.0


def test_dynamic_sampling_gives_up_after_its_rounds(tmp_path):
    trainer, recorder = trained(
        tmp_path,
        Sampled(),
        trainer={"reward_funcs": table(1.0)},
        max_steps=1,
        dynamic_sampling=True,
        dynamic_sampling_max_rounds=3,
    )
    line = log_lines(trainer)[0]
    assert line["dynamic_sampling/refilled_groups"] == 3.0
    assert line["frac_reward_zero_std"] == 1.0
    assert recorder.micro_batches[0].num_rows == 4


def test_generation_kwargs_reach_the_sampler(tmp_path):
    forbidden = list(range(5, 261))
    allowed = forbidden.pop(7)
    _, recorder = trained(tmp_path, Sampled(), max_steps=1, generation_kwargs={"suppress_tokens": forbidden})
    assert set(recorder.micro_batches[0].completion_ids.tolist()) <= {0, 1, 2, 3, 4, allowed}


def test_same_seed_samples_the_same(tmp_path):
    runs = [trained(tmp_path / str(i), Sampled(), seed=seed)[1].micro_batches for i, seed in enumerate((1, 1, 2))]
    assert torch.equal(runs[0][1].completion_ids, runs[1][1].completion_ids)
    assert not torch.equal(runs[0][0].completion_ids, runs[2][0].completion_ids)


# -- a sampler whose log-probabilities differ -------------------------------------------------------------------------
def reported(shift):
    """The four completions with the log-probabilities of the start, less `shift`."""
    prompt, model = TOKENIZER("say a")["input_ids"], tiny_model()
    logps = [[x - shift for x in plain_logps(model, prompt, ids)] for ids in LENGTHS["completion_ids"]]
    return {**LENGTHS, "logps": logps}


def test_sampler_that_agrees_changes_nothing(tmp_path):
    # Plain descent: Adam would make a full step of what is only rounding.
    plain, _ = trained(tmp_path / "plain", max_steps=1, optim="sgd")
    exact, _ = trained(tmp_path / "exact", Recorder(reported(0.0)), max_steps=1, optim="sgd")
    assert (weights(plain) - weights(exact)).norm() < 1e-3 * (weights(plain) - weights(make_trainer(tmp_path))).norm()
    line = log_lines(exact)[0]
    assert line["sampling/sampling_logp_difference/max"] < 1e-4
    assert line["sampling/importance_sampling_ratio/mean"] == pytest.approx(1.0, abs=1e-4)
    assert not any(name.startswith("sampling/") for name in log_lines(plain)[0])


def test_sampler_ratio_of_rows_is_applied_and_logged(tmp_path):
    # 0.3 less per token: row ratios exp(1.8), exp(0.6), exp(1.2) and exp(0.9), of which the first two above 3 go.
    trainer, recorder = trained(tmp_path, Ratios(reported(0.3)), max_steps=1, scale_rewards="none")
    line = log_lines(trainer)[0]
    assert line["sampling/sampling_logp_difference/mean"] == pytest.approx(0.3, abs=1e-4)
    assert line["sampling/sampling_logp_difference/max"] == pytest.approx(0.3, abs=1e-4)
    assert line["sampling/importance_sampling_ratio/min"] == 0.0
    assert line["sampling/importance_sampling_ratio/max"] == pytest.approx(math.exp(0.9), rel=1e-4)
    # 2 tokens of exp(0.6), 3 of exp(0.9), of 15.
    mean = (2 * math.exp(0.6) + 3 * math.exp(0.9)) / 15
    assert line["sampling/importance_sampling_ratio/mean"] == pytest.approx(mean, rel=1e-4)
    # Advantages 0.875, -0.125, 0.375, -1.125; ratio 1 in the loss.
    by_hand = (2 * math.exp(0.6) * 0.125 + 3 * math.exp(0.9) * 1.125) / 15
    assert line["loss"] == pytest.approx(by_hand, rel=1e-3)
    assert recorder.log_ratios[0] < 1e-5


def test_sampler_correction_can_be_switched_off(tmp_path):
    plain, _ = trained(tmp_path / "plain", max_steps=1)
    off, _ = trained(tmp_path / "off", Recorder(reported(0.3)), max_steps=1, vllm_importance_sampling_correction=False)
    assert log_lines(off)[0]["loss"] == pytest.approx(log_lines(plain)[0]["loss"], abs=1e-6)
    assert not any(name.startswith("sampling/") for name in log_lines(off)[0])


# -- evaluation and metrics -------------------------------------------------------------------------------------------
def test_evaluation_reports_means_over_its_prompts(tmp_path):
    # Two prompts in batches of one, two completions each: rewards 1, 0 and then 0.5, -1.
    values = iter([[1.0, 0.0], [0.5, -1.0]])

    def reward(completions, **_):
        return next(values)

    ids = LENGTHS["completion_ids"]
    recorder = Recorder([{"completion_ids": ids[:2]}, {"completion_ids": ids[2:]}])
    trainer = make_trainer(
        tmp_path,
        trainer={"rollouts": recorder, "reward_funcs": reward, "eval_dataset": prompts(2)},
        num_generations_eval=2,
        per_device_eval_batch_size=2,
        scale_rewards="none",
    )
    metrics = trainer.evaluate()
    assert shown(recorder) == ["say a", "say ab"]
    assert metrics["eval_reward"] == metrics["eval_rewards/reward/mean"] == pytest.approx(0.125)
    assert metrics["eval_completions/mean_length"] == pytest.approx(3.75)
    assert metrics["eval_completions/max_length"] == pytest.approx(5.0)  # mean of 6 and 4
    # -(0.5 * 6 - 0.5 * 2) / 8 and -(0.75 * 4 - 0.75 * 3) / 7: tokens are counted in each batch.
    assert metrics["eval_loss"] == pytest.approx((-2 / 8 - 0.75 / 7) / 2, abs=1e-6)
    assert not [name for name in metrics if not name.startswith(("eval_", "epoch"))]


def test_evaluation_by_name_keeps_the_sets_apart(tmp_path):
    trainer = make_trainer(
        tmp_path,
        trainer={"rollouts": LENGTHS, "eval_dataset": {"easy": prompts(1), "hard": prompts(2)}},
        per_device_eval_batch_size=4,
    )
    metrics = trainer.evaluate()
    assert metrics["eval_easy_reward"] == metrics["eval_hard_reward"] == pytest.approx(0.125)


def test_evaluation_filters_nothing(tmp_path):
    trainer = make_trainer(
        tmp_path,
        "gfpo",
        trainer={"rollouts": LENGTHS, "eval_dataset": prompts(1), "group_filter_func": "shortest"},
        num_remains_in_group=2,
    )
    assert trainer.evaluate()["eval_reward"] == pytest.approx(0.125)
    trainer.train()
    assert log_lines(trainer)[0]["reward"] == pytest.approx(-0.5)  # the rows of 2 and 3 tokens: 0 and -1


ALWAYS = {
    "reward",
    "reward_std",
    "rewards/reward/mean",
    "rewards/reward/std",
    "frac_reward_zero_std",
    *(f"completions/{which}_{kind}" for which in ("mean", "min", "max") for kind in ("length", "terminated_length")),
    "completions/clipped_ratio",
    "entropy",
    "num_tokens",
    "step_time",
    "loss",
    "grad_norm",
    "learning_rate",
}
CLIP = {f"clip_ratio/{name}" for name in ("low_mean", "low_min", "high_mean", "high_max", "region_mean")}


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({}, CLIP),
        ({"beta": 0.1}, CLIP | {"kl"}),
        ({"loss_type": "cispo", "epsilon_high": 5.0}, {"cispo_clip_ratio"}),
        ({"loss_type": "vespo"}, {"vespo/phi_seq_mean"}),
        ({"entropy_coef": 0.1}, CLIP | {"entropy_coef"}),
    ],
)
def test_metrics_have_the_names_that_users_know(options, names, tmp_path):
    trainer, _ = trained(tmp_path, max_steps=1, **options)
    line = log_lines(trainer)[0]
    assert ALWAYS | names <= set(line)
    assert not {name for name in line if name.startswith(("clip", "cispo", "vespo", "kl", "entropy_"))} - names
    assert all(math.isfinite(value) for value in line.values())


def test_lengths_and_tokens_are_counted(tmp_path):
    batch = {"completion_ids": [[*range(10, 16)], [20, EOS], [30, 31, 32, EOS], [40, 41, EOS]]}
    trainer, _ = trained(tmp_path, Recorder(batch, cycle=True), trainer={"train_dataset": prompts(1)})
    first, second = log_lines(trainer)
    lengths = {name: first[f"completions/{name}"] for name in ("mean_length", "min_length", "max_length")}
    assert lengths == {"mean_length": 3.75, "min_length": 2, "max_length": 6}
    ended = {name: first[f"completions/{name}_terminated_length"] for name in ("mean", "min", "max")}
    assert ended == {"mean": 3, "min": 2, "max": 4}
    assert first["completions/clipped_ratio"] == 0.25
    # "say a" is 5 tokens: 4 * 5 + 15 in each of the two steps.
    assert (first["num_tokens"], second["num_tokens"]) == (35, 70)


def test_metrics_are_means_over_the_logging_interval(tmp_path):
    values = iter([1.0, 2.0, 6.0, 7.0])

    def reward(completions, **_):
        return [next(values)] * len(completions)

    trainer, _ = trained(tmp_path, trainer={"reward_funcs": reward}, max_steps=4, logging_steps=2)
    assert [line["reward"] for line in log_lines(trainer)] == [1.5, 6.5]


# -- what is written --------------------------------------------------------------------------------------------------
def test_saved_model_loads_as_any_other(tmp_path):
    trainer, _ = trained(tmp_path / "run")
    trainer.save_model(tmp_path / "saved")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "saved")
    ids = torch.tensor([tokenizer("say a")["input_ids"]])
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, trainer.model.eval()(ids).logits)
    assert not torch.equal(model.lm_head.weight, tiny_model().lm_head.weight)


def test_arguments_are_saved_as_json_and_nothing_as_pickle(tmp_path):
    trainer, _ = trained(tmp_path / "run", epsilon=0.3)
    trainer.save_model(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "training_args.json").read_text())
    assert saved["epsilon"] == 0.3
    assert not [path.name for path in (tmp_path / "saved").iterdir() if path.suffix in (".bin", ".pt", ".pkl")]


def test_model_card_says_what_trained_the_model(tmp_path):
    trainer, _ = trained(
        tmp_path / "run",
        algorithm="gfpo",
        trainer={"group_filter_func": "shortest"},
        num_remains_in_group=3,
    )
    trainer.save_model(tmp_path / "saved")
    card = (tmp_path / "saved" / "README.md").read_text()
    assert f"| 0 | grpo | trl-core | {version('trl-core')} | stable |" in card
    assert f"| 1 | gfpo | trl-gfpo | {version('trl-gfpo')} |" in card
    options = json.loads(card.split("```json")[1].split("```")[0])
    assert (options["num_remains_in_group"], options["num_generations"]) == (3, 4)
    assert str(tmp_path) not in card


# -- losses that are no number ----------------------------------------------------------------------------------------
class Explodes(Recorder):
    """One of two micro-batches of a step has an infinite loss."""

    @hookimpl
    def loss_terms(self, samples, logps):
        super().loss_terms(samples, logps)
        return {"bad": logps * (math.inf if 0 in samples.position else 0.0)}


TWO = {"completion_ids": LENGTHS["completion_ids"] * 2}


def test_infinite_loss_stops_the_run_and_its_rows_are_on_disk(tmp_path):
    with pytest.raises(NonFiniteLossError, match="step 1"):
        trained(tmp_path, Explodes(TWO), gradient_accumulation_steps=2)
    written = json.loads((tmp_path / "nonfinite" / "step-1-process-0.json").read_text())
    assert [row["completion_ids"] for row in written["rows"]] == LENGTHS["completion_ids"]
    assert written["rows"][0]["prompt_ids"] == TOKENIZER("say a")["input_ids"]


def test_skipping_an_infinite_loss_keeps_the_other_micro_batch(tmp_path):
    trainer, _ = trained(
        tmp_path, Explodes(TWO), gradient_accumulation_steps=2, max_steps=1, on_nonfinite_loss="skip", optim="sgd"
    )
    # Without the bad half: the same weights in the loss, zero for its rows.
    half, _ = trained(tmp_path / "half", FirstHalf(TWO), gradient_accumulation_steps=2, max_steps=1, optim="sgd")
    assert log_lines(trainer)[0]["skipped_nonfinite"] == 1.0
    assert torch.equal(weights(trainer), weights(half))
    assert not torch.equal(weights(trainer), weights(make_trainer(tmp_path)))


class FirstHalf(Recorder):
    """The advantages of the first group are 0."""

    @hookimpl(wrapper=True)
    def advantages(self):
        advantages = yield
        return advantages * (torch.arange(8) >= 4)
