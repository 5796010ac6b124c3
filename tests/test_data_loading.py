import json

import pytest
from datasets import Dataset, DatasetDict

from trl_core.data import loading
from trl_core.data.loading import load
from trl_core.errors import DatasetError

ROWS = [{"prompt": "a", "n": 1}, {"prompt": "b", "n": 2}]


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))


def write(path, rows=ROWS):
    dataset = Dataset.from_list(rows)
    writers = {".json": dataset.to_json, ".jsonl": dataset.to_json, ".csv": dataset.to_csv}
    writers.get(path.suffix, dataset.to_parquet)(path)
    return str(path)


# -- what is read ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "rows.csv", "rows.parquet"])
def test_file_gives_its_rows(tmp_path, name):
    assert load(write(tmp_path / name)).to_list() == ROWS


def test_json_array_gives_its_rows(tmp_path):
    (tmp_path / "rows.json").write_text(json.dumps(ROWS))
    assert load(str(tmp_path / "rows.json")).to_list() == ROWS


def test_folder_of_files_gives_its_rows(tmp_path):
    (tmp_path / "data").mkdir()
    write(tmp_path / "data" / "train.jsonl")
    assert load(str(tmp_path / "data")).to_list() == ROWS


def test_folder_of_save_to_disk_gives_its_rows(tmp_path):
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    assert load(str(tmp_path / "saved")).to_list() == ROWS


def test_path_with_a_colon_is_a_path(tmp_path):
    assert load(write(tmp_path / "a:b.jsonl")).to_list() == ROWS


def test_slice_of_a_file_gives_those_rows(tmp_path):
    assert load(write(tmp_path / "rows.jsonl") + ":train[1:]").to_list() == ROWS[1:]


def test_hub_id_is_passed_on_with_split_and_config(monkeypatch):
    asked = []
    monkeypatch.setattr(loading, "load_dataset", lambda *args, **options: asked.append((args, options)))
    load("owner/name:validation", "main")
    assert asked == [(("owner/name", "main"), {"split": "validation"})]


# -- splits ------------------------------------------------------------------------------------------------------------
@pytest.fixture
def several(tmp_path):
    parts = {name: Dataset.from_list([{"prompt": name}]) for name in ("train", "test", "extra")}
    DatasetDict(parts).save_to_disk(tmp_path / "several")
    return str(tmp_path / "several")


def test_train_is_taken_of_several_splits(several):
    assert load(several)["prompt"][:] == ["train"]


def test_default_names_the_split_to_take(several):
    assert load(several, default="test")["prompt"][:] == ["test"]


def test_named_split_is_taken(several):
    assert load(f"{several}:extra")["prompt"][:] == ["extra"]


def test_only_split_is_taken_whatever_its_name(tmp_path):
    DatasetDict({"extra": Dataset.from_list(ROWS)}).save_to_disk(tmp_path / "one")
    assert load(str(tmp_path / "one")).to_list() == ROWS


def test_missing_split_is_refused_with_those_there_are(several):
    with pytest.raises(DatasetError, match="no split 'tset'; it has: train, test, extra"):
        load(f"{several}:tset")


# -- refusals ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["nowhere.jsonl", "./nowhere", "/nowhere/at/all", "nowhere.parquet:train"])
def test_missing_path_is_refused_without_asking_the_hub(name, monkeypatch):
    monkeypatch.setattr(loading, "load_dataset", lambda *_, **__: pytest.fail("asked for"))
    with pytest.raises(DatasetError, match="is no dataset file or folder"):
        load(name)


def test_file_of_another_kind_is_refused_with_the_known_endings(tmp_path):
    (tmp_path / "rows.xlsx").touch()
    with pytest.raises(DatasetError, match=r"rows\.xlsx.*\.jsonl"):
        load(str(tmp_path / "rows.xlsx"))


@pytest.mark.parametrize(("name", "content"), [("a.jsonl", '{"prompt": "a"\n{'), ("a.parquet", "text"), ("a.json", "")])
def test_damaged_file_is_refused_by_name(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    with pytest.raises(DatasetError, match=rf"{name}' cannot be read"):
        load(str(tmp_path / name))
