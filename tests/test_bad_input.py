"""What users get wrong: each mistake is named, early, or has the one sensible effect. All through the public API."""

import asyncio
import math
import threading

import pytest
import torch
from datasets import Dataset, IterableDataset
from transformers import LlamaConfig, LlamaForSequenceClassification, TrainingArguments

from trl_core import Generated, get_config, get_trainer, hookimpl
from trl_core.errors import (
    AlgorithmNotFoundError,
    ConfigError,
    DatasetError,
    HookResultError,
    OutputDirError,
    RewardError,
)
from trl_core.testing import tiny_model, tiny_tokenizer

from .helpers_online import EOS, Recorder, Sampled, completions, log_lines, make_trainer, prompts, table, weights

LENGTHS = completions(6, 2, 4, 3)


# -- names and options ------------------------------------------------------------------------------------------------
def test_unknown_algorithm_suggests_the_nearest():
    with pytest.raises(AlgorithmNotFoundError, match="grpo"):
        get_trainer("grppo")


def test_unknown_option_is_named():
    with pytest.raises(TypeError, match="num_generation_count"):
        get_config("grpo")(num_generation_count=4)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"num_generations": 1}, "num_generations=1"),
        ({"num_generations": 3}, "num_generations=3 does not divide the generation batch of 4"),
        ({"num_generations": 8}, "num_generations=8 does not divide the generation batch of 4"),
        ({"num_iterations": 0}, "num_iterations=0"),
        ({"max_completion_length": 0}, "max_completion_length=0"),
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"generation_batch_size": 6}, "generation_batch_size=6"),
        ({"generation_batch_size": 8, "steps_per_generation": 3}, "generation_batch_size=8 and steps_per_generation=3"),
        ({"loss_type": "ppo"}, "loss_type='ppo'"),
        ({"loss_type": "cispo"}, "epsilon_high=None"),
        ({"loss_type": "cispo", "epsilon_high": 0.28}, "epsilon_high=0.28"),
        ({"scale_rewards": "row"}, "scale_rewards='row'"),
        ({"importance_sampling_level": "word"}, "importance_sampling_level='word'"),
        ({"multi_objective_aggregation": "max"}, "multi_objective_aggregation='max'"),
        ({"token_normalizer": "epoch"}, "token_normalizer='epoch'"),
        ({"top_entropy_quantile": 1.5}, "top_entropy_quantile=1.5"),
        ({"vllm_importance_sampling_mode": "row_mask"}, "vllm_importance_sampling_mode='row_mask'"),
        (
            {"vllm_importance_sampling_mode": "token_truncate", "vllm_importance_sampling_clip_max": None},
            "no bound to truncate at",
        ),
        ({"sync_ref_model": True}, "sync_ref_model=True"),
        ({"on_nonfinite_loss": "ignore"}, "on_nonfinite_loss='ignore'"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size"),
        ({"reward_weights": [1.0, 2.0]}, "reward_weights has 2 entries for 1"),
        ({"max_completion_length": 256}, "256 leaves no room for prompts"),
    ],
)
def test_option_that_cannot_be_is_named(options, named, tmp_path):
    with pytest.raises(ConfigError, match=named.replace("(", r"\(")):
        make_trainer(tmp_path, **options)


def test_args_of_another_class_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"TrainingArguments.*'grpo'"):
        get_trainer("grpo")(
            tiny_model(), reward_funcs=table(1.0), args=TrainingArguments(str(tmp_path), report_to=[], use_cpu=True)
        )


def test_args_of_the_base_are_refused_by_what_extends_it(tmp_path):
    args = get_config("grpo")(str(tmp_path), report_to=[], use_cpu=True)
    with pytest.raises(ConfigError, match="'gfpo'"):
        get_trainer("gfpo")(tiny_model(), reward_funcs=table(1.0), args=args, train_dataset=prompts())


def test_unknown_trainer_argument_is_named(tmp_path):
    with pytest.raises(ConfigError, match="'reward_functions'"):
        make_trainer(tmp_path, trainer={"reward_functions": table(1.0)})


def test_output_folder_that_cannot_be_made_is_refused_before_loading(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputDirError, match="cannot be written"):
        make_trainer(tmp_path / "file" / "run", trainer={"model": "no/such-model"})


