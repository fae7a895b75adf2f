"""Tune every table of a model whose MoE layers differ: one layer after the other, and a summary at the end."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sglang_moe_ext.cli import engine_choice, layer_args
from sglang_moe_ext.core import DifferingLayersError, MoEExtError

Run = Callable[[argparse.Namespace], Mapping[str, Any]]


def run(arguments: argparse.Namespace, run_layer: Run) -> Mapping[str, Any]:
    """Run the command for the layer that the flags name, or for each kind where those of the model differ.

    Raises:
        MoEExtError: the flags make no layer, or a line of a log is about one of several.
    """
    try:
        return run_layer(arguments)
    except DifferingLayersError as differing:
        if arguments.from_log:
            raise  # the line is about one of them
        arguments.engine = engine_choice.choose(arguments.engine)
        return _run_each(arguments, differing, run_layer)


def _run_each(arguments: argparse.Namespace, differing: DifferingLayersError, run_layer: Run) -> Mapping[str, Any]:
    """Run the command for each kind of layer; sets `arguments.layer_kind` to it.

    One that fails is named in the summary, and costs itself alone.

    Raises:
        MoEExtError: the flags make no layer of the first kind, and so of none.
    """
    alike = _by_table(arguments, len(differing.models))
    print(f"{differing.models[0].name}: its MoE layers differ, and read {len(alike)} tables: one after the other")
    documents = []
    for number, kinds in enumerate(alike, 1):
        shape = layer_args.shape_of_kind(arguments, kinds[0])
        print(f"\nlayer {number} of {len(alike)}: {shape}")
        for other in kinds[1:]:
            print(
                f"note: {layer_args.shape_of_kind(arguments, other)} reads the same table, and is not tuned by itself"
            )
        arguments.layer_kind = kinds[0]
        try:
            document = run_layer(arguments)
        except MoEExtError as error:
            document = {"error": str(error)}
        documents.append({"shape": str(shape), **document})
    _summarize(documents)
    return {"layers": documents}


def _by_table(arguments: argparse.Namespace, kinds: int) -> list[list[int]]:
    """The kinds of layers that read one table, together: a file's name has the number of experts and the width."""
    alike: dict[tuple[int, int], list[int]] = {}
    for kind in range(kinds):
        shape = layer_args.shape_of_kind(arguments, kind)
        alike.setdefault((shape.experts, shape.intermediate_size), []).append(kind)
    return list(alike.values())


def _summarize(documents: Sequence[Mapping[str, Any]]) -> None:
    failed = [document for document in documents if "error" in document]
    print(f"\n{len(documents) - len(failed)} of {len(documents)} layers done")
    for document in documents:
        print(f"  {document['shape']}: {document.get('error', 'done')}")


def succeeded(document: Mapping[str, Any]) -> bool:
    """Whether no layer failed."""
    return not any("error" in layer for layer in document.get("layers", ()))
