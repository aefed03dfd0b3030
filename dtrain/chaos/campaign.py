"""Plays faults against a job and judges each by what the run did next, beside the same job left alone.

A round is one run that goes from nothing to its last step through several faults. A fault is survived when the attempt
that met it ended as it should, the next one went on from the newest checkpoint that is whole, and every loss either of
them wrote is the undisturbed run's: bit for bit, or to 1e-5 once the run has been in another shape.
"""

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from dtrain.chaos import attempts
from dtrain.chaos.attempts import Ended
from dtrain.chaos.damage import damage_shard
from dtrain.chaos.job import Job
from dtrain.chaos.plan import Plan, State
from dtrain.chaos.store import deletes_the_run, missing_in_mlflow
from dtrain.checkpoint.directory import complete, step_of
from dtrain.checkpoint.format import Checkpoint, Damaged
from dtrain.distributed import free_port
from dtrain.errors import HANG, STOPPED, USER_ERROR, UserError
from dtrain.run import RunDirectory
from dtrain.tracking.journal import Journal, events, read
from dtrain.training.audit import audit

TOLERANCE = 1e-5
LONGEST = 6 * 3600.0  # seconds, of the job undisturbed
START_SECONDS = 300.0  # that an attempt may take on top of four times the undisturbed run; others share the machine
ODD_KEY = "../etc//" + 300 * "x"  # of a metric: a path, an empty part, too long
LAUNCHED_EVERY = 15  # of so many attempts one goes through `deepspeed`, which takes half a minute to start


@dataclass
class Result:
    """One fault and what came of it; `problems` is empty where it was survived."""

    plan: Plan
    by: str  # fork | deepspeed
    ended: str
    trained_to: int
    at: float = 0.0  # unix seconds when nothing of the attempt was left
    recovered_to: int | None = None
    seconds: float | None = None  # until the next step was done
    difference: float = 0.0  # the largest of a loss
    exact: bool = True  # losses had to be equal bit for bit
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def survived(self) -> bool:
        return not self.problems


@dataclass
class Undisturbed:
    """The job left alone."""

    losses: dict[int, float]
    final: dict[str, np.ndarray]
    seconds: float

    @classmethod
    def train(cls, job: Job, poison: str = "") -> "Undisturbed":
        """poison: batches that are bad whatever happens. Raises UserError where the job does not even run like this."""
        name = "undisturbed" + "".join(c if c.isalnum() else "-" for c in poison)
        log, run = job.work / f"{name}.log", job.run(name)
        arguments = job.arguments(name, job.shape, [])
        began = time.time()
        ended = attempts.forked(job.command, arguments, job.shape.ranks, poison, log, LONGEST)
        if ended.codes != [0] * job.shape.ranks:
            lines = log.read_text().splitlines() or [""]
            raise UserError(f"the job does not run even undisturbed ({ended}): {lines[-1]}; see {log}")
        return cls(losses(read(run.journal_file)), tensors(run), ended.at - began)


def losses(lines: list[dict]) -> dict[int, float]:
    return {line["step"]: line["metrics"]["loss"] for line in lines if line["event"] == "train"}


def tensors(run: RunDirectory) -> dict[str, np.ndarray]:
    """Everything the newest checkpoint holds."""
    checkpoint = Checkpoint.open(complete(run.checkpoints)[-1])
    return {name: checkpoint.tensor(name) for name in checkpoint.tensors}


