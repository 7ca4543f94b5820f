"""One run in several processes: each takes its share of every batch."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object, reduce
from torch import Tensor
from torch.utils.data import Dataset

from .types import Batch, Tensors

__all__ = ["Average", "Gather", "Processes", "prepared_by_main", "read_whole"]

#: ``average(tensors, records)`` -> the tensors' mean over all processes, each weighted
#: by the number of records that its own come from.
type Average = Callable[[Tensors, int], dict[str, Tensor]]

#: ``gather(tensor)`` -> the rows of all processes, and which of them are one's own.
type Gather = Callable[[Tensor], tuple[Tensor, slice]]


class Processes:
    """The processes that ``accelerate launch`` or ``torchrun`` started, or one alone.

    Every process reads the same batches and keeps its rows of each, so a run means the
    same with any number of processes: the loader's batch size is that of all together.

    Args:
        device: "cpu" for gloo; None or "cuda" for the process's own GPU.

    Attributes:
        count: how many there are.
        index: which one this is, from 0.
        device: where this one computes; None where it is alone and was not told.

    Examples:
        >>> processes = Processes("cpu")
        >>> processes.count, processes.is_main
        (1, True)
        >>> processes.share({"ecg": torch.zeros(3, 12, 100)}, records=3)["ecg"].shape
        torch.Size([3, 12, 100])
    """

    def __init__(self, device: str | None = None) -> None:
        self.count, self.index, self.device = 1, 0, device
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            state = PartialState(cpu=device == "cpu")
            self.count, self.index = state.num_processes, state.process_index
            self.device = str(state.device)

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that writes."""
        return self.index == 0

    def share(self, batch: Batch, records: int) -> dict[str, Tensor] | None:
        """Return this process's rows of a batch.

        Args:
            batch: values with one entry a record; others are passed on as they are.
            records: number of records in it.

        Returns:
            The share; None where there are fewer records than processes, which none of
            them can then use.
        """
        if self.count == 1:
            return dict(batch)
        if records < self.count:
            return None
        rows = slice(
            self.index * records // self.count, (self.index + 1) * records // self.count
        )
        return {
            name: value[rows]
            if isinstance(value, Tensor | list | tuple) and len(value) == records
            else value
            for name, value in batch.items()
        }

    def average(self, tensors: Tensors, records: int) -> dict[str, Tensor]:
        """Return the mean over all processes, weighted by their records.

        Args:
            tensors: by name, the same names and shapes in every process.
            records: that this process's tensors come from.

        Returns:
            The mean by name.
        """
        if self.count == 1:
            return dict(tensors)
        flat = torch.cat([value.flatten() for value in tensors.values()])
        total = reduce(torch.cat([flat * records, flat.new_tensor([records])]), "sum")
        pieces = (total[:-1] / total[-1]).split([v.numel() for v in tensors.values()])
        return {
            name: piece.view_as(value)
            for piece, (name, value) in zip(pieces, tensors.items(), strict=True)
        }

    def gather(self, tensor: Tensor) -> tuple[Tensor, slice]:
        """Return the rows of all processes in order, and which of them are one's own.

        Args:
            tensor: (B, ...), where B may differ between the processes.

        Returns:
            All rows, without graph, and the slice of this process's.

        Examples:
            >>> Processes("cpu").gather(torch.tensor([3.0, 4.0]))
            (tensor([3., 4.]), slice(0, 2, None))
        """
        parts = self.all(tensor.detach().cpu())
        first = sum(len(part) for part in parts[: self.index])
        own = slice(first, first + len(tensor))
        return torch.cat(parts).to(tensor.device), own

    def from_main[T](self, value: T) -> T:
        """Return what the main process passed."""
        if self.count == 1:
            return value
        return broadcast_object_list([value])[0]

    def all[T](self, value: T) -> list[T]:
        """Return what each process passed, in order."""
        return [value] if self.count == 1 else gather_object([value])

    def largest(self, number: int) -> int:
        """Return the largest number that a process passed."""
        return max(self.all(number))


def read_whole(dataset: Dataset[object], processes: Processes) -> None:
    """Let every process read all of a streaming dataset, not a part of its own.

    Streaming datasets look at the launch by themselves and drop what does not divide.

    Args:
        dataset: changed in place; one that is no streaming dataset stays as it is.
        processes: of the launch.

    Examples:
        >>> read_whole(torch.utils.data.TensorDataset(), Processes("cpu"))
    """
    if processes.count == 1:
        return
    if hasattr(dataset, "distributed_env") and hasattr(dataset, "set_drop_last"):
        environment = type(dataset.distributed_env)
        dataset.distributed_env = environment(world_size=1, global_rank=0, num_nodes=1)
        dataset.set_drop_last(False)


@contextmanager
def prepared_by_main(processes: Processes) -> Iterator[None]:
    """Let the main process do something first, alone, and the others after it.

    Meanwhile no launch can be seen in the environment: streaming datasets that are made
    in here hold all samples, not a part for each process.

    Args:
        processes: of the launch.

    Examples:
        >>> with prepared_by_main(Processes("cpu")):
        ...     print("prepared once")
        prepared once
    """
    alone = {"WORLD_SIZE": "1", "GLOBAL_RANK": "0", "NNODES": "1"}
    before = {name: os.environ.get(name) for name in alone}
    if processes.count > 1:
        os.environ |= alone  # streaming datasets believe these before anything else
    try:
        if not processes.is_main:
            processes.from_main(None)
        yield
        if processes.is_main:
            processes.from_main(None)
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
