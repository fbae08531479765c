"""Ctrl-C during training: end within seconds."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError
from ray.train.torch import TorchTrainer

ABORT_SECONDS = 5.0
"""How long the controller may take to stop the workers by itself."""


class InterruptibleTrainer(TorchTrainer):
    """A TorchTrainer whose ``fit`` raises KeyboardInterrupt on Ctrl-C.

    Ray's own handler waits for the controller, which does not listen while it waits for room for
    its workers, and then exits with code 0.
    """

    def _register_sigint_handler(self, controller: Any) -> None:
        def stop(_number: int, _frame: FrameType | None) -> None:
            signal.signal(
                signal.SIGINT, signal.default_int_handler
            )  # a second Ctrl-C does not wait
            try:
                ray.get(controller.abort.remote(), timeout=ABORT_SECONDS)
            except GetTimeoutError:
                ray.kill(controller)
            except RayActorError:
                pass  # it exits when it is done
            raise KeyboardInterrupt

        signal.signal(signal.SIGINT, stop)
