"""What the judging page gets of an item, as JSON: texts beside sanitised HTML, pictures by opaque key, where texts differ.

The page is one of our own (`static/judge.html`, served by the parent application at /judge/ID), beside the Gradio pages mounted
below /admin, and no `gr.HTML` widget in a Gradio page. Both are equally fast; what decides is what a vote must be:

- identity: a vote bears the assignment and revision that were on screen. A widget's `props` render its template anew and wipe
  what was drawn, and stock components hand the server the session's state, which by then may be the next pair's.
- blinding: media go by random keys with sign-in and cache headers; Gradio's file route tells file names.
- data as data: a `gr.HTML` template runs `${...}` found in data as code. Here data enter by `textContent`, or as HTML sanitised
  here, on a page whose content security policy allows no inline script.
- retries: a vote is sent again with the same key after a lost network or a killed server, which needs a sign-in that outlives
  the process. Gradio's does not.

Nothing here names a model, file or seed: `mmalign.annotation.Shown` does not hold them.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from itertools import pairwise
from typing import Any

from mmalign.annotation.protocol import Protocol, Verdict
from mmalign.annotation.shown import Picture, Shown, ShownContent, ShownMessage
from mmalign.apps.markup import Ranges, changes, html_of, text_of

MEDIA = "/media/"
ASKED = ("choices", "strength", "aspects", "flags", "rationale", "min_dwell_ms", "calibration")


def shown(value: Shown, *, kind: str) -> dict[str, Any]:
    """One assignment for the page: `current` and `ahead` of its replies.

    `prompt` {turns, tools}; `candidates` [{media, turns, prompt}] from left to right, where `media` are pictures for the viewer
    (projects of images) and `prompt` is only there where each candidate answers its own; `changes` {plain, rendered} of a pair
    of texts: for each side ranges of characters of its texts, as written and as the `textContent` of what is rendered, joined
    by a character, that the other side does not have; `earlier`: the verdict that stands while it is revised. A turn is {role,
    name, parts, calls, thoughts}, a part {text, html} or {media}.

    Args:
        kind: of the project; `image` puts a candidate's pictures into the viewer, `text` beside its words.
    """
    viewed = kind == "image"
    candidates = [
        {
            "media": [_media(picture) for picture in content.pictures()] if viewed else [],
            "turns": _turns(content, images=not viewed),
            "prompt": None if value.prompts is None else _prompt(value.prompts[place]),
        }
        for place, content in enumerate(value.candidates)
    ]
    return {
        "assignment": value.assignment,
        "revision": value.revision,
        "kind": kind,
        "calibration": value.calibration,
        "guideline_version": value.guideline_version,
        "expires_at": value.expires_at,
        "prompt": _prompt(value.prompt),
        "prefix": None if value.prefix is None else _text(value.prefix),
        "candidates": candidates,
        "changes": _changes(value.candidates),
        "earlier": None if value.earlier is None else verdict(value.earlier),
    }


def verdict(value: Verdict) -> dict[str, Any]:
    """A verdict as shown; the page sends the same fields."""
    return asdict(value)


def asked(protocol: Protocol) -> dict[str, Any]:
    """What of a protocol the page may know: what is asked, not how items are drawn."""
    known = asdict(protocol)
    return {name: known[name] for name in ASKED}


def guideline(text: str, version: int) -> dict[str, Any]:
    """The instructions for the page."""
    return {"version": version, **_text(text)}


def _prompt(content: ShownContent) -> dict[str, Any]:
    tools = [inner if isinstance(inner := tool.get("function"), Mapping) else tool for tool in content.tools]
    return {
        "turns": _turns(content, images=True),
        "tools": [{"name": str(tool.get("name", "tool")), "schema": json.dumps(tool, indent=2)} for tool in tools],
    }


def _turns(content: ShownContent, *, images: bool) -> list[dict[str, Any]]:
    """A text or a conversation as turns; a text alone, and the one message of an answer, need no role."""
    own = ShownMessage(role="", text=content.text or "", images=content.images if images else ())
    lone = len(content.messages) == 1 and content.messages[0].role in ("user", "assistant")
    messages = [*([own] if own.text or own.images else []), *content.messages]
    return [
        {
            "role": "" if lone else message.role,
            "name": message.name,
            "parts": _parts(message if images else replace(message, images=(), places=())),
            "calls": [_call(call) for call in message.tool_calls],
            "thoughts": _text(message.thoughts) if message.thoughts else None,
        }
        for message in messages
    ]


def _parts(message: ShownMessage) -> list[dict[str, Any]]:
    """A message's words and pictures in their order."""
    places = message.places or (0,) * len(message.images)
    parts: list[dict[str, Any]] = []
    for (start, end), picture in zip(pairwise((0, *places)), message.images, strict=True):
        if message.text[start:end].strip():
            parts.append(_text(message.text[start:end]))
        parts.append({"media": _media(picture)})
    rest = message.text[places[-1] if places else 0 :]
    return [*parts, _text(rest)] if rest.strip() else parts


def _text(text: str) -> dict[str, Any]:
    return {"text": text, "html": html_of(text)}


def _media(picture: Picture) -> dict[str, Any]:
    kind = "video" if picture.mime.startswith("video/") else "image"
    return {"src": MEDIA + picture.key, "kind": kind, "width": picture.width, "height": picture.height}


def _call(call: Mapping[str, Any]) -> dict[str, str]:
    inner = call.get("function")
    function = inner if isinstance(inner, Mapping) else call
    arguments = function.get("arguments", {})
    told = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return {"name": inner if isinstance(inner, str) else str(function.get("name", "")), "arguments": told}


def _changes(candidates: Sequence[ShownContent]) -> dict[str, tuple[Ranges, Ranges]] | None:
    """Where a pair of texts differ, as written and as rendered; None for lists, and where one side says nothing."""
    said = [[part for turn in _turns(one, images=False) for part in turn["parts"] if "text" in part] for one in candidates]
    if len(said) != 2 or not all(said):
        return None
    plain = ["\n".join(part["text"] for part in side) for side in said]
    rendered = ["\n".join(part["text"] if part["html"] is None else text_of(part["html"]) for part in side) for side in said]
    return {"plain": changes(*plain), "rendered": changes(*rendered)}
