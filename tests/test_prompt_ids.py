"""Prompts that come as token ids, and pad tokens that only the tokenizer knows."""

import pytest
from datasets import Dataset, IterableDataset
from transformers import AutoModelForCausalLM

from trl_core.errors import DatasetError
from trl_core.testing import tiny_model, tiny_tokenizer

from .helpers_online import EOS, TOKENIZER, Recorder, Sampled, completions, make_trainer, weights

TEXTS = ["say a", "say ab", "say abc", "say abcd"]


def tokenised(texts=TEXTS, **columns):
    rows = [{"input_ids": TOKENIZER(text)["input_ids"]} for text in texts]
    return Dataset.from_list([{**row, **{k: v[i] for k, v in columns.items()}} for i, row in enumerate(rows)])


def test_ids_train_as_their_text(tmp_path):
    ends = []
    for dataset in (Dataset.from_list([{"prompt": text} for text in TEXTS]), tokenised()):
        seen = []

        def reward(prompts, completion_ids, seen=seen, **_):
            seen.extend(prompts)
            return [float(sum(ids) % 7) for ids in completion_ids]

        trainer = make_trainer(tmp_path, trainer={"train_dataset": dataset, "reward_funcs": reward})
        trainer.train()
        ends.append((weights(trainer), seen))
    assert (ends[0][0] == ends[1][0]).all()
    assert ends[0][1] == ends[1][1] == [TEXTS[0]] * 4 + [TEXTS[1]] * 4


def test_ids_are_used_as_they_are(tmp_path):
    """Not decoded and tokenised again, which would lose special tokens."""
    ids = [0, 87, 2, 88, EOS]
    recorder, seen = Recorder(completions(3, 3, 3, 3), cycle=True), []

    def reward(prompts, completions, **_):
        seen.append((prompts[0], completions[0]))
        return [0.0, 1.0, 2.0, 3.0]

    dataset = Dataset.from_list([{"input_ids": ids}])
    trainer = make_trainer(
        tmp_path, trainer={"train_dataset": dataset, "rollouts": recorder, "reward_funcs": reward}, max_steps=1
    )
    trainer.train()
    assert recorder.prompts == [[ids] * 4]
    assert [(type(prompt), type(completion)) for prompt, completion in seen] == [(str, str)]
    assert seen[0][0] == TOKENIZER.decode([87, 88])


def test_prompt_stands_before_ids(tmp_path):
    recorder = Recorder(completions(3, 3, 3, 3), cycle=True)
    dataset = Dataset.from_list([{"prompt": "hi", "input_ids": [9]}])
    make_trainer(tmp_path, trainer={"train_dataset": dataset, "rollouts": recorder}, max_steps=1).train()
    assert recorder.prompts == [[TOKENIZER("hi")["input_ids"]] * 4]


def test_stream_of_ids(tmp_path):
    stream = IterableDataset.from_generator(lambda: iter([{"input_ids": [5, 6, 7]}, {"input_ids": [8]}]))
    recorder = Recorder(completions(3, 3, 3, 3), cycle=True)
    make_trainer(tmp_path, trainer={"train_dataset": stream, "rollouts": recorder}, max_steps=2).train()
    assert recorder.prompts == [[[5, 6, 7]] * 4, [[8]] * 4]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"input_ids": []}, {"input_ids": [5]}], r"Row 0 .*\[\] .*token ids"),
        ([{"input_ids": [0.5, 1.5]}], r"Row 0 .*0\.5.*token ids"),
        ([{"input_ids": [5] * 251}], "the prompt has 251 tokens; at most 250"),
        ([{"tokens": [5]}], "no column 'prompt'"),
    ],
)
def test_ids_that_do_not_fit_are_refused(rows, message, tmp_path):
    with pytest.raises(DatasetError, match=message):
        make_trainer(tmp_path, trainer={"train_dataset": Dataset.from_list(rows)})


def test_pad_token_without_an_embedding_is_replaced(tmp_path, caplog):
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    model = tiny_model()
    assert tokenizer.pad_token_id == model.get_input_embeddings().weight.shape[0]
    model.generation_config.eos_token_id = list(range(40, 90))  # completions of all lengths
    recorder = Sampled()
    trainer = make_trainer(
        tmp_path, trainer={"model": model, "processing_class": tokenizer, "rollouts": recorder}, max_steps=1
    )
    trainer.train()
    assert "no embedding for the pad token '[PAD]' (261 of 261)" in caplog.text
    assert len(set(recorder.micro_batches[0].completion_lengths.tolist())) > 1
    trainer.save_model(tmp_path / "saved")
    AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
