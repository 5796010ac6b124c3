"""No public name of TRL falls through, and every home exists."""

import dataclasses
import importlib
from pathlib import Path

import pytest

from trl_core.migration import table, table_of_homeless
from trl_core.migration.names import (
    AMBIGUITY,
    AMBIGUOUS,
    HOMELESS,
    HOMES,
    UNKNOWN,
    Home,
    Homeless,
    is_module,
    look_up,
)
from trl_core.migration.options import accepted

# Public names of TRL 0.7, 0.11, 0.24, 1.0, 1.12 and 1.16, one a line: release and qualified name.
LISTED = [line.split() for line in (Path(__file__).parent / "migration" / "trl_names.txt").read_text().splitlines()]
OURS = sorted({entry.partition("=")[2] or entry for _, _, names in HOMES for entry in names.split()})


def test_the_list_has_all_releases():
    counts = {release: sum(of == release for of, _ in LISTED) for release in {of for of, _ in LISTED}}
    assert set(counts) == {"0.7", "0.11", "0.24", "1.0", "1.12", "1.16"}
    assert min(counts.values()) > 50


def test_every_listed_name_has_a_home_or_a_reason():
    assert not [name for _, name in LISTED if look_up(name) is UNKNOWN]
    assert not [name for _, name in LISTED if is_module(name)], "taken for a module, so never looked up"
    found = [look_up(name) for _, name in LISTED]
    assert all(why.why and why.instead for why in found if isinstance(why, Homeless))
    assert {Home, Homeless} == {type(one) for one in found}


def test_an_unknown_name_has_a_reason_too():
    assert look_up("trl.NeverHeardOf") is UNKNOWN
    assert look_up("trl.experimental.never.HeardOf") is UNKNOWN
    assert UNKNOWN.why
    assert UNKNOWN.instead


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("trl.GRPOTrainer", "trl_core.GRPOTrainer"),
        ("trl.trainer.grpo_trainer.GRPOTrainer", "trl_core.GRPOTrainer"),
        ("trl.experimental.gspo_token.GRPOTrainer", "trl_gspo.GRPOTrainer"),
        ("trl.experimental.gspo_token.grpo_trainer.GRPOTrainer", "trl_gspo.GRPOTrainer"),
        ("trl.experimental.gfpo.GFPOConfig", "trl_gfpo.GFPOConfig"),
        ("trl.experimental.bema_for_ref_model.DPOTrainer", "trl_bema.DPOTrainer"),
        ("trl.DPOTrainer", "trl_core.DPOTrainer"),
        ("trl.BEMACallback", "trl_bema.BEMACallback"),
        (
            "trl.experimental.grpo_with_replay_buffer.GRPOWithReplayBufferConfig",
            "trl_replay.GRPOWithReplayBufferConfig",
        ),
        ("trl.core.respond_to_batch", "trl_ppo.classic.respond_to_batch"),
        ("trl.experimental.ppo.PPOTrainer", "trl_ppo.PPOTrainer"),
        ("trl.trainer.utils.disable_dropout_in_model", "trl_core.models.disable_dropout"),
        ("trl.core.set_seed", "transformers.set_seed"),
    ],
)
def test_homes(theirs, ours):
    home = look_up(theirs)
    assert f"{home.module}.{home.name}" == ours


def test_ppo_is_ambiguous_until_the_file_decides():
    for name in AMBIGUOUS:
        assert look_up(f"trl.{name}") is AMBIGUITY
        assert look_up(f"trl.trainer.{name}", "classic") == Home("trl_ppo.classic", name)
        assert look_up(f"trl.{name}", "later") == Home("trl_ppo", name)


@pytest.mark.filterwarnings("ignore::trl_core.errors.TRLExperimentalWarning")
def test_every_home_exists():
    homes = [
        home for _, name in LISTED for which in ("classic", "later") if isinstance(home := look_up(name, which), Home)
    ]
    assert {home.name for home in homes} >= set(OURS)
    missing = [home for home in set(homes) if not hasattr(importlib.import_module(home.module), home.name)]
    assert not missing


def test_no_name_is_listed_twice():
    mapped = [f"{old}.{entry.partition('=')[0]}" for old, _, names in HOMES for entry in names.split()]
    without = [name for _, _, names in HOMELESS for name in names.split()]
    assert len(mapped) == len(set(mapped))
    assert len(without) == len(set(without))
    assert not {name.rpartition(".")[2] for name in mapped} & set(without)


@pytest.mark.filterwarnings("ignore::trl_core.errors.TRLExperimentalWarning")
def test_options_are_those_of_the_class_that_is_installed():
    config = Home("trl_gfpo", "GFPOConfig")
    fields = {f.name for f in dataclasses.fields(importlib.import_module("trl_gfpo").GFPOConfig) if f.init}
    assert accepted(config) == fields
    assert {"group_filter_func", "reward_funcs", "args"} <= accepted(Home("trl_gfpo", "GFPOTrainer"))
    assert "data_collator" not in accepted(Home("trl_core", "SFTTrainer"))
    assert {"config", "tokenizer"} <= accepted(Home("trl_ppo.classic", "PPOTrainer"))
    assert {"update_freq", "device"} <= accepted(Home("trl_bema", "BEMACallback"))
    assert accepted(Home("trl_of_nobody", "SFTConfig")) is None


def test_tables_name_everything():
    assert all(f"`{new}`" in table() for _, new, _ in HOMES)
    assert all(f"`{name}`" in table_of_homeless() for _, _, names in HOMELESS for name in names.split())
    for rows in (table(), table_of_homeless()):
        assert {line.count(" | ") for line in rows.split("\n")} == {2}
