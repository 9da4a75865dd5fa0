"""Plans with evidence from their fit."""

from __future__ import annotations

import xml.etree.ElementTree as ET

SVG = "{http://www.w3.org/2000/svg}"


def texts(svg: str) -> list[str]:
    return [element.text or "" for element in ET.fromstring(svg).iter(f"{SVG}text")]


STAGES = ("input", "decompose", "functionalize", "normalize", "find_attention", "compress", "absorb", "lower")
