"""Which of the two trainers that TRL called `PPOTrainer` a script uses."""

from __future__ import annotations

from .bindings import Script, Use
from .names import AMBIGUOUS, words

# In what is passed, called and imported. What both have, such as batch_size, tells nothing.
_CLASSIC_OPTIONS = words(
    "model_name ppo_epochs init_kl_coef adap_kl_ctrl kl_penalty target horizon early_stopping target_kl log_with "
    "use_score_scaling use_score_norm score_clip ratio_threshold tracker_project_name tracker_kwargs project_kwargs "
    "accelerator_kwargs forward_batch_size optimize_cuda_cache steps task_name query_dataset reward_model_name"
)
_LATER_OPTIONS = words(
    "output_dir num_ppo_epochs total_episodes kl_coef response_length missing_eos_penalty num_mini_batches stop_token "
    "per_device_train_batch_size sft_model_path reward_model_path local_rollout_forward_batch_size kl_estimator "
    "stop_token_id num_sample_generations report_to num_train_epochs"
)
_CLASSIC_ARGUMENTS = frozenset(["dataset", "num_shared_layers", "lr_scheduler"])
_LATER_ARGUMENTS = words(
    "args reward_model value_model policy ref_policy processing_class train_dataset eval_dataset peft_config"
)
_CLASSIC_METHODS = frozenset(["step", "log_stats", "generate", "prepare_dataloader"])
_LATER_METHODS = frozenset(["train", "generate_completions", "save_model", "evaluate"])
_CLASSIC_NAMES = words(
    "AutoModelForCausalLMWithValueHead AutoModelForSeq2SeqLMWithValueHead respond_to_batch LengthSampler "
    "AdaptiveKLController FixedKLController"
)
_WEAK = frozenset(["config", "tokenizer", "batch_size", "mini_batch_size"])
"""What the step API has; early versions of the later trainer had it too."""


def which(script: Script) -> str | None:
    """Which of "classic" and "later", or None if the script does not say or says both."""
    uses = [use for binding in script.bindings for use in binding.uses if use.name]
    names = {binding.target.rpartition(".")[2] for binding in script.bindings}
    names |= {str(use.name).rpartition(".")[2] for use in uses}
    if not names & set(AMBIGUOUS):
        return None
    passed = {kind: _keywords(uses, f"PPO{kind.capitalize()}") for kind in ("config", "trainer")}
    called = _methods(script)
    classic = bool(
        passed["config"] & _CLASSIC_OPTIONS
        or passed["trainer"] & _CLASSIC_ARGUMENTS
        or called & _CLASSIC_METHODS
        or names & _CLASSIC_NAMES
    )
    later = bool(passed["config"] & _LATER_OPTIONS or passed["trainer"] & _LATER_ARGUMENTS or called & _LATER_METHODS)
    if not classic and not later:
        classic = bool((passed["config"] | passed["trainer"]) & _WEAK)
    return None if classic == later else "classic" if classic else "later"


def _of(use: Use, name: str) -> bool:
    return str(use.name).rpartition(".")[2] == name and not str(use.name).startswith("trl.experimental.")


def _keywords(uses: list[Use], name: str) -> set[str]:
    calls = [use.call for use in uses if use.call and _of(use, name)]
    return {argument.keyword.value for call in calls for argument in call.args if argument.keyword}


def _methods(script: Script) -> set[str]:
    """The methods called on what was made by calling PPOTrainer."""
    return {
        method
        for variable, makers in script.assigned.items()
        if any(maker.rpartition(".")[2] in _local_names(script) for maker in makers)
        for method in script.methods.get(variable, ())
    }


def _local_names(script: Script) -> set[str]:
    return {"PPOTrainer"} | {b.local for b in script.bindings if b.target.endswith(".PPOTrainer")}
