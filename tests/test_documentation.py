"""The documents say what is: every setting, links that lead somewhere, examples that load."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin

import msgspec
import pytest
from click import Group

import cli
from config import load
from config.sections import File, ModelSection, Section
from config.x402 import _USDC
from core.errors import KINDS
from core.payments import payment as payments
from core.tariff import Model

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def text_of(document: Path) -> str:
    return document.read_text("utf-8")


def sections() -> dict[str, type[Section]]:
    """The tables of the file, as the document names them."""
    found: dict[str, type[Section]] = {}
    for field in msgspec.structs.fields(File):
        inner, shape = field.type, "[{}]"
        while get_origin(inner) in (list, dict, Union, UnionType):
            if get_origin(inner) is list:
                shape = "[[{}]]"
            if get_origin(inner) is dict:
                shape = "[{}.NAME]"
            inner = next(each for each in reversed(get_args(inner)) if each is not type(None))
        if isinstance(inner, type) and issubclass(inner, Section):
            found[shape.format(field.encode_name)] = inner
    return found


SECTIONS = sections()


@pytest.mark.parametrize("name", SECTIONS)
def test_every_setting_is_described(name: str) -> None:
    text = text_of(ROOT / "docs" / "configuration.md")
    assert f"\n## {name}\n" in text
    here = text.partition(f"\n## {name}\n")[2].partition("\n## ")[0]
    named = set(re.findall(r"`([a-z0-9_]+)`", here))
    known = {field.encode_name for field in msgspec.structs.fields(SECTIONS[name])}
    assert known - named == set()


def test_the_sections_are_all_of_the_file() -> None:
    assert {"[instance]", "[upstreams.NAME]", "[[routes]]", "[[models]]", "[smtp]"} <= set(SECTIONS)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", text_of(document)):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        file = (document.parent / name).resolve() if name else document
        assert file.is_file(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", text_of(file), re.M)
            assert anchor in {_anchor(heading) for heading in headings}, target


def _anchor(heading: str) -> str:
    return re.sub(r"[^a-z0-9 _-]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("name", ["README.md", "docs/llm.md", "docs/x402.md"])
def test_examples_of_the_config_have_keys_it_knows(name: str) -> None:
    blocks = re.findall(r"```toml\n(.*?)```", text_of(ROOT / name), re.S)
    assert blocks
    for block in blocks:
        msgspec.toml.decode(block, type=File)


def test_the_sums_of_the_example_are_right() -> None:
    text = text_of(ROOT / "docs" / "llm.md")
    blocks = re.findall(r"```toml\n(.*?)```", text, re.S)
    section: Any = msgspec.toml.decode(blocks[0], type=File).models[0]
    assert isinstance(section, ModelSection)
    model = Model.of(section, ())
    assert (
        f"**{model.price(1200, 0)} credits**; one of 300 tokens costs {model.price(300, 0)}."
        in (text)
    )
    assert f"**{model.price(section.max_output_tokens, 0)} credits**" in text
    lowered = model.affordable(10, 0)
    assert f"X-Max-Tokens-Clamped: {lowered}" in text and f"= {lowered:,} tokens" in text


# Commands, and payments on the spot.


def test_every_command_of_the_readme_is_there() -> None:
    table = text_of(ROOT / "README.md").partition("## Commands")[2].partition("\n## ")[0]
    cells = [row.split("|")[1] for row in table.splitlines() if row.startswith("| `")]
    named = {tuple(re.findall(r"[a-z-]+", text)[:2]) for cell in cells
             for text in re.findall(r"`([a-z][^`]*)`", cell)}  # fmt: skip
    known = {
        (group.name, name)
        for group in vars(cli).values()
        if isinstance(group, Group)
        for name in group.commands
    }
    for words in named - {("venv", "bin")}:
        assert words in known or words[0] in {"audit", "backup", "restore", "doctor", "price"}
    groups = {group for group, _ in known}
    assert {"payments", "vouchers", "tokens"} <= groups
    listed = {command for command in known if command[0] in ("payments", "vouchers", "tokens")}
    assert listed <= named


def test_the_errors_of_payments_are_those_there_are() -> None:
    text = text_of(ROOT / "docs" / "x402.md")
    table = text.partition("## When it does not work")[2].partition("\n## ")[0]
    named = re.findall(r"\b([45]\d\d) `([a-z_]+)`", table)
    assert {code: int(status) for status, code in named} == {
        code: KINDS[code].status for _, code in named
    }
    payment = {code for code in KINDS if code.startswith(("payment_", "facilitator_"))}
    assert payment <= {code for _, code in named}
    # Why one is refused: what is written is said somewhere, and what `fault` says is written.
    reasons = set(re.findall(r"`([a-z]+_[a-z_]+|expired)`", table.partition("Why a payment")[2]))
    sources = [Path(payments.__file__), *(ROOT / "core" / "payments").glob("*.py")]
    said = {
        node.value
        for source in sources
        for node in ast.walk(ast.parse(source.read_text("utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    assert reasons <= said, reasons - said
    told = re.findall(r'refused\(\s*"([a-z_]+)"', Path(payments.__file__).read_text("utf-8"))
    assert set(told) <= reasons, set(told) - reasons


def test_networks_whose_usdc_is_known_are_listed() -> None:
    text = text_of(ROOT / "docs" / "configuration.md").partition("\n## [x402]\n")[2]
    here = text.partition("\n## ")[0]
    for network in _USDC:
        namespace, _, reference = network.partition(":")
        assert (network if namespace == "solana" else reference) in here, network


def environment(folder: Path) -> dict[str, str]:
    return {
        "FAREBOX_INSTANCE": str(folder), "FAREBOX_SECRET_KEY": "s" * 40, "FACILITATOR_KEY": "key",
    }  # fmt: skip


def test_the_configurations_of_payments_start(tmp_path: Path) -> None:
    pytest.importorskip("coincurve")
    texts = [text_of(ROOT / name) for name in ("README.md", "docs/x402.md")]
    blocks = re.findall(r"```toml\n(\[x402\].*?)```", "\n".join(texts), re.S)
    assert len(blocks) == 3
    for block in blocks:
        (tmp_path / "farebox.toml").write_text(block, "utf-8")
        settings = load(environment(tmp_path))
        assert settings.payments is not None
