"""IncreLoRA (arXiv 2308.12043): low-rank adaptation that grows where it matters."""

from typing import TYPE_CHECKING, Any

from increlora import moved_modules

if TYPE_CHECKING:
    from increlora.algorithm import IncreLoRA as IncreLoRA
    from increlora.errors import UserError as UserError
    from increlora.integrations.growth import Growth as Growth
    from increlora.integrations.hf_trainer import IncreLoRACallback as IncreLoRACallback
    from increlora.integrations.peft_export import save_peft_adapter as save_peft_adapter
    from increlora.schedule import multiplier as multiplier

HOMES = {
    "Growth": "increlora.integrations.growth",
    "IncreLoRA": "increlora.algorithm",
    "IncreLoRACallback": "increlora.integrations.hf_trainer",
    "UserError": "increlora.errors",
    "multiplier": "increlora.schedule",
    "save_peft_adapter": "increlora.integrations.peft_export",
}
__all__ = list(HOMES)
moved_modules.find()


def __getattr__(name: str) -> Any:
    """Import a name at its first use: `import increlora` is fast, and only Trainer and PEFT parts need transformers."""
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(HOMES[name]), name)