# -- models and tokenizers --------------------------------------------------------------------------------------------
def test_model_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(ConfigError, match="nowhere"):
        make_trainer(tmp_path, trainer={"model": str(tmp_path / "nowhere")})


def test_model_without_a_tokenizer_asks_for_one(tmp_path):
    with pytest.raises(ConfigError, match="No tokenizer"):
        make_trainer(tmp_path, trainer={"processing_class": None})


def test_init_kwargs_beside_a_module_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="model_init_kwargs"):
        make_trainer(tmp_path, model_init_kwargs={"dtype": "float32"})


def test_tokenizer_without_any_end_token_is_refused(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token = None
    with pytest.raises(ConfigError, match="neither a pad token nor an end-of-sequence token"):
        make_trainer(tmp_path, trainer={"processing_class": tokenizer})


def without_pad():
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    return tokenizer


def test_pad_token_that_is_the_terminator_changes_nothing(tmp_path):
    runs = []
    for name, tokenizer in (("pad", tiny_tokenizer()), ("none", without_pad())):
        trainer = make_trainer(tmp_path / name, trainer={"rollouts": LENGTHS, "processing_class": tokenizer}, beta=0.1)
        trainer.train()
        runs.append(weights(trainer))
    assert torch.equal(*runs)


def test_tokenizer_without_pad_token_pads_with_the_terminator(tmp_path):
    tokenizer = without_pad()
    trainer = make_trainer(tmp_path, trainer={"processing_class": tokenizer})
    assert (trainer.pad_token_id, tokenizer.pad_token_id) == (EOS, EOS)


def test_exactly_one_terminator_of_several_is_in_the_loss(tmp_path):
    model, recorder = tiny_model(), Sampled()
    model.generation_config.eos_token_id = list(range(60, 110))
    ends = {EOS, *range(60, 110)}
    trainer = make_trainer(
        tmp_path,
        trainer={"model": model, "processing_class": without_pad(), "rollouts": recorder},
        max_steps=6,
        max_completion_length=8,
    )
    trainer.train()
    rows = type(recorder.micro_batches[0]).concat(recorder.micro_batches)
    assert rows.loss_mask.all()
    ids = [row.tolist() for row in rows.completion_ids.split(rows.completion_lengths.tolist())]
    # Rows of one batch end at different places, so that the shorter ones were padded, with a terminator.
    assert len({len(row) for row in ids[:4]}) > 1
    assert not [row for row in ids if ends & set(row[:-1])]
    assert not [row for row in ids if len(row) < 8 and row[-1] not in ends]
    terminated = [row[-1] in ends for row in ids]
    assert True in terminated
    expected = [terminated[i : i + 4].count(False) / 4 for i in range(0, 24, 4)]
    assert [line["completions/clipped_ratio"] for line in log_lines(trainer)] == expected


# -- datasets ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("dataset", "named"),
    [
        (Dataset.from_list([{"question": "2+2"}]), r"no column 'prompt'.*\['question'\]"),
        (Dataset.from_list([]), "no column 'prompt'"),
        (Dataset.from_list([{"prompt": "a"}]).select([]), "is empty"),
        (Dataset.from_list([{"prompt": "a"}, {"prompt": None}]), "Row 1 .*None.*'prompt'"),
        (Dataset.from_list([{"prompt": 7}]), "Row 0 .*7 \\(int\\)"),
        (Dataset.from_list([{"prompt": ["a", "b"]}]), "Row 0 .*list"),
        (Dataset.from_list([{"prompt": [{"role": "user"}]}]), "Row 0 .*'role': 'user'"),
        (Dataset.from_list([{"prompt": []}, {"prompt": []}]), r"Row 0 .*\[\] \(list\)"),
        ([{"prompt": "a"}], "a list; expected a datasets.Dataset"),
    ],
)
@pytest.mark.parametrize("split", ["train_dataset", "eval_dataset"])
def test_dataset_of_another_form_is_refused_before_loading(dataset, named, split, tmp_path):
    with pytest.raises(DatasetError, match=named) as caught:
        make_trainer(tmp_path, trainer={split: dataset, "model": "no/such-model"})
    assert split in str(caught.value)


def test_named_evaluation_dataset_is_checked_under_its_name(tmp_path):
    with pytest.raises(DatasetError, match=r"hard.*no column 'prompt'"):
        make_trainer(tmp_path, trainer={"eval_dataset": {"easy": prompts(), "hard": Dataset.from_list([{"x": 1}])}})


