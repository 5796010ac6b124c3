"""The classic PPO step API: `PPOTrainer(config, model, ref_model, tokenizer).step(queries, responses, scores)`.

The names are those of TRL 0.7.11, where they were in `trl` and `trl.core`.
"""

from .config import PPOConfig as PPOConfig
from .controllers import AdaptiveKLController as AdaptiveKLController
from .controllers import FixedKLController as FixedKLController
from .modeling import AutoModelForCausalLMWithValueHead as AutoModelForCausalLMWithValueHead
from .modeling import create_reference_model as create_reference_model
from .sampling import LengthSampler as LengthSampler
from .sampling import respond_to_batch as respond_to_batch
from .trainer import PPOTrainer as PPOTrainer
from .trainer import StepInputError as StepInputError
