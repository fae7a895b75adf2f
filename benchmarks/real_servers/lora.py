"""Does a server with a LoRA adapter on a MoE model answer with the plugin as stock does, by the engine's own kernels?

usage, from the repository root: python -m benchmarks.real_servers.lora [--rank 8] [--requests 12] [--seconds 180]
       [--gpus 2] [--out FOLDER] [--json FILE]

Writes an adapter of random weights for attention and every expert of a dummy Qwen3-30B-A3B of few layers, and serves
with it, stock and with the plugin, whose store has tables and kernel plans that nothing ships (`forced_tables`).
Every prompt is asked twice, with the adapter and without.
Checked: all requests are answered; the adapter changes answers; answers with the plugin agree with those of stock;
the log says once why the engine's own kernels run, and that the plugin is active.
Takes 2 minutes on one GPU with 80 GB; SGLang 0.5.15. The status is 0 where all of that holds.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.real_servers import answers, forced_tables, ranks, servers
from benchmarks.real_servers.answers import Agreement
from benchmarks.real_servers.servers import NO_GRAPHS, Setup
from sglang_moe_ext.core import EngineError, MoEExtError, MoEShape

ADAPTER = "random"
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SCALE = 2.0
"""Of an adapter's weights against those of a layer: so large that it changes answers."""
WHY = "LoRA adapters look between its kernels"
SHAPES, CPU_SHAPES = (MoEShape(128, 768, 2048, 8),), (MoEShape(8, 64, 64, 2), MoEShape(8, 32, 64, 2))


@dataclass(frozen=True, slots=True)
class Served:
    """Of one server: answers without the adapter, then with it, and our lines in its log."""

    plain: list[list[int]]
    adapted: list[list[int]]
    lines: list[str]


@dataclass(frozen=True, slots=True)
class Row:
    """What is told of the answers without, or with, the adapter."""

    requests: str
    answered: int
    agreement: Agreement


def modules(config: Mapping[str, Any]) -> Iterator[tuple[str, int, int]]:
    """Name, inputs and outputs of each linear layer that the adapter has weights for."""
    hidden, head = config["hidden_size"], config["head_dim"]
    inner, experts = config["moe_intermediate_size"], _experts(config)
    queries, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    for layer in range(config["num_hidden_layers"]):
        prefix = f"base_model.model.model.layers.{layer}"
        attention = {"q_proj": (hidden, queries), "k_proj": (hidden, keys), "v_proj": (hidden, keys)}
        for name, (inputs, outputs) in {**attention, "o_proj": (queries, hidden)}.items():
            yield f"{prefix}.self_attn.{name}", inputs, outputs
        for expert in range(experts):
            at = f"{prefix}.mlp.experts.{expert}"
            for name, inputs, outputs in (("gate", hidden, inner), ("up", hidden, inner), ("down", inner, hidden)):
                yield f"{at}.{name}_proj", inputs, outputs


def _experts(config: Mapping[str, Any]) -> int:
    """transformers 5 writes the second name."""
    return int(config["num_experts"] if "num_experts" in config else config["num_local_experts"])


