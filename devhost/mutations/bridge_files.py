"""Faults in files: saved, exported, found again."""

from __future__ import annotations

from . import faults

FILES = ("tests/inhost/test_contracts_files.py",)

MUTANTS = [
    *faults(
        "nodes/bridge/direct.py",
        FILES,
        ("the pair that a method prepares is dropped", "replace(fitted, loras=merged)", "fitted"),
    ),
    *faults(
        "nodes/bridge/export.py",
        FILES,
        (
            "text-encoder parts ignore the dials",
            "at_dial = replace(source, strength=zipped.clip_strength(concept))",
            "at_dial = source",
        ),
        ("bias differences may overflow", "export.fitting(name, t, dtype)", "t.to(dtype)"),
        ("of two bias differences one is kept", "tensors[name] + scaled if name in tensors else scaled", "scaled"),
        ("alpha in the metadata is one", '"ss_network_alpha": rank', '"ss_network_alpha": "1"'),
        ("the base model under the host's name for it", "_KOHYA_BASES.get(family, family)", "family"),
        (
            "text-encoder parts of other kinds are taken for plain ones",
            "if not is_plain(adapter):",
            "if False:",
        ),
        (
            "bias differences that a file sets go without a word",
            "report.append(f\"'{key}' is set",
            "str(f\"'{key}' is set",
        ),
    ),
    *faults(
        "nodes/bridge/disk/paths.py",
        FILES,
        (
            "the length of a name is counted in letters",
            "if len(prefix.encode()) > _LONGEST:",
            "if len(prefix) > _LONGEST:",
        ),
    ),
    *faults(
        "nodes/bridge/disk/provenance.py",
        FILES,
        ("the workflow is written although metadata is off", "not args.disable_metadata", "True"),
    ),
    *faults(
        "nodes/bridge/disk/provenance.py",
        FILES,
        ("a file that has changed since is bound", "if not same and hashes", "if False and hashes"),
    ),
    *faults(
        "nodes/bridge/saved.py",
        FILES,
        (
            "a file that changes while a pair is loaded goes unnoticed",
            "if bound(source).sha256 != about.sources[concept].sha256:",
            "if False:",
        ),
        (
            "a changed LoRA does not change the fingerprint",
            "files.append([first] if in_place else [first, *alike])",
            "pass",
        ),
    ),
    *faults(
        "nodes/bridge/sparse.py",
        FILES,
        (
            "twice as many elements are kept",
            "top_elements(factors, percent / 100)",
            "top_elements(factors, percent / 50)",
        ),
    ),
]
