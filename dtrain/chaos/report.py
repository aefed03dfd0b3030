"""The campaign as a page of Markdown: a row for every fault, a last line that counts those survived."""

from collections import Counter
from statistics import median

from dtrain.chaos.campaign import Result
from dtrain.chaos.job import Job


def markdown(job: Job, results: list[Result], command: str, seed: int, where: str) -> str:
    c = job.config
    launched = sum(r.by == "deepspeed" for r in results)
    disk = "" if job.disk else " No small file system could be mounted (that takes root): no disk was filled."
    seconds = [r.seconds for r in results if r.seconds is not None]
    lines = [
        "# Chaos",
        f"`{command}`, seed {seed}, {where}.",
        "",
        f"The job: {c.model.name} on {c.data.shards}, {c.train.steps} steps of {c.data.batch_size} images a round, a "
        f"checkpoint every {c.train.checkpoint_every} steps, {job.shape}. {len(results) - launched} attempts on forked "
        f"ranks, {launched} through `deepspeed`.{disk}",
        "",
        "Losses are compared with those of the same job undisturbed: bit for bit, or within 1e-5 after a change of "
        "shape. Recovery is the time from the end of the struck attempt's last process to the next step done.",
        "",
    ]
    if seconds:
        lines += [
            f"Steps lost: {median(_lost(r) for r in results):g} at the median, {max(_lost(r) for r in results)} at "
            f"most. Recovery: {median(seconds):.1f} s at the median, {max(seconds):.1f} s at most.",
            "",
        ]
    lines += ["| kind | met | survived |", "|---|---|---|"]
    for kind, met in sorted(Counter(r.plan.kind for r in results).items()):
        lines.append(f"| {kind} | {met} | {sum(r.survived for r in results if r.plan.kind == kind)} |")
    lines += [
        "",
        "| # | fault | ended | trained to | went on from | lost | losses | recovery | survived |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [_row(number, result) for number, result in enumerate(results, 1)]
    lines += ["", f"{sum(r.survived for r in results)} of {len(results)} survived", ""]
    return "\n".join(lines)


def _lost(result: Result) -> int:
    return max(0, result.trained_to - result.recovered_to) if result.recovered_to is not None else 0


def _row(number: int, r: Result) -> str:
    equal = "equal" if r.difference == 0 else f"within {r.difference:.0e}"
    cells = [
        number,
        "; ".join([r.plan.what, *r.notes]),
        f"{r.ended}{' (deepspeed)' if r.by == 'deepspeed' else ''}",
        r.trained_to,
        "" if r.recovered_to is None else r.recovered_to,
        _lost(r),
        equal,
        "" if r.seconds is None else f"{r.seconds:.1f} s",
        "yes" if r.survived else "**no**: " + "; ".join(r.problems),
    ]
    return "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"
