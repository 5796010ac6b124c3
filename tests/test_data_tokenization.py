import json
import logging
from pathlib import Path

import pytest
from datasets import Dataset, IterableDataset
from tokenizers import processors
from transformers import AutoTokenizer

from trl_core.data import tokenization
from trl_core.data.prompts import render
from trl_core.data.tokenization import (
    cut,
    encode_completions,
    prepare_language,
    prepare_pairs,
    prepare_ranked,
    text_ids,
)
from trl_core.errors import ConfigError, DatasetError
from trl_core.testing import tiny_tokenizer

PARITY = Path(__file__).parent / "parity"
BOS, EOS = 0, 1
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] }}<|im_end|>{% endgeneration %}{% else %}{{ m['content'] }}<|im_end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def user(content="q"):
    return {"role": "user", "content": content}


def bot(content="a"):
    return {"role": "assistant", "content": content}


def mapped(rows):
    return Dataset.from_list(rows)


def stream(rows):
    return IterableDataset.from_generator(lambda: iter(rows))


BOTH = pytest.mark.parametrize("make", [mapped, stream])


@pytest.fixture
def tokenizer():
    """One token per byte; adds no special tokens."""
    return tiny_tokenizer()


@pytest.fixture(scope="session")
def merging():
    """The tokenizer of the reference runs, which has merges."""
    return AutoTokenizer.from_pretrained(PARITY / "model")


def adding(template):
    """A tokenizer that puts special tokens around every text by itself."""
    found = tiny_tokenizer()
    special = [("<bos>", BOS), ("<eos>", EOS)]
    found.backend_tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)
    return found


@pytest.fixture(autouse=True)
def forget_warnings():
    tokenization._warn_once.cache_clear()


@pytest.fixture
def warnings(caplog):
    caplog.set_level(logging.WARNING, "trl_core")
    return caplog


def texts(tokenizer, rows, column="input_ids"):
    return [tokenizer.decode(row[column]) for row in rows]


def trained(tokenizer, rows):
    """What is trained on, as text."""
    kept = [[t for t, m in zip(row["input_ids"], row["loss_mask"], strict=True) if m] for row in rows]
    return [tokenizer.decode(ids) for ids in kept]


def language(dataset, tokenizer, **options):
    return prepare_language(dataset, "train", tokenizer, **{"max_length": None, **options})


# -- the reference -----------------------------------------------------------------------------------------------------
def case(name):
    data = json.loads((PARITY / "offline" / f"{name}.json").read_text(encoding="utf-8"))
    batches = data["first_batch"] if isinstance(data["first_batch"], list) else [data["first_batch"]]
    return data["algorithm_arguments"], mapped(data["dataset"]), batches


def names(*patterns):
    found = sorted(path.stem for pattern in patterns for path in (PARITY / "offline").glob(f"{pattern}_*.json"))
    assert len(found) >= 6
    return found


def unpadded(batch, column):
    """Rows of a column without padding."""
    rows = zip(batch[column], batch["attention_mask"], strict=True)
    return [[value for value, real in zip(values, mask, strict=True) if real] for values, mask in rows]


@pytest.mark.parametrize("name", names("sft"))
def test_language_rows_are_those_of_the_reference(name, merging):
    options, dataset, batches = case(name)
    used = ("max_length", "completion_only_loss", "assistant_only_loss", "packing", "packing_strategy")
    rows = list(language(dataset, merging, **{key: options[key] for key in used if key in options}))
    ids = [row["input_ids"] for row in rows]
    labels = [[t if m else -100 for t, m in zip(r["input_ids"], r["loss_mask"], strict=True)] for r in rows]
    if options["packing"]:
        (batch,) = batches
        assert [[token for row in ids for token in row]] == batch["input_ids"]
        assert [[label for row in labels for label in row]] == batch["labels"]
        assert [[p for r in rows for size in r["seq_lengths"] for p in range(size)]] == batch["position_ids"]
    else:
        assert ids == [row for batch in batches for row in unpadded(batch, "input_ids")]
        assert labels == [row for batch in batches for row in unpadded(batch, "labels")]


