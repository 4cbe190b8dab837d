"""What can go wrong between this client and a server: a class for each thing that is to be done about it."""

from __future__ import annotations


class BatchError(ValueError):
    """The batch cannot start. The message names the file, the row or the column, and says what to do."""


class ServerError(ConnectionError):
    """A server did not answer as a ComfyUI does. status: that of HTTP; 0 where no whole answer came."""

    passing = True  # whether asking again may help
    status = 0

    def __init__(self, text: str, status: int = 0):
        super().__init__(text)
        self.status = status

    @property
    def dead(self) -> bool:
        """Whether it looks as if nothing runs there: no answer, or a gateway that reaches nobody."""
        return self.status in (0, 502, 503, 504)


class Unreachable(ServerError):
    """No connection, or no whole answer before the deadline. sent: whether the request may have arrived."""

    def __init__(self, text: str, sent: bool = True):
        super().__init__(text)
        self.sent = sent


class Busy(ServerError):
    """It asks to be left alone for so many seconds: HTTP 429, or 503 with Retry-After."""

    def __init__(self, text: str, status: int, wait: float):
        super().__init__(text, status)
        self.wait = wait

    @property
    def dead(self) -> bool:
        return False


class Denied(ServerError):
    """It wants another user, password or token: HTTP 401, 403, 407."""

    passing = False


class NotFound(ServerError):
    """HTTP 404."""


class TooLarge(ServerError):
    """It takes nothing of this size: HTTP 413."""

    passing = False


class Failed(ServerError):
    """Any other status that is no success."""


class Garbled(ServerError):
    """A whole answer which is not what a ComfyUI says there: HTML, other JSON, half of it."""

    def __init__(self, text: str):
        super().__init__(text, 200)

    @property
    def dead(self) -> bool:
        return False


class ServerLost(ServerError):
    """Several requests in a row failed, over longer than a server may be away; or the prompt is gone.

    dead: whether the prompt may have died with the server. answered: whether it had answered here before it was lost.
    """

    def __init__(self, text: str, dead: bool = True, answered: bool = False):
        super().__init__(text)
        self.died, self.answered = dead, answered

    @property
    def dead(self) -> bool:
        return self.died


class Forgotten(ServerLost):
    """The server answers, and neither its queue nor its history knows the prompt: it was started anew, or the prompt
    taken out of the queue."""


class Refused(ValueError):
    """The server does not accept a prompt: its own words."""
