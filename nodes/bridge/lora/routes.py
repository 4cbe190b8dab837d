"""GET /ziplora/lora and /ziplora/lora/thumbnail: what is known of a LoRA file, for the page."""

from __future__ import annotations

import asyncio
import io
import sys

from aiohttp import web
from PIL import Image

from . import triggers

_SIDE = 256  # pixels of a thumbnail
_MOST_PIXELS = 2**26
_LARGEST = 32 * 2**20  # bytes of a picture
_FORMATS = ("PNG", "JPEG", "WEBP")


def register() -> None:
    """Offer both on the host's server, which is there before it loads packs; nothing where there is none."""
    server = getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)
    if server is not None:
        server.routes.get("/ziplora/lora")(_about)
        server.routes.get("/ziplora/lora/thumbnail")(_picture)


async def _about(request: web.Request) -> web.Response:
    """JSON of a file that the host lists; 404 for any other name. No path: has_thumbnail says that there is one."""
    known = await asyncio.to_thread(triggers.of_file, request.query.get("name", ""))
    if not known.listed:
        return web.json_response({"error": "no such LoRA file"}, status=404)
    about = {
        "prompt": known.prompt,
        "source": known.source,
        "base_model": known.base_model,
        "family": known.family,
        "line": known.line,
        "strength": known.strength,
        "notes": list(known.notes),
        "has_thumbnail": known.thumbnail is not None,
    }
    return web.json_response(about, headers={"Cache-Control": "no-cache"})


async def _picture(request: web.Request) -> web.Response:
    """The picture beside a file, drawn anew as a small JPEG; 404 where there is none, or it is no picture."""
    known = await asyncio.to_thread(triggers.of_file, request.query.get("name", ""))
    small = None if known.thumbnail is None else await asyncio.to_thread(thumbnail, known.thumbnail)
    if small is None:
        return web.json_response({"error": "no picture beside this file"}, status=404)
    return web.Response(body=small, content_type="image/jpeg", headers={"Cache-Control": "no-cache"})


def thumbnail(path: str) -> bytes | None:
    """A picture as a JPEG of 256 pixels at most; None for what is none, or is too large.

    Decoded and written anew, so that of a file that only has a picture's name nothing is ever sent.
    """
    try:
        with open(path, "rb") as file:
            found = file.read(_LARGEST + 1)
        if len(found) > _LARGEST:
            return None
        with Image.open(io.BytesIO(found), formats=_FORMATS) as image:
            if image.width * image.height > _MOST_PIXELS:
                return None
            image.draft("RGB", (2 * _SIDE, 2 * _SIDE))
            small = image.convert("RGB")
        small.thumbnail((_SIDE, _SIDE))
        written = io.BytesIO()
        small.save(written, "jpeg", quality=85)
        return written.getvalue()
    except Exception:  # decoders raise anything for a broken picture
        return None
