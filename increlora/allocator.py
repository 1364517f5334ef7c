"""When ranks are added, how many, and to which matrices: names and numbers, no tensors.

The paper's allocation (arXiv 2308.12043): every `interval` steps after `init_warmup` the `top_h` matrices with
the highest score grow by `rank_step`, until the ranks sum to the budget, target_rank * matrices.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from increlora.errors import UserError


@dataclass(frozen=True)
class Allocator:
    """The growth schedule of one run.

    Args:
        matrices: number of adapted matrices.
        init_rank, target_rank: rank of every matrix at the start; average rank at the end.
        rank_step: ranks that a chosen matrix gains.
        top_h: matrices chosen per growth.
        interval, init_warmup: growth at steps t > init_warmup with t % interval == 0.
        max_rank: no matrix grows above it; a matrix grows by whole rank_steps, so it may end below. None: no limit.

    Raises:
        UserError: a value is out of range.
    """

    matrices: int
    init_rank: int
    target_rank: int
    rank_step: int
    top_h: int
    interval: int
    init_warmup: int
    max_rank: int | None = None

    def __post_init__(self) -> None:
        for name in ("matrices", "init_rank", "target_rank", "rank_step", "top_h", "interval"):
            if getattr(self, name) < 1:
                raise UserError(f"`{name}` must be at least 1, it is {getattr(self, name)}")
        if self.init_warmup < 0:
            raise UserError(f"`init_warmup` must not be negative, it is {self.init_warmup}")
        if self.target_rank < self.init_rank:
            raise UserError(
                f"the budget is below the start: target_rank {self.target_rank} < init_rank {self.init_rank}. "
                "Raise `target_rank` or lower `init_rank`."
            )

    @property
    def budget(self) -> int:
        """Sum of ranks at the end."""
        return self.target_rank * self.matrices

    @property
    def needed(self) -> int:
        """Ranks to add over the run."""
        return (self.target_rank - self.init_rank) * self.matrices

    def spent(self, total_rank: int) -> bool:
        return total_rank >= self.budget

    def due(self, step: int, total_rank: int) -> bool:
        """Whether ranks are added at this step (optimizer steps already taken)."""
        return step > self.init_warmup and step % self.interval == 0 and not self.spent(total_rank)

    def next_growth(self, step: int) -> int:
        """The first step, `step` or later, at which ranks are added if the budget allows."""
        return max(-(-step // self.interval), self.init_warmup // self.interval + 1) * self.interval

    def choose(self, ranks: Mapping[str, int], scores: Mapping[str, float]) -> dict[str, int]:
        """The matrices that grow now and what each gains, in model order; never more than the budget has room for.

        Where the room is no multiple of `rank_step`, the chosen matrix with the lowest score gains what is left.
        Below `max_rank` a matrix has room for so many growths. If others with higher scores took all choices, too
        little room might be left for the rest of the budget; then the best of those that would lose room come first.

        Args:
            ranks: of all matrices, in model order; a tie goes to the earlier one.
        """
        room = self.budget - sum(ranks.values())
        later = -(-room // self.each)  # growths that are left, this one included
        several = -(-min(room, self.each) // self.rank_step)
        fits = {name: min(self._fits(rank), later) for name, rank in ranks.items()}
        ordered = sorted((name for name in ranks if fits[name]), key=lambda name: -scores[name])
        losing = [name for name in ordered if fits[name] == later]  # they lose a growth if they are passed over
        spare = sum(fits.values()) - later * self._chosen
        first = losing[: max(0, min(len(losing) - spare, several))]
        others = [name for name in ordered if name not in first]
        best = sorted(first + others[: several - len(first)], key=ordered.index)
        gains = {name: min(self.rank_step, room - i * self.rank_step) for i, name in enumerate(best)}
        return {name: gains[name] for name in ranks if name in gains}

    @property
    def _chosen(self) -> int:
        """Matrices that grow at once."""
        return min(self.top_h, self.matrices)

    @property
    def each(self) -> int:
        """Ranks that a growth adds, but for the last one."""
        return self.rank_step * self._chosen

    def _fits(self, rank: int) -> int:
        """How many growths a matrix of this rank has room for."""
        return self.needed if self.max_rank is None else max(0, self.max_rank - rank) // self.rank_step

    def growths(self) -> list[int]:
        """The ranks that each growth adds, in order."""
        return [min(self.each, self.needed - done) for done in range(0, self.needed, self.each)]

    def growth_steps(self) -> list[int]:
        """The steps at which ranks are added."""
        first = self.next_growth(0)
        return [first + i * self.interval for i in range(len(self.growths()))]

    def check(self, total_steps: int) -> None:
        """Refuse a schedule whose last growth would get no training step, or that has no room below `max_rank`.

        Steps count from 0. A growth comes within a step, and what it adds trains from the next one on.

        Raises:
            UserError: with the numbers that do not fit.
        """
        steps, latest = self.growth_steps(), total_steps - 2
        if steps and steps[-1] > latest:
            raise UserError(
                f"the growth schedule does not fit: {len(steps)} growths, at steps {steps[0]} to {steps[-1]}, but step "
                f"{latest} is the last after which new ranks still train, in {total_steps} training steps (interval "
                f"{self.interval}, init_warmup {self.init_warmup}, top_h {self.top_h}, rank_step {self.rank_step}, "
                f"budget {self.budget}). Lower `interval` or raise `top_h`, `rank_step` or the number of steps."
            )
        times = len(steps) * self._chosen  # that a matrix is chosen, in all growths
        if self.max_rank is not None and self.matrices * min(self._fits(self.init_rank), len(steps)) < times:
            enough = self.init_rank + self.rank_step * -(-times // self.matrices)
            raise UserError(
                f"below max_rank {self.max_rank} there is no room for the budget {self.budget}: {len(steps)} growths "
                f"of {self._chosen} matrices by {self.rank_step} ranks, {self.matrices} matrices that start at rank "
                f"{self.init_rank}. Give `max_rank` {enough} or more, or lower `rank_step`."
            )

    def smallest_top_h(self, total_steps: int) -> int:
        """The smallest top_h with which growth ends in the first half of training (published recipes: 32 to 41 %)."""
        rounds = max(1, total_steps // 2 // self.interval - self.init_warmup // self.interval)
        return max(1, -(-self.needed // (self.rank_step * rounds)))
