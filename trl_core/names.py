"""Names that users write: the nearest known one, and folders or Hub ids of models."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable

from .errors import ConfigError

SYNONYMS = {
    name: ours
    for ours, names in {
        "beta": "kl_coef kl_coeff kl_beta init_kl_coef kl_penalty",
        "bf16": "mixed_precision",
        "dataset": "dataset_name dataset_path train_dataset train_file data data_path dataset_id dataset_train_split "
        "dataset_test_split",
        "dataset_config": "dataset_config_name subset",
        "epsilon": "clip_range cliprange clip_eps epsilon_low",
        "eval_dataset": "eval_file validation_file eval_dataset_name test_dataset validation_dataset",
        "eval_strategy": "evaluation_strategy",
        "gradient_accumulation_steps": "grad_accum grad_accumulation accumulation_steps accumulate_grad_batches",
        "learning_rate": "lr learningrate",
        "logging_steps": "log_steps log_every log_interval",
        "lr_scheduler_type": "lr_scheduler scheduler lr_schedule",
        "max_completion_length": "max_new_tokens response_length completion_length max_response_length max_tokens",
        "max_grad_norm": "grad_clip gradient_clipping clip_grad clip_grad_norm gradient_clip_val",
        "max_length": "max_seq_length max_seq_len sequence_len max_sequence_length cutoff_len",
        "max_steps": "steps num_steps total_steps num_training_steps iters",
        "model": "model_name_or_path model_name base_model model_path model_id pretrained_model_name_or_path",
        "model_init_kwargs": "torch_dtype dtype attn_implementation model_revision load_in_4bit load_in_8bit "
        "quantization flash_attention device_map",
        "num_generations": "num_return_sequences group_size rollout_n n_samples num_samples",
        "num_train_epochs": "epochs epoch num_epochs n_epochs train_epochs nepochs max_epochs",
        "optim": "optimizer",
        "output_dir": "output out out_dir output_path save_dir",
        "peft": "use_peft use_lora lora qlora adapter lora_r lora_rank lora_alpha lora_dropout lora_target_modules "
        "lora_modules_to_save lora_task_type use_dora use_rslora peft_config peft_type",
        "per_device_eval_batch_size": "eval_batch_size val_batch_size",
        "per_device_train_batch_size": "batch_size train_batch_size micro_batch_size per_device_batch_size "
        "per_gpu_train_batch_size micro_batch_size_per_gpu bs",
        "ref_model": "reference_model ref_model_name_or_path ref_model_path",
        "report_to": "log_to logger use_wandb wandb with_tracking log_with",
        "resume": "resume_from resume_from_ckpt checkpoint",
        "reward_funcs": "reward_function reward_func reward_functions rewards reward_model_name_or_path "
        "reward_model_path",
        "run_name": "wandb_run_name experiment_name exp_name",
        "save_steps": "save_freq save_every save_interval",
        "seed": "random_seed",
        "streaming": "dataset_streaming",
        "use_cpu": "no_cuda cpu",
        "warmup_steps": "warmup warmup_ratio num_warmup_steps",
    }.items()
    for name in names.split()
}
"""Options of other trainers and command lines, and what does the same here."""
_ELSEWHERE = {
    "vllm": "Another engine generates through the trainer's argument `rollouts`, in Python.",
    "use_vllm": "Another engine generates through the trainer's argument `rollouts`, in Python.",
    "max_prompt_length": "Prompts are never cut: shorten or drop those that are too long.",
    "wandb": "Trackers read their own environment variables; report_to names them.",
}
"""Beginnings of options that have no counterpart, and what to do instead."""


def did_you_mean(word: object, known: Iterable[object]) -> str:
    """A sentence, to be appended, that names the known name which is meant; empty if none is near."""
    choices, name = [*map(str, known)], re.sub(r"[\W_]+", "_", str(word)).strip("_").lower()
    if (ours := SYNONYMS.get(name)) in choices:
        return f" Did you mean {ours!r}?"
    if advice := next(
        (text for start, text in _ELSEWHERE.items() if name == start or name.startswith(f"{start}_")), None
    ):
        return f" {advice}"
    close = difflib.get_close_matches(name, choices, n=1) or difflib.get_close_matches(str(word), choices, n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


def require_source(given: str, what: str, *, inside: str = "", file: str = "config.json") -> str:
    """The folder or Hub id of a model as it can be loaded: a folder with its `~` put in full.

    Args:
        given: what the user wrote.
        what: how to call it in messages: "The model".
        inside: folder inside it that has the model.
        file: what such a folder has; "" for nothing certain.

    Raises:
        ConfigError: no such folder, a file, a folder without a model, or no Hub id.
    """
    path, wrong = os.path.expanduser(given), None
    if os.path.isdir(path):
        files = (file, "adapter_config.json")
        if file and not any(os.path.exists(os.path.join(path, inside, name)) for name in files):
            wrong = f"the folder has no {file}"
    elif os.path.exists(path):
        wrong = "it is a file, not the folder of a model"
    elif not re.fullmatch(r"(\w[\w.-]*/)?\w[\w.-]*", given):
        wrong = f"there is no such folder (looked up in {os.getcwd()!r}), and it is no Hub id"
    if wrong:
        raise ConfigError(
            f"{what} {given!r} cannot be loaded: {wrong}.",
            mend="Give a folder that has a config.json and weights, or a Hub id (owner/name) that can be reached.",
        )
    return path if os.path.isdir(path) else given
