"""Every error Fathom raises on purpose, and the HTTP status each leaf becomes.

FathomError
├── BadRequest                 400   a field is wrong: names it, its limit and the value given
│   └── UnsupportedField       400   a field this server knows of and does not honour
├── Unauthorized               401   no key, or an unknown one
├── Forbidden                  403   a key that may not do this
├── NotFound                   404   unknown model, adapter or route object
├── Conflict                   409   it exists already, or is busy
├── BodyTimeout                408   the request's body did not come in time
├── PayloadTooLarge            413   request body over the limit
├── RateLimited                429   a key over its limit of requests or tokens; carries Retry-After
├── AdapterError               400   a PEFT checkpoint that is refused: names the tensor or field
├── ModelError                 500   a base model that is refused at load, with the reason
├── GenerationError            500   one request failed inside the engine; its neighbours go on
│   └── GrammarFailed          400   its grammar outgrew the limits while text was made
├── Overloaded                 503   no room now; carries Retry-After
│   ├── QueueFull              503   too many requests or tokens wait already
│   ├── QueueTimeout           503   a request waited too long to be admitted
│   └── Draining               503   the server is stopping
├── StoreUnavailable           503   no database of calibrations, or it cannot be reached
├── SourceUnavailable          503   the hub or store of an adapter cannot be reached, or is too slow
├── RequestTimeout             504   a request outlived its time limit
└── EngineDead                 503   the engine thread ended or is stuck; nothing can be served
    └── DeviceLost             503   the device does not answer any more

Raise at the door, before anything is queued. After streaming has begun the status is already sent,
so the same error travels as an SSE event and the stream ends.
"""


class FathomError(Exception):
    """Root of the tree. `param` names the offending field, `code` is a stable word for machines."""

    status = 500
    type = "server_error"
    code: str | None = None

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        if code is not None:
            self.code = code


class BadRequest(FathomError):
    """A field is wrong; the message states the limit and the value given."""

    status = 400
    type = "invalid_request_error"


class UnsupportedField(BadRequest):
    """A field this server knows of and refuses to ignore."""

    code = "unsupported_field"


class Unauthorized(FathomError):
    """No API key, or one that is not known."""

    status = 401
    type = "authentication_error"
    code = "invalid_api_key"


class Forbidden(FathomError):
    """A known key without the scope for this route."""

    status = 403
    type = "permission_error"
    code = "forbidden"


class NotFound(FathomError):
    """The named model, adapter or object does not exist."""

    status = 404
    type = "invalid_request_error"
    code = "not_found"


class Conflict(FathomError):
    """The thing exists already, or is in use."""

    status = 409
    type = "invalid_request_error"
    code = "conflict"


class BodyTimeout(FathomError):
    """The client did not send its request's body in time."""

    status = 408
    type = "invalid_request_error"
    code = "body_timeout"


class PayloadTooLarge(FathomError):
    """The request body is over the configured limit."""

    status = 413
    type = "invalid_request_error"
    code = "payload_too_large"


class RateLimited(FathomError):
    """A key is over its limit a minute; try again after `retry_after_s` seconds.

    unit: `requests` or `tokens`, which is also OpenAI's type of this error.
    """

    status = 429
    code = "rate_limit_exceeded"

    def __init__(self, message: str, *, unit: str, retry_after_s: int) -> None:
        super().__init__(message)
        self.type = unit
        self.retry_after_s = retry_after_s


class AdapterError(FathomError):
    """A PEFT checkpoint that is not served; the message names the tensor or field and says why."""

    status = 400
    type = "invalid_request_error"
    code = "adapter_refused"


class ModelError(FathomError):
    """A base model that is not served; the message says what could not be reproduced."""

    code = "model_refused"


class GenerationError(FathomError):
    """One request failed inside the engine."""

    code = "generation_failed"


class GrammarFailed(GenerationError):
    """A request's own grammar outgrew what llguidance may take, or led to where no text fits it.

    It is the sender's to change, and so no error of the server; the message says what gave way.
    """

    status = 400
    type = "invalid_request_error"
    code = "grammar_failed"


class Overloaded(FathomError):
    """There is no room now; try again after `retry_after_s` seconds."""

    status = 503
    type = "overloaded_error"
    code = "overloaded"

    def __init__(self, message: str, *, retry_after_s: int = 1) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class QueueFull(Overloaded):
    """The waiting queue is at its bound."""

    code = "queue_full"


class QueueTimeout(Overloaded):
    """A request waited longer to be admitted than it may."""

    code = "queue_timeout"


class Draining(Overloaded):
    """The server is stopping: it takes no new request, and ends those that outlast its patience."""

    code = "shutting_down"


class StoreUnavailable(FathomError):
    """There is no database of calibrations, or it cannot be reached; requests are served all the same."""

    status = 503
    code = "store_unavailable"


class SourceUnavailable(FathomError):
    """The hub or object store that an adapter lies in cannot be reached, or is too slow; try again."""

    status = 503
    code = "source_unavailable"


class RequestTimeout(FathomError):
    """A request outlived its time limit."""

    status = 504
    type = "timeout_error"
    code = "timeout"


class EngineDead(FathomError):
    """The engine thread has ended or is stuck; the process should be restarted."""

    status = 503
    type = "server_error"
    code = "engine_dead"


class DeviceLost(EngineDead):
    """The device fails at whatever it is asked; only a new process may have it back."""
