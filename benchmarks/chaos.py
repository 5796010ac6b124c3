"""Kill runs of every algorithm at random moments, resume each to its end, and compare it with the run left alone.

    python benchmarks/chaos.py --kills 200 --seed 0 --workers 2
    python benchmarks/chaos.py --short                            # some 20 kills
    python benchmarks/chaos.py --short --fault optimizer          # must fail: see FAULTS

Every run is a child of a process that has imported everything, so it costs a second or two. Compared are weights,
reference and further models, optimizer, schedule, random numbers, the state of the algorithms, and each logged value
and completion, to the last bit and once for each step. The exit code is 1 if anything differs, or nothing was killed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", TRL_EXPERIMENTAL_SILENCE="1", OMP_NUM_THREADS="1")

import pyarrow.parquet
import torch
from safetensors.torch import load_file

from trl_core import JsonlMetricsCallback
from trl_core.composition import Hooks
from trl_core.testing import Subject, tiny_classifier
from trl_core.training.checkpoints import CheckpointedTrainer

CRITIC = "critic"
ONLINE = {"log_completions": True, "num_completions_to_print": 0}
FILTER = {"group_filter_func": "shortest"}
LEVELS = {"k_very_hard": 4, "k_hard": 3, "k_medium": 3, "k_easy": 2}
# Short enough to be tried often, long enough that a checkpoint lies in the middle of a generation batch, of an epoch,
# and of an average.
SUBJECTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "sft": ({}, {}),
    "reward": ({"center_rewards_coefficient": 0.01}, {}),
    "dpo": ({"sync_ref_model": True, "ref_model_sync_steps": 2}, {}),
    "bema": ({"update_freq": 1, "ref_model_update_freq": 2, "lag": 1}, {}),
    "grpo": ({"beta": 0.1, "sync_ref_model": True, "ref_model_sync_steps": 2, **ONLINE}, {}),
    "gfpo": ({"adaptive_difficulty": True, "difficulty_warmup": 2, **LEVELS, **ONLINE}, FILTER),
    "gspo": (ONLINE, {}),
    "gspo_token": ({"beta": 0.1, **ONLINE}, {}),
    "replay": ({"num_generations": 2, "num_iterations": 1, "replay_buffer_size": 5, **ONLINE}, {}),
    "ppo": (
        {"steps_per_generation": None, "num_mini_batches": 2, "stop_token": "eos", **ONLINE},
        {"value_model": CRITIC},
    ),
    "gfpo+replay": ({"num_remains_in_group": 2, "replay_buffer_size": 4, "num_iterations": 1, **ONLINE}, FILTER),
    "gspo_token+gfpo+replay": (
        {"num_remains_in_group": 2, "replay_buffer_size": 4, "sample_before_add": True, "num_iterations": 1, **ONLINE},
        FILTER,
    ),
}
STEPS = 6
EVERY_STEP = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 2, "logging_steps": 1}

MOMENTS = ("any time", "a file", "resumed", "the end", "SIGTERM", "SIGINT", "finished")
"""`a file`: before a file is made, renamed or deleted; `resumed`: killed twice; `the end`: in the last moments;
`finished`: the run has ended. At SIGTERM and SIGINT it is to stop by itself."""
PLAN = ("any time", "a file", "resumed", "a file", "the end", "any time", "SIGTERM", "a file", "resumed", "SIGINT")
CLOCKS = ("time/", "step_time", "train_", "eval_runtime", "eval_s", "eval_time/", "eval_step_time")
LONGEST = 300.0


def _nothing(*_: Any, **__: Any) -> None:
    pass


FAULTS: dict[str, tuple[Any, str]] = {
    "hooks": (Hooks, "load_state_dict"),
    "optimizer": (CheckpointedTrainer, "_load_optimizer_and_scheduler"),
    "random numbers": (CheckpointedTrainer, "_load_rng_state"),
}
"""What `--fault` lets a resumed run forget, to see that this program notices."""


@dataclass
class Job:
    """A run that is killed once or more, and what came of it."""

    subject: str
    moment: str
    number: int
    kills: int = 0
    resumed: bool = False
    """Whether there was a checkpoint to go on from."""
    differs: list[str] = field(default_factory=list)
    error: str = ""


# -- one run, in a process of its own ---------------------------------------------------------------------------------
def _train(subject: str, folder: Path, ready: int) -> None:
    options, arguments = SUBJECTS[subject]
    arguments = {
        name: str(folder.parents[1] / CRITIC) if value == CRITIC else value for name, value in arguments.items()
    }
    arguments |= {"callbacks": [JsonlMetricsCallback()]}
    trainer = Subject(subject, {**options, "max_steps": STEPS, **EVERY_STEP}, arguments).trainer(folder)
    os.write(ready, b"x")
    trainer.train(resume_from_checkpoint="auto")
    trainer.save_model()


def _count_files(folder: Path, kill_at: int | None, counter: int) -> None:
    """Count what happens to files of the folder; before the one of this number the process is killed."""
    done = 0

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal done
        if event == "open":
            path, mode = arguments[0], str(arguments[1] or "")
            counts = any(letter in mode for letter in "wax+")
        elif event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate"):
            path, counts = arguments[0], True
        else:
            return
        # What is deleted with its folder is named without it.
        if counts and isinstance(path, str) and (path.startswith(str(folder)) or not os.path.isabs(path)):
            done += 1
            os.pwrite(counter, done.to_bytes(4, "little"), 0)
            if done == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


@dataclass
class Child:
    """A run in a process of its own."""

    pid: int
    ready: int
    counted: Path
    log: Path
    started: float = 0.0

    def wait_until_ready(self) -> None:
        """Return when training begins, or the process has ended."""
        os.read(self.ready, 1)
        self.started = time.monotonic()

    def code(self, timeout: float = LONGEST, files: int | None = None) -> int | None:
        """The exit code; minus the signal that killed it; None if it has not ended in time, or before these `files`."""
        end = time.monotonic() + timeout
        while True:
            if files is not None and self.files >= files:
                return None
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                os.close(self.ready)
                return os.waitstatus_to_exitcode(status)
            if time.monotonic() >= end:
                return None
            time.sleep(0.001)

    def end(self) -> int:
        """The exit code of a process that is about to end.

        Raises:
            TimeoutError: it does not.
        """
        code = self.code()
        if code is None:
            os.kill(self.pid, signal.SIGKILL)
            self.code()
            raise TimeoutError(f"a run did not end in {LONGEST:.0f} s:\n{self.log.read_text()[-3000:]}")
        return code

    @property
    def files(self) -> int:
        """How often something happened to a file."""
        return int.from_bytes(self.counted.read_bytes(), "little")


def start(subject: str, folder: Path, *, kill_at: int | None = None, fault: str | None = None) -> Child:
    """Run a subject in the folder, or go on with it, in a copy of this process."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    counted, log = folder.with_name(folder.name + ".count"), folder.with_name(folder.name + ".log")
    counted.write_bytes(b"\0\0\0\0")
    reading, writing = os.pipe()
    pid = os.fork()
    if pid:
        os.close(writing)
        return Child(pid, reading, counted, log)
    code = 1
    try:
        os.close(reading)
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        if fault:
            setattr(*FAULTS[fault], _nothing)
        _count_files(folder, kill_at, os.open(counted, os.O_RDWR))
        _train(subject, folder, writing)
        code = 0
    except KeyboardInterrupt:
        code = 130
    except SystemExit as error:
        code = int(error.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


# -- how a run ended --------------------------------------------------------------------------------------------------
def _digest(value: Any) -> str:
    """A fingerprint of nested values; NaN equals NaN."""
    found = hashlib.sha256()

    def add(item: Any) -> None:
        if isinstance(item, torch.Tensor):
            found.update(f"{item.dtype}{tuple(item.shape)}".encode() + item.contiguous().numpy().tobytes())
        elif isinstance(item, dict):
            for key in sorted(item, key=str):
                found.update(repr(key).encode())
                add(item[key])
        elif isinstance(item, list | tuple):
            found.update(f"[{len(item)}".encode())
            for entry in item:
                add(entry)
        else:
            found.update(repr(item).encode())

    add(value)
    return found.hexdigest()


def _without_clocks(line: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in line.items() if name != "eps" and not name.startswith(CLOCKS)}


def end_of(folder: Path) -> dict[str, str]:
    """Fingerprints of all that a run has left."""
    last = folder / f"checkpoint-{STEPS}"
    found = {f"{path.name}": _digest(load_file(path)) for path in last.glob("*.safetensors")}
    found["saved model"] = _digest(load_file(folder / "model.safetensors"))
    for name in ("optimizer", "scheduler"):
        found[name] = _digest(torch.load(last / f"{name}.pt", weights_only=True))
    found["random numbers"] = hashlib.sha256((last / "rng_state.pth").read_bytes()).hexdigest()
    found["state"] = _digest(json.loads((last / "trl_core_state.json").read_text())["state"])
    state = json.loads((last / "trainer_state.json").read_text())
    found["log"] = _digest([_without_clocks(line) for line in state["log_history"]])
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    # The summary is of the process that trained the last step, if that lived long enough.
    lines = [_without_clocks(line) for line in lines if "train_runtime" not in line]
    found["metrics.jsonl"] = _digest(lines)
    assert len({line["step"] for line in lines}) == STEPS, "not every step is logged"
    parts = sorted((folder / "completions").glob("*.parquet"))
    found["completions"] = _digest([pyarrow.parquet.read_table(part).to_pylist() for part in parts])
    return found


# -- killing ----------------------------------------------------------------------------------------------------------
class Chaos:
    """The jobs of one subject: its run left alone, and those that are killed."""

    def __init__(self, subject: str, folder: Path, seed: int, fault: str | None) -> None:
        self.subject, self.folder, self.seed, self.fault = subject, folder, seed, fault
        whole = start(subject, folder / "whole")
        whole.wait_until_ready()
        code = whole.end()
        if code != 0:
            raise RuntimeError(f"{subject} does not run:\n{whole.log.read_text()[-3000:]}")
        self.seconds, self.files = time.monotonic() - whole.started, whole.files
        self.expected = end_of(folder / "whole")

    def run(self, job: Job) -> Job:
        """Kill, resume and compare."""
        folder = self.folder / str(job.number)
        chance = random.Random(f"{self.seed} {self.subject} {job.number}")
        try:
            if job.moment == "finished":
                shutil.copytree(self.folder / "whole", folder)
            for how, when in self._kills(job, chance):
                self._kill(job, folder, how, when, chance.random())
            job.resumed = any(folder.glob("checkpoint-*"))
            last = self._start(folder)
            last.wait_until_ready()
            code = last.end()
            if code != 0:
                job.error = f"the resumed run ended with {code}:\n{last.log.read_text()[-3000:]}"
                return job
            found = end_of(folder)
            names = sorted({*found, *self.expected})
            job.differs = [name for name in names if found.get(name) != self.expected.get(name)]
        except Exception:
            job.error = traceback.format_exc()
        finally:
            if not (job.differs or job.error):
                shutil.rmtree(folder, ignore_errors=True)
        return job

    def _start(self, folder: Path, **options: Any) -> Child:
        return start(self.subject, folder, fault=self.fault if folder.exists() else None, **options)

    def _kills(self, job: Job, chance: random.Random) -> Iterator[tuple[str, float]]:
        """By what and when the run is killed, one kill after the other."""
        if job.moment == "any time":
            yield "after", chance.random()
        elif job.moment == "a file":
            yield "file", chance.random()
        elif job.moment == "the end":
            yield chance.choice(["after", "file"]), chance.uniform(0.88, 1)
        elif job.moment == "resumed":
            yield chance.choice(["after", "file"]), chance.uniform(0.2, 0.9)
            yield chance.choice(["after", "file"]), chance.uniform(0, 0.5)
        elif job.moment in ("SIGTERM", "SIGINT"):
            yield job.moment, chance.uniform(0.05, 0.9)

    def _kill(self, job: Job, folder: Path, how: str, when: float, lag: float) -> None:
        """Kill the run at a part of its length and a part of a step later; earlier if it has ended by then."""
        before = folder.with_name(f"{folder.name}-before")
        if folder.exists():
            shutil.copytree(folder, before)
        for _ in range(8):
            child = self._start(folder, kill_at=max(round(when * self.files), 1) if how == "file" else None)
            child.wait_until_ready()
            code = None
            if how != "file":
                # Told by progress, and then up to a step later, it does not matter how busy the machine is.
                code = child.code(files=round(when * self.files))
                code = child.code(lag * self.seconds / STEPS) if code is None else code
                if code is None:
                    os.kill(child.pid, signal.SIGKILL if how == "after" else signal.Signals[how])
            code = child.end() if code is None else code
            stopped = (130, 143, -signal.SIGTERM, -signal.SIGINT) if how.startswith("SIG") else ()
            if code in (-signal.SIGKILL, *stopped):
                job.kills += 1
                shutil.rmtree(before, ignore_errors=True)
                return
            if code != 0:
                raise RuntimeError(
                    f"a run ended with {code} where it was to be killed:\n{child.log.read_text()[-3000:]}"
                )
            when, lag = 0.7 * when, 0.0
            shutil.rmtree(folder)
            if before.exists():
                shutil.copytree(before, folder)
        raise RuntimeError("the run always ended before it was killed")


# -- all of them ------------------------------------------------------------------------------------------------------
def plan(subjects: list[str], kills: int) -> list[Job]:
    """The jobs: the subjects in turn, each at another moment in every round, and once after the end."""
    jobs = []
    for i in range(kills):
        at, subject = divmod(i, len(subjects))
        jobs.append(Job(subjects[subject], PLAN[(at + subject) % len(PLAN)], i))
    return jobs + [Job(subject, "finished", kills + i) for i, subject in enumerate(subjects)]


def work(jobs: list[Job], folder: Path, seed: int, fault: str | None, results: Path) -> None:
    """Do the jobs, one subject after the other, and write what came of each as a line."""
    subjects = {job.subject: [other for other in jobs if other.subject == job.subject] for job in jobs}
    with results.open("w") as file:
        for number, (subject, own) in enumerate(subjects.items()):
            try:
                chaos = Chaos(subject, folder / f"{results.stem}-{number}", seed, fault)
                done = map(chaos.run, own)
            except Exception:
                own[0].error = traceback.format_exc()
                done = iter(own[:1])
            for job in done:
                print(json.dumps(asdict(job)), file=file, flush=True)
                if job.error or job.differs:
                    where = f"{job.subject}, {job.moment}, job {job.number}"
                    print(f"{where}: {job.error or 'differs in ' + ', '.join(job.differs)}", flush=True)


def report(jobs: list[Job]) -> str:
    """A table: kills and moments of each algorithm, how many runs had a checkpoint then, and how many are equal."""
    lines = [f"{'algorithm':<24}{'kills':>6}{'resumed':>9}{'equal':>12}  moments"]
    for subject in dict.fromkeys(job.subject for job in jobs):
        own = [job for job in jobs if job.subject == subject]
        lines.append(_line(subject, own))
    return "\n".join([*lines, _line("all", jobs)])


def _line(name: str, jobs: list[Job]) -> str:
    moments = Counter(job.moment for job in jobs)
    told = ", ".join(f"{moments[moment]} {moment}" for moment in MOMENTS if moments[moment])
    equal = sum(not (job.differs or job.error) for job in jobs)
    kills, resumed = (sum(getattr(job, name) for job in jobs) for name in ("kills", "resumed"))
    return f"{name:<24}{kills:>6}{resumed:>9}{equal:>5} of {len(jobs):>3}  {told}"


def main(argv: list[str] | None = None) -> int:
    """Do what the command line says; 0 if every run ended as the one left alone."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200, help="runs to kill (200)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2, help="runs at a time (2)")
    parser.add_argument("--short", action="store_true", help="20 kills")
    parser.add_argument("--only", nargs="+", choices=SUBJECTS, default=list(SUBJECTS), metavar="NAME")
    parser.add_argument("--fault", choices=FAULTS, help="what a resumed run forgets, to see that it is noticed")
    parser.add_argument("--out", type=Path, help="folder that keeps the runs that differ; default: a temporary one")
    args = parser.parse_args(argv)
    begun = time.monotonic()
    torch.set_num_threads(1)
    jobs = plan(args.only, 20 if args.short else args.kills)
    folder = (args.out or Path(tempfile.mkdtemp(prefix="chaos-"))).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    tiny_classifier(seed=1).save_pretrained(folder / CRITIC)
    workers = min(args.workers, len(args.only))
    pids = []
    for number in range(workers):
        own = [job for job in jobs if args.only.index(job.subject) % workers == number]
        pid = os.fork()
        if not pid:
            signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job would ignore it
            try:
                work(own, folder, args.seed, args.fault, folder / f"results-{number}.jsonl")
            finally:
                os._exit(0)
        pids.append(pid)
    for pid in pids:
        os.waitpid(pid, 0)
    done = [Job(**json.loads(line)) for file in sorted(folder.glob("results-*.jsonl")) for line in file.open()]
    done.sort(key=lambda job: args.only.index(job.subject))
    print(report(done))
    print(f"{time.monotonic() - begun:.0f} s, seed {args.seed}" + (f", fault: {args.fault}" if args.fault else ""))
    sound = len(done) == len(jobs) and not any(job.differs or job.error for job in done)
    if sound and args.out is None:
        shutil.rmtree(folder)
    elif not sound:
        print(f"{len(jobs) - len(done)} jobs are not done; what differs is in {folder}")
    return 0 if sound else 1


if __name__ == "__main__":
    sys.exit(main())
