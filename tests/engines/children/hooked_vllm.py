"""Child of test_vllm_hooks: the vLLM on PYTHONPATH, with our hooks in as a user's installation puts them, and without.

Nothing of ours is imported before vLLM's own loader of plugins has done it. stdin: {"device": name, "store": the user's
store, "late": a table to be put there, "override": an entry, "names": [[device, E, N, dtype, block], ...]}. Last line
of stdout: what `main` returns.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import pkgutil
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

from sglang_moe_ext import env

LAYER = "vllm.model_executor.layers.fused_moe.fused_moe"
NAMES = (
    "try_get_optimal_moe_config",
    "get_moe_configs",
    "invoke_fused_moe_triton_kernel",
    "invoke_fused_moe_wna16_triton_kernel",
)
# Experts, columns of w2, dtype and block of a call, as the engine's layers make it.
LAYERS: dict[str, tuple[int, int, str | None, list[int] | None]] = {
    "bf16": (12, 320, None, None),
    "fp8-block": (12, 256, "fp8_w8a8", [128, 128]),
    "int4": (12, 160, "int4_w4a16", [0, 128]),
    "of-sglang": (18, 320, None, None),
    "predicted-in-sglang": (19, 320, None, None),
    "named-by-the-user": (14, 320, None, None),
    "damaged": (15, 320, None, None),
    "damaged-by-the-user": (16, 320, None, None),
    "with-tma": (17, 320, None, None),
    "of-another-layer": (20, 320, None, None),
    "no-table": (13, 320, None, None),
}
HIDDEN, TOP_K = 512, 3
TILE = ("BLOCK_SIZE_M", "BLOCK_SIZE_N", "BLOCK_SIZE_K", "num_stages")
STOCK = ((128, 1536, 2048), (128, 2048, 768), 8, None)
"""Qwen3-30B-A3B, for which every release ships a table for an H200, and we one that was measured in SGLang."""


class Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.name.startswith("sglang_moe_ext."):
            self.said.append(record.getMessage())

    def taken(self) -> list[str]:
        said, self.said = self.said, []
        return said


LINES = Lines()


def ask(layer: ModuleType, name: str, tokens: int = 64) -> Any:
    experts, columns, dtype, block = LAYERS[name]
    rows = 2 * columns * (2 if dtype == "int4_w4a16" else 1)
    shapes = (experts, rows, HIDDEN), (experts, HIDDEN, columns)
    return layer.try_get_optimal_moe_config(*shapes, TOP_K, dtype, tokens, block_shape=block)


def named(layer: ModuleType, name: str) -> Any:
    """The whole table, asked for by what stands in its name."""
    experts, columns, dtype, block = LAYERS[name]
    return layer.get_moe_configs(experts, columns * (2 if dtype == "int4_w4a16" else 1), dtype, *(block or (0, 0)))


def file_name(layer: ModuleType, device: str, *case: Any) -> str:
    """The engine's, on the GPU of that name."""
    pretend(device)
    name: str = layer.get_config_file_name(*case)
    return name


def holders() -> dict[str, dict[str, bool]]:
    """By name of a function, the engine's modules that hold it, and whether they hold what the layer's module holds."""
    modules = [(at, module) for at, module in sorted(sys.modules.items()) if at.startswith("vllm.")]
    layer = sys.modules[LAYER]
    return {
        name: {at: vars(module)[name] is getattr(layer, name) for at, module in modules if name in vars(module)}
        for name in NAMES
    }


def broken(layer: ModuleType) -> list[Any]:
    """What a layer runs, and what is said, while something of ours raises; then what of shapes that are none."""
    from sglang_moe_ext.serving import table_selection

    chosen, table_selection.select = table_selection.select, MagicMock(side_effect=RuntimeError("broken"))
    first, table_selection.best_table = table_selection.best_table, MagicMock(side_effect=RuntimeError("broken"))
    LINES.taken()
    answers = [ask(layer, "bf16"), ask(layer, "fp8-block"), named(layer, "bf16")]
    table_selection.select, table_selection.best_table = chosen, first
    lines = LINES.taken()
    layer.get_moe_configs.cache_clear()
    lists = [layer.try_get_optimal_moe_config([12, 640, HIDDEN], [12, HIDDEN, 320], TOP_K, None, 64)]
    try:
        layer.try_get_optimal_moe_config((12,), (12,), TOP_K, None, 64)
    except ValueError as error:
        lists.append(str(error))
    return [answers, lines, lists]


