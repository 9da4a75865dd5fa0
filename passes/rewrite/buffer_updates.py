"""Writes of new tokens into a K/V buffer and reads of all its tokens, recognized in any spelling by running them.

    %w = written(%k_cache, [], setitem, [[:, :, %pos], %k])          write   %k: new tokens, along its axis 2
    %o = fhopt.attention(%q, %w, ...)                                read    axes 0, 1, 2, 3 are B, G, T, D
    %copy_ = copy_(%k_cache, %w)

Both run on numbered elements. A write may only put new tokens into slots; a read may only permute axes and drop slots
at the end. The token of each slot is computed by the graph itself: the same nodes run on a stand-in [1, 1, T, 1] for
the buffer and on new tokens numbered from 1 (`stand_in`); the example must agree with it.

Letters: B batch, G kv heads, S new tokens, T slots of the buffer, D head size.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from fhopt.errors import Miss
from fhopt.passes.graph.evaluate import Evaluator, Region, example_shape, signature, smaller
from fhopt.passes.graph.nodes import call, copy_node, fake, op_name, shape
from fhopt.passes.graph.program import Program
from fhopt.passes.recognize.node_roles import Roles

WRITE_NAMES = "setitem copy_ index_copy index_copy_ index_put index_put_ slice_scatter select_scatter"
WRITES = frozenset(WRITE_NAMES.split())
READ_NAMES = (
    "getitem slice narrow select view reshape permute transpose movedim swapaxes swapdims mT t T unsqueeze squeeze "
    "expand contiguous clone detach alias to type_as"
)
READS = frozenset(READ_NAMES.split())
SMALL, LARGE = 4, 2**24  # max batch, heads and head size of a small run; max buffer elements of a full-size run
_MODULE = re.compile(r"L\['self'\](\._modules\['[^']+'\])*(\.__dict__)?(\._buffers)?(\['\w+'\]|\.\w+)")


@dataclass(frozen=True, eq=False)
class Update:
    """The use of one buffer by a graph: its writes and reads.

    new: the written tokens. writes: the nodes that write them, of which `end` is the last; `copy` stores that in the
    buffer. reads: the nodes from `end` to the attention. axes: the buffer axes B, G, T, D; new_axes: those of the new
    tokens, -1 for a missing one.
    """

    buffer: fx.Node
    new: fx.Node
    writes: tuple[fx.Node, ...]
    reads: tuple[fx.Node, ...]
    end: fx.Node
    copy: fx.Node
    axes: tuple[int, ...] = ()
    new_axes: tuple[int, ...] = ()

    @property
    def tokens(self) -> int:
        """T, slots of the buffer."""
        return example_shape(self.buffer)[self.axes[2]]


def own_buffer(program: Program, operand: Any) -> fx.Node | None:
    """Return the buffer of the compiled module or a submodule that keys or values come from; None for anything else."""
    updates = _copies(program)
    end = _end(operand, updates)
    buffer: Any = None if end is None else updates[end].args[0]
    source = getattr(buffer, "_dynamo_source", None)
    name = "" if source is None else source.name
    return buffer if _MODULE.fullmatch(str(name() if callable(name) else name)) else None


def read_update(program: Program, node: fx.Node, operand: fx.Node, roles: Roles, base: Evaluator) -> Update:
    """Match the use of the buffer for keys or values of the attention at `node`. Raises Miss if ambiguous."""
    updates = _copies(program)
    end = _end(operand, updates)
    assert end is not None
    buffer: Any = updates[end].args[0]
    if len(example_shape(buffer)) != 4 or fake(buffer).dtype != fake(operand).dtype:
        raise Miss(f"its buffer is {fake(buffer).dtype} {list(example_shape(buffer))}; expected [B, G, T, D]", node)
    writes, reads = (_between(base, *ends) for ends in ((buffer, end), (end, operand)))
    _check_reads(reads, end)
    update = Update(buffer, _new_tokens(writes, buffer), writes, reads, end, updates[end])
    _check_users(update, node)
    return _with_axes(update, operand, roles, base)


def written_slots(update: Update, base: Evaluator, roles: Roles) -> tuple[Any, ...]:
    """Describe which slots are written, in terms that keys and values share."""
    region = Region(base, (update.buffer, update.new), update.end)
    calls = signature(region, roles.describe)[0]
    return calls, tuple(roles.number(side) for side in region.sides), update.axes[2], update.new_axes[2]


def _copies(program: Program) -> dict[fx.Node, fx.Node]:
    """Return the nodes that copy a value into an input, by that value."""
    copies = [n for n in program.graph.nodes if op_name(n) == "copy_" and n.all_input_nodes[0].op == "placeholder"]
    return {n.args[1]: n for n in copies if isinstance(n.args[1], fx.Node)}


def _end(operand: Any, updates: dict[fx.Node, fx.Node]) -> fx.Node | None:
    """Return the last value of the buffer that keys or values come from, through the first operands of nodes."""
    while isinstance(operand, fx.Node) and operand not in updates:
        operand = operand.args[0] if operand.op in ("call_function", "call_method") and operand.args else None
    return operand if isinstance(operand, fx.Node) else None


def _between(base: Evaluator, first: fx.Node, last: fx.Node) -> tuple[fx.Node, ...]:
    """Return the nodes after `first` up to `last`. Raises Miss."""
    try:
        return tuple(Region(base, (first,), last).nodes)
    except RuntimeError as error:
        raise Miss(f"the use of its buffer is not clear: {error}", last) from error


def _new_tokens(writes: Sequence[fx.Node], buffer: fx.Node) -> fx.Node:
    """Return the written tokens. Raises Miss."""
    for step in writes:
        name = str(step.args[2]).rpartition(".")[2] if op_name(step) == "written" else op_name(step)
        if name not in WRITES:
            raise Miss(f"its buffer is changed by {name}; expected writes of tokens into slots", step)
    sides = dict.fromkeys(n for step in writes for n in step.all_input_nodes if n not in {buffer, *writes})
    new = [n for n in sides if isinstance(fake(n), Tensor) and fake(n).dtype.is_floating_point]
    if len(new) != 1:
        raise Miss(f"{len(new)} tensors are written into its buffer; expected one, the new tokens", writes[-1])
    return new[0]


def _check_reads(reads: Sequence[fx.Node], end: fx.Node) -> None:
    """Raise Miss if a read may depend on values, such as beam order."""
    for step in reads:
        sides = [n for n in step.all_input_nodes if isinstance(fake(n), Tensor) and n not in {end, *reads}]
        if op_name(step) not in READS or sides:
            raise Miss(f"its buffer is read through {op_name(step)}; expected views and slices", step)


def _check_users(update: Update, node: fx.Node) -> None:
    """Raise Miss if any other node reads the buffer, before or after it is written."""
    own = {*update.writes, *update.reads, update.copy, node}
    for step in (update.buffer, *update.writes, *update.reads, update.copy):
        other = next((user for user in step.users if user not in own), None)
        if other is not None:
            what = "is returned" if other.op == "output" else f"is also read by {other.name}"
            raise Miss(f"its buffer {what}; expected this attention to be its only reader", other)


# --------------------------------------------------------------------------------------------------- measurement


def _with_axes(update: Update, operand: fx.Node, roles: Roles, base: Evaluator) -> Update:
    """Add the axes to an update. Raises Miss unless tokens are put into slots and read as they were written."""
    write, read = Region(base, (update.buffer, update.new), update.end), Region(base, (update.end,), operand)
    known = ("update", signature(write, roles.describe), signature(read, roles.describe), example_shape(operand))
    if known not in roles.known:
        try:
            roles.known[known] = _measured(update, operand, write, read)
        except Miss:
            raise
        except Exception as error:  # user code may raise anything
            raise Miss(f"the use of its buffer could not be run ({error})", operand) from error
    axes, new_axes = roles.known[known]
    return replace(update, axes=axes, new_axes=new_axes)


def _measured(update: Update, operand: fx.Node, write: Region, read: Region) -> tuple[tuple[int, ...], ...]:
    """Return (axes, new_axes), measured at small sizes if possible."""
    batch, heads, _, size = example_shape(operand)
    try:
        with smaller({n: SMALL for n in (batch, heads, size) if n > SMALL}):
            axes = _read_axes(update, operand, read)
            return axes, _new_axes(update, write, axes)
    except Exception:  # a size may have two meanings
        if torch.Size(example_shape(update.buffer)).numel() > LARGE:
            raise
        axes = _read_axes(update, operand, read)
        return axes, _new_axes(update, write, axes)


def _read_axes(update: Update, operand: fx.Node, read: Region) -> tuple[int, ...]:
    """Return the buffer axes B, G, T and D. Raises Miss."""
    sizes = example_shape(update.buffer)
    held = _elements(update.buffer)
    seen = (read.run({update.end: held}) if read.nodes else held).long().cpu()
    grid = torch.meshgrid(*map(torch.arange, seen.shape), indexing="ij")
    result = torch.unravel_index(seen, sizes)
    axes = _matched(result, sizes, grid, "read")
    if axes[2] >= 0 and not torch.equal(result[axes[2]], grid[2]):
        raise Miss("its buffer is not read from the first slot on", operand)
    rest = iter([i for i in range(4) if i not in axes])
    axes = [next(rest) if axis < 0 else axis for axis in axes]
    if sizes[axes[0]] != seen.shape[0]:
        raise Miss("its buffer is not read for all of its sequences and heads", operand)
    return tuple(axes)


def _new_axes(update: Update, write: Region, axes: tuple[int, ...]) -> tuple[int, ...]:
    """Return the new-token axes B, G, S and D. Raises Miss."""
    sizes, new = example_shape(update.buffer), example_shape(update.new)
    held, fresh_ids = _elements(update.buffer), -1 - _elements(update.new)
    result = write.run({update.buffer: held, update.new: fresh_ids})
    if not torch.equal(torch.where(result < 0, held, result), held):
        raise Miss("the write moves tokens within its buffer; expected them to stay in their slots", update.end)
    ordered = result.permute(axes).long().cpu()  # [B, G, T, D]
    slots = ordered[0, 0, :, 0] < 0
    if not torch.equal(ordered < 0, slots[:, None].expand_as(ordered)):
        raise Miss("sequences or heads write into different slots of its buffer; expected the same slots", update.end)
    fresh = torch.unravel_index(-1 - ordered[:, :, slots], new)
    grid = torch.meshgrid(*map(torch.arange, fresh[0].shape), indexing="ij") if new else ()
    new_axes = tuple(_matched(fresh, new, grid, "written"))
    tokens = fresh[new_axes[2]] if new_axes[2] >= 0 else torch.zeros_like(fresh[0])
    expected = torch.zeros(len(slots), dtype=torch.int64)
    expected[slots] = tokens[0, 0, :, 0] + 1
    blank = held.new_zeros([n if i == axes[2] else 1 for i, n in enumerate(sizes)])
    numbers = write.run({update.buffer: blank, update.new: numbered(fresh_ids, new_axes[2]).double()})
    if not torch.equal(numbers.flatten().long().cpu(), expected) or bool((tokens != tokens[:1, :1, :, :1]).any()):
        raise Miss("sequences or heads write into different slots of its buffer; expected the same slots", update.end)
    return new_axes


def _elements(node: fx.Node) -> Tensor:
    """Return element indices of a tensor's shape, from 0, on its device."""
    sizes = torch.Size(example_shape(node))
    return torch.arange(sizes.numel(), dtype=torch.float64, device=fake(node).device).view(sizes)


