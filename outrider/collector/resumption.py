"""Whether a ledger is the one with which a run can go on from a checkpoint."""

from pathlib import Path

from outrider.collector.ledger import ID, check_layout, is_empty
from outrider.collector.ledger_rows import held_steps, open_for_reading


def mismatch(path: Path, batches: int, ledger: str) -> str | None:
    """Why not, in words; None where it is. path: of the ledger, whether it is there or not. batches: on which the
    checkpoint was trained. ledger: id of the ledger that has them, empty where the checkpoint does not know it. Raises
    UserError when the file cannot be read.

    What was trained before is known to the ledger alone: with another one the run would ask the same prompts again, and
    nothing else would look wrong. Numbers cannot lag behind in the right one, however the run ended: a batch is
    recorded before it is trained. Those of batches that went to the archive stay.
    """
    held, facts = 0, {}
    if path.exists():
        with open_for_reading(path) as db:
            if not is_empty(db):
                check_layout(path, db)
                held = held_steps(db)
                facts = dict(db.execute("SELECT name, value FROM facts"))
    if held < batches:
        return f"was trained on {batches} batches, of which {path} records {held or 'none'}"
    if facts and ledger and facts.get(ID) != ledger:
        return f"is of another run than the one that {path} records"
    return None
