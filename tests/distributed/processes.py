# SPDX-License-Identifier: Apache-2.0
"""Two processes on this machine that run the same function side by side, and what came of it in each of them.

`Processes` is the test's side. The workers' side is this file as a program: a case a line comes in, and its outcome
goes out. Every case has a process group of its own, whose ranks meet over a file. One that fails is its workers'
last, so that it spoils none after it: a rank that failed while the group was made counts groups otherwise than the
other one from there on, and they would never meet again.
"""

from __future__ import annotations

import contextlib
import datetime
import faulthandler
import gc
import importlib
import json
import os
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path

WORLD = 2
PATIENCE = 60.0  # seconds that a case may take: a hundred times what it needs


class Processes:
    """`WORLD` workers, started when they are first needed, and anew after a case that failed, hung or died."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder  # where they work: a case may keep files in it
        self._workers: list[subprocess.Popen[str]] = []
        self._logs: list[Path] = []
        self._count = 0

    def run(self, module: str, name: str, patience: float = PATIENCE) -> str | None:
        """Run ``module.cases[name]()`` in every process; return the text of what went wrong, or None.

        A case that takes longer than ``patience`` seconds is ended, and where its threads were is in the text.
        """
        if not self._workers:
            self._start()
        self._count += 1
        job = json.dumps([module, name, str(self.folder / f"{self._count}.store"), patience])
        for worker in self._workers:
            with contextlib.suppress(OSError):  # it has died: its missing answer tells
                print(job, file=worker.stdin, flush=True)
        answers = [worker.stdout.readline() for worker in self._workers]
        texts = []
        for rank, answer in enumerate(answers):
            error = json.loads(answer) if answer else f"ended within {name}:\n{self._logs[rank].read_text()[-6000:]}"
            if error is not None:
                texts.append(f"rank {rank}: {error}")
        if texts:
            self.close()
        return "\n".join(texts) or None

    def _start(self) -> None:
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
        }
        if any(name == "lo" for _, name in socket.if_nameindex()):
            environment.setdefault("GLOO_SOCKET_IFNAME", "lo")  # else gloo looks for this machine under its name
        self._logs = [self.folder / f"{self._count}.rank{rank}.log" for rank in range(WORLD)]
        for rank, log in enumerate(self._logs):
            with log.open("w") as stderr:
                worker = subprocess.Popen(
                    [sys.executable, "-m", __name__, str(rank)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=stderr,
                    text=True,
                    cwd=self.folder,
                    env=environment,
                )
            self._workers.append(worker)

    def close(self) -> None:
        """End the workers."""
        for worker in self._workers:
            worker.kill()
            with contextlib.suppress(OSError):
                worker.communicate()
        self._workers = []


def work(rank: int) -> None:
    """The program of a worker: run the cases that come in, one after another."""
    import torch

    torch.set_num_threads(1)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a case prints is no answer
    for line in sys.stdin:
        module, name, store, patience = json.loads(line)
        cases = importlib.import_module(module).cases
        faulthandler.dump_traceback_later(patience, exit=True)
        error = None
        try:
            _run(cases[name], store, rank, patience)
        except Exception:
            error = traceback.format_exc()
        if error is not None:
            gc.collect()  # closes the connections that the failed case's objects hold, on which others may wait
        faulthandler.cancel_dump_traceback_later()
        print(json.dumps(error), file=answers, flush=True)


def _run(case, store: str, rank: int, patience: float) -> None:
    import torch
    import torch.distributed as dist

    dist.init_process_group(
        "gloo",
        store=dist.FileStore(store, WORLD),
        rank=rank,
        world_size=WORLD,
        timeout=datetime.timedelta(seconds=2 * patience),  # `faulthandler` comes first, and tells more
    )
    try:
        torch.manual_seed(0)
        case()
        dist.barrier()  # a rank that waits for one that failed is told so, by a closed connection
    finally:
        # Torch 2.6 may hang where a group ends directly behind its last collective, plain DDP with a hook too.
        if torch.torch_version.TorchVersion(torch.__version__) < "2.13":
            time.sleep(0.05)
        dist.destroy_process_group()


if __name__ == "__main__":
    work(int(sys.argv[1]))
