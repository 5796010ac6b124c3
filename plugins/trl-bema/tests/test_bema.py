"""BEMA on single numbers, whose averages are known, and through the real trainers."""

import inspect
import math
from types import SimpleNamespace

import pytest
import torch
import transformers
from datasets import Dataset
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from trl_bema import BEMACallback, BEMAConfig, BEMATrainer, DPOTrainer
from trl_bema.bema import STATE, STATE_FILE, BEMAverage
from trl_core import DPOConfig, SFTConfig, SFTTrainer, errors
from trl_core.testing import tiny_model, tiny_tokenizer

peft = pytest.importorskip("peft")

# The weight before training and after each of four steps: the specification's.
COURSE = [1.0, 0.8, 0.7, 0.5, 0.6]
ROWS = [
    {"prompt": "Is it day?", "chosen": " Yes.", "rejected": " No, never."},
    {"prompt": "2 + 3 =", "chosen": " 5", "rejected": " four"},
    {"prompt": "Name a colour.", "chosen": " Blue, for one.", "rejected": " Tree"},
    {"prompt": "Say hello.", "chosen": " Hello!", "rejected": " I say"},
]
EVERY_STEP = {"update_freq": 1, "ref_model_update_freq": 1}


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# -- single numbers ----------------------------------------------------------------------------------------------------
class Number(nn.Module):
    def __init__(self, value, dtype=torch.float32):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([float(value)], dtype=dtype))


def state_at(step):
    return SimpleNamespace(global_step=step, is_world_process_zero=True)


def follow(course=COURSE, **options):
    """(average, published) after each step of the course, through the callback."""
    callback, model = BEMACallback(**{"update_freq": 2, **options}), Number(course[0])
    args = SimpleNamespace(output_dir="nowhere")
    callback.on_train_begin(args, state_at(0), None, model=model)
    seen = []
    for step, value in enumerate(course[1:], start=1):
        model.weight.data.fill_(value)
        callback.on_step_end(args, state_at(step), None, model=model)
        seen.append(tuple(callback.copies[kind]["weight"].item() for kind in ("average", "published")))
    return seen


def close(values):
    return pytest.approx(values, abs=1e-6)


@pytest.mark.parametrize(
    ("options", "step", "average", "published"),
    [
        ({}, 1, 1.0, 1.0),
        ({}, 2, 0.913397, 0.730888),
        ({}, 3, 0.913397, 0.730888),
        ({}, 4, 0.829638, 0.593681),
        ({"update_after": 1}, 1, 0.8, 1.0),
        ({"update_after": 1}, 2, 0.8, 1.0),
        ({"update_after": 1}, 3, 0.716795, 0.537184),
        ({"min_ema_multiplier": 0.5}, 2, 0.85, 0.667491),
        ({"min_ema_multiplier": 0.5}, 4, 0.725, 0.489042),
    ],
)
def test_constants_of_the_specification(options, step, average, published):
    assert follow(**options)[step - 1] == close((average, published))


def test_published_weights_are_the_first_ones_until_an_update():
    assert [published for _, published in follow(update_freq=5)] == [1.0] * 4


def test_constant_weights_are_their_own_average():
    assert follow([0.3] * 9, update_freq=1) == [(torch.tensor(0.3).item(),) * 2] * 8


def test_shifted_weights_have_a_shifted_average():
    shifted = follow([value + 2 for value in COURSE])
    assert [published - 2 for _, published in shifted] == close([published for _, published in follow()])


def test_huge_bias_power_leaves_the_plain_average():
    assert all(average == published for average, published in follow(bias_power=50.0))


@pytest.mark.parametrize("options", [{"min_ema_multiplier": 1.0}, {"ema_power": 0.0}])
def test_average_is_the_newest_weight_if_it_weighs_all(options):
    assert [average for average, _ in follow(update_freq=1, **options)] == torch.tensor(COURSE[1:]).tolist()


def test_without_both_powers_the_way_is_doubled():
    published = [published for _, published in follow(update_freq=1, ema_power=0.0, bias_power=0.0)]
    assert published == close([2 * value - COURSE[0] for value in COURSE[1:]])


