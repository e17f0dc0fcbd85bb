"""Errors that a person reads, and the shape in which a server sends them."""

import msgspec


class UserError(Exception):
    """Something the user can mend. The message names the offender, what was found, and the remedy.

    Command-line entry points print the message alone, without a traceback, and exit with status 2.
    """


class ErrorDetail(msgspec.Struct, kw_only=True):
    """The body of an error, in the shape of OpenAI's API."""

    message: str
    type: str = "invalid_request_error"
    param: str | None = None
    code: str | None = None


class ErrorBody(msgspec.Struct):
    """What every route answers when the status is not 2xx."""

    error: ErrorDetail
