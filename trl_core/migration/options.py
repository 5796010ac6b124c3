"""Options and arguments of TRL's configs and trainers that are called otherwise here, or are not there."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
import warnings

from .names import Home, Homeless

RENAMED = {
    "config": {
        "evaluation_strategy": "eval_strategy",
        "max_seq_length": "max_length",
        "no_cuda": "use_cpu",
        "vllm_importance_sampling_cap": "vllm_importance_sampling_clip_max",
        "warmup_ratio": "warmup_steps",  # which is a share where it is below 1
    },
    "trainer": {
        "config": "args",
        "policy": "model",
        "ref_policy": "ref_model",
        "tokenizer": "processing_class",
    },
}
"""Names with the same meaning; used only where the old one is unknown here and the new one is known."""

WITHOUT_EFFECT = {
    "dataset_batch_size": "only the speed of tokenising depended on it",
    "dataset_num_proc": "only the speed of tokenising depended on it",
    "overwrite_output_dir": "no trainer read it",
    "save_safetensors": "weights are always safetensors",
}
"""Options that are left out, because no result depends on them."""

_VLLM = Homeless("vLLM is not built in", "leave it out; GRPOTrainer(rollouts=...) takes a backend of your own")
_DECODING = Homeless("completions are drawn by a loop of the core", "leave it out; generation_rows is near to it")
_IN_CONFIG = "it is an option here"
_LOSS = Homeless("the loss is formed by hooks", "docs/writing-a-plugin.md")
_METRICS = Homeless("metrics are the trainer's own", "a callback, or evaluate after training")
_PATHS = Homeless("only TRL's scripts read it", "keep the path in a variable of your script")
_COMPUTED = Homeless("it follows from other options", "per_device_train_batch_size and gradient_accumulation_steps")
_VISION = Homeless("there are no images here", "leave it out")
_TOOLS = Homeless("there are no tools and environments here", "GRPOTrainer(rollouts=...) takes a backend of your own")
ABSENT = {
    "cast_lm_head_to_fp32": Homeless("there is no such cast here", "leave it out"),
    "cache_implementation": _DECODING,
    "compute_loss_func": _LOSS,
    "compute_metrics": _METRICS,
    "data_collator": Homeless("rows are collated by the trainer", "leave it out"),
    "dataset_kwargs": Homeless("every dataset is checked and tokenised here", "leave it out"),
    "ds3_gather_for_generation": Homeless("nothing is gathered for generation", "leave it out"),
    "environment_factory": _TOOLS,
    "group_by_length": Homeless(
        "this transformers has it no longer", 'train_sampling_strategy="group_by_length" for True'
    ),
    "log_completions_hub_repo": Homeless("they are written to <output_dir>/completions", "upload that folder"),
    "is_encoder_decoder": Homeless("there are no models with encoder and decoder here", "leave it out"),
    "log_unique_prompts": Homeless("the sample is printed as it comes", "leave it out"),
    "logging_dir": Homeless("this transformers has it no longer", "the variable TENSORBOARD_LOGGING_DIR"),
    "max_prompt_length": Homeless(
        "prompts are not cut here", "leave it out, or drop or cut long prompts in the dataset first"
    ),
    "max_target_length": Homeless("there are no models with encoder and decoder here", "leave it out"),
    "max_tool_calling_iterations": _TOOLS,
    "model_adapter_name": Homeless("the adapter that is active is trained", "leave it out"),
    "neftune_noise_alpha": Homeless(_IN_CONFIG, "neftune_noise_alpha=... of the config"),
    "optimizer_cls_and_kwargs": Homeless("it is not here", "optimizers=(optimizer, scheduler)"),
    "preprocess_logits_for_metrics": _METRICS,
    "quantization_config": Homeless("it is not here", 'model_init_kwargs={"quantization_config": ...}'),
    "ref_adapter_name": Homeless("the reference is the model without its adapter", "leave it out"),
    "reference_free": Homeless("there is no preference loss without a reference model here", "keep TRL for it"),
    "reward_model_path": _PATHS,
    "rollout_func": Homeless("it has another form here", "GRPOTrainer(rollouts=...): docs/algorithms/grpo.md"),
    "sft_model_path": _PATHS,
    "tools": _TOOLS,
    "log_multimodal": _VISION,
    "use_liger_loss": Homeless("the head is chunked always, so it saves nothing", "leave it out"),
    "use_vllm": _VLLM,
    **dict.fromkeys(("use_transformers_paged", "use_transformers_continuous_batching"), _DECODING),
    "transformers_continuous_batching_config": _DECODING,
    **dict.fromkeys(("batch_size", "mini_batch_size", "local_batch_size", "local_mini_batch_size"), _COMPUTED),
    **dict.fromkeys(("micro_batch_size", "world_size", "num_total_batches"), _COMPUTED),
}

POSITIONS = {"sft": 2, "reward": 2, "dpo": 3, "bema": 3, "ppo": 0, "classic": 9}
"""How many arguments of a trainer have the same places as in TRL; the online ones: `_ONLINE`."""
_ONLINE = 7
_ALL = 99

CHANGED = {
    "f_alpha_divergence_coef": Homeless(
        "the coefficient is turned round since TRL 0.27, as here", "1 - a, if the script is for an older TRL"
    ),
    "use_liger_kernel": Homeless("there are no Liger kernels here", "leave it out"),
}
"""Options that are there, and may mean something else."""


def kind_of(home: Home) -> str:
    """Whether a name is a "config", a "trainer", or any other "function" or class that is called."""
    if home.algorithm is None:
        return "function"
    return "config" if home.name.endswith("Config") else "trainer"


@functools.cache
def accepted(home: Home) -> frozenset[str] | None:
    """The options of a config, or the arguments of what is called; None if it is not installed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = getattr(importlib.import_module(home.module), home.name)
    except ImportError:
        return None
    if home.algorithm is None:
        return frozenset(inspect.signature(made).parameters)
    if dataclasses.is_dataclass(made):
        return frozenset(f.name for f in dataclasses.fields(made) if f.init)
    own = [base for base in made.__mro__ if base.__module__.startswith("trl_") and "__init__" in vars(base)]
    names = {name for base in own for name in inspect.signature(base.__init__).parameters}
    composition = getattr(made, "composition", None)
    return frozenset(names - {"self", "arguments", "more"}) | frozenset(getattr(composition, "arguments", ()))


def same_places(home: Home) -> int:
    """How many positional arguments mean the same as in TRL."""
    if kind_of(home) == "config":
        return 0 if home.algorithm == "classic" else 1
    if kind_of(home) == "function":
        return 2 if home.module == "trl_core.data" else _ALL
    return POSITIONS.get(home.algorithm or "", _ONLINE)


def why_absent(option: str, home: Home) -> Homeless:
    """Why a config or trainer has not this option or argument, and what to do instead."""
    if kind_of(home) == "trainer" and home.algorithm != "classic":
        config = Home(home.module, home.name.removesuffix("Trainer") + "Config")
        known = accepted(config) if config.algorithm and home.module != "trl_gspo" else None
        new = RENAMED["config"].get(option, option)
        if known and new in known:
            return Homeless(f"it is an option of {config.name} here", f"{config.name}({new}=...)")
    if option in ABSENT:
        return ABSENT[option]
    if option.startswith("vllm_"):
        return _VLLM
    word = "option" if kind_of(home) == "config" else "argument"
    return Homeless(f"{home.module}.{home.name} has no such {word}", "leave it out, or keep TRL for it")
