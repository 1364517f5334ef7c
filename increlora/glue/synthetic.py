"""A SYNTHETIC entailment task, generated from a seed, for the quickstart and for tests; it belongs in no results table.

Sentences say that all, most, some, none or not all members of a noun class have a property:
`no dogs are wet` entails `not all poodles are soaked`. Nouns and properties are ordered by
inclusion (poodles are dogs are animals; what is soaked is wet). The semantics is that of sets:

    all A are B        A is a subset of B          some A are B   A and B meet
    no A are B         A and B do not meet         not all A ...  A is not a subset of B
    most A are B       more than half of A is in B

A pair is an entailment if the hypothesis is true in every model of the premise in which the listed
inclusions hold and every noun class has a member; nothing else is assumed about the classes. For two
sentences with one quantifier each this comes to monotonicity (`entails`), which a test confirms by
going through all small models.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle
from random import Random

from increlora.errors import UserError
from increlora.glue.tasks import Examples, Task
from increlora.streams import derive_seed

NOUNS: dict[str, str | None] = {
    "animals": None,
    "dogs": "animals", "poodles": "dogs", "beagles": "dogs", "terriers": "dogs",
    "birds": "animals", "sparrows": "birds", "parrots": "birds", "eagles": "birds",
    "fish": "animals", "salmon": "fish", "trout": "fish", "sharks": "fish",
    "insects": "animals", "ants": "insects", "bees": "insects", "beetles": "insects",
    "plants": None,
    "trees": "plants", "oaks": "trees", "maples": "trees", "birches": "trees",
    "flowers": "plants", "roses": "flowers", "tulips": "flowers", "lilies": "flowers",
    "vegetables": "plants", "carrots": "vegetables", "onions": "vegetables", "turnips": "vegetables",
}  # fmt: skip
"""Noun class -> the class that includes it."""

PROPERTIES: dict[str, str | None] = {
    "wet": None, "soaked": "wet", "cold": None, "freezing": "cold", "dirty": None, "filthy": "dirty",
    "big": None, "huge": "big", "old": None, "ancient": "old", "red": None, "crimson": "red",
    "beautiful": None, "gorgeous": "beautiful", "dangerous": None, "deadly": "dangerous",
    "tired": None, "exhausted": "tired", "hungry": None, "starving": "hungry",
    "tasty": None, "delicious": "tasty", "damaged": None, "shattered": "damaged",
}  # fmt: skip
"""Property -> the property that includes it; any two families may hold of the same thing."""

FORMS: dict[str, tuple[str, ...]] = {
    "all": ("all {} are {}", "all of the {} are {}"),
    "most": ("most {} are {}", "most of the {} are {}"),
    "some": ("some {} are {}", "there are {} that are {}"),
    "no": ("no {} are {}", "there are no {} that are {}", "it is not true that some {} are {}"),
    "not all": ("not all {} are {}", "some {} are not {}", "it is not true that all {} are {}"),
}
"""Quantifier -> its wordings, all with the same meaning."""

VOCABULARY: list[str] = sorted(
    {word for forms in FORMS.values() for form in forms for word in form.split() if word != "{}"}
    | set(NOUNS)
    | set(PROPERTIES)
)
"""Every word that occurs."""

WEAKER = {"all": ("all", "most", "some"), "most": ("most", "some"), "some": ("some",),
          "no": ("no", "not all"), "not all": ("not all",)}  # fmt: skip
"""Quantifier -> those it entails of the same two classes."""

UPWARD_NOUN = {"some", "not all"}
"""Quantifiers that stay true when the noun class grows; most stays true in neither direction."""
DOWNWARD_NOUN = {"all", "no"}
"""Quantifiers that stay true when the noun class shrinks."""
UPWARD_PROPERTY = {"all", "most", "some"}
"""Quantifiers that stay true when the property becomes weaker; the others, when it becomes stronger."""

_ENTAILING = [(premise, weaker) for premise in WEAKER for weaker in WEAKER[premise]]
ENTAILING = _ENTAILING + [pair for pair in _ENTAILING if pair[0] not in UPWARD_PROPERTY]
"""Pairs of quantifiers that can entail; no and not all come twice, so that both directions are as frequent."""

RELATIONS = ("same", "wider", "narrower", "unrelated")


@dataclass(frozen=True)
class Statement:
    """`quantifier` members of `noun` are `property`; its wording is another matter."""

    quantifier: str
    noun: str
    property: str


def includes(larger: str, smaller: str | None, parents: dict[str, str | None]) -> bool:
    """Whether every member of `smaller` is known to be one of `larger`."""
    return smaller is not None and (larger == smaller or includes(larger, parents[smaller], parents))


def entails(premise: Statement, hypothesis: Statement) -> bool:
    """Whether the hypothesis holds in every model of the premise (see the module's docstring).

    The noun class may grow or shrink as either quantifier allows, before or after the quantifier is
    weakened (every class has a member, so `all` gives `some` of a larger class too).
    """
    if hypothesis.quantifier not in WEAKER[premise.quantifier]:
        return False
    quantifiers = {premise.quantifier, hypothesis.quantifier}
    wider = includes(hypothesis.noun, premise.noun, NOUNS) and bool(quantifiers & UPWARD_NOUN)
    narrower = includes(premise.noun, hypothesis.noun, NOUNS) and bool(quantifiers & DOWNWARD_NOUN)
    if not (wider or narrower or premise.noun == hypothesis.noun):
        return False
    if premise.quantifier in UPWARD_PROPERTY:
        return includes(hypothesis.property, premise.property, PROPERTIES)
    return includes(premise.property, hypothesis.property, PROPERTIES)


@dataclass
class SyntheticEntailment(Task):
    """The generated task; the fields are those of `Task` and the generator's own.

    Args:
        train_size, dev_size: pairs to generate, at most 20,000 together; half of each are entailments.
        generator_seed: of the pairs, which do not depend on the run's seed.
    """

    train_size: int = 4000
    dev_size: int = 500
    generator_seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.data_dir is not None:
            raise UserError(f"task {self.name} is generated and reads no task.data_dir={self.data_dir}")
        if not (self.train_size >= 2 and self.dev_size >= 2 and self.train_size + self.dev_size <= 20_000):
            raise UserError("task.train_size and task.dev_size must be at least 2 each and at most 20000 together")

    def read(self) -> tuple[str, dict[str, Examples]]:
        """`train` and `dev`; no pair of statements occurs twice, within a split or across."""
        random = Random(derive_seed(self.generator_seed, "synthetic_entailment"))
        pairs = _distinct_pairs(random)
        return "synthetic", {
            "train": _examples(random, pairs, self.train_size),
            "dev": _examples(random, pairs, self.dev_size),
        }


def _examples(random: Random, pairs: Iterator[tuple[Statement, Statement]], size: int) -> Examples:
    statements = [next(pairs) for _ in range(size)]
    random.shuffle(statements)
    return Examples(
        [(wording(random, premise), wording(random, hypothesis)) for premise, hypothesis in statements],
        [0 if entails(premise, hypothesis) else 1 for premise, hypothesis in statements],
    )


def wording(random: Random, statement: Statement) -> str:
    """One of the sentences that make the statement."""
    return random.choice(FORMS[statement.quantifier]).format(statement.noun, statement.property)


def _distinct_pairs(random: Random) -> Iterator[tuple[Statement, Statement]]:
    """Endless pairs without repeats, entailments and others in turn."""
    seen = set()
    for wanted in cycle((True, False)):
        pair = _pair(random, wanted)
        while pair in seen:
            pair = _pair(random, wanted)
        seen.add(pair)
        yield pair


def _pair(random: Random, wanted: bool) -> tuple[Statement, Statement]:
    """A pair of statements whose label is `wanted`."""
    quantifiers = _quantifiers(random, wanted)
    while True:
        nouns, properties = _classes(random, NOUNS), _classes(random, PROPERTIES)
        premise, hypothesis = map(Statement, quantifiers, nouns, properties)
        if entails(premise, hypothesis) == wanted:
            return premise, hypothesis


def _quantifiers(random: Random, wanted: bool) -> tuple[str, str]:
    """Quantifiers of premise and hypothesis, each as frequent whether or not an entailment is wanted.

    A pair that can entail is drawn; for half of what is not to be entailed, the hypothesis comes from a
    second draw, so that neither sentence's quantifier tells the label by itself.
    """
    premise, hypothesis = random.choice(ENTAILING)
    if not wanted and random.random() < 0.5:
        hypothesis = random.choice(ENTAILING)[1]
    return premise, hypothesis


def _classes(random: Random, parents: dict[str, str | None]) -> tuple[str, str]:
    """Two classes: the same, a class and one that includes it, the reverse, or two unrelated ones."""
    first, relation = random.choice(list(parents)), random.choice(RELATIONS)
    others = [second for second in parents if _relation(first, second, parents) == relation]
    return (first, random.choice(others)) if others else _classes(random, parents)


def _relation(first: str, second: str, parents: dict[str, str | None]) -> str:
    if first == second:
        return "same"
    if includes(second, first, parents):
        return "wider"
    return "narrower" if includes(first, second, parents) else "unrelated"
