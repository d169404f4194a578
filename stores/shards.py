"""The share of one of several writers of a store: shard I of N, counted from 0."""

import re
from dataclasses import dataclass
from typing import Self

from .errors import BadInput


@dataclass(frozen=True)
class Shard:
    """Writer `index` of `count`. Shards own disjoint ranges of chunks, which together are all chunks."""

    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise BadInput(f"shard I/N counts I from 0 to N - 1; found {self.index}/{self.count}")

    @classmethod
    def parse(cls, text: str) -> Self:
        """From `I/N`, as on the command line.

        Raises
        ------
        BadInput
            If it is something else.
        """
        found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
        if not found:
            raise BadInput(f"shard must be I/N, for instance 0/4; found {text!r}")
        return cls(int(found[1]), int(found[2]))

    @property
    def is_only(self) -> bool:
        """One writer makes the whole store."""
        return self.count == 1

    @property
    def file_part(self) -> str:
        """`0-of-4`, as in the names of this writer's files."""
        return f"{self.index}-of-{self.count}"

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    def chunks(self, n_chunks: int) -> range:
        """The chunks of this writer: consecutive ones, so that it reads consecutive images."""
        return range(self.index * n_chunks // self.count, (self.index + 1) * n_chunks // self.count)


ONE_WRITER = Shard()
