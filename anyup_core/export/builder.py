"""A graph in the Open Neural Network Exchange format, written node by node."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

OPSET, IR_VERSION = 18, 10


class Graph:
    """Nodes and constants; a method call adds a node and returns the name of its output.

    Attributes:
        known: tables by name, where they are no inputs of the file.

    Args:
        half: whether weights are stored as float16 and cast when the file is loaded.
        loops: whether `over_blocks` is a loop; otherwise there is one block.
        outer: the graph that this one is the body of.
        prefix: of every name but those of inputs.
    """

    def __init__(self, half: bool = False, loops: bool = True, outer: Graph | None = None, prefix: str = ""):
        self.half, self.loops = half, loops
        self.root: Graph = self if outer is None else outer.root
        self.prefix = self.root.prefix if outer is not None else prefix
        self.nodes: list[Any] = []
        if outer is None:
            self.constants: dict[tuple, tuple[str, np.ndarray]] = {}
            self.halves: dict[tuple, tuple[str, np.ndarray]] = {}
            self.inputs: dict[str, Any] = {}
            self.known: dict[str, np.ndarray] = {}
            self.count = 0

    def op(self, kind: str, *inputs: str, outputs: int = 1, **attributes: Any) -> Any:
        """Add a node; return its output's name, or the names of several."""
        names = [self.name() for _ in range(outputs)]
        self._add(kind, inputs, names, attributes)
        return names[0] if outputs == 1 else names

    def _add(self, kind: str, inputs: Sequence[str], outputs: Sequence[str], attributes: Mapping[str, Any]) -> None:
        from onnx import helper

        self.nodes.append(helper.make_node(kind, list(inputs), list(outputs), **attributes))

    def name(self) -> str:
        self.root.count += 1
        return f"{self.prefix}t{self.root.count}"

    def constant(self, array: np.ndarray) -> str:
        """Return the name of a constant; equal ones are stored once."""
        return _stored(self.root.constants, f"{self.prefix}c", array)

    def weight(self, array: np.ndarray) -> str:
        """Return the name of a float32 tensor that is stored as the file's type."""
        if not self.half:
            return self.constant(array.astype(np.float32))
        return _stored(self.root.halves, f"{self.prefix}w", array.astype(np.float16))

    def ints(self, *numbers: int) -> str:
        return self.constant(np.array(numbers, np.int64))

    def number(self, number: float) -> str:
        return self.constant(np.array(number, np.float32))

    def input(self, name: str, kind: type, shape: Sequence[str | int]) -> str:
        from onnx import helper

        self.inputs[name] = helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(np.dtype(kind)), shape)
        return name

    def over_blocks(self, body: Callable[..., Sequence[str]], *names: str) -> list[str]:
        """Apply `body` to the slices of some tensors along their first axis; return its outputs, stacked there.

        Args:
            body: called with a graph and the slices' names, returns names.
            names: of what is sliced, inputs or float32; anything else is captured.
        """
        from onnx import TensorProto, helper

        if not self.loops:
            slices = [self.op("Squeeze", name, self.ints(0)) for name in names]
            return [self.op("Unsqueeze", name, self.ints(0)) for name in body(self, *slices)]
        inner, inputs = Graph(self.half, self.loops, self), self.root.inputs
        kinds = [inputs[name].type.tensor_type.elem_type if name in inputs else TensorProto.FLOAT for name in names]
        slices = [helper.make_tensor_value_info(self.name(), kind, None) for kind in kinds]
        results = list(body(inner, *(info.name for info in slices)))
        graph = helper.make_graph(inner.nodes, self.name(), slices, [_float(name) for name in results])
        outputs = [self.name() for _ in results]
        self._add("Scan", names, outputs, dict(body=graph, num_scan_inputs=len(names)))
        return outputs

    def choose(self, condition: str, then: Callable[[Graph], str], otherwise: Callable[[Graph], str]) -> str:
        """Return what one of two branches computes, as a truth value says when the file runs."""
        from onnx import helper

        if condition in self.root.known:
            return (then if self.root.known[condition] else otherwise)(self)
        branches: dict[str, Any] = {}
        for key, branch in (("then_branch", then), ("else_branch", otherwise)):
            inner = Graph(self.half, self.loops, self)
            result = branch(inner)
            branches[key] = helper.make_graph(inner.nodes, self.name(), [], [_float(result)])
        return self.op("If", condition, **branches)

    def conv(
        self,
        x: str,
        weight: np.ndarray,
        bias: np.ndarray | None = None,
        *,
        stride: int = 1,
        pads: Sequence[int] = (0, 0, 0, 0),
        group: int = 1,
    ) -> str:
        """Convolve; every attribute is written out, as the browser's older backend wants them."""
        inputs = [x, self.weight(weight), *([] if bias is None else [self.constant(bias)])]
        attributes: dict[str, Any] = dict(
            kernel_shape=list(weight.shape[2:]), strides=[stride] * 2, dilations=[1, 1], pads=list(pads), group=group
        )
        return self.op("Conv", *inputs, **attributes)

    def used(self) -> set[str]:
        """Return the names of all tensors that nodes take, those of loops and branches among them."""
        return {name for node in all_nodes(self.nodes) for name in node.input}

    def cast_weights(self) -> list[Any]:
        """Return the nodes that make float32 weights of those that are stored as float16, all of a shape at once."""
        shapes: dict[tuple[int, ...], list[tuple[str, np.ndarray]]] = {}
        for name, array in self.halves.values():
            shapes.setdefault(array.shape, []).append((name, array))
        head = Graph(outer=self)
        for weights in shapes.values():
            names = [name for name, _ in weights]
            stored = self.constant(np.concatenate([array for _, array in weights]))
            whole = names if len(names) == 1 else [head.name()]
            head._add("Cast", [stored], whole, {"to": 1})
            if len(names) > 1:
                head._add("Split", whole, names, dict(axis=0, num_outputs=len(names)))
        return head.nodes

    def finish(
        self, title: str, outputs: Mapping[str, tuple[str, Sequence[str | int]]], metadata: Mapping[str, str]
    ) -> Any:
        """Return the checked model.

        Args:
            title: of the graph.
            outputs: names of the file's outputs -> the tensors that are to have them, and their shapes.
            metadata: of the file.
        """
        import onnx
        from onnx import TensorProto, helper, numpy_helper

        nodes = [*self.cast_weights(), *self.nodes]
        names = {tensor: name for name, (tensor, _) in outputs.items()}
        for node in self.nodes:
            node.output[:] = [names.get(name, name) for name in node.output]
        infos = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, (_, shape) in outputs.items()]
        used = self.used()
        tables = [(name, table) for name, table in self.known.items() if name in used]
        constants = [numpy_helper.from_array(array, name) for name, array in (*self.constants.values(), *tables)]
        graph = helper.make_graph(nodes, title, list(self.inputs.values()), infos, constants)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
        model.producer_name = "anyup"
        helper.set_model_props(model, dict(metadata))
        onnx.checker.check_model(model)
        return model


def _stored(arrays: dict[tuple, tuple[str, np.ndarray]], prefix: str, array: np.ndarray) -> str:
    """Return the name of an array; equal ones are stored once."""
    array = np.ascontiguousarray(array).reshape(np.shape(array))
    key = (array.dtype.str, array.shape, array.tobytes())
    if key not in arrays:
        arrays[key] = (f"{prefix}{len(arrays)}", array)
    return arrays[key][0]


def _float(name: str) -> Any:
    from onnx import TensorProto, helper

    return helper.make_tensor_value_info(name, TensorProto.FLOAT, None)


def all_nodes(nodes: Iterable[Any]) -> Iterator[Any]:
    """Yield nodes, and those of their loops and branches."""
    for node in nodes:
        yield node
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from all_nodes(attribute.g.node)
