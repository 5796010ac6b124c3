"""What users of SFT, reward models and DPO get wrong: each mistake is named, before anything is loaded where it can be.

Where the model is `NOWHERE`, it would be the next thing to fail.
"""

import pytest
from datasets import Dataset
from transformers import PreTrainedTokenizerFast

from trl_core.errors import ConfigError, DatasetError
from trl_core.testing import tiny_model, tiny_tokenizer

from .helpers_offline import chat, demonstrations, make_trainer, pairs, texts
from .helpers_train import adapted_model, lora_config

NOWHERE = "no/such-model"


def rows(*values, **columns):
    return Dataset.from_list(list(values) or [columns])


GOOD = {"prompt": "a", "chosen": "b", "rejected": "c"}


# -- rows -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("split", ["train_dataset", "eval_dataset"])
@pytest.mark.parametrize(
    ("kind", "dataset", "named"),
    [
        ("SFT", rows(content="a"), r"\['content'\]; expected one of: .*messages, or text"),
        ("SFT", rows({"text": "a"}, {"text": None}), "Row 1 of .* None .*column 'text'; expected a string"),
        ("SFT", rows(text=7), r"Row 0 of .* 7 \(int\) in column 'text'; expected a string"),
        ("SFT", rows(messages="hello"), "Row 0 of .* 'hello' .*column 'messages'; expected a list of"),
        ("SFT", rows(messages=[{"role": "user"}]), "Row 0 of .*'role': 'user'.* column 'messages'"),
        (
            "SFT",
            rows(prompt="a", completion=""),
            "Row 0 of .*column 'completion'; expected a completion that is not empty",
        ),
        (
            "SFT",
            rows(prompt="a", completion=chat(("assistant", "b"))),
            "text in column 'prompt' and messages in column",
        ),
        ("Reward", rows(prompt="a", chosen="b"), r"\['chosen', 'prompt'\]; expected one of: preference"),
        (
            "Reward",
            rows({**GOOD}, {**GOOD, "rejected": None}),
            "Row 1 of .* None .*column 'rejected'; expected a string",
        ),
        ("DPO", rows(prompt="a", completion="b"), "expected one of: preference .chosen . rejected."),
        (
            "DPO",
            rows({**GOOD}, {**GOOD, "rejected": ""}),
            "Row 1 of .*column 'rejected'; expected a completion that is not",
        ),
        ("DPO", rows({**GOOD, "chosen": 3.5}), r"Row 0 of .* 3.5 \(float\) in column 'chosen'; expected a string"),
        ("DPO", rows({**GOOD, "chosen": chat(("assistant", "b"))}), "has (text|messages) in column"),
        ("DPO", texts().select([]), "is empty"),
        ("DPO", [GOOD], "is a list; expected a datasets.Dataset"),
    ],
)
def test_row_of_another_form_is_named_before_loading(kind, dataset, named, split, tmp_path):
    with pytest.raises(DatasetError, match=named) as caught:
        make_trainer(tmp_path, kind, {split: dataset, "model": NOWHERE})
    assert split in str(caught.value)


def test_named_evaluation_dataset_is_named(tmp_path):
    given = {"easy": pairs(), "hard": rows(prompt="a")}
    with pytest.raises(DatasetError, match=r"eval_dataset\['hard'\] has the columns"):
        make_trainer(tmp_path, "DPO", {"eval_dataset": given, "model": NOWHERE})


def test_row_of_a_stream_is_named_when_it_comes(tmp_path):
    stream = rows({"text": "good"}, {"text": None}).to_iterable_dataset()
    trainer = make_trainer(tmp_path, trainer={"train_dataset": stream})
    with pytest.raises(DatasetError, match=r"Row 1 of train_dataset .*column 'text'"):
        trainer.train()


def test_pair_that_prefers_nothing_is_refused(tmp_path):
    dataset = rows(GOOD, {**GOOD, "rejected": "b"})
    with pytest.raises(DatasetError, match="Row 1 of train_dataset has the same text in 'chosen' and 'rejected'"):
        make_trainer(tmp_path, "DPO", {"train_dataset": dataset})


