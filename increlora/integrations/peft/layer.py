"""A layer of the base model with the updates of its adapters."""

import warnings
from collections.abc import Iterator
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from peft.utils import quantization_extra_repr, resolve_quantization_backend
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from increlora.bank import Bank
from increlora.integrations.peft.config import Refused
from increlora.linear import Update, dtype_of_products

BASE = "__base__"  # PEFT's word for a row of a mixed batch without adapter


class AdapterUpdate(Update):
    """The update of one matrix by one adapter, as PEFT's code sees it: its parameters are those of the whole bank."""

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        return self.bank.parameters(recurse)

    def requires_grad_(self, requires_grad: bool = True) -> "AdapterUpdate":
        self.bank.requires_grad_(requires_grad)
        return self

    def forward(self, h: Tensor, x: Tensor, in_place: bool) -> Tensor:
        """h (..., out) + delta x (..., in)."""
        dtype = dtype_of_products(x)
        if not dtype.is_floating_point:
            dtype = self.bank.like.dtype
        rows = x.reshape(-1, x.shape[-1]).to(dtype)
        factors = self.bank.views(self.name, dtype)
        flat = h if h.ndim == 2 else h.reshape(-1, h.shape[-1])  # changed in place, a view would cost a copy backward
        return self.add_to(flat, rows, factors, in_place).view(h.shape)


@torch.compiler.disable
def _outside_of_graphs(update: AdapterUpdate, h: Tensor, rows: Tensor, in_place: bool) -> Tensor:
    """What trains changes its ranks, and a graph of torch.compile with an update in it would be made anew each time."""
    return update(h, rows, in_place)


class IncreLoraLayer(BaseTunerLayer):
    """What PEFT asks of a layer with adapters."""

    adapter_layer_names = ("increlora_update",)
    other_param_names = ()
    # PEFT's, told to the type checker, which reads nothing of PEFT
    base_layer: nn.Module
    active_adapters: Any
    weight: Any
    get_base_layer: Any
    get_base_weight: Any
    set_base_weight: Any
    _get_base_layer_device_and_dtype: Any

    def __init__(self, base_layer: nn.Module):
        self.base_layer = base_layer
        self.increlora_update = nn.ModuleDict()
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        base = self.get_base_layer()
        if isinstance(base, Conv1D):
            self.in_features, self.out_features = base.weight.shape
        else:
            self.in_features, self.out_features = base.in_features, base.out_features
        self.fan_in_fan_out = isinstance(base, Conv1D)
        self.quantization_backend = resolve_quantization_backend(base)

    def update_layer(self, adapter_name: str, bank: Bank, name: str, dropout: float) -> AdapterUpdate:
        """Give this layer the update of an adapter.

        Args:
            bank: holds the components of the adapter.
            name: of the matrix in the bank.
        """
        update = AdapterUpdate(bank, name, dropout)
        self.increlora_update[adapter_name] = update.train(self.get_base_layer().training)
        return update

    def update(self, adapter_name: str) -> AdapterUpdate:
        """The update of an adapter."""
        return cast(AdapterUpdate, self.increlora_update[adapter_name])

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        if adapter_name in self.increlora_update:
            bank = self.update(adapter_name).bank
            device = self._get_base_layer_device_and_dtype(self.get_base_layer())[0] if device is None else device
            if bank.like.device.type != "meta" and device is not None:
                bank.to(device)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return True


class Linear(nn.Module, IncreLoraLayer):
    """A linear layer (nn.Linear, transformers' Conv1D, or a quantized one) with the updates of its adapters."""

    def __init__(self, base_layer: nn.Module, adapter_name: str):
        super().__init__()
        IncreLoraLayer.__init__(self, base_layer)
        self._active_adapter = adapter_name

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The update of an adapter in the shape of the weight, in float32."""
        with torch.no_grad():
            delta = self.update(adapter).delta()
            delta = delta.float() if delta.dtype in (torch.float16, torch.bfloat16) else delta
            return delta.t() if self.fan_in_fan_out else delta

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Fold updates into the weight.

        Args:
            safe_merge: refuse a result that is not finite, and change nothing then.
            adapter_names: None: those that are active.
        """
        for adapter in check_adapters_to_merge(self, adapter_names):
            if adapter not in self.increlora_update:
                continue
            merged = self._shifted(self.get_delta_weight(adapter))
            if safe_merge and not torch.isfinite(merged).all():
                raise ValueError(f"NaNs detected in the merged weights. The adapter {adapter} seems to be broken")
            self.set_base_weight(merged)
            self.merged_adapters.append(adapter)

    def unmerge(self) -> None:
        """Take all merged updates out of the weight."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        while self.merged_adapters:
            adapter = self.merged_adapters.pop()
            if adapter in self.increlora_update:
                self.set_base_weight(self._shifted(-self.get_delta_weight(adapter)))

    def _shifted(self, delta: Tensor) -> Tensor:
        state = getattr(self.get_base_layer().weight, "quant_state", None)
        if getattr(state, "packing_format_for_cpu", False):  # dequantized, it would be other numbers
            raise Refused(
                "bitsandbytes has packed the 4-bit weights for products on a CPU, so nothing can be merged into them; "
                "load the adapter on the base model in full precision, and merge it there"
            )
        weight = self.get_base_weight()
        return (weight.to(delta.dtype) + delta.to(weight.device)).to(weight.dtype)

    def forward(self, x: Tensor, *arguments: Any, **keywords: Any) -> Tensor:
        """x (..., in) -> h (..., out)."""
        adapter_names = keywords.pop("adapter_names", None)
        if adapter_names is not None:
            return self._mixed_batch(x, adapter_names, *arguments, **keywords)
        if self.disable_adapters and self.merged:
            self.unmerge()
        if self.disable_adapters or self.merged:
            return self.base_layer(x, *arguments, **keywords)
        base = self.base_layer  # whose hooks see its own output, in its own shape
        hooks = (base._forward_hooks, base._forward_pre_hooks, base._backward_hooks, base._backward_pre_hooks)
        in_place = type(base) is nn.Linear and not any(hooks) and not nn.modules.module._has_any_global_hook()
        rows = x.reshape(-1, x.shape[-1]) if in_place else x
        h = self.base_layer(rows, *arguments, **keywords)
        for adapter in self.active_adapters:
            if adapter in self.increlora_update:
                call = _outside_of_graphs if torch.is_grad_enabled() else AdapterUpdate.__call__
                h = call(self.update(adapter), h, rows, in_place)
        return h.view(*x.shape[:-1], h.shape[-1]) if in_place else h

    def _mixed_batch(self, x: Tensor, adapter_names: list[str], *arguments: Any, **keywords: Any) -> Tensor:
        """Every row of the batch with the adapter that is named for it."""
        if len(x) != len(adapter_names):
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(adapter_names)} and {len(x)} respectively."
            )
        if self.merged:
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )
        h = self.base_layer(x, *arguments, **keywords)
        for adapter in dict.fromkeys(adapter_names):
            if adapter != BASE and adapter in self.increlora_update and not self.disable_adapters:
                rows = [number for number, name in enumerate(adapter_names) if name == adapter]
                h[rows] = self.update(adapter)(h[rows], x[rows], in_place=False)
        return h

    def extra_repr(self) -> str:
        return quantization_extra_repr(self)

    def __repr__(self) -> str:
        return "increlora." + super().__repr__()
