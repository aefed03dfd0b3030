"""Run a function on several real ranks, cheaply: one parent imports everything once, ranks are forked from it.

A two-rank DeepSpeed training costs a fraction of a second this way instead of the launcher's 25 s.
"""

import os
import time
import traceback
from multiprocessing.connection import wait
from pathlib import Path

from dtrain.chaos import forked

# The parent of all ranks finds `tests` here, wherever a test has gone.
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(Path(__file__).parent.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
)
# diffusers takes 3.5 s to import, and a rank that encodes latents needs it.
forked.preload("tests.ranks", "diffusers.models.autoencoders.autoencoder_kl")


def start_ranks(function, world_size: int, *args, environment: dict[str, str] | None = None):
    """Processes and their result pipes. `function`, of a module's top level, is called as function(*args)."""
    pipes = [forked.context.Pipe(duplex=False) for _ in range(world_size)]
    processes = forked.fork_ranks(_rank_main, [(sender, function, args) for _, sender in pipes], environment)
    for _, sender in pipes:
        sender.close()
    return [(process, receiver) for process, (receiver, _) in zip(processes, pipes, strict=True)]


def run_ranks(
    function, world_size: int, *args, timeout: float = 120, environment: dict[str, str] | None = None
) -> list:
    """Each rank's result, in rank order. A rank that raises, dies or outlasts the time-out fails the caller."""
    return join_ranks(start_ranks(function, world_size, *args, environment=environment), timeout)


def join_ranks(started: list, timeout: float = 120) -> list:
    """The results of `start_ranks`."""
    world_size = len(started)
    results: dict[int, object] = {}
    end = time.monotonic() + timeout
    try:
        while len(results) < world_size:
            open_pipes = {receiver: rank for rank, (_, receiver) in enumerate(started) if rank not in results}
            ready = wait(list(open_pipes), timeout=max(0.0, end - time.monotonic()))
            if not ready:
                raise TimeoutError(f"ranks {sorted(open_pipes.values())} did not finish within {timeout} s")
            for receiver in ready:
                rank = open_pipes[receiver]
                try:
                    ok, value = receiver.recv()
                except EOFError:
                    started[rank][0].join(5)
                    raise RuntimeError(f"rank {rank} died with exit code {started[rank][0].exitcode}") from None
                if not ok:
                    raise RuntimeError(f"rank {rank} raised\n{value}")
                results[rank] = value
    finally:
        for process, _ in started:
            if len(results) < world_size:
                process.kill()
            process.join()
    return [results[rank] for rank in range(world_size)]


def _rank_main(sender, function, args):
    import torch

    from dtrain import distributed

    torch.set_num_threads(1)
    try:
        distributed.initialize()
        value = (True, function(*args))
    except BaseException:
        value = (False, traceback.format_exc())
    try:
        sender.send(value)
    except Exception:
        sender.send((False, traceback.format_exc()))
    if value[0] and torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
