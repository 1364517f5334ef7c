"""The tuner: IncreLoRA's layers in a model of PEFT, and its adapters as PEFT saves and loads them."""

import re
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper, resolve_quantization_backend
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from increlora.components import STATE
from increlora.integrations.packed import unpack
from increlora.integrations.peft.adapter import FACTORS, Adapter, fused_experts
from increlora.integrations.peft.config import IncreLoraConfig, Refused
from increlora.integrations.peft.layer import BASE, IncreLoraLayer, Linear
from increlora.integrations.peft_export import IN_FILE
from increlora.surgery import READ_WEIGHTS

PREFIX = "increlora_"
BANK = "increlora_bank"  # of all adapters, a module of the tuner
LIVE: "weakref.WeakSet[IncreLoraModel]" = weakref.WeakSet()
HEADS = {"TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}  # PEFT names them after injection only
OWN = re.compile(rf"(?:{re.escape(IN_FILE)})?((?:.*\.)?(?:{'|'.join((*FACTORS, STATE))}))")


class IncreLoraModel(BaseTuner):
    """A model with IncreLoRA adapters; `get_peft_model` makes it.

    `adapters` has the method, the ranks and the step of each.
    """

    uses_shared_state = True
    prefix = PREFIX
    tuner_layer_cls = IncreLoraLayer
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}

    def _pre_injection_hook(self, model: nn.Module, config: IncreLoraConfig, adapter_name: str) -> None:
        LIVE.add(self)
        self.increlora_bank = nn.ModuleDict()
        self.adapters: dict[str, Adapter] = {}
        self.trainings: dict[str, Any] = {}  # adapter -> what lets it grow
        self._found: dict[str, Linear] = {}
        self._tied: set[int] = set()  # ids of parameters with several names

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "trainings": {}}  # a copy has no optimizer

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        LIVE.add(self)

    # layers

    def _prepare_adapter_config(self, peft_config: IncreLoraConfig, model_config: dict) -> IncreLoraConfig:
        if peft_config.target_modules is None:
            if peft_config.layers_to_transform is not None:
                raise Refused(
                    "`layers_to_transform` needs names in `target_modules`; by default all layers are adapted"
                )
            peft_config.target_modules = "all-linear"
        return peft_config

    def inject_adapter(
        self, model: nn.Module, adapter_name: str, autocast_adapter_dtype: bool = True, low_cpu_mem_usage: bool = False,
        **keywords: Any,
    ) -> None:  # fmt: skip
        """Adapt the layers that the configuration names, then make the components of all of them at once."""
        self._found = {}
        names = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
        self._tied = {parameter for parameter, count in names.items() if count > 1}
        others = [(adapter.bank, adapter.bank.like.requires_grad) for adapter in self.adapters.values()]
        config = self.peft_config[adapter_name]
        if everything := config.target_modules in (None, "all-linear"):
            self._leave_out_the_head(model, config)
        super().inject_adapter(
            model, adapter_name, autocast_adapter_dtype=autocast_adapter_dtype, low_cpu_mem_usage=low_cpu_mem_usage,
            **keywords,
        )  # fmt: skip
        layers = self._found
        weights = [torch.empty(0, device="meta") if low_cpu_mem_usage else layer.weight for layer in layers.values()]
        if everything:
            self._name_what_is_left_out(model)
        adapter = Adapter(adapter_name, config, layers, weights)
        self.adapters[adapter_name] = adapter
        self.increlora_bank[adapter_name] = adapter.bank
        adapter.bank.watch(model)
        adapter.bank.requires_grad_(adapter_name in self.active_adapters and not config.inference_mode)
        for bank, trained in others:  # an adapter that is added changes nothing of those that are there
            bank.requires_grad_(trained)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Components are in float32 (float64 in a model that is), or on request in the dtype of the base layer."""
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        bank, layers = self.adapters[adapter_name].bank, self.adapters[adapter_name].layers
        if autocast_adapter_dtype:
            bank.to(torch.promote_types(bank.like.dtype, torch.float32))
            return
        for layer in layers.values():
            dtype = layer._get_base_layer_device_and_dtype(layer.get_base_layer())[1]
            if dtype is not None and dtype.is_floating_point:
                bank.to(dtype)
                return

    def _create_and_replace(
        self, peft_config: IncreLoraConfig, adapter_name: str, target: nn.Module, target_name: str, parent: nn.Module,
        current_key: str, parameter_name: str | None = None,
    ) -> None:  # fmt: skip
        if isinstance(target, Linear):
            self._found[current_key] = target
            return
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        if not (isinstance(base, nn.Linear | Conv1D) or resolve_quantization_backend(base) is not None):
            raise Refused(
                f"Target module {target} is not supported: `{current_key}` is a {type(base).__name__}, and only "
                "nn.Linear, transformers' Conv1D and quantized linear layers can be adapted; choose other "
                "`target_modules`, or train this one in full by `modules_to_save`"
            )
        if isinstance(base, nn.Linear | Conv1D) and base._parameters.get("weight") is None:
            raise Refused(
                f"the weight of `{current_key}` is computed from other parameters (a parametrization, weight_norm), so "
                "a merge would be lost: remove that first, or choose other `target_modules`"
            )
        if id(base.weight) in self._tied:
            raise Refused(
                f"the weight of `{current_key}` is tied to another module's: an update would reach one, a merge both; "
                "choose other `target_modules`"
            )
        if isinstance(parent, READ_WEIGHTS):
            raise Refused(
                f"`{current_key}` lies in torch's {type(parent).__name__}, which reads its weight directly and would "
                "ignore the update; choose other `target_modules`"
            )
        peft_config.fan_in_fan_out = isinstance(base, Conv1D)
        layer = Linear(target, adapter_name)
        self._replace_module(parent, target_name, layer, target)
        self._found[current_key] = layer

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        """The layer in place of a module, or the module again; what it lies on and in is as it was."""
        setattr(parent, child_name, new_module)

    def _leave_out_the_head(self, model: nn.Module, config: IncreLoraConfig) -> None:
        """A head that PEFT will train in full, as it does that of a sequence classifier."""
        heads = {head for head in HEADS.get(config.task_type or "", ()) if hasattr(model, head)}
        if heads and isinstance(config.exclude_modules, str):
            config.exclude_modules = rf"(?:{config.exclude_modules})|(?:.*\.)?(?:{'|'.join(sorted(heads))})"
        elif heads:
            config.exclude_modules = sorted({*(config.exclude_modules or ()), *heads})

    def _name_what_is_left_out(self, model: nn.Module) -> None:
        names = sorted({re.sub(r"\b\d+\b", "N", name) for name in fused_experts(model)})
        if names:
            warnings.warn(
                f"{', '.join(names)}: several matrices in one tensor (fused experts), which are not adapted; every "
                "nn.Linear but the output layer is",
                stacklevel=2,
            )

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter, its components included."""
        super().delete_adapter(adapter_name)
        self._let_go(adapter_name)

    def _let_go(self, adapter_name: str) -> None:
        training = self.trainings.pop(adapter_name, None)
        if training is not None:
            training.detach()
        self.adapters.pop(adapter_name).bank.unwatch()
        del self.increlora_bank[adapter_name]

    def _unload_and_optionally_merge(self, merge: bool = True, **keywords: Any) -> nn.Module:
        for adapter in self.adapters.values():
            if merge and adapter.grows and not adapter.finished and adapter.step:
                total = adapter.method.order.total_steps
                warnings.warn(
                    f"the adapter `{adapter.name}` is merged at step {adapter.step} of {total}, its total rank "
                    f"{sum(adapter.ranks().values())} of {adapter.method.allocator.budget}",
                    stacklevel=3,
                )
        model = super()._unload_and_optionally_merge(merge, **keywords)
        for name in list(self.adapters):
            self._let_go(name)
        return model

    # mixed batches, several processes

    @contextmanager
    def _enable_peft_forward_hooks(self, *arguments: Any, **keywords: Any) -> Iterator[None]:
        """Hand the adapter of every row of a mixed batch to the layers."""
        names = keywords.pop("adapter_names", None)
        if names is None:
            yield
            return
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
        unknown = sorted(set(names) - set(self.adapters) - {BASE})
        if unknown:
            raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}")
        hooks = []
        encoder = getattr(self.model, "get_encoder", lambda: None)() if keywords.get("num_beams", 1) != 1 else None
        of_encoder = set(encoder.modules()) if encoder is not None else set()
        for module in self.modules():
            if isinstance(module, IncreLoraLayer | AuxiliaryTrainingWrapper):
                beams = 1 if module in of_encoder else keywords.get("num_beams") or 1
                each = [name for name in names for _ in range(beams)]
                hooks.append(module.register_forward_pre_hook(partial(_name_adapters, each), with_kwargs=True))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        """What begins to train later, which DistributedDataParallel cannot expect; `Training` averages it."""
        found = []
        for name, adapter in self.adapters.items():
            later = {id(parameter) for parameter in adapter.method.later_parameters()}
            found += [f"base_model.{BANK}.{name}.{key}" for key, p in adapter.bank.named_parameters() if id(p) in later]
        return found

    # state

    @classmethod
    def _get_adapter_state_dict(
        cls, model: nn.Module, config: IncreLoraConfig, adapter_name: str, state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:  # fmt: skip
        begin = f"{BANK}.{adapter_name}."
        rows = {key.partition(begin)[2]: value for key, value in state_dict.items() if begin in key}
        tensors = cls._tuner(model).adapters[adapter_name].tensors(rows)
        return {f"{IN_FILE}{key}.{adapter_name}": value for key, value in tensors.items()}

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: IncreLoraConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        own = {key: match[1] for key in state_dict if (match := OWN.fullmatch(key))}
        others = {key: value for key, value in state_dict.items() if key not in own}
        if not own:
            return others
        tuner = cls._tuner(model)
        adapter = tuner.adapters[adapter_name]
        tensors = {name: state_dict[key] for key, name in own.items()}
        rows = tuner._restore(adapter_name, partial(adapter.restore, tensors))
        return others | {f"base_model.{BANK}.{adapter_name}.{key}": value for key, value in rows.items()}

    def _restore(self, adapter_name: str, restore: Callable[[], Any]) -> Any:
        """Let an adapter take another structure, before its weights are read."""
        self._refuse_merged(adapter_name)
        adapter = self.adapters[adapter_name]
        bank, result = adapter.bank, restore()
        if adapter.bank is not bank:
            bank.unwatch()
            adapter.bank.watch(self.model)
            self.increlora_bank[adapter_name] = adapter.bank
        adapter.restored = True
        return result

    def _refuse_merged(self, adapter_name: str) -> None:
        if any(adapter_name in layer.merged_adapters for layer in self.adapters[adapter_name].layers.values()):
            raise Refused(
                f"the adapter `{adapter_name}` is merged into the weights, and could not be taken out of them once it "
                "is loaded again: call model.unmerge_adapter() first"
            )

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """A state of the whole model, as in a checkpoint of accelerate, has the ranks beside the tensors."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, adapter in self.adapters.items():
            if adapter.grows or adapter.finished:
                destination[f"{prefix}{BANK}.{name}.{STATE}"] = adapter.state()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        for name, adapter in self.adapters.items():
            begin = f"{prefix}{BANK}.{name}."
            packed = state_dict.pop(begin + STATE, None)
            if packed is not None:
                self._restore(name, partial(adapter.restore_structure, unpack(packed)))
            elif adapter.grows and not adapter.restored and any(key.startswith(begin) for key in state_dict):
                raise Refused(
                    f"the state has tensors of the adapter `{name}` without its ranks (`{STATE}`), and this one is "
                    "planned to grow: load a whole model.state_dict(), or what save_pretrained wrote"
                )
            adapter.restored = False
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    @staticmethod
    def _tuner(model: nn.Module) -> "IncreLoraModel":
        return next(module for module in model.modules() if isinstance(module, IncreLoraModel))


def _name_adapters(names: list[str], module: nn.Module, arguments: Any, keywords: dict[str, Any]) -> Any:
    return arguments, {**keywords, "adapter_names": names}
