"""What the tuner asks of the engine that it tunes, whichever it is: modules of `sglang` and `vllm` answer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from sglang_moe_ext.core import Gpu, MoEShape, Projection, Quantization, Table, TableKey, TileConfig
from sglang_moe_ext.engines.backend_answer import AskedBackend
from sglang_moe_ext.engines.lookup_probe import LookupRequest, LookupResult
from sglang_moe_ext.engines.tensors import GemmTensors, LayerTensors
from sglang_moe_ext.kernel_plans import Plan

if TYPE_CHECKING:
    import torch

EngineName = Literal["sglang", "vllm"]
Version = tuple[int, int, int]
Sorted = tuple["torch.Tensor | None", "torch.Tensor", "torch.Tensor"]
"""(sorted_token_ids, expert_ids, num_tokens_post_padded); the first is None where the engine does not sort."""


class InstallationLike(Protocol):
    """One engine that is installed."""

    @property
    def version_text(self) -> str: ...
    @property
    def version(self) -> Version: ...
    @property
    def triton(self) -> str | None: ...


class ProbeLike(Protocol):
    """A process of the engine that says what it takes for a layer, from its tables as they are then."""

    def answer(self, question: LookupRequest) -> LookupResult: ...
    def close(self) -> None: ...


class EngineAdapter(Protocol):
    """One engine. `OFFLINE`: the module that compiles its kernel.

    `HAS_DOWN_TABLES`: the down projection has tables of its own; else one configuration serves both GEMMs.
    `SORTS_ITS_UP`: its own up GEMM can write rows in the order of the experts, for our down GEMM.
    """

    NAME: EngineName
    TITLE: str
    OFFLINE: str
    HAS_DOWN_TABLES: bool
    SORTS_ITS_UP: bool

    def find(self) -> InstallationLike | None:
        """The one that is installed here. Raises EngineError where it is older than anything we know."""

    def kernel_file(self, engine: Any) -> Path:
        """The source of its kernel and launcher, in that installation."""

    def start_probe(self, environment: Mapping[str, str]) -> ProbeLike:
        """A process of it under that environment, started now, with our hooks in it as a server has them."""

    def start_alone(self, environment: Mapping[str, str]) -> ProbeLike:
        """The same, without our hooks."""

    def start_reader(self, environment: Mapping[str, str]) -> ProbeLike:
        """The same, without the parts of the engine that a lookup does not need. It is told which GPU it runs on.

        Its start fails where that release's lookup needs more than is known.
        """

    def table_key(self, shape: MoEShape, device_name: str, *, down: bool) -> TableKey: ...

    def file_name(self, key: TableKey) -> str: ...

    def table_text(self, table: Table, triton: str) -> str:
        """What a file of that table says, for that Triton."""

    def effective_config(self, config: TileConfig, quantization: Quantization) -> TileConfig:
        """What the engine makes of a configuration before it launches it."""

    def why_no_table(
        self, shape: MoEShape, gpu: Gpu, architecture: str, asked: AskedBackend | None = None
    ) -> str | None:
        """Why a server that chooses its backend itself does not, or may not, read a table for the layer.

        `asked`: what the engine said, where it was asked.
        """

    def representative_tokens(self, shape: MoEShape, tokens: int) -> int:
        """The smallest batch size whose launch runs the same binaries as this one's."""

    def gemms_with_tma(self, quantization: Quantization, version: Version, sm: int) -> tuple[Projection, ...]:
        """The GEMMs that run right with USE_TMA in that release, on a GPU of that architecture."""

    def why_not_tuned(self, quantization: Quantization, version: Version) -> str | None:
        """Why a table for such weights would do that release's servers harm."""

    def has_own_kernels(self, version: Version, sm: int) -> bool:
        """Whether any of our own kernels can take the place of that release's, on a GPU of that architecture."""

    def takes_sorted(self, shape: MoEShape) -> bool:
        """Whether our kernels behind a sort can stand for its layer of that shape."""

    def takes_few_tokens(self, shape: MoEShape) -> bool:
        """Whether the two launches for few tokens can stand for its layer of that shape."""

    # What follows is called in the measuring process alone; `load` imports the engine, the others take what it gives.

    def load(self) -> Any: ...

    def warm_up(self, loaded: Any, shape: MoEShape) -> None: ...

    def seen_ids(self, shape: MoEShape, topk_ids: torch.Tensor) -> torch.Tensor:
        """From ids of this rank's experts, -1 for those elsewhere, to ids as the engine's layer is given them."""

    def sort(self, loaded: Any, shape: MoEShape, topk_ids: torch.Tensor, block_m: int) -> Sorted: ...

    def launch(
        self, loaded: Any, shape: MoEShape, projection: Projection, tensors: GemmTensors, config: TileConfig
    ) -> None:
        """Run one GEMM through the engine's launcher."""

    def run_layer(
        self, loaded: Any, shape: MoEShape, tensors: LayerTensors, up: TileConfig, down: TileConfig
    ) -> torch.Tensor:
        """[tokens, hidden], by the engine's own layer."""

    def run_kernel_plan(self, loaded: Any, shape: MoEShape, tensors: LayerTensors, path: Plan) -> torch.Tensor:
        """The same by our own kernels, with the engine's sort where they read it.

        Raises:
            EngineError: there is no such path.
        """
