"""Where a loader stands in its data, so that a run can go on from there to the bit."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch.utils.data import DataLoader

from ..datasets.sample_dataset import SampleDataset
from ..datasets.utils import get_dataloader
from .types import Batch, LoaderState, PositionState, RandomState

__all__ = [
    "LoaderPosition",
    "global_random_state",
    "set_global_random_state",
    "view_of",
]


class LoaderPosition:
    """The passes over one loader; state and return to any batch of them.

    The order of a pass is decided when it starts: by the seed and pass number of a
    PyHealth loader, by a generator or by torch's global one for other loaders. That
    state is kept, and a resumed pass starts from it and skips the batches that were
    seen. A loader whose order has other sources cannot be resumed to the bit.

    Args:
        loader: the loader, which stays the caller's.
        share: gives the part of a batch that is wanted, or None to leave it out.

    Attributes:
        taken: batches of the pass under way that were given or left out.

    Examples:
        >>> loader = DataLoader(range(6), 2, shuffle=True)
        >>> position = LoaderPosition(loader)
        >>> batches = position.batches()
        >>> first, state = next(batches), position.state_dict()
        >>> resumed = LoaderPosition(loader)
        >>> resumed.load_state_dict(state)
        >>> next(batches).equal(next(resumed.batches()))
        True
    """

    def __init__(
        self,
        loader: DataLoader[Batch],
        share: Callable[[Batch], Batch | None] | None = None,
    ) -> None:
        self.loader = loader
        self.share = share
        self.taken = 0
        self._start: LoaderState | None = None
        self._resumed: Iterator[Batch] | None = None

    def batches(self) -> Iterator[Batch]:
        """Yield the batches of one pass, or the rest of the resumed one."""
        iterator, self._resumed = self._resumed, None
        if iterator is None:
            self._start, self.taken = self._state(), 0
            iterator = iter(self.loader)
        for batch in iterator:
            self.taken += 1
            own = batch if self.share is None else self.share(batch)
            if own is not None:
                yield own
        self._start, self.taken = None, 0

    def endless(self) -> Iterator[Batch]:
        """Yield the batches of one pass after the other.

        Raises:
            ValueError: if the loader has none.
        """
        while True:
            given = self.taken  # of a resumed pass, which may have none left
            for batch in self.batches():
                given += 1
                yield batch
            if not given:
                raise ValueError("The policy's validation loader has no batch.")

    def state_dict(self) -> PositionState:
        """Return where the loader stands."""
        return {"start": self._start, "taken": self.taken, "now": self._state()}

    def load_state_dict(self, state: PositionState) -> None:
        """Go to where :meth:`state_dict` was called.

        It moves the global random states, which the caller puts where they belong.

        Args:
            state: from :meth:`state_dict`.
        """
        if state["start"] is None or state["taken"] == 0:
            self._start, self.taken, self._resumed = None, 0, None
            self._set_state(state["start"] or state["now"])
            return
        self._start, self.taken = state["start"], state["taken"]
        self._set_state(self._start)
        self._resumed = iter(self.loader)
        for _ in range(self.taken):
            next(self._resumed)
        self._set_state(state["now"])

    def _generators(self) -> list[torch.Generator]:
        batch_sampler = getattr(self.loader, "batch_sampler", None)
        owners = (
            self.loader,
            getattr(self.loader, "sampler", None),
            batch_sampler,
            getattr(batch_sampler, "sampler", None),
        )
        found = [getattr(owner, "generator", None) for owner in owners]
        return list(dict.fromkeys(g for g in found if isinstance(g, torch.Generator)))

    def _numbers(self) -> dict[str, int]:
        """Return the seed and pass number that a PyHealth loader has."""
        numbers = {name: getattr(self.loader, name, None) for name in ("epoch", "seed")}
        return {k: number for k, number in numbers.items() if isinstance(number, int)}

    def _state(self) -> LoaderState:
        return {
            "numbers": self._numbers(),
            "generators": [g.get_state() for g in self._generators()],
            "global": global_random_state(),
        }

    def _set_state(self, state: LoaderState) -> None:
        for name, number in state["numbers"].items():
            setattr(self.loader, name, number)
        for generator, saved in zip(
            self._generators(), state["generators"], strict=True
        ):
            generator.set_state(saved)
        set_global_random_state(state["global"])


def global_random_state() -> RandomState:
    """Return the states of torch's, NumPy's and Python's global generators.

    Examples:
        >>> state = global_random_state()
        >>> before = torch.rand(1)
        >>> set_global_random_state(state)
        >>> torch.rand(1).equal(before)
        True
    """
    name, keys, place, has_gauss, gauss = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": (name, keys.tolist(), place, has_gauss, gauss),
        "python": random.getstate(),
    }


def set_global_random_state(state: RandomState) -> None:
    """Put the global generators into a state.

    A state of other CUDA devices than there are now leaves CUDA's as they are.

    Args:
        state: from :func:`global_random_state`.

    Examples:
        >>> set_global_random_state(global_random_state())
    """
    torch.set_rng_state(state["torch"])
    if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
    name, keys, place, has_gauss, gauss = state["numpy"]
    words = np.array(keys, dtype=np.uint32)
    np.random.set_state((name, words, place, has_gauss, gauss))
    random.setstate(state["python"])


def view_of(
    loader: DataLoader[Batch], *, shuffle: bool, seed: int | None = None
) -> DataLoader[Batch]:
    """Return a loader of the same data that does not upset the first one.

    A streaming dataset is its own iterator and counts its epochs.

    Args:
        loader: the first one; if its data are none of PyHealth's it is returned itself.
        shuffle: whether the new one gives the data in an order of chance.
        seed: of that order.

    Returns:
        The loader.

    Examples:
        >>> loader = DataLoader(range(3))
        >>> view_of(loader, shuffle=False) is loader
        True
    """
    if not isinstance(loader.dataset, SampleDataset):
        return loader
    view = loader.dataset.subset(range(len(loader.dataset)))
    return get_dataloader(view, loader.batch_size, shuffle=shuffle, seed=seed)
