"""Where every public name of TRL is to be found here, or why it has no home; data, and how to look it up.

Covered are the names of TRL 0.7, 0.11, 0.24, 1.0, 1.12 and 1.16. TRL moved names between its modules from release to
release, so outside `trl.experimental` a name counts and its module does not: `trl.GRPOTrainer` stands for
`trl.trainer.grpo_trainer.GRPOTrainer` too. Inside, one name has several meanings, so the package counts as well.
"""

from __future__ import annotations

from dataclasses import dataclass

from .. import markdown


def words(text: str) -> frozenset[str]:
    """The words of a text: a list of names that stays readable."""
    return frozenset(text.split())


@dataclass(frozen=True)
class Home:
    """Where a name is to be found here."""

    module: str
    name: str

    @property
    def distribution(self) -> str:
        """The distribution to install."""
        return self.module.split(".")[0].replace("_", "-")

    @property
    def algorithm(self) -> str | None:
        """Whose config or trainer it is: "sft", "ppo", "classic" for the step API; None for anything else."""
        stem = self.name.removesuffix("Config").removesuffix("Trainer")
        return None if stem == self.name else _ALGORITHMS.get((self.module, stem))


@dataclass(frozen=True)
class Homeless:
    """Why a name has no home here, and what to do instead."""

    why: str
    instead: str


_ALGORITHMS = {
    ("trl_core", "SFT"): "sft",
    ("trl_core", "Reward"): "reward",
    ("trl_core", "DPO"): "dpo",
    ("trl_core", "GRPO"): "grpo",
    ("trl_bema", "DPO"): "dpo",
    ("trl_gfpo", "GFPO"): "gfpo",
    ("trl_gspo", "GRPO"): "gspo_token",
    ("trl_replay", "GRPOWithReplayBuffer"): "replay",
    ("trl_ppo", "PPO"): "ppo",
    ("trl_ppo.classic", "PPO"): "classic",
}

# (module in TRL, module here, names); "Old=New" where the name differs here.
HOMES = (
    ("trl", "trl_core", "SFTConfig SFTTrainer RewardConfig RewardTrainer DPOConfig DPOTrainer GRPOConfig GRPOTrainer"),
    ("trl", "trl_core.data", "pack_dataset maybe_unpair_preference_dataset"),
    ("trl", "trl_core.data", "unpair_preference_dataset=maybe_unpair_preference_dataset"),
    ("trl.import_utils", "trl_core", "TRLExperimentalWarning"),
    ("trl.trainer.utils", "trl_core.models", "disable_dropout_in_model=disable_dropout"),
    ("trl", "trl_bema", "BEMACallback"),
    ("trl", "trl_ppo.classic", "AutoModelForCausalLMWithValueHead create_reference_model"),
    ("trl.core", "trl_ppo.classic", "LengthSampler respond_to_batch"),
    ("trl.trainer", "trl_ppo.classic", "AdaptiveKLController FixedKLController"),
    ("trl", "trl_ppo", "PPOv2Config=PPOConfig PPOv2Trainer=PPOTrainer"),
    ("trl", "transformers", "set_seed"),
    ("trl", "transformers.utils", "is_peft_available is_bitsandbytes_available"),
    ("trl.experimental.bema_for_ref_model", "trl_bema", "BEMACallback DPOTrainer"),
    ("trl.experimental.gfpo", "trl_gfpo", "GFPOConfig GFPOTrainer"),
    ("trl.experimental.gspo_token", "trl_gspo", "GRPOTrainer"),
    (
        "trl.experimental.grpo_with_replay_buffer",
        "trl_replay",
        "GRPOWithReplayBufferConfig GRPOWithReplayBufferTrainer",
    ),
    ("trl.experimental.ppo", "trl_ppo", "PPOConfig PPOTrainer"),
    ("trl.experimental.ppo", "trl_ppo.classic", "AutoModelForCausalLMWithValueHead"),
    ("trl.experimental.utils", "trl_ppo.classic", "create_reference_model"),
)

AMBIGUOUS = {
    name: {"classic": Home("trl_ppo.classic", name), "later": Home("trl_ppo", name)}
    for name in ("PPOConfig", "PPOTrainer")
}
"""Names of `trl` that meant the step API up to TRL 0.11 and a trainer with a reward model after it."""