def test_the_clock_is_the_step_of_the_run():
    # At t = 3 the age is 10 + 3, although the average began after step 1.
    (average, published) = follow(update_after=1)[2]
    weight, rest = 13**-0.5, 13**-0.2
    assert average == close(0.8 + weight * (0.5 - 0.8))
    assert published == close(average + rest * (0.5 - 0.8))


def test_a_step_told_twice_counts_once():
    rates = BEMAverage(update_freq=1)
    rates.start({"w": torch.tensor([1.0])})
    rates.update(1, {"w": torch.tensor([0.5])})
    once = rates.copies["published"]["w"].clone()
    rates.update(1, {"w": torch.tensor([0.5])})
    assert torch.equal(rates.copies["published"]["w"], once)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_averages_are_float32_whatever_the_weights_are(dtype):
    average = BEMAverage(update_freq=1, lag=100)
    average.start({"w": torch.ones(1, dtype=dtype)})
    for step in range(1, 50):
        average.update(step, {"w": torch.full((1,), 1.0078125, dtype=dtype)})  # the next number in bfloat16
    assert all(copy["w"].dtype is torch.float32 for copy in average.copies.values())
    assert 1 < average.copies["average"]["w"].item() < 1.0078125


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a second device")
def test_the_place_of_the_average_does_not_matter():
    assert follow(device="cuda") == close(follow())


# -- options -----------------------------------------------------------------------------------------------------------
def test_the_arguments_are_those_of_trl():
    parameters = inspect.signature(BEMACallback).parameters
    assert {name: parameter.default for name, parameter in parameters.items()} == {
        "update_freq": 400,
        "ema_power": 0.5,
        "bias_power": 0.2,
        "lag": 10,
        "update_after": 0,
        "multiplier": 1.0,
        "min_ema_multiplier": 0.0,
        "device": "cpu",
        "update_ref_model": False,
        "ref_model_update_freq": 400,
        "ref_model_update_after": 0,
    }
    assert [*parameters][7:9] == ["device", "update_ref_model"]


@pytest.mark.parametrize(
    "options",
    [
        {"update_freq": 0},
        {"ema_power": -0.1},
        {"bias_power": math.nan},
        {"update_after": -1},
        {"multiplier": -1.0},
        {"min_ema_multiplier": 1.1},
        {"ref_model_update_freq": 0},
        {"ref_model_update_after": -1},
        {"lag": 0, "multiplier": 0.1, "update_freq": 9},
    ],
)
@pytest.mark.parametrize("make", [BEMACallback, BEMAConfig])
def test_values_out_of_range_are_refused(make, options):
    with pytest.raises(errors.ConfigError, match=next(iter(options))):
        make(**options)


def test_an_age_of_one_at_the_first_update_is_enough():
    BEMACallback(lag=0, multiplier=0.1, update_freq=10)


def test_config_keeps_the_device_of_training():
    args = BEMAConfig(use_cpu=True, bema_device="meta")
    assert args.device == torch.device("cpu")
    assert args.separate_reference is args.update_ref_model is True


@pytest.mark.parametrize("option", ["precompute_ref_log_probs", "sync_ref_model"])
def test_config_refuses_a_second_master_of_the_reference(option):
    with pytest.raises(errors.ConfigError, match=option):
        BEMAConfig(**{option: True})
    BEMAConfig(**{option: True, "update_ref_model": False})


# -- runs --------------------------------------------------------------------------------------------------------------
def make(folder, callbacks=(), *, trainer=DPOTrainer, config=DPOConfig, model=None, rows=ROWS, more=None, **options):
    defaults = {
        "output_dir": str(folder),
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "activation_checkpointing": False,
    }
    return trainer(
        tiny_model() if model is None else model,
        args=config(**{**defaults, **options}),
        train_dataset=Dataset.from_list(rows),
        processing_class=tiny_tokenizer(),
        callbacks=list(callbacks),
        **(more or {}),
    )


def run(folder, callbacks=(), **options):
    trainer = make(folder, callbacks, **options)
    trainer.train()
    return trainer


