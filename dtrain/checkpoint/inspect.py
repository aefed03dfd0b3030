"""What `dtrain checkpoints list | verify | prune` do. Imports no torch, so that the answer comes at once."""

from collections.abc import Callable

from dtrain.checkpoint.directory import complete, step_of, surplus
from dtrain.checkpoint.format import Checkpoint, Damaged
from dtrain.checkpoint.snapshots import retire
from dtrain.errors import UserError
from dtrain.lock import RunLock
from dtrain.run import RunDirectory
from dtrain.tracking.best import best_step, training_evaluations


def table(run: RunDirectory) -> str:
    """One line a checkpoint, oldest first; what is not complete is said so."""
    metrics = {line["step"]: line["metrics"] for line in training_evaluations(run.journal_file)}
    rows = [("step", "images", "size", "ranks", "state", "metric")]
    for path in complete(run.checkpoints):
        try:
            checkpoint = Checkpoint.open(path)
        except Damaged as e:
            rows.append((str(step_of(path)), "", "", "", "damaged", str(e)))
            continue
        found = {k: v for k, v in metrics.get(step_of(path), {}).items() if k != "seconds"}
        shown = "  ".join(f"{k} {v:.4f}" for k, v in found.items())
        size = f"{checkpoint.bytes / 2**20:,.1f} MiB"
        rows.append(
            (
                str(step_of(path)),
                f"{checkpoint.meta.get('images', 0):,}",
                size,
                str(checkpoint.files),
                "complete",
                shown,
            )
        )
    for path in sorted(run.checkpoints.glob("step-*.partial")):
        rows.append(
            (path.name.split(".")[0].removeprefix("step-").lstrip("0"), "", "", "", "being written, or left", "")
        )
    if len(rows) == 1:
        return f"{run.path} has no checkpoints yet"
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def verify(run: RunDirectory, on_checkpoint: Callable[[int, int], None]) -> tuple[int, str]:
    """(number of damaged checkpoints, report); reads every byte."""
    found, lines, damaged = complete(run.checkpoints), [], 0
    for done, path in enumerate(found):
        try:
            Checkpoint.open(path).verify()
            lines.append(f"{path.name}: whole")
        except Damaged as e:
            damaged += 1
            lines.append(f"{path.name}: DAMAGED, {e}")
        on_checkpoint(done + 1, len(found))
    return damaged, "\n".join(lines) or f"{run.path} has no complete checkpoints"


def prune(run: RunDirectory, keep_last: int, keep_every: int | None, keep_best: str | None) -> str:
    """Delete what the rule does not keep. Refused while a job runs, and when what stays is damaged, UserError."""
    try:
        return _prune(run, keep_last, keep_every, keep_best)
    except OSError as e:
        raise UserError(f"cannot change {e.filename or run.path}: {e.strerror}") from None


def _prune(run: RunDirectory, keep_last: int, keep_every: int | None, keep_best: str | None) -> str:
    lock = RunLock(run.lock_file)
    lock.acquire()
    try:
        found = {step_of(path): path for path in complete(run.checkpoints)}
        evaluations = training_evaluations(run.journal_file) if keep_best else []
        best = best_step(evaluations, keep_best, found) if keep_best else None
        if keep_best and best is None:
            known = {name: None for line in evaluations for name in line["metrics"]}
            has = f"; they have {', '.join(known)}" if known else ""
            raise UserError(f"no checkpoint of {run.path} has the metric {keep_best!r}; nothing was deleted{has}")
        going = surplus(found, keep_last, keep_every, best)
        if going:
            newest = found[max(found)]
            try:
                Checkpoint.open(newest).verify()
            except Damaged as e:
                raise UserError(f"the newest checkpoint is damaged, so nothing was deleted: {e}") from None
        config = run.config()
        for step in going:
            retire(run, config, step)
    finally:
        lock.release()
    kept = ", ".join(str(step) for step in sorted(found) if step not in going)
    return f"deleted {len(going)}, kept {kept or 'none'}"
