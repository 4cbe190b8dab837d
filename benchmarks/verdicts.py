"""How often the verdicts on prompts and files are right, before a zip (Zip Check) and after it (Zip LoRAs).

    python3 dev.py run benchmarks/verdicts.py choose confirm final --words     without a pass of the model: minutes
    python3 dev.py run benchmarks/verdicts.py choose confirm final             with all figures: hours on two cores
    python3 dev.py run benchmarks/verdicts.py choose confirm final --table     only what the results file holds

On the concepts of benchmarks/new_concepts.py, of LoRAs that hold alone. --words looks at every pair, but only at what
prompts' words say to the LoRAs: on this alone swapped prompts are told, and waking mostly. Else each subject, with a
style in turn, is looked at as Zip Check looks at it. Cases: the right prompts (*good*), ordinary words that the model
does not know (*cat*) and that it does (*other words*), the two prompts swapped, the same file twice, and a LoRA of
zeros in place of the subject or the style in turn. Right prompts are the training's; *short* ones have the trigger word
and less else. The miniature's text encoder has one token for all words that it does not know, so *cat* is to it one of
the ordinary prompts that words are compared with. Bounds may be chosen on `choose` alone. A run adds to the results
file, so it can be stopped and continued.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.append(str(Path(__file__).resolve().parent.parent))  # last: `nodes` there would hide ComfyUI's module

from benchmarks import new_concepts
from benchmarks.intervals import of_pairs
from benchmarks.quality_table import Record, read_records, refuse_another_world
from benchmarks.workers import share_out

if TYPE_CHECKING:
    from ziplora_core.checkup import Finding

RESULTS = Path(__file__).resolve().parent / "results" / "verdicts.jsonl"
WORDED = ("good", "short", "cat", "other words", "swapped")
CASES = ("good", "short", "cat", "other words", "swapped", "zeros", "same file")
SEED, SIDE = 0, 128


@dataclass(frozen=True)
class Job:
    block: str
    place: int
    subject: str
    style: str
    cases: tuple[str, ...]

    @property
    def pair(self) -> str:
        return f"{self.subject}+{self.style}"


def jobs(block: str, done: set[tuple[str, str, str]], cases: Sequence[str], most: int) -> list[Job]:
    """Each strong subject with a strong style in turn, of pairs whose merges were drawn and judged where there are."""
    subjects, styles = new_concepts.strong(block)
    judged = {r["pair"] for r in read_records(RESULTS.with_name(f"{block}.jsonl"))}
    found = []
    for place, subject in enumerate(subjects[:most]):
        turned = [styles[(place + i) % len(styles)] for i in range(len(styles))]
        style = next((s for s in turned if f"{subject}+{s}" in judged), turned[0])
        missing = tuple(case for case in cases if (block, f"{subject}+{style}", case) not in done)
        if missing:
            found.append(Job(block, place, subject, style, missing))
    return found


def words(case: str, own: Any, other: Any, kind: str) -> str:
    """The prompt of one concept in a case. own, other: the two trained concepts."""
    prompt = str(own.learned.prompt)
    short = own.words if kind == "content" else f"a star {own.words}"
    written = {"short": short, "cat": "a photo of a cat", "other words": "a green moon in neon style"}
    return str(other.learned.prompt) if case == "swapped" else written.get(case, prompt)


def measure(job: Job) -> list[Record]:
    """A record for each case of a pair: what Zip Check measures, and the after-zip figures on the same pictures."""
    from benchmarks.quality_job import studio_of

    studio = studio_of(job.block)
    from benchmarks.studio import PACK, core, fitting, predictor, torch

    bridge = PACK.nodes.bridge
    pair = {"content": studio.concepts[job.subject], "style": studio.concepts[job.style]}
    records = []
    for case in job.cases:
        began = time.monotonic()
        sources = studio.set_of(pair)
        record: Record = {"block": job.block, "pair": job.pair, "case": case}
        if case == "zeros":
            silenced = tuple(pair)[job.place % 2]
            for name, tensor in sources[silenced].tensors.items():
                sources[silenced].tensors[name] = torch.zeros_like(tensor)
            record["silenced"] = silenced
        if case == "same file":
            try:
                bridge.lora.loras.refuse_one_lora(studio.set_of(dict.fromkeys(pair, pair["content"])))
                record["refused"] = False
            except bridge.lora.loras.SameLoRAError:
                record["refused"] = True
            records.append(record)
            continue
        said = {c: words(case, t, pair["style" if c == "content" else "content"], c) for c, t in pair.items()}
        with torch.inference_mode():
            fitted = fitting.fit(sources, studio.model.model)
            encoders = dict.fromkeys(pair, studio.prompt)
            looked = bridge.check.look(
                studio.model, studio.prompt, sources, fitted, said, encoders, SEED, SIDE, other=True
            )
            record["seconds"] = round(time.monotonic() - began, 2)
            own, after = {c: studio.prompt(text) for c, text in said.items()}, {}
            latents = {c: drawn for c, (_, drawn) in looked.drawn.items()}

            def work(predict, joined, refs, after=after) -> None:
                after.update(core.prompts.measure(joined, predict, refs, SEED))

            predictor.with_predictor(studio.model, fitted.loras, own, latents, work)
        for concept, effect in looked.effects.items():
            record[concept] = {
                "change": {prompt: round(change, 5) for prompt, change in effect.change.items()},
                "spoiled": round(effect.spoiled, 4),
                "words": effect.words and rounded(effect.words),
                "gain": {prompt: round(gain, 5) for prompt, gain in after[concept].gain.items()},
            }
        print(job.block, job.pair, case, f"{record['seconds']} s", flush=True)
        records.append(record)
    return records


def word_jobs(block: str, done: set[tuple[str, str, str]]) -> list[Job]:
    """Every strong subject with every strong style, of the cases that are not measured yet."""
    subjects, styles = new_concepts.strong(block)
    found = []
    for place, (subject, style) in enumerate((subject, style) for subject in subjects for style in styles):
        missing = tuple(case for case in WORDED if (block, f"{subject}+{style}", case) not in done)
        if missing:
            found.append(Job(block, place, subject, style, missing))
    return found


def measure_words(jobs: Sequence[Job]) -> list[Record]:
    """A record for each case of one block's pairs, with no figure of a pass."""
    from benchmarks.quality_job import studio_of

    studio = studio_of(jobs[0].block)
    from benchmarks.studio import PACK, fitting, torch

    records = []
    for job in jobs:
        pair = {"content": studio.concepts[job.subject], "style": studio.concepts[job.style]}
        fitted = fitting.fit(studio.set_of(pair), studio.model.model)
        for case in job.cases:
            said = {c: words(case, t, pair["style" if c == "content" else "content"], c) for c, t in pair.items()}
            with torch.inference_mode():
                heard = PACK.nodes.bridge.network.text.word_effects(
                    fitted.loras, said, dict.fromkeys(pair, studio.prompt)
                )
            record: Record = {"block": job.block, "pair": job.pair, "case": case}
            record |= {c: rounded(effect) for c, effect in heard.items()}
            records.append({**record, "words alone": True})
    return records


