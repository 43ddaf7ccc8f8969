"""Every error in one form: `{"error": {"message", "type", "code"}}`."""

from __future__ import annotations

import json
from http import HTTPStatus

NO_JSON = "The body is no JSON."
_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}


class ApiError(Exception):
    """A request that gets an error for an answer.

    Args:
        status: of HTTP.
        code: the error's name, for programs.
        message: one sentence for people, with the way out; nothing of this machine stands in it.
        headers: further headers of the answer.
    """

    def __init__(self, status: int, code: str, message: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.headers = status, code, message, headers or {}

    @property
    def body(self) -> dict[str, dict[str, str]]:
        """Return what is sent."""
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "code": self.code}}

    def to_bytes(self) -> bytes:
        """Return what is sent, as it is sent."""
        return json.dumps(self.body, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")


def refuse_busy() -> ApiError:
    """Return the error of a request that comes while too much waits."""
    return ApiError(429, "queue_full", "The service is busy. Try again in a moment.", {"Retry-After": "1"})


def exceed_limit(name: str, found: int, limit: int) -> ApiError:
    """Return the error of a request that asks for too much, naming the limit."""
    return ApiError(422, "limit_exceeded", f"{name} is {found}; this service allows at most {limit}.")


def fail_status(status: int, detail: str) -> ApiError:
    """Return the error of a status that a library has set."""
    if status == 400:  # bytes that are no UTF-8, say; each library has other words for it
        return ApiError(400, "invalid_json", NO_JSON)
    codes = {404: "not_found", 405: "method_not_allowed"}
    phrase = HTTPStatus(status).phrase if status in set(HTTPStatus) else "Error"
    return ApiError(status, codes.get(status, phrase.lower().replace(" ", "_")), detail or phrase)