def test_prompt_beyond_the_positions_of_the_model_is_named(tmp_path):
    # 256 positions, 6 for the completion; a byte is a token.
    dataset = Dataset.from_list([{"prompt": "x" * 250}, {"prompt": "x" * 251}])
    with pytest.raises(DatasetError, match="Row 1 of train_dataset: the prompt has 251 tokens; at most 250"):
        make_trainer(tmp_path, trainer={"train_dataset": dataset})


def test_longest_prompt_that_fits_is_accepted(tmp_path):
    dataset = Dataset.from_list([{"prompt": "x" * 250}])
    trainer = make_trainer(tmp_path, trainer={"train_dataset": dataset, "rollouts": LENGTHS}, max_steps=1)
    trainer.train()
    assert math.isfinite(log_lines(trainer)[0]["loss"])


def test_dataset_that_cannot_fill_a_generation_batch_is_refused(tmp_path):
    trainer = make_trainer(tmp_path, trainer={"train_dataset": prompts(2)}, gradient_accumulation_steps=3)
    with pytest.raises(DatasetError, match="train_dataset has 2 prompts, but a generation batch needs 3"):
        trainer.train()


def test_stream_that_cannot_fill_a_generation_batch_is_refused(tmp_path):
    stream = prompts(2).to_iterable_dataset()
    trainer = make_trainer(tmp_path, trainer={"train_dataset": stream}, gradient_accumulation_steps=3)
    with pytest.raises(DatasetError, match="2 prompts, but a generation batch needs 3"):
        trainer.train()


def test_prompt_of_a_stream_that_is_too_long_is_refused_when_it_comes(tmp_path):
    stream = IterableDataset.from_generator(lambda: iter([{"prompt": "a"}, {"prompt": "b" * 300}]))
    trainer = make_trainer(tmp_path, trainer={"train_dataset": stream, "rollouts": LENGTHS})
    with pytest.raises(DatasetError, match="Row 0 of a generation batch: the prompt has 300 tokens"):
        trainer.train()


def test_row_of_a_stream_is_checked_when_it_comes(tmp_path):
    stream = IterableDataset.from_generator(lambda: iter([{"prompt": "a"}, {"prompt": 3.5}]))
    trainer = make_trainer(tmp_path, trainer={"train_dataset": stream, "rollouts": LENGTHS})
    with pytest.raises(DatasetError, match=r"3\.5 \(float\)"):
        trainer.train()


def test_training_without_a_dataset_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="train_dataset"):
        make_trainer(tmp_path, trainer={"train_dataset": None}).train()


def test_messages_without_a_chat_template_are_refused(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    dataset = Dataset.from_list([{"prompt": [{"role": "user", "content": "hi"}]}])
    trainer = make_trainer(
        tmp_path, trainer={"train_dataset": dataset, "processing_class": tokenizer, "rollouts": LENGTHS}
    )
    with pytest.raises(DatasetError, match="no chat template"):
        trainer.train()


# -- reward functions -------------------------------------------------------------------------------------------------
def rewarded(folder, *functions, **options):
    recorder = Recorder(LENGTHS, cycle=True)
    trainer = make_trainer(
        folder, trainer={"reward_funcs": list(functions), "rollouts": recorder}, **{"max_steps": 1, **options}
    )
    return trainer, recorder


def judge(result):
    """A reward function named `judge` that returns `result`."""

    def judge(completions, **_):
        return result

    return judge


@pytest.mark.parametrize("functions", [None, []])
def test_no_reward_function_is_refused(functions, tmp_path):
    with pytest.raises(ConfigError, match="No reward function"):
        make_trainer(tmp_path, trainer={"reward_funcs": functions})


def test_reward_function_that_is_none_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="got float"):
        make_trainer(tmp_path, trainer={"reward_funcs": [1.5]})


@pytest.mark.parametrize(
    ("result", "named"),
    [
        ([1.0], "'judge' returned 1 values for 4 rows"),
        ([1.0] * 5, "'judge' returned 5 values for 4 rows"),
        (1.0, "'judge' returned a float for 4 rows"),
        (None, "'judge' returned a NoneType for 4 rows"),
        ([0.0, 1.0, float("inf"), 0.0], "'judge' returned inf for row 2"),
        ([0.0, float("-inf"), 0.0, 0.0], "'judge' returned -inf for row 1"),
        ([0.0, 1.0, 0.0, "good"], "'judge' returned 'good' for row 3"),
        ([[0.0], 1.0, 0.0, 0.0], r"'judge' returned \[0.0\] for row 0"),
    ],
)
def test_reward_that_is_no_number_per_row_stops_the_run(result, named, tmp_path):
    trainer, _ = rewarded(tmp_path, judge(result))
    with pytest.raises(RewardError, match=named):
        trainer.train()


