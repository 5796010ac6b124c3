"""The built wheels, installed into an empty environment as a user would have them, with nothing of the checkout."""

import importlib.metadata
import json
import os
import shutil
import subprocess
import venv
import zipfile
from pathlib import Path

import pytest

from trl_core import install

from .helpers_wheels import build_wheel, make_environment, run

ROOT = Path(__file__).resolve().parent.parent
DISTRIBUTIONS = {"trl_core": ROOT} | {
    name: ROOT / "plugins" / name.replace("_", "-")
    for name in ("trl_bema", "trl_gfpo", "trl_gspo", "trl_ppo", "trl_replay")
}

TRAIN = """
import json, sys
from pathlib import Path
import torch
from datasets import Dataset
import trl_core, trl_gfpo
from trl_core.testing import tiny_model, tiny_tokenizer
from trl_gfpo import GFPOConfig, GFPOTrainer

def reward(completions, **_):
    return [float(row % 3) for row in range(len(completions))]

model = tiny_model(seed=0)
before = {name: value.detach().clone() for name, value in model.named_parameters()}
trainer = GFPOTrainer(
    model=model,
    args=GFPOConfig(
        output_dir=sys.argv[1], max_steps=1, num_generations=4, num_remains_in_group=2, max_completion_length=8,
        per_device_train_batch_size=4, learning_rate=1e-2, logging_steps=1, report_to=[], use_cpu=True,
        disable_tqdm=True,
    ),
    train_dataset=Dataset.from_list([{"prompt": "one two"}, {"prompt": "three"}]),
    reward_funcs=reward,
    group_filter_func="shortest",
    processing_class=tiny_tokenizer(),
)
result = trainer.train()
trainer.save_model()
print(json.dumps({
    "core": trl_core.__file__,
    "plugin": trl_gfpo.__file__,
    "steps": result.global_step,
    "loss": result.training_loss,
    "moved": any(not torch.equal(before[name], value) for name, value in trainer.model.named_parameters()),
    "saved": sorted(path.name for path in Path(sys.argv[1]).iterdir()),
}))
"""

TRAIN_BEMA = """
import json, sys
from datasets import Dataset
import trl_core
from trl_bema import BEMACallback, DPOTrainer
from trl_core.testing import tiny_model, tiny_tokenizer

rows = [{"prompt": "one", "chosen": f" two {i}", "rejected": f" three {i}"} for i in range(4)]
trainer = DPOTrainer(
    tiny_model(seed=0),
    args=trl_core.DPOConfig(
        output_dir=sys.argv[1], max_steps=2, per_device_train_batch_size=2, learning_rate=1e-2, logging_steps=1,
        report_to=[], use_cpu=True, disable_tqdm=True,
    ),
    train_dataset=Dataset.from_list(rows),
    processing_class=tiny_tokenizer(),
    callbacks=[BEMACallback(update_freq=1, ema_power=0, bias_power=50, update_ref_model=True, ref_model_update_freq=1)],
)
trainer.train()
print(json.dumps([line["loss"] for line in trainer.state.log_history if "loss" in line]))
"""


@pytest.fixture(scope="module")
def wheels(tmp_path_factory):
    """Both wheels, by package."""
    folder = tmp_path_factory.mktemp("wheels")
    return {package: build_wheel(source, folder) for package, source in DISTRIBUTIONS.items()}


@pytest.fixture(scope="module")
def from_index(tmp_path_factory):
    """Runs a command in a new environment that has pip, an empty home and cache, no compiler, and an index."""
    base = tmp_path_factory.mktemp("index")
    folder = base / "environment"
    venv.create(folder, with_pip=True)
    settings = {"HOME": str(base), "PIP_CACHE_DIR": str(base / "cache"), "PIP_ONLY_BINARY": ":all:", "CC": "false"}
    settings |= {"PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}", "TRL_EXPERIMENTAL_SILENCE": "1"}
    settings |= {"PIP_NO_INPUT": "1", "PIP_QUIET": "1", "PIP_NO_COMPILE": "1"}
    probe = ["pip", "download", "--no-deps", "--dest", base, "--retries", "0", "--timeout", "20", "pluggy"]
    try:
        run(*probe, cwd=base, **settings)
    except (AssertionError, subprocess.TimeoutExpired) as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"no package index answers: {str(error).strip().splitlines()[-1]}")
    yield folder, lambda command, cwd: run("bash", "-ec", command, cwd=cwd, limit=1200, **settings)
    shutil.rmtree(base, ignore_errors=True)  # more than a gigabyte


@pytest.fixture(scope="module")
def environment(wheels, tmp_path_factory):
    """Folder of an environment with the wheels, beside the dependencies of the one that runs the tests."""
    return make_environment(tmp_path_factory.mktemp("environment"), *wheels.values())