class Round:
    """One run and the faults it meets."""

    def __init__(self, job: Job, name: str, undisturbed: Undisturbed):
        self.job, self.name, self.undisturbed = job, name, undisturbed
        self.run, self.log = job.run(name), job.work / f"{name}.log"
        self.shape, self.exact = job.shape, True
        self._spoilt: set[tuple[int, int]] = set()  # (step, inode) of checkpoints that were damaged on purpose
        self._waiting: list[Result] = []  # met by an attempt, and no later one has begun yet
        self.met: list[Result] = []
        self._shipped, self._poison = False, ""
        self._uri = f"sqlite:///{job.work}/{name}.db"

    def state(self) -> State:
        whole = self._whole()
        spoilt = [step_of(path) for path in complete(self.run.checkpoints) if self._is_spoilt(path)]
        return State(whole[-1] if whole else 0, len(whole), tuple(spoilt), self.shape, self.job.config.train.steps)

    def meet(self, plan: Plan, launch: bool = False) -> Result:
        """One attempt with the fault. It is judged by the attempts that follow."""
        overrides = list(plan.overrides)
        notes = []
        if plan.shard is not None:
            config = self.run.config() if self.run.config_file.exists() else self.job.config
            notes.append(damage_shard(config.data, config.run.seed, plan.shard, self.job.work / "damaged"))
        if plan.mlflow:
            uri = f"http://127.0.0.1:{free_port()}" if plan.mlflow == "gone" else self._uri
            overrides += ["tracking.enabled=true", f"tracking.uri={uri}"]
        self._shipped |= bool(plan.mlflow) or plan.odd_key
        if plan.poison:
            self._poison, self.undisturbed = plan.poison, Undisturbed.train(self.job, plan.poison)
        for stacks in self.run.logs.glob("rank-*.stacks"):  # of an earlier hang
            stacks.unlink()
        with deletes_the_run(self._uri) if plan.mlflow == "deletes" else nullcontext([]) as deleted:
            lines, ended = self._attempt(overrides, plan, launch)
        last = max((line["attempt"] for line in lines), default=0)  # a process that goes back begins another
        trained_to = max(losses([e for e in lines if e["attempt"] == last]), default=self.state().step)
        result = Result(plan, "deepspeed" if launch else "fork", str(ended), trained_to, ended.at)
        result.notes += notes
        result.problems += self._ended_otherwise(plan, ended, trained_to)
        if plan.ends != "killed":  # what it trained after the fault is part of surviving it
            self._compare(result, lines)
        if plan.damage is not None:
            newest = self._whole_paths()[-1]
            self._spoilt.add((step_of(newest), newest.stat().st_ino))
            result.notes.append(plan.damage.do(newest))
        if plan.odd_key:
            Journal(self.run.journal_file).append("validation", 0, 0, {ODD_KEY: 1.0})
        if plan.mlflow == "deletes" and not deleted:
            result.problems.append("no run came to MLflow that could be deleted")
        if plan.fails is not None and plan.fails not in [e["step"] for e in lines if e["event"] == "eval_failed"]:
            result.problems.append(f"the evaluation of step {plan.fails} is not journaled as failed")
        if plan.shape is not None:
            self.shape, self.exact = plan.shape, False
        self._waiting.append(result)
        self.met.append(result)
        return result

    def finish(self) -> None:
        """The last attempt, which meets nothing: to the end, and all as if nothing had ever happened."""
        overrides = ["tracking.enabled=true", f"tracking.uri={self._uri}"] if self._shipped else []
        last = self.met[-1]
        _, ended = self._attempt(overrides, None, False)
        if ended.hung or any(ended.codes):
            last.problems.append(f"the attempt after it did not finish: {ended}")
            return
        valid = losses(read(self.run.journal_file))
        if list(valid) != list(range(1, self.job.config.train.steps + 1)):
            last.problems.append("the journal lacks steps")
        final, wanted = tensors(self.run), self.undisturbed.final
        if self.exact and any(not np.array_equal(final[name], wanted[name]) for name in wanted):
            last.problems.append("the last checkpoint is not the undisturbed run's, bit for bit")
        last.problems += [f"audit of the order: {problem}" for problem in audit(self.run).problems]
        if self._shipped and (problem := missing_in_mlflow(losses(read(self.run.journal_file)), self._uri)):
            last.problems.append(problem)

    def _attempt(self, overrides: list[str], plan: Plan | None, launch: bool) -> tuple[list[dict], Ended]:
        """(journal lines of the attempt, how it ended), after judging the faults before it by how it began."""
        expected = self.state().step
        torn = self._torn()
        before = len(events(self.run.journal_file))
        arguments = self.job.arguments(self.name, self.shape, overrides)
        faults = "; ".join(part for part in (self._poison, plan.schedule if plan else "") if part)
        limit = 4 * self.undisturbed.seconds + START_SECONDS
        if launch:
            ended = attempts.launched(arguments, self.shape.ranks, faults, self.log, limit)
        else:
            odd = (plan.alone, plan.shared_memory) if plan else ()
            ended = attempts.forked(self.job.command, arguments, self.shape.ranks, faults, self.log, limit, *odd)
        lines = events(self.run.journal_file)[before:]
        for result in self._waiting:
            result.problems += torn
        begun = next((line for line in lines if line["event"] == "attempt"), None)
        if begun is not None:
            for result in self._waiting:
                self._recovered(result, begun, lines, expected)
            self._waiting.clear()
        elif ended.hung or not (ended.killed or (plan and plan.ends == "refused")):
            for result in self._waiting:
                result.problems.append(f"the attempt after it did not begin: {ended}")
        return lines, ended

    def _recovered(self, result: Result, begun: dict, lines: list[dict], expected: int) -> None:
        result.recovered_to = begun["step"]
        if begun["step"] != expected:
            result.problems.append(f"went on from step {begun['step']}, the newest whole checkpoint is of {expected}")
        stepped = next((line["time"] for line in lines if line["event"] == "train"), None)
        if stepped is not None:
            result.seconds = stepped - result.at
        self._compare(result, lines)

    def _compare(self, result: Result, lines: list[dict]) -> None:
        """Every loss of an attempt with that of the undisturbed run."""
        for number in sorted({line["attempt"] for line in lines}):  # going back begins another in the same process
            found = losses([line for line in lines if line["attempt"] == number])
            steps = list(found)
            if steps and steps != list(range(steps[0], steps[0] + len(steps))):
                result.problems.append("the journal lacks steps")
            differences = [abs(loss - self.undisturbed.losses[step]) for step, loss in found.items()]
            result.difference = max([result.difference, *differences])
        result.exact = self.exact
        if not result.difference <= (0.0 if self.exact else TOLERANCE):
            result.problems.append(f"a loss differs by {result.difference:.2g}")

    def _ended_otherwise(self, plan: Plan, ended: Ended, trained_to: int) -> list[str]:
        if ended.hung:
            return ["did not end, and was killed"]
        outcome = self.run.outcome()
        said = outcome and outcome["outcome"]
        if plan.ends == "killed":
            fine = outcome is None and ended.killed
        elif plan.ends == "stopped":
            fine = ended.codes == [STOPPED] * len(ended.codes) and said == "stopped"
            whole = self.state().step
            if fine and whole != trained_to:
                return [f"stopped at step {trained_to} with a checkpoint of step {whole}"]
        elif plan.ends == "hang":
            fine = HANG in ended.codes and said == "hang"
            stacks = sorted(p.name for p in self.run.logs.glob("rank-*.stacks"))
            if fine and len(stacks) != self.shape.ranks:
                return [f"stacks of {len(stacks)} ranks"]
        elif plan.ends == "refused":
            fine = set(ended.codes) <= {USER_ERROR}
        else:
            fine = set(ended.codes) <= {USER_ERROR} and said == "user_error"
        return [] if fine else [f"ended as {said or 'a crash'} ({ended}), not {plan.ends}"]

    def _whole(self) -> list[int]:
        return [step_of(path) for path in self._whole_paths()]

    def _whole_paths(self) -> list[Path]:
        return [path for path in complete(self.run.checkpoints) if not self._is_spoilt(path)]

    def _is_spoilt(self, path: Path) -> bool:
        return (step_of(path), path.stat().st_ino) in self._spoilt

    def _torn(self) -> list[str]:
        """Checkpoints that have a complete name and are not whole, though nobody damaged them."""
        problems = []
        for path in complete(self.run.checkpoints):
            if not self._is_spoilt(path):
                try:
                    Checkpoint.open(path).verify()
                except Damaged as e:
                    problems.append(f"a complete name for what is not whole: {e}")
        return problems


