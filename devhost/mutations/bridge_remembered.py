"""Faults in LoRAs that are stacked, taken off a model, and remembered on disk once they are zipped."""

from __future__ import annotations

from . import faults

REMEMBERED = ("tests/inhost/test_remembered.py",)
CAPTURED = ("tests/inhost/test_captured.py",)
STACKED = ("tests/inhost/test_stacked.py",)

MUTANTS = [
    *faults(
        "nodes/bridge/disk/remembered.py",
        REMEMBERED,
        ("a LoRA's strength is no part of the key", "concept: _identity(source).as_table()", "concept: source.sha256"),
        ("settings are no part of the key", "content.of_model(model), given]", "content.of_model(model)]"),
        ("the code is no part of the key", "content.of_code(), ", ""),
        ("damaged numbers are taken", 'told["key"] != made_of or whole !=', 'told["key"] != made_of or None is'),
        ("another key's file is taken", 'told["key"] != made_of or', "False or"),
        ("the newest goes first", "sorted(found, reverse=True)", "sorted(found)"),
        ("any number is kept", "stay < MOST and total", "total"),
        ("any size is kept", "stay < MOST and total + size <= most", "stay < MOST"),
        ("a zip too large for the folder pushes out the others", "if size > most_bytes():", "if False:"),
        ("others' files are deleted", "(entry for entry in entries if _is_ours(entry.name))", "entries"),
        ("a use is not noted", "os.utime(path)", "pass"),
    ),
    *faults(
        "nodes/bridge/disk/content.py",
        REMEMBERED,
        ("patched weights for the checkpoint's", "backup[k].weight if k in backup else v", "v"),
        ("patches on a model do not count", "        patcher.patches,\n", ""),
        ("others' objects on a model do not count", '"object_patches", ', ""),
        (
            "an unknown value counts as its type",
            'raise UnknownContent(f"a value of the type',
            "made.update(b'x') or (f\"x",
        ),
    ),
    *faults(
        "nodes/bridge/lora/captured.py",
        CAPTURED,
        ("differences of biases stay", "entries.append((place, put))", "pass"),
        ("any file with one matrix of it", "if all(same(of.get", "if any(same(of.get"),
        ("some of a file's layers count as all", "if there and len(there) < len(made):", "if False:"),
        ("a chain outlives its files", "all(loras.fingerprint(name) == v for", "all(True for"),
        ("an alpha that the loader has not read is used", "if source.config:", "if False:"),
        ("names before they are converted", "places = convert_lora(dict(file.places))", "places = dict(file.places)"),
        ("the folder is gone through again", "_recent[name] = None", "pass"),
        ("models merged in after are overlooked", "if later and other[2] != 1.0:", "if False:"),
        ("the text encoder keeps its parts", "for patcher in (model, clip.patcher):", "for patcher in (model,):"),
    ),
    *faults(
        "nodes/bridge/lora/calls.py",
        CAPTURED,
        (
            "block weights are taken for one strength",
            "return found.pop() if len(found) == 1 else None",
            "return found.pop()",
        ),
    ),
    *faults(
        "nodes/bridge/lora/zipped.py",
        STACKED,
        (
            "dials are lost where a pair is zipped anew",
            "given.sources.dialled(turned) if turned else given.sources",
            "given.sources",
        ),
    ),
]
