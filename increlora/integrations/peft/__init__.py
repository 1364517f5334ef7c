"""IncreLoRA as a PEFT method: importing this registers it, and `get_peft_model(model, IncreLoraConfig(...))` works.

from increlora.integrations.peft import IncreLoraCallback, IncreLoraConfig

model = get_peft_model(model, IncreLoraConfig(target_r=8, task_type="CAUSAL_LM"))
Trainer(model, args, ..., callbacks=[IncreLoraCallback()]).train()
"""

from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import register_peft_method

from increlora.integrations.peft.config import PEFT_TYPE, IncreLoraConfig
from increlora.integrations.peft.export import export_lora
from increlora.integrations.peft.layer import IncreLoraLayer
from increlora.integrations.peft.model import IncreLoraModel
from increlora.integrations.peft.training import IncreLoraCallback, Training, attach

__all__ = [
    "IncreLoraCallback", "IncreLoraConfig", "IncreLoraLayer", "IncreLoraModel", "Training", "attach", "export_lora",
]  # fmt: skip

if PeftType(PEFT_TYPE) not in PEFT_TYPE_TO_CONFIG_MAPPING:
    register_peft_method(name=PEFT_TYPE.lower(), config_cls=IncreLoraConfig, model_cls=IncreLoraModel)