@pytest.mark.parametrize("package", DISTRIBUTIONS)
def test_wheel_holds_the_whole_package_and_nothing_else(wheels, package):
    folder = DISTRIBUTIONS[package]
    expected = {
        path.relative_to(folder).as_posix()
        for path in (folder / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert f"{package}/py.typed" in expected
    names = zipfile.ZipFile(wheels[package]).namelist()
    assert {name for name in names if ".dist-info/" not in name} == expected


def test_wheel_names_its_licence_and_entry_points(wheels):
    archive = zipfile.ZipFile(wheels["trl_core"])
    information = next(name.split("/")[0] for name in archive.namelist() if ".dist-info/" in name)
    assert f"{information}/licenses/LICENSE" in archive.namelist()
    assert "License-Expression: Apache-2.0" in archive.read(f"{information}/METADATA").decode()
    assert "[trl_core.stable]\ndpo = " in archive.read(f"{information}/entry_points.txt").decode()


def test_installed_command_lists_both(environment, tmp_path):
    listed = json.loads(run(environment / "bin" / "trl-core", "list", "--json", cwd=tmp_path).stdout)
    found = {(item["name"], item["distribution"], item["version"], item["stability"]) for item in listed}
    version = importlib.metadata.version("trl-core")
    assert ("grpo", "trl-core", version, "stable") in found
    assert ("gfpo", "trl-gfpo", importlib.metadata.version("trl-gfpo"), "experimental") in found
    assert all(item["broken"] is None for item in listed if item["distribution"] in ("trl-core", "trl-gfpo"))
    assert len([item for item in listed if item["name"] == "gfpo"]) == 1


def test_installed_wheels_train_one_gfpo_step(environment, tmp_path):
    script = tmp_path / "train.py"
    script.write_text(TRAIN, encoding="utf-8")
    done = run(environment / "bin" / "python", script, tmp_path / "out", cwd=tmp_path, TRL_EXPERIMENTAL_SILENCE="1")
    told = json.loads(done.stdout.strip().splitlines()[-1])
    assert Path(told["core"]).is_relative_to(environment), "the checkout was imported, not the wheel"
    assert Path(told["plugin"]).is_relative_to(environment), "the checkout was imported, not the wheel"
    assert told["steps"] == 1
    assert told["loss"] == told["loss"]
    assert told["moved"]
    assert "model.safetensors" in told["saved"]


def test_installed_wheels_run_the_known_bema_script(environment, tmp_path):
    script = tmp_path / "train.py"
    script.write_text(TRAIN_BEMA, encoding="utf-8")
    done = run(environment / "bin" / "python", script, tmp_path / "out", cwd=tmp_path, TRL_EXPERIMENTAL_SILENCE="1")
    # The reference becomes the policy after each step, so each loss is ln 2.
    assert json.loads(done.stdout.splitlines()[-1]) == pytest.approx([0.693147, 0.693147], abs=1e-5)
    assert (tmp_path / "out" / "bema" / "model.safetensors").is_file()


@pytest.mark.slow  # downloads all dependencies
@pytest.mark.timeout(1500)
def test_wheels_bring_what_they_need_from_an_index(wheels, from_index, tmp_path):
    environment, do = from_index
    do(f"pip install {' '.join(map(str, wheels.values()))}", tmp_path)
    (tmp_path / "train.py").write_text(TRAIN, encoding="utf-8")
    told = json.loads(do("pip check >&2; python train.py out", tmp_path).stdout.strip().splitlines()[-1])
    assert Path(told["core"]).is_relative_to(environment) and Path(told["plugin"]).is_relative_to(environment)
    assert told["steps"] == 1 and told["moved"] and "model.safetensors" in told["saved"]


@pytest.mark.slow  # the same
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("form", ["from_checkout", "from_git"])
def test_forms_that_work_before_the_release_do(form, from_index, tmp_path):
    environment, do = from_index
    checkout = tmp_path / "checkout"
    kept = shutil.ignore_patterns(".*", "__pycache__", "runs", "site")
    shutil.copytree(ROOT, checkout, ignore=kept)
    do("pip uninstall --yes trl-core trl-gfpo", tmp_path)
    who = "git -c user.name=a -c user.email=a@example.org"
    do(f"git init -q && git add -A && {who} commit -qm all", checkout)
    # With a host, as an address of git has one: older versions of pip take "git+file:///" for a path.
    address = checkout.as_uri().replace("file://", "file://localhost")
    command = getattr(install, form)("trl-core[peft]", "trl-gfpo").replace("GIT_ADDRESS", address)
    do(command, checkout if form == "from_checkout" else tmp_path)
    (tmp_path / "train.py").write_text(TRAIN, encoding="utf-8")
    told = json.loads(do("python -c 'import peft'; python train.py out", tmp_path).stdout.strip().splitlines()[-1])
    assert Path(told["plugin"]).is_relative_to(checkout if form == "from_checkout" else environment)
    assert told["steps"] == 1 and told["moved"]