def _matched(results: Sequence[Tensor], sizes: Sequence[int], grid: Sequence[Tensor], how: str) -> list[int]:
    """Match the axes of a tensor with B, G, T and D by the coordinates of its elements in [B, G, T, D].

    An axis of size 1 is -1. Raises Miss.
    """
    axes = [-1] * 4
    free = [i for i, size in enumerate(sizes) if size > 1]
    for place in (0, 1, 3):
        if grid[place].shape[place] > 1:
            match = [i for i in free if torch.equal(results[i], grid[place])]
            if not match:
                raise Miss(f"its buffer is not {how} as whole keys of all heads")
            axes[place] = match[0]
            free.remove(match[0])
    if len(free) > 1:
        raise Miss(f"its buffer is not {how} for all of its sequences and heads")
    axes[2] = free[0] if free else -1
    return axes


# --------------------------------------------------------------------------------------------------- graph functions


def numbered(new: Tensor, axis: int) -> Tensor:
    """Return token indices from 1 along the token axis of the new tokens; all other axes have size 1."""
    numbers = torch.arange(1, 1 + (new.shape[axis] if axis >= 0 else 1), device=new.device)
    return numbers.view([-1 if i == axis else 1 for i in range(new.dim())])


def arrange_tokens(new: Tensor, axes: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Arrange the new tokens as [B, G, S, D]."""
    known = [axis for axis in axes if axis >= 0]
    ordered = new.permute(*known, *[i for i in range(new.dim()) if i not in known])
    return ordered.to(dtype).reshape([new.shape[axis] if axis >= 0 else 1 for axis in axes])


def no_tokens(new: Tensor, sizes: Sequence[int]) -> Tensor:
    """Return the stand-in for a buffer before tokens are written."""
    return torch.zeros(sizes, dtype=torch.int64, device=new.device)


def token_count(x: Tensor) -> Any:
    """Return T of [B, G, T, D]."""
    return x.shape[2]


def stand_in(program: Program, update: Update) -> fx.Node:
    """Repeat the writes on a stand-in: the number of the new token in each slot, from 1; 0 if unwritten."""
    sizes = [n if i == update.axes[2] else 1 for i, n in enumerate(example_shape(update.buffer))]
    mapping = {
        update.buffer: call(program, no_tokens, (update.new, sizes)),
        update.new: call(program, numbered, (update.new, update.new_axes[2])),
    }
    return _again(program, update.writes, mapping, update.end)


def slots_read(program: Program, update: Update, numbers: fx.Node) -> Any:
    """Return the number of slots read, or a node if it may change between calls."""
    last = (update.end, *update.reads)[-1]
    sizes = shape(last)
    assert sizes is not None
    if not isinstance(sizes[2], torch.SymInt):
        return int(sizes[2]) if update.reads else update.tokens
    return call(program, token_count, (_again(program, update.reads, {update.end: numbers}, last),))


def _again(program: Program, steps: Sequence[fx.Node], mapping: dict[fx.Node, fx.Node], last: fx.Node) -> fx.Node:
    """Copy nodes with other inputs."""
    known = dict(mapping)
    for step in steps:
        known[step] = copy_node(program, step, known)
    return known[last]