def test_reward_function_that_raises_is_named_with_its_error(tmp_path):
    def brittle(completions, **_):
        raise KeyError("answer")

    trainer, _ = rewarded(tmp_path, table(1.0, 2.0), brittle)
    with pytest.raises(RewardError, match="'brittle' raised KeyError: 'answer'") as caught:
        trainer.train()
    assert isinstance(caught.value.__cause__, KeyError)


def test_reward_function_that_hangs_is_given_up(tmp_path):
    release = threading.Event()

    def patient(completions, **_):
        release.wait(60)
        return [0.0] * len(completions)

    trainer, _ = rewarded(tmp_path, patient, reward_timeout=0.2)
    try:
        with pytest.raises(RewardError, match=r"'patient'.*reward_timeout=0.2"):
            trainer.train()
    finally:
        release.set()


def test_reward_function_that_wants_a_missing_column_is_told_before_the_run(tmp_path):
    def exact(completions, answer):
        return [0.0] * len(completions)

    with pytest.raises(RewardError, match=r"'exact' wants the arguments \['answer'\]"):
        rewarded(tmp_path, exact)


@pytest.mark.parametrize("nothing", [None, float("nan")])
def test_row_without_score_gets_no_advantage_and_is_left_out_of_the_mean(nothing, tmp_path):
    trainer, recorder = rewarded(tmp_path, judge([1.0, nothing, 0.0, 0.5]), scale_rewards="none")
    trainer.train()
    rows = recorder.micro_batches[0]
    assert rows.mean_per_row(rows.advantages).tolist() == pytest.approx([0.5, 0.0, -0.5, 0.0])
    line = log_lines(trainer)[0]
    assert line["reward"] == line["rewards/judge/mean"] == pytest.approx(0.5)


def test_batch_without_any_score_leaves_the_weights_and_warns(tmp_path, caplog):
    trainer, _ = rewarded(tmp_path, judge([None] * 4), max_steps=2)
    before = weights(trainer)
    trainer.train()
    assert torch.equal(weights(trainer), before)
    assert [line["loss"] for line in log_lines(trainer)] == [0.0, 0.0]
    assert "reward" not in log_lines(trainer)[0]
    assert caplog.text.count("No reward function scored any row") == 1


def test_tensor_of_rewards_is_accepted(tmp_path):
    trainer, _ = rewarded(tmp_path, judge(torch.tensor([1.0, 0.0, 0.0, 0.0])))
    trainer.train()
    assert log_lines(trainer)[0]["reward"] == pytest.approx(0.25)


def test_coroutine_reward_functions_wait_side_by_side(tmp_path):
    arrived = asyncio.Event()

    async def waits(completions, **_):
        await arrived.wait()  # for ever, unless the other one runs meanwhile
        return [1.0] * len(completions)

    async def comes(completions, **_):
        arrived.set()
        return [0.5] * len(completions)

    trainer, _ = rewarded(tmp_path, waits, comes, table(0.0, 1.0), reward_timeout=30)
    trainer.train()
    line = log_lines(trainer)[0]
    assert (line["rewards/waits/mean"], line["rewards/comes/mean"]) == (1.0, 0.5)
    assert line["reward"] == pytest.approx(2.0)


def test_coroutine_reward_function_that_raises_is_named(tmp_path):
    async def brittle(completions, **_):
        raise OSError("no route")

    trainer, _ = rewarded(tmp_path, brittle)
    with pytest.raises(RewardError, match="'brittle' raised OSError: no route"):
        trainer.train()


# -- classifiers as reward functions ----------------------------------------------------------------------------------
IM_END = 4
TEMPLATE = "{% for m in messages %}{{ m['content'] }}<|im_end|>{% endfor %}"