_PLUGIN = "write it as a plugin (docs/writing-a-plugin.md), or keep TRL for this script"
_OWN_SCRIPT = "a dataclass of your own with transformers.HfArgumentParser, or `trl-core train NAME --config FILE`"
_MESSAGES = "nothing: the trainers render messages themselves; else tokenizer.apply_chat_template(messages)"
_OWN_REWARD = "a function of your own that gets completions and returns numbers; that of TRL may be copied"
_STEPS = "trl_core.stages has the steps as plain functions; else copy the few lines"
_WHOLE = "it takes a row in TRL, and the function of that name here takes a dataset"

# (why, what to do instead, names). In the order of a reader's likely interest.
HOMELESS = (
    (
        "there is no RLOO here",
        'GRPOTrainer with scale_rewards="none": its advantages are those of RLOO times (G - 1) / G',
        "RLOOConfig RLOOTrainer",
    ),
    ("there is no KTO here", _PLUGIN, "KTOConfig KTOTrainer"),
    (
        "there is no preference loss without a reference model here",
        "DPOTrainer, with precompute_ref_log_probs=True if the memory is short; or " + _PLUGIN,
        "CPOConfig CPOTrainer ORPOConfig ORPOTrainer",
    ),
    (
        "the BCO trainer for unpaired data is not here",
        'DPOConfig(loss_type="bco_pair") on pairs',
        "BCOConfig BCOTrainer",
    ),
    (
        "there is no online preference optimisation here",
        "GRPOTrainer with the same reward model; or " + _PLUGIN,
        "OnlineDPOConfig OnlineDPOTrainer NashMDConfig NashMDTrainer XPOConfig XPOTrainer GeometricMixtureWrapper",
    ),
    ("there are no process reward models here", _PLUGIN, "PRMConfig PRMTrainer StepwiseRewardTrainer"),
    (
        "there is no distillation from a teacher here",
        _PLUGIN,
        "GKDConfig GKDTrainer GOLDConfig GOLDTrainer MiniLLMConfig MiniLLMTrainer DistillationConfig "
        "DistillationTrainer AsyncDistillationConfig AsyncDistillationTrainer ServerDistillationConfig "
        "ServerDistillationTrainer build_teacher_request_inputs IWOPDConfig IWOPDTrainer SDFTConfig SDFTTrainer "
        "SDPOConfig SDPOTrainer SSDConfig SSDTrainer SelfDistillationConfig SelfDistillationMixin",
    ),
    (
        "this variant of GRPO is not here",
        _PLUGIN,
        "A2POConfig A2POTrainer GMPOConfig GMPOTrainer DPPOConfig DPPOTrainer PAPOConfig PAPOTrainer TPOConfig "
        "TPOTrainer",
    ),
    (
        "generation beside training is not here",
        "GRPOTrainer; overlap_rewards=True hides the time of slow rewards",
        "AsyncGRPOConfig AsyncGRPOTrainer",
    ),
    (
        "the RLOO trainer of TRL 0.11 is not here",
        "GRPOTrainer, or PPOTrainer of trl_ppo",
        "RLOOv2Config RLOOv2Trainer",
    ),
    (
        "there is no such loop here",
        "SFTTrainer, with a new dataset for each round",
        "IterativeSFTConfig IterativeSFTTrainer",
    ),
    (
        "there are no image generation models here",
        "keep TRL 0.11 or the diffusers project for it",
        "DDPOConfig DDPOTrainer AlignPropConfig AlignPropTrainer DDPOPipelineOutput DDPOSchedulerOutput "
        "DDPOStableDiffusionPipeline DefaultDDPOStableDiffusionPipeline",
    ),
    (
        "there are no models with encoder and decoder here",
        "a causal language model with trl_ppo.classic.AutoModelForCausalLMWithValueHead",
        "AutoModelForSeq2SeqLMWithValueHead",
    ),
    (
        "it is a base class of TRL's models",
        "trl_ppo.classic.AutoModelForCausalLMWithValueHead, if you mean that model",
        "PreTrainedModelWrapper ValueHead SUPPORTED_ARCHITECTURES",
    ),
    ("it is a base class of TRL's trainers", "docs/writing-a-plugin.md", "BaseTrainer"),
    ("vLLM is not built in", "GRPOTrainer(rollouts=...) takes a backend of your own", "VLLMClient VLLMGeneration"),
    (
        "there are no tools and environments here",
        "GRPOTrainer(rollouts=...) takes a backend of your own; or " + _PLUGIN,
        "TextEnvironment TextHistory AGENTS HarborBashEnv HarborEnv HarborSpec OpenRewardSpec "
        "generate_rollout_completions",
    ),
    (
        "the options of TRL's scripts are not here",
        _OWN_SCRIPT,
        "ScriptArguments TrlParser ModelConfig H4ArgumentParser "
        "SFTScriptArguments DPOScriptArguments RewardScriptArguments",
    ),
    (
        "datasets of a script are not read by a function of TRL's kind",
        'datasets.load_dataset, or trl_core.data.load_mixture({"datasets": [...]})',
        "DatasetMixtureConfig DatasetConfig get_dataset",
    ),
    (
        "it reads TRL's ModelConfig",
        "peft.LoraConfig(r=..., lora_alpha=..., target_modules=...) as the trainer's peft_config",
        "get_peft_config",
    ),
    (
        "it reads TRL's ModelConfig",
        'transformers.BitsAndBytesConfig(...) in model_init_kwargs={"quantization_config": ...}',
        "get_quantization_config",
    ),
    (
        "it is one line",
        '{"": accelerate.PartialState().local_process_index} as device_map, where one is needed',
        "get_kbit_device_map",
    ),
    ("it is one line", "transformers.logging.set_verbosity_error()", "init_zero_verbose"),
    (
        "it sets variables for a single process",
        "accelerate launch, or nothing on one device",
        "ensure_master_addr_port",
    ),
    ("the trainers load adapters themselves", "peft_config=...", "prepare_peft_model peft_module_casting_to_bf16"),
    (
        "models with quantised weights are prepared by peft",
        "peft.prepare_model_for_kbit_training",
        "prepare_model_for_kbit_training",
    ),
    (
        "a chat template is set on the tokenizer",
        "tokenizer.chat_template = ..., or chat_template_path=... of the config; new tokens: tokenizer.add_tokens and "
        "model.resize_token_embeddings",
        "clone_chat_template setup_chat_format ChatMlSpecialTokens FORMATS_MAPPING get_formatting_func_from_dataset",
    ),
    (
        "templates are not changed here",
        "a chat template with {% generation %} marks, for assistant_only_loss=True",
        "get_training_chat_template add_response_schema supports_tool_calling parse_response",
    ),
    ("rows are rendered by the trainers", _MESSAGES, "apply_chat_template maybe_apply_chat_template"),
    (
        _WHOLE,
        "nothing: the trainers find the prompt; or trl_core.data.maybe_extract_prompt(dataset) instead of dataset.map",
        "extract_prompt maybe_extract_prompt",
    ),
    (
        _WHOLE,
        "nothing: the trainers convert; or trl_core.data.maybe_convert_to_chatml(dataset) instead of dataset.map",
        "maybe_convert_to_chatml",
    ),
    (
        "it takes a row in TRL, and the function of that name here a prompt",
        'trl_core.data.is_conversational(row["prompt"])',
        "is_conversational is_conversational_from_value",
    ),
    (
        "there are no images here",
        "keep TRL for models that see",
        "prepare_multimodal_messages prepare_multimodal_messages_vllm DataCollatorForVisionLanguageChatML "
        "DataCollatorForVisionLanguageModeling",
    ),
    ("the trainers cut rows themselves", "max_length=... and truncation_mode=...", "truncate_dataset"),
    (
        "batches are not collated by a class that can be passed",
        "data of prompt and completion, or messages with assistant_only_loss=True: the loss is on completions",
        "DataCollatorForCompletionOnlyLM DataCollatorForChatML",
    ),
    (
        "batches are not collated by a class that can be passed",
        "leave it out; packing is an option (packing=True)",
        "ConstantLengthDataset DPODataCollatorWithPadding RewardDataCollatorWithPadding PPODataCollatorWithPadding "
        "DataCollatorForLanguageModeling DataCollatorForPreference DataCollatorForUnpairedPreference",
    ),
    (
        "the buffer here is used otherwise",
        "trl_replay.ReplayBuffer with push(score, item) and entries()",
        "ReplayBuffer",
    ),
    ("it is an option here", "sync_ref_model=True of DPOConfig or GRPOConfig", "SyncRefModelCallback"),
    ("it is an option here", "log_completions=True of the online trainers", "LogCompletionsCallback WeaveCallback"),
    (
        "progress is shown by another callback",
        "leave it out, or trl_core.StepLineCallback",
        "RichProgressCallback",
    ),
    (
        "there are no judges here",
        "a reward function of your own",
        "BaseJudge BaseBinaryJudge BasePairwiseJudge BaseRankJudge AllTrueJudge HfPairwiseJudge HfRankJudge "
        "OpenAIPairwiseJudge OpenAIRankJudge PairRMJudge MockJudge MockRankJudge RandomPairwiseJudge RandomRankJudge "
        "WinRateCallback",
    ),
    (
        "models are not merged here",
        "mergekit by itself, after training",
        "MergeConfig MergeModelCallback merge_models upload_model_to_hf",
    ),
    (
        "it is not here",
        "model.generate(..., num_return_sequences=n) and the best by your score",
        "BestOfNSampler",
    ),
    (
        "rewards are not part of the library",
        _OWN_REWARD,
        "think_format_reward accuracy_reward reasoning_accuracy_reward get_soft_overlong_punishment "
        "get_cosine_scaled_reward get_repetition_penalty_reward",
    ),
    (
        "the options take plain strings",
        'f_divergence_type="reverse_kl", "js_divergence" or "alpha_divergence"; f_alpha_divergence_coef=...',
        "FDivergenceType FDivergenceConstants",
    ),
    (
        "it is part of the loop here",
        _STEPS,
        "logprobs_from_logits entropy_from_logits whiten masked_mean masked_var masked_whiten clip_by_value "
        "flatten_dict convert_to_scalar stack_dicts add_suffix pad_to_size average_torch_dicts stats_to_np "
        "listify_batch build_bert_batch_from_txt top_k_top_p_filtering replace_logits randn_tensor PPODecorators "
        "WANDB_PADDING RunningMoments pad pad_to_length selective_log_softmax compute_accuracy "
        "decode_and_strip_padding cap_exp exact_div get_reward forward first_true_indices batch_generation "
        "RepeatSampler generate_model_card add_bos_token_if_needed add_eos_token_if_needed truncate_right",
    ),
    (
        "loading and sharding models is part of the loop here",
        "accelerate launch; the trainers load and prepare models",
        "prepare_deepspeed prepare_fsdp unwrap_model_for_generation get_act_offloading_ctx_manager "
        "enable_gradient_checkpointing create_model_from_path enable_selective_activation_checkpointing",
    ),
    (
        "the head is computed in parts in every run",
        "nothing",
        "add_fused_lm_head patch_chunked_lm_head FusedCausalLMOutput CausalLMOutputWithPastAndFlatLogits",
    ),
    ("it is a variable here too", "TRL_EXPERIMENTAL_SILENCE=1", "suppress_experimental_warning suppress_warning"),
    (
        "profiling marks are not here",
        "torch.profiler, or transformers' callbacks",
        "profiling_context profiling_decorator ProfilingContext",
    ),
    (
        "it tells whether a package is there that is of no use here",
        "importlib.util.find_spec",
        "is_wandb_available is_deepspeed_available is_diffusers_available is_npu_available is_xpu_available "
        "is_llm_blender_available is_llmblender_available is_liger_kernel_available is_mergekit_available "
        "is_rich_available is_sklearn_available is_vllm_available is_unsloth_available is_weave_available "
        "is_math_verify_available is_fastapi_available is_pydantic_available is_requests_available "
        "is_uvicorn_available is_joblib_available is_jmespath_available is_transformers_greater_than "
        "is_accelerate_greater_20_0 is_torch_greater_2_0 is_torchvision_available",
    ),
    ("a version of TRL says nothing about trl-core", "trl_core.__version__, for its own versions", "__version__"),
)