def make_bema(folder, **options):
    return make(folder, trainer=BEMATrainer, config=BEMAConfig, **options)


def sft(folder, callbacks=(), **options):
    rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in ROWS]
    return make(folder, callbacks, trainer=SFTTrainer, config=SFTConfig, rows=rows, **options)


def plain(folder, callbacks=(), **options):
    """A trainer without trl-core."""
    ids = [{"input_ids": [5 + i, 6, 7, 8], "labels": [5 + i, 6, 7, 8]} for i in range(4)]
    settings = {
        "output_dir": str(folder),
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
    }
    args = transformers.TrainingArguments(**{**settings, **options})
    return transformers.Trainer(tiny_model(), args, train_dataset=Dataset.from_list(ids), callbacks=list(callbacks))


def losses(trainer):
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def weights(model):
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


class Course(TrainerCallback):
    """The weights after each step."""

    def __init__(self):
        self.seen = []

    def on_train_begin(self, args, state, control, model=None, **_):
        self.seen = [weights(model)]

    def on_step_end(self, args, state, control, model=None, **_):
        self.seen.append(weights(model))


def by_hand(course, **rates):
    average = BEMAverage(**rates)
    average.start(course[0])
    for step, values in enumerate(course[1:], start=1):
        average.update(step, values)
    return average.copies


def test_the_script_that_users_of_trl_have_runs(tmp_path):
    bema = BEMACallback(update_ref_model=True, **EVERY_STEP)
    trainer = make(tmp_path, [bema])
    start = weights(trainer.reference.module)
    trainer.train()
    assert same(weights(trainer.reference.module), bema.copies["published"])
    assert not same(weights(trainer.reference.module), start)
    assert losses(trainer)[0] == close(math.log(2))
    assert losses(trainer)[1] != close(math.log(2))


@pytest.mark.parametrize("kind", ["callback", "algorithm"])
def test_loss_is_always_ln_2_if_the_reference_is_the_newest_policy(kind, tmp_path):
    options = {**EVERY_STEP, "ema_power": 0, "bias_power": 50}
    if kind == "callback":
        trainer = make(tmp_path, [BEMACallback(update_ref_model=True, **options)])
    else:
        trainer = make_bema(tmp_path, **options)
    trainer.train()
    assert losses(trainer) == close([math.log(2)] * 4)
    assert same(weights(trainer.model), weights(trainer.reference.module))


def test_algorithm_and_callback_do_the_same(tmp_path):
    options = {"update_freq": 1, "lag": 3, "ref_model_update_freq": 2, "ref_model_update_after": 1}
    algorithm = make_bema(tmp_path / "a", **options)
    callback = make(tmp_path / "b", [BEMACallback(update_ref_model=True, **options)])
    algorithm.train(), callback.train()
    assert losses(algorithm) == losses(callback)
    assert same(weights(algorithm.reference.module), weights(callback.reference.module))


def test_reference_is_copied_at_its_own_steps(tmp_path):
    references = []

    class Watch(TrainerCallback):
        def on_step_end(self, *_, **__):
            references.append(weights(trainer.reference.module))

    bema = BEMACallback(update_ref_model=True, update_freq=1, ref_model_update_freq=2, ref_model_update_after=3)
    trainer = make(tmp_path, [bema], max_steps=6)
    references.append(weights(trainer.reference.module))
    trainer.add_callback(Watch)  # after the hooks of the step
    trainer.train()
    changed = [step for step in range(1, 7) if not same(references[step - 1], references[step])]
    assert changed == [3, 5]


def test_average_is_that_of_the_weights_after_each_step(tmp_path):
    course, rates = Course(), {"update_freq": 1, "lag": 2, "update_after": 1}
    bema = BEMACallback(update_ref_model=True, ref_model_update_freq=1, **rates)
    run(tmp_path, [course, bema])
    expected = by_hand(course.seen, **rates)
    assert all(same(bema.copies[kind], expected[kind]) for kind in expected)


