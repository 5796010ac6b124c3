import pytest
from datasets import Dataset, IterableDataset

from trl_core.data.formats import (
    check_rows,
    dataset_type,
    extract_prompt,
    maybe_convert_to_chatml,
    maybe_extract_prompt,
    maybe_unpair_preference_dataset,
)
from trl_core.data.prompts import template_arguments
from trl_core.errors import DatasetError


def said(role, content):
    return {"role": role, "content": content}


def user(content="q"):
    return said("user", content)


def bot(content="a"):
    return said("assistant", content)


def mapped(rows):
    return Dataset.from_list(rows)


def stream(rows):
    return IterableDataset.from_generator(lambda: iter(rows))


BOTH = pytest.mark.parametrize("make", [mapped, stream])


# -- types -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("columns", "kind"),
    [
        (["text", "id"], "language_modeling"),
        (["messages"], "language_modeling"),
        (["conversations"], "language_modeling"),
        (["prompt", "answer"], "prompt_only"),
        (["prompt", "completion"], "prompt_completion"),
        (["chosen", "rejected"], "preference"),
        (["prompt", "chosen", "rejected", "margin"], "preference"),
        (["prompt", "completion", "label"], "unpaired_preference"),
        (["prompt", "completions", "labels"], "stepwise"),
    ],
)
def test_type_is_told_by_the_columns(columns, kind):
    assert dataset_type(columns) == kind
    assert dataset_type(dict.fromkeys(columns)) == kind


def test_type_is_told_among_the_welcome_ones():
    # Beside its messages this dataset has the first question as a prompt; for SFT that is no prompt-only dataset.
    assert dataset_type(["prompt", "messages"], ("language_modeling", "prompt_completion")) == "language_modeling"
    assert dataset_type(["body"], ("language_modeling",), text_field="body") == "language_modeling"


def test_unknown_type_is_refused_with_the_columns_and_what_is_welcome():
    with pytest.raises(DatasetError, match=r"eval has .*\['chosen'\]; expected .*preference \(chosen \+ rejected\)"):
        dataset_type(["chosen"], ("preference",), "eval")


# -- ShareGPT ----------------------------------------------------------------------------------------------------------
@BOTH
def test_sharegpt_becomes_messages(make):
    names = ["system", "human", "gpt", "observation", "tool", "function", "user", "assistant"]
    rows = [{"id": 1, "conversations": [{"from": name, "value": name} for name in names]}]
    converted = list(maybe_convert_to_chatml(make(rows)))
    roles = ["system", "user", "assistant", "tool", "tool", "tool", "user", "assistant"]
    assert converted == [{"id": 1, "messages": [said(*pair) for pair in zip(roles, names, strict=True)]}]


@BOTH
def test_sharegpt_in_the_columns_of_pairs_is_converted(make):
    def turn(who, value):
        return [{"from": who, "value": value}]

    rows = [{"prompt": turn("human", "q"), "chosen": turn("gpt", "a"), "rejected": turn("gpt", "b")}]
    expected = {"prompt": [user()], "chosen": [bot()], "rejected": [bot("b")]}
    assert list(maybe_convert_to_chatml(make(rows))) == [expected]


@BOTH
def test_other_datasets_are_left_alone(make):
    for rows in ([{"text": "a"}], [{"messages": [user()]}], [{"prompt": "a", "chosen": "b", "rejected": "c"}]):
        dataset = make(rows)
        assert maybe_convert_to_chatml(dataset) is dataset
        assert maybe_extract_prompt(dataset) is dataset
    assert maybe_unpair_preference_dataset(dataset := make([{"text": "a"}])) is dataset


@BOTH
def test_unknown_role_is_named_with_its_row(make):
    rows = [{"conversations": [{"from": name, "value": "a"}]} for name in ("gpt", "moderator")]
    with pytest.raises(DatasetError, match=r"Row 1 of train has 'moderator' .*'conversations'; expected .*human"):
        list(maybe_convert_to_chatml(make(rows), "train"))


# -- implicit prompts --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("The sky is blue.", "The sky is green.", "The sky is"),  # the space stays with the completion
        ("2+2=4", "2+2=5", "2+2="),
        ("yes", "no", ""),
        (" yes", " no", ""),
        ("abc", "abcdef", "ab"),  # no side is left empty
        ("ab c", "ab ", "ab"),
    ],
)
def test_common_start_of_texts_is_the_prompt(chosen, rejected, prompt):
    row = extract_prompt({"chosen": chosen, "rejected": rejected, "id": 3})
    size = len(prompt)
    assert row == {"prompt": prompt, "chosen": chosen[size:], "rejected": rejected[size:], "id": 3}


