"""The rules: what each operator says about the axes of its inputs and outputs, and how its baked-in sizes follow.

A rule is a pure function of one OpNode that answers relations; what it does not mention is frozen. A resize answers
the new inputs or attributes of a node whose sizes are written down in it (Reshape, Split, Conv's `group`).
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import numpy as np

from onnxprune.types import Array, Axis, Mask, OpNode, Relation, Shape

RuleFunction = Callable[[OpNode], Iterable[Relation]]


@dataclass(frozen=True)
class Edit:
    """New constants for inputs (by index) and new attribute values (None removes one)."""

    inputs: Mapping[int, Array] = field(default_factory=dict)
    attrs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Resizing:
    """What a resize may look at: the dense node, and the sizes and keep masks after removal.

    `counted` is the axis whose positions the elements of a value count, if any.
    """

    node: OpNode
    dense: OpNode
    wanted: Mapping[str, Shape]
    keep: Callable[[Axis], Mask]
    counted: Callable[[str], Axis | None]


ANY = -1  # a size that nothing fixes
ResizeFunction = Callable[[Resizing], Edit | None]
ShapeFunction = Callable[[OpNode], Sequence[Shape]]
WantsFunction = Callable[[OpNode], Mapping[int, Sequence[int]]]

ODD = (ArithmeticError, IndexError, TypeError, ValueError)  # of rules, for inputs that no such operator has
FAMILIES = ("elementwise", "linear", "movement", "index", "mixing", "recurrent", "fused", "quant", "control")
RULES: dict[tuple[str, str], RuleFunction] = {}
RESIZES: dict[tuple[str, str], ResizeFunction] = {}
ROLES: dict[tuple[str, str], Mapping[int, str]] = {}
INTEGERS: dict[tuple[str, str], Mapping[int, tuple[int, int] | None]] = {}
SLOTS: dict[tuple[str, str], frozenset[int]] = {}
REASONS: dict[tuple[str, str], str] = {}
SHAPES: dict[tuple[str, str], tuple[ShapeFunction, int]] = {}
WANTS: dict[tuple[str, str], WantsFunction] = {}
CARRIES: dict[tuple[str, str], Container[int]] = {}
STAND_INS: dict[tuple[str, str], tuple[str, tuple[int, ...]]] = {}


def _key(name: str) -> tuple[str, str]:
    domain, _, op_type = name.rpartition("::")
    return domain, op_type


def rule(
    *names: str,
    roles: Mapping[int, str] | None = None,
    integers: Mapping[int, tuple[int, int] | None] | None = None,
    carries: Container[int] = (),
) -> Callable[[RuleFunction], RuleFunction]:
    """Register a rule; `roles` says what an initializer at input k is (default: weight).

    `integers` are the inputs that hold quantised weights: {input: (its zero point's input, the axis of the weight
    that this lies along), or None where zero is zero}. Integers elsewhere are numbers and indices.
    `carries` are the inputs whose elements the outputs hold again, in some order.
    """

    def register(function: RuleFunction) -> RuleFunction:
        for name in names:
            RULES[_key(name)] = function
            ROLES[_key(name)] = roles or {}
            INTEGERS[_key(name)] = integers or {}
            CARRIES[_key(name)] = carries
        return function

    return register


def resize(*names: str, slots: Iterable[int] = ()) -> Callable[[ResizeFunction], ResizeFunction]:
    """Register a resize; `slots` are the inputs that hold sizes, the only places where computed sizes may change."""

    def register(function: ResizeFunction) -> ResizeFunction:
        for name in names:
            RESIZES[_key(name)] = function
            SLOTS[_key(name)] = frozenset(slots)
        return function

    return register


def shape(*names: str, like: int = 0) -> Callable[[ShapeFunction], ShapeFunction]:
    """Register output shapes of an operator that has no ONNX schema; outputs have the type of input `like`."""

    def register(function: ShapeFunction) -> ShapeFunction:
        SHAPES.update((_key(name), (function, like)) for name in names)
        return function

    return register


def wants(*names: str) -> Callable[[WantsFunction], WantsFunction]:
    """Register what shapes an operator needs its inputs to have: {input: sizes, ANY where the others fix none}."""

    def register(function: WantsFunction) -> WantsFunction:
        WANTS.update((_key(name), function) for name in names)
        return function

    return register


def stand_in(name: str, op_type: str, inputs: tuple[int, ...]) -> None:
    """Say that an operator without an ONNX schema gives what an ONNX operator gives for these of its inputs."""
    STAND_INS[_key(name)] = op_type, inputs


def frozen(name: str, reason: str) -> None:
    """State why an operator has no rule on purpose."""
    REASONS[_key(name)] = reason


def _load() -> None:
    if not RULES:
        for family in FAMILIES:
            import_module(f"onnxprune.ops.{family}")


def _normal(domain: str) -> str:
    return "" if domain == "ai.onnx" else domain


def relations(node: OpNode) -> list[Relation] | str:
    """What the node's rule answers, or the reason why nothing is known about it."""
    _load()
    key = (_normal(node.domain), node.op_type)
    function = RULES.get(key)
    if function is None:
        return REASONS.get(key, f"no rule for {node.domain + '::' if node.domain else ''}{node.op_type}")
    try:
        with np.errstate(all="raise"):
            return list(function(node))
    except KeyError as missing:
        return f"{node.op_type}: the shape or value of '{str(missing.args[0]).split(chr(0))[0]}' is not known"
    except ODD:
        return f"{node.op_type}: what it reads does not fit the operator"