@pytest.mark.parametrize(
    ("kind", "dataset", "named"),
    [
        ("SFT", demonstrations(), "4 of 4 rows of train_dataset have no token to train on within max_length=4"),
        ("Reward", pairs(), "4 of 4 rows of train_dataset have a side of more than max_length=4 tokens"),
        ("DPO", pairs(), "4 of 4 rows of train_dataset have a prompt of max_length=4 tokens or more"),
    ],
)
def test_rows_that_are_all_cut_away_are_refused(kind, dataset, named, tmp_path):
    with pytest.raises(DatasetError, match=named):
        make_trainer(tmp_path, kind, {"train_dataset": dataset}, max_length=4)


def test_stream_whose_rows_are_all_cut_away_ends(tmp_path):
    trainer = make_trainer(tmp_path, "DPO", {"train_dataset": pairs().to_iterable_dataset()}, max_length=4)
    with pytest.raises(DatasetError, match="stream of train_dataset gives no row to train on"):
        trainer.train()


@pytest.mark.parametrize("value", ["much", float("nan")])
def test_margin_that_is_no_number_is_refused(value, tmp_path):
    dataset = rows({**GOOD, "margin": value})
    with pytest.raises(DatasetError, match=r"Row 0 of train_dataset .*column 'margin'; expected a finite number"):
        make_trainer(tmp_path, "Reward", {"train_dataset": dataset})


def test_labels_that_are_shifted_are_refused(tmp_path):
    dataset = rows(input_ids=[5, 6, 7], labels=[6, 7, -100])
    with pytest.raises(DatasetError, match=r"Row 0 of train_dataset .*column 'labels'.*not shifted"):
        make_trainer(tmp_path, trainer={"train_dataset": dataset})


# -- templates --------------------------------------------------------------------------------------------------------
TALK = rows(messages=chat(("user", "a"), ("assistant", "b")))
PAIR = rows(prompt=chat(("user", "a")), chosen=chat(("assistant", "b")), rejected=chat(("assistant", "c")))


def templated(template):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def test_assistant_only_loss_without_markers_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"no {% generation %} markers"):
        make_trainer(tmp_path, trainer={"train_dataset": TALK}, assistant_only_loss=True)


def test_assistant_only_loss_of_text_is_refused(tmp_path):
    marked = templated("{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}")
    with pytest.raises(
        ConfigError, match="assistant_only_loss=True needs messages, but Row 0 of train_dataset has text"
    ):
        make_trainer(tmp_path, trainer={"processing_class": marked}, assistant_only_loss=True)


def test_conversations_without_a_template_are_refused(tmp_path):
    for kind, dataset in (("SFT", TALK), ("Reward", PAIR), ("DPO", PAIR)):
        with pytest.raises(DatasetError, match="no chat template"):
            make_trainer(tmp_path, kind, {"train_dataset": dataset, "processing_class": templated(None)})


def test_template_that_rewrites_the_history_is_refused(tmp_path):
    # What the user said disappears once it is answered.
    rewriting = "{% for m in messages %}{% if loop.last %}{{ m.role }}: {{ m.content }};{% endif %}{% endfor %}"
    with pytest.raises(DatasetError, match="not prefix-preserving"):
        make_trainer(tmp_path, "DPO", {"train_dataset": PAIR, "processing_class": templated(rewriting)})


def test_template_that_fails_is_named_with_the_row(tmp_path):
    failing = "{{ raise_exception('only one turn') }}"
    with pytest.raises(
        DatasetError, match=r"Row 0 of train_dataset does not go through the chat template.*only one turn"
    ):
        make_trainer(tmp_path, trainer={"train_dataset": TALK, "processing_class": templated(failing)})


def test_template_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"chat_template_path=.*nowhere.jinja"):
        make_trainer(tmp_path, chat_template_path=str(tmp_path / "nowhere.jinja"))