def test_common_messages_are_the_prompt():
    start = [said("system", "s"), user(), bot(), user("q2")]
    row = extract_prompt({"chosen": [*start, bot("x a")], "rejected": [*start, bot("x b")]})
    assert row == {"prompt": start, "chosen": [bot("x a")], "rejected": [bot("x b")]}


def test_conversation_that_goes_on_keeps_its_last_common_message():
    row = extract_prompt({"chosen": [user(), bot()], "rejected": [user(), bot(), user(), bot()]})
    assert row == {"prompt": [user()], "chosen": [bot()], "rejected": [bot(), user(), bot()]}


@BOTH
def test_prompts_are_extracted_row_by_row(make):
    rows = [{"chosen": f"{i} a", "rejected": f"{i} b", "margin": i} for i in range(3)]
    found = list(maybe_extract_prompt(make(rows)))
    assert found == [{"prompt": str(i), "chosen": " a", "rejected": " b", "margin": i} for i in range(3)]


@BOTH
def test_text_prompt_beside_whole_conversations_is_replaced(make):
    rows = [{"prompt": "q", "chosen": [user(), bot()], "rejected": [user(), bot("b")]}]
    assert next(iter(maybe_extract_prompt(make(rows))))["prompt"] == [user()]


@BOTH
@pytest.mark.parametrize(
    ("chosen", "rejected", "named"),
    [
        ("a b", "a b", "the same text"),
        ([user(), bot()], [user(), bot()], "the same text"),
        ([user("p"), bot()], [user("q"), bot()], "no prompt"),
    ],
)
def test_pair_without_a_difference_or_prompt_is_refused_by_row(make, chosen, rejected, named):
    first = [user(), bot("x")], [user(), bot("y")]
    first = ("x", "y") if isinstance(chosen, str) else first
    rows = [dict(zip(("chosen", "rejected"), pair, strict=True)) for pair in (first, (chosen, rejected))]
    with pytest.raises(DatasetError, match=f"Row 1 of train has {named}"):
        list(maybe_extract_prompt(make(rows), "train"))


# -- unpairing ---------------------------------------------------------------------------------------------------------
@BOTH
def test_unpairing_gives_chosen_first(make):
    rows = [{"prompt": f"{i}", "chosen": f"c{i}", "rejected": f"r{i}", "id": i} for i in range(2)]
    assert list(maybe_unpair_preference_dataset(make(rows))) == [
        {"prompt": "0", "completion": "c0", "label": True, "id": 0},
        {"prompt": "1", "completion": "c1", "label": True, "id": 1},
        {"prompt": "0", "completion": "r0", "label": False, "id": 0},
        {"prompt": "1", "completion": "r1", "label": False, "id": 1},
    ]


@BOTH
def test_unpairing_extracts_implicit_prompts(make):
    found = list(maybe_unpair_preference_dataset(make([{"chosen": "1 a", "rejected": "1 b"}])))
    assert found == [
        {"prompt": "1", "completion": " a", "label": True},
        {"prompt": "1", "completion": " b", "label": False},
    ]