# Modules whose further names only TRL's own trainers need.
_HELPERS = (
    "trl.trainer.utils",
    "trl.trainer.callbacks",
    "trl.experimental.utils",
    "trl.experimental.merge_model_callback",
    "trl.models",
    "trl.import_utils",
    "trl.data_utils",
    "trl.chat_template_utils",
    "trl.generation",
    "trl.extras",
    "trl.core",
    "trl.env_utils",
)
HELPER = Homeless("it is a helper of TRL's own trainers", "copy the few lines, or keep TRL for this script")
UNKNOWN = Homeless("this name of TRL is not known here", "keep TRL for it, or ask for it with a few words on its use")
STAR = Homeless("what it brings is not known without TRL", "name what you use: from trl import GRPOTrainer, ...")
AMBIGUITY = Homeless(
    "it can be the step API of TRL up to 0.11 or the trainer with a reward model after it, and this file does not say",
    "trl_ppo.classic for trainer.step(queries, responses, scores), trl_ppo for trainer.train()",
)


def _homes() -> dict[str, Home]:
    found = {}
    for old, new, names in HOMES:
        for entry in names.split():
            name, _, renamed = entry.partition("=")
            found[canonical(f"{old}.{name}")] = Home(new, renamed or name)
    return found


def canonical(qualified: str) -> str:
    """`trl.NAME`, or within experimental `trl.experimental.PACKAGE.NAME`, whatever modules are between."""
    parts = qualified.split(".")
    if parts[1:2] == ["experimental"] and len(parts) > 3:
        return ".".join([*parts[:3], parts[-1]])
    return f"{parts[0]}.{parts[-1]}"


