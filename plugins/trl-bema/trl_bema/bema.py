"""BEMA as a callback of any `transformers.Trainer`, and as an algorithm: DPO whose reference is the average."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import TrainerCallback

from trl_core import Algorithm, HookContext, check_options, errors, hookimpl, option, reference_parameters, require

STATE = ("anchor", "average", "published")
STATE_FILE = "bema_state.safetensors"


# -- options ----------------------------------------------------------------------------------------------------------
@dataclass(eq=False)
class Rates:
    """When and how the average moves; in brackets the paper's symbols."""

    update_freq: int = option(400, "Optimizer steps between two updates of the average (phi).", ge=1)
    ema_power: float = option(
        0.5, "The newest weights enter the average with age^-ema_power (kappa); 0: it is they.", ge=0
    )
    bias_power: float = option(
        0.2, "The way from the start is added times age^-bias_power (eta); large: not at all.", ge=0
    )
    lag: int = option(10, "After step t the age is lag + multiplier * t (rho).")
    update_after: int = option(0, "Step whose weights are the start, and before which nothing happens (tau).", ge=0)
    multiplier: float = option(1.0, "How much older the average gets per step (gamma).", ge=0)
    min_ema_multiplier: float = option(0.0, "Least weight of the newest weights in the average.", ge=0, le=1)

    def __post_init__(self) -> None:
        check_options(self)
        first = self.update_after + self.update_freq
        require(self.lag + self.multiplier * first >= 1, f"lag + multiplier * t is below 1 at t={first}.", "Raise lag.")


@dataclass(eq=False)
class Copies:
    """When the average becomes the reference."""

    update_ref_model: bool = option(False, "Copy the average into the reference model.")
    ref_model_update_freq: int = option(
        400, "Optimizer steps between two copies of the average into the reference.", ge=1
    )
    ref_model_update_after: int = option(
        0, "First step after which the average may be copied into the reference.", ge=0
    )

    def check_reference(self, args: Any) -> None:
        """Raise `ConfigError` if something else in `args` decides on the reference too."""
        others = [name for name in ("precompute_ref_log_probs", "sync_ref_model") if getattr(args, name, False)]
        what = f"update_ref_model=True contradicts {' and '.join(others)}=True."
        require(not (self.update_ref_model and others), what, "Turn one of them off.")