def play(
    job: Job,
    undisturbed: Undisturbed,
    plans: Callable[[State], Plan | None],
    enough: Callable[[int], bool],
    launch: bool = True,
) -> Iterator[Result]:
    """Faults one after the other, as `plans` gives them, until `enough(faults so far)`; each when it is judged.

    Where `plans` gives None the round is over and another begins; so it is after a fault that was not survived.
    """
    faults = number = 0
    while not enough(faults):
        number += 1
        round_ = Round(job, f"round-{number:03d}", undisturbed)
        yielded = 0
        while not enough(faults) and all(r.survived for r in round_.met):
            plan = plans(round_.state())
            if plan is None:
                break
            faults += 1
            round_.meet(plan, launch and plan.can_be_launched and faults % LAUNCHED_EVERY == 0)
            judged = len(round_.met) - len(round_._waiting)
            yield from round_.met[yielded : judged - 1]
            yielded = max(yielded, judged - 1)
        if not round_.met:
            return  # nothing that is left can ever happen
        round_.finish()
        yield from round_.met[yielded:]
        if all(r.survived for r in round_.met):
            shutil.rmtree(round_.run.path)


def machine() -> str:
    return f"{len(os.sched_getaffinity(0))} CPU cores, {time.strftime('%Y-%m-%d %H:%M UTC', time.gmtime())}"