def own_functions(layer: ModuleType) -> dict[str, Any]:
    return {name: getattr(layer, name) for name in NAMES}


class Process:
    """This one, which can be made as it was before our plugin came."""

    def __init__(self) -> None:
        self.plugins = importlib.import_module("vllm.plugins")
        server = logging.getLogger("vllm")  # what its handlers get is the log of a server
        server.setLevel(logging.INFO)
        server.addHandler(LINES)

    def load(self) -> None:
        """As each process of the engine does when it starts."""
        self.plugins.plugins_loaded = False
        self.plugins.load_general_plugins()

    def remember(self, layer: ModuleType) -> None:
        from sglang_moe_ext.engines.vllm import hook_points

        self.layer = layer
        self.points = hook_points.locate(layer)
        self.own = {name: getattr(layer, name).__wrapped__ for name in NAMES}
        self.kernel = getattr(sys.modules[hook_points.KERNEL_MODULE], hook_points.KERNEL_CLASS)
        self.building = self.kernel.__init__.__wrapped__

    def put_back(self) -> None:
        from sglang_moe_ext.engines import running_engine
        from sglang_moe_ext.serving import attach, guard

        for name, own in self.own.items():
            running_engine.replace("vllm", getattr(self.layer, name), own)
        self.kernel.__init__ = self.building
        attach._states.clear()
        guard.warn_once.cache_clear()
        LINES.taken()

    def state_of(self, way: Callable[[], None], **environment: str) -> list[Any]:
        """(active, why, nothing is replaced) of a process that comes to know us this way."""
        from sglang_moe_ext.serving import attach

        self.put_back()
        os.environ.update(environment)
        way()
        for name in environment:
            del os.environ[name]
        untouched = all(getattr(self.layer, name) is own for name, own in self.own.items())
        return [attach.state("vllm").is_active, attach.state("vllm").why, untouched]

    def moved(self, module: Any, name: str, stand_in: object) -> list[Any]:
        """(nothing is replaced, active, lines) where something else, or nothing, stands at a name of the engine."""
        from sglang_moe_ext.serving import attach, plugin

        self.put_back()
        before = vars(module)[name]
        delattr(module, name)
        if stand_in is not None:
            setattr(module, name, stand_in)
        for _ in range(2):
            plugin.register_vllm()
        others = {key: own for key, own in self.own.items() if key != name}
        untouched = all(getattr(self.layer, key) is own for key, own in others.items())
        setattr(module, name, before)
        return [untouched, attach.state("vllm").is_active, LINES.taken()]


def kinds(base: type) -> Iterator[type]:
    """The engine's classes below that one, and itself."""
    yield base
    for kind in base.__subclasses__():
        if kind.__module__.startswith("vllm."):
            yield from kinds(kind)


def bare(kind: type) -> Any:
    """An instance that nothing was done to, also of a class that is abstract."""
    concrete: Any = type(kind.__name__, (kind,), {})
    concrete.__abstractmethods__ = frozenset()
    return object.__new__(concrete)


def experts_that_read() -> dict[str, bool]:
    """Each class of experts that can be imported here, and whether it is said to read tables."""
    from sglang_moe_ext.engines.vllm import support

    base = sys.modules["vllm.model_executor.layers.fused_moe.modular_kernel"].FusedMoEExperts
    package = importlib.import_module("vllm.model_executor.layers.fused_moe.experts")
    rest = ["vllm.model_executor.layers.fused_moe.fused_batched_moe", LAYER]
    for name in [*(f"{package.__name__}.{it.name}" for it in pkgutil.iter_modules(package.__path__)), *rest]:
        try:
            importlib.import_module(name)
        except Exception:  # it needs what is not installed here
            continue
    return {kind.__name__: support.read_tables(bare(kind)) for kind in kinds(base)}