@pytest.mark.parametrize("kind", [make, sft, plain])
def test_the_policy_is_only_read(kind, tmp_path):
    alone, watched = kind(tmp_path / "a"), kind(tmp_path / "b", [BEMACallback(update_freq=1)])
    alone.train(), watched.train()
    assert same(weights(alone.model), weights(watched.model))
    assert [line.get("loss") for line in alone.state.log_history] == [
        line.get("loss") for line in watched.state.log_history
    ]


def test_a_second_training_starts_anew(tmp_path):
    course, bema = Course(), BEMACallback(update_freq=1)
    trainer = make(tmp_path, [course, bema])
    trainer.train()
    trainer.train()
    assert same(bema.copies["anchor"], course.seen[0])
    assert same(bema.copies["published"], by_hand(course.seen, update_freq=1)["published"])


# -- frozen and tied weights, precision ----------------------------------------------------------------------------
def test_frozen_weights_are_those_of_the_model(tmp_path):
    model = tiny_model()
    model.model.embed_tokens.requires_grad_(False)  # the first parameter
    model.model.layers[1].requires_grad_(False)
    frozen = [name for name, value in model.named_parameters() if not value.requires_grad]
    bema, course = BEMACallback(update_ref_model=True, **EVERY_STEP), Course()
    trainer = make(tmp_path, [bema, course], model=model)
    trainer.train()
    expected = by_hand(course.seen, update_freq=1)["published"]
    saved = weights(AutoModelForCausalLM.from_pretrained(tmp_path / "bema", dtype=torch.float32))
    for name, value in weights(trainer.reference.module).items():
        assert torch.equal(value, course.seen[0][name] if name in frozen else expected[name])
        assert torch.equal(value, saved[name])
    assert not set(frozen) & set(bema.copies["anchor"])


def test_frozen_weights_that_someone_else_changes_are_followed(tmp_path):
    model = tiny_model()
    model.model.norm.requires_grad_(False)

    class Change(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **_):
            model.model.norm.weight.data.fill_(state.global_step)

    trainer = run(tmp_path, [Change(), BEMACallback(update_ref_model=True, **EVERY_STEP)], model=model)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "bema")
    assert trainer.reference.module.model.norm.weight.unique().tolist() == [4.0]
    assert saved.model.norm.weight.unique().tolist() == [4.0]


@pytest.mark.parametrize("tied", [True, False])
def test_the_average_is_saved_as_a_model_with_its_tokenizer(tied, tmp_path):
    model = tiny_model(tie_word_embeddings=tied)
    bema = BEMACallback(update_freq=1)
    trainer = run(tmp_path, [bema], model=model)
    assert ("lm_head.weight" in bema.copies["anchor"]) is not tied
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "bema", dtype=torch.float32)
    assert same(weights(saved), bema.copies["published"])
    assert (saved.lm_head.weight is saved.model.embed_tokens.weight) is tied
    assert not same(weights(saved), weights(trainer.model))
    assert AutoTokenizer.from_pretrained(tmp_path / "bema").eos_token == "<eos>"


def test_saving_needs_no_second_copy(tmp_path, monkeypatch):
    bema, model, given = BEMACallback(update_freq=1), tiny_model(), {}
    model.model.norm.requires_grad_(False)
    monkeypatch.setattr(model, "save_pretrained", lambda folder, state_dict: given.update(state_dict))
    run(tmp_path, [bema], model=model)
    ours = {value.data_ptr() for value in bema.copies["published"].values()}
    models = {value.data_ptr() for value in model.state_dict().values()}
    assert {value.data_ptr() for value in given.values()} <= ours | models


def test_a_bfloat16_model_has_a_float32_average(tmp_path):
    bema = BEMACallback(update_ref_model=True, **EVERY_STEP)
    trainer = run(tmp_path, [bema], model=tiny_model().bfloat16(), max_steps=2)
    assert {value.dtype for copy in bema.copies.values() for value in copy.values()} == {torch.float32}
    rounded = {name: value.bfloat16() for name, value in bema.copies["published"].items()}
    assert same(weights(trainer.reference.module), rounded)
    assert same(weights(AutoModelForCausalLM.from_pretrained(tmp_path / "bema")), rounded)


