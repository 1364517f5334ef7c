"""All components of all matrices in few tensors, gathered once per forward.

The update of a matrix is delta = alpha / rank * B diag(lambda) A, a sum of components (arXiv 2308.12043). On a GPU with
short sentences the number of operations costs time, not their size. So components do not lie with their matrices:

- One allocation (the start, the reserves of step 0, each growth) has one group of tensors: one tensor of rows per
  width, and one vector of lambdas. A row is a row of A (as long as the matrix has inputs) or a column of B (outputs).
  A group is one Parameter per width, because all that is allocated together shares a learning-rate schedule.
- An index, a list of integers, says which rows belong to which matrix. A growth writes to the index and lets its group
  train. All tensors exist from the start, since the number and the size of the growths are known. So shapes never
  change, and optimizers, schedulers and checkpoints need no special treatment. The price is memory: a growth has rows
  for whichever matrices could be chosen, up to three times what it uses (DeBERTaV3-base at r8: about 10 MB beside
  735 MB of weights).
- In a forward pass, the first matrix that computes gathers the factors of all matrices. Per width this takes one
  concatenation, one reordering into model order, one product with lambda and alpha / rank, and one split into views.
  Each matrix then takes its views.

Views belong to the graph of one pass and are never kept longer. A pass is the outermost call of a module that holds all
matrices, or one backward (in which activation checkpointing computes a forward again). Outside of a pass, every call
takes the matrix's own rows.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from increlora.components import NAME, NO_GROUP, STATE, Component, ComponentGroup, GroupSize, Matrix
from increlora.errors import UserError

INIT_STD = 0.02
MARK = (1,)  # shape of what a state dict has in the place of a matrix's plain weight


class Views(NamedTuple):
    """The factors of one matrix: A (r, in), scales folded in, and B transposed (r, out).

    `A` and `B` are in the dtype of the product; `exact_A` and `exact_B` are the same before rounding, without graph.
    """

    A: Tensor
    exact_A: Tensor
    B: Tensor
    exact_B: Tensor


@dataclass
class _Index:
    """How the rows of one width become the factors of its matrices, on one device."""

    factors: list[tuple[str, str]]  # (A or B, matrix), in model order
    groups: list[int]  # whose tensors are concatenated, with a row of zeros at the end
    places: Tensor  # the rows of the concatenation that reach outputs, factor by factor
    sizes: list[int]  # how many of them belong to each factor
    lambdas: Tensor  # where the lambda of each row of A lies; rows of B have the constant 1
    scale: Tensor  # alpha / rank of each row of A, 1 of each row of B; (rows, 1)
    stack: Tensor  # the rows of the penalty's stack, (factors * largest rank,)
    identities: Tensor  # (factors, largest rank, largest rank), zero where a factor has no row


class Bank(nn.Module):
    """The components of all adapted matrices.

    Args:
        shapes: (out, in) of every matrix by name, in model order.
        groups: the size of the group that each allocation brings, in order.
        alpha: scale of the update, divided by the rank (so growing rescales the old components).
        rank_epsilon: added to the rank in that division (the authors' code: 1e-5).
        reserve_lambda: lambda of a component in reserve.
        open: every tensor requires a gradient from the start, so that an optimizer made then holds all of them. A
            tensor gets a gradient only from its allocation on, and optimizers pass over what has none.
    """

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, int]],
        groups: Sequence[GroupSize],
        *,
        alpha: float,
        rank_epsilon: float = 0.0,
        reserve_lambda: float = 0.0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        open: bool = False,
    ):
        super().__init__()
        self.open = open
        self.matrices = {name: Matrix(name, width, height) for name, (height, width) in shapes.items()}
        self.alpha, self.rank_epsilon, self.reserve_lambda = alpha, rank_epsilon, reserve_lambda
        self.groups = nn.ModuleList(ComponentGroup(size, dtype, torch.device(device)) for size in groups)
        self.requires_grad_(True)
        self.hooks: list[RemovableHandle] = []
        self._views: dict[tuple[int, bool, bool, torch.dtype], dict[str, Views]] = {}
        self._last: tuple[Any, dict[int, Tensor]] = (None, {})
        self.depth = 0  # of calls under way of modules that hold all matrices
        self.outermost = 0  # id of the module of the first of them
        self.restored = False  # whether Growth restores the structure when a state is loaded
        self.saves_unmerged = False  # whether `save_pretrained` of the model may write a checkpoint
        self.passed = False  # whether a forward pass with gradients has begun since this was last set to False
        self.changed()

    def add_groups(self, sizes: Sequence[GroupSize]) -> None:
        """The tensors of later allocations, where they were not known when the bank was made."""
        like = self.like
        self.groups.extend(ComponentGroup(size, like.dtype, like.device) for size in sizes)
        self.requires_grad_(like.requires_grad)
        self.changed()

    def requires_grad_(self, requires_grad: bool = True) -> "Bank":
        """Let the tensors train whose allocation has come (in an open bank: all), or none."""
        for group in self.all_groups:
            group.requires_grad_(requires_grad and (self.open or group.trains))
        return self

    def __getstate__(self) -> dict[str, Any]:
        # of a copy, or a file: views belong to the graph of one pass
        return {**self.__dict__, "_views": {}, "_last": (None, {}), "_made_for": None}

    def attach(self, model: nn.Module) -> None:
        """Become a module of the model, and guard what is saved of it and loaded into it."""
        # not in a container itself, which would call the bank as one of its layers
        containers = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
        home = model.get_submodule(next(iter(self.matrices))) if isinstance(model, containers) else model
        home.add_module(NAME, self)
        self.watch(model)
        self.hooks.append(model.register_state_dict_post_hook(partial(_mark, self)))
        self.hooks.append(model.register_load_state_dict_pre_hook(self._unmark))
        if hasattr(model, "save_pretrained"):
            self.__dict__["home"] = model  # not a module of the bank
            model.save_pretrained = self.save_pretrained  # type: ignore[assignment]

    def watch(self, model: nn.Module) -> None:
        """Note where a forward of a module that holds all matrices begins and ends."""
        paths = [name.split(".")[:-1] for name in self.matrices]
        common = list(itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False)))
        for depth in range(len(common) + 1):
            module = model.get_submodule(".".join(parts[0] for parts in common[:depth]))
            self.hooks.append(module.register_forward_pre_hook(self._enter))
            self.hooks.append(module.register_forward_hook(self._leave, always_call=True))

    def forward(self, *_: Any) -> Tensor:
        """No layer, though it is a module of the model.

        Raises:
            UserError: always.
        """
        raise UserError(
            f"the model calls its children() one after another, and `{NAME}`, which holds the components, is one of "
            "them: let it call its own layers by name"
        )

    def unwatch(self) -> None:
        """Remove every hook."""
        for hook in self.hooks:
            hook.remove()
        self.hooks = []

    def detach(self, model: nn.Module) -> None:
        """Leave the model, whose layers are plain again; no hook and no module remains."""
        self.unwatch()
        vars(model).pop("save_pretrained", None)
        if hasattr(model, NAME):
            delattr(model, NAME)

    def save_pretrained(self, *arguments: Any, **keywords: Any) -> Any:
        """In place of the model's, whose files would be read as a model with random layers.

        Raises:
            UserError: unless a loop keeps checkpoints of the unmerged model (`saves_unmerged`).
        """
        if not self.saves_unmerged:
            raise UserError(
                "the update is not merged, and from_pretrained would give a model with random layers: call "
                "growth.merge() (or method.merge(model)) before saving, or save_peft_adapter instead"
            )
        home = self.__dict__["home"]
        return type(home).save_pretrained(home, *arguments, **keywords)

    def check_dtype(self) -> None:
        """Refuse components that were cast to half precision after the start.

        Raises:
            UserError: with what to do.
        """
        if self.like.dtype not in (torch.float32, torch.float64):
            raise UserError(
                f"the components are in {self.like.dtype}, in which most of every step is lost: cast the model before "
                "method.prepare or get_peft_model, which make them in float32, and not after it"
            )

    # structure

    @property
    def all_groups(self) -> list[ComponentGroup]:
        """The groups, by number."""
        return cast(list[ComponentGroup], list(self.groups))

    @property
    def like(self) -> Tensor:
        """A tensor of the bank's dtype and device."""
        return next(self.parameters())

    def add_active(self, name: str, rank: int, group: int, generator: torch.Generator) -> None:
        """Give a matrix a component that is part of its rank from now on; its lambdas are 0."""
        matrix = self.matrices[name]
        component = self._placed(matrix, rank, group)
        self._draw(matrix, component, generator)
        self._give_lambdas(component, group, 0.0)
        matrix.components.append(component)
        matrix.active += 1
        self.changed()

    def add_reserve(
        self, name: str, rank: int, group: int, generator: torch.Generator, learns: bool, place: Component | None = None
    ) -> None:
        """Give a matrix a component outside its rank: with lambda frozen at `reserve_lambda`, or inert.

        Args:
            place: use the rows of this former component; None: take new rows of the group.
        """
        matrix = self.matrices[name]
        assert matrix.reserve is None, "a matrix has at most one component in reserve"
        component = place or self._placed(matrix, rank, group)
        self._draw(matrix, component, generator)
        matrix.components.append(component)
        matrix.reserve_learns = learns
        self.changed()

    def activate_reserve(self, name: str, rank: int, group: int) -> None:
        """The first `rank` rows of the reserve that learned become active; their lambdas train in `group`."""
        matrix = self.matrices[name]
        reserve = matrix.reserve
        assert reserve is not None and rank <= reserve.rank, "not enough in reserve"
        chosen, rest = reserve.split(rank)
        self._give_lambdas(chosen, group, self.reserve_lambda)
        matrix.components[matrix.active :] = [chosen, *rest]
        matrix.active += 1
        self.changed()

    @torch.no_grad()
    def activate_inert_reserve(self, name: str, rank: int, group: int) -> Component | None:
        """The first `rank` rows of an inert reserve become active and begin to train in `group`, with lambda 0.

        Returns:
            Their former place, for the next reserve; None if a part of the reserve still lies there.
        """
        matrix = self.matrices[name]
        reserve = matrix.reserve
        assert reserve is not None and rank <= reserve.rank, "not enough in reserve"
        waited, rest = reserve.split(rank)
        chosen = self._placed(matrix, rank, group)
        for new, old in zip(self._rows(matrix, chosen), self._rows(matrix, waited), strict=True):
            new.copy_(old)
        self._give_lambdas(chosen, group, 0.0)
        matrix.components[matrix.active :] = [chosen, *rest]
        matrix.active += 1
        self.changed()
        return None if rest else waited

    def silence_reserves(self) -> None:
        """No reserve reaches the output any more; its A and B stay in the penalty, as in the authors' code."""
        for matrix in self.matrices.values():
            matrix.reserve_learns = False
        self.changed()

    def release(self, group: int) -> None:
        """The group's tensors train from now on."""
        self.all_groups[group].trains = True
        self.all_groups[group].requires_grad_(True)

    def changed(self) -> None:
        """Note that the structure has changed: indices and views are made again when they are needed."""
        self._made_for: tuple[torch.device, torch.dtype] | None = None
        self.forget()

    def _placed(self, matrix: Matrix, rank: int, group: int) -> Component:
        into = self.all_groups[group]
        A_row, B_row = into.take(str(matrix.in_features), rank), into.take(str(matrix.out_features), rank)
        return Component(rank, group, A_row, B_row)

    @torch.no_grad()
    def _draw(self, matrix: Matrix, component: Component, generator: torch.Generator) -> None:
        """A and B of a new component from N(0, 0.02^2)."""
        A, B = self._rows(matrix, component)
        # drawn on the CPU in float32, so that the values do not depend on the device
        A.copy_(torch.randn(component.rank, matrix.in_features, generator=generator) * INIT_STD)
        B.copy_((torch.randn(matrix.out_features, component.rank, generator=generator) * INIT_STD).t())

    @torch.no_grad()
    def _give_lambdas(self, component: Component, group: int, value: float) -> None:
        component.lambda_group = group
        component.lambda_row = self.all_groups[group].take("lambda_", component.rank)
        self._lambdas_of(component).fill_(value)

    # keep and restore

    def structure(self) -> dict[str, Any]:
        """Which rows belong to which matrix, and which groups train: JSON values."""
        matrices = {
            name: {
                "components": [asdict(component) for component in matrix.components],
                "active": matrix.active,
                "reserve_learns": matrix.reserve_learns,
            }
            for name, matrix in self.matrices.items()
        }
        groups = [{"next_row": dict(group.next_row), "trains": group.trains} for group in self.all_groups]
        return {"matrices": matrices, "groups": groups}

    def load_structure(self, structure: Mapping[str, Any]) -> None:
        """Restore what `structure` gave; the values of the rows are loaded afterwards, as those of any parameter."""
        for name, saved in structure["matrices"].items():
            matrix = self.matrices[name]
            matrix.components = [Component(**component) for component in saved["components"]]
            matrix.active, matrix.reserve_learns = saved["active"], saved["reserve_learns"]
        for group, saved in zip(self.all_groups, structure["groups"], strict=True):
            group.clear()  # an earlier structure may be loaded over a later one
            group.next_row, group.trains = dict(saved["next_row"]), saved["trains"]
        self.requires_grad_(not self.open or self.like.requires_grad)
        self.changed()

    # state dicts

    def _unmark(self, module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
        """Take the marks out of a state that is loaded; refuse a plain model's state."""
        for name in self.matrices:
            mark = state_dict.pop(f"{prefix}{name}.weight", None)
            if mark is not None and tuple(mark.shape) != MARK:
                raise UserError(
                    f"the state is of a model without an update ({prefix}{name}.weight): load it before "
                    "method.prepare, not after it"
                )
        if not (self.restored and prefix + STATE in state_dict):
            self._check_rows(state_dict)

    def _check_rows(self, state_dict: Mapping[str, Any]) -> None:
        """Weights that come without their structure fit the structure that is there: rows are taken, or zero.

        Raises:
            UserError: they do not.
        """
        for key, rows in state_dict.items():
            _, found, name = f".{key}".rpartition(f".{NAME}.groups.")
            number, *what = name.split(".")
            if not found or not number.isdigit() or int(number) >= len(self.groups):
                continue
            taken = self.all_groups[int(number)].next_row.get(what[-1], 0)
            if rows[taken:].any() or (taken and not rows[:taken].any() and what[0] == "rows"):
                raise UserError(
                    "the state has other components than the model, and does not say which matrices they belong to: "
                    "make Growth before saving and before loading, or load method.state_dict() first"
                )

    # the rows of one matrix

    def rows(self, name: str, index: int) -> tuple[Tensor, Tensor]:
        """A (rank, in) and B transposed (rank, out) of one component: views into the parameters."""
        matrix = self.matrices[name]
        return self._rows(matrix, matrix.components[index])

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        """A with alpha / rank * lambda folded in, (r, in), and B, (out, r), of all that reaches a matrix's output."""
        matrix = self.matrices[name]
        rows = [self._rows(matrix, component) for component in matrix.used]
        A, B = (torch.cat(several) for several in zip(*rows, strict=True))
        lambdas = torch.cat([self._lambdas_of(component) for component in matrix.used])
        return (lambdas * self.scale(name)).unsqueeze(1) * A, B.t()

    def lambdas(self, name: str) -> Tensor:
        """The lambdas of a matrix's active components, (rank,)."""
        matrix = self.matrices[name]
        return torch.cat([self._lambdas_of(component) for component in matrix.components[: matrix.active]])

    def scale(self, name: str) -> float:
        """alpha / rank of a matrix."""
        return self.alpha / (self.matrices[name].rank + self.rank_epsilon)

    def _rows(self, matrix: Matrix, component: Component) -> tuple[Tensor, Tensor]:
        rows = self.all_groups[component.group].rows
        A, B = rows[str(matrix.in_features)], rows[str(matrix.out_features)]
        return A[component.A_row :][: component.rank], B[component.B_row :][: component.rank]

    def _lambdas_of(self, component: Component) -> Tensor:
        if component.lambda_group == NO_GROUP:
            return self.like.new_full((component.rank,), self.reserve_lambda)
        lambda_ = self.all_groups[component.lambda_group].lambda_
        assert lambda_ is not None
        return lambda_[component.lambda_row :][: component.rank]

    # the rows of all matrices

    def views(self, name: str, dtype: torch.dtype) -> Views:
        """The factors of one matrix for products in `dtype`, gathered once per pass.

        Outside of a pass nothing tells when views become stale, so a matrix takes its own rows in every call.
        """
        if torch.compiler.is_compiling():
            return self._own_views(name, dtype)
        task = (
            torch._C._current_graph_task_id()
        )  # of the backward under way, else -1: torch's own checkpointing asks it too
        if self.depth == 0 and task == -1:
            with _kept_for_backward():
                return self._own_views(name, dtype)
        key = (task, torch.is_grad_enabled(), torch.is_inference_mode_enabled(), dtype)
        if key not in self._views:
            if any(other[0] != task for other in self._views):
                self.forget()
            with _kept_for_backward():
                self._views[key] = self._gather(dtype)
        return self._views[key][name]

    def _own_views(self, name: str, dtype: torch.dtype) -> Views:
        A, B = self.factors(name)
        return Views(A.to(dtype), A.detach(), B.t().to(dtype), B.t().detach())

    def stacks(self) -> list[tuple[Tensor, Tensor]]:
        """For the penalty, by width: A and transposed B of all matrices with their reserves, and the target identities.

        Rows are (factors, largest rank, width), zero where a matrix has fewer; identities are (factors, largest rank,
        largest rank), zero there as well.
        """
        rows, found = self._concatenated(), []
        for width, index in self._indices().items():
            stack = rows[width].index_select(0, index.stack)
            found.append((stack.view(*index.identities.shape[:2], -1), index.identities))
        return found

    def _enter(self, module: nn.Module, *_: Any) -> None:
        if not torch.compiler.is_compiling():
            if self.outermost == id(module):  # a call that Ctrl-C ended has run no hook
                self.depth = 0
            if self.depth == 0:
                self.outermost = id(module)
        if self.depth == 0:
            self.forget()
        self.depth += 1
        if not torch.compiler.is_compiling() and torch.is_grad_enabled():
            self.passed = True

    def _leave(self, *_: Any) -> None:
        self.depth = max(0, self.depth - 1)
        if self.depth == 0:
            self._views = {}

    def forget(self) -> None:
        """Drop what was gathered for one pass; it is gathered anew when it is needed."""
        self._views, self._last = {}, (None, {})

    def _gather(self, dtype: torch.dtype) -> dict[str, Views]:
        rows = self._concatenated()
        # in an open bank, a gradient of zeros would let an optimizer begin with tensors whose allocation is to come
        held = [
            group.lambda_.detach() if self.open and not group.trains else group.lambda_
            for group in self.all_groups
            if group.lambda_ is not None
        ]
        lambdas = torch.cat([*held, self._constants])
        found: dict[tuple[str, str], tuple[Tensor, Tensor]] = {}
        for width, index in self._indices().items():
            exact = (
                lambdas.index_select(0, index.lambdas).unsqueeze(1)
                * index.scale
                * rows[width].index_select(0, index.places)
            )
            pairs = zip(exact.to(dtype).split(index.sizes), exact.detach().split(index.sizes), strict=True)
            found |= dict(zip(index.factors, pairs, strict=True))
        return {name: Views(*found["A", name], *found["B", name]) for name in self.matrices}

    def _concatenated(self) -> dict[int, Tensor]:
        """All rows of every width; the penalty reuses those of the last forward until a backward frees the graph."""
        groups = self.all_groups
        parts = {
            width: [groups[number].rows[str(width)] for number in index.groups]
            for width, index in self._indices().items()
        }
        versions = [tensor._version for tensors in parts.values() for tensor in tensors]
        key = (torch._C._current_graph_task_id(), versions) if torch.is_grad_enabled() else None
        if key is None or key != self._last[0]:
            rows = {width: torch.cat([*tensors, self.like.new_zeros(1, width)]) for width, tensors in parts.items()}
            for tensor in rows.values():
                if tensor.requires_grad:
                    tensor.register_hook(self._used_up)
            self._last = (key, rows)
        return self._last[1]

    def _used_up(self, _: Tensor) -> None:
        self.forget()

    def _indices(self) -> dict[int, _Index]:
        """The index of each width; made again when the structure or the device has changed."""
        like = self.like
        if self._made_for != (like.device, like.dtype):
            self._made_for = (like.device, like.dtype)
            widths = [w for matrix in self.matrices.values() for w in (matrix.in_features, matrix.out_features)]
            with torch.inference_mode(False):  # tensors made in inference mode could not be used in training afterwards
                self._constants = like.new_tensor([self.reserve_lambda, 1.0])  # lambdas of reserves, and of rows of B
                self._by_width = {width: self._index(width) for width in dict.fromkeys(widths)}
        return self._by_width

    def _index(self, width: int) -> _Index:
        holders = [number for number, group in enumerate(self.all_groups) if group.next_row.get(str(width))]
        lengths = [len(self.all_groups[number].rows[str(width)]) for number in holders]
        first = dict(zip(holders, itertools.accumulate(lengths, initial=0), strict=False))
        zero = sum(lengths)  # the row after the last
        starts = self._lambda_starts()
        factors, sizes, places, lambdas, scale, stack = [], [], [], [], [], []
        for what, name in self._factors_of(width):
            matrix = self.matrices[name]
            begins = [first[c.group] + (c.A_row if what == "A" else c.B_row) for c in matrix.components]
            rows = [[*range(begin, begin + c.rank)] for begin, c in zip(begins, matrix.components, strict=True)]
            used = [*itertools.chain(*rows[: len(matrix.used)])]
            factors.append((what, name))
            sizes.append(len(used))
            places += used
            of_A = [place for c in matrix.used for place in _lambda_places(c, starts)]
            lambdas += of_A if what == "A" else [starts[NO_GROUP] + 1] * len(used)
            scale += [self.scale(name) if what == "A" else 1.0] * len(used)
            stack.append([*itertools.chain(*rows)])
        largest = max(map(len, stack))
        whole = torch.tensor([row + [zero] * (largest - len(row)) for row in stack])
        like = self.like
        return _Index(
            factors=factors,
            groups=holders,
            sizes=sizes,
            places=torch.tensor(places, device=like.device),
            lambdas=torch.tensor(lambdas, device=like.device),
            scale=torch.tensor(scale, dtype=like.dtype, device=like.device).unsqueeze(1),
            stack=whole.flatten().to(like.device),
            identities=torch.diag_embed((whole < zero).to(like.dtype)).to(like.device),
        )

    def _factors_of(self, width: int) -> list[tuple[str, str]]:
        """("A" or "B", matrix) of every factor whose rows have this width, in model order."""
        return [
            (what, name)
            for name, matrix in self.matrices.items()
            for what, wide in (("A", matrix.in_features), ("B", matrix.out_features))
            if wide == width
        ]

    def _lambda_starts(self) -> dict[int, int]:
        """Where the lambdas of each group begin in the concatenation of all; `NO_GROUP`: the constants after them."""
        starts, total = {}, 0
        for number, group in enumerate(self.all_groups):
            if group.lambda_ is not None:
                starts[number] = total
                total += len(group.lambda_)
        return starts | {NO_GROUP: total}


def _mark(bank: Bank, module: nn.Module, state_dict: dict[str, Any], prefix: str, _: Any) -> None:
    """Give every matrix a weight of an impossible shape under its plain name.

    So whatever reads the state as that of a plain model (`from_pretrained`, `load_state_dict(strict=False)`) fails
    with a message about sizes, instead of leaving the layers as they were drawn.
    """
    for name in bank.matrices:
        state_dict[f"{prefix}{name}.weight"] = torch.zeros(MARK, dtype=torch.uint8)


def _lambda_places(component: Component, starts: Mapping[int, int]) -> list[int]:
    start = starts[component.lambda_group]
    if component.lambda_group == NO_GROUP:
        return [start] * component.rank
    return [*range(start + component.lambda_row, start + component.lambda_row + component.rank)]


def _kept_for_backward() -> torch.autograd.graph.saved_tensors_hooks:
    """Keep what is saved for backward in here; activation checkpointing around it would compute it again."""
    return torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)