@pytest.mark.parametrize("name", names("dpo", "bema_dpo"))
def test_pairs_are_those_of_the_reference(name, merging):
    options, dataset, batches = case(name)
    limit, mode = options["max_length"], options["truncation_mode"]
    rows = list(prepare_pairs(dataset, "train", merging, max_length=limit, truncation_mode=mode))
    ids, masks = [], []
    for side in ("chosen_ids", "rejected_ids"):
        parts = [cut(row["prompt_ids"], row[side], limit, mode) for row in rows]
        ids += [prompt + completion for prompt, completion in parts]
        masks += [[0] * len(prompt) + [1] * len(completion) for prompt, completion in parts]
    expected_ids, expected_masks = [], []
    for side in (0, 1):
        for batch in batches:
            size = len(batch["input_ids"]) // 2
            here = slice(side * size, (side + 1) * size)
            expected_ids += unpadded(batch, "input_ids")[here]
            expected_masks += unpadded(batch, "completion_mask")[here]
    # The reference keeps rows of which it has cut the whole completion away; nothing can be learned from them.
    kept = [any(mask) for mask in expected_masks]
    assert sum(kept) == len(kept) - (4 if name == "dpo_maxlen_keep_start" else 0)
    assert ids == [row for row, keep in zip(expected_ids, kept, strict=True) if keep]
    assert masks == [row for row, keep in zip(expected_masks, kept, strict=True) if keep]


