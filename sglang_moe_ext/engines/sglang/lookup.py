"""Ask the real SGLang, in a fresh process and through its own lookup, which entry it takes for each M."""

from __future__ import annotations

from collections.abc import Mapping

from sglang_moe_ext.engines import lookups
from sglang_moe_ext.engines.lookups import Answer, Question, Who

__all__ = ["ALONE", "AS_SERVED", "Answer", "Asked", "Question", "ask"]

ALONE = Who("SGLang", "sglang_moe_ext.engines.sglang.lookup_child", is_alone=True)
AS_SERVED = Who("SGLang", "sglang_moe_ext.serving.lookup_child", is_alone=False)


class Asked(lookups.Asked):
    """A process of SGLang, ready to ask."""

    def __init__(self, environment: Mapping[str, str] | None = None, who: Who = ALONE) -> None:
        super().__init__(who, environment)


def ask(question: Question, environment: Mapping[str, str] | None = None, who: Who = ALONE) -> Answer:
    """What the engine takes, asked in a process that is started for it.

    Raises:
        EngineError: the engine could not be asked, or its lookup raised.
    """
    return Asked(environment, who).answer(question)
