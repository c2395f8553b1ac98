"""The processes among which a model is divided (tensor parallel): they run every forward together.

Rank 0 leads: it alone reads and writes files, decides what is run next and tells the others.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from torch import distributed


class Ranks:
    """This process among those that share a model, for which `torch.distributed` has been initialized.

    As a context of rank 0, it ends the others' work.
    """

    def __init__(self) -> None:
        self.rank = distributed.get_rank()
        # A group of its own: it never mixes with the model's collectives, and waits while rank 0 works alone.
        self._group = distributed.new_group(backend="gloo", timeout=timedelta(days=30))

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        self.tell(None)
        distributed.destroy_process_group()

    def tell(self, order: Any) -> None:
        """Tell the other ranks what to do next; None: nothing is left."""
        distributed.broadcast_object_list([order], src=0, group=self._group)

    def told(self) -> Any:
        """Wait for what rank 0 tells, and return it."""
        orders: list[Any] = [None]
        distributed.broadcast_object_list(orders, src=0, group=self._group)
        return orders[0]

    def gathered(self, value: Any) -> list[Any]:
        """Return the values that all ranks call this with, in order."""
        values: list[Any] = [None] * distributed.get_world_size(self._group)
        distributed.all_gather_object(values, value, group=self._group)
        return values