_HOME_OF = _homes()
_WHY = {name: Homeless(why, instead) for why, instead, names in HOMELESS for name in names.split()}


_MODULES = words(
    "trainer models core extras rewards experimental scripts generation environment data_utils import_utils "
    "chat_template_utils mergekit_utils utils callbacks judges modeling_base modeling_value_head modeling_sd_base "
    "merge_model_callback winrate_callback profiling vllm_client best_of_n_sampler base_environment"
)


def is_module(qualified: str) -> bool:
    """Whether a dotted name of TRL is one of its modules, by how TRL names them."""
    before, _, name = qualified.rpartition(".")
    if qualified == "trl" or (before == "trl.experimental" and name.islower()) or name in _MODULES:
        return True
    return name.endswith(("_trainer", "_config", "_rewards")) and not name.startswith("get_")


def module_home(qualified: str) -> str | None:
    """The module here that stands for a module of TRL that is imported and not used; None if there is none."""
    package = ".".join(qualified.split(".")[: 3 if qualified.startswith("trl.experimental") else 1])
    return "trl_core" if package == "trl" else next((new for old, new, _ in HOMES if old == package), None)


def why_no_module(qualified: str) -> Homeless:
    """Why a module of TRL that is imported has no home here."""
    wanted = qualified.rpartition(".")[2].replace("_", "") + "trainer"
    return next((why for name, why in _WHY.items() if name.lower() == wanted), UNKNOWN)