def built(engine: Process) -> list[str]:
    """What is said while layers are put together; their prepare and finalize is a stand-in that moves no tokens."""
    modular = sys.modules["vllm.model_executor.layers.fused_moe.modular_kernel"]
    experts = sys.modules.get("vllm.model_executor.layers.fused_moe.experts.triton_moe", engine.layer)
    fallback = next(kind for kind in kinds(modular.FusedMoEExperts) if kind.__name__ == "FallbackExperts")
    moves_nothing = {name: lambda *_: None for name in modular.FusedMoEPrepareAndFinalizeModular.__abstractmethods__}
    made = {"activation_format": modular.FusedMoEActivationFormat.Standard, "post_init_setup": lambda *_: None}
    prepare = type("Prepare", (modular.FusedMoEPrepareAndFinalizeModular,), moves_nothing | made)()
    LINES.taken()
    for kind in (experts.TritonExperts, experts.TritonExperts, modular.FusedMoEExpertsModular, fallback):
        runs = bare(kind)
        type(runs).activation_format = staticmethod(lambda: modular.FusedMoEActivationFormat.Standard)
        runs.moe_config, runs.quant_config = MagicMock(), MagicMock()
        runs.moe_config.moe_parallel_config.dp_size = 1
        if kind is fallback:
            runs.experts, runs.fallback_experts = bare(modular.FusedMoEExpertsModular), bare(experts.TritonExperts)
        engine.kernel(prepare, runs)
    return [line for line in LINES.taken() if "is active" in line]


def launches(engine: Process, device: str) -> dict[str, Any]:
    """What reaches the kernel of each launch. No GPU is here: a stand-in for the kernel refuses with Triton's error."""
    import torch
    from triton.runtime.errors import OutOfResources

    reached: list[list[int]] = []
    refused: list[int] = []

    class Kernel:
        def __getitem__(self, grid: object) -> Callable[..., None]:
            def launch(*_: Any, **given: Any) -> None:
                reached.append([given[name] for name in TILE])
                if refused:
                    raise OutOfResources(refused.pop(), 1, "shared memory")

            return launch

    engine.layer.fused_moe_kernel = Kernel()
    engine.layer.enable_swap_ab = lambda *_: False
    dtypes = {"bf16": torch.bfloat16, "int8": torch.int8, "fp8-block": torch.float8_e4m3fn}

    def run(kind: str, stages: int, block_k: int) -> list[list[int]]:
        reached.clear()
        dtype = dtypes[kind]
        scales = None if kind == "bf16" else torch.ones(4, 2 if kind == "fp8-block" else 1, 2)
        config = {"BLOCK_SIZE_M": 128, "BLOCK_SIZE_N": 128, "BLOCK_SIZE_K": block_k, "GROUP_SIZE_M": 1}
        engine.layer.invoke_fused_moe_triton_kernel(
            torch.zeros(8, 256, dtype=dtype),
            torch.zeros(4, 256, 256, dtype=dtype),
            torch.zeros(8, 2, 256, dtype=torch.bfloat16),
            None if kind == "bf16" else torch.ones(8, 2),
            scales,
            None,
            torch.zeros(512, dtype=torch.int32),
            torch.zeros(4, dtype=torch.int32),
            torch.zeros(1, dtype=torch.int32),
            False,
            2,
            config | {"num_warps": 8, "num_stages": stages},
            compute_type="bf16",
            use_fp8_w8a8=kind == "fp8-block",
            use_int8_w8a8=kind == "int8",
            use_int8_w8a16=False,
            use_int4_w4a16=False,
            per_channel_quant=False,
            block_shape=[128, 128] if kind == "fp8-block" else None,
        )
        return list(reached)

    pretend(device)
    said = {"bf16": run("bf16", 3, 128), "int8": run("int8", 3, 128), "fp8-block": run("fp8-block", 4, 256)}
    refused += [1]
    said["refused"] = run("bf16", 3, 64)
    said["again"] = run("bf16", 3, 64)
    said["lines"] = LINES.taken()
    with engine.package.override_config({"num_stages": 3}):
        said["override"] = run("bf16", 5, 64)
    return said