# -- what decides on the reference -------------------------------------------------------------------------------------
@pytest.mark.parametrize("option", ["precompute_ref_log_probs", "sync_ref_model"])
def test_a_second_master_of_the_reference_is_refused(option, tmp_path):
    with pytest.raises(errors.ConfigError, match=option):
        make(tmp_path, [BEMACallback(update_ref_model=True)], **{option: True})
    make(tmp_path, [BEMACallback()], **{option: True})


@pytest.mark.parametrize("kind", [sft, plain])
def test_a_trainer_without_reference_is_refused(kind, tmp_path):
    with pytest.raises(errors.ConfigError, match="no reference"):
        kind(tmp_path, [BEMACallback(update_ref_model=True)])


def adapter(**options):
    return peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **options)


def split_adapters(model):
    """Weights of the model, of the trained adapter, and of the reference adapter by the names of the trained one's."""
    base, trained, reference = {}, {}, {}
    for name, value in weights(model).items():
        if ".ref." in name:
            reference[name.replace(".ref.", ".default.")] = value
        else:
            (trained if "lora_" in name else base)[name] = value
    return base, trained, reference


def test_an_adapter_whose_reference_is_the_model_without_it_is_refused(tmp_path):
    with pytest.raises(errors.ConfigError, match="adapter"):
        make(tmp_path, [BEMACallback(update_ref_model=True)], more={"peft_config": adapter()})
    make(tmp_path, [BEMACallback()], more={"peft_config": adapter()})


def test_the_algorithm_moves_an_adapter_of_its_own(tmp_path):
    trainer = make_bema(tmp_path, more={"peft_config": adapter()}, **EVERY_STEP)
    base, _, start = split_adapters(trainer.model)
    trainer.train()
    after, trained, reference = split_adapters(trainer.model)
    assert same(after, base)
    published = trainer.hooks.objects["bema"].copies["published"]
    assert published.keys() == trained.keys()
    assert same(reference, published)
    assert not same(reference, start) and not same(reference, trained)


def test_with_an_adapter_too_the_loss_is_ln_2_if_the_reference_is_the_newest_policy(tmp_path):
    trainer = make_bema(tmp_path, more={"peft_config": adapter()}, **EVERY_STEP, ema_power=0, bias_power=50)
    trainer.train()
    assert losses(trainer) == close([math.log(2)] * 4)


def test_a_continued_adapter_is_followed_by_its_copy(tmp_path):
    model = peft.get_peft_model(tiny_model(), adapter())
    bema = BEMACallback(update_ref_model=True, **EVERY_STEP)
    trainer = run(tmp_path, [bema], model=model)
    _, trained, reference = split_adapters(trainer.model)
    assert same(reference, bema.copies["published"])
    assert not same(reference, trained)


def test_the_averaged_adapter_is_saved_alone(tmp_path):
    trainer = make_bema(tmp_path, more={"peft_config": adapter()}, **EVERY_STEP)
    trainer.train()
    assert not (tmp_path / "bema" / "ref").exists()
    assert not (tmp_path / "bema" / "model.safetensors").exists()
    loaded = peft.PeftModel.from_pretrained(tiny_model(), tmp_path / "bema")
    assert same(split_adapters(loaded)[1], trainer.hooks.objects["bema"].copies["published"])


# -- resuming ----------------------------------------------------------------------------------------------------------
def resumed(kind, folder, **options):
    """The whole run, and the same from its middle in a new trainer: each with its average and reference."""
    whole, again = (kind(folder, max_steps=6, save_strategy="steps", save_steps=3, **options) for _ in range(2))
    whole.train()
    final = weights(whole.model)
    again.train(resume_from_checkpoint=str(folder / "checkpoint-3"))
    assert same(weights(again.model), final)
    return whole, again


def bema_of(trainer):
    return next(c for c in trainer.callback_handler.callbacks if isinstance(c, BEMACallback))


def with_bema(kind, **options):
    return lambda folder, **more: kind(folder, [BEMACallback(**options)], **more)