# -- options ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("kind", "options", "named"),
    [
        ("SFT", {"packing": True, "max_length": None}, "packing=True with max_length=None"),
        ("SFT", {"eval_packing": True, "max_length": None}, "max_length=None"),
        ("SFT", {"loss_type": "mse"}, "loss_type='mse'"),
        ("SFT", {"packing_strategy": "ffd"}, "packing_strategy='ffd'"),
        ("SFT", {"loss_type": "dft", "label_smoothing_factor": 0.1}, "label_smoothing_factor=0.1 with loss_type='dft'"),
        ("SFT", {"max_length": 1}, "max_length=1 is not a whole number of at least 2"),
        ("SFT", {"truncation_mode": "keep_middle"}, "truncation_mode='keep_middle'"),
        ("SFT", {"completion_only_loss": True}, "completion_only_loss=True, but train_dataset has no completions"),
        ("SFT", {"eos_token": "<end>"}, "eos_token='<end>' is not in the tokenizer's vocabulary"),
        (
            "DPO",
            {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0]},
            "loss_weights has 1 entries and loss_type has 2",
        ),
        ("DPO", {"loss_type": "dpo"}, "loss_type='dpo' .str. is not a list of texts, or one of 'sigmoid'"),
        ("DPO", {"beta": 0.0}, "beta=0.0"),
        ("DPO", {"precompute_ref_log_probs": True, "sync_ref_model": True}, "reference that moves during training"),
        ("DPO", {"f_divergence_type": "forward_kl", "loss_type": "bco_pair"}, "f_divergence_type='forward_kl'"),
    ],
)
def test_option_that_cannot_be_is_named(kind, options, named, tmp_path):
    with pytest.raises(ConfigError, match=named):
        make_trainer(tmp_path, kind, **options)


def test_precomputing_for_a_stream_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="precompute_ref_log_probs=True, but train_dataset is a stream"):
        make_trainer(tmp_path, "DPO", {"train_dataset": pairs().to_iterable_dataset()}, precompute_ref_log_probs=True)


@pytest.mark.parametrize("kind", ["Reward", "DPO"])
def test_formatting_function_for_pairs_is_refused(kind, tmp_path):
    with pytest.raises(ConfigError, match="takes no formatting_func"):
        make_trainer(tmp_path, kind, {"formatting_func": str, "model": NOWHERE})


@pytest.mark.parametrize("kind", ["SFT", "Reward"])
def test_reference_where_there_is_none_is_refused_before_loading(kind, tmp_path):
    with pytest.raises(ConfigError, match=r"ref_model is given, but '(sft|reward)' uses no reference"):
        make_trainer(tmp_path, kind, {"ref_model": tiny_model, "model": NOWHERE})


def test_moving_reference_with_an_adapter_is_refused_before_loading(tmp_path):
    with pytest.raises(ConfigError, match="sync_ref_model=True with an adapter"):
        make_trainer(tmp_path, "DPO", {"peft_config": lora_config(), "model": NOWHERE}, sync_ref_model=True)


def test_second_adapter_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="already carries an adapter"):
        make_trainer(tmp_path, "DPO", {"peft_config": lora_config(), "model": adapted_model})


def test_unknown_trainer_argument_is_named(tmp_path):
    with pytest.raises(ConfigError, match="'data_collator'"):
        make_trainer(tmp_path, trainer={"data_collator": list, "model": NOWHERE})


# -- missing things ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["SFT", "Reward", "DPO"])
def test_training_and_evaluation_want_a_dataset(kind, tmp_path):
    trainer = make_trainer(tmp_path, kind, {"train_dataset": None})
    with pytest.raises(ConfigError, match=r"train\(\) needs a train_dataset"):
        trainer.train()
    with pytest.raises(ConfigError, match=r"evaluate\(\) needs an eval_dataset"):
        trainer.evaluate()


@pytest.mark.parametrize("kind", ["SFT", "Reward", "DPO"])
def test_model_that_does_not_exist_is_named(kind, tmp_path):
    with pytest.raises(ConfigError, match="nowhere"):
        make_trainer(tmp_path, kind, {"model": str(tmp_path / "nowhere")})


def test_reference_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(ConfigError, match="nowhere"):
        make_trainer(tmp_path, "DPO", {"ref_model": str(tmp_path / "nowhere")})


def test_text_without_any_end_is_refused(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    for kind in ("SFT", "Reward", "DPO"):
        with pytest.raises(ConfigError, match="no token that can end a completion"):
            make_trainer(tmp_path, kind, {"processing_class": tokenizer})


def test_reward_model_that_cannot_pad_apart_from_the_end_warns(tmp_path, caplog):
    backend = tiny_tokenizer().backend_tokenizer
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<eos>")
    make_trainer(tmp_path, "Reward", {"processing_class": tokenizer})
    assert "The pad token is the terminator '<eos>', and there is no other special token" in caplog.text