def few_tokens(engine: Process, device: str) -> dict[str, Any]:
    """What `apply` of the Triton experts runs, "ours" or the engine's, for a layer whose table has a plan for 1 to 8.

    The launches and the engine's own method are stand-ins: no GPU is here, and the launches have tests of their own.
    """
    import torch

    from sglang_moe_ext.core import MoEShape
    from sglang_moe_ext.engines.sglang.table_names import version_folder
    from sglang_moe_ext.engines.vllm import experts, table_names
    from sglang_moe_ext.few_tokens_config import DownTile, FewTokensConfig, UpTile
    from sglang_moe_ext.kernels import few_tokens as kernels
    from sglang_moe_ext.serving import guard, kernel_selection, vllm_experts_hook
    from sglang_moe_ext.serving.table_search import TableDir
    from sglang_moe_ext.tables import plan_table
    from sglang_moe_ext.tables.provenance import TuningRun

    pretend(device)
    module = sys.modules.get(experts.MODULE, engine.layer)
    kind = vars(module)[experts.CLASS]
    said: dict[str, Any] = {"is_hooked": hasattr(vars(kind)[experts.METHOD], "__wrapped__")}
    experts.check(vars(kind)[experts.METHOD].__wrapped__)
    shape = MoEShape(12, 128, 128, 2)
    plan = FewTokensConfig(UpTile(1, 16, 128, 4, 3), DownTile(1, 16, 128, 4, 4))
    run = TuningRun("", "", "", str(shape), "", "", None, None, None, None, 0, "")
    ran: list[Any] = []
    fails: list[bool] = []
    folder = Path(tempfile.mkdtemp()) / version_folder(str(engine.points.triton))
    file = plan_table.path_beside(folder / table_names.file_name(table_names.table_key(shape, device)))
    plan_table.put(file, {m: plan_table.KernelEntry(plan, run, {"us": 40.0}) for m in (1, 8)})

    def stand_in(hidden: Any, w1: Any, w2: Any, routed: Any, out: Any, config: Any, **_: Any) -> None:
        if fails:
            raise RuntimeError("no such launch")
        ran.append(["ours", hidden.shape[0], config == plan])
        out.fill_(2.0)

    def original(self: Any, *args: Any, **kwargs: Any) -> None:
        ran.append("engine's")

    def hooked() -> Any:
        points = engine.points
        dirs = [TableDir("your", folder.parent, dialect=table_names.NAMING)]
        plans = kernel_selection.KernelPlans(points, lambda: dirs, lambda _: None)
        return vllm_experts_hook.apply_hook(points, original, plans)

    kernels_layer, kernels.few_tokens_layer = kernels.few_tokens_layer, stand_in

    def arguments(tokens: int) -> dict[str, Any]:
        hidden = torch.zeros(tokens, 128, dtype=torch.bfloat16)
        given = dict.fromkeys(experts.PARAMETERS[1:])
        return given | {
            "output": torch.empty_like(hidden), "hidden_states": hidden, "activation": SimpleNamespace(value="silu"),
            "w1": hidden.new_zeros(12, 256, 128), "w2": hidden.new_zeros(12, 128, 128),
            "topk_weights": torch.ones(tokens, 2), "topk_ids": torch.zeros(tokens, 2, dtype=torch.int32),
            "apply_router_weight_on_input": False, "global_num_experts": 12,
        }  # fmt: skip

    def experts_of(**quant: Any) -> Any:
        runs = bare(kind)
        type(runs).__module__ = kind.__module__
        names = ("quant_dtype", "w1_scale", "w1_bias", "w2_bias", "gemm1_clamp_limit", "gemm1_alpha", "gemm1_beta")
        runs.quant_config = SimpleNamespace(**(dict.fromkeys(names) | quant))
        runs.activation_config = SimpleNamespace(clamp_limit=None)
        type(runs)._uses_post_gemm2_hook = lambda self, tokens: False
        return runs

    def asked(tokens: int = 4, runs: Any = None, apply: Any = None, **changed: Any) -> list[Any]:
        ran.clear()
        (apply or hooked())(runs or experts_of(), **(arguments(tokens) | changed))
        return list(ran)

    apply = hooked()
    said["few"], said["again"], said["one"] = asked(4, apply=apply), asked(4, apply=apply), asked(1, apply=apply)
    said["more"] = asked(9, apply=apply)
    LINES.taken()
    guard.warn_once.cache_clear()
    changes: dict[str, dict[str, Any]] = {
        "activation": {"activation": SimpleNamespace(value="gelu")},
        "experts elsewhere": {"expert_map": torch.zeros(12, dtype=torch.int32)},
        "tokens of others": {"expert_tokens_meta": object()},
        "weighs the input": {"apply_router_weight_on_input": True},
        "quantized activations": {"a1q_scale": torch.ones(1)},
        "another output": {"output": torch.empty(4, 128)},
        "ids apart": {"topk_ids": torch.zeros(4, 4, dtype=torch.int32)[:, ::2]},
    }
    said["refused"] = {name: asked(**change) for name, change in changes.items()}
    for name in ("quant_dtype", "w1_scale", "w1_bias", "w2_bias", "gemm1_clamp_limit", "gemm1_alpha"):
        said["refused"][name] = asked(runs=experts_of(**{name: "unusual"}))
    with_lora, other = experts_of(), experts_of()
    with_lora._lora_context = object()
    type(other).__name__ = "TritonWNA16Experts"
    said["refused"] |= {"lora": asked(runs=with_lora), "a subclass": asked(runs=other)}
    with engine.package.override_config({"num_stages": 3}):
        said["refused"]["override"] = asked()
    LINES.taken()
    guard.warn_once.cache_clear()
    apply = hooked()
    fails.append(True)
    said["failing"] = asked(apply=apply)
    fails.clear()
    said["after a failure"] = asked(apply=apply)
    said["lines"] = LINES.taken()
    kernels.few_tokens_layer = kernels_layer
    said |= sorted_plans(engine, device, asked)
    return said


