"""Whether the Hugging Face hub can be reached: asked once, answered within seconds."""

import functools
import http.client
import threading
import urllib.error
import urllib.request

from increlora.errors import UserError

PATIENCE = 4.0  # seconds; the hub's own clients retry for 48


def require_hub(instead: str) -> None:
    """Return if the hub answers; the first call in a process asks, later ones remember.

    Honours HF_ENDPOINT, HF_HUB_OFFLINE and the proxy variables of the environment.

    Args:
        instead: what the person can set to do without the hub, e.g. "backbone.path=DIR".

    Raises:
        UserError: no hub, within about `PATIENCE` seconds.
    """
    from huggingface_hub import constants

    trouble: str | None
    if constants.HF_HUB_OFFLINE:
        trouble = "HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set"
    else:
        trouble = _trouble(constants.ENDPOINT)
    if trouble is not None:
        raise UserError(
            f"the Hugging Face hub cannot be reached ({constants.ENDPOINT}: {trouble}).\n"
            f"Without it: {instead}, or `make quickstart`, which needs no hub."
        )


@functools.cache
def _trouble(endpoint: str) -> str | None:
    """Why `endpoint` does not answer, None if it does."""
    outcome: list[str | None] = []
    # in a thread, because no timeout covers the look-up of the name, which alone can take 40 s
    thread = threading.Thread(target=lambda: outcome.append(_ask(endpoint)), daemon=True)
    thread.start()
    thread.join(PATIENCE)
    return outcome[0] if outcome else f"no answer within {PATIENCE:g} s"


def _ask(endpoint: str) -> str | None:
    try:
        with urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=PATIENCE):
            return None
    except urllib.error.HTTPError as answer:  # a mirror may refuse its front page and still serve files
        return None if answer.code < 500 else f"it answers {answer.code}"
    except (OSError, ValueError, http.client.HTTPException) as error:
        return str(getattr(error, "reason", error)) or type(error).__name__
