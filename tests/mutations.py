"""Input that nobody would write, drawn at random: values, words, JSON, TOML, bytes and files of safetensors."""

import json
import random
import struct
from dataclasses import fields, is_dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

NUMBERS = [0, 1, -1, 2, 3, 7, 2**31, 2**32, 2**63, 2**64, 10**30, 10**400, -(10**400)]
NUMBERS += [0.5, -0.0, 1e-320, 1e308, float("nan"), float("inf"), float("-inf")]
TEXTS = [
    "",
    " ",
    "x",
    "\0",
    "a\0b",
    "\n",
    "a\nb: c",
    "../../up",
    "..",
    ".",
    "é",
    "日本",
    "\ud800",
    "%s%n",
    "{0}",
]
TEXTS += [
    "-",
    "--",
    "-1",
    "nan",
    "1e999",
    "0x10",
    "1_000",
    "null",
    "true",
    "[]",
    "'",
    '"',
    "$HOME",
    "a" * 5000,
]
OTHERS = [None, True, False, [], {}, [[]], [1], [1, "x", None], {"a": 1}, {"": {}}]


def value(rng: random.Random) -> Any:
    return rng.choice(rng.choice([NUMBERS, TEXTS, OTHERS]))


def word(rng: random.Random) -> str:
    """One of a command line."""
    if rng.random() < 0.2:
        return "".join(chr(rng.choice([rng.randrange(1, 128), rng.randrange(0x2000)])) for _ in range(9))
    return str(rng.choice(rng.choice([NUMBERS[:11] + NUMBERS[13:], TEXTS])))


def options_of(cls: Any) -> dict[str, Any]:
    """The options that a dataclass of a command has, by name, and their types."""
    found = {}
    for field in fields(cls):
        kind = get_args(field.type)[0] if get_origin(field.type) is Annotated else field.type
        found |= options_of(kind) if is_dataclass(kind) else {field.name: kind}
    return found


def fitting(rng: random.Random, kind: Any) -> str:
    """A word that an option of this type takes, most often."""
    if get_origin(kind) is Literal:
        return rng.choice(get_args(kind))
    if get_origin(kind) in (UnionType, Union, tuple):
        return fitting(rng, rng.choice([one for one in get_args(kind) if one not in (NoneType, ...)]))
    if kind in (int, float):
        return str(rng.choice([1, 2, 3, 4, 8, 16, 64]) * (kind(1) if kind is int else 0.25))
    return rng.choice(["wrn-10-1", "resnet18", "wrn-28-10", "dgc", "x", "a/b"])


def command_line(rng: random.Random, command: str, options: dict[str, Any], first: list[str]) -> list[str]:
    """A command with some of its options, now and then of a wrong value, or with a word too many or too few."""
    words = [command, *first]
    for name in rng.sample(sorted(options), min(len(options), rng.randrange(6))):
        option = "--" + name.replace("_", "-")
        if options[name] is bool:
            words.append(rng.choice([option, option.replace("--", "--no-", 1)]))
            continue
        words += [option, fitting(rng, options[name]) if rng.random() < 0.8 else word(rng)]
    for _ in range(rng.choice([0, 0, 0, 1, 2])):
        place = rng.randrange(len(words) + 1)
        words[place : place + rng.randrange(2)] = [word(rng)]
    return words


def places(tree: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) in it."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    found = []
    for key, inner in items:
        found += [(tree, key), *places(inner)]
    return found


def changed_tree(rng: random.Random, tree: Any) -> Any:
    """A copy of what JSON holds, changed in one to three places."""
    tree = json.loads(json.dumps(tree))
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        there = places(tree)
        if not there:
            return value(rng)
        inside, key = rng.choice(there)
        how = rng.randrange(6)
        if how == 0:
            del inside[key]
        elif how == 1 and isinstance(inside, dict):
            inside[str(rng.choice([value(rng), *inside]))] = value(rng)
        elif how == 2:
            inside[key] = rng.choice([list, lambda old: {"a": old}])([inside[key]])
        elif how == 3 and isinstance(inside[key], int | float):
            inside[key] = rng.choice([-inside[key], inside[key] + 1, inside[key] * 1000, float(inside[key])])
        else:
            inside[key] = value(rng)
    return value(rng) if rng.random() < 0.02 else tree