def write_adapter(folder: Path, model: Path, rank: int) -> None:
    """The same weights each time, in PEFT's format."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, inputs, outputs in modules(config):
        for part, shape, size in (("A", (rank, inputs), inputs), ("B", (outputs, rank), rank)):
            drawn = torch.randn(shape, generator=generator) * (SCALE / size) ** 0.5
            weights[f"{name}.lora_{part}.weight"] = drawn.to(torch.bfloat16)
    save_file(weights, folder / "adapter_model.safetensors")
    document = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(model),
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": list(TARGETS),
    }
    (folder / "adapter_config.json").write_text(json.dumps(document, indent=1), encoding="utf-8")


def write_weights(model: Path) -> None:
    """Random weights of the size that training starts with, one file a layer: SGLang loads no adapter onto dummies."""
    import torch
    from safetensors.torch import save_file

    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    hidden, head = config["hidden_size"], config["head_dim"]
    generator = torch.Generator().manual_seed(1)

    def drawn(*shape: int) -> torch.Tensor:
        values: torch.Tensor = torch.randn(shape, generator=generator) * config["initializer_range"]
        return values.bfloat16()

    def ones(size: int) -> torch.Tensor:
        return torch.ones(size, dtype=torch.bfloat16)

    tables = {f"{name}.weight": drawn(config["vocab_size"], hidden) for name in ("model.embed_tokens", "lm_head")}
    files = {"model-tables.safetensors": {**tables, "model.norm.weight": ones(hidden)}}
    prefix = "base_model.model."
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        of_layer = (it for it in modules(config) if it[0].startswith(f"{prefix}{at}"))
        weights = {f"{name.removeprefix(prefix)}.weight": drawn(outputs, inputs) for name, inputs, outputs in of_layer}
        weights[f"{at}mlp.gate.weight"] = drawn(_experts(config), hidden)
        weights |= {f"{at}{name}_layernorm.weight": ones(hidden) for name in ("input", "post_attention")}
        weights |= {f"{at}self_attn.{name}_norm.weight": ones(head) for name in ("q", "k")}
        files[f"model-layer{layer}.safetensors"] = weights
    for file, weights in files.items():
        save_file(weights, model / file)
    index = {"metadata": {}, "weight_map": {name: file for file, weights in files.items() for name in weights}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def serve(setup: Setup, name: str, asked: argparse.Namespace, more: Mapping[str, str]) -> Served:
    """Start a server with the adapter, ask every prompt twice, end it.

    Raises:
        EngineError: it does not start, or not answer.
    """
    flags = ("--lora-paths", f"{ADAPTER}={setup.out / 'adapter'}", "--max-loras-per-batch", "2", *asked.server_flags)
    flags = flags if setup.is_cpu else (*flags, *NO_GRAPHS, "--load-format", "auto")
    with setup.running(name, stock=name == "stock", flags=flags, more=more) as server:
        lengths = answers.lengths_of(asked.requests, 0 if setup.is_cpu else 2)
        wanted = answers.prompts(setup.vocabulary, lengths)
        plain, adapted = (
            answers.greedy(server.client.url, wanted, asked.new_tokens, seconds=setup.clock.left_s(), more=it)
            for it in ({}, {"lora_path": ADAPTER})
        )
        log = setup.log(name).read_text(encoding="utf-8", errors="replace")
        return Served(plain, adapted, [line for lines in ranks.lines_of_ranks(log).values() for line in lines])


def wrong_with(stock: Served, plugin: Served, rows: Sequence[Row], *, is_cpu: bool) -> list[str]:
    """What does not hold."""
    reasons = [line for line in plugin.lines if WHY in line]
    found = {
        "the stock server has the plugin": bool(stock.lines),
        "the plugin is not active": not any("is active in" in line for line in plugin.lines),
        "the adapter changes no answer": stock.plain == stock.adapted,
        f"{len(reasons)} lines say that LoRA keeps our kernels out, expected 1": len(reasons) != 1 and not is_cpu,
    }
    unequal = [f"{row.requests}: {row.agreement}" for row in rows if not answers.is_equal_enough(row.agreement, None)]
    return [text for text, is_so in found.items() if is_so] + unequal


def table(rows: Sequence[Row]) -> str:
    """The rows as markdown."""
    lines = ["| requests | answered by both | equal tokens with stock |", "|---|---:|---|"]
    return "\n".join([*lines, *(f"| {row.requests} | {row.answered} | {row.agreement} |" for row in rows)])


def parser() -> argparse.ArgumentParser:
    """The command line."""
    arguments = servers.arguments(__doc__, seconds=180)
    arguments.add_argument("--rank", type=int, default=8, help="of the adapter (default 8)")
    arguments.add_argument("--requests", type=int, default=12)
    arguments.add_argument("--new-tokens", type=int, default=8)
    arguments.add_argument("--gpus", type=int, default=1, help="GPUs to spread the two servers over (default 1)")
    arguments.add_argument("server_flags", nargs="*", metavar="-- FLAGS", help="more flags of the servers")
    return arguments


def main(words: Sequence[str] | None = None) -> int:
    words = sys.argv[1:] if words is None else list(words)
    asked = parser().parse_args(words)
    with tempfile.TemporaryDirectory() as scratch:
        setup = servers.prepare(asked, Path(scratch), "qwen3_30b_a3b")
        place = forced_tables.here(is_cpu=setup.is_cpu)
        write_adapter(setup.out / "adapter", setup.model, asked.rank)
        if not setup.is_cpu:  # the model for a CPU has weights
            write_weights(setup.model)
        forced_tables.write_store(setup.out / "store", CPU_SHAPES if setup.is_cpu else SHAPES, place)
        more = {"stock": {}, "plugin": servers.with_store(setup.out / "store")}
        gpus = {} if setup.is_cpu else {name: servers.gpus_of(at, 1, asked.gpus) for at, name in enumerate(more)}
        found = servers.at_once(
            {name: servers.job(serve, setup, name, asked, {**it, **gpus.get(name, {})}) for name, it in more.items()},
            at_a_time=2,
        )
    stock, plugin = found["stock"], found["plugin"]
    if isinstance(stock, EngineError) or isinstance(plugin, EngineError):
        wrong, rows = [f"{name}: {it}" for name, it in found.items() if isinstance(it, EngineError)], []
    else:
        pairs = {"without the adapter": (stock.plain, plugin.plain), "with it": (stock.adapted, plugin.adapted)}
        rows = [Row(name, len(two), answers.compare(one, two)) for name, (one, two) in pairs.items()]
        wrong = wrong_with(stock, plugin, rows, is_cpu=setup.is_cpu)
        print("\n".join(plugin.lines))
    print("\n".join(f"WRONG: {line}" for line in wrong) or "every statement holds")
    print(f"\n{table(rows)}")
    document = servers.circumstances(words, "benchmarks.real_servers.lora", place)
    servers.save(asked.json, document | {"rows": [asdict(row) for row in rows], "wrong": wrong})
    return 1 if wrong else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except MoEExtError as error:
        sys.exit(f"error: {error}")
