"""A pool of threads that ends with its `with` block: what has not begun is dropped, what has begun is waited for."""

from concurrent.futures import ThreadPoolExecutor
from types import TracebackType


class Threads(ThreadPoolExecutor):
    """ThreadPoolExecutor(number, name) that leaves nothing behind, whatever ends the block."""

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.shutdown(wait=True, cancel_futures=True)