# -- the average ------------------------------------------------------------------------------------------------------
@dataclass(eq=False)
class BEMAverage(Rates):
    """Anchor, running average and published weights of named parameters, in float32.

    Attributes:
        step: the last optimizer step it was told of.
        copies: tensors by name of "anchor", "average" and "published", which is the average with its bias corrected.
    """

    device: str = option("cpu", "Where the three copies of the trained weights are kept.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.start({})

    def state_dict(self) -> dict[str, Any]:
        """The last step and the three copies, as they are."""
        return {"step": self.step, **self.copies}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""
        self.step: int = state["step"]
        self.copies: dict[str, dict[str, Tensor]] = {kind: self._copy(state[kind]) for kind in STATE}

    def _copy(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {k: v.to(self.device, torch.float32, copy=True).contiguous() for k, v in tensors.items()}

    def start(self, parameters: dict[str, Any]) -> None:
        """Forget everything; begin at these weights."""
        self.load_state_dict({"step": 0, **dict.fromkeys(STATE, parameters)})

    @torch.no_grad()
    def update(self, step: int, parameters: dict[str, Any]) -> None:
        """Take part after optimizer step `step`; told the same step again, it does nothing."""
        known, self.step, since = self.step, step, step - self.update_after
        if step == known or since < 0 or since % self.update_freq:
            return
        age = self.lag + self.multiplier * step
        weight = max(age**-self.ema_power, self.min_ema_multiplier) if since else 1.0
        for name, average in self.copies["average"].items():
            now, anchor = parameters[name].to(average), self.copies["anchor"][name]
            average.lerp_(now, weight)
            if since:
                torch.add(average, now - anchor, alpha=age**-self.bias_power, out=self.copies["published"][name])
            else:
                anchor.copy_(now)


# -- the callback -----------------------------------------------------------------------------------------------------
def bare(model: Any) -> Any:
    """The model without its wrappers; raises `ConfigError` if this process holds only parts of its weights."""
    sharded = any(hasattr(p, "ds_id") or hasattr(p, "full_tensor") for p in model.parameters())
    sharded = sharded or any(hasattr(module, "_fsdp_wrapped_module") for module in model.modules())
    require(not sharded, "BEMA cannot average sharded weights (ZeRO-3, FSDP, TP).", "Use data parallelism or ZeRO-2.")
    return extract_model_from_parallel(model, keep_torch_compile=False)


@dataclass(eq=False)
class BEMACallback(Copies, BEMAverage, TrainerCallback):
    """Keeps a bias-corrected average of the trained weights, and may copy it into the reference model.

    For every trainer of trl-core and for `transformers.Trainer`. The model that is trained is only read. The state goes
    into each checkpoint; at the end the averaged model is saved in `<output_dir>/bema`.

    Args:
        update_freq: optimizer steps between two updates of the average.
        ema_power: the newest weights enter it with age^-ema_power.
        bias_power: the way from the start is added times age^-bias_power.
        lag: the age after step t is lag + multiplier * t.
        update_after: step whose weights are the start, and before which nothing happens.
        multiplier: how much older the average gets per step.
        min_ema_multiplier: least weight of the newest weights in the average.
        device: where the three copies of the trained weights are kept.
        update_ref_model: copy the average into the reference of a trl-core trainer.
        ref_model_update_freq: optimizer steps between two such copies.
        ref_model_update_after: first step after which the average may be copied.

    Raises:
        ConfigError: a value is out of range or, when the trainer is made, the reference cannot be moved.
        CheckpointError: a run is resumed from a checkpoint without the average.
    """

    hook_step = 0  # the last step in which a trainer of trl-core called the hook: it keeps the state itself

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.check_reference(args)
        if self.update_ref_model:
            what = "update_ref_model=True, but this trainer has no reference model."
            require(getattr(args, "uses_reference", False), what, "Use one of trl-core that has, such as DPOTrainer.")
            what = "update_ref_model=True, but the reference is the policy without its adapter and cannot move alone."
            adapters = getattr(kwargs["model"], "peft_config", None)
            require(not adapters or "ref" in adapters, what, "Use BEMATrainer, or train all weights.")

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.on_init_end(args, state, control, **kwargs)
        weights = {name: p for name, p in bare(kwargs["model"]).named_parameters() if p.requires_grad}
        if state.global_step == 0:
            self.start(weights)
        elif self.step != state.global_step:
            self._read(Path(args.output_dir) / f"checkpoint-{state.global_step}" / STATE_FILE, state.global_step)
        if set(self.copies["anchor"]) != set(weights):
            raise errors.CheckpointError("The average is of other parameters than are trained.", mend="Train the same.")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.update(state.global_step, dict(bare(kwargs["model"]).named_parameters()))

    @hookimpl
    @torch.no_grad()
    def after_step(self, step: int, policy: nn.Module, reference: nn.Module | None) -> None:
        self.hook_step, current = step, dict(bare(policy).named_parameters())
        self.update(step, current)
        if self.update_ref_model and step in range(self.ref_model_update_after, step + 1, self.ref_model_update_freq):
            for name, parameter in reference_parameters(policy, reference).items():
                parameter.copy_((current | self.copies["published"])[name])

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero and self.hook_step != state.global_step:
            tensors = {f"{kind}/{name}": value for kind in STATE for name, value in self.copies[kind].items()}
            save_file(tensors, Path(args.output_dir) / f"checkpoint-{state.global_step}" / STATE_FILE)

    def _read(self, file: Path, step: int) -> None:
        if not file.is_file():
            raise errors.CheckpointError(f"No average was restored, and {file} is not there.", mend="Start a new run.")
        split = [(*key.partition("/"), tensor) for key, tensor in load_file(file).items()]
        kinds = {kind: {name: tensor for of, _, name, tensor in split if of == kind} for kind in STATE}
        self.load_state_dict({"step": step, **kinds})

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model, folder = bare(kwargs["model"]), Path(args.output_dir) / "bema"
        # By identity, so that the two names of a tied weight lead to one tensor.
        average, parameters = self.copies["published"], dict(model.named_parameters())
        new = {id(parameters[name]): value.to(parameters[name].dtype) for name, value in average.items()}
        weights = {key: new.get(id(value), value.detach()) for key, value in model.state_dict(keep_vars=True).items()}
        adapter = {"selected_adapters": [model.active_adapter]} if hasattr(model, "get_base_model") else {}
        if state.is_world_process_zero:
            model.save_pretrained(folder, state_dict=weights, **adapter)
            if hasattr(kwargs.get("processing_class"), "save_pretrained"):
                kwargs["processing_class"].save_pretrained(folder)


# -- the algorithm ----------------------------------------------------------------------------------------------------
@dataclass
class BEMAOptions(Copies, Rates):
    """What BEMA adds to the options of DPO."""

    bema_device: str = option("cpu", "Where the three copies of the trained weights are kept.", resume=False)
    update_ref_model: bool = option(True, "Copy the average into the reference model.")

    @property
    def separate_reference(self) -> bool:
        """Whether the reference moves, and so cannot be the policy without its adapter."""
        return self.update_ref_model

    def __post_init__(self) -> None:
        Rates.__post_init__(self)
        self.check_reference(self)


class BEMA(BEMACallback):
    """The callback, made from the options of a run."""

    def __init__(self, context: HookContext) -> None:
        super().__init__(*(vars(context.args)[f.name.replace("device", "bema_device")] for f in fields(BEMACallback)))


algorithm = Algorithm(
    name="bema",
    summary="DPO whose reference is a bias-corrected average of the policy's own weights.",
    extends="dpo",
    config=BEMAOptions,
    hooks=BEMA,
    papers={"2508.00180": "EMA Without the Lag: Bias-Corrected Iterate Averaging Schemes"},
)
