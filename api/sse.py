"""A trial's journal as server-sent events that can be resumed.

FastAPI's own generator routes are not used: they answer 200 before the trial is looked up, hold a thread
of the pool that all requests share, and know no end event. Its wire encoder is used.
"""

from __future__ import annotations

import json
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Mapping

from anyio import CapacityLimiter, to_thread
from fastapi.sse import format_sse_event
from starlette.responses import StreamingResponse

from appliance.errors import HotcellError
from appliance.service import TrialView
from appliance.trial.records import JournalEntry

MAX_FOLLOWERS = 64
RETRY_MS = 2000
_END = object()


class EventStream(StreamingResponse):
    """The answer; a stream that must not be buffered or kept."""

    media_type = "text/event-stream"

    def init_headers(self, headers: Mapping[str, str] | None = None) -> None:
        """Add the headers that keep caches and proxies from holding events back."""
        super().init_headers({"Cache-Control": "no-store", "X-Accel-Buffering": "no", **(headers or {})})


class Followers:
    """The threads that wait for journals, apart from those that serve requests."""

    def __init__(self) -> None:
        self.stopping = threading.Event()
        self._limiter: CapacityLimiter | None = None

    @property
    def full(self) -> bool:
        """True if one more would have to wait for a thread."""
        return self._slots().available_tokens < 1

    def _slots(self) -> CapacityLimiter:
        # Made on first use, since it belongs to the running event loop.
        if self._limiter is None:
            self._limiter = CapacityLimiter(MAX_FOLLOWERS)
        return self._limiter

    async def stream(
        self, entries: Iterator[JournalEntry | None], ending: Callable[[], TrialView]
    ) -> AsyncIterator[bytes]:
        """Encode entries until the trial ends (event ``end``), following fails (``error``) or we stop."""
        yield format_sse_event(retry=RETRY_MS, comment="journal")
        while not self.stopping.is_set():
            try:
                # Abandoned on cancel: the iterator returns within a second, and nobody is left to hear it.
                item = await to_thread.run_sync(
                    next, entries, _END, limiter=self._slots(), abandon_on_cancel=True
                )
                if item is _END:
                    last = await to_thread.run_sync(ending, limiter=self._slots())
                    yield format_sse_event(event="end", data_str=last.model_dump_json())
                    return
            except HotcellError as e:
                yield format_sse_event(event="error", data_str=_error(e))
                return
            if isinstance(item, JournalEntry):
                yield format_sse_event(event="journal", data_str=item.model_dump_json(), id=str(item.seq))
            else:
                yield format_sse_event(comment="beat")


def _error(error: HotcellError) -> str:
    return json.dumps({"code": error.code, "detail": error.message[:4000], "hint": error.hint})
