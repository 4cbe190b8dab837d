"""Schemas with search words, also on hosts whose own schema has no argument for them."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING

from comfy_api.v0_0_2 import io


def _with_search_words(schema: type, info: type) -> type:
    """A schema that takes `search_aliases` as newer hosts' does, and tells them to the page in the same place.

    A frontend of that age does not search them; web/ziplora_search.js has it do so.
    """

    @dataclass
    class Info(info):
        search_aliases: list[str] | None = None

    @dataclass
    class Schema(schema):
        search_aliases: list[str] = field(default_factory=list)

        def get_v1_info(self, cls):
            return Info(**vars(super().get_v1_info(cls)), search_aliases=self.search_aliases or None)

    return Schema


if TYPE_CHECKING or "search_aliases" in {own.name for own in fields(io.Schema)}:
    Schema = io.Schema
else:
    Schema = _with_search_words(io.Schema, io.NodeInfoV1)
