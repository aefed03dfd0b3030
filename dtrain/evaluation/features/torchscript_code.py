"""What the code of a TorchScript file could do beside computing, by its text."""

import ast
from collections.abc import Iterator

# Operators and classes of torch itself that compute and do no more; all others could do anything.
LIBRARIES = {"aten", "prim", "prims", "quantized", "_quantized", "sparse", "mkl", "mkldnn", "onednn"}
FILES = {"save", "from_file", "load", "read_file", "write_file", "load_tensor", "_load_for_lite_interpreter"}
# Namespaces that the code may reach into, but not hand on under another name.
_NAMESPACES = (["ops"], ["__torch__"], ["__torch__", "torch"], ["__torch__", "torch", "classes"])

Classes = dict[str, dict[str, str | None]]  # class → its attributes and methods → the attribute's type as written


def module_of(name: str) -> str:
    """`net/code/__torch__/nn.py` as its classes are called: `__torch__.nn`."""
    return name.rpartition("/code/")[2].removesuffix(".py").replace("/", ".")


def declared(trees: dict[str, ast.Module]) -> Classes:
    """The classes of an archive, by member name → syntax tree. One that is defined twice declares nothing."""
    found: Classes = {}
    for name, tree in trees.items():
        for one in tree.body:
            if isinstance(one, ast.ClassDef):
                qualified = f"{module_of(name)}.{one.name}"
                found[qualified] = {} if qualified in found else dict(_declarations(one))
    return found


def _declarations(one: ast.ClassDef) -> Iterator[tuple[str, str | None]]:
    for node in one.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id, ast.unparse(node.annotation)
        elif isinstance(node, ast.FunctionDef):
            yield node.name, None


def harm_in(tree: ast.Module, module: str, classes: Classes) -> Iterator[str]:
    """Each part of a program that could do more than compute, as it is written."""
    own = set(_own_attributes(tree, module, classes))
    bases = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    for node in ast.walk(tree):
        if id(node) not in own and _does_more(node, whole=id(node) not in bases):
            yield ast.unparse(node)


def _does_more(node: ast.AST, whole: bool) -> bool:
    """whole: it is not the beginning of a longer dotted name."""
    if isinstance(node, ast.Attribute | ast.Name):
        words = _words(node)
        if isinstance(node, ast.Attribute) and node.attr in FILES:
            return True
        if words[:1] == ["ops"] and len(words) > 1 and words[1] not in LIBRARIES:
            return True
        if words[:3] == ["__torch__", "torch", "classes"] and len(words) > 3:
            return words[3] not in LIBRARIES | {"rnn", "xnnpack"}
        return whole and (words in _NAMESPACES or (words[:1] == ["ops"] and len(words) == 2))
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "getattr":
        name = node.args[1] if len(node.args) == 2 else None
        return not isinstance(name, ast.Constant) or name.value in FILES
    return isinstance(node, ast.Import | ast.ImportFrom)


def _words(node: ast.expr) -> list[str]:
    """`ops.image.read_file` as its parts; empty where it is of a value."""
    words: list[str] = []
    while isinstance(node, ast.Attribute):
        words.insert(0, node.attr)
        node = node.value
    return [node.id, *words] if isinstance(node, ast.Name) else []


def _own_attributes(tree: ast.Module, module: str, classes: Classes) -> Iterator[int]:
    """The id() of each `x.name` where the class of x declares that name: a submodule may be called `load`.

    Of any other value it would be torch's operator. So the class must be sure: x is the method's own object, or a
    variable with one assignment, from such an attribute.
    """
    for one in tree.body:
        for method in one.body if isinstance(one, ast.ClassDef) else ():
            if isinstance(method, ast.FunctionDef) and method.args.args:
                yield from _own_of_method(method, f"{module}.{one.name}", classes)


def _own_of_method(method: ast.FunctionDef, qualified: str, classes: Classes) -> Iterator[int]:
    stored = [node.id for node in ast.walk(method) if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load)]
    arguments = [node.arg for node in ast.walk(method) if isinstance(node, ast.arg)]
    this = method.args.args[0]
    if this.annotation is None or ast.unparse(this.annotation) != qualified:
        return
    if this.arg in stored or arguments.count(this.arg) > 1:
        return
    known = {this.arg: qualified}

    def declares(value: ast.AST) -> dict[str, str | None]:
        """What the class of x declares in `x.name`; nothing where the class is not sure."""
        if not isinstance(value, ast.Attribute) or not isinstance(value.value, ast.Name):
            return {}
        return classes.get(known.get(value.value.id, ""), {})

    for statement in method.body:
        yield from (id(node) for node in ast.walk(statement) if getattr(node, "attr", None) in declares(node))
        name = statement.targets[0] if isinstance(statement, ast.Assign) else None
        if isinstance(name, ast.Name) and stored.count(name.id) == 1 and name.id not in arguments:
            known[name.id] = declares(statement.value).get(getattr(statement.value, "attr", "")) or ""