# -- checks ------------------------------------------------------------------------------------------------------------
GOOD = [
    {"text": ""},
    {"messages": [user(), bot()]},
    {"conversations": [{"from": "human", "value": "q"}]},
    {"prompt": "", "completion": "a"},
    {"prompt": [user("")], "completion": [bot()]},
    {"prompt": [user()], "completion": [{**bot(""), "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}]},
    {"chosen": "a", "rejected": "b"},
    {"prompt": "q", "chosen": [user(), bot()], "rejected": [user(), bot("b")]},
    {"prompt": "q", "completion": "a", "label": True},
    {"prompt": "q", "completion": "a", "label": 0},
    {"prompt": "q", "completions": ["a", "b"], "labels": [True, False]},
    {"prompt": [user()]},
]


@BOTH
@pytest.mark.parametrize("row", GOOD, ids=lambda row: "+".join(row))
def test_good_row_passes(make, row):
    assert check_rows(make([row, row]), "train") == dataset_type(row)


BAD = [
    ({"text": None}, r"None \(NoneType\) in column 'text'; expected a string"),
    ({"text": 3}, r"3 \(int\) in column 'text'"),
    ({"messages": []}, r"\[\] \(list\) in column 'messages'; expected a list of"),
    ({"messages": "hello"}, r"'hello' \(str\) in column 'messages'"),
    ({"messages": [{"speaker": "me", "content": "a"}]}, r"speaker.* in column 'messages'"),
    ({"prompt": None, "completion": "a"}, "None .* in column 'prompt'"),
    ({"prompt": "a", "completion": ""}, r"'' \(str\) in column 'completion'; expected a completion that is not empty"),
    ({"prompt": [user()], "completion": [bot("")]}, "in column 'completion'; expected a completion that is not empty"),
    ({"prompt": [user()], "completion": []}, r"\[\] .* in column 'completion'"),
    ({"prompt": "a", "completion": [bot()]}, "text in column 'prompt' and messages in column 'completion'"),
    ({"prompt": "a", "chosen": "b", "rejected": ""}, "'' .* in column 'rejected'"),
    ({"prompt": "a", "chosen": None, "rejected": "b"}, "None .* in column 'chosen'"),
    ({"chosen": "b", "rejected": [bot()]}, "text in column 'chosen' and messages in column 'rejected'"),
    ({"prompt": "a", "completion": "b", "label": None}, "None .* in column 'label'; expected True or False"),
    ({"prompt": "a", "completion": "b", "label": "yes"}, "'yes' .* in column 'label'"),
    ({"prompt": "a", "completions": "b", "labels": [True]}, "'b' .* in column 'completions'"),
    ({"prompt": "a", "completions": ["b"], "labels": [True, False]}, "in column 'labels'; expected one bool per"),
    ({"prompt": "a", "completions": ["b"], "labels": [None]}, "in column 'labels'"),
]


@BOTH
@pytest.mark.parametrize(("row", "named"), BAD, ids=lambda value: value if isinstance(value, str) else "")
def test_bad_row_is_refused_by_column_and_form(make, row, named):
    with pytest.raises(DatasetError, match=f"Row 0 of train has .*{named}") as caught:
        check_rows(make([row]), "train")
    assert caught.value.mend


def test_every_row_is_checked_of_a_stream_the_first():
    rows = [{"text": "a"}, {"text": "b"}, {"text": None}]
    with pytest.raises(DatasetError, match="Row 2 of train"):
        check_rows(mapped(rows), "train")
    assert check_rows(stream(rows), "train") == "language_modeling"


def test_rows_are_checked_whatever_their_format():
    assert check_rows(mapped([{"prompt": "a", "completion": "b", "label": True}]).with_format("torch"), "train")


@BOTH
def test_empty_dataset_is_refused(make):
    with pytest.raises(DatasetError, match="train is empty"):
        check_rows(make([]), "train")


@pytest.mark.parametrize("given", [None, [{"text": "a"}], {"text": ["a"]}])
def test_what_is_no_dataset_is_refused(given):
    with pytest.raises(DatasetError, match=r"train is a .*; expected a datasets\.Dataset"):
        check_rows(given, "train")


# -- template arguments ------------------------------------------------------------------------------------------------
def test_tools_may_be_a_json_string():
    tools = [{"type": "function", "function": {"name": "f"}}]
    as_text = template_arguments({"tools": '[{"type": "function", "function": {"name": "f"}}]'})
    assert as_text == template_arguments({"tools": tools}) == {"tools": tools}
    assert template_arguments({"tools": "[]"}) == template_arguments({"tools": None}) == {}


def test_keys_that_only_other_rows_have_are_no_arguments():
    rows = mapped([{"chat_template_kwargs": {"a": 1}}, {"chat_template_kwargs": {"b": 2}}])
    assert [template_arguments(row) for row in rows] == [{"a": 1}, {"b": 2}]


@pytest.mark.parametrize(
    ("row", "named"),
    [
        ({"tools": "{not json"}, "Row 3 has '{not json' .* 'tools'; expected a list of tools, or the JSON"),
        ({"tools": '{"name": "f"}'}, r"Row 3 has .*\(dict\) in column 'tools'"),
        ({"chat_template_kwargs": "a=1"}, "Row 3 has 'a=1' .* 'chat_template_kwargs'"),
    ],
)
def test_argument_of_another_form_is_refused(row, named):
    with pytest.raises(DatasetError, match=named):
        template_arguments(row, "Row 3")
