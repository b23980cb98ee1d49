"""Whether there is a model hub: without a network its client would retry for most of a minute."""

from __future__ import annotations

import contextlib
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator

_TURN = threading.RLock()


@contextlib.contextmanager
def offline_if_unreachable() -> Iterator[None]:
    """Without a network the hub's client retries for most of a minute before it looks into its own cache.

    One thread at a time: the client's setting is one for the whole process, and is put back afterwards.
    """
    from huggingface_hub import constants

    with _TURN:
        before = constants.HF_HUB_OFFLINE
        constants.HF_HUB_OFFLINE = before or not _reachable(constants.ENDPOINT)
        try:
            yield
        finally:
            constants.HF_HUB_OFFLINE = before


def _reachable(url: str) -> bool:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=5):
            return True
    except urllib.error.HTTPError:
        return True
    except urllib.error.URLError as error:
        # Certificates that only the hub's client is set up for do not mean that there is no network.
        return "CERTIFICATE" in str(error.reason)
    except OSError:
        return False
