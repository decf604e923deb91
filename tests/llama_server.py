"""A real server of language models that nobody here wrote, with the smallest model there can be.

The server is llama.cpp's. The model is made here: whatever it is told, it counts from one to ten,
so its answers are known beforehand, and each byte of what it is told is a token.
"""

from __future__ import annotations

import importlib.util
import json
import select
import struct
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

FOLDER = Path(__file__).resolve().parent / "llama"
KEY = "llama-servers-own-key-0123456789abcdef"
WORDS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
FIRST_WORD = (
    3 + 256
)  # the number of its token; before it are three that stand for no text, and bytes
SPOKEN = "".join(f" {word}" for word in WORDS)  # what it always says
SPOKEN_TOKENS = len(WORDS) + 1  # with the one that ends it
CHAT_TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"
START_SECONDS = 30.0
END_SECONDS = 5.0

_WIDTH = 32  # of the vectors in the model, at least one more than there are words
_NORMAL, _UNKNOWN, _CONTROL, _BYTE = 1, 2, 3, 6
_UINT32, _INT32, _FLOAT32, _STRING, _ARRAY = 4, 5, 6, 8, 9


def why_not() -> str | None:
    """What is missing to run the server here; None when nothing is."""
    if importlib.util.find_spec("xllamacpp") is None:
        return (
            "llama.cpp's server is not installed: `make test` does that where it comes ready built"
        )
    return None


class LlamaServer:
    """The server. `with LlamaServer() as server:` starts and ends it; it wants `KEY` as a key."""

    def __init__(self) -> None:
        self.url = ""
        self.model_path = ""
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._errors: IO[bytes] | None = None

    def __enter__(self) -> Self:
        self._folder = tempfile.TemporaryDirectory(prefix="farebox-llama-")
        self.model_path = str(Path(self._folder.name) / "counting-model.gguf")
        Path(self.model_path).write_bytes(model())
        self._errors = tempfile.TemporaryFile()  # `__exit__` closes it
        self._process = subprocess.Popen(
            [sys.executable, "serve.py", json.dumps({"model": self.model_path, "key": KEY})],
            cwd=FOLDER,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
        )
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], START_SECONDS)
        self.url = self._process.stdout.readline().decode().strip() if ready else ""
        if not self.url:
            log = self.log()
            self.__exit__(None, None, None)
            raise AssertionError(f"llama.cpp's server did not start:\n{log}")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        process, self._process = self._process, None
        if process is not None and process.stdin is not None and process.stdout is not None:
            process.stdin.close()
            try:
                process.wait(END_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            process.stdout.close()
        if self._errors is not None:
            self._errors.close()
        if self._folder is not None:
            self._folder.cleanup()

    def log(self) -> str:
        """What it wrote to standard error."""
        assert self._errors is not None
        self._errors.seek(0)
        return self._errors.read().decode("utf-8", "replace")


def model() -> bytes:
    """The model as a GGUF file (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md).

    Every token is one of a few directions: byte and control tokens all the same one, each word its
    own. The layer in between adds nothing, and the output has for each direction the word that
    comes next; after the last word the end.
    """
    tokens = [("<unk>", _UNKNOWN), ("<s>", _CONTROL), ("</s>", _CONTROL)]
    tokens += [(f"<0x{byte:02X}>", _BYTE) for byte in range(256)]
    assert len(tokens) == FIRST_WORD
    tokens += [(f"▁{word}", _NORMAL) for word in WORDS]
    embedding = [_direction(max(0, at - FIRST_WORD + 1)) for at in range(len(tokens))]
    output = [[0.0] * _WIDTH for _ in tokens]
    for at in range(len(WORDS)):
        output[FIRST_WORD + at] = _direction(at)
    output[2] = _direction(len(WORDS))
    facts = [
        _fact("general.architecture", _STRING, "llama"),
        _fact("llama.context_length", _UINT32, 256),
        _fact("llama.embedding_length", _UINT32, _WIDTH),
        _fact("llama.block_count", _UINT32, 1),
        _fact("llama.feed_forward_length", _UINT32, _WIDTH),
        _fact("llama.attention.head_count", _UINT32, 1),
        _fact("llama.attention.layer_norm_rms_epsilon", _FLOAT32, 1e-5),
        _fact("tokenizer.ggml.model", _STRING, "llama"),
        _list("tokenizer.ggml.tokens", _STRING, [name for name, _ in tokens]),
        _list("tokenizer.ggml.scores", _FLOAT32, [0.0] * len(tokens)),
        _list("tokenizer.ggml.token_type", _INT32, [kind for _, kind in tokens]),
        _fact("tokenizer.ggml.unknown_token_id", _UINT32, 0),
        _fact("tokenizer.ggml.bos_token_id", _UINT32, 1),
        _fact("tokenizer.ggml.eos_token_id", _UINT32, 2),
        _fact("tokenizer.chat_template", _STRING, CHAT_TEMPLATE),
    ]  # fmt: skip
    nothing, same = [[0.0] * _WIDTH] * _WIDTH, [[1.0] * _WIDTH]
    tensors = {"token_embd": embedding, "output_norm": same, "output": output}
    for name in ("attn_norm", "ffn_norm"):
        tensors[f"blk.0.{name}"] = same
    for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
        tensors[f"blk.0.{name}"] = nothing
    return _file(facts, tensors)


def _direction(number: int) -> list[float]:
    """One of many vectors at right angles, so long that only its own word is likely."""
    return [8.0 if at == number else 0.0 for at in range(_WIDTH)]


def _file(facts: list[bytes], tensors: dict[str, list[list[float]]]) -> bytes:
    head = [b"GGUF", struct.pack("<IQQ", 3, len(tensors), len(facts)), *facts]
    data = b""
    for name, rows in tensors.items():
        shape = (_WIDTH,) if len(rows) == 1 else (_WIDTH, len(rows))
        head.append(_text(f"{name}.weight") + struct.pack("<I", len(shape)))
        head.append(struct.pack(f"<{len(shape)}QIQ", *shape, 0, len(data)))  # 0: 32-bit floats
        data += b"".join(struct.pack(f"<{_WIDTH}f", *row) for row in rows)
    before = b"".join(head)
    return before + bytes(-len(before) % 32) + data  # each row is a multiple of 32 bytes


def _fact(name: str, kind: int, value: Any) -> bytes:
    return _text(name) + struct.pack("<I", kind) + _value(kind, value)


def _list(name: str, kind: int, values: Sequence[Any]) -> bytes:
    head = struct.pack("<IIQ", _ARRAY, kind, len(values))
    return _text(name) + head + b"".join(_value(kind, value) for value in values)


def _value(kind: int, value: Any) -> bytes:
    if kind == _STRING:
        return _text(value)
    return struct.pack({_UINT32: "<I", _INT32: "<i", _FLOAT32: "<f"}[kind], value)


def _text(text: str) -> bytes:
    encoded = text.encode()
    return struct.pack("<Q", len(encoded)) + encoded