def sorted_plans(engine: Process, device: str, asked: Callable[..., list[Any]]) -> dict[str, Any]:
    """The same of a table with plans behind our sort, from a CUDA graph and outside: whether the layer itself ran, by
    a stand-in for its kernels, and what of a plan that needs the engine's up GEMM."""
    from sglang_moe_ext.core import MoEShape, TileConfig
    from sglang_moe_ext.engines import running_engine, sorted_layer
    from sglang_moe_ext.engines.sglang.table_names import version_folder
    from sglang_moe_ext.engines.vllm import table_names
    from sglang_moe_ext.kernel_plans import DownConfig, KernelPlan, UpConfig
    from sglang_moe_ext.serving import kernel_selection, vllm_experts_hook
    from sglang_moe_ext.serving.table_search import TableDir
    from sglang_moe_ext.tables import plan_table
    from sglang_moe_ext.tables.provenance import TuningRun

    shape = MoEShape(12, 128, 128, 2)
    run = TuningRun("", "", "", str(shape), "", "", None, None, None, None, 0, "")
    down = DownConfig(128, 128, 64, 8, 8, 4)
    ours = KernelPlan(UpConfig(128, 128, 64, 8, 8, 4), down)
    mixed = KernelPlan(TileConfig(128, 128, 64, 1, 8, 4), down)
    ran: list[str] = []
    in_graph: list[bool] = []

    def table(plan: Any, us: float) -> list[TableDir]:
        folder = Path(tempfile.mkdtemp()) / version_folder(str(engine.points.triton))
        file = plan_table.path_beside(folder / table_names.file_name(table_names.table_key(shape, device)))
        plan_table.put(file, {m: plan_table.KernelEntry(plan, run, {"us": us}) for m in (1, 4096)})
        return [TableDir("your", folder.parent, dialect=table_names.NAMING)]

    def original(self: Any, *args: Any, **kwargs: Any) -> None:
        ran.append("engine's")

    def by(plan: Any, us: float) -> Any:
        dirs = table(plan, us)
        plans = kernel_selection.KernelPlans(engine.points, lambda: dirs, lambda _: None)
        return vllm_experts_hook.apply_hook(engine.points, original, plans)

    def stand_in(layer: Any, out: Any, routed_scaling_factor: float = 1.0) -> None:
        ran.append(f"{layer.shape} {layer.plan == ours} {layer.tensors.hidden.shape[0]}")

    def called(apply: Any, tokens: int = 4) -> list[str]:
        ran.clear()
        asked(tokens, apply=apply)
        return list(ran)

    real = sorted_layer.run, sorted_layer.sort, running_engine.is_capturing
    sorted_layer.run = stand_in
    sorted_layer.sort = lambda host, shape, tensors, plan: SimpleNamespace(shape=shape, tensors=tensors, plan=plan)
    running_engine.is_capturing = lambda: lambda: bool(in_graph)
    try:
        long, short, with_engines = by(ours, 700.0), by(ours, 90.0), by(mixed, 700.0)
        said = {"long": called(long), "long again": called(long), "short": called(short), "mixed": called(with_engines)}
        in_graph.append(True)
        said["short in a graph"] = called(short)
    finally:
        sorted_layer.run, sorted_layer.sort, running_engine.is_capturing = real
        LINES.taken()
    return {"sorted": said}


def variables() -> dict[str, str]:
    """Those of the engines; what they import sets others."""
    return {name: value for name, value in os.environ.items() if name.startswith(("VLLM_", "SGLANG_"))}


def pretend(device: str) -> None:
    from sglang_moe_ext.engines.vllm import bootstrap

    bootstrap.pretend(device, is_amd=False)