def classifier():
    """A tiny classifier whose pad token is also the last token of every conversation."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForSequenceClassification(
            LlamaConfig(
                vocab_size=261,
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=1,
                num_attention_heads=2,
                num_key_value_heads=2,
                num_labels=1,
                initializer_range=0.5,
                pad_token_id=IM_END,
            )
        )
    return model.eval()


def classifier_tokenizer():
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = tokenizer.pad_token = "<|im_end|>"
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def score_at_last_token(model, text):
    ids = torch.tensor([classifier_tokenizer()(text)["input_ids"]])
    with torch.no_grad():
        return model.score(model.model(input_ids=ids).last_hidden_state[0, -1]).item()


def run_with_classifier(folder, function, tokenizer):
    dataset = Dataset.from_list([{"prompt": [{"role": "user", "content": "hi"}]}])
    answers = ["ab", "a", "xyz", "hello"]
    ids = [tiny_tokenizer()(answer)["input_ids"] + [EOS] for answer in answers]
    trainer = make_trainer(
        folder,
        trainer={
            "reward_funcs": function,
            "reward_processing_classes": tokenizer,
            "train_dataset": dataset,
            "rollouts": {"completion_ids": ids},
        },
        max_steps=1,
    )
    trainer.train()
    texts = [f"hi<|im_end|>{answer}<|im_end|>" for answer in answers]
    return log_lines(trainer)[0], [score_at_last_token(classifier(), text) for text in texts]


def test_classifier_is_read_at_the_last_token_though_it_is_the_pad_token(tmp_path):
    model = classifier()
    line, scores = run_with_classifier(tmp_path, model, classifier_tokenizer())
    assert line["reward"] == pytest.approx(sum(scores) / 4, rel=1e-5)
    assert line["reward_std"] == pytest.approx(torch.tensor(scores).std().item(), rel=1e-5)
    # The trap is real: left to itself the model takes the token before the padding it sees.
    ids = torch.tensor([classifier_tokenizer()("hi<|im_end|>ab<|im_end|>")["input_ids"]])
    assert model(input_ids=ids).logits.item() != pytest.approx(scores[0], rel=1e-2)
    assert model.config.pad_token_id == IM_END


def test_classifier_can_be_given_by_its_folder(tmp_path):
    folder = tmp_path / "judge-of-chats"
    classifier().save_pretrained(folder)
    classifier_tokenizer().save_pretrained(folder)
    line, scores = run_with_classifier(tmp_path / "run", str(folder), None)
    assert line["rewards/judge-of-chats/mean"] == pytest.approx(sum(scores) / 4, rel=1e-5)


def test_tokenizers_of_classifiers_must_match_in_number(tmp_path):
    with pytest.raises(ConfigError, match="reward_processing_classes has 2 entries for 1"):
        make_trainer(tmp_path, trainer={"reward_processing_classes": [None, None]})


# -- generation backends ----------------------------------------------------------------------------------------------
class Backend:
    def __init__(self, **answer):
        self.answer = answer

    @hookimpl
    def generate(self, prompts, sampling):
        return Generated(**self.answer)


@pytest.mark.parametrize(
    ("answer", "named"),
    [
        ({"completion_ids": [[5, 1]] * 3}, "3 completions for 4 rows"),
        ({"completion_ids": [[5, 1], [5], [], [5]]}, "empty completion for row 2"),
        ({"completion_ids": [[5, 1]] * 4, "logps": [[-1.0]] * 4}, "returned logps that do not fit"),
        ({"completion_ids": [[5, 1]] * 4, "logps": [[-1.0], [-1.0] * 3, [-1.0] * 2, [-1.0] * 2]}, "returned logps"),
        ({"completion_ids": [[5, 1]] * 4, "loss_mask": [[True]] * 4}, "returned loss_mask that do not fit"),
        ({"completion_ids": [[5, 1]] * 4, "prompt_ids": [[7]] * 3}, "returned 3 prompt_ids for 4 rows"),
    ],
)
def test_backend_that_answers_wrongly_is_told(answer, named, tmp_path):
    with pytest.raises(HookResultError, match=named):
        make_trainer(tmp_path, trainer={"rollouts": Backend(**answer)}).train()


def test_recorded_rollouts_that_run_out_say_so(tmp_path):
    trainer, recorder = rewarded(tmp_path, table(1.0, 0.0), max_steps=2)
    recorder.cycle = False
    with pytest.raises(HookResultError, match="holds 1 generations; one more"):
        trainer.train()
