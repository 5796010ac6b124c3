import json

import pytest
import yaml
from datasets import Dataset, DatasetDict

from trl_core.data import loading
from trl_core.data.loading import load_mixture
from trl_core.errors import ConfigError, DatasetError


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    for name, size in (("a", 3), ("b", 60)):
        rows = [{"prompt": f"{name}{i}", "n": i} for i in range(size)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def prompts(mixture, split="train"):
    return [row["prompt"] for row in mixture[split]]


def test_entries_follow_one_another():
    mixture = load_mixture(yaml.safe_load("datasets: [{path: a.jsonl}, {path: b.jsonl, split: 'train[:2]'}]"))
    assert prompts(mixture) == ["a0", "a1", "a2", "b0", "b1"]
    assert set(mixture) == {"train"}


def test_columns_are_kept_that_are_named():
    mixture = load_mixture({"datasets": [{"path": "a.jsonl", "columns": ["prompt"]}]})
    assert mixture["train"].column_names == ["prompt"]


def test_data_files_name_config_and_folder_are_passed_on(monkeypatch):
    asked = []

    def load_dataset(*args, **options):
        asked.append((args, options))
        return Dataset.from_list([{"prompt": "a"}])

    monkeypatch.setattr(loading, "load_dataset", load_dataset)
    entry = {"path": "owner/name", "name": "main", "data_files": ["x.json"], "data_dir": "d", "split": "test"}
    load_mixture({"datasets": [entry]})
    assert asked == [(("owner/name", "main"), {"split": "test", "data_files": ["x.json"], "data_dir": "d"})]


def test_builder_with_data_files_is_read():
    mixture = load_mixture({"datasets": [{"path": "json", "data_files": ["a.jsonl"]}]})
    assert prompts(mixture) == ["a0", "a1", "a2"]


def test_weights_are_the_proportions_drawn(folder):
    (folder / "c.jsonl").write_text("\n".join(json.dumps({"prompt": f"c{i}", "n": i}) for i in range(400)))
    entries = [{"path": "b.jsonl", "weight": 1}, {"path": "c.jsonl", "weight": 3}]
    drawn = prompts(load_mixture({"datasets": entries}))
    assert drawn == prompts(load_mixture({"datasets": entries, "seed": 0}))
    assert drawn != prompts(load_mixture({"datasets": entries, "seed": 1}))
    b, c = (sum(prompt[0] == name for prompt in drawn) for name in "bc")
    assert b == 60  # the first that is used up ends it
    assert 2 < c / b < 4
    everything = prompts(load_mixture({"datasets": entries, "stopping_strategy": "all_exhausted"}))
    assert len(set(everything)) == 460


def test_stream_stays_a_stream(folder):
    Dataset.from_list([{"prompt": "c0", "n": 0}]).save_to_disk(folder / "saved")
    mixture = load_mixture({"datasets": [{"path": "a.jsonl"}, {"path": "saved"}], "streaming": True})
    assert type(mixture["train"]).__name__ == "IterableDataset"
    assert prompts(mixture) == ["a0", "a1", "a2", "c0"]


def test_split_of_a_saved_dataset_is_taken(folder):
    parts = {name: Dataset.from_list([{"prompt": name}]) for name in ("train", "extra")}
    DatasetDict(parts).save_to_disk(folder / "several")
    assert prompts(load_mixture({"datasets": [{"path": "several", "split": "extra"}, {"path": "several"}]})) == [
        "extra",
        "train",
    ]


@pytest.mark.parametrize(("size", "rows"), [(0.2, 12), (5, 5)])
def test_part_is_set_aside_for_the_test(size, rows):
    mixture = load_mixture({"datasets": [{"path": "b.jsonl"}], "test_split_size": size})
    assert len(mixture["test"]) == rows
    assert sorted(prompts(mixture) + prompts(mixture, "test")) == sorted(f"b{i}" for i in range(60))


A, B = {"path": "a.jsonl"}, {"path": "b.jsonl"}


@pytest.mark.parametrize(
    ("spec", "error", "named"),
    [
        ({}, ConfigError, "expected a mapping with 'datasets'"),
        ({"datasets": []}, ConfigError, "expected a mapping with 'datasets'"),
        ({"datasets": A}, ConfigError, "no list of entries"),
        ({"datasets": [A], "stream": True}, ConfigError, "stream"),
        ({"datasets": [A, "b.jsonl"]}, ConfigError, r"datasets\[1\] is 'b.jsonl'"),
        ({"datasets": [A, {"name": "x"}]}, ConfigError, r"datasets\[1\].*'path'"),
        ({"datasets": [A, {**B, "colums": ["n"]}]}, ConfigError, r"datasets\[1\].*colums"),
        ({"datasets": [A, {"path": "c.jsonl"}]}, DatasetError, r"datasets\[1\]: 'c.jsonl' is no dataset file"),
        ({"datasets": [A, {**B, "split": "test"}]}, DatasetError, r"datasets\[1\]: .*b.jsonl.*test"),
        ({"datasets": [A, {**B, "columns": ["m"]}]}, DatasetError, r"datasets\[1\] \(b.jsonl\) lacks .*'m'"),
        ({"datasets": [{**A, "weight": 1}, B]}, ConfigError, r"\[1, None\]"),
        ({"datasets": [{**A, "weight": 1}, {**B, "weight": 0}]}, ConfigError, r"\[1, 0\]"),
        ({"datasets": [A], "streaming": True, "test_split_size": 1}, ConfigError, "test_split_size=1"),
        ({"datasets": [A], "test_split_size": 9}, DatasetError, "cannot be mixed"),
    ],
)
def test_mistake_is_refused_by_entry(spec, error, named):
    with pytest.raises(error, match=named):
        load_mixture(spec)


def test_columns_of_other_types_are_named(folder):
    (folder / "c.jsonl").write_text('{"prompt": ["c"], "n": 1}')
    with pytest.raises(DatasetError, match=r"cannot be mixed.*datasets\[1\]: \['prompt', 'n'\]"):
        load_mixture({"datasets": [A, {"path": "c.jsonl"}]})


def test_entries_with_other_columns_are_refused(tmp_path):
    paths = []
    for name, row in (("a", {"prompt": "q", "completion": "c"}), ("b", {"text": "t"})):
        paths.append(tmp_path / f"{name}.jsonl")
        paths[-1].write_text(json.dumps(row) + "\n", encoding="utf-8")
    with pytest.raises(DatasetError, match=r"columns differ: datasets\[0\]: .*prompt.*; datasets\[1\]: \['text'\]"):
        load_mixture({"datasets": [{"path": str(path)} for path in paths]})