def rounded(effect: Any) -> list[Any]:
    """A WordEffect, as `effects` reads it."""
    others = {concept: round(answer, 4) for concept, answer in effect.others.items()}
    return [round(effect.own, 4), others, [round(answer, 4) for answer in effect.ordinary]]


# --- the table -----------------------------------------------------------------------------------------------


def wilson(right: int, count: int, z: float = 1.96) -> tuple[float, float]:
    """95 % interval of a share (Wilson, 1927)."""
    if not count:
        return 0.0, 1.0
    share, spread = right / count, z * z / count
    middle = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / count + spread / (4 * count))
    return max(0.0, middle - half), min(1.0, middle + half)


def rate(hits: Sequence[bool]) -> str:
    low, high = wilson(sum(hits), len(hits))
    return f"{sum(hits)} of {len(hits)} [{low:.2f}, {high:.2f}]"


def effects(record: Record) -> dict[str, Any]:
    """By concept, as Zip Check has them."""
    from ziplora_core.checkup import Effect
    from ziplora_core.words import WordEffect

    return {
        c: Effect(record[c]["change"], record[c]["spoiled"], record[c]["words"] and WordEffect(*record[c]["words"]))
        for c in ("content", "style")
    }


def after_zip(record: Record, with_words: bool) -> Finding:
    """As the report of a zip says it of drawn references, with and without the prompts' words."""
    from ziplora_core import checkup
    from ziplora_core.prompts import PromptEffect

    measured = {c: PromptEffect(record[c]["change"], record[c]["gain"]) for c in ("content", "style")}
    heard = {c: effect.words for c, effect in effects(record).items() if with_words and effect.words}
    return checkup.after_zip(measured, heard)


def unheard(record: Record) -> Finding:
    """As Zip Check says it where no layer reads the prompt by itself: of the same figures, with the words left out."""
    from ziplora_core.checkup import find

    return find({c: replace(effect, words=None) for c, effect in effects(record).items()})


def words_table(records: Sequence[Record]) -> list[str]:
    """By words alone: where a prompt does not speak to its LoRA, Zip Check still may find that it wakes it."""
    from ziplora_core.words import WordEffect, swapped

    lines = ["| prompts, words alone | not to the subject's LoRA | not to the style's | said to be swapped |"]
    lines.append("|---" * 4 + "|")
    for case in WORDED:
        heard = [{c: WordEffect(*r[c]) for c in ("content", "style")} for r in records if r["case"] == case]
        of_lora = {c: {} for c in ("content", "style")}
        for record, effect in zip((r for r in records if r["case"] == case), heard, strict=True):
            for place, c in enumerate(of_lora):
                of_lora[c].setdefault(record["pair"].split("+")[place], []).append(not effect[c].speaks)
        deaf = [rate([all(said) for said in of_lora[c].values()]) for c in of_lora]
        lines.append(f"| {case} | {' | '.join(deaf)} | {rate([swapped(effect) for effect in heard])} |")
    return lines


