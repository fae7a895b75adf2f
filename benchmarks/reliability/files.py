"""Checks of what commands read: model folders, captured topk_ids, journals, tables."""

from __future__ import annotations

import gzip
import io
import json
import random
import shutil
from pathlib import Path
from typing import Any

from benchmarks.reliability.judged import Result
from benchmarks.reliability.mutations import damage, mutate_json, text_of
from sglang_moe_ext.core import MoEShape
from sglang_moe_ext.tables import config_table

ROOT = Path(__file__).resolve().parents[2]
CASES = ROOT / "tests" / "data" / "cases"
SHIPPED = ROOT / "tuned_configs" / "configs"
RUNS_CODE = "import pathlib; pathlib.Path({marker!r}).touch()\n"


def sound_tables() -> list[dict[str, Any]]:
    """Of those that this package ships, some of each kind."""
    tables = [file for file in sorted(SHIPPED.glob("*/*.json")) if config_table.is_table(file.name)]
    return [json.loads(file.read_text(encoding="utf-8")) for file in tables[:: max(1, len(tables) // 24)]]


def model_folders(count: int, seed: int, folder: Path) -> Result:
    """Folders with a damaged config.json, and Python beside it that must not run."""
    from sglang_moe_ext.models import resolve

    chance, result, marker = random.Random(seed), Result(), folder / "code-ran"
    sound = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(CASES.glob("*/config.json"))]
    for turn in range(count):
        model = folder / "model"
        model.mkdir()
        config = mutate_json(chance.choice(sound), chance)
        if isinstance(config, dict) and chance.random() < 0.2:
            config["auto_map"] = {"AutoConfig": "code.Config"}
        (model / "config.json").write_bytes(text_of(config, chance))
        (model / "code.py").write_text(RUNS_CODE.format(marker=str(marker)))
        result.judge(f"folder {turn}", lambda: resolve(str(model)))  # noqa: B023 - called at once
        shutil.rmtree(model)
    if marker.exists():
        result.faults.append("code of a model's folder ran")
    return result


def captured_files(count: int, seed: int, folder: Path) -> Result:
    """Damaged files of torch.save and of safetensors, and pickles that would run code."""
    import torch
    from safetensors.torch import save

    from sglang_moe_ext.tuning.bench import captured_routing

    chance, result, marker = random.Random(seed), Result(), folder / "code-ran"
    shape, ids = MoEShape(64, 768, 2048, 8), torch.randint(0, 64, (200, 8), dtype=torch.int32)
    stored = io.BytesIO()
    torch.save(ids, stored)
    evil = b"cos\nsystem\n(S'touch " + str(marker).encode() + b"'\ntR."
    sound = (("topk_ids_layer0_idx0.pt", stored.getvalue()), ("forward_0.safetensors", save({"ids": ids})))
    for turn in range(count):
        captured = folder / "captured"
        captured.mkdir()
        name, content = chance.choice(sound)
        for _ in range(chance.randint(1, 3)):
            content = damage(content, chance)
        if chance.random() < 0.05:
            name, content = sound[0][0], evil
        (captured / name).write_bytes(content)
        result.judge(f"file {turn}", lambda: captured_routing.source(captured, shape))  # noqa: B023 - called at once
        shutil.rmtree(captured)
    if marker.exists():
        result.faults.append("code of a captured file ran")
    return result


def journals(count: int, seed: int, folder: Path) -> Result:
    """`export` of runs whose journals are damaged, a line or a byte at a time."""
    chance, result = random.Random(seed), Result()
    recorded = sorted((ROOT / "tests" / "data" / "journals").glob("*.jsonl.gz"))
    lines = gzip.decompress(recorded[0].read_bytes()).splitlines(keepends=True)[:60]
    for turn in range(count):
        run = folder / "run"
        run.mkdir()
        changed = list(lines)
        for _ in range(chance.randint(1, 3)):
            place = chance.choice((0, chance.randrange(len(changed))))
            try:
                changed[place] = json.dumps(mutate_json(json.loads(changed[place]), chance)).encode() + b"\n"
            except ValueError:
                changed[place] = damage(changed[place], chance)
        (run / "journal.jsonl").write_bytes(b"".join(changed))
        result.command(f"journal {turn}", ["export", str(run), "--engine", "vllm", "--output-dir", str(folder / "out")])
        shutil.rmtree(run)
        shutil.rmtree(folder / "out", ignore_errors=True)
    return result


def table_commands(count: int, seed: int, folder: Path) -> Result:
    """`check` and `import` of damaged tables."""
    chance, result, tables = random.Random(seed), Result(), sound_tables()
    name = "E=128,N=768,device_name=NVIDIA_H200.json"
    for turn in range(count):
        path = folder / chance.choice((name, name, name.replace(".json", "_down.json"), "\x1b[31m.json", "E=x.json"))
        path.write_bytes(text_of(mutate_json(chance.choice(tables), chance), chance))
        flags = ["--engine", "sglang", "--no-compile", "--model", "Qwen3-30B-A3B"]
        more = ["import", "--triton", "3.7.1"] if chance.random() < 0.3 else ["check", "--gpu", "H200"]
        arguments = [*more, str(path), *flags]
        result.command(f"{arguments[0]} {turn}", arguments)
        path.unlink()
    return result
