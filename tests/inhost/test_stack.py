"""LoRA stacks of other packs: read in their real forms, and three LoRAs from the sockets to file, patch and export."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from test_apply import largest_difference, stock, weights

NAMES = ("dog", "oil", "hat", "rim")


@pytest.fixture(scope="module")
def patcher():
    return tiny.tiny_patcher()


@pytest.fixture(scope="module")
def stacked(patcher):
    """Files of different ranks, the third with a bias difference."""
    files = {}
    for seed, name in enumerate(NAMES):
        files[name] = tiny.full_size.attention_lora(patcher.model, 2 + seed, seed, torch.float32)
    files["hat"]["lora_unet_out_2.diff_b"] = torch.randn(4, generator=torch.Generator().manual_seed(1))
    return files


@pytest.fixture
def folder(tmp_path, monkeypatch, stacked) -> Path:
    import folder_paths

    for name in ("loras", "output/ziplora"):
        (tmp_path / name).mkdir(parents=True)
    for name, tensors in stacked.items():
        save_file(tensors, tmp_path / "loras" / f"{name}.safetensors")
    both = [str(tmp_path / "output" / "ziplora")], {".safetensors"}
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(tmp_path / "loras")], {".safetensors"}))
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "ziplora", both)
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path / "output"))
    folder_paths.filename_list_cache.clear()
    return tmp_path


def files(*entries) -> list[tuple]:
    return [(f"{name}.safetensors", *strengths) for name, *strengths in entries]


THREE = files(("hat", 0.6, 0.6), ("dog", 0.8, 0.5), ("oil", 1.0, 1.0))
ROLES = "other, subject, style"


def merged(pack, patcher, stack=THREE, roles=ROLES, method="sum"):
    sources = pack.nodes.stack.LoadLoRAStack.execute(stack, roles).args[0]
    return pack.nodes.DirectMergeLoRA.execute(patcher, sources, method).args[0]


def test_stackers_write_lists_of_tuples(pack):
    """As Efficiency Nodes, Comfyroll and Easy-Use hand them on: empty slots, lists for tuples, one strength for two."""
    entries = pack.nodes.bridge.lora.stack.entries
    unused = [("None", 1.0, 1.0), ("none", 1, 1), (" NONE ", 1, 1), ("", 1), (None, 1)]
    found = entries([("a.safetensors", 1, 0.5), *unused, ["b", 0.0, 0.0], ("c", 0.25)])
    on = [e for e in found if e.strength or e.clip_strength]
    assert [(e.name, e.strength, e.clip_strength) for e in on] == [("a.safetensors", 1.0, 0.5), ("c", 0.25, 0.25)]
    assert [e.name for e in found] == ["a.safetensors", "b", "c"]
    (theirs,) = entries([("a", np.float32(0.5), np.int64(2))])
    assert (theirs.strength, theirs.clip_strength) == (0.5, 2.0) and type(theirs.strength) is float
    for wrong, says in (
        ("a.safetensors", "lora_stack is no list"),
        (None, "lora_stack is no list"),
        ([("a", 1.0), "b"], "place 2 is 'b'; expected a file"),
        ([("a", "strong", 1.0)], "place 1 is .*numbers from -100"),
        ([("a", float("nan"), 1.0)], "place 1 is"),
        ([("a", np.float32("inf"), 1.0)], "place 1 is"),
        ([("a", np.bool_(True), 1.0)], "place 1 is"),
        ([(3, 1.0, 1.0)], "place 1 is"),
    ):
        with pytest.raises(ValueError, match=says):
            entries(wrong)
    for nothing in ([], [("None", 1.0, 1.0)], [("a", 0, 0)]):
        with pytest.raises(ValueError, match="holds no LoRA with a strength"):
            pack.nodes.bridge.lora.stack.load(nothing, ROLES)


@pytest.mark.parametrize(
    ("roles", "count", "names"),
    [
        ("subject, style", 2, ["content", "style"]),
        ("subject, style", 4, ["content", "style", "other", "other 2"]),
        ("style\nstyle", 2, ["style", "style 2"]),
        (" Subject,SUBJECT, other ", 4, ["content", "content 2", "other", "other 2"]),
        ("", 1, ["other"]),
        ("subject, style, other", 1, ["content"]),
    ],
)
def test_roles_name_the_concepts(pack, roles, count, names):
    assert pack.nodes.bridge.lora.stack.concepts(roles, count) == names
    for wrong, found in (("subject, hat", "hat"), ("subject style", "subject style")):
        says = f"roles is '{found}'; expected one of: subject, style, other for each LoRA, with commas between them"
        with pytest.raises(ValueError, match=says):
            pack.nodes.bridge.lora.stack.concepts(wrong, 2)


def test_turning_one_off_renames_no_other(pack, folder):
    load = pack.nodes.bridge.lora.stack.load
    whole = load(THREE, ROLES).by_concept
    for off in range(3):
        stack = [(name, 0, 0) if place == off else (name, *strengths) for place, (name, *strengths) in enumerate(THREE)]
        kept = {concept: source.name for concept, source in load(stack, ROLES).by_concept.items()}
        assert kept == {c: source.name for c, source in whole.items() if source.name != THREE[off][0]}


def test_strengths_are_for_the_lora_that_is_meant(pack, folder):
    """A whole path before its last part, a concept before a file; what may be two is refused."""
    (folder / "loras" / "x").mkdir()
    shutil.copyfile(folder / "loras" / "hat.safetensors", folder / "loras" / "x" / "dog.safetensors")
    stack = [("dog.safetensors", 1, 1), ("x/dog.safetensors", 1, 1), ("oil.safetensors", 1, 1)]
    sources = pack.nodes.bridge.lora.stack.load(stack, "subject，style")
    read = pack.nodes.bridge.lora.zipped.read_strengths
    assert read(sources, "dog.safetensors: 0") == {"content": 0.0}
    assert read(sources, "x/dog.safetensors: 0.5\nOIL = 2") == {"style": 0.5, "other": 2.0}
    assert read(sources, "subject：0.25\nstyle: 1") == {"content": 0.25, "style": 1.0}
    for line in ("subject: 0.25, style: 0.8", "subject:0.25,style=0.8,", "subject=.25；style：8e-1"):
        assert read(sources, line) == {"content": 0.25, "style": 0.8}
    assert read(sources, "x/dog.safetensors: 1, oil: -1\nsubject: 0") == {"style": 1.0, "other": -1.0, "content": 0.0}
    commas = sources.by_concept | {"other": replace(sources["other"], name="a: 1, b.safetensors")}
    assert read(replace(sources, by_concept=commas), "a: 1, b: 0.5") == {"other": 0.5}, "a file is called so"
    for line, says in (
        ("dog: 0.5", "'dog' may be content or style; there are: content, style, other"),
        ("content: 1\nsubject: 1", "'subject' stands there twice"),
        ("content: 1, subject: 1", "'subject' stands there twice"),
        ("style: 0,8", "'style: 0,8' is no line as 'style: 0.8', nor several of these with commas"),
        ("style 0.8, subject: 1", "'style 0.8, subject' names no LoRA of this set"),
        ("cat: 1", "'cat' names no LoRA of this set"),
    ):
        with pytest.raises(ValueError, match=says):
            read(sources, line)


def test_a_stack_of_two_is_the_pair(pack, patcher, folder):
    stack = files(("oil", 0.7, 0.7), ("dog", 0.9, 0.9))
    ours = pack.nodes.stack.LoadLoRAStack.execute(stack, "style, subject").args[0]
    theirs = pack.nodes.LoadLoRAPair.execute("dog.safetensors", "oil.safetensors", 0.9, 0.7).args[0]
    assert list(ours.by_concept) == list(theirs.by_concept) == ["content", "style"]
    for concept, source in ours.by_concept.items():
        assert (source.name, source.strength, source.sha256) == (
            theirs[concept].name, theirs[concept].strength, theirs[concept].sha256
        )  # fmt: skip


def test_three_are_applied_as_three_loaders_and_dialled_by_name(pack, patcher, folder, stacked):
    zipped = merged(pack, patcher)
    assert list(zipped.sources.by_concept) == ["content", "style", "other"]
    dialled = pack.nodes.ConceptStrengths.execute(zipped, "other: 0.5\n\nOIL.safetensors = 0.25\n").args[0]
    assert dialled.dials == {"content": 1.0, "style": 0.25, "other": 0.5}
    for given, strengths in ((zipped, (0.8, 1.0, 0.6)), (dialled, (0.8, 0.25, 0.3))):
        ours = weights(pack.nodes.bridge.apply.apply(patcher, None, given, 0.9)[0])
        theirs = patcher
        for name, strength in zip(("dog", "oil", "hat"), strengths, strict=True):
            theirs = stock(theirs, stacked[name], 0.9 * strength)
        assert largest_difference(weights(theirs), weights(patcher)) > 0.01
        assert largest_difference(ours, weights(theirs)) < 1e-4
    for text, says in (
        ("hut: 1", "'hut' names no LoRA of this set; there are: content, style, other"),
        ("hat: 1\nother: 2", "'other' stands there twice"),
        ("hat", "'hat' is no line as 'style: 0.8'"),
        ("hat: much", "is no line"),
        ("hat: nan", "other is nan; expected a number"),
    ):
        with pytest.raises(ValueError, match=re.escape(says)):
            pack.nodes.ConceptStrengths.execute(zipped, text)
    assert pack.nodes.StyleStrength.execute(zipped, 0.5, 1.0).args[0].dials["style"] == 0.5


def test_the_export_of_three_is_what_is_applied(pack, patcher, folder):
    g = torch.Generator().manual_seed(0)
    zipped = merged(pack, patcher)
    wild = {c: {k: torch.randn(m.shape, generator=g) for k, m in of.items()}
            for c, of in zipped.coefficients.by_concept.items()}  # fmt: skip
    zipped = replace(zipped, coefficients=type(zipped.coefficients)(wild)).dialled({"other": 0.5})
    tensors, report, name = pack.nodes.bridge.export.export_file(zipped, "three", 0, "fp32", "kohya")
    exported = load_file(folder / "output" / name)
    ours = weights(pack.nodes.bridge.apply.apply(patcher, None, zipped, 1.0)[0])
    assert largest_difference(weights(stock(patcher, exported)), ours) < 1e-4
    assert largest_difference(ours, weights(patcher)) > 0.01
    assert "rank 9 to 9" in report
    from safetensors import safe_open

    with safe_open(folder / "output" / name, "pt") as file:
        said = file.metadata()["modelspec.description"]
    assert "of 'dog.safetensors' (subject) and 'oil.safetensors' (style) and 'hat.safetensors' (other)" in said


def test_a_saved_set_of_three_is_loaded_again(pack, patcher, folder):
    saved = pack.nodes.bridge.saved
    zipped = merged(pack, patcher, method="shared columns").dialled({"style": 0.5})
    again = saved.load(patcher, saved.save(zipped, "three"))
    assert list(again.sources.by_concept) == ["content", "style", "other"] and again.dials == zipped.dials
    assert again.sources["content"].clip_strength == 0.5 and again.clip_strength("content") == 0.5
    for concept, of in zipped.coefficients.by_concept.items():
        assert all(torch.equal(again.coefficients[concept][name], m) for name, m in of.items())
    (folder / "loras" / "hat.safetensors").unlink()
    with pytest.raises(ValueError, match="'hat.safetensors' .* is missing"):
        saved.load(patcher, "three_00001_.safetensors")


def test_what_is_for_a_pair_alone_refuses_three_before_work(pack, patcher, folder, monkeypatch):
    sources = pack.nodes.stack.LoadLoRAStack.execute(THREE, ROLES).args[0]
    monkeypatch.setattr(pack.nodes.bridge.lora.fitting, "fit", lambda *_: pytest.fail("work has begun"))
    for method in (m.name for m in pack.ziplora_core.direct.METHODS.values() if m.for_a_pair):
        with pytest.raises(ValueError, match=f"{method} merges one content and one style LoRA; found 3"):
            pack.nodes.DirectMergeLoRA.execute(patcher, sources, method)


def references(pack, count: int) -> tuple:
    chain = ()
    for seed in range(count):
        prompt = tiny.full_size.random_prompt(5 + seed, width=96)
        latents = tiny.full_size.random_latents(8, 20 + seed)
        chain = pack.nodes.ZipLoRAReference.execute(prompt, latents, chain).args[0]
    return chain


@pytest.mark.parametrize("solver", ["layerwise", "layerwise, then gradient", "gradient"])
def test_three_are_optimized_from_the_sockets(pack, patcher, folder, solver):
    sources = pack.nodes.stack.LoadLoRAStack.execute(THREE, ROLES).args[0]
    prompts, latents = tiny.prompts(), tiny.latents()
    given = {"steps": 2, "learning_rate": 0.01, "similarity_lambda": 0.01, "batch_size": 1, "seed": 0, "solver": solver}
    node, before = pack.nodes.ZipLoRAOptimize, weights(patcher)
    with torch.inference_mode():
        result = node.execute(
            patcher, sources, prompts["content"], prompts["style"], latents["content"], latents["style"],
            references(pack, 1), **given,
        )  # fmt: skip
    said = result.args[2].split("details", 1)[0]
    assert "\nother: 'hat.safetensors'" in said.replace("  \n", "\n"), "whose file is behind the name"
    zipped, loss_map, report = result.args
    assert list(zipped.coefficients.by_concept) == ["content", "style", "other"]
    assert "other: hat.safetensors (rank 4)" in report and "other retention loss on held-out noise" in report
    assert all(references in report for references in ("all references in one pass",)) or solver == "layerwise"
    if solver != "layerwise":
        assert set(loss_map) == {"loss", "content", "style", "other", "overlap"}
    moved = [m for of in zipped.coefficients.by_concept.values() for m in of.values() if not bool((m == 1).all())]
    assert bool(moved) != (solver == "layerwise") and bool(zipped.routing) == (solver == "layerwise")
    assert largest_difference(weights(patcher), before) == 0


def test_three_that_are_routed_are_applied_saved_and_exported_as_one(pack, patcher, folder):
    """By default: ranks are mixed; a file is loaded as it was drawn, and its export by the stock loader."""
    sources = pack.nodes.stack.LoadLoRAStack.execute(THREE, ROLES).args[0]
    prompts, latents = tiny.prompts(), tiny.latents()
    given = {"steps": 10, "learning_rate": 0.01, "similarity_lambda": 0.01, "batch_size": 1, "seed": 0}
    with torch.inference_mode():
        zipped = pack.nodes.ZipLoRAOptimize.execute(
            patcher, sources, prompts["content"], prompts["style"], latents["content"], latents["style"],
            references(pack, 1), **given,
        ).args[0].dialled({"style": 0.5})  # fmt: skip
    bridge = pack.nodes.bridge
    ours = weights(bridge.apply.apply(patcher, None, zipped, 1.0)[0])
    plain = weights(bridge.apply.apply(patcher, None, merged(pack, patcher).dialled({"style": 0.5}), 1.0)[0])
    assert largest_difference(ours, plain) > 0.01, "near the sum the comparison shows little"
    again = bridge.saved.load(patcher, bridge.saved.save(zipped, "routed"))
    assert again.method == "routed" and again.routing.keys() == zipped.routing.keys() != set()
    assert largest_difference(weights(bridge.apply.apply(patcher, None, again, 1.0)[0]), ours) == 0
    _, _, name = bridge.export.export_file(zipped, "routed", 0, "fp32", "kohya")
    exported = load_file(folder / "output" / name)
    assert largest_difference(weights(stock(patcher, exported)), ours) < 1e-4
    panels = pack.nodes.ZippedLoRAReport.execute(zipped, "a picture for each panel").args[0]
    assert len(panels) == len(pack.nodes.figures.PANELS)


def test_style_strength_turns_every_style_or_says_what_does(pack, patcher, folder):
    turn = pack.nodes.StyleStrength.execute
    several = merged(pack, patcher, roles="style, subject, style")
    assert turn(several, 0.5, 1.0).args[0].dials == {"content": 1.0, "style": 0.5, "style 2": 0.5}
    alone = merged(pack, patcher, files(("oil", 1, 1)), "style")
    assert turn(alone, 0.5, 1.0).args[0].dials == {"style": 0.5}
    says = "content_strength is 0.5, but none of these LoRAs is a subject (style 'oil.safetensors'): leave it at 1"
    with pytest.raises(ValueError, match=re.escape(says) + ".* Concept Strengths"):
        turn(alone, 1.0, 0.5)
    with pytest.raises(ValueError, match="style_strength is 2, but none of these LoRAs is a style"):
        turn(merged(pack, patcher, files(("dog", 1, 1)), "subject"), 2.0, 1.0)


def test_a_direct_merge_says_of_what(pack, patcher, folder):
    for method, says in (("sum", "Plain stacking"), ("shared columns", "nothing was measured")):
        above, details = merged(pack, patcher, method=method).report.split("  \ndetails  \n")
        assert says in above and not re.search("column|coefficient|content", above)
        for line in (f"merge: {method}", "content: dog.safetensors (rank 2)", "other: hat.safetensors (rank 4)"):
            assert line in details
    one = merged(pack, patcher, files(("dog", 1, 1)), "subject").report
    assert one.startswith("One LoRA alone") and "only" not in one


@pytest.mark.parametrize("count", [0, 2])
def test_references_are_as_many_as_other_loras(pack, patcher, folder, count):
    sources = pack.nodes.stack.LoadLoRAStack.execute(THREE, ROLES).args[0]
    given = {"steps": 2, "learning_rate": 0.01, "similarity_lambda": 0.01, "batch_size": 1, "seed": 0}
    says = f"references has {count} ZipLoRA Reference nodes; expected 1, .*: content 'dog.*, style 'oil.*, other 'hat"
    for ask in (pack.nodes.ZipLoRAOptimize.execute, pack.nodes.ZipLoRAOptimize.check_lazy_status):
        with pytest.raises(ValueError, match=says):
            ask(patcher, sources, None, None, references=references(pack, count), **given)
    assert pack.nodes.ZipLoRAOptimize.check_lazy_status(
        patcher, sources, None, None, references=None, **given
    ) == ["references"]  # fmt: skip


def test_references_that_are_for_no_lora_are_to_be_disconnected(pack, patcher, folder):
    given = {"steps": 2, "learning_rate": 0.01, "similarity_lambda": 0.01, "batch_size": 1, "seed": 0}
    node = pack.nodes.ZipLoRAOptimize
    for stack in (THREE[:2], THREE[:1]):
        sources = pack.nodes.stack.LoadLoRAStack.execute(stack, "style, subject").args[0]
        for ask in (node.execute, node.check_lazy_status):
            with pytest.raises(ValueError, match="references has 1 .*hat.safetensors.*: disconnect references"):
                ask(patcher, sources, None, None, references=references(pack, 1), **given)


@pytest.mark.parametrize("late", [False, True])
def test_a_prompt_that_is_missing_is_named_before_work(pack, patcher, folder, late, monkeypatch):
    """style_positive is optional for one LoRA alone; of more, each needs its own. late: where nothing asks early."""
    given = {"steps": 2, "learning_rate": 0.01, "similarity_lambda": 0.01, "batch_size": 1, "seed": 0}
    node, prompt = pack.nodes.ZipLoRAOptimize, tiny.prompts()["content"]
    monkeypatch.setattr(pack.nodes.bridge.lora.fitting, "fit", lambda *_: pytest.fail("work has begun"))
    for stack, roles in ((THREE[:2], "style, subject"), (THREE, "style, subject"), (THREE[:2], "style, style")):
        sources = pack.nodes.stack.LoadLoRAStack.execute(stack, roles).args[0]
        second = list(sources.by_concept.values())[1]
        says = f"style_positive is not connected; .*'{second.name}' \\(style( 2)?\\) was trained with"
        more = {"references": references(pack, len(stack) - 2)}
        with pytest.raises(ValueError, match=says):
            (node.execute if late else node.check_lazy_status)(patcher, sources, prompt, **more, **given)


def test_one_lora_comes_out_as_it_is_and_nothing_is_loaded(pack, patcher, folder, stacked, monkeypatch):
    zipping = pack.nodes.bridge.optimize.zipping
    monkeypatch.setattr(zipping, "_solve", lambda *_: pytest.fail("something is computed"))
    sources = pack.nodes.stack.LoadLoRAStack.execute(files(("dog", 0.7, 0.7)), "subject").args[0]
    given = {"steps": 2, "learning_rate": 0.01, "similarity_lambda": 0.01, "batch_size": 1, "seed": 0}
    prompt = tiny.prompts()["content"]
    node = pack.nodes.ZipLoRAOptimize
    assert node.check_lazy_status(patcher, sources, None, **given) == ["content_positive"]
    zipped, _, report = node.execute(patcher, sources, prompt, **given).args
    assert report == node.execute(patcher, sources, prompt, prompt, **given).args[2], "a second prompt changes nothing"
    assert "one LoRA alone stays as it is" in report and report.startswith("One LoRA alone: it comes out as it is")
    ours = weights(pack.nodes.bridge.apply.apply(patcher, None, zipped, 1.0)[0])
    assert largest_difference(ours, weights(stock(patcher, stacked["dog"], 0.7))) < 1e-5


def test_a_file_that_stands_twice_is_named(pack, folder):
    """And not in words of Load LoRA Pair, also where they are a subject and a style, by name or by what they hold."""
    shutil.copyfile(folder / "loras" / "dog.safetensors", folder / "loras" / "copy.safetensors")
    stacks = {
        "dog": files(("dog", 1, 1), ("oil", 1, 1), ("dog", 0.5, 0.5)),
        "copy": files(("dog", 1, 1), ("copy", 1, 1)),
    }
    stacks |= {"dog ": files(("dog", 1, 1), ("dog", 1, 1))}
    for other, stack in stacks.items():
        says = f"'dog.safetensors' and '{other.strip()}.safetensors' hold the same LoRA; take one of them out"
        with pytest.raises(ValueError, match=says) as caught:
            pack.nodes.stack.LoadLoRAStack.execute(stack, "subject, style")
        assert "content_lora" not in str(caught.value)


def test_a_pair_hands_on_the_plain_stack_of_its_files(pack, patcher, folder):
    """The stock loader, entry by entry, gives what the two files give when they are simply added; a stack again reads
    as the same pair."""
    import nodes as host

    names = ("dog.safetensors", "oil.safetensors")
    pair, plain = pack.nodes.LoadLoRAPair.execute(*names, 0.8, -0.5).args
    assert plain == [("dog.safetensors", 0.8, 0.8), ("oil.safetensors", -0.5, -0.5)]
    model = patcher
    for name, strength, clip_strength in plain:
        model, _ = host.LoraLoader().load_lora(model, None, name, strength, clip_strength)
    summed = pack.nodes.DirectMergeLoRA.execute(patcher, pair, "sum").args[0]
    ours = pack.nodes.ApplyZippedLoRA.execute(patcher, summed, 1.0).args[0]
    bare, stacked = weights(patcher), weights(model)
    assert largest_difference(bare, stacked) > 1e-3
    assert largest_difference(weights(ours), stacked) < 1e-6
    again = pack.nodes.stack.LoadLoRAStack.execute(plain, "subject, style").args[0]
    assert {c: (s.name, s.strength) for c, s in again.by_concept.items()} == {
        c: (s.name, s.strength) for c, s in pair.by_concept.items()
    }