def main(request: dict[str, Any]) -> dict[str, Any]:
    engine = Process()
    environment = variables()
    engine.load()
    early = [name for name in sys.modules if name == LAYER or name.startswith("sglang_moe_ext.")]
    layer = importlib.import_module(LAYER)
    importlib.import_module("vllm.lora.layers.utils")
    engine.package = sys.modules[LAYER.rpartition(".")[0]]
    from sglang_moe_ext.serving import attach, plugin

    state = attach.state("vllm")
    said: dict[str, Any] = {"early": early, "state": [state.is_active, state.why], "lines_before": LINES.taken()}
    said["names"] = [file_name(layer, *case) for case in request["names"]]
    pretend(request["device"])
    said["ours_lies_in"] = plugin.__file__
    said["answers"] = {name: ask(layer, name) for name in LAYERS}
    said["lines"] = LINES.taken()
    said["few_tokens"], said["far_tokens"] = ask(layer, "bf16", 1), ask(layer, "bf16", 9)
    said["defaults"] = {m: layer.get_default_config(m, 12, 320, HIDDEN, TOP_K, None) for m in (1, 9, 64)}
    said["few_tokens_of_the_users"] = ask(layer, "named-by-the-user", 1)
    said["stock"] = [layer.try_get_optimal_moe_config(*STOCK, tokens) for tokens in (1, 64, 5000)]
    said["named"] = {name: named(layer, name) for name in LAYERS}
    first = ask(layer, "bf16")
    first.clear()
    said["is_fresh"] = ask(layer, "bf16") == said["answers"]["bf16"]
    with engine.package.override_config(request["override"]):
        said["overridden"] = ask(layer, "bf16")
    said["after_override"] = ask(layer, "bf16")
    said["cache_info"] = list(layer.get_moe_configs.cache_info()._fields)
    said["moves_no_variable"] = environment == variables()
    shutil.copytree(request["late"], request["store"], dirs_exist_ok=True)
    said["late"] = [ask(layer, "no-table")]
    layer.get_moe_configs.cache_clear()
    said["late"] += [ask(layer, "no-table"), layer.get_moe_configs.cache_info().currsize]
    os.environ["VLLM_BATCH_INVARIANT"] = "1"
    layer.get_moe_configs.cache_clear()
    default = layer.get_default_config(64, 12, 320, HIDDEN, TOP_K, None)
    said["invariant"] = [ask(layer, "bf16"), named(layer, "bf16"), default]
    del os.environ["VLLM_BATCH_INVARIANT"]
    layer.get_moe_configs.cache_clear()
    said["broken"] = broken(layer)
    held = own_functions(layer)
    for _ in range(2):
        engine.load()
        plugin.register_vllm()
    said["twice"] = own_functions(layer) == held
    said["reads"] = experts_that_read()
    said["holders"] = holders()
    engine.remember(layer)
    said["built"] = built(engine)
    said["few"] = few_tokens(engine, request["device"])
    said["launches"] = launches(engine, "NVIDIA GeForce RTX 4090")
    said["ways"] = {
        "late": engine.state_of(engine.load),
        "switched off": engine.state_of(engine.load, **{env.DISABLE: "1"}),
        "other plugins": engine.state_of(engine.load, **{env.VLLM_PLUGINS: "another"}),
        "named": engine.state_of(engine.load, **{env.VLLM_PLUGINS: "another,sglang_moe_ext"}),
        "the startup file": engine.state_of(
            lambda: plugin.attach_engine(layer, "the startup file"), **{env.VLLM_PLUGINS: "another"}
        ),
    }
    said["moved"] = {
        "the lookup is gone": engine.moved(layer, NAMES[0], None),
        "the lookup takes other arguments": engine.moved(layer, NAMES[0], lambda shape: shape),
        "the table takes other arguments": engine.moved(layer, NAMES[1], lambda E: E),
        "the table has no cache": engine.moved(layer, NAMES[1], engine.own[NAMES[1]].__wrapped__),
        "the launcher takes other arguments": engine.moved(layer, NAMES[2], lambda a, b: a),
        "the launcher for groups is gone": engine.moved(layer, NAMES[3], None),
        "nothing says what is built": engine.moved(sys.modules[engine.kernel.__module__], engine.kernel.__name__, None),
    }
    return said


if __name__ == "__main__":
    print(json.dumps(main(json.load(sys.stdin))))
