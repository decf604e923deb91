"""The documents say what is: every setting, links that lead somewhere, examples that load."""

from __future__ import annotations

import re
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin

import msgspec
import pytest

from config.sections import File, ModelSection, Section
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
    assert known - named - {"x402"} == set()  # which is refused as long as nothing serves it


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


@pytest.mark.parametrize("name", ["README.md", "docs/llm.md"])
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
