"""A process that loads torch once and forks a child for every line of JSON on its stdin: children to be killed.

A child trains and reports, in lines, to the named pipe it is given: its process id, every step done, and at the end
"done" or its error. The pipe closes when the child is gone.
"""

import json
import os
import signal
import sys
import traceback
from typing import TextIO

import torch

# Loaded here, so that children do not spend their lives on it.
from transformers import GPTNeoXForCausalLM  # noqa: F401

from sae.store.storage.filesystem import Storage
from sae.subject.config import EmbeddedLMSpec
from sae.subject.embedded import train_embedded_lm
from sae.train.config import SAESpec
from sae.train.loop import train_saes


def serve() -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the children
    for line in sys.stdin:
        if os.fork() == 0:
            with open(json.loads(line)["reports"], "w", buffering=1) as reports:
                _train(json.loads(line), reports)
            os._exit(0)


def _train(job: dict, reports: TextIO) -> None:
    reports.write(f"{os.getpid()}\n")
    options = {
        "checkpoint_every_steps": job["checkpoint_every_steps"],
        "progress": lambda done, *_: reports.write(f"{done}\n"),
    }
    try:
        torch.set_num_threads(1)
        storage = Storage(job["root"])
        if job["stage"] == "saes":
            train_saes(storage, [SAESpec.model_validate(spec) for spec in job["specs"]], **options)
        else:
            train_embedded_lm(storage, EmbeddedLMSpec.model_validate(job["specs"][0]), **options)
        reports.write("done\n")
    except BaseException:
        reports.write(traceback.format_exc())


if __name__ == "__main__":
    serve()
    os._exit(0)  # taking torch apart takes a second
