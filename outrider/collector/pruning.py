"""Keeps the ledger small: steps that nobody will need again are moved to Parquet files."""

import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa

from outrider.collector.ledger import Ledger
from outrider.collector.ledger_rows import open_for_reading, select_rows
from outrider.contract.errors import UserError

log = logging.getLogger(__name__)


class Pruner:
    """Exports steps on a thread of its own, one after the other, and has the ledger delete each in one transaction.

    Killed in between, it leaves a step both in its file and in the ledger. The ledger is what counts then, and the next
    export writes the same file again.
    """

    def __init__(self, ledger: Ledger, keep_steps: int, notice: Callable[[str], object]) -> None:
        """keep_steps: of the newest, how many stay in any case. notice: tells the user something, from any thread."""
        self.ledger, self.keep_steps, self.notice = ledger, keep_steps, notice
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="pruner")
        self._closing = threading.Event()

    def release(self, before: int) -> None:
        """No resume begins before step ``before``: what is older may go. Never waits."""
        self._thread.submit(self._prune, before)

    def close(self) -> None:
        """Return when the step at hand is done with; what is left is for the next time."""
        self._closing.set()
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _prune(self, before: int) -> None:
        try:
            with open_for_reading(self.ledger.path) as db:
                [newest] = db.execute("SELECT max(step) FROM groups").fetchone()
                end = min(before, 0 if newest is None else newest + 1 - self.keep_steps)
                query = "SELECT DISTINCT step FROM groups WHERE step < ? ORDER BY step"
                for (step,) in db.execute(query, (end,)).fetchall():
                    if self._closing.is_set():
                        return
                    # Dropped groups have no step; their last possible one says when they are as old.
                    rows = select_rows(db, "g.step = ? OR (g.state = 'dropped' AND g.deadline <= ?)", (step, step))
                    self.ledger.archive.write(step, rows)
                    self.ledger.forget(step, {row.group for row in rows}).result()
        except (UserError, OSError, pa.ArrowException) as error:
            self.notice(f"old steps stay in the ledger until the next checkpoint: {error}")
        except Exception:  # a defect; the run does not depend on it
            log.exception("old steps stay in the ledger")
