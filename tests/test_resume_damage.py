"""Damaged checkpoints: each is refused by name, or an older one is taken and that is said; nothing is silent."""

import hashlib
import json
import os
import shutil

import pytest

from trl_core.errors import CheckpointError
from trl_core.training.state import STATE_FILE

from .helpers_offline import make_trainer, pairs

MANIFEST = STATE_FILE
FILES = [
    "model.safetensors",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "trainer_state.json",
    "reference.safetensors",
    "trl_core_state.safetensors",
    "config.json",
    "tokenizer.json",
    "training_args.json",
]


# -- the kinds of damage: each changes one thing in a checkpoint ------------------------------------------------------
def flipped(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def garbage(file):
    size = file.stat().st_size
    file.write_bytes((hashlib.sha256(file.name.encode()).digest() * (size // 32 + 1))[:size])


def cut(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def emptied(file):
    file.write_bytes(b"")


def longer(file):
    file.write_bytes(file.read_bytes() + b"\n")


def gone(file):
    file.unlink()


def folder_instead(file):
    file.unlink()
    file.mkdir()


def dangling(file):
    file.unlink()
    file.symlink_to(file.with_name("nowhere"))


def loop(file):
    file.unlink()
    file.symlink_to(file.name)


def pipe(file):
    file.unlink()
    os.mkfifo(file)


def evil(file):
    """A pickle of the same length that would run code."""
    size = file.stat().st_size
    content = b"cos\nsystem\n(S'touch /tmp/ran'\ntR."
    file.write_bytes(content + b"\0" * (size - len(content)))


def manifest(change):
    """A manifest that somebody wrote by hand: without the checksum it would be believed."""

    def damage(file):
        record = json.loads(file.read_text())
        text = change(record)
        file.write_text(text if isinstance(text, str) else json.dumps(record if text is None else text))

    return damage


def without(*keys):
    return manifest(lambda record: {k: v for k, v in record.items() if k not in keys})


def other(key, value):
    return manifest(lambda record: {**record, key: value})


def old_form(change=lambda files: files):
    """As an earlier version wrote it, with sizes alone; changed."""

    def rewritten(record):
        record = {
            key: record[key] for key in ("trl_core", "composition", "options", "state", "save_only_model", "files")
        }
        record["files"] = change({name: entry["size"] for name, entry in record["files"].items()})
        return record

    return manifest(rewritten)


OF_ANY_FILE = (flipped, garbage, cut, emptied, longer, gone, folder_instead, dangling)
DAMAGE = {f"{kind.__name__}: {name}": (name, kind) for name in FILES for kind in (flipped, garbage, gone)}
DAMAGE |= {f"{kind.__name__}: {name}": (name, kind) for name in [*FILES[:2], MANIFEST] for kind in OF_ANY_FILE}
del DAMAGE[f"longer: {MANIFEST}"]  # a line end more changes nothing
DAMAGE |= {f"{kind.__name__}: {name}": (name, kind) for name in ("optimizer.pt", MANIFEST) for kind in (loop, pipe)}
DAMAGE |= {f"evil: {name}": (name, evil) for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth")}
DAMAGE |= {
    f"manifest, {name}": (MANIFEST, damage)
    for name, damage in {
        "without state": without("state"),
        "without composition": without("composition"),
        "without options": without("options"),
        "without files": without("files"),
        "without its checksum": without("checksum"),
        "without format": without("format"),
        "without format and checksum": without("format", "checksum"),
        "without step": without("step"),
        "a list": manifest(lambda record: "[]"),
        "null": manifest(lambda record: "null"),
        "a number": manifest(lambda record: "17"),
        "a huge number": manifest(lambda record: "9" * 5000),
        "nan": manifest(lambda record: "NaN"),
        "deep": manifest(lambda record: "[" * 100_000),
        "empty object": manifest(lambda record: "{}"),
        "binary": lambda file: file.write_bytes(bytes(range(256)) * 8),
        "utf-16": lambda file: file.write_text(file.read_text(), encoding="utf-16"),
        "another step": other("step", 1),
        "a step of text": other("step", "2"),
        "format of text": other("format", "2"),
        "format nan": other("format", float("nan")),
        "format true": other("format", True),
        "later format": other("format", 99),
        "files a list": other("files", []),
        "files empty": other("files", {}),
        "options a list": other("options", [1]),
        "state null": other("state", None),
        "composition of numbers": other("composition", [1, 2]),
        "changed option": manifest(lambda record: record["options"].update(learning_rate=0.5)),
        "changed state": manifest(lambda record: record["state"].update(num_tokens=0)),
        "file outside": manifest(lambda record: record["files"].update({"../x": {"size": 1, "sha256": ""}})),
        "absolute file": manifest(lambda record: record["files"].update({"/etc/passwd": {"size": 1, "sha256": ""}})),
        "old form without the model": old_form(lambda files: files.pop("trainer_state.json") and files),
        "old form, a file outside": old_form(lambda files: {**files, "../x": 1}),
        "old form, a size of text": old_form(lambda files: {**files, "model.safetensors": "17"}),
        "old form, a long name": old_form(lambda files: {**files, "x" * 5000: 1}),
        "old form, a name with a zero": old_form(lambda files: {**files, "a\0b": 1}),
        "old form, composition null": manifest(lambda record: {**record, "composition": None, "files": {}}),
    }.items()
}
QUICK = (
    "flipped: model.safetensors",
    "garbage: optimizer.pt",
    "gone: reference.safetensors",
    "folder_instead: trl_core_state.json",
    "pipe: trl_core_state.json",
    "evil: rng_state.pth",
    "manifest, without state",
    "manifest, deep",
    "manifest, another step",
    "manifest, without format and checksum",
    "manifest, later format",
    "manifest, old form, a file outside",
)


# -- the runs ---------------------------------------------------------------------------------------------------------
def made(folder, **options):
    return make_trainer(folder, "DPO", {"train_dataset": lambda: pairs(4)}, **{"max_steps": 2, **options})


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run with checkpoints after steps 1 and 2, and its trainer."""
    folder = tmp_path_factory.mktemp("whole")
    trainer = made(folder, save_strategy="steps", save_steps=1)
    trainer.train()
    return folder, trainer


@pytest.fixture(scope="module")
def resumer(tmp_path_factory):
    """One trainer that all cases share: a run that is refused leaves nothing behind."""
    return made(tmp_path_factory.mktemp("resumed"), max_steps=3)


def test_there_are_enough_kinds():
    assert len(DAMAGE) >= 80 and set(QUICK) <= DAMAGE.keys()


@pytest.mark.parametrize("kind", [k if k in QUICK else pytest.param(k, marks=pytest.mark.slow) for k in DAMAGE])
def test_damage_is_named_and_an_older_checkpoint_taken(kind, whole, resumer, tmp_path, caplog):
    name, damage = DAMAGE[kind]
    folder = shutil.copytree(whole[0], tmp_path / "copy")
    damage(folder / "checkpoint-2" / name)
    with pytest.raises(CheckpointError) as refused:
        resumer.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    assert "'checkpoint-2'" in refused.value.what
    assert name in refused.value.what or name == MANIFEST
    resumer.args.output_dir = str(folder)
    resumer.train(resume_from_checkpoint=True)
    assert resumer._resume[0] == str(folder / "checkpoint-1") and resumer.state.global_step == 3
    assert "checkpoint-1 is resumed, because later ones cannot be" in caplog.text
    assert refused.value.what in caplog.text
    assert not os.path.exists("/tmp/ran")


def test_all_damaged_are_listed(whole, resumer, tmp_path):
    folder = shutil.copytree(whole[0], tmp_path / "copy")
    flipped(folder / "checkpoint-2" / "model.safetensors")
    cut(folder / "checkpoint-1" / "optimizer.pt")
    resumer.args.output_dir = str(folder)
    with pytest.raises(CheckpointError) as refused:
        resumer.train(resume_from_checkpoint=True)
    told = refused.value.what
    assert "model.safetensors of 'checkpoint-2' is damaged" in told
    assert "optimizer.pt of 'checkpoint-1' has" in told and "no complete checkpoint" in told


def test_what_a_person_may_do_to_a_checkpoint(whole, resumer, tmp_path, caplog):
    folder = shutil.copytree(whole[0], tmp_path / "copy")
    (folder / "checkpoint-2" / "README.md").write_text("A better text.")
    (folder / "checkpoint-2" / "notes.txt").write_text("Looks good.")
    record = json.loads((folder / "checkpoint-2" / MANIFEST).read_text())
    (folder / "checkpoint-2" / MANIFEST).write_text(json.dumps(record, indent=4, sort_keys=True))
    for given in (str(folder / "checkpoint-2"), folder / "checkpoint-2", True):
        resumer.args.output_dir = str(folder)
        resumer.train(resume_from_checkpoint=given)
        assert resumer._resume[0] == str(folder / "checkpoint-2")
    (folder / "checkpoint-2" / "README.md").unlink()
    (folder / "best").symlink_to("checkpoint-2")
    resumer.train(resume_from_checkpoint=str(folder / "best"))
    assert resumer.state.global_step == 3 and not caplog.records


def test_renamed_checkpoint_counts_by_its_step(whole, resumer, tmp_path):
    folder = shutil.copytree(whole[0], tmp_path / "copy")
    (folder / "checkpoint-1").rename(folder / "checkpoint-9")
    resumer.args.output_dir = str(folder)
    resumer.train(resume_from_checkpoint=True)
    assert resumer._resume[0] == str(folder / "checkpoint-2")
    (folder / "checkpoint-2").rename(folder / "best")
    for name, step in {"best": 2, "checkpoint-9": 1}.items():
        resumer.train(resume_from_checkpoint=str(folder / name))
        losses = [line["step"] for line in resumer.state.log_history if "loss" in line]
        assert losses[:step] == list(range(1, step + 1)) and losses[-1] == 3
    # The step that a name promises is still written by the run that reaches it.
    again = made(folder, max_steps=3, save_strategy="steps", save_steps=1)
    again.train(resume_from_checkpoint=str(folder / "checkpoint-9"))
    assert {path.name for path in folder.glob("checkpoint-*")} >= {"checkpoint-2", "checkpoint-3"}


def test_checkpoint_of_an_earlier_version_is_resumed_with_a_warning(whole, resumer, tmp_path, caplog):
    folder = shutil.copytree(whole[0], tmp_path / "copy")
    old_form()(folder / "checkpoint-2" / MANIFEST)
    record = json.loads((folder / "checkpoint-2" / MANIFEST).read_text())
    record["options"] = {name: record["options"][name] for name in ("beta", "loss_type", "seed")}
    (folder / "checkpoint-2" / MANIFEST).write_text(json.dumps(record))
    resumer.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    (line,) = [line for line in caplog.messages if "cannot be compared" in line]
    assert "learning_rate" in line and "train_dataset" in line and not {"beta,", "seed,"} & set(line.split())
    # Without checksums what is garbage is found when it is loaded.
    for name in ("optimizer.pt", "rng_state.pth", "trainer_state.json", "reference.safetensors"):
        broken = shutil.copytree(folder / "checkpoint-2", tmp_path / name)
        garbage(broken / name)
        with pytest.raises(CheckpointError, match=f"of '{name}' cannot be loaded"):
            resumer.train(resume_from_checkpoint=str(broken))


@pytest.mark.parametrize("given", [7, 2.5, ["checkpoint-2"], b"\0", "a\0b", "x" * 5000])
def test_checkpoint_that_is_no_folder_is_refused(given, resumer):
    with pytest.raises(CheckpointError):
        resumer.train(resume_from_checkpoint=given)
