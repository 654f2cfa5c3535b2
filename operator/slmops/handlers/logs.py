"""Logs as JSON, one object a line: `time`, `level`, `logger`, `message`, then what the call gave as `extra`."""

import json
import logging
import sys
from datetime import UTC, datetime

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
_OF_KOPF = frozenset({"settings", "k8s_skip", "k8s_ref"})  # for its own poster of Events, which is off


class JsonFormatter(logging.Formatter):
    """One line, whatever the message holds."""

    def format(self, record: logging.LogRecord) -> str:
        """See logging.Formatter."""
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        line.update({name: value for name, value in vars(record).items() if name not in _STANDARD | _OF_KOPF})
        if record.exc_info and record.name.split(".")[0] != "kopf":  # kopf's watches end and are started again
            line["trace"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str, ensure_ascii=False)


def _wanted(record: logging.LogRecord) -> bool:
    """Kopf runs in a thread of its own on purpose, and it says so of signals at every start."""
    return "OS signals are ignored" not in record.getMessage()


def set_up(level: int = logging.INFO) -> None:
    """Send all logs to standard output as JSON."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(JsonFormatter())
    handler.addFilter(_wanted)
    logging.basicConfig(level=level, handlers=[handler], force=True)
    for name in ("kopf", "httpx"):  # below that they tell of every event and every request
        logging.getLogger(name).setLevel(logging.WARNING)
