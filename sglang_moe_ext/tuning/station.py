"""One GPU with a compiler beside it: all that a strategy is given to work with."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from sglang_moe_ext.core import CompileJob, Failure, Resources
from sglang_moe_ext.tuning.questions import Answer, Question


class Station(Protocol):
    """Where it stands makes no difference to a strategy. One thread at a time asks."""

    @property
    def name(self) -> str:
        """As a message calls it: `GPU 1`, `10.0.0.3 GPU 1`."""

    def get_ready(self) -> None:
        """Wait until it can be asked.

        Raises:
            MoEExtError: it never will be.
        """

    def want(self, jobs: Iterable[CompileJob]) -> None:
        """Begin to compile these, and come back at once."""

    def binary(self, job: CompileJob) -> Resources | Failure:
        """What the binary needs; waits until it is made."""

    def ask(self, question: Question) -> Answer:
        """Measure. A Failure costs this question alone.

        Raises:
            MoEExtError: the GPU answers no more.
        """

    def close(self) -> None:
        """End what runs there; what it holds of others' stays."""


class FarmLike(Protocol):
    """What a station needs of a compile farm."""

    def want(self, jobs: Iterable[CompileJob], *, first: bool = False) -> None: ...

    def result(self, job: CompileJob) -> Resources | Failure: ...

    def close(self) -> None: ...


class WorkerLike(Protocol):
    """What a station needs of a measuring process; `device_name` as torch.cuda reports it."""

    @property
    def device_name(self) -> str: ...

    def ask(self, question: Question) -> Answer: ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class LocalStation:
    """A GPU of this machine. The farm is shared with the other stations here, and closed by who made it."""

    name: str
    farm: FarmLike
    worker: WorkerLike

    def get_ready(self) -> None:
        self.worker.device_name  # noqa: B018 - it waits for the process

    def want(self, jobs: Iterable[CompileJob]) -> None:
        self.farm.want(jobs)

    def binary(self, job: CompileJob) -> Resources | Failure:
        return self.farm.result(job)

    def ask(self, question: Question) -> Answer:
        return self.worker.ask(question)

    def close(self) -> None:
        self.worker.close()