def changed_bytes(rng: random.Random, content: bytes) -> bytes:
    """Some bits flipped, a part cut, doubled or replaced."""
    changed = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 5])):
        begin = rng.randrange(len(changed) + 1)
        end = min(len(changed), begin + rng.choice([1, 1, 4, 50, 5000]))
        how = rng.randrange(5)
        if how == 0:
            del changed[begin:end]
        elif how == 1:
            changed[begin:begin] = changed[begin:end]
        elif how == 2:
            changed[begin:end] = rng.choice([b"\0", b"\xff", b"[" * 20_000, b"\n", b"{}", rng.randbytes(4)])
        elif begin < len(changed):
            changed[begin] ^= 1 << rng.randrange(8)
    return bytes(changed)


def changed_json(rng: random.Random, tree: Any) -> bytes:
    """The text of `tree`, changed in what it holds, or as text."""
    if rng.random() < 0.75:
        text = json.dumps(changed_tree(rng, tree), indent=rng.choice([None, 1]))
        if rng.random() < 0.05:  # a key twice
            text = text.replace("{", '{"step": "x", "model": 1, ', rng.choice([1, 2]))
        return text.encode()
    if rng.random() < 0.1:
        deep = rng.choice([500, 3000, 100_000])
        return b'{"a":' * deep + b"1" + b"}" * deep
    return changed_bytes(rng, json.dumps(tree).encode())


def changed_safetensors(rng: random.Random, content: bytes) -> bytes:
    """A file whose header says something else: its length, or a name, type, shape or offset of a tensor."""
    (length,) = struct.unpack("<Q", content[:8])
    header, rest = content[8 : 8 + length], content[8 + length :]
    how = rng.randrange(6)
    if how == 0:
        other = [0, 1, 2, length - 1, length + 1, length + 8, len(content), 2**31, 2**63, 2**64 - 1]
        return struct.pack("<Q", rng.choice(other)) + content[8:]
    if how == 1:
        rest = changed_bytes(rng, rest)
    elif how == 2:
        header = changed_bytes(rng, header)
    else:
        tree = json.loads(header)
        names = [name for name in tree if name != "__metadata__"]
        if how == 3:
            about = tree[rng.choice(names)]
            about["dtype"] = rng.choice(
                ["F64", "F16", "BF16", "I64", "U8", "BOOL", "F8_E4M3", "X", "", 3, None]
            )
            if rng.random() < 0.5:
                about["shape"] = rng.choice([[], [0], [2**40, 2**40], [-1], [1], about["shape"][::-1], "x"])
        elif how == 4:  # what other programs keep as text
            about = tree["__metadata__"]
            key = rng.choice([name for name, text in about.items() if text.startswith("{")])
            about[key] = changed_json(rng, json.loads(about[key])).decode(errors="replace")
        else:
            tree = changed_tree(rng, tree)
        header = json.dumps(tree).encode()
    return struct.pack("<Q", len(header)) + header + rest


def toml(tree: dict[str, Any]) -> str:
    """A grid as TOML, or what is nearly that."""

    def text(inner: Any) -> str:
        if isinstance(inner, dict):
            return "{" + ", ".join(f"{json.dumps(str(k))} = {text(v)}" for k, v in inner.items()) + "}"
        if isinstance(inner, list):
            return "[" + ", ".join(map(text, inner)) + "]"
        if isinstance(inner, float):
            return repr(inner)
        return json.dumps(inner)

    def table(name: str, inner: Any) -> str:
        if not isinstance(inner, dict):
            return f"{json.dumps(name)} = {text(inner)}\n"
        return f"[{json.dumps(name)}]\n" + "".join(f"{json.dumps(k)} = {text(v)}\n" for k, v in inner.items())

    flat = "".join(f"{json.dumps(k)} = {text(v)}\n" for k, v in tree.items() if not isinstance(v, dict))
    return flat + "".join(table(k, v) for k, v in tree.items() if isinstance(v, dict))