@pytest.mark.parametrize("name", names("reward"))
def test_ranked_rows_are_those_of_the_reference(name, merging):
    options, dataset, batches = case(name)
    rows = list(prepare_ranked(dataset, "train", merging, max_length=options["max_length"]))
    halves = [(unpadded(batch, "input_ids"), len(batch["input_ids"]) // 2) for batch in batches]
    assert [row["chosen_ids"] for row in rows] == [row for ids, size in halves for row in ids[:size]]
    assert [row["rejected_ids"] for row in rows] == [row for ids, size in halves for row in ids[size:]]
    margins = [margin for batch in batches for margin in batch.get("margin", [])]
    assert [row["margin"] for row in rows if "margin" in row] == margins


# -- the end, the beginning --------------------------------------------------------------------------------------------
@BOTH
def test_plain_text_is_ended_once(make, tokenizer):
    rows = list(language(make([{"text": "ab"}, {"text": "ab<eos>"}]), tokenizer))
    assert texts(tokenizer, rows) == ["ab<eos>", "ab<eos>"]
    assert rows[0] == {"input_ids": [*tokenizer("ab")["input_ids"], EOS], "loss_mask": [1, 1, 1]}


def test_end_is_trained_on_where_it_is_also_the_padding(tokenizer):
    tokenizer.pad_token = tokenizer.eos_token
    rows = language(mapped([{"prompt": "q", "completion": "a"}]), tokenizer)
    assert rows["loss_mask"][:] == [[0, 1, 1]]
    (pair,) = prepare_pairs(mapped([{"prompt": "q", "chosen": "a", "rejected": "b"}]), "t", tokenizer, max_length=9)
    assert pair["chosen_ids"][-1] == pair["rejected_ids"][-1] == EOS


def test_other_end_is_used(tokenizer):
    rows = language(mapped([{"text": "ab"}, {"text": "ab<|im_end|>"}]), tokenizer, eos_token="<|im_end|>")
    assert texts(tokenizer, rows) == ["ab<|im_end|>"] * 2


@pytest.mark.parametrize("end", ["<none>", None])
def test_end_that_is_no_token_is_refused(tokenizer, end):
    tokenizer.eos_token = None
    with pytest.raises(ConfigError, match=f"{end!r} is no token"):
        language(mapped([{"text": "ab"}]), tokenizer, eos_token=end)
    assert len(language(mapped([{"input_ids": [5, 6]}, {"input_ids": [5, 6]}]), tokenizer)) == 2


def test_end_may_be_the_unknown_token_but_no_unknown_one(tokenizer):
    tokenizer.unk_token = "<eos>"  # as in GPT-2
    assert texts(tokenizer, language(mapped([{"text": "ab"}]), tokenizer)) == ["ab<eos>"]
    with pytest.raises(ConfigError, match="'<none>' is no token"):
        language(mapped([{"text": "ab"}]), tokenizer, eos_token="<none>")


def test_conversation_is_ended_by_its_template(tokenizer):
    rows = list(language(mapped([{"messages": [user(), bot()]}]), tokenizer))
    assert texts(tokenizer, rows) == ["<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\na<|im_end|>\n"]
    assert all(rows[0]["loss_mask"])


@pytest.mark.parametrize("template", ["<bos> $A", "<bos> $A <eos>", "$A <eos>"])
def test_special_tokens_the_tokenizer_adds_are_there_once(template, warnings):
    tokenizer, start = adding(template), "<bos>" if "bos" in template else ""
    pair = {"prompt": "q", "chosen": "a", "rejected": "b<eos>"}
    (row,) = prepare_pairs(mapped([pair]), "train", tokenizer, max_length=None)
    assert texts(tokenizer, [row], "prompt_ids") == [f"{start}q"]
    assert texts(tokenizer, [row], "chosen_ids") == ["a<eos>"]
    assert texts(tokenizer, [row], "rejected_ids") == ["b<eos>"]
    assert texts(tokenizer, language(mapped([{"text": "ab"}]), tokenizer)) == [f"{start}ab<eos>"]
    assert not warnings.records


def test_beginning_the_text_has_is_not_doubled():
    assert text_ids("<bos>ab", adding("<bos> $A"))[:2] == [BOS, *tiny_tokenizer()("a")["input_ids"]]
    assert text_ids("<bos>ab", tiny_tokenizer())[0] == BOS


def test_rendered_conversation_gets_no_beginning():
    tokenizer = adding("<bos> $A <eos>")
    tokenizer.chat_template = "{{ bos_token }}" + MARKED
    (row,) = language(mapped([{"prompt": [user()], "completion": [bot()]}]), tokenizer)
    assert row["input_ids"].count(BOS) == 1
    assert row["input_ids"].count(EOS) == 0
    (pair,) = prepare_ranked(
        mapped([{"prompt": [user()], "chosen": [bot()], "rejected": [bot("b")]}]), "t", tokenizer, max_length=None
    )
    assert pair["chosen_ids"] == row["input_ids"]


# -- the boundary ------------------------------------------------------------------------------------------------------
def test_tokens_that_merge_belong_to_the_completion(merging, warnings):
    prompt, completion = "What is th", "e sea"
    alone, whole = merging(prompt)["input_ids"], merging(prompt + completion + "<eos>")["input_ids"]
    assert whole[: len(alone)] != alone
    (row,) = language(mapped([{"prompt": prompt, "completion": completion}]), merging)
    assert row["input_ids"] == whole
    first = row["loss_mask"].index(1)
    assert whole[:first] == alone[:first]
    assert whole[first] != alone[first]
    assert merging.decode(whole[first:]).endswith("the sea<eos>")


def test_merging_is_warned_of_once(merging, warnings):
    rows = [{"prompt": "What is th", "completion": "e sea"}, {"prompt": "It is th", "completion": "e sky"}]
    language(mapped(rows), merging)
    assert len(warnings.records) == 1
    assert "other tokens" in warnings.text


def test_both_sides_share_the_prompt(merging):
    (row,) = prepare_pairs(
        mapped([{"prompt": "It is th", "chosen": "ursday", "rejected": "e sky"}]), "train", merging, max_length=None
    )
    for side, text in (("chosen_ids", "ursday"), ("rejected_ids", "e sky")):
        assert row["prompt_ids"] + row[side] == merging(f"It is th{text}<eos>")["input_ids"]
    apart = prepare_pairs(
        mapped([{"prompt": "It is th", "chosen": "ursday", "rejected": "umb"}]), "train", merging, max_length=None
    )
    assert len(apart[0]["prompt_ids"]) > len(row["prompt_ids"])  # it was "e sky" that merged


def test_generation_prompt_with_an_empty_thought_is_warned_of(tokenizer, warnings):
    tokenizer.chat_template = MARKED.replace("assistant\n{% endif %}", "assistant\n<think></think>{% endif %}")
    (row,) = language(mapped([{"prompt": [user()], "completion": [bot()]}]), tokenizer)
    assert trained(tokenizer, [row]) == ["a<|im_end|>"]
    assert "the generation prompt" in warnings.text


LAST_ONLY = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{{ m['content'] if loop.last or keep else m['content'].upper() }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@BOTH
def test_template_that_rewrites_history_is_refused(make, tokenizer):
    tokenizer.chat_template = LAST_ONLY
    row = {"prompt": [user("hello")], "completion": [bot()]}
    pair = {"prompt": [user("hello")], "chosen": [bot()], "rejected": [bot("b")]}
    for rows, prepare in (([row], prepare_language), ([pair], prepare_pairs)):
        with pytest.raises(DatasetError, match=r"Row 0 of train.*rewrites earlier messages.*prefix-preserving"):
            list(prepare(make(rows), "train", tokenizer, max_length=None))
        kept = [{**rows[0], "chat_template_kwargs": {"keep": True}}]
        assert list(prepare(make(kept), "train", tokenizer, max_length=None))


def test_assistant_message_is_continued(tokenizer, warnings):
    prompt = [user(), bot("The answer")]
    (row,) = language(mapped([{"prompt": prompt, "completion": [bot(" is 4")]}]), tokenizer)
    assert trained(tokenizer, [row]) == [" is 4<|im_end|>\n"]
    assert texts(tokenizer, [row])[0].endswith("<|im_start|>assistant\nThe answer is 4<|im_end|>\n")
    size = row["loss_mask"].index(1)
    assert row["input_ids"][:size] == render(prompt, tokenizer, {})
    assert not warnings.records


def test_prompt_that_ends_with_an_answer_may_be_followed_by_a_question(tokenizer, warnings):
    completion = [user("why"), bot("so")]
    (row,) = language(mapped([{"prompt": [user(), bot()], "completion": completion}]), tokenizer)
    expected = "<|im_start|>user\nwhy<|im_end|>\n<|im_start|>assistant\nso<|im_end|>\n"
    assert trained(tokenizer, [row]) == [expected]
    assert not warnings.records


def test_any_number_of_completions_is_encoded(tokenizer):
    prompt, completions = encode_completions("q", ["a", "bb", "c"], tokenizer)
    assert tokenizer.decode(prompt) == "q"
    assert [tokenizer.decode(ids) for ids in completions] == ["a<eos>", "bb<eos>", "c<eos>"]


# -- tools and template options ----------------------------------------------------------------------------------------
WITH_TOOLS = "{% if tools %}{{ tools | map(attribute='name') | join(',') }};{% endif %}{{ mood }};" + MARKED


@BOTH
@pytest.mark.parametrize("tools", [[{"name": "f"}], '[{"name": "f"}]'])
def test_tools_and_options_reach_every_call_of_their_row(make, tools, tokenizer, warnings):
    tokenizer.chat_template = WITH_TOOLS
    more = {"tools": tools, "chat_template_kwargs": {"mood": "calm"}}
    start = "f;calm;<|im_start|>user\nq<|im_end|><|im_start|>assistant\n"
    (row,) = language(make([{"prompt": [user()], "completion": [bot()], **more}]), tokenizer)
    assert texts(tokenizer, [row]) == [start + "a<|im_end|>"]
    assert trained(tokenizer, [row]) == ["a<|im_end|>"]
    (row,) = language(make([{"messages": [user(), bot()], **more}]), tokenizer, assistant_only_loss=True)
    assert texts(tokenizer, [row]) == [start + "a<|im_end|>"]
    pairs = [{"prompt": [user()], "chosen": [bot()], "rejected": [bot("b")], **more}]
    (row,) = prepare_pairs(make(pairs), "train", tokenizer, max_length=None)
    assert texts(tokenizer, [row], "prompt_ids") == [start]
    (row,) = prepare_ranked(make(pairs), "train", tokenizer, max_length=None)
    assert texts(tokenizer, [row], "rejected_ids") == [start + "b<|im_end|>"]
    assert not warnings.records


def test_options_are_those_of_the_row(tokenizer):
    tokenizer.chat_template = WITH_TOOLS
    rows = [{"messages": [user()], "chat_template_kwargs": {"mood": mood}} for mood in ("calm", "wild")]
    assert [text[:4] for text in texts(tokenizer, language(mapped(rows), tokenizer))] == ["calm", "wild"]


def test_tools_of_another_form_are_refused_by_row(tokenizer):
    rows = [{"messages": [user()], "tools": tools} for tools in ("[]", "{f}")]
    with pytest.raises(DatasetError, match=r"Row 1 of train has '\{f\}' .* in column 'tools'"):
        language(mapped(rows), tokenizer)


@BOTH
def test_row_the_template_refuses_is_named(make, tokenizer):
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DatasetError, match=r"Row 0 of train does not go through .*roles must alternate"):
        list(language(make([{"messages": [user(), user()]}]), tokenizer))


def test_conversations_need_a_template(tokenizer):
    tokenizer.chat_template = None
    with pytest.raises(DatasetError, match="no chat template"):
        language(mapped([{"messages": [user()]}]), tokenizer)


# -- what is trained on ------------------------------------------------------------------------------------------------
@BOTH
@pytest.mark.parametrize(
    ("columns", "options", "expected"),
    [
        ({"text": "qa"}, {}, "qa<eos>"),
        ({"prompt": "q", "completion": "a"}, {}, "a<eos>"),
        ({"prompt": "q", "completion": "a"}, {"completion_only_loss": True}, "a<eos>"),
        ({"prompt": "q", "completion": "a"}, {"completion_only_loss": False}, "qa<eos>"),
        ({"prompt": [user()], "completion": [bot()]}, {}, "a<|im_end|>"),
        ({"messages": [user(), bot(), user(), bot("b")]}, {"assistant_only_loss": True}, "a<|im_end|>b<|im_end|>"),
        # the intersection: an answer within the prompt, and a question within the completion
        (
            {"prompt": [user(), bot("old"), user()], "completion": [bot(), user("why"), bot("so")]},
            {"assistant_only_loss": True},
            "a<|im_end|>so<|im_end|>",
        ),
        (
            {"prompt": [user(), bot("old"), user()], "completion": [bot()]},
            {"assistant_only_loss": True, "completion_only_loss": False},
            "old<|im_end|>a<|im_end|>",
        ),
    ],
)
def test_loss_mask(make, columns, options, expected, tokenizer):
    tokenizer.chat_template = MARKED
    rows = list(language(make([{**columns, "id": 5}]), tokenizer, **options))
    assert trained(tokenizer, rows) == [expected]
    assert set(rows[0]) == {"input_ids", "loss_mask"}


def test_column_of_text_may_have_another_name(tokenizer):
    assert texts(tokenizer, language(mapped([{"body": "ab"}]), tokenizer, text_field="body")) == ["ab<eos>"]


@BOTH
def test_sharegpt_is_trained_on(make, tokenizer):
    rows = [{"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}]
    same = language(mapped([{"messages": [user(), bot()]}]), tokenizer)
    assert list(language(make(rows), tokenizer)) == list(same)


@BOTH
def test_formatting_function_makes_text_or_messages(make, tokenizer):
    rows = [{"question": "q", "answer": "a"}]
    found = language(make(rows), tokenizer, formatting_func=lambda row: f"{row['question']}={row['answer']}")
    assert texts(tokenizer, found) == ["q=a<eos>"]
    found = language(make(rows), tokenizer, formatting_func=lambda row: [user(row["question"]), bot(row["answer"])])
    assert list(found) == list(language(mapped([{"messages": [user(), bot()]}]), tokenizer))


def test_formatting_function_leaves_the_template_options(tokenizer):
    tokenizer.chat_template = WITH_TOOLS
    rows = mapped([{"question": "q", "tools": '[{"name": "f"}]', "chat_template_kwargs": {"mood": "calm"}}])
    (text,) = texts(tokenizer, language(rows, tokenizer, formatting_func=lambda row: [user(row["question"])]))
    assert text == "f;calm;<|im_start|>user\nq<|im_end|>"


def test_formatting_function_that_makes_something_else_is_refused(tokenizer):
    with pytest.raises(DatasetError, match=r"Row 0 of train has 5 \(int\) in column 'text'"):
        language(mapped([{"a": 1}]), tokenizer, formatting_func=lambda row: 5)


@pytest.mark.parametrize(
    ("row", "options", "named"),
    [
        ({"text": "a"}, {"completion_only_loss": True}, "completion_only_loss=True, but train has no completions"),
        ({"messages": [user()]}, {"completion_only_loss": True}, "completion_only_loss=True"),
        ({"input_ids": [5, 6]}, {"completion_only_loss": True}, "completion_only_loss=True"),
        (
            {"prompt": "a", "completion": "b"},
            {"completion_only_loss": True, "formatting_func": lambda row: "a"},
            "formatting_func makes one text",
        ),
        ({"messages": [user()]}, {"assistant_only_loss": True}, "no {% generation %} markers"),
        ({"text": "abc"}, {"packing": True}, "packing=True needs max_length"),
        ({"text": "abc"}, {"max_length": 4, "packing": True, "packing_strategy": "best"}, "packing_strategy='best'"),
        ({"text": "abc"}, {"truncation_mode": "middle"}, "truncation_mode='middle'"),
    ],
)
def test_options_that_do_not_fit_are_refused(row, options, named, tokenizer):
    with pytest.raises(ConfigError, match=named):
        language(mapped([row]), tokenizer, **options)


def test_assistant_only_loss_needs_messages(tokenizer):
    tokenizer.chat_template = MARKED
    with pytest.raises(ConfigError, match=r"assistant_only_loss=True needs messages, but Row 0 of train"):
        language(mapped([{"text": "a"}]), tokenizer, assistant_only_loss=True)


@BOTH
def test_row_without_assistant_is_refused(make, tokenizer):
    tokenizer.chat_template = MARKED
    rows = [{"messages": [user(), bot()]}, {"messages": [user()]}]
    with pytest.raises(DatasetError, match="Row 1 of train has no assistant token"):
        list(language(make(rows), tokenizer, assistant_only_loss=True))


# -- length ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("limit", "mode", "expected"),
    [
        (None, "keep_start", ([1, 2, 3], [4, 5])),
        (5, "keep_start", ([1, 2, 3], [4, 5])),
        (4, "keep_start", ([1, 2, 3], [4])),
        (3, "keep_start", ([1, 2, 3], [])),
        (2, "keep_start", ([1, 2], [])),
        (5, "keep_end", ([1, 2, 3], [4, 5])),
        (3, "keep_end", ([3], [4, 5])),
        (2, "keep_end", ([], [4, 5])),
        (1, "keep_end", ([], [5])),
    ],
)
def test_cut(limit, mode, expected):
    assert cut([1, 2, 3], [4, 5], limit, mode) == expected


def test_unknown_cut_is_refused_though_nothing_is_cut():
    with pytest.raises(ConfigError, match="truncation_mode='middle'"):
        cut([], [], None, "middle")
    with pytest.raises(ConfigError, match="truncation_mode='middle'"):
        prepare_pairs(mapped([{"text": "a"}]), "t", tiny_tokenizer(), max_length=None, truncation_mode="middle")


@pytest.mark.parametrize(("mode", "expected"), [("keep_start", "cde"), ("keep_end", "ef<eos>")])
def test_language_rows_are_cut(mode, expected, tokenizer):
    found = language(mapped([{"prompt": "c", "completion": "def"}]), tokenizer, max_length=3, truncation_mode=mode)
    assert texts(tokenizer, found) == [expected]
    assert found["loss_mask"][:] == ([[0, 1, 1]] if mode == "keep_start" else [[1, 1, 1]])


ROWS = [{"prompt": "q" * n, "completion": "a"} for n in (1, 5, 2, 9)]


def test_rows_with_nothing_to_train_on_are_left_out_with_one_warning(tokenizer, warnings):
    found = language(mapped(ROWS), tokenizer, max_length=4)
    assert texts(tokenizer, found) == ["qa<eos>", "qqa<eos>"]
    assert [record.message for record in warnings.records] == [
        "2 of 4 rows of train have no token to train on within max_length=4 and are left out. "
        "Raise max_length, or shorten the rows."
    ]


def test_rows_of_a_stream_are_left_out_with_one_warning(tokenizer, warnings):
    assert len(list(language(stream(ROWS), tokenizer, max_length=4))) == 2
    assert len(warnings.records) == 1


def test_first_token_alone_is_nothing_to_train_on(tokenizer, warnings):
    found = language(mapped([{"text": ""}, {"text": "a"}]), tokenizer)
    assert texts(tokenizer, found) == ["a<eos>"]
    assert len(warnings.records) == 1


def test_dataset_without_anything_to_train_on_is_refused(tokenizer):
    with pytest.raises(DatasetError, match=r"4 of 4 rows of train have no token .* max_length=1: nothing is left"):
        language(mapped(ROWS), tokenizer, max_length=1)


def test_nothing_is_warned_of_without_reason(tokenizer, warnings):
    language(mapped(ROWS), tokenizer, max_length=20)
    assert not warnings.records


@pytest.mark.parametrize("strategy", ["bfd", "bfd_split", "wrapped"])
def test_packing_cuts_as_its_strategy_says(strategy, tokenizer):
    found = language(mapped([{"text": "abcdef"}]), tokenizer, max_length=4, packing=True, packing_strategy=strategy)
    assert texts(tokenizer, found) == (["abcd"] if strategy == "bfd" else ["abcd", "ef<eos>"])
    assert ("seq_lengths" in found.column_names) == (strategy != "wrapped")


def test_packing_keeps_the_end_where_that_is_asked_for(tokenizer):
    found = language(mapped([{"text": "abcdef"}]), tokenizer, max_length=4, packing=True, truncation_mode="keep_end")
    assert texts(tokenizer, found) == ["def<eos>"]


# -- tokenised rows ----------------------------------------------------------------------------------------------------
@BOTH
@pytest.mark.parametrize(
    ("more", "options", "expected"),
    [
        ({}, {}, [1, 1, 1, 1]),
        ({"labels": [-100, -100, 7, 8]}, {}, [0, 0, 1, 1]),
        ({"completion_mask": [0, 1, 1, 1]}, {}, [0, 1, 1, 1]),
        ({"completion_mask": [0, 1, 1, 1]}, {"completion_only_loss": False}, [1, 1, 1, 1]),
        ({"completion_mask": [0, 1, 1, 1], "assistant_masks": [1, 1, 0, 1]}, {}, [0, 1, 0, 1]),
        ({"assistant_masks": [0, 1, 0, 1]}, {"assistant_only_loss": True}, [0, 1, 0, 1]),
        ({"loss_mask": [0, 0, 0, 1]}, {}, [0, 0, 0, 1]),
        ({}, {"max_length": 3}, [1, 1, 1]),
        ({"seq_lengths": [3, 1], "loss_mask": [0, 1, 1, 1]}, {"max_length": 3, "packing": True}, [0, 1, 1, 0]),
    ],
)
def test_tokenised_rows_pass(make, more, options, expected, tokenizer):
    (row,) = language(make([{"input_ids": [5, 6, 7, 8], **more, "id": 1}]), tokenizer, **options)
    assert row["loss_mask"] == expected
    assert row["input_ids"] == [5, 6, 7, 8][: len(expected)]
    assert set(row) == {"input_ids", "loss_mask"} | ({"seq_lengths"} & set(more))


@pytest.mark.parametrize(
    ("more", "options", "named"),
    [
        ({"labels": [6, 7]}, {}, "'labels'; expected -100 or the token itself"),
        ({"labels": [-100, 6, 7]}, {}, "'labels'; expected one value for each of 2 input_ids"),
        ({"completion_mask": [1]}, {}, "'completion_mask'"),
        ({}, {"assistant_only_loss": True}, "'assistant_masks'; expected a mask"),
        ({"seq_lengths": [1]}, {}, "'seq_lengths'; expected the sum 2"),
    ],
)
def test_tokenised_row_that_does_not_fit_is_refused(more, options, named, tokenizer):
    with pytest.raises(DatasetError, match=f"Row 0 of train has .* in column {named}"):
        language(mapped([{"input_ids": [5, 6], **more}]), tokenizer, **options)


# -- pairs and ranked rows ---------------------------------------------------------------------------------------------
PAIRS = [{"prompt": "q" * n, "chosen": "a" * n, "rejected": "b", "margin": n, "id": n} for n in (1, 5, 2)]


@BOTH
def test_pairs_are_prepared_uncut(make, tokenizer, warnings):
    rows = list(prepare_pairs(make(PAIRS), "train", tokenizer, max_length=5))
    assert texts(tokenizer, rows, "prompt_ids") == ["q", "qq"]
    assert texts(tokenizer, rows, "chosen_ids") == ["a<eos>", "aa<eos>"]
    assert texts(tokenizer, rows, "rejected_ids") == ["b<eos>"] * 2
    assert [row["margin"] for row in rows] == [1.0, 2.0]
    assert set(rows[0]) == {"prompt_ids", "chosen_ids", "rejected_ids", "margin"}
    assert len(warnings.records) == 1
    ended = prepare_pairs(make(PAIRS), "train", tokenizer, max_length=2, truncation_mode="keep_end")
    assert len(list(ended)) == 3
    assert list(prepare_pairs(make(rows), "train", tokenizer, max_length=2)) == rows[:1]


@BOTH
def test_ranked_rows_that_are_too_long_are_left_out(make, tokenizer, warnings):
    rows = list(prepare_ranked(make(PAIRS), "train", tokenizer, max_length=5))
    assert texts(tokenizer, rows, "chosen_ids") == ["qa<eos>", "qqaa<eos>"]
    assert texts(tokenizer, rows, "rejected_ids") == ["qb<eos>", "qqb<eos>"]
    assert [row["margin"] for row in rows] == [1.0, 2.0]
    assert set(rows[0]) == {"chosen_ids", "rejected_ids", "margin"}
    assert len(warnings.records) == 1
    assert list(prepare_ranked(make(rows), "train", tokenizer, max_length=4)) == rows[:1]


@pytest.mark.parametrize("prepare", [prepare_pairs, prepare_ranked])
def test_pairs_of_which_none_fits_are_refused(prepare, tokenizer):
    with pytest.raises(DatasetError, match=r"3 of 3 rows of train have a .*max_length=1.*nothing is left"):
        prepare(mapped(PAIRS), "train", tokenizer, max_length=1)


@BOTH
def test_implicit_prompt(make, tokenizer):
    rows = [{"prompt": "q", "chosen": [user(), bot()], "rejected": [user(), bot("b")]}]
    given = [{"prompt": [user()], "chosen": [bot()], "rejected": [bot("b")]}]
    for prepare in (prepare_pairs, prepare_ranked):
        found = list(prepare(make(rows), "train", tokenizer, max_length=None))
        assert found == list(prepare(mapped(given), "train", tokenizer, max_length=None))
    plain = list(prepare_pairs(make([{"chosen": "q a", "rejected": "q b"}]), "train", tokenizer, max_length=None))
    assert texts(tokenizer, plain, "prompt_ids") == ["q"]
    assert texts(tokenizer, plain, "chosen_ids") == [" a<eos>"]


@BOTH
@pytest.mark.parametrize(
    ("bad", "named"),
    [
        ({"chosen": "b"}, "has the same text in 'chosen' and 'rejected'"),
        ({"rejected": ""}, "'' .* in column 'rejected'; expected a completion that is not empty"),
        ({"chosen": None}, "None .* in column 'chosen'"),
    ],
)
@pytest.mark.parametrize("prepare", [prepare_pairs, prepare_ranked])
def test_bad_pair_is_refused_by_row(make, bad, named, prepare, tokenizer):
    with pytest.raises(DatasetError, match=f"Row 1 of train .*{named}"):
        list(prepare(make([PAIRS[0], {**PAIRS[0], **bad}]), "train", tokenizer, max_length=None))


@pytest.mark.parametrize("prepare", [prepare_pairs, prepare_ranked])
@pytest.mark.parametrize(("margins", "named"), [([1.0, None], "None"), (["1", "2"], "'1'"), ([True, False], "True")])
def test_margin_that_is_no_number_is_refused(prepare, margins, named, tokenizer):
    rows = [{**PAIRS[0], "margin": margin} for margin in margins]
    with pytest.raises(DatasetError, match=rf"Row \d of train has {named} .* in column 'margin'; expected a finite"):
        prepare(mapped(rows), "train", tokenizer, max_length=None)


# -- how it is mapped --------------------------------------------------------------------------------------------------
def test_stream_is_tokenised_row_by_row(tokenizer):
    read = []

    def rows():
        for i in range(50):
            read.append(i)
            yield {"text": f"row {i}", "id": i}

    found = language(IterableDataset.from_generator(rows), tokenizer)
    assert found.column_names == ["input_ids", "loss_mask"]
    read.clear()
    assert next(iter(found))
    assert len(read) <= 2


def test_later_row_of_a_stream_is_checked_when_it_comes(tokenizer):
    found = iter(language(stream([{"text": "ab"}, {"text": 5}]), tokenizer))
    assert next(found)
    with pytest.raises(DatasetError, match=r"Row 1 of train has 5 \(int\) in column 'text'"):
        next(found)


def test_nothing_is_left_in_the_cache(tokenizer, tmp_path):
    mapped([{"text": "ab"}, {"text": ""}]).save_to_disk(tmp_path / "saved")
    before = sorted(path.name for path in (tmp_path / "saved").iterdir())
    saved = Dataset.load_from_disk(str(tmp_path / "saved"))
    assert len(language(saved, tokenizer, max_length=4, packing=True)) == 1
    assert sorted(path.name for path in (tmp_path / "saved").iterdir()) == before


def test_changed_tokenizer_is_not_answered_from_the_cache(tokenizer):
    dataset = mapped([{"messages": [user()]}])
    before = texts(tokenizer, language(dataset, tokenizer))
    tokenizer.chat_template = MARKED
    assert texts(tokenizer, language(dataset, tokenizer)) != before


def test_rows_may_be_tokenised_by_several_processes(tokenizer):
    dataset = mapped([{"text": f"row {i}"} for i in range(10)])
    assert list(language(dataset, tokenizer, num_proc=2)) == list(language(dataset, tokenizer))


def test_dataset_may_be_formatted_for_torch(tokenizer):
    rows = mapped([{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}]).with_format("torch")
    assert list(language(rows, tokenizer)) == [{"input_ids": [5, 6, 7], "loss_mask": [0, 1, 1]}]