def table(records: Sequence[Record]) -> list[str]:
    from ziplora_core.checkup import find

    found = {id(r): find(effects(r)) for r in records if "content" in r}
    judges: dict[str, Callable[[Record], Finding]] = {
        "Zip Check": lambda r: found[id(r)],
        "Zip Check, words left out": unheard,
        "after a zip, as Zip LoRAs": lambda r: after_zip(r, True),
        "after a zip, without words": lambda r: after_zip(r, False),
    }
    lines = ["| verdict | prompts | pair warned of | subject's | style's | said to be swapped |", "|---" * 6 + "|"]
    for name, judge in judges.items():
        for case in ("good", "short", "cat", "other words", "swapped"):
            said = [judge(r) for r in records if r["case"] == case]
            if not said:
                continue
            cells = [rate([f.swapped or bool(f.asleep) for f in said])]
            cells += [rate([f.swapped or c in f.asleep for f in said]) for c in ("content", "style")]
            cells.append(rate([f.swapped for f in said]))
            lines.append(f"| {name} | {case} | {' | '.join(cells)} |")
    zeros = [found[id(r)].idle == (r["silenced"],) for r in records if r["case"] == "zeros"]
    idle = [bool(found[id(r)].idle) for r in records if r["case"] in ("good", "short")]
    lines += ["", f"a LoRA of zeros named: {rate(zeros)}; a LoRA that is none said to do nothing: {rate(idle)}"]
    lines.append(f"the same file twice refused: {rate([r['refused'] for r in records if r['case'] == 'same file'])}")
    return lines + worth([r for r in records if r["case"] == "good"])


def worth(good: Sequence[Record]) -> list[str]:
    """Whether *worth zipping* is what the judged merges say: the default nearer to the truth than the plain sum."""
    from ziplora_core.checkup import find

    pairs, spoiled = [], []
    for block in dict.fromkeys(r["block"] for r in good):
        judged = read_records(RESULTS.with_name(f"{block}.jsonl"))
        ours, stack = (of_pairs(judged, method, "distance") for method in ("default", "direct 1/1"))
        for record in good:
            pair = tuple(record["pair"].split("+"))
            if record["block"] == block and pair in ours and pair in stack:
                said = effects(record)
                pairs.append((not find(said).enough, ours[pair] < stack[pair]))
                spoiled.append((max(e.spoiled for e in said.values()), stack[pair] - ours[pair]))
    if not pairs:
        return []
    said_so, others = ([better for worth_it, better in pairs if worth_it is kind] for kind in (True, False))
    lines = ["", f"pictures nearer to the truth zipped than stacked: {rate([better for _, better in pairs])}"]
    lines += [f"where it says worth zipping: {rate(said_so)}; where it says a plain stack is enough: {rate(others)}"]
    order = sorted(spoiled)
    ranks = "; ".join(f"{s:.2f} {gain:+.1f}" for s, gain in order)
    return [*lines, f"largest part spoiled, and how much nearer zipped: {ranks}"]


def kept(path: Path) -> list[Record]:
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return [json.loads(line) for line in lines]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("blocks", nargs="+", choices=new_concepts.BLOCKS)
    parser.add_argument("--table", action="store_true", help="only print what the results file holds")
    parser.add_argument("--words", action="store_true", help="every pair, without a pass of the model")
    parser.add_argument("--pairs", type=int, default=99, help="at most so many of each block, else all")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--processes", type=int, default=2)
    given = parser.parse_args()
    failed = False
    for block in () if given.table else given.blocks:
        held = (r["pair"] for r in kept(given.results) if r["block"] == block)
        refuse_another_world(given.results, held, sum(new_concepts.strong(block), []))
    if given.words:
        done = {(r["block"], r["pair"], r["case"]) for r in kept(given.results) if r.get("words alone")}
        missing = [found for block in given.blocks if (found := word_jobs(block, done))]  # a process loads each once
        failed |= not share_out(measure_words, missing, given.results, min(len(missing), given.processes) or 1)
    elif not given.table:
        done = {(r["block"], r["pair"], r["case"]) for r in kept(given.results) if not r.get("words alone")}
        for block in given.blocks:  # a process knows one block's concepts
            failed |= not share_out(
                measure, jobs(block, done, given.cases, given.pairs), given.results, given.processes
            )
    for block in given.blocks:
        records = [r for r in kept(given.results) if r["block"] == block]
        worded = [r for r in records if r.get("words alone")]
        records = [r for r in records if not r.get("words alone")]
        if worded:
            print("\n".join([f"\n{block}, {len({r['pair'] for r in worded})} pairs", *words_table(worded)]), flush=True)
        if records:
            print("\n".join([f"\n{block}, {len({r['pair'] for r in records})} pairs", *table(records)]), flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
