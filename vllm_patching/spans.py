"""Which weight version produced which tokens of a finished request, kept in the API server.

vLLM reports ``WeightVersionSpan`` on its token-in-token-out endpoint only; requests that came by the OpenAI
routes can be looked up here by their id (``X-Request-Id``), for the newest ``LIMIT`` requests.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

LIMIT = 4096

_finished: OrderedDict[str, list[dict[str, Any]]] = OrderedDict()


def remember(request_id: str, found: Any) -> None:
    """Keep the spans of one finished request; ``found`` is vLLM's list, or None without labels."""
    _finished[request_id] = [
        {"weight_version": span.version, "start": span.start, "end": span.end} for span in found or ()
    ]
    _finished.move_to_end(request_id)
    while len(_finished) > LIMIT:
        _finished.popitem(last=False)


def find(request_id: str) -> dict[str, list[dict[str, Any]]]:
    """Spans of all finished sequences whose id contains ``request_id``, by their full id."""
    return {known: spans for known, spans in _finished.items() if request_id in known}
