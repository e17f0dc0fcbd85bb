"""Paths of the server contract. The data plane is OpenAI's; the control plane is under ``/outrider``."""

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
MODELS = "/v1/models"
HEALTH = "/health"
METRICS = "/metrics"

INFO = "/outrider/info"
STAGE = "/outrider/weights/stage"
COMMIT = "/outrider/weights/commit"
STATUS = "/outrider/weights/status"
REACH = "/outrider/weights/reach"
DRAIN = "/outrider/drain"

#: All of the above.
SERVER_ROUTES = frozenset({COMPLETIONS, CHAT, MODELS, HEALTH, METRICS, INFO, STAGE, COMMIT, STATUS, REACH, DRAIN})

#: Routes that answer without the API key, so that a supervisor can probe liveness without holding it.
OPEN_ROUTES = frozenset({HEALTH})

#: Header of a completion request: the run whose weights must be in use. A server that was restarted, or that another
#: run has taken over, answers 409 instead of sampling from the wrong weights.
RUN_HEADER = "X-Outrider-Run"

#: Where a trainer node serves the bytes of its published pieces to servers on other hosts, and where it says for which
#: run it does.
WEIGHT_SEGMENT = "/outrider/segments/{name}"
WEIGHT_SEGMENTS = "/outrider/segments"
