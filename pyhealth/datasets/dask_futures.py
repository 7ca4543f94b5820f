"""Waiting for the work of a Dask cluster whose workers may leave."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from dask.distributed import Client, Future, wait

__all__ = ["as_completed"]

#: Seconds after which a wait looks whether there are workers.
CHECK_EVERY = 60


def as_completed[T](
    client: Client, futures: Sequence[Future[T]], what: str
) -> Iterator[Future[T]]:
    """Yield futures as they end.

    Args:
        client: of the cluster.
        futures: of that client.
        what: they are, for the error.

    Raises:
        OSError: if the workers that this program has started are all gone. Those of a
            batch system may wait in its queue for days, and are waited for.

    Examples:
        >>> for future in as_completed(client, futures, "runs"):  # doctest: +SKIP
        ...     print(future.result())
    """
    waiting, alone = list(futures), 0
    while waiting:
        try:
            done = wait(waiting, timeout=CHECK_EVERY, return_when="FIRST_COMPLETED")
        except TimeoutError:
            alone = 0 if client.scheduler_info()["workers"] else alone + 1
            # A worker that is started anew has had the time to come.
            if alone > 1 and client.cluster is not None:
                raise OSError(
                    f"All workers are gone, {len(waiting)} {what} are left. The same "
                    "command goes on with them."
                ) from None
            continue
        yield from done.done
        waiting = list(done.not_done)