def shapes_of(node: OpNode) -> tuple[Sequence[Shape], int]:
    """Output shapes of an operator without an ONNX schema, as far as they are known, and which input has their type."""
    _load()
    function, like = SHAPES.get((_normal(node.domain), node.op_type), (None, 0))
    try:
        shapes = [tuple(map(operator.index, shape)) for shape in function(node)] if function is not None else []
    except (KeyError, *ODD):  # the shape of an input is not known, or has another rank, or an attribute another type
        return (), like
    return ([] if any(size < 0 for shape in shapes for size in shape) else shapes), like


def wants_of(domain: str, op_type: str) -> WantsFunction | None:
    """What shapes an operator needs its inputs to have, if anything was said about that."""
    _load()
    return WANTS.get((_normal(domain), op_type))


def stand_in_of(domain: str, op_type: str) -> tuple[str, tuple[int, ...]] | None:
    """(ONNX operator with the same output shapes, the inputs that it takes) of one that has no schema."""
    _load()
    return STAND_INS.get((_normal(domain), op_type))


def resize_of(domain: str, op_type: str) -> ResizeFunction | None:
    """The resize of an operator, if its sizes are written down in the node."""
    _load()
    return RESIZES.get((_normal(domain), op_type))


def is_slot(domain: str, op_type: str, k: int) -> bool:
    """Whether input `k` holds sizes, which follow the survivors."""
    _load()
    return k in SLOTS.get((_normal(domain), op_type), ())


def role_of(domain: str, op_type: str, k: int) -> str:
    """What an initializer is at input `k`: weight, bias, norm, divisor, quant or index."""
    _load()
    return ROLES.get((_normal(domain), op_type), {}).get(k, "weight")


def carries(node: OpNode, k: int) -> bool:
    """Whether the outputs of a node hold the elements of input `k`."""
    _load()
    return k in CARRIES.get((_normal(node.domain), node.op_type), ())


def integers_of(domain: str, op_type: str) -> Mapping[int, tuple[int, int] | None]:
    """{input that holds quantised weights: (its zero point's input, the axis that this lies along)}."""
    _load()
    return INTEGERS.get((_normal(domain), op_type), {})


def known() -> list[tuple[str, str]]:
    """Every operator with a rule or a stated reason, as (name, first line of help), sorted."""
    _load()
    rows = {key: (function.__doc__ or "").strip().split("\n")[0] for key, function in RULES.items()}
    rows |= {key: f"frozen: {reason}" for key, reason in REASONS.items()}
    return [(f"{domain}::{op}" if domain else op, text) for (domain, op), text in sorted(rows.items())]
