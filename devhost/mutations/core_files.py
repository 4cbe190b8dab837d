"""Faults in files: read, refused, written."""

from __future__ import annotations

from . import faults

FILES = ("tests/core/test_files.py", "tests/core/test_file_numbers.py")
SAVED = ("tests/core/test_file_numbers.py", "tests/core/test_routing.py")
CONFIGS = ("tests/core/test_adapter_config.py",)
WRITING = ("tests/core/test_writing.py",)

MUTANTS = [
    *faults(
        "ziplora_core/files.py",
        FILES,
        (
            "only the largest number is looked at",
            "math.isfinite(low.item()) and math.isfinite(high.item())",
            "math.isfinite(high.item())",
        ),
        (
            "only the least number is looked at",
            "math.isfinite(low.item()) and math.isfinite(high.item())",
            "math.isfinite(low.item())",
        ),
        ("float8 has an order", "tensor.element_size() == 1 else tensor", "tensor.element_size() == 0 else tensor"),
        ("alpha of any shape", "tensor.numel() != 1", "tensor.numel() < 1"),
        ("unprintable characters shown", "c if c.isprintable() else", "c if True else"),
        ("long names shown whole", "text if len(text) <= most else", "text if True else"),
        ("float8 refused", ", torch.float8_e5m2)", ")"),
        (
            "NaN accepted",
            "tensor.is_floating_point() and not all_finite(tensor)",
            "tensor.is_complex() and not all_finite(tensor)",
        ),
        (
            "complex numbers accepted",
            "tensor.is_complex() or (tensor.is_floating_point()",
            "(tensor.is_floating_point()",
        ),
        ("any length of header", 'text.count(b",") + text.count(b":") > _MAX_VALUES', "len(text) > 2**63"),
    ),
    *faults(
        "ziplora_core/formats.py",
        FILES,
        ("half a Kronecker product", ', (".lokr_w2_a", ".lokr_w2_b")),', ",),"),
        ("no Hadamard products", '"lycoris|hada_"', '"lycoris"'),
        ("no differences", r'mark=r"\.diff(_b)?$", ', ""),
        ("names in one case", ", re.IGNORECASE)", ")"),
    ),
    *faults(
        "ziplora_core/formats.py",
        FILES,
        (
            "half a Hadamard product",
            '(".hada_w1_a", ".hada_w1_b", ".hada_w2_a", ".hada_w2_b")',
            '(".hada_w1_a", ".hada_w1_b")',
        ),
        ("half a layer of peft's", '    (".lora_B.weight", ".lora_A.weight"),\n', ""),
    ),
    *faults(
        "ziplora_core/saved.py",
        SAVED,
        (
            "sides swapped in writing",
            "by_concept = coefficients.by_concept",
            "by_concept = dict(zip(coefficients.by_concept, [*coefficients.by_concept.values()][::-1]))",
        ),
        (
            "sides swapped in reading",
            "return Coefficients(vectors), matrices",
            "return Coefficients(dict(zip(vectors, [*vectors.values()][::-1]))), matrices",
        ),
        ("dials swapped", "dict(zip(CONCEPTS, table.pop", "dict(zip(CONCEPTS[::-1], table.pop"),
        (
            "LoRAs swapped",
            "{c: table.pop(c) for c in CONCEPTS}",
            "dict(zip(CONCEPTS, [table.pop(c) for c in CONCEPTS[::-1]]))",
        ),
        ("format of another version", 'if table["format"] not in FORMATS', 'if not table["format"]'),
        ("NaN accepted", "not bool(torch.isfinite(m).all())", "m is None"),
        ("too few columns accepted", "if here != there", "if here > there"),
        ("more layers accepted", "for layer in [*expected, *given]", "for layer in expected"),
        ("fewer layers accepted", "for layer in [*expected, *given]", "for layer in given"),
        ("more metadata left out", "{**(metadata or {}), _KEY", "{_KEY"),
        ("strength NaN accepted", " and math.isfinite(self.strength)", ""),
        ("dials NaN accepted", " and all(map(math.isfinite, self.dials.values()))", ""),
        ("numbers in half precision", "m.float() for concept, of", "m.half() for concept, of"),
        ("numbers as they come", "m.float() for concept, of", "m for concept, of"),
        ("routing left out", "(routing or {}).items()", "{}.items()"),
        (
            "routing of any method",
            "owner == _ROUTING and ((about.method == ROUTED and square) or downs)",
            "owner == _ROUTING",
        ),
        ("downs of any method", "about.method == FUSED and len", "len"),
    ),
    *faults(
        "ziplora_core/writing.py",
        WRITING,
        ("a file that came under a reserved name is lost", "if path in _reserved:", "if False:"),
        (
            "a name that was written to stays reserved",
            "                give_back(path)\n            else:",
            "            else:",
        ),
        ("the number after the next is taken", "name.number + 1", "name.number + 2"),
        ("a reserved name is lost by a first try", "if taken != path:", "if True:"),
        (
            "two have one name",
            "os.close(os.open(marker, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))",
            "os.close(os.open(marker, os.O_CREAT | os.O_WRONLY, 0o666))",
        ),
        (
            "without links another's file is replaced",
            "os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))",
            "os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o666))",
        ),
        (
            "an empty file is left where one cannot be renamed",
            "            os.unlink(path)\n            raise",
            "            raise",
        ),
        ("a file is not synced", "                os.fsync(handle)\n            if", "            if"),
        ("its name is not synced", "            _sync(path.parent)\n", ""),
        ("what was abandoned stays", "_clear(path.parent, os.fstat(handle).st_mtime)", "pass"),
    ),
    *faults(
        "ziplora_core/adapter_config.py",
        CONFIGS,
        ("rsLoRA is divided by the rank", "(math.sqrt(size) if self.rslora else size)", "size"),
        ("patterns may stand anywhere", "(?:.*\\.)?(?:{pattern})$", ".*(?:{pattern})"),
        ("a layer's own alpha is overwritten", 'or f"{layer}.alpha" in tensors or', "or"),
        ("patterns that take for ever", r' or re.search(r"\)[*+?{]", pattern)', ""),
    ),
]
