import json
import re

import pytest

from trl_core.cli.main import main


@pytest.fixture
def info(capsys):
    """Run `trl-core info` and return what it prints; each line of a table as a list of cells, by title."""

    def run(*arguments):
        assert main(["info", *arguments]) == 0
        return capsys.readouterr().out

    return run


@pytest.fixture
def record(info):
    return lambda *arguments: json.loads(info(*arguments, "--json"))


def tables(text):
    found, title = {}, None
    for line in text.splitlines():
        if line.endswith(":") and not line.startswith(" "):
            title = line[:-1]
        elif title and line.strip(" ─"):
            found.setdefault(title, []).append(re.split(r"\s{2,}", line.strip()))
    return found


# -- what is shown -----------------------------------------------------------------------------------------------------
def test_info_shows_each_part_with_its_distribution_and_tag(info):
    (parts,) = [rows for title, rows in tables(info("gfpo")).items() if title.startswith("Algorithms")]
    assert parts[0] == ["algorithm", "distribution", "version", "stability"]
    assert [(row[0], row[1], row[3]) for row in parts[1:]] == [
        ("grpo", "trl-core", "stable"),
        ("gfpo", "trl-gfpo", "experimental"),
    ]


def test_info_shows_an_option_with_type_default_and_help(info):
    rows = tables(info("grpo"))["Options of grpo"]
    assert rows[0] == ["option", "type", "default", "help"]
    assert ["beta", "float", "0.0", "Weight of the KL term; 0 loads no reference model. At least 0."] in rows


def test_info_puts_options_under_who_defines_them(record):
    options = record("gfpo")["options"]
    owners = {option["option"]: owner for owner, options in options.items() for option in options}
    assert list(options) == ["gfpo", "grpo", "trainer"]
    assert owners["num_remains_in_group"] == owners["k_easy"] == "gfpo"
    assert owners["loss_type"] == owners["learning_rate"] == "grpo"
    assert owners["temperature"] == owners["logging_steps"] == "trainer"


def test_info_shows_a_default_that_is_a_list(info, record):
    rows = tables(info("dpo"))["Options of dpo"]
    assert ["loss_type", "list[str] | str", "['sigmoid']"] in [row[:3] for row in rows]
    (found,) = [option for option in record("dpo")["options"]["dpo"] if option["option"] == "loss_type"]
    assert found["default"] == ["sigmoid"]


@pytest.mark.parametrize(
    ("name", "own", "shared"),
    [
        ("sft", "packing", "padding_free"),
        ("reward", "center_rewards_coefficient", "max_length"),
        ("dpo", "loss_weights", "precompute_ref_log_probs"),
        ("bema", "ema_power", "sync_ref_model"),
    ],
)
def test_info_of_an_offline_algorithm_shows_its_options(name, own, shared, record):
    options = record(name)["options"]
    owners = {option["option"]: owner for owner, found in options.items() for option in found}
    assert owners[own] == name
    assert owners[shared] == ("reward" if (name, shared) == ("reward", "max_length") else "trainer")
    hook = "loss_terms" if name == "sft" else "pair_loss"
    assert record(name)["hooks"][hook][0][0] == ("dpo" if name == "bema" else name)


def test_info_leaves_out_the_options_of_transformers(info):
    text = info("grpo")
    assert "warmup_steps" not in text
    assert re.search(r"\d+ options of transformers.TrainingArguments are not shown", text)


def test_info_all_shows_the_options_of_transformers(info):
    text = info("grpo", "--all")
    assert ["weight_decay", "float"] in [row[:2] for row in tables(text)["Options of transformers.TrainingArguments"]]
    assert "not shown" not in text


def test_info_shows_the_arguments_of_the_trainer(info):
    rows = tables(info("gfpo"))["Arguments of the trainer"]
    assert [row[0] for row in rows] == ["argument", "group_filter_func"]


def test_info_without_arguments_has_no_table_of_them(info):
    assert "Arguments of the trainer" not in info("grpo")


def test_info_shows_who_acts_in_a_hook_from_the_base_outwards(info):
    (rows,) = [rows for title, rows in tables(info("gfpo")).items() if title.startswith("Hooks")]
    hooks = dict(row for row in rows[1:] if len(row) == 2)
    assert hooks["log_ratio"] == "grpo provides"
    assert hooks["advantages"] == "grpo provides, gfpo refines"
    assert hooks["keep"] == "gfpo contributes"


def test_info_shows_the_trainer_where_no_algorithm_provides_a_step(record):
    assert record("grpo")["hooks"]["generate"] == [["trainer", "provide"]]


def test_info_does_not_show_the_trainer_where_an_algorithm_provides_the_step(record):
    assert record("grpo")["hooks"]["log_ratio"] == [["grpo", "provide"]]


# -- json --------------------------------------------------------------------------------------------------------------
def test_json_holds_what_the_tables_hold(record):
    found = record("gfpo")
    assert found["name"] == "gfpo"
    assert [part["algorithm"] for part in found["parts"]] == ["grpo", "gfpo"]
    assert found["arguments"][0]["argument"] == "group_filter_func"
    (reward_weights,) = [o for o in found["options"]["trainer"] if o["option"] == "reward_weights"]
    assert (reward_weights["type"], reward_weights["default"]) == ("list[float] | None", None)


def test_json_all_holds_every_option_of_the_config(record):
    import dataclasses

    from trl_core import get_config

    options = [option["option"] for options in record("gfpo", "--all")["options"].values() for option in options]
    assert sorted(options) == sorted(f.name for f in dataclasses.fields(get_config("gfpo")))


# -- refusals ----------------------------------------------------------------------------------------------------------
def test_unknown_algorithm_fails_with_a_suggestion(capsys):
    assert main(["info", "gfop"]) == 2
    output = capsys.readouterr()
    assert "gfpo" in output.err and "Traceback" not in output.err
    assert output.out == ""