def look_up(qualified: str, ppo: str | None = None) -> Home | Homeless:
    """The home of a name of TRL, or why it has none.

    Args:
        qualified: such as `trl.trainer.dpo_trainer.DPOTrainer`.
        ppo: which PPO the file uses, "classic" or "later", if that is known.
    """
    name, known = qualified.rpartition(".")[2], canonical(qualified)
    experimental = known.startswith("trl.experimental.")
    if name in AMBIGUOUS and not experimental:
        return AMBIGUOUS[name][ppo] if ppo else AMBIGUITY
    home = _HOME_OF.get(known)
    helper = qualified.startswith(tuple(f"{module}." for module in _HELPERS))
    return home or _WHY.get(name, HELPER if helper else UNKNOWN)


def table() -> str:
    """The homes as a Markdown table, for docs/migration.md."""
    rows = []
    for old, new, names in HOMES:
        pairs = [entry.partition("=") for entry in names.split()]
        theirs = ", ".join(f"`{name}`" for name, _, _ in pairs)
        ours = f"`{new}`" + "".join(f", as `{new_name}`" for _, _, new_name in pairs if new_name)
        rows.append([f"`{old}`: {theirs}", ours, f"`{Home(new, '').distribution}`"])
    rows.append(["`trl`: `PPOConfig`, `PPOTrainer` up to 0.11 (`.step`)", "`trl_ppo.classic`", "`trl-ppo`"])
    rows.append(["`trl`: `PPOConfig`, `PPOTrainer` from 0.12 (`.train`)", "`trl_ppo`", "`trl-ppo`"])
    return markdown.table(["TRL", "here", "install"], rows)


def table_of_homeless() -> str:
    """The names without a home as a Markdown table: what, why, and what to do instead."""
    rows = [[", ".join(f"`{name}`" for name in names.split()), why, instead] for why, instead, names in HOMELESS]
    return markdown.table(["TRL", "why it is not here", "instead"], rows)