@pytest.mark.parametrize("update_after", [0, 1, 4])
@pytest.mark.parametrize("as_callback", [False, True])
def test_a_resumed_run_is_the_same(as_callback, update_after, tmp_path):
    options = {"update_freq": 2, "lag": 1, "ref_model_update_freq": 2, "update_after": update_after}
    if as_callback:
        whole, again = resumed(with_bema(make, update_ref_model=True, **options), tmp_path)
    else:
        whole, again = resumed(make_bema, tmp_path, **options)
    assert all(same(bema_of(again).copies[name], copy) for name, copy in bema_of(whole).copies.items())
    assert same(weights(whole.reference.module), weights(again.reference.module))
    assert losses(whole) == losses(again)
    assert not list(tmp_path.rglob(STATE_FILE)), "trl-core keeps the state itself"


def test_a_resumed_run_with_an_adapter_is_the_same(tmp_path):
    options = {"more": {"peft_config": adapter()}, "update_freq": 2, "ref_model_update_freq": 2}
    whole, again = resumed(make_bema, tmp_path, **options)
    assert all(same(bema_of(again).copies[name], copy) for name, copy in bema_of(whole).copies.items())
    assert losses(whole) == losses(again)


def test_a_resumed_run_without_trl_core_is_the_same(tmp_path):
    whole, again = resumed(with_bema(plain, update_freq=2), tmp_path)
    assert all(same(bema_of(again).copies[name], copy) for name, copy in bema_of(whole).copies.items())
    assert (tmp_path / "checkpoint-3" / STATE_FILE).is_file()


def test_the_same_trainer_goes_back_to_its_checkpoint(tmp_path):
    bema = BEMACallback(update_freq=1)
    trainer = plain(tmp_path, [bema], save_strategy="steps", save_steps=2)
    trainer.train()
    final = {name: value.clone() for name, value in bema.copies["published"].items()}
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert same(bema.copies["published"], final)


@pytest.mark.parametrize("kind", [make, plain])
def test_a_checkpoint_without_the_average_is_refused(kind, tmp_path):
    kind(tmp_path, save_strategy="steps", save_steps=2).train()
    check = {"resume_check": "warn"} if kind is make else {}
    trainer = kind(tmp_path, [BEMACallback()], save_strategy="steps", save_steps=2, **check)
    with pytest.raises(errors.CheckpointError, match=r"bema_state\.safetensors"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_an_average_of_other_weights_is_refused():
    callback = BEMACallback()
    callback.load_state_dict({"step": 3, **{kind: {"bias": torch.ones(1)} for kind in STATE}})
    with pytest.raises(errors.CheckpointError, match="other parameters"):
        callback.on_train_begin(SimpleNamespace(output_dir="nowhere"), state_at(3), None, model=Number(1.0))


# -- wrappers and other processes --------------------------------------------------------------------------------------
def test_names_are_those_of_the_bare_model():
    callback = BEMACallback(update_freq=1)
    for wrapped in (nn.DataParallel(Number(1.0)), torch.compile(Number(1.0), backend="eager")):
        callback.on_train_begin(SimpleNamespace(), state_at(0), None, model=wrapped)
        callback.after_step(step=1, policy=wrapped, reference=None)
        assert list(callback.copies["anchor"]) == ["weight"]


def zero_3(model):
    model.weight.ds_id = 0


def dtensor(model):
    model.weight.full_tensor = None


def fsdp(model):
    model._fsdp_wrapped_module = nn.Linear(1, 1)


@pytest.mark.parametrize("shard", [zero_3, dtensor, fsdp])
def test_sharded_weights_are_refused(shard):
    model = Number(1.0)
    shard(model)
    with pytest.raises(errors.ConfigError, match="sharded"):
        BEMACallback().on_train_begin(SimpleNamespace(), state_at(0), None, model=model)


def test_only_the_first_process_writes(tmp_path):
    callback, model = BEMACallback(), tiny_model()
    args, other = SimpleNamespace(output_dir=str(tmp_path)), SimpleNamespace(global_step=0, is_world_process_zero=False)
    callback.on_train_begin(args, other, None, model=model)
    callback.on_save(args, other, None, model=model)
    callback.on_train_end(args, other, None, model=model)
    assert not list(tmp_path.iterdir())
